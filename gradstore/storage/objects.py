"""A store's files as objects in a bucket: the writing half (`objects_reading` is the other).

An object appears whole or not at all, so a write is one conditional put (If-None-Match: *) of bytes
that are staged in memory. A put whose answer was lost is told by what it wrote: whoever publishes
compares. Folders are not there; what a lagging listing hides is met by its name.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from gradstore.errors import StoreIOError
from gradstore.format.canonical import canonical_json, parse
from gradstore.storage.local import STAGING, Block, Hook, StoreFiles
from gradstore.storage.location import ObjectPath
from gradstore.storage.objects_reading import ObjectReads
from gradstore.storage.processes import Process

#: Object in a writer's own staging folder: which process it is, and a number that it counts up.
OWNER = "owner"

#: Looks at a name that is taken and holds nothing, or at a folder that is emptied.
_LOOKS = 5

#: An ETag that no content has.
_NO_TAG = '"00000000000000000000000000000000"'


class ObjectFiles(ObjectReads, StoreFiles):
    """Objects of one store, to be read and written.

    Args:
        place: the store's bucket and prefix.
        hook: called before each change in the bucket (tests kill, count and fail there), with the
            store-relative path.

    Attributes:
        own: name of this writer's folder in staging, which no other writer ever has.
        alone: whether this writer holds the store's lock exclusively; the lock says so.
        guard: called before each change; raises where the lock was lost to another.
    """

    def __init__(self, place: ObjectPath, hook: Hook | None = None) -> None:
        ObjectReads.__init__(self, place)
        self._hook = hook
        self.own = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.bucket.writer = self.own
        self.alone = False
        self.guard: Callable[[], None] = lambda: None
        self._count = 0
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
        if self.place.is_service:
            return
        key = f"{STAGING}/probe-{secrets.token_hex(8)}"
        bucket = self.bucket
        try:
            with self._condition("If-None-Match"):
                bucket.put_new(key, b"first")
                second = bucket.put_new(key, b"second")
            found = bucket.get(key)
            if second or found is None or bytes(found.data) != b"first":
                raise self._ignored("If-None-Match", "a second write to a taken name replaced it")
            with self._condition("If-Match"):
                if bucket.swap(key, b"third", _NO_TAG):
                    raise self._ignored("If-Match", "a write over other content replaced it")
                if not bucket.swap(key, b"fourth", found.e_tag):
                    raise self._ignored("If-Match", "a write over the same content was refused")
        finally:
            with suppress(StoreIOError):
                bucket.delete([key])

    @contextmanager
    def _condition(self, header: str) -> Iterator[None]:
        """Name the header where a server answers it with an error of the request."""
        try:
            yield
        except StoreIOError as error:
            text = str(error)
            if "status 400" in text or "status 501" in text:
                raise self._ignored(header, "the server refused a write with it") from error
            raise

    def _ignored(self, header: str, what: str) -> StoreIOError:
        return StoreIOError(
            f'the object store of "{self.place}" does not honour {header}: {what}. A store needs '
            "a server that honours If-None-Match and If-Match on PUT, as Amazon S3 does; "
            "choose another with AWS_ENDPOINT_URL, or a folder with gradstore=PATH"
        )

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

    def stage(self, buffers: Sequence[Block]) -> str:
        """Keep the buffers' bytes in memory; return the path that stands for them."""
        self._count += 1
        staged = f"{STAGING}/{self.own}/{self._count}"
        self._staged[staged] = b"".join(buffers)
        return staged

    def share(self, staged: Iterable[str]) -> None:
        """Let other writers see staged bytes by their paths, also after this process died."""
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
        data = self._staged.get(staged)
        if data is None:
            found = self.bucket.get(self._key(staged))
            if found is None:
                missing = FileNotFoundError(0, "it is no longer staged", staged)
                raise StoreIOError(
                    f'cannot write "{self.place / relative}": its staged bytes are gone. Run again'
                ) from missing
            data = bytes(found.data)
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

    def replace(self, relative: str, data: bytes) -> None:
        """Replace one object: readers see the old bytes or the new ones."""
        self._step("rename", relative)
        self.bucket.put(self._key(relative), data)

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

    def _step(self, operation: str, path: str | Path) -> None:
        if self._hook is not None:
            self._hook(operation, Path(path))
        self.guard()
