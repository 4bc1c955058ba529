"""Lock of a store: one writer at a time, or several workers, and a message that names the holder.

The lock is a `flock` on `writer.lock`, so a dead writer never blocks anybody. A writer holds it
exclusively. Workers (`leases`) share it, so that neither meets the other; the first of them holds
it exclusively for a moment, in which it sets up what they share. It serves the message: what keeps
two writers apart when it is bypassed is that nothing published is overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from weakref import WeakSet

from gradstore.errors import StoreBusy
from gradstore.format.canonical import canonical_json, parse
from gradstore.storage.local import StoreFiles
from gradstore.storage.probes import lacks

_log = logging.getLogger(__name__)

LOCK = "writer.lock"
_MAX_RECORD_BYTES = 4096

#: Seconds between two tries of a worker to join, and tries after which a writer is believed in: a
#: worker that sets up holds the lock before its record says who it is.
_TRY_SECONDS, _TRIES = 0.05, 10

_held: WeakSet[WriterLock] = WeakSet()


class StoreLock(ABC):
    """Lock of a store, wherever it is; a context manager.

    Args:
        files: of the store.
        what: the store as the user knows it, for messages.
        instead: what to do rather than wait, for messages.

    Raises:
        StoreBusy: another process holds it; names host, process id and since when.
        StoreIOError: it can't be written.
    """

    def __init__(
        self,
        files: StoreFiles,
        what: str = "store",
        instead: str = "choose another store with gradstore=PATH",
    ) -> None:
        self._files = files
        self._what, self._instead = f'{what} "{files.root}"', instead
        self._when_last: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    @abstractmethod
    def acquire(self) -> None:
        """Acquire the lock and record its holder; a record left by a dead writer is taken over."""

    @abstractmethod
    def join(
        self,
        worker: str,
        set_up: Callable[[], None],
        is_set_up: Callable[[], bool],
        when_last: Callable[[], None],
    ) -> None:
        """Acquire the lock together with other workers.

        Args:
            worker: this worker, for messages.
            set_up: run by the first, while no other process has the lock.
            is_set_up: whether a worker has set up since a writer had the lock.
            when_last: run by `release` while no other process has the lock, if there is none.
        """

    @abstractmethod
    def release(self) -> None:
        """Clear the record and release the lock; what the last of several workers leaves, too."""

    def _busy_with(self, who: str, *, works: bool) -> StoreBusy:
        """Make the refusal that names a holder, one of several workers or a writer."""
        who = f"workers of a shared build, the last to join being {who}" if works else who
        return StoreBusy(
            f"{self._what} is being written by {who}. Wait until it ends, or {self._instead}"
        )

    def _told_of_dead(self, who: str) -> None:
        _log.warning("stale lock of %s (%s) taken over", self._what, who)


class WriterLock(StoreLock):
    """Lock on a folder's `writer.lock`."""

    _fd: int | None = None

    def acquire(self) -> None:
        """Acquire the lock; see `StoreLock`."""
        fd = self._open()
        try:
            if not self._flock(fd, fcntl.LOCK_EX):
                raise self._busy(fd)
            self._take_over(fd, _this_process())
        except BaseException:  # Ctrl-C too: the lock lives as long as the descriptor
            os.close(fd)
            raise
        self._hold(fd)

    def join(
        self,
        worker: str,
        set_up: Callable[[], None],
        is_set_up: Callable[[], bool],
        when_last: Callable[[], None],
    ) -> None:
        """Acquire the lock together with other workers; see `StoreLock`."""
        fd, seen = self._open(), 0
        record = {**_this_process(), "worker": worker}
        try:
            while True:
                if self._flock(fd, fcntl.LOCK_EX):
                    self._take_over(fd, record)
                    set_up()
                # From exclusive to shared: a writer may slip in between, and is met below.
                if self._flock(fd, fcntl.LOCK_SH):
                    if is_set_up():
                        break
                    fcntl.flock(fd, fcntl.LOCK_UN)  # of workers that have just ended
                seen = 0 if "worker" in _record(fd) else seen + 1
                if seen > _TRIES:
                    raise self._busy(fd)
                time.sleep(_TRY_SECONDS)
            self._write(fd, record)
        except BaseException:
            os.close(fd)
            raise
        self._when_last = when_last
        self._hold(fd)

    def _open(self) -> int:
        path = self._files.on_disk(LOCK)
        with self._files.operation("lock", path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(path, flags, 0o644)

    def _hold(self, fd: int) -> None:
        self._fd = fd
        _held.add(self)

    def _take_over(self, fd: int, record: dict[str, object]) -> None:
        if left := _record(fd):
            self._told_of_dead(_shown(left))
        self._write(fd, record)

    def _write(self, fd: int, record: dict[str, object]) -> None:
        with self._files.operation("write", self._files.on_disk(LOCK)):
            os.ftruncate(fd, 0)
            os.pwrite(fd, canonical_json(record), 0)

    def _flock(self, fd: int, kind: int) -> bool:
        """Lock, or turn the lock into one of this kind; False, and no lock, if others hold it."""
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise lacks(self._files, "flock", error) from error
        return True

    def _busy(self, fd: int) -> StoreBusy:
        record = _record(fd)
        who = _shown(record) if record else "another process"
        return self._busy_with(who, works="worker" in record)

    def release(self) -> None:
        """Release the lock; see `StoreLock`."""
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is None:
            return
        try:
            if self._when_last is not None:
                if not self._flock(fd, fcntl.LOCK_EX):
                    return
                self._when_last()
            with self._files.operation("unlock", self._files.on_disk(LOCK)):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)


def _this_process() -> dict[str, object]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _record(fd: int) -> dict[str, object]:
    """Return the holder's record; {} when there is none or it can't be read."""
    try:
        return parse(os.pread(fd, _MAX_RECORD_BYTES, 0))
    except (OSError, ValueError):
        return {}


def _shown(record: dict[str, object]) -> str:
    worker = f"worker {record['worker']}, " if "worker" in record else ""
    return (
        f"{worker}host {record.get('host')}, pid {record.get('pid')}, since {record.get('since')}"
    )


def _close_in_child() -> None:
    """Drop all locks in a forked data-loader worker: it must not keep a killed parent's lock."""
    for lock in list(_held):
        fd, lock._fd = lock._fd, None
        if fd is not None:
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
