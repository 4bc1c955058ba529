"""Lock of a store: one writer at a time, and a message that names the holder.

The lock is a `flock` on `writer.lock`, so a dead writer never blocks anybody. It serves the
message: what keeps two writers apart when it is bypassed is that nothing published is overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from datetime import UTC, datetime
from types import TracebackType
from weakref import WeakSet

from gradstore.errors import StoreBusy
from gradstore.format.canonical import canonical_json, parse
from gradstore.storage.local import StoreFiles
from gradstore.storage.probes import lacks

_log = logging.getLogger(__name__)

LOCK = "writer.lock"
_MAX_RECORD_BYTES = 4096

_held: WeakSet[WriterLock] = WeakSet()


class WriterLock:
    """Lock on a folder's `writer.lock`; a context manager.

    Args:
        files: of the folder.
        what: the folder as the user knows it, for messages.
        instead: what to do rather than wait, for messages.

    Raises:
        StoreBusy: another process holds it; names host, process id and since when.
        StoreIOError: the lock file can't be written.
    """

    def __init__(
        self,
        files: StoreFiles,
        what: str = "store",
        instead: str = "choose another store with gradstore=PATH",
    ) -> None:
        self._files = files
        self._what, self._instead = f'{what} "{files.root}"', instead
        self._fd: int | None = None

    def __enter__(self) -> WriterLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Acquire the lock and record its holder; a record left by a dead writer is taken over."""
        path = self._files.path(LOCK)
        with self._files.operation("lock", path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o644)
        try:
            self._flock(fd)
            left = _holder(fd)
            if left:
                _log.warning("stale lock of %s (%s) taken over", self._what, left)
            with self._files.operation("write", path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, canonical_json(_this_process()), 0)
        except BaseException:  # Ctrl-C too: the lock lives as long as the descriptor
            os.close(fd)
            raise
        self._fd = fd
        _held.add(self)

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = _holder(fd) or "another process"
                raise StoreBusy(
                    f"{self._what} is being written by {who}. "
                    f"Wait until it ends, or {self._instead}"
                ) from None
            raise lacks(self._files, "flock", error) from error

    def release(self) -> None:
        """Clear the record and release the lock."""
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is None:
            return
        try:
            with self._files.operation("unlock", self._files.path(LOCK)):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)


def _this_process() -> dict[str, object]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(fd: int) -> str:
    """Return the holder in the lock's record; "" when there is none or it can't be read."""
    try:
        record = parse(os.pread(fd, _MAX_RECORD_BYTES, 0))
    except (OSError, ValueError):
        return ""
    return f"host {record.get('host')}, pid {record.get('pid')}, since {record.get('since')}"


def _close_in_child() -> None:
    """Drop all locks in a forked data-loader worker: it must not keep a killed parent's lock."""
    for lock in list(_held):
        fd, lock._fd = lock._fd, None
        if fd is not None:
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
