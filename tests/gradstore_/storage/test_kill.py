"""A kill between any two operations on disk loses nothing committed and tears nothing."""

from __future__ import annotations

import logging
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.storage.local import StoreFiles
from gradstore.store.reader import Store, open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

NAMES = ("train/1", "target/skill/1")
ROWS = {"train/1": 24, "target/skill/1": 8}


class Killed(BaseException):
    """Not an Exception: nothing may catch a kill."""


class KillAt:
    """A hook that dies at the k-th operation; a dead process does nothing any more."""

    def __init__(self, k: int) -> None:
        self.left = k
        self.dead = False

    def __call__(self, operation: str, path: Path) -> None:
        if self.left == 0 and not self.dead:
            self.dead = True
            if operation in ("write", "fsync"):
                path.write_bytes(b"torn")
        if self.dead:
            raise Killed(f"{operation} {path}")
        self.left -= 1


def run(kit: StoreKit, path: Path, files: StoreFiles, returned: list[str]) -> None:
    """Exports two generations and cleans up, noting each commit that returned."""
    with kit.writer(path, files) as writer:
        for name in NAMES:
            kit.add(writer, name, ROWS[name])
            returned.append(name)
        writer.clean()


def check_only_whole_generations(path: Path, returned: list[str]) -> None:
    try:
        store = open_store(path)
    except BadInput:
        assert not returned
        return
    names = [generation.name for generation in store.generations()]
    assert names[: len(returned)] == returned
    assert len(names) <= len(returned) + 1


def features(store: Store) -> dict[str, bytes]:
    return {
        g.name: b"".join(g.raw(u).tobytes() for u in range(len(g.units)))
        + g.scale.tobytes()
        + g.status.tobytes()
        for g in store.generations()
    }


@pytest.fixture
def reference(request: pytest.FixtureRequest, kit: StoreKit, fast_path: Path) -> dict[str, bytes]:
    kit.dtype = getattr(request, "param", kit.dtype)
    run(kit, fast_path / "reference", StoreFiles(fast_path / "reference"), [])
    return features(open_store(fast_path / "reference"))


def test_fault_16_a_kill_at_every_operation_is_resumed_to_the_same_bytes(
    kit: StoreKit, crashes: Any, fast_path: Path, reference: dict[str, bytes]
) -> None:
    path, done = fast_path / "s", list[str]()
    kills = crashes.Kills(path, done)
    run(kit, path, StoreFiles(path, kills), done)
    assert kills.operations > 100
    for k, (left, returned) in enumerate(kills.each(fast_path)):
        check_only_whole_generations(left, returned)
        run(kit, left, StoreFiles(left), [])
        store = open_store(left)
        if k % 5 == 0:
            assert verify_store(store.path).faults == (), k
        assert features(store) == reference, k
        assert len(store.commits) == len(NAMES), k


@pytest.mark.parametrize("reference", ["float16", "int8", "1bit"], indirect=True)
def test_repeated_kills_end_in_the_same_bytes(
    kit: StoreKit, fast_path: Path, reference: dict[str, bytes]
) -> None:
    for seed in range(12):
        draw, path = random.Random(seed), fast_path / f"s{seed}"
        for _ in range(6):
            returned: list[str] = []
            try:
                run(kit, path, StoreFiles(path, KillAt(draw.randrange(180))), returned)
            except Killed:
                check_only_whole_generations(path, returned)
        run(kit, path, StoreFiles(path), [])
        assert features(open_store(path)) == reference


def test_resume_redoes_only_the_unfinished_units(
    kit: StoreKit, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the units that were planned, whatever is asked for now; a line says so."""
    values = kit.features(40)
    with kit.writer(fast_path / "s") as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        kit.fill(generation, values, units=2)
    with kit.writer(fast_path / "s") as writer:
        with caplog.at_level(logging.INFO):
            resumed = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=8)
        assert "train/1 goes on in units of 16 rows, as it was begun" in caplog.messages
        assert [unit.index for unit in resumed.pending] == [2]
        assert resumed.bad_counts["non_finite"] == 1
        kit.fill(resumed, values)
        resumed.commit()
    assert np.array_equal(
        open_store(fast_path / "s").generation("train/1").usable,
        np.isfinite(values).all(1) & values.any(1),
    )


KILLED_CHILD = """
import os, runpy, signal, sys
kit = runpy.run_path(sys.argv[1])["StoreKit"]()
left = int(sys.argv[3])
def hook(operation, path):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
from pathlib import Path
from gradstore.storage.local import StoreFiles
path = Path(sys.argv[2])
with kit.writer(path, StoreFiles(path, hook)) as writer:
    kit.add(writer, "train/1", 24)
"""


@pytest.mark.parametrize("k", [70, 110])
def test_a_real_sigkill_leaves_a_stale_lock_that_is_taken_over(
    kit: StoreKit, cli: Any, fast_path: Path, k: int, caplog: pytest.LogCaptureFixture
) -> None:
    conftest = Path(__file__).parents[1] / "conftest.py"
    child = cli("-c", KILLED_CHILD, conftest, fast_path / "s", k, program="python")
    assert child.code == -signal.SIGKILL, child.err
    run(kit, fast_path / "s", StoreFiles(fast_path / "s"), [])
    assert "stale lock" in caplog.text
    assert verify_store(fast_path / "s").ok


def test_a_half_written_unit_is_redone_though_the_values_are_not_bit_equal(
    kit: StoreKit, fast_path: Path
) -> None:
    path, first, second = fast_path / "s", kit.features(24, 1), kit.features(24, 2)
    with pytest.raises(Killed), kit.writer(path, StoreFiles(path, KillAt(165))) as writer:
        kit.fill(writer.begin(kit.record(), kit.rows(24), dim=4, unit_rows=16), first)
    assert (path / "generations/train/1/features/c/0/0").exists()
    assert not (path / "generations/train/1/units/1.json").exists()
    with kit.writer(path) as writer:
        resumed = writer.begin(kit.record(), kit.rows(24), dim=4, unit_rows=16)
        redone = {unit.index for unit in resumed.pending}
        kit.fill(resumed, second)
        resumed.commit()
    found = open_store(path).generation("train/1")
    values = np.where(np.repeat([0 in redone, True], [16, 8])[:, None], second, first)
    near = np.abs(found.read(0, 24) - values) <= np.abs(values).max(1, keepdims=True) / 1024
    assert near[found.usable].all()
