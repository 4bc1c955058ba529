"""One writer at a time, told kindly; and a look at whether the disk can keep our promises.

The lock is a `flock` on `writer.lock`, so a dead writer never blocks anybody. It serves the
message: what keeps two writers apart when it is bypassed is that nothing published is overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from types import TracebackType

from gradstore.canonical import canonical_json, parse
from gradstore.errors import StoreBusy, StoreIOError
from gradstore.files import STAGING, StoreFiles

logger = logging.getLogger(__name__)

LOCK = "writer.lock"
_MAX_RECORD_BYTES = 4096


class WriterLock:
    """Holds `writer.lock` of a store; a context manager.

    Raises:
        StoreBusy: another process holds it; names host, process id and since when.
        StoreIOError: the lock file can't be written.
    """

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
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
        """Takes the lock and writes who holds it; a record left by a dead writer is taken over."""
        path = self._files.path(LOCK)
        with self._files.operation("lock", path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o644)
        try:
            self._flock(fd)
            left = _holder(fd)
            if left:
                logger.warning("stale lock of store %s (%s) taken over", self._files.root, left)
            with self._files.operation("write", path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, canonical_json(_myself()), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = _holder(fd) or "another process"
                raise StoreBusy(
                    f'store "{self._files.root}" is being written by {who}. '
                    "Wait until it ends, or choose another store with gradstore=PATH"
                ) from None
            raise _lacks(self._files, "flock", error) from error

    def release(self) -> None:
        """Clears the record and gives the lock back."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            with self._files.operation("unlock", self._files.path(LOCK)):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)


def probe(files: StoreFiles) -> None:
    """Tries fsync, link and rename in staging (flock was just taken by the lock).

    Raises:
        StoreIOError: the file system lacks one of them; names the probe.
    """
    names = {name: f"{STAGING}/probe-{name}" for name in ("file", "link", "moved")}
    for relative in names.values():
        files.remove(relative)
    probes: tuple[tuple[str, Callable[[], None]], ...] = (
        ("fsync", partial(files.write, names["file"], [b"probe"])),
        ("link", partial(_probe_link, files, names["file"], names["link"])),
        ("rename", partial(files.move, names["link"], names["moved"])),
    )
    for operation, act in probes:
        try:
            act()
        except StoreIOError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _UNSUPPORTED:
                raise _lacks(files, operation, cause) from error
            raise
    for relative in names.values():
        files.remove(relative)


_UNSUPPORTED = {
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EPERM,
    errno.EMLINK,
    errno.EXDEV,
    errno.ENOLCK,
}


def _probe_link(files: StoreFiles, staged: str, target: str) -> None:
    if not files.link(staged, target) or files.link(staged, target):
        raise _lacks(files, "link", OSError(0, "a second link to a taken name did not fail"))


def _lacks(files: StoreFiles, operation: str, error: OSError) -> StoreIOError:
    return StoreIOError(
        f'the file system of store "{files.root}" failed the {operation} probe '
        f"({error.strerror}); a store needs link, rename, fsync and flock. "
        "Choose a local disk with gradstore=PATH"
    )


def _myself() -> dict[str, object]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(fd: int) -> str:
    """Says who wrote the lock's record; "" when nobody, or when it can't be read."""
    try:
        record = parse(os.pread(fd, _MAX_RECORD_BYTES, 0))
    except (OSError, ValueError):
        return ""
    return f"host {record.get('host')}, pid {record.get('pid')}, since {record.get('since')}"
