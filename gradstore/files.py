"""The one module that touches the disk for a store.

Every operation is one small step that a test can interrupt, count or fail (`hook`), and every path
is relative to the store and checked component by component: no `..`, no absolute path, no symlink.

Publishing is always: write to staging, fsync, `os.link` to the final name (which fails if the name
exists, so nothing published is ever overwritten), fsync the directory. No OSError leaves this
module: the user gets a StoreIOError with the path and, on a full disk, the bytes needed and free.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from gradstore.damage import DamagedFile, Fault
from gradstore.errors import StoreIOError

Hook = Callable[[str, Path], None]
"""Called as `hook(operation, path)` before each change on disk; what it raises is what happens."""

Block: TypeAlias = bytes | memoryview
"""Contiguous bytes to write."""

STAGING = "staging"
JSON_LIMIT_BYTES = 1 << 30
_COMPONENT = re.compile(r"[A-Za-z0-9%][A-Za-z0-9._%+=@-]{0,199}")
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def parent_of(relative: str) -> str:
    """Gives the parent of a store-relative path; "" is the store itself."""
    return relative.rpartition("/")[0]


class StoreFiles:
    """Files of one store.

    Args:
        root: the store's folder. It may itself be reached through a symlink; nothing inside may.
        hook: called before each change on disk (tests kill, count and fail there).
    """

    def __init__(self, root: str | Path, hook: Hook | None = None) -> None:
        self.root = Path(root)
        self._hook = hook
        self._real: set[str] = {""}
        self._durable: set[str] = {""}
        self._own = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._own_fd: int | None = None
        self._count = 0

    # ---- paths -------------------------------------------------------------------------------

    def path(self, relative: str) -> Path:
        """Gives the full path, after checking every component's name and every parent's kind.

        Raises:
            DamagedFile: a name that a store never writes, or a parent that is no real directory.
        """
        if not relative:
            return self.root
        parent, _, name = relative.rpartition("/")
        if not _COMPONENT.fullmatch(name) or relative.startswith("/"):
            raise self._damaged(relative, "a name made by gradstore", repr(name))
        if parent not in self._real:
            self.path(parent)
            self._check_directory(parent)
        return self.root / relative

    def _check_directory(self, relative: str) -> None:
        if relative in self._real:
            return
        kind = self._kind(self.root / relative)
        if kind == "directory":
            self._real.add(relative)
        elif kind != "nothing":
            raise self._damaged(relative, "a directory", kind)

    def kind(self, relative: str) -> str:
        """Says what lies at a path: nothing, file, directory, symlink or special file."""
        return self._kind(self.path(relative))

    def _kind(self, path: Path) -> str:
        with self._translated("look at", path):
            try:
                mode = os.lstat(path).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return "nothing"
        for test, name in (
            (stat.S_ISREG, "file"),
            (stat.S_ISDIR, "directory"),
            (stat.S_ISLNK, "symlink"),
        ):
            if test(mode):
                return name
        return "special file"

    # ---- reading -----------------------------------------------------------------------------

    def exists(self, relative: str) -> bool:
        """True when anything, of whatever kind, has this name."""
        return self.kind(relative) != "nothing"

    def size(self, relative: str) -> int:
        """Gives the size of a file in bytes, 0 when there is none."""
        path = self.path(relative)
        with self._translated("look at", path):
            try:
                return os.lstat(path).st_size
            except FileNotFoundError:
                return 0

    def names(self, relative: str) -> list[str]:
        """Lists a directory, sorted; [] when it does not exist."""
        path = self.path(relative)
        self._check_directory(relative)
        with self._translated("list", path):
            try:
                return sorted(os.listdir(path))
            except FileNotFoundError:
                return []

    def read(self, relative: str, *, expected_bytes: int | None = None) -> bytes:
        """Reads one whole file.

        Raises:
            DamagedFile: it is missing, no regular file, or not `expected_bytes` long.
        """
        fd, size = self._open_to_read(relative, expected_bytes)
        with self._translated("read", self.root / relative):
            with open(fd, "rb", buffering=0, closefd=True) as file:
                data = file.read(size) or b""
                while len(data) < size and (more := file.read(size - len(data))):
                    data += more
        if len(data) != size:
            raise self._damaged(relative, f"{size:,} bytes", f"{len(data):,} bytes")
        return data

    def map(self, relative: str, expected_bytes: int) -> mmap.mmap:
        """Maps one file read-only, after its size was checked (a short map would end in SIGBUS).

        Raises:
            DamagedFile: it is missing, no regular file, or not `expected_bytes` long.
        """
        fd, _ = self._open_to_read(relative, expected_bytes)
        with self._translated("map", self.root / relative):
            try:
                return mmap.mmap(fd, expected_bytes, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)

    def _open_to_read(self, relative: str, expected_bytes: int | None) -> tuple[int, int]:
        path = self.path(relative)
        expected = "a file" if expected_bytes is None else f"{expected_bytes:,} bytes"
        kind = self._kind(path)
        if kind != "file":
            raise self._damaged(relative, expected, kind if kind != "nothing" else "no file")
        with self._translated("open", path):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise self._damaged(relative, expected, "no file") from None
            size = os.fstat(fd).st_size
        if expected_bytes is None and size > JSON_LIMIT_BYTES:
            os.close(fd)
            raise self._damaged(relative, f"at most {JSON_LIMIT_BYTES:,} bytes", f"{size:,} bytes")
        if expected_bytes is not None and size != expected_bytes:
            os.close(fd)
            raise self._damaged(relative, expected, f"{size:,} bytes")
        return fd, size

    def free_bytes(self) -> int:
        """Gives the bytes that this user may still write to the store's disk."""
        path = self.root
        with self._translated("look at", path):
            while not path.exists() and path != path.parent:
                path = path.parent
            disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize

    # ---- writing -----------------------------------------------------------------------------

    def make_root(self) -> None:
        """Creates the store's folder with its parents, each made durable."""
        with self._translated("look at", self.root):
            missing = [p for p in (self.root, *self.root.parents) if not p.exists()]
        for path in reversed(missing):
            with self._translated("create", path):
                self._step("mkdir", path)
                path.mkdir(exist_ok=True)
            self._sync(path.parent, "fsync_dir")
        if not self.root.is_dir():
            raise StoreIOError(f'"{self.root}" is not a folder. Choose another with gradstore=PATH')

    def make_directory(self, relative: str) -> None:
        """Makes a directory and its ancestors exist and last; cheap when this object did so."""
        if relative in self._durable:
            return
        parent = parent_of(relative)
        self.make_directory(parent)
        path = self.path(relative)
        if self._kind(path) == "nothing":
            with self._translated("create", path):
                self._step("mkdir", path)
                path.mkdir(exist_ok=True)
        self._check_directory(relative)
        self.sync_directory(parent)
        self._durable.add(relative)

    @contextmanager
    def operation(self, name: str, path: Path) -> Iterator[None]:
        """Wraps one change on disk made by the caller, so that it counts and fails as ours do."""
        with self._translated(name, path):
            self._step(name, path)
            yield

    def is_in_use(self, staging_name: str) -> bool:
        """True when a folder in staging belongs to a living writer, this one included."""
        path = self.path(f"{STAGING}/{staging_name}")
        if staging_name == self._own or self._kind(path) != "directory":
            return staging_name == self._own
        fd = _flocked(path)
        if fd is not None:
            os.close(fd)
        return fd is None

    def close(self) -> None:
        """Lets others see that this writer's staging is not in use any more."""
        fd, self._own_fd = self._own_fd, None
        if fd is not None:
            os.close(fd)

    def stage(self, buffers: Sequence[Block]) -> str:
        """Writes a private file of the buffers' bytes, fsynced; gives its path in staging."""
        folder = f"{STAGING}/{self._own}"
        self.make_directory(folder)
        if self._own_fd is None:
            self._own_fd = _flocked(self.root / folder)
        self._count += 1
        staged = f"{folder}/{self._count}"
        self.write(staged, buffers)
        return staged

    def write(self, relative: str, buffers: Sequence[Block]) -> None:
        """Writes and fsyncs one new file under its own name; what fails leaves nothing behind."""
        path = self.path(relative)
        needed = sum(memoryview(buffer).nbytes for buffer in buffers)
        try:
            with self._translated("write", path, needed_bytes=needed):
                self._write_new(path, buffers)
        except StoreIOError:
            self._remove_quietly(path)
            raise

    def _write_new(self, path: Path, buffers: Sequence[Block]) -> None:
        self._step("create", path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, 0o644), "wb", buffering=0, closefd=True) as file:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                self._step("write", path)
                while view:
                    view = view[file.write(view) :]
            self._step("fsync", path)
            os.fsync(file.fileno())

    def link(self, staged: str, relative: str) -> bool:
        """Gives a staged file its final name; False, and no change, when the name is taken."""
        path = self.path(relative)
        with self._translated("link", path):
            self._step("link", path)
            try:
                os.link(self.root / staged, path, follow_symlinks=False)
            except FileExistsError:
                return False
        return True

    def publish(self, relative: str, data: bytes) -> bool:
        """Puts `data` under a name that is not taken, durably.

        Returns:
            True when the name now holds `data` (also when it held the same bytes before); False
            when it holds something else.
        """
        self.make_directory(parent_of(relative))
        staged = self.stage([data])
        won = self.link(staged, relative)
        self.remove(staged)
        same = won or (self.kind(relative) == "file" and self.read(relative) == data)
        self.sync_directory(parent_of(relative))
        return same

    def move(self, source: str, target: str) -> None:
        """Renames a file or directory; the target must not exist."""
        self.make_directory(parent_of(target))
        path = self.path(source)
        with self._translated("move", path):
            self._step("rename", path)
            os.rename(path, self.path(target))
        self._forget(source)
        self.sync_directory(parent_of(source))

    def remove(self, relative: str) -> None:
        """Removes one file or symlink; fine if it is gone already."""
        path = self.path(relative)
        with self._translated("remove", path):
            self._step("unlink", path)
            path.unlink(missing_ok=True)

    def remove_tree(self, relative: str) -> None:
        """Removes a directory with all it holds, never following a symlink."""
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

    def _below(self, relative: str) -> Iterator[Path]:
        top = self.root / relative
        for folder, folders, names in os.walk(top, topdown=False, followlinks=False):
            for name in (*names, *folders):
                yield Path(folder, name)
        yield top

    def walk(self, relative: str) -> list[str]:
        """Lists all files and symlinks below a directory, as store-relative paths, sorted."""
        self.path(f"{relative}/any")
        found = [p for p in self._below(relative) if p.is_symlink() or not p.is_dir()]
        return sorted(p.relative_to(self.root).as_posix() for p in found)

    def sync_directory(self, relative: str) -> None:
        """Makes the names in a directory last through a power loss."""
        self._sync(self.path(relative), "fsync_dir")

    def _sync(self, path: Path, operation: str) -> None:
        with self._translated("fsync", path):
            self._step(operation, path)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    # ---- the private parts -------------------------------------------------------------------

    def _step(self, operation: str, path: Path) -> None:
        if self._hook is not None:
            self._hook(operation, path)

    def _forget(self, relative: str) -> None:
        for known in (self._real, self._durable):
            known.difference_update(
                [name for name in known if name == relative or name.startswith(relative + "/")]
            )

    def _remove_quietly(self, path: Path) -> None:
        try:
            self._step("unlink", path)
            path.unlink(missing_ok=True)
        except OSError:  # the write error is what the user must hear of
            return

    def _damaged(self, relative: str, expected: str, found: str) -> DamagedFile:
        return DamagedFile(Fault(relative, expected, found), str(self.root))

    @contextmanager
    def _translated(self, verb: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._io_error(verb, path, error, needed_bytes) from error

    def _io_error(self, verb: str, path: Path, error: OSError, needed: int) -> StoreIOError:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            return StoreIOError(
                f'cannot {verb} "{path}": {reason}; needs {needed:,} bytes, '
                f"{self.free_bytes():,} free. Free some space, or choose another disk with "
                "gradstore=PATH; committed data is untouched"
            )
        if error.errno in _NO_PERMISSION:
            return StoreIOError(
                f'cannot {verb} "{path}": {reason}. The store must be writable for this user; '
                "choose another with gradstore=PATH (reading a store needs no write permission)"
            )
        return StoreIOError(f'cannot {verb} "{path}": {reason}. Check the disk, then run again')


def _flocked(path: Path) -> int | None:
    """Opens a directory and locks it while the descriptor lives; None if another has it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
