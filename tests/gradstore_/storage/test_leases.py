"""Leases: one worker holds a task, a living one keeps it, a dead one loses it; no clock is told."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gradstore.errors import BadInput, StoreIOError
from gradstore.storage import leases as module
from gradstore.storage.leases import Leases, Worker
from gradstore.storage.local import StoreFiles
from gradstore.storage.probes import check_sharing
from gradstore.store import writer as store_writer
from gradstore.store.writer import StoreWriter

SILENT = 1e6  # seconds: shows no sign of life while a test runs

Open = Callable[..., Leases]


@pytest.fixture
def opened(fast_path: Path) -> Iterator[Open]:
    held = []

    def make(lease_seconds: float, number: int = 1) -> Leases:
        leases = Leases(StoreFiles(fast_path), Worker(number, 2, lease_seconds))
        leases.open()
        held.append(leases)
        return leases

    yield make
    for leases in held:
        leases.close()
        leases._files.close()


def test_one_worker_holds_a_task_and_the_other_is_told_who(opened: Open) -> None:
    one, other = opened(60.0), opened(60.0, 2)
    assert one.claim("plan/3") is None
    assert one.claim("plan/3") is None  # it is its own
    holder = other.claim("plan/3")
    assert holder is not None
    assert f"worker 1/2, host {os.uname().nodename}, pid {os.getpid()}, since 2" in holder.who
    assert other.claim("plan/4") is None


def test_a_worker_that_ended_loses_its_tasks_at_once(opened: Open) -> None:
    one, other = opened(SILENT), opened(SILENT, 2)
    assert one.claim("plan/3") is None
    assert other.claim("plan/3") is not None
    one.close()
    assert other.claim("plan/3") is None


def test_fault_28_a_silent_worker_loses_its_tasks_by_the_others_own_monotonic_clock(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    # Anything but these two would be an AttributeError: no time of day is looked at.
    clock = SimpleNamespace(monotonic=lambda: now, sleep=lambda _: None)
    silent, other = opened(SILENT), opened(10.0, 2)
    monkeypatch.setattr(module, "time", clock)
    assert silent.claim("plan/3") is None
    assert other.claim("plan/3") is not None
    now += 9.9
    assert other.claim("plan/3") is not None
    silent._files.overwrite(silent._beat, silent._sign(1))
    now += 9.9
    assert other.claim("plan/3") is not None  # it has changed since: from here on
    now += 9.9
    assert other.claim("plan/3") is not None
    now += 0.2
    assert other.claim("plan/3") is None
    assert silent.claim("plan/3") is not None  # and knows that it lost it


def test_a_living_worker_keeps_its_tasks(opened: Open) -> None:
    one, other = opened(0.3), opened(0.6, 2)
    assert one.claim("plan/3") is None
    ends = time.monotonic() + 0.9
    while time.monotonic() < ends:
        assert other.claim("plan/3") is not None
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("lease", "minutes"), [(60.0, [0, 2, 4, 8, 16]), (600.0, [0, 10, 20])], ids=["", "longer"]
)
def test_a_long_wait_is_told_again_at_growing_intervals_with_the_process_to_end(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    lease: float, minutes: list[int],
) -> None:  # fmt: skip
    """Never while the lease could still end, of one that is dead."""
    now = 5.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    hangs, other = opened(SILENT), opened(lease, 2)
    assert hangs.claim("plan/3") is None
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(logging.getLogger("gradstore"), "propagate", True)
    caplog.set_level(logging.INFO, "gradstore")
    told: list[int] = []
    while now < 1250:
        hangs._files.overwrite(hangs._beat, hangs._sign(round(now)))
        holder = other.claim("plan/3")
        assert holder is not None
        before = len(caplog.messages)
        other.wait("the text", holder)
        told += [round(now / 60)] * (len(caplog.messages) - before)
    assert told == minutes
    process = f"worker 1/2, host {os.uname().nodename}, pid {os.getpid()}"
    assert all(f"waiting for the text: {process}" in line for line in caplog.messages)
    said = f"for {minutes[-1]} minutes now. It shows life; if it hangs, end that process"
    assert said in caplog.messages[-1]
    assert other.claim("plan/4") is None  # it works in between: the next wait begins anew
    other.wait("the text", holder)
    assert len(caplog.messages) == len(minutes)


def test_a_killed_process_of_this_machine_loses_its_tasks_at_once(
    opened: Open, fast_path: Path
) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        killed = Leases(StoreFiles(fast_path), Worker(1, 2, SILENT))
        killed.open()
        killed.claim("plan/3")
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    other, elsewhere = opened(SILENT, 2), opened(SILENT, 2)
    elsewhere._boot = "another machine's"
    try:
        os.read(ready, 1)
        if not other._boot:
            pytest.skip("this system does not name its boot")
        assert other.claim("plan/3") is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)
    assert elsewhere.claim("plan/3") is not None  # which sees no lock of this one's kernel
    assert other.claim("plan/3") is None


def test_once_does_a_task_once_and_the_others_wait_for_it(opened: Open) -> None:
    one, other = opened(60.0), opened(60.0, 2)
    done: list[str] = []
    one.once("texts", lambda: bool(done), lambda: done.append("one"), "the text")
    other.once("texts", lambda: bool(done), lambda: done.append("other"), "the text")
    assert done == ["one"]


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "2", "2/", "/4", "-1/4", "1/4/2", "", "1.0/4"])
def test_a_worker_that_is_not_i_of_n_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"give i/N.* such as 1/4, 2/4, 3/4 and 4/4"):
        Worker.parse(text)


def test_workers_start_apart_and_leave_no_unit_out() -> None:
    starts = [Worker(i, 4).start(10) for i in (1, 2, 3, 4)]
    assert starts == [0, 2, 5, 7]
    assert Worker(3, 4).start(1) == 0


@pytest.mark.parametrize("kind", ["nfs4", "nfs", "lustre", "ext4"])
def test_a_mount_that_keeps_locks_to_one_machine_is_refused_at_creation(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = {"lustre": "localflock"}.get(kind, "local_lock=all")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw shared:1 - ext4 /dev/a rw\n"
        f"2 1 0:9 / {tmp_path.resolve()}/with\\040space rw - {kind} server:/x rw,{option}\n"
    )
    store = tmp_path / "with space" / "store"
    monkeypatch.setattr(store_writer, "check_sharing", lambda files: check_sharing(files, mounts))
    if kind == "ext4":  # the option means nothing there
        StoreWriter(store, provenance={}, worker=Worker()).close()
        return
    with pytest.raises(StoreIOError, match=f"failed the shared flock probe .*{option}"):
        StoreWriter(store, provenance={}, worker=Worker())
    assert list(store.iterdir()) == []
    StoreWriter(store, provenance={}).close()  # alone it needs no such locks
