"""Clean-up under the lock: what is removed is first taken out of the commit chain.

A generation that readers could open is retired by a commit before its files go; so a crash between
the two leaves garbage for the next clean-up and never a promise without data.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstore.errors import BadInput, StoreIOError
from gradstore.format.commits import Commit
from gradstore.format.layout import METADATA, generation_path, plan_path
from gradstore.format.names import GenerationName
from gradstore.format.plans import Plan
from gradstore.format.text_table import TEXTS, TextTable
from gradstore.storage.local import STAGING, StoreFiles
from gradstore.storage.lock import WriterLock
from gradstore.store.curvature import remove_unused_factors
from gradstore.store.generation_writer import publish_commit
from gradstore.store.own_units import QUARANTINE
from gradstore.store.reader import Store

INDEX = "index"


def remove_dead_staging(files: StoreFiles) -> None:
    """Remove staging left by dead writers; quarantined files stay until a clean-up."""
    for name in files.names(STAGING):
        if f"{STAGING}/{name}" != QUARANTINE and not files.is_in_use(name):
            files.remove_tree(f"{STAGING}/{name}")


def clean_store(
    files: StoreFiles, view: Callable[[], Store], keep_generations: int | None
) -> list[str]:
    """Remove dead staging, quarantine, abandoned plans, superseded and old generations.

    Args:
        files: the store's files.
        view: gives the store as it is now.
        keep_generations: newest steps to keep of each (run, space, role, set); None keeps all.

    Returns:
        Full names of the generations removed now.
    """
    if keep_generations is not None and keep_generations < 1:
        raise BadInput(f"keep_generations is {keep_generations}; keep at least 1, or null for all")
    store = view()
    retire = _superseded(store) + _too_old(store, keep_generations)
    unread = _without_rows(files, store, retire)
    if retire or unread:
        draft = Commit(
            number=len(store.commits) + 1,
            store_uuid=store.uuid,
            parent=None if store.head is None else store.head.sha256,
            kind="retire",
            generations=tuple(retire),
            texts=tuple(map(TextTable, unread)),
        )
        publish_commit(files, draft, view)
        store = view()
    abandoned = _abandoned(store)
    _remove_retired(files, store)
    _remove_texts(files, store)
    for name in abandoned:
        _remove_generation(files, name)
    remove_unused_factors(files, view())
    remove_dead_staging(files)
    files.remove_tree(QUARANTINE)
    return [*retire, *abandoned]


def _superseded(store: Store) -> list[str]:
    newest = {commit.generation for commit in store.live_commits()}
    every = [commit.generation for commit in store.live_commits(superseded=True)]
    return [name for name in every if name not in newest]


def _too_old(store: Store, keep: int | None) -> list[str]:
    if keep is None:
        return []
    series = defaultdict(list)
    for commit in store.live_commits():
        name = GenerationName.parse(commit.generation)
        series[name.run, name.role, name.set].append((name.step, commit.generation))
    return [name for each in series.values() for _, name in sorted(each)[:-keep]]


def _abandoned(store: Store) -> list[str]:
    """List generations planned, never committed, and superseded by a later attempt."""
    latest: dict[GenerationName, int] = {}
    committed = [name for c in store.commits if c.kind == "generation" for name in c.generations]
    planned = store.planned()
    for name in map(GenerationName.parse, [*committed, *planned]):
        latest[name.base()] = max(name.attempt, latest.get(name.base(), 0))
    parsed = ((name, GenerationName.parse(name)) for name in planned)
    return [text for text, name in parsed if name.attempt < latest[name.base()]]


def _without_rows(files: StoreFiles, store: Store, retire: Collection[str]) -> list[str]:
    """List the row sets whose text is kept, and which no generation will have."""
    kept = store.text_commits()
    if not kept:
        return []
    live = [c.generation for c in store.live_commits(superseded=True)]
    names = [name for name in (*live, *store.planned()) if name not in retire]
    read = {Plan.from_bytes(files.read(plan_path(name)))[0].rows.sha256 for name in names}
    return [sha for sha in kept if sha not in read]


def _remove_retired(files: StoreFiles, store: Store) -> None:
    shas = {c.generation: c.sha256 for c in store.commits if c.kind == "generation"}
    for commit in store.commits:
        for name in commit.generations if commit.kind == "retire" else ():
            _remove_generation(files, name)
            if name in shas and files.exists(f"{INDEX}/{shas[name]}"):
                files.remove_tree(f"{INDEX}/{shas[name]}")


def _remove_texts(files: StoreFiles, store: Store) -> None:
    """Remove the tables of text that no commit names: retired ones, and those of dead writers."""
    kept = store.text_commits()
    for sha in files.names(TEXTS):
        if sha not in kept:
            files.remove_tree(f"{TEXTS}/{sha}")


def _remove_generation(files: StoreFiles, name: str) -> None:
    files.remove_tree(generation_path(name))
    if files.exists(plan_path(name)):
        files.remove(plan_path(name))


@contextmanager
def store_set_aside(path: Path) -> Iterator[None]:
    """Take a store out of its place for the block; it is removed after it, or put back on an error.

    A store that has a writer, and a folder that is no store, stay where they are. The folder is
    renamed under the writer's lock, so that no reader or writer ever meets a half-removed store.

    Raises:
        StoreBusy: another process writes to it.
        StoreIOError: it cannot be renamed or removed.
    """
    files = StoreFiles(path)
    if not path.is_dir() or not files.exists(METADATA):
        yield
        return
    renamed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.discarded")
    with _removal(path), WriterLock(files):
        os.rename(path, renamed)
    try:
        yield
    except BaseException:  # Ctrl-C too: the store must be back whatever ends the block
        with _removal(path):
            shutil.rmtree(path, ignore_errors=True)  # what the block has put in its place
            os.rename(renamed, path)
        raise
    with _removal(path):
        shutil.rmtree(renamed)


@contextmanager
def _removal(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreIOError(
            f'store "{path}" cannot be removed: {error.strerror}. Remove it by hand, or choose '
            "another output_dir."
        ) from error
