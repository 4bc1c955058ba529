"""The lock: a second writer hears who holds it, a stale one is taken over, a fork lets go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gradstore.errors import StoreBusy
from gradstore.storage.local import StoreFiles
from gradstore.storage.lock import LOCK, WriterLock

if TYPE_CHECKING:
    from conftest import StoreKit


def test_fault_18_a_second_writer_is_told_host_pid_and_since_when(
    kit: StoreKit, fast_path: Path
) -> None:
    with kit.writer(fast_path / "s"):
        with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}, since \d{{4}}-") as e:
            kit.writer(fast_path / "s")
        assert e.value.exit_code == 6
    kit.writer(fast_path / "s").close()


def test_fault_19_a_stale_lock_is_taken_over_with_a_warning(
    kit: StoreKit, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kit.build(fast_path / "s")
    assert (fast_path / "s" / LOCK).read_bytes() == b""
    (fast_path / "s" / LOCK).write_text(json.dumps({"host": "dead", "pid": 1, "since": "2020"}))
    kit.writer(fast_path / "s").close()
    assert "stale lock" in caplog.text
    assert "host dead, pid 1" in caplog.text


def test_a_worker_that_meets_the_end_of_a_writer_sets_up(tmp_path: Path) -> None:
    """It shares the lock before anybody has prepared the store for workers: not good enough."""
    writer, worker = WriterLock(StoreFiles(tmp_path)), WriterLock(StoreFiles(tmp_path))
    writer.acquire()
    found: list[str] = []
    lock = worker._flock

    def until_the_writer_ends(fd: int, kind: int) -> bool:
        if not lock(fd, kind):
            writer.release()
            return False
        return True

    worker._flock = until_the_writer_ends  # type: ignore[method-assign]
    worker.join("1/2", lambda: found.append("set up"), lambda: bool(found), lambda: None)
    assert found == ["set up"]
    worker.release()


def test_a_forked_child_lets_go_of_the_lock(tmp_path: Path) -> None:
    held = WriterLock(StoreFiles(tmp_path))
    held.acquire()
    (go, release), (ready, tell) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # a data-loader worker that outlives its parent
        os.write(tell, b"x")
        os.read(go, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        assert held._fd is not None
        os.close(held._fd)  # what the kernel does for a parent that is killed
        held._fd = None
        with WriterLock(StoreFiles(tmp_path)):
            pass
    finally:
        os.write(release, b"x")
        os.waitpid(child, 0)
        for end in (go, release, ready, tell):
            os.close(end)
