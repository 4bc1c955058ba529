"""A store whose documents somebody has changed and sealed again, and the chain after them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradstore.errors import StoreError
from gradstore.format.canonical import canonical_json, seal
from gradstore.storage.local import StoreFiles
from gradstore.store.asked_rows import asked_rows
from gradstore.store.cleaning import plan_clean_up
from gradstore.store.damage import assess
from gradstore.store.reader import open_store
from gradstore.store.repair import repair_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

CHAIN = (
    "spaces/gradient/provenance.json",
    "plans/train/1.json",
    "generations/train/1/units/0.json",
    "generations/train/1/units/1.json",
    "commits/1.json",
)
SPACE, PLAN, *UNITS, COMMIT = CHAIN
VALUES = [None, True, 0, -1, 2**70, 1.5, "", "x", "256", [], ["x"], {}, {"ok": "16"}, {"a": [1]}]


def seal_again(store: Path, change: Callable[[str, dict[str, Any]], None]) -> None:
    """Change documents, and seal each with the seals of those before it."""
    seals: dict[str, Any] = {}
    for name in CHAIN:
        document = json.loads((store / name).read_text())
        if name == PLAN:
            document["provenance_sha256"] = seals[SPACE]
        elif name in UNITS:
            document["plan_sha256"] = seals[PLAN]
        elif name == COMMIT:
            document["plan_sha256"] = seals[PLAN]
            document["units"] = [seals[unit] for unit in UNITS]
        change(name, document)
        document = seal(document)
        seals[name] = document["sha256"]
        (store / name).write_bytes(canonical_json(document))


def use_all(path: Path) -> None:
    """What people do with a store; each may refuse it."""
    files = StoreFiles(path)

    def read() -> None:
        for generation in open_store(path).generations():
            generation.check_values()
            generation.read(0, generation.rows)

    uses: tuple[Callable[[], object], ...] = (
        read,
        lambda: open_store(path).info(),
        lambda: verify_store(path),
        lambda: assess(path),
        lambda: asked_rows(files, open_store(path), sources=["set one:3"]),
        lambda: plan_clean_up(files, open_store(path), 1),
        lambda: repair_store(path),
    )
    for use in uses:
        with suppress(StoreError):
            use()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [] if at in ((), ("sha256",)) else [at]
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value))[:3] \
        if isinstance(value, list) else []  # fmt: skip
    return found + [place for key, below in inner for place in places(below, (*at, key))]


@pytest.fixture
def sound(kit: StoreKit, fast_path: Path) -> Path:
    kit.build(fast_path / "sound", n=20)
    return fast_path / "sound"


@given(data=st.data())
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_sealed_value_of_another_type_ends_in_a_traceback(
    sound: Path, fast_path: Path, data: st.DataObject
) -> None:
    store = fast_path / "s"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(sound, store)
    hostile = data.draw(st.sampled_from(CHAIN))
    place = data.draw(st.sampled_from(places(json.loads((store / hostile).read_text()))))
    value = data.draw(st.sampled_from(VALUES))

    def change(name: str, document: dict[str, Any]) -> None:
        if name == hostile:
            where: Any = document
            for key in place[:-1]:
                where = where[key]
            where[place[-1]] = value

    seal_again(store, change)
    use_all(store)


def test_the_chain_that_is_sealed_again_unchanged_is_a_sound_store(
    sound: Path, fast_path: Path
) -> None:
    shutil.copytree(sound, fast_path / "s")
    seal_again(fast_path / "s", lambda name, document: None)
    assert verify_store(fast_path / "s").ok


@pytest.mark.parametrize("status", [{"ok": "16"}, {"ok": 15, "odd": 1}, {"ok": 17, "masked": -1}])
def test_a_record_whose_counts_are_none_is_damage_with_exit_code_4(
    sound: Path, fast_path: Path, status: dict[str, Any]
) -> None:
    store = fast_path / "s"
    shutil.copytree(sound, store)

    def change(name: str, document: dict[str, Any]) -> None:
        if name == UNITS[0]:
            document["status"] = status

    seal_again(store, change)
    with pytest.raises(StoreError, match="status") as told:
        open_store(store).generation("train/1").check_values()
    assert told.value.exit_code == 4
    assert [fault.file for fault in verify_store(store).faults] == [UNITS[0]]
