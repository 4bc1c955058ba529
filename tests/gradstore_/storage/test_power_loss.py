"""A power loss at any operation: what returned is there and whole, and the rest is done again.

Left is what was synced and nothing else; test_forgetting.py and test_repair.py do the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from gradstore.errors import BadInput
from gradstore.format.text_table import Text
from gradstore.storage import objects_reading, unseen
from gradstore.storage.leases import Worker
from gradstore.storage.local import Hook, StoreFiles
from gradstore.store.cleaning import clean_store
from gradstore.store.held import held_store
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

SILENT = 1e6  # seconds: a worker shows no sign of life while a test runs


@pytest.fixture
def losses(crashes: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the hook of a folder; let go of what it holds afterwards.

    Signs of life that the power took the content of are watched, by a clock of the test's.
    """
    made, slept = [], [0.0]
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(unseen, "time", clock)

    def make(path: Path, returned: list[str], *, keeps: bool = True) -> Any:
        made.append(crashes.PowerLosses(path, returned, keeps=keeps))
        return made[-1]

    yield make
    for each in made:
        each.close()


def check_what_returned(path: Path, returned: list[str]) -> None:
    """Readers find what has returned, whole, and at most one commit more."""
    try:
        store = open_store(path)
    except BadInput:
        assert not returned
        return
    found = ["texts"] * bool(store.text_commits()) + [g.name for g in store.generations()]
    assert found[: len(returned)] == returned
    assert len(found) <= len(returned) + 1
    for generation in store.generations():
        generation.check_values()
        generation.read(0, generation.rows)
    assert verify_store(path).faults == ()


def alone(build: Any, path: Path, hook: Hook, returned: list[str], crashes: Any) -> None:
    with build.writer(path, files=StoreFiles(path, hook)) as writer:
        build.work(writer, returned=returned)


def two_workers(build: Any, path: Path, hook: Hook, returned: list[str], crashes: Any) -> None:
    """The first dies where its choice stands and no chunk has its name; the second goes on."""
    dies = crashes.KillBefore(0, hook, ("link",), "/features/c/")
    first = build.writer(path, Worker(1, 2, SILENT), StoreFiles(path, dies))
    with build.writer(path, Worker(2, 2, SILENT), StoreFiles(path, hook)) as second:
        with pytest.raises(dies.Killed):
            build.work(first, returned=returned)
        with suppress(dies.Killed):
            first.close()
        assert list((path / "staging/leases").rglob("*.chosen"))
        returned.clear()  # it begins with the text, which is there
        build.work(second, returned=returned)


@pytest.mark.parametrize("run", [alone, two_workers])
def test_fault_17_after_a_power_loss_every_commit_that_returned_is_there_and_whole(
    build: Any, crashes: Any, losses: Any, fast_path: Path, run: Any
) -> None:
    """At every operation; states that are equal are looked at once."""
    path, returned = fast_path / "s", list[str]()
    hook = losses(path, returned)
    run(build, path, hook, returned, crashes)
    assert hook.operations > 200
    for k, (left, by_then) in enumerate(hook.each(fast_path)):
        check_what_returned(left, by_then)
        build.run(left, Worker(1, 1) if k % 2 else None)
        build.check(left, fast_path / "whole")
    assert k > 30


def test_fault_17_what_a_service_has_answered_outlives_its_machines_power(
    build: Any, losses: Any, service: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests come one after the other; at every operation of the server on its disk."""
    returned = list[str]()
    hook = losses(service.folder, returned)
    with monkeypatch.context() as patch:
        patch.setattr(objects_reading, "REQUESTS_AT_ONCE", 1)
        patch.setattr(StoreFiles, "_step", lambda _, operation, path: hook(operation, path))
        with build.writer(service.address) as writer:
            build.work(writer, returned=returned)
    assert hook.operations > 200
    assert len(hook.left) > 30
    for left, by_then in hook.each(fast_path):
        check_what_returned(left, by_then)
        build.run(left)
        build.check(left, fast_path / "whole")


def to_be_cleaned(kit: StoreKit, path: Path) -> None:
    """A superseded attempt, an old step, an abandoned plan with a unit, texts without rows."""
    with kit.writer(path) as writer:
        for step, adapter in ((1, "first"), (2, "first"), (2, "second")):
            kit.add(writer, f"train/{step}", 20, adapter_hash=adapter)
        kit.add(writer, "target/a/2", 8)
        writer.keep_texts(kit.rows(3, first=70), [Text("p", "r", 1)] * 3)
        writer.keep_texts(kit.rows(8), [Text("p", "r", 1)] * 8)
        for adapter in ("first", "second"):
            begun = writer.begin(kit.record("train/3", adapter_hash=adapter), kit.rows(20), dim=4,
                                 unit_rows=16)  # fmt: skip
            kit.fill(begun, kit.features(20), units=1)


def test_fault_17_a_power_loss_in_a_clean_up_leaves_what_is_kept_and_no_promise_without_data(
    kit: StoreKit, losses: Any, fast_path: Path
) -> None:
    path, returned = fast_path / "s", list[str]()
    to_be_cleaned(kit, path)
    before = ["train/1", "train/2.2", "target/a/2"]
    hook = losses(path, returned)
    with kit.writer(path, StoreFiles(path, hook)) as writer:
        gone = writer.clean(keep_generations=1)
        returned.append("clean")
    assert sorted(gone) == ["train/1", "train/2", "train/3"]
    seen = set()
    for left, by_then in hook.each(fast_path):
        store = open_store(left)
        names = [generation.name for generation in store.generations()]
        assert names in ([before[1:]] if by_then else [before, before[1:]])
        assert len(store.text_commits()) == (2 if names == before else 1)
        assert verify_store(left).faults == ()
        seen.add(tuple(names))
        with kit.writer(left) as writer:
            writer.clean(keep_generations=1)
        assert kit.content(left) == kit.content(path)
        assert verify_store(left).ok
    assert len(seen) == 2
    assert len(hook.left) > 10


def test_fault_17_a_clean_up_goes_on_after_a_kill_and_a_power_loss_spoils_nothing_then(
    kit: StoreKit, crashes: Any, losses: Any, fast_path: Path
) -> None:
    """Killed before any folder is synced: a commit that is seen may not last yet."""
    origin, k, died = fast_path / "origin", 0, True
    to_be_cleaned(kit, origin)
    while died:
        path = fast_path / f"s{k}"
        shutil.copytree(origin, path)
        hook = losses(path, [], keeps=False)
        dies = crashes.KillBefore(k, hook, ("fsync_dir",))
        with suppress(dies.Killed), held_store(path, StoreFiles(path, dies)) as (held, view):
            clean_store(held, view, 1)
        died, hook.keeps = dies.dead, True
        with held_store(path, StoreFiles(path, hook)) as (held, view):
            clean_store(held, view, 1)
        for left, _ in hook.each(fast_path):
            assert verify_store(left).faults == (), k
        hook.close()
        k += 1
    assert k > 10


def test_fault_17_a_kill_before_a_folder_is_synced_and_then_a_power_loss_lose_nothing(
    build: Any, crashes: Any, losses: Any, fast_path: Path
) -> None:
    """The next process finds by its name what no power loss has kept yet: it has to sync it."""
    k, died, names = 0, True, build.names[1:]
    while died:
        path = fast_path / f"s{k}"
        hook = losses(path, [], keeps=False)
        dies = crashes.KillBefore(k, hook, ("fsync_dir",))
        try:
            build.run(path, names=names, files=StoreFiles(path, dies))
        except dies.Killed:
            build.run(path, names=names, files=StoreFiles(path, hook))
        died = dies.dead
        crashes.write_contents(hook.now(), fast_path / f"left{k}")
        hook.close()
        check_what_returned(fast_path / f"left{k}", ["texts", *names])
        k += 1
    assert k > 40


def test_fault_17_a_worker_killed_before_a_folder_is_synced_and_then_a_power_loss_lose_nothing(
    build: Any, crashes: Any, losses: Any, fast_path: Path
) -> None:
    """The other one goes on with what it finds, and what has returned to it has to last."""
    k, died, names = 0, True, build.names[1:]
    while died:
        path = fast_path / f"s{k}"
        hook = losses(path, [], keeps=False)
        dies = crashes.KillBefore(k, hook, ("fsync_dir",))
        with build.writer(path, Worker(2, 2, SILENT), StoreFiles(path, hook)) as second:
            with suppress(dies.Killed):
                with build.writer(path, Worker(1, 2, SILENT), StoreFiles(path, dies)) as first:
                    build.work(first, names)
            build.work(second, names)
            contents = hook.now()
        died = dies.dead
        crashes.write_contents(contents, fast_path / f"left{k}")
        hook.close()
        check_what_returned(fast_path / f"left{k}", ["texts", *names])
        k += 1
    assert k > 40
