"""A store held for care: its lock is taken, and no provenance is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradstore.format.layout import COMMITS
from gradstore.storage.local import StoreFiles
from gradstore.storage.location import Place
from gradstore.storage.places import files_at, lock_of
from gradstore.storage.unseen import check_unseen
from gradstore.store.reader import Store, read_identity
from gradstore.store.worker_group import group_mark


@contextmanager
def held_store(
    path: Place, files: StoreFiles | None = None
) -> Iterator[tuple[StoreFiles, Callable[[], Store]]]:
    """Hold the lock of an existing store for the block.

    Args:
        path: where the store is.
        files: the store's files, for tests that interrupt them.

    Yields:
        The store's files, and a function that gives the store as it is now.

    Raises:
        BadInput: there is no store; nothing is written.
        ProvenanceMismatch: its schema is newer than this release.
        DamagedData: its root or a commit is damaged.
        StoreBusy: another process writes to it.
        StoreIOError: it cannot be written.
    """
    held = files or files_at(path)
    read_identity(held)
    with lock_of(held, instead="stop it, and run this command then"):
        try:
            check_unseen(held)
            held.remove(group_mark(held))  # of workers that were killed: who joins begins anew
            held.make_directory(COMMITS)
            held.sync_directory(COMMITS)  # who wrote the newest may have died before that
            yield held, _View(held)
        finally:
            held.close()


class _View:
    """The current store; keeps what was checked before."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._store: Store | None = None

    def __call__(self) -> Store:
        self._store = Store(self._files, self._store)
        return self._store
