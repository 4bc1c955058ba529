"""What a kill, or a loss of power, leaves of a folder: every state of it, met in one pass.

A hook of `StoreFiles` comes before each operation on disk, so it sees what a crash there would
leave. Tests then take up each of these states as the next process would.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

#: Path -> bytes of each file; None of a folder.
Contents = dict[str, bytes | None]

#: The lock's file is never synced, and says nothing that outlives the machine's run.
_LOCK = "writer.lock"


def write_contents(contents: Contents, folder: Path) -> None:
    """Make a folder that holds these files and folders."""
    folder.mkdir()
    for name, data in sorted(contents.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


class Crashes(ABC):
    """A hook that keeps, of every operation, what a crash there would leave of a folder.

    Attributes:
        operations: their number.
        left: each state that is other than all before, and what had returned by then.
    """

    def __init__(self, path: Path, returned: list[str]) -> None:
        self._path, self._returned = path, returned
        self.operations = 0
        self.left: list[tuple[Contents, list[str]]] = []
        self._seen: set[int] = set()

    def __call__(self, operation: str, path: Path) -> None:
        self.operations += 1
        self._keep(self._contents(operation, path))

    @abstractmethod
    def _contents(self, operation: str, path: Path) -> Contents:
        """Return what a crash before this operation, or in it, would leave."""

    def _keep(self, contents: Contents) -> None:
        state = hash((*self._returned, *sorted(contents.items(), key=lambda each: each[0])))
        if state not in self._seen:
            self._seen.add(state)
            self.left.append((contents, self._returned.copy()))

    def each(self, folder: Path) -> Iterator[tuple[Path, list[str]]]:
        """Yield each state in a folder of its own, and what had returned; the folder goes then."""
        for k, (contents, returned) in enumerate(self.left):
            left = folder / f"left-{k}"
            write_contents(contents, left)
            yield left, returned
            shutil.rmtree(left)


class Kills(Crashes):
    """A kill leaves all that was done, and of a write or sync that it ended a torn file."""

    def _contents(self, operation: str, path: Path) -> Contents:
        found: Contents = {}
        for each in self._path.rglob("*"):
            name = each.relative_to(self._path).as_posix()
            found[name] = None if each.is_dir() else each.read_bytes()
        if operation in ("write", "fsync"):
            found[path.relative_to(self._path).as_posix()] = b"torn"
        return found


class PowerLosses(Crashes):
    """A power loss leaves what was synced: a file's bytes by its own, a name by its folder's sync.

    Names lead to inodes, as on a disk; what was seen is held, so that no inode comes again. Files
    that lie there before the first operation count as synced.

    Args:
        path: the store's folder.
        returned: what has returned so far; the caller adds to it.
        keeps: whether the state at every operation is kept, or only `now` is asked for.

    Attributes:
        keeps: the same; may change on the way.
    """

    def __init__(self, path: Path, returned: list[str], *, keeps: bool = True) -> None:
        super().__init__(path, returned)
        self.keeps = keeps
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._held: dict[int, int] = {}
        self._waiting: tuple[str, Path] | None = None
        for each in [path, *path.rglob("*")] if path.exists() else []:
            self._synced(each)

    def __call__(self, operation: str, path: Path) -> None:
        self._settle()
        if operation in ("fsync", "fsync_dir"):
            self._waiting = operation, path
        if self.keeps:
            super().__call__(operation, path)

    def now(self) -> Contents:
        """Return what a power loss leaves after the last operation."""
        self._settle()
        return self._contents("", self._path)

    def close(self) -> None:
        """Let go of what is held."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def _settle(self) -> None:
        """Note the sync that the hook came before: by the next operation it was done."""
        if self._waiting is not None:
            (_, path), self._waiting = self._waiting, None
            if path.exists():
                self._synced(path)

    def _synced(self, path: Path) -> None:
        if path != self._path and self._path not in path.parents:
            return
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if path.is_dir():
            entries = {e.name: e for e in os.scandir(path) if e.name != _LOCK}
            self._names[inode] = {n: (e.inode(), e.is_dir()) for n, e in entries.items()}
        else:
            self._bytes[inode] = path.read_bytes()

    def _contents(self, operation: str, path: Path) -> Contents:
        found: Contents = {}
        if self._path.exists():
            self._collect(self._path.stat().st_ino, "", found)
        return found

    def _collect(self, folder: int, prefix: str, found: Contents) -> None:
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                found[prefix + name] = None
                self._collect(inode, f"{prefix}{name}/", found)
            else:
                found[prefix + name] = self._bytes.get(inode, b"")


class KillBefore:
    """A hook that dies before the k-th operation of some kinds; the dead do nothing any more.

    Args:
        k: how many of them are done.
        then: called before each operation that is done.
        operations: the kinds; none means all.
        under: what their path has in it.
    """

    class Killed(BaseException):
        """Not an Exception: nothing may catch a kill."""

    def __init__(
        self,
        k: int,
        then: Callable[[str, Path], None] = lambda *_: None,
        operations: tuple[str, ...] = (),
        under: str = "",
    ) -> None:
        self.left, self._then, self._operations, self._under = k, then, operations, under
        self.dead = False

    def __call__(self, operation: str, path: Path) -> None:
        counts = (not self._operations or operation in self._operations) and (
            self._under in str(path)
        )
        if self.dead or (counts and self.left == 0):
            self.dead = True
            raise self.Killed(f"{operation} {path}")
        self.left -= counts
        self._then(operation, path)
