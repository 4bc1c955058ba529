"""The reading half of a store's files; nothing here can change a disk.

Every path is relative to the store and checked component by component: no `..`, no absolute path,
no symlink, no special file. OSErrors leave this module and `local` as StoreIOError.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from gradstore.errors import BadInput, DamagedFile, Fault, StoreIOError, TooLarge
from gradstore.storage.location import Location

#: Bytes of the largest document that is read whole, wherever a store is: no larger one is written.
DOCUMENT_BYTES = 1 << 30

#: Files that have been asked of the disk and were not read yet, at most.
_NAMED_KEPT = 128
COMPONENT = re.compile(r"[A-Za-z0-9%][A-Za-z0-9._%+=@-]{0,199}")
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
#: Not to wait for the other end, should it be a pipe.
_TO_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
T = TypeVar("T")
R = TypeVar("R")

#: How file systems say that there is no room.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ReadFiles:
    """Files of one store, to be read; in a folder here (`objects_reading` has those of a bucket).

    Attributes:
        root: where the store is.

    Args:
        root: the store's folder. It may itself be reached through a symlink; nothing inside may.
    """

    #: `DOCUMENT_BYTES`, but for tests.
    most_bytes = DOCUMENT_BYTES

    def __init__(self, root: str | Path) -> None:
        self._folder = Path(root)
        self.root: Location = self._folder
        self._real: set[str] = {""}
        # By several threads, each of which goes over files of its own.
        self._soon: set[str] = set()

    # ---- paths -------------------------------------------------------------------------------

    def on_disk(self, relative: str) -> Path:
        """Return the full path in the folder, after checking every name and every parent's kind.

        Raises:
            DamagedFile: a name that a store never writes, or a parent that is no real directory.
        """
        self._check_name(relative)
        return self._folder / relative

    def _check_name(self, relative: str) -> None:
        if not relative:
            return
        parent, _, name = relative.rpartition("/")
        if not COMPONENT.fullmatch(name) or relative.startswith("/"):
            raise self._damaged(relative, "a name made by gradstore", repr(name))
        if parent not in self._real:
            self._check_name(parent)
            self._check_directory(parent)

    def _check_directory(self, relative: str) -> None:
        if relative in self._real:
            return
        kind = self._kind(f"{self._folder}/{relative}")
        if kind == "directory":
            self._real.add(relative)
        elif kind != "nothing":
            raise self._damaged(relative, "a directory", kind)

    def kind(self, relative: str) -> str:
        """Return the kind of a path: nothing, file, directory, symlink or special file."""
        self._check_name(relative)
        return self._kind(f"{self._folder}/{relative}")

    def _kind(self, path: str | Path) -> str:
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "nothing"
        except OSError as error:
            raise self._io_error("look at", Path(path), error, 0) from error
        return _KINDS.get(stat.S_IFMT(mode), "special file")

    def path(self, relative: str) -> Location:
        """Return where a file or folder of the store is, after checking its name.

        Raises:
            DamagedFile: a name that a store never writes.
        """
        return self.on_disk(relative)

    def check_place(self) -> None:
        """Refuse a place that can't be a store's.

        Raises:
            BadInput: it is a file.
        """
        if self._folder.is_file():
            raise BadInput(f'"{self.root}" is a file, no gradient store: check the path')

    # ---- reading -----------------------------------------------------------------------------

    def exists(self, relative: str) -> bool:
        """Return whether anything, of any kind, has this name."""
        return self.kind(relative) != "nothing"

    def has(self, relative: str) -> bool:
        """Return whether a file has this name; in a folder, anything."""
        return self.kind(relative) != "nothing"

    #: Files that are to be named as the next ones while one is read.
    reads_ahead = 8

    #: Whether a part of a file costs as much as the whole, so that it is to be kept.
    whole_only = False

    def soon(self, wanted: Mapping[str, int]) -> None:
        """Hear which files are likely to be read next, and let the disk begin to read them.

        Args:
            wanted: their paths and sizes in bytes. Objects that were named before, and are not
                here, are let go of.
        """
        if len(self._soon) > _NAMED_KEPT:
            self._soon.clear()
        for relative in wanted.keys() - self._soon:
            self._soon.add(relative)
            # Whatever is wrong with a file is told when it is read.
            with suppress(OSError):
                fd = os.open(f"{self._folder}/{relative}", _TO_READ)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(fd)

    def at_once(self, act: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Give what `act` returns for each item, in order; many at a time where they are requests.

        Args:
            act: reads, or writes under names of its own; may be called from several threads.
            items: what it is called with.
        """
        return map(act, items)

    def size(self, relative: str) -> int:
        """Return the size of a file in bytes, 0 when there is none."""
        path = self.on_disk(relative)
        with self._translated("look at", path):
            try:
                return os.lstat(path).st_size
            except FileNotFoundError:
                return 0

    def bytes_below(self, relative: str) -> int:
        """Return the bytes of a file, or of all files in a folder; 0 when there is nothing."""
        self.on_disk(relative)
        total = 0
        for path in self._below(relative):
            with self._translated("look at", path):
                try:
                    found = os.lstat(path)
                except FileNotFoundError:
                    continue
            total += 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        return total

    def names(self, relative: str) -> list[str]:
        """List a directory, sorted; [] when it does not exist."""
        path = self.on_disk(relative)
        self._check_directory(relative)
        with self._translated("list", path):
            try:
                return sorted(os.listdir(path))
            except FileNotFoundError:
                return []

    def walk(self, relative: str) -> list[str]:
        """List all files and symlinks below a directory, as store-relative paths, sorted."""
        self.on_disk(f"{relative}/any")
        if not self.exists(relative):
            return []
        found = [p for p in self._below(relative) if p.is_symlink() or not p.is_dir()]
        return sorted(p.relative_to(self._folder).as_posix() for p in found)

    def read(self, relative: str, *, expected_bytes: int | None = None) -> bytes:
        """Read one whole file.

        Raises:
            DamagedFile: it is missing, no regular file, or not `expected_bytes` long.
            TooLarge: its size is not known, and above `most_bytes`.
        """
        fd, size = self._open_to_read(relative, expected_bytes)
        try:
            with open(fd, "rb", buffering=0, closefd=True) as file:
                data = file.read(size) or b""
                while len(data) < size and (more := file.read(size - len(data))):
                    data += more
        except OSError as error:
            raise self._io_error("read", self._folder / relative, error, 0) from error
        if len(data) != size:
            raise self._damaged(relative, f"{size:,} bytes", f"{len(data):,} bytes")
        return data

    def read_if_there(self, relative: str) -> bytes | None:
        """Read one whole file; None when nothing has its name.

        Raises:
            DamagedFile: it is no regular file.
        """
        return self.read(relative) if self.exists(relative) else None

    def map(self, relative: str, expected_bytes: int) -> memoryview:
        """Map one file read-only, after checking its size (a short map would end in SIGBUS).

        Returns:
            (expected_bytes,) uint8.

        Raises:
            DamagedFile: it is missing, no regular file, or not `expected_bytes` long.
        """
        fd, _ = self._open_to_read(relative, expected_bytes)
        try:
            return memoryview(mmap.mmap(fd, expected_bytes, access=mmap.ACCESS_READ))
        except OSError as error:
            raise self._io_error("map", self._folder / relative, error, 0) from error
        finally:
            os.close(fd)

    def read_parts(
        self, relative: str, expected_bytes: int, parts: Iterable[tuple[int, memoryview]]
    ) -> None:
        """Read parts of one file, after checking its size.

        Args:
            relative: of the file.
            expected_bytes: its size.
            parts: of each the offset in bytes, and what takes the bytes.

        Raises:
            DamagedFile: it is missing, no regular file, or not `expected_bytes` long.
        """
        fd, size = self._open_to_read(relative, expected_bytes)
        try:
            for offset, part in parts:
                while part.nbytes:  # some file systems give less than they are asked for
                    count = os.preadv(fd, [part], offset)
                    if not count:
                        raise self._damaged(relative, f"{size:,} bytes", "fewer bytes")
                    offset, part = offset + count, part[count:]
        except OSError as error:
            raise self._io_error("read", self._folder / relative, error, 0) from error
        finally:
            os.close(fd)

    def _open_to_read(self, relative: str, expected_bytes: int | None) -> tuple[int, int]:
        self._check_name(relative)
        self._soon.discard(relative)
        path = f"{self._folder}/{relative}"  # a Path takes longer than to open it
        expected = "a file" if expected_bytes is None else f"{expected_bytes:,} bytes"
        try:
            fd = os.open(path, _TO_READ)
        except OSError as error:
            kind = self._kind(path)
            if kind in ("file", "directory"):
                raise self._io_error("open", Path(path), error, 0) from error
            raise self._damaged(
                relative, expected, "no file" if kind == "nothing" else kind
            ) from None
        found = os.fstat(fd)
        fault = None
        if not stat.S_ISREG(found.st_mode):
            fault = (expected, _KINDS.get(stat.S_IFMT(found.st_mode), "special file"))
        elif expected_bytes is None and found.st_size > self.most_bytes:
            os.close(fd)
            raise self._too_large(relative, found.st_size)
        elif expected_bytes not in (None, found.st_size):
            fault = (expected, f"{found.st_size:,} bytes")
        if fault is not None:
            os.close(fd)
            raise self._damaged(relative, *fault)
        return fd, found.st_size

    def free_bytes(self) -> int:
        """Return the number of bytes that this user may still write to the store's disk."""
        path = self._folder
        with self._translated("look at", path):
            while not path.exists() and path != path.parent:
                path = path.parent
            disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize

    # ---- private helpers ---------------------------------------------------------------------

    def _below(self, relative: str) -> Iterator[Path]:
        top = self._folder / relative
        for folder, folders, names in os.walk(top, topdown=False, followlinks=False):
            for name in (*names, *folders):
                yield Path(folder, name)
        yield top

    def _damaged(self, relative: str, expected: str, found: str) -> DamagedFile:
        return DamagedFile(Fault(relative, expected, found), str(self.root))

    def _too_large(self, relative: str, size: int) -> TooLarge:
        fault = Fault(relative, f"at most {self.most_bytes:,} bytes", f"{size:,} bytes")
        return TooLarge(fault, str(self.root))

    @contextmanager
    def _translated(self, verb: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._io_error(verb, path, error, needed_bytes) from error

    def _io_error(self, verb: str, path: Path, error: OSError, needed: int) -> StoreIOError:
        reason = error.strerror or str(error)
        if error.errno in FULL:
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
