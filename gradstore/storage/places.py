"""The files and the lock of a store, wherever it is."""

from __future__ import annotations

from pathlib import Path

from gradstore.storage.local import StoreFiles
from gradstore.storage.location import Place, location
from gradstore.storage.lock import StoreLock, WriterLock
from gradstore.storage.object_lock import ObjectLock
from gradstore.storage.objects import ObjectFiles
from gradstore.storage.objects_reading import ObjectReads
from gradstore.storage.reading import ReadFiles


def reads_at(place: Place) -> ReadFiles:
    """Return the files of a store, to be read.

    Args:
        place: its folder, s3://BUCKET/PREFIX, or https://HOST of a service.

    Raises:
        BadInput: it is neither, or what an object store needs is not installed.
    """
    found = location(place)
    return ReadFiles(found) if isinstance(found, Path) else ObjectReads(found)


def files_at(place: Place) -> StoreFiles:
    """Return the files of a store, to be read and written; see `reads_at`."""
    found = location(place)
    return StoreFiles(found) if isinstance(found, Path) else ObjectFiles(found)


def lock_of(
    files: StoreFiles,
    what: str = "store",
    instead: str = "choose another store with gradstore=PATH",
) -> StoreLock:
    """Return the lock of a store; see `StoreLock`."""
    if isinstance(files, ObjectFiles):
        return ObjectLock(files, what, instead)
    return WriterLock(files, what, instead)
