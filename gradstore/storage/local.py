"""The one module that changes anything on the disk of a store (`reading` is its other half).

Every operation is one small step that a test can interrupt, count or fail (`hook`), and every path
is relative to the store and checked component by component: no `..`, no absolute path, no symlink.

Publishing is always: write to staging, fsync, `os.link` to the final name (which fails if the name
exists, so nothing published is ever overwritten), fsync the directory. No OSError leaves this
module: the user gets a StoreIOError with the path and, on a full disk, the bytes needed and free.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from gradstore.errors import StoreIOError
from gradstore.storage.reading import ReadFiles

#: Called as `hook(operation, path)` before each change on disk; may raise to simulate a failure.
Hook = Callable[[str, Path], None]

#: Contiguous bytes to write.
Block: TypeAlias = bytes | memoryview

STAGING = "staging"

#: Bytes of one write: for 2 MiB Linux 6.18 looks for a huge page, which takes ten times as long.
_AT_ONCE = 1 << 19
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def parent_of(relative: str) -> str:
    """Return the parent of a store-relative path; "" is the store itself."""
    return relative.rpartition("/")[0]


class StoreFiles(ReadFiles):
    """Files of one store, to be read and written; in a folder (`objects` has those of a bucket).

    Args:
        root: the store's folder. It may itself be reached through a symlink; nothing inside may.
        hook: called before each change on disk (tests kill, count and fail there).

    Attributes:
        own: name of this writer's folder in staging, which no other writer ever has.
        late_writes: whether a change that a dead writer has sent may still come, so that a name
            that was freed is not used again.
        group: name of the workers that share the lock now; "" where a former group's files are
            gone before another begins.
    """

    late_writes, group = False, ""
    _ended = False

    def __init__(self, root: str | Path, hook: Hook | None = None) -> None:
        super().__init__(root)
        self._hook = hook
        self._durable: set[str] = {""}
        self.own = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._own_fd: int | None = None
        self._own_guard = threading.Lock()
        self._numbers = itertools.count(1)  # of staged files, whichever thread stages them

    # ---- writing -----------------------------------------------------------------------------

    def make_root(self) -> None:
        """Create the store's folder with its parents, each made durable.

        Raises:
            StoreIOError: it can't be.
        """
        with self._translated("look at", self._folder):
            missing = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
        for path in reversed(missing):
            with self._translated("create", path):
                self._step("mkdir", path)
                path.mkdir(exist_ok=True)
            self._sync(path.parent, "fsync_dir")
        if not self._folder.is_dir():
            raise StoreIOError(f'"{self.root}" is not a folder. Choose another with gradstore=PATH')

    def make_directory(self, relative: str) -> None:
        """Create a directory and its ancestors durably; cheap if this object already did so."""
        if relative in self._durable:
            return
        parent = parent_of(relative)
        self.make_directory(parent)
        path = self.on_disk(relative)
        if self._kind(path) == "nothing":
            with self._translated("create", path):
                self._step("mkdir", path)
                path.mkdir(exist_ok=True)
        self._check_directory(relative)
        self.sync_directory(parent)
        self._durable.add(relative)

    @contextmanager
    def operation(self, name: str, path: Path) -> Iterator[None]:
        """Wrap one disk change made by the caller, so that it counts and fails like our own."""
        with self._translated(name, path):
            self._step(name, path)
            yield

    def is_in_use(self, staging_name: str) -> bool:
        """Return whether a staging folder belongs to a live writer, this one included."""
        path = self.on_disk(f"{STAGING}/{staging_name}")
        if staging_name == self.own or self._kind(path) != "directory":
            return staging_name == self.own
        fd = _flocked(path)
        if fd is not None:
            os.close(fd)
        return fd is None

    def end(self) -> None:
        """Write nothing of a store any more, in whatever thread: the lock is about to be let go."""
        self._ended = True

    def _check_not_ended(self) -> None:
        if self._ended:
            raise StoreIOError(f'store "{self.root}" was closed before all was written. Run again')

    def close(self) -> None:
        """Mark this writer's staging folder as no longer in use, for other writers to see."""
        fd, self._own_fd = self._own_fd, None
        if fd is not None:
            os.close(fd)

    def make_own(self) -> str:
        """Make this writer's staging folder, locked while it lives; return its path."""
        self._check_not_ended()
        folder = f"{STAGING}/{self.own}"
        self.make_directory(folder)
        with self._own_guard:
            if self._own_fd is None:
                self._own_fd = _flocked(self._folder / folder)
        return folder

    def stage(self, buffers: Sequence[Block]) -> str:
        """Write the buffers' bytes to a private file, fsynced; return its path in staging."""
        return self.stage_all([buffers])[0]

    def stage_all(self, contents: Sequence[Sequence[Block]]) -> list[str]:
        """Write several private files, fsynced; return their paths in staging.

        All are written before the first is synced: then the file system commits its journal once.
        """
        folder = self.make_own()
        staged = [f"{folder}/{next(self._numbers)}" for _ in contents]
        self._write_new(dict(zip(staged, contents, strict=True)))
        return staged

    def share(self, staged: Iterable[str]) -> None:
        """Let other writers see staged files by their paths, also after a crash."""
        for folder in sorted({parent_of(path) for path in staged}):
            self.sync_directory(folder)

    def write(self, relative: str, buffers: Sequence[Block]) -> None:
        """Write and fsync one new file under its own name; a failed write leaves nothing behind."""
        self._write_new({relative: buffers})

    def _write_new(self, contents: Mapping[str, Sequence[Block]]) -> None:
        """Write new files, then sync each; where one fails none of them is left."""
        self._check_not_ended()
        sizes: dict[Path, int] = {}
        created: dict[Path, int] = {}
        try:
            for relative, buffers in contents.items():
                path = self.on_disk(relative)
                sizes[path] = sum(memoryview(buffer).nbytes for buffer in buffers)
                with self._translated("write", path, needed_bytes=sizes[path]):
                    self._step("create", path)
                    created[path] = os.open(path, _NEW, 0o644)
                    for buffer in buffers:
                        self._step("write", path)
                        _write_whole(created[path], buffer)
            for path, fd in created.items():
                with self._translated("write", path, needed_bytes=sizes[path]):
                    self._step("fsync", path)
                    os.fsync(fd)
        except StoreIOError:
            for path in created:
                self._remove_quietly(path)
            raise
        finally:
            for fd in created.values():
                os.close(fd)

    def link(self, staged: str, relative: str) -> bool:
        """Link a staged file to its final name; False, and no change, when the name is taken."""
        self._check_not_ended()
        path = self.on_disk(relative)
        with self._translated("link", path):
            self._step("link", path)
            try:
                os.link(self._folder / staged, path, follow_symlinks=False)
            except FileExistsError:
                return False
        return True

    def publish(self, relative: str, data: bytes) -> bool:
        """Publish `data` durably under a name that is not taken.

        Returns:
            Whether the name now holds `data`; also true when it held the same bytes before.
        """
        self.make_directory(parent_of(relative))
        staged = self.stage([data])
        won = self.link(staged, relative)
        self.remove(staged)
        same = won or (self.kind(relative) == "file" and self.size(relative) == len(data)
                       and self.read(relative, expected_bytes=len(data)) == data)  # fmt: skip
        self.sync_directory(parent_of(relative))
        return same

    def supplant(self, staged: str, relative: str) -> bool:
        """Write staged bytes over what came late from a dead writer; where none does, False."""
        return False

    def replace(self, relative: str, data: bytes, was: bytes | None) -> None:
        """Replace one file durably: readers see the old bytes or the new ones.

        Args:
            relative: of the file.
            data: its new bytes.
            was: the bytes that were read; None where there was no file.

        Raises:
            StoreBusy: they are others by now; told only where a dead writer's may come late.
        """
        path = self.on_disk(relative)
        staged = self.stage([data])
        with self._translated("replace", path):
            self._step("rename", path)
            os.replace(self._folder / staged, path)
        self.sync_directory(parent_of(relative))

    def overwrite(self, relative: str, data: bytes) -> None:
        """Write a small file of this writer's own in its place: for signs of life, not for data."""
        path = self.on_disk(relative)
        with self._translated("write", path):
            self._step("overwrite", path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(path, flags, 0o644), "wb", buffering=0, closefd=True) as file:
                file.write(data)
                os.fsync(file.fileno())

    def move(self, source: str, target: str) -> None:
        """Rename a file or directory; the target must not exist."""
        self.make_directory(parent_of(target))
        path = self.on_disk(source)
        with self._translated("move", path):
            self._step("rename", path)
            os.rename(path, self.on_disk(target))
        self._forget(source)
        self.sync_directory(parent_of(source))

    def remove(self, relative: str) -> None:
        """Remove one file or symlink; a missing one is no error."""
        path = self.on_disk(relative)
        with self._translated("remove", path):
            self._step("unlink", path)
            path.unlink(missing_ok=True)

    def discard(self, staged: Iterable[str]) -> None:
        """Remove staged files that are no longer needed; what can't be removed is left."""
        for relative in staged:
            self._remove_quietly(self.on_disk(relative))

    def check_removal(self) -> None:
        """Refuse a place in which what is removed is still there."""

    def remove_tree(self, relative: str, known: Callable[[], Iterable[str]] = tuple) -> None:
        """Remove a directory with all its contents, never following a symlink.

        Args:
            relative: of the directory, or a file.
            known: gives files that are known to be in it, where a listing may lack some.
        """
        kind = self.kind(relative)
        if kind == "nothing":
            return
        if kind == "directory":
            for path in self._below(relative):
                with self._translated("remove", path):
                    self._step("unlink", path)
                    if path.is_dir() and not path.is_symlink():
                        path.rmdir()
                    else:
                        path.unlink(missing_ok=True)
            self._forget(relative)
        else:
            self.remove(relative)
        self.sync_directory(parent_of(relative))

    def sync_directory(self, relative: str) -> None:
        """Make the names in a directory survive a power loss."""
        self._sync(self.on_disk(relative), "fsync_dir")

    def _sync(self, path: Path, operation: str) -> None:
        with self._translated("fsync", path):
            self._step(operation, path)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    # ---- private helpers ---------------------------------------------------------------------

    def _step(self, operation: str, path: Path) -> None:
        if self._hook is not None:
            self._hook(operation, path)

    def _forget(self, relative: str) -> None:
        for known in (self._real, self._durable):
            # A copy: other threads add to it.
            known.difference_update({n for n in list(known) if f"{n}/".startswith(f"{relative}/")})

    def _remove_quietly(self, path: Path) -> None:
        try:
            self._step("unlink", path)
            path.unlink(missing_ok=True)
        except OSError:  # report what went wrong before, not this
            return


def _write_whole(fd: int, block: Block) -> None:
    """Write all bytes of a block, however many the system takes at a time."""
    view = memoryview(block).cast("B")
    while view:
        view = view[os.write(fd, view[:_AT_ONCE]) :]


def _flocked(path: Path) -> int | None:
    """Open a directory and lock it while the descriptor is open; None if another holds it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
