"""A store's files as objects in a bucket: the writing half (`objects_reading` is the other).

An object appears whole or not at all, so a write is one conditional put (If-None-Match: *) of bytes
that are staged in memory. A put whose answer was lost is told by what it wrote: whoever publishes
compares. Folders are not there; what a lagging listing hides is met by its name.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gradstore.errors import StoreBusy, StoreIOError
from gradstore.format.canonical import canonical_json, parse
from gradstore.storage.local import STAGING, Block, Hook, StoreFiles
from gradstore.storage.location import ObjectPath
from gradstore.storage.object_probes import probe_server
from gradstore.storage.objects_reading import ObjectReads
from gradstore.storage.processes import Process

#: Object in a writer's own staging folder: which process it is, and a number that it counts up.
OWNER = "owner"

#: Looks at a name that is taken and holds nothing, or at a folder that is emptied.
_LOOKS = 5


class ObjectFiles(ObjectReads, StoreFiles):
    """Objects of one store, to be read and written.

    Args:
        place: the store's bucket and prefix.
        hook: called before each change in the bucket (tests kill, count and fail there), with the
            store-relative path.

    Attributes:
        own: name of this writer's folder in staging, which no other writer ever has.
        alone: whether this writer holds the store's lock exclusively; the lock says so.
    """

    def __init__(self, place: ObjectPath, hook: Hook | None = None) -> None:
        ObjectReads.__init__(self, place)
        self._hook = hook
        self.own = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.bucket.writer = self.own
        self.alone = False
        #: A service refuses what a dead writer has sent; a bucket can't.
        self.late_writes = not place.is_service
        self._numbers = itertools.count(1)
        self._has_own = False
        #: Path in staging -> bytes, of what only this process sees; and the paths that all see.
        self._staged: dict[str, bytes] = {}
        self._shared: set[str] = set()

    # ---- the place ---------------------------------------------------------------------------

    def make_root(self) -> None:
        """See that the bucket is there, and that its server keeps the conditions of a put.

        A service keeps them, and says so itself where a header does not arrive.

        Raises:
            StoreIOError: it ignores or refuses one; names it.
        """
        if not self.place.is_service:
            probe_server(self.bucket)

    def make_directory(self, relative: str) -> None:
        """Do nothing: keys need no folders."""

    def sync_directory(self, relative: str) -> None:
        """Do nothing: an object whose write returned is durable, and has its name."""

    # ---- staging -----------------------------------------------------------------------------

    def make_own(self) -> str:
        """Show in staging which process this writer is; return its folder's path."""
        folder = f"{STAGING}/{self.own}"
        if not self._has_own:
            self.show_life(0)
            self._has_own = True
        return folder

    def show_life(self, count: int) -> None:
        """Change this writer's own object, for others who look whether it changes."""
        document = {**asdict(Process.this()), "count": count}
        self.bucket.put(f"{STAGING}/{self.own}/{OWNER}", canonical_json(document))

    def is_in_use(self, staging_name: str) -> bool:
        """Return whether a staging folder belongs to a live writer, this one included.

        Of another machine's writer nothing is known here but this: whoever holds the lock alone has
        seen all others end.
        """
        if staging_name == self.own:
            return True
        document = self.read_if_there(f"{STAGING}/{staging_name}/{OWNER}")
        if document is None:
            return False
        try:
            told = parse(document)
            told.pop("count")
            lives = Process(**told).lives()
        except (ValueError, TypeError, KeyError):
            return False
        return not self.alone if lives is None else lives

    def close(self) -> None:
        """Mark this writer's staging folder as no longer in use, for other writers to see."""
        self._staged.clear()
        if self._has_own:
            self._has_own = False
            self.bucket.delete([f"{STAGING}/{self.own}/{OWNER}"])

    def stage_all(self, contents: Sequence[Sequence[Block]]) -> list[str]:
        """Keep the bytes of several files in memory; return the paths that stand for them."""
        staged = [f"{STAGING}/{self.own}/{next(self._numbers)}" for _ in contents]
        self._staged |= zip(staged, map(b"".join, contents), strict=True)
        return staged

    def share(self, staged: Iterable[str]) -> None:
        """Let other writers see staged bytes by their paths, also after this process died."""
        self._check_not_ended()
        self.make_own()
        for path in staged:
            self._step("put", path)
            self.bucket.put(path, self._staged[path])
            self._shared.add(path)

    def discard(self, staged: Iterable[str]) -> None:
        """Remove staged bytes that are no longer needed; what can't be removed is left."""
        paths = list(staged)
        seen = [path for path in paths if path in self._shared]
        for path in paths:
            self._staged.pop(path, None)
            self._shared.discard(path)
        with suppress(StoreIOError):
            self.bucket.delete(seen)

    # ---- writing -----------------------------------------------------------------------------

    def write(self, relative: str, buffers: Sequence[Block]) -> None:
        """Write one new object under its own name."""
        data = b"".join(buffers)
        key = self._key(relative)
        self._step("put", relative)
        if not self._put_new(key, data):
            raise StoreIOError(
                f'cannot write "{self.place / key}": there is another object. Run again'
            )

    def link(self, staged: str, relative: str) -> bool:
        """Write staged bytes under their final name; False, and no change, when it is taken."""
        self._check_not_ended()
        data = self._staged_bytes(staged)
        if data is None:
            missing = FileNotFoundError(0, "it is no longer staged", staged)
            raise StoreIOError(
                f'cannot write "{self.place / relative}": its staged bytes are gone. Run again'
            ) from missing
        self._step("link", relative)
        return self.bucket.put_new(self._key(relative), data)

    def publish(self, relative: str, data: bytes) -> bool:
        """Publish `data` durably under a name that is not taken.

        Returns:
            True when the name now holds `data` (also when it held the same bytes before); False
            when it holds something else.
        """
        self._step("link", relative)
        return self._put_new(self._key(relative), data)

    def _put_new(self, key: str, data: bytes) -> bool:
        """Put if absent; True also where the same bytes are there, as after an answer was lost."""
        self._check_not_ended()
        for _ in range(_LOOKS):
            if self.bucket.put_new(key, data):
                return True
            found = self.bucket.get(key)
            if found is not None:
                return found.data == data
        raise StoreIOError(
            f'cannot write "{self.place / key}": the server says that it is there, and that it is '
            "not. See that the server is well, then run again"
        )

    def supplant(self, staged: str, relative: str) -> bool:
        """Write staged bytes over what came late from a dead writer, or was left by one.

        Nobody else may have taken the object for what it should be: so only under the lock, and
        where nothing committed names it. What is there is replaced as it was seen, or not at all.

        Returns:
            Whether the object holds these bytes now.
        """
        data = self._staged_bytes(staged) if self.late_writes else None
        if data is None:
            return False
        key = self._key(relative)
        for _ in range(_LOOKS):
            if self._put_new(key, data):
                return True
            found = self.bucket.get(key)
            self._step("rename", relative)
            if found is not None and self.bucket.swap(key, data, found.e_tag):
                return True
        return False

    def replace(self, relative: str, data: bytes, was: bytes | None) -> None:
        """Replace one object, if it is as it was read; see `StoreFiles`."""
        key = self._key(relative)
        self._step("rename", relative)
        if not self.late_writes:  # a service compares for itself
            self.bucket.put(key, data)
            return
        found = self.bucket.get(key)
        if found is not None and found.data == data:
            return
        same = was is None if found is None else was is not None and found.data == was
        if not same or not self.bucket.swap(key, data, None if found is None else found.e_tag):
            raise StoreBusy(
                f'"{self.place / key}" was changed by another process meanwhile, in spite of the '
                "lock. Run again: what is finished is reused"
            )

    def overwrite(self, relative: str, data: bytes) -> None:
        """Write a small object of this writer's own in its place: a sign of life."""
        self._step("overwrite", relative)
        self.bucket.put(self._key(relative), data)

    def move(self, source: str, target: str) -> None:
        """Give an object, or all below a name, another one: copied first, removed then."""
        key, onto = self._key(source), self._key(target)
        keys = [key] if self.bucket.size(key) is not None else sorted(self.bucket.sizes(key))
        if not keys:
            missing = FileNotFoundError(0, "there is none", source)
            raise StoreIOError(f'cannot move "{self.place / key}": it is not there') from missing
        for each in keys:
            self._step("rename", each)
            self.bucket.copy(each, onto + each.removeprefix(key))
        self.bucket.delete(keys)

    def remove(self, relative: str) -> None:
        """Remove one object, or staged bytes; a missing one is no error."""
        self._step("unlink", relative)
        known = self._staged.pop(relative, None) is not None and relative not in self._shared
        self._shared.discard(relative)
        if not known:
            self.bucket.delete([self._key(relative)])

    def check_removal(self) -> None:
        """Refuse a bucket that keeps versions: what is removed from it is still there.

        Raises:
            StoreIOError: it does.
        """
        key = f"{STAGING}/{self.own}/versions"
        version = self.bucket.put(key, b"")
        self.bucket.delete([key])
        if version not in (None, "null"):
            raise StoreIOError(
                f'bucket "{self.place.bucket}" keeps the versions of what is removed or replaced, '
                "so nothing would be gone. Suspend its versioning, run again, then remove the old "
                f"versions below {self.place} (a lifecycle rule for noncurrent versions does)"
            )

    def remove_tree(self, relative: str, known: Callable[[], Iterable[str]] = tuple) -> None:
        """Remove an object, all below its name that a listing shows, and all that is known there.

        Args:
            relative: its name.
            known: gives names below it, which a listing may lack.
        """
        key = self._key(relative)
        keys = [key, *dict.fromkeys([*self.bucket.sizes(key), *map(self._key, known())])]
        for _ in range(_LOOKS):
            self._step("unlink", relative)
            for first in range(0, len(keys), 1000):
                self.bucket.delete(keys[first : first + 1000])
            keys = list(self.bucket.sizes(key))
            if not keys:
                return

    # ---- private helpers ---------------------------------------------------------------------

    def _staged_bytes(self, staged: str) -> bytes | None:
        """Return staged bytes, which may be another worker's; None where they are gone."""
        known = self._staged.get(staged)
        return self.read_if_there(staged) if known is None else known

    def _step(self, operation: str, path: str | Path) -> None:
        if self._hook is not None:
            self._hook(operation, Path(path))
