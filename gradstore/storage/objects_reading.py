"""The reading half of a store's files where they are objects in a bucket, or a service has them.

Names mean what they mean in a folder, and a folder is what keys begin with. No answer of a listing
is taken for the truth: whether an object is there its own name says (`kind`, `read_if_there`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gradstore.storage.bucket import Bucket
from gradstore.storage.location import Location, ObjectPath
from gradstore.storage.reading import COMPONENT, ReadFiles
from gradstore.storage.s3 import S3Bucket
from gradstore.storage.service import ServiceBucket

#: Requests in flight: a request takes its time, and a server answers many.
REQUESTS_AT_ONCE = 16

T = TypeVar("T")
R = TypeVar("R")


def bucket_at(place: ObjectPath) -> Bucket:
    """Return what speaks to the server of a place.

    Raises:
        BadInput: the environment does not say how, or what it needs is not installed.
    """
    return ServiceBucket(place) if place.is_service else S3Bucket(place)


class ObjectReads(ReadFiles):
    """Objects of one store, to be read.

    Args:
        place: the store's bucket and prefix.
    """

    def __init__(self, place: ObjectPath) -> None:
        self.place = place
        self.root: Location = place
        self.bucket = bucket_at(place)
        self._guard = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[str, Future[memoryview]] = {}

    reads_ahead = 4
    whole_only = True

    # ---- paths -------------------------------------------------------------------------------

    def path(self, relative: str) -> Location:
        """Return an object's place, after checking its name as that of a file is."""
        return self.place / self._key(relative) if relative else self.place

    def on_disk(self, relative: str) -> Path:
        """Fail: nothing of this store is on a disk."""
        raise AssertionError(f"{relative} of {self.place} is asked for on a disk")

    def check_place(self) -> None:
        """Ask the server for what is there: it must answer, know the bucket, and let us in.

        Raises:
            StoreIOError: it does not.
        """
        self.bucket.has_below("")

    def _key(self, relative: str) -> str:
        for name in relative.split("/"):
            if not COMPONENT.fullmatch(name):
                raise self._damaged(relative, "a name made by gradstore", repr(name))
        return relative

    def kind(self, relative: str) -> str:
        """Return the kind of a path: file (an object), directory (there are some below), nothing.

        One request where it is a file, else two; only "directory" is what a listing says.
        """
        if relative and self.bucket.size(self._key(relative)) is not None:
            return "file"
        return "directory" if self.bucket.has_below(relative) else "nothing"

    # ---- reading -----------------------------------------------------------------------------

    def has(self, relative: str) -> bool:
        """Return whether an object has this name. One request."""
        return self.bucket.size(self._key(relative)) is not None

    def at_once(self, act: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Give what `act` returns for each item, in order, from several threads."""
        pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, "objects")
        try:
            yield from pool.map(act, items)
        finally:
            pool.shutdown(cancel_futures=True)

    def size(self, relative: str) -> int:
        """Return the size of an object in bytes, 0 when there is none."""
        return self.bucket.size(self._key(relative)) or 0

    def bytes_below(self, relative: str) -> int:
        """Return the bytes of an object and of all below its name; 0 when there is nothing."""
        return self.size(relative) + sum(self.bucket.sizes(self._key(relative)).values())

    def names(self, relative: str) -> list[str]:
        """List the names below one, sorted; what was written last may lack."""
        return sorted(self.bucket.names(self._key(relative) if relative else ""))

    def walk(self, relative: str) -> list[str]:
        """List all objects below a name, sorted; what was written last may lack."""
        return sorted(self.bucket.sizes(self._key(relative)))

    def soon(self, wanted: Mapping[str, int]) -> None:
        """Begin to read objects that are likely to be read next; let go of others."""
        with self._guard:
            for path in self._begun.keys() - wanted:
                self._begun.pop(path).cancel()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.reads_ahead, "objects-ahead")
            for path, size in wanted.items():
                if path not in self._begun:
                    self._begun[path] = self._pool.submit(self._whole, path, size)

    def read(self, relative: str, *, expected_bytes: int | None = None) -> bytes:
        """Read one whole object.

        Raises:
            DamagedFile: it is missing, or not `expected_bytes` long.
        """
        return bytes(self._whole(relative, expected_bytes))

    def read_if_there(self, relative: str) -> bytes | None:
        """Read one whole object; None when there is none. One request."""
        found = self.bucket.get(self._key(relative))
        return None if found is None else bytes(found.data)

    def map(self, relative: str, expected_bytes: int) -> memoryview:
        """Read one whole object into memory.

        Returns:
            (expected_bytes,) uint8, which cannot be written.

        Raises:
            DamagedFile: it is missing, or not `expected_bytes` long.
        """
        with self._guard:
            begun = self._begun.pop(relative, None)
        return self._whole(relative, expected_bytes) if begun is None else begun.result()

    def read_parts(
        self, relative: str, expected_bytes: int, parts: Iterable[tuple[int, memoryview]]
    ) -> None:
        """Read one whole object, and copy parts of it.

        Args:
            relative: of the object.
            expected_bytes: its size.
            parts: of each the offset in bytes, and what takes the bytes.

        Raises:
            DamagedFile: it is missing, or not `expected_bytes` long.
        """
        data = self.map(relative, expected_bytes)
        for offset, part in parts:
            part[:] = data[offset : offset + part.nbytes]

    def _whole(self, relative: str, expected_bytes: int | None) -> memoryview:
        expected = "a file" if expected_bytes is None else f"{expected_bytes:,} bytes"
        limit = self.most_bytes if expected_bytes is None else expected_bytes
        found = self.bucket.get(self._key(relative), limit)
        if found is None:
            raise self._damaged(relative, expected, "no file")
        if expected_bytes not in (None, found.size):
            raise self._damaged(relative, expected, f"{found.size:,} bytes")
        if found.size > limit:
            raise self._too_large(relative, found.size)
        return found.data

    def free_bytes(self) -> int:
        """Return more than any store needs: a bucket has no size that it could be asked for."""
        return sys.maxsize
