"""Workers of a machine whose locks are not seen here: known by their signs of life, and left be."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from gradstore.errors import StoreIOError
from gradstore.storage import leases, unseen
from gradstore.storage.leases import Worker
from gradstore.storage.local import StoreFiles
from gradstore.storage.probes import keeps_locks
from gradstore.store.cleaning import store_set_aside
from gradstore.store.held import held_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

OTHER = "another-machine"


@pytest.fixture
def store(kit: StoreKit, fast_path: Path) -> Path:
    kit.build(fast_path / "s")
    return fast_path / "s"


def as_worker(kit: StoreKit, store: Path) -> StoreWriter:
    return StoreWriter(store, provenance=kit.provenance, worker=Worker(2, 2, 0.3))


def held(kit: StoreKit, store: Path) -> None:
    with held_store(store):
        pass


def set_aside(kit: StoreKit, store: Path) -> None:
    with store_set_aside(store):
        pass


@contextmanager
def other_machine(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StoreWriter]:
    """A worker of another machine, which the locks of this one know nothing of."""
    with monkeypatch.context() as there:
        there.setattr(leases, "this_machine", lambda: OTHER)
        there.setattr(leases, "boot_id", lambda: OTHER)
        worker = StoreWriter(store, provenance=kit.provenance, worker=Worker(1, 2, 0.3))
    with worker, monkeypatch.context() as local:
        local.setattr(fcntl, "flock", lambda fd, kind: None)
        yield worker


def as_writer(kit: StoreKit, store: Path) -> StoreWriter:
    return kit.writer(store)


@pytest.mark.parametrize("begin", [as_writer, as_worker, held, set_aside])
def test_where_flock_holds_on_one_machine_a_second_one_is_refused_and_removes_nothing(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch, begin: Callable[..., Any]
) -> None:
    with other_machine(kit, store, monkeypatch) as worker:
        staged = worker._files.stage([b"of a unit"])
        with pytest.raises(StoreIOError, match=r"failed the shared flock probe .*another machine"):
            begin(kit, store)
        assert worker._files.read(staged) == b"of a unit"
        kit.add(worker, "train/2")
    begun = begin(kit, store)
    if begun is not None:
        begun.close()


def left_behind(store: Path, content: bytes) -> Path:
    folder = store / "staging" / "77-dead"
    folder.mkdir(parents=True)
    (folder / "beat").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "content", [unseen.sign(4, 0.3, OTHER), b"%020d" % 4, b"", b"x y z", unseen.sign(4, 1e300, "z")]
)
def test_signs_that_do_not_go_on_are_watched_a_while_and_then_removed(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    folder = left_behind(store, content)
    monkeypatch.setattr(unseen, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    kit.writer(store).close()
    assert not folder.exists()
    assert now == pytest.approx({unseen.sign(4, 0.3, OTHER): 0.1, b"%020d" % 4: 20.0,
                                 b"": 20.0, b"x y z": 20.0}.get(content, 120.0))  # fmt: skip


def test_what_was_watched_once_is_not_waited_for_again(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By commands that hold a store, and remove nothing that is staged in it."""
    folder = left_behind(store, unseen.sign(4, 60.0, OTHER))
    (folder / "1").write_bytes(b"staged")
    slept: list[float] = []
    monkeypatch.setattr(unseen, "time", SimpleNamespace(monotonic=lambda: sum(slept),
                                                        sleep=slept.append))  # fmt: skip
    held(kit, store)
    assert sum(slept) == pytest.approx(20.0)
    held(kit, store)
    assert sum(slept) == pytest.approx(20.0)
    assert (folder / "1").read_bytes() == b"staged"


def test_however_long_a_lease_is_a_worker_shows_life_while_it_is_watched() -> None:
    for lease in (0.3, 60.0, 1e4, 1e9):
        assert unseen.beat_seconds(lease) < unseen._seconds(unseen.sign(1, lease, OTHER))


def test_without_signs_of_another_machine_nothing_is_waited_for(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a worker of this machine was killed: its lock would be seen."""
    left_behind(store, unseen.sign(4, 60.0, unseen.this_machine()))
    (store / "staging" / "a-file").write_bytes(b"")
    monkeypatch.setattr(unseen, "time", SimpleNamespace(monotonic=time.monotonic))  # no sleep
    kit.writer(store).close()
    as_worker(kit, store).close()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("beegfs", "tuneUseGlobalFileLocks = true"),
        ("fuse.sshfs", "sshfs has none"),
        ("cifs", "without nobrl"),
        ("nfs4", "local_lock=none"),
        ("odd", "of odd: mount it so that its machines share flock"),
    ],
)
def test_the_refusal_names_what_the_mount_needs(tmp_path: Path, kind: str, says: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 8:1 / / rw shared:1 - ext4 /dev/a rw\n"
                      f"2 1 0:9 / {tmp_path.resolve()} rw - {kind} server:/x rw\n")  # fmt: skip
    assert says in str(keeps_locks(StoreFiles(tmp_path), mounts))
    assert "this kind" in str(keeps_locks(StoreFiles(tmp_path), tmp_path / "none"))
