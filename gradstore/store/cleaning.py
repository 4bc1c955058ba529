"""Clean-up under the lock: what is removed is first taken out of the commit chain.

A generation that readers could open is retired by a commit before its files go; so a crash between
the two leaves garbage for the next clean-up and never a promise without data.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gradstore.errors import BadInput, DamagedFile, StoreIOError
from gradstore.format.commits import Commit
from gradstore.format.layout import (
    CURVATURE,
    GENERATIONS,
    INDEX,
    INDEX_KINDS,
    METADATA,
    generation_path,
    plan_path,
)
from gradstore.format.names import GenerationName
from gradstore.format.plans import Plan
from gradstore.format.text_table import TEXTS, TextTable, part_path
from gradstore.storage.leases import LEASES
from gradstore.storage.local import STAGING, StoreFiles
from gradstore.storage.lock import WriterLock
from gradstore.storage.unseen import check_unseen
from gradstore.store.documents import files_of, read_committed_plan
from gradstore.store.generation_writer import publish_commit
from gradstore.store.own_units import QUARANTINE
from gradstore.store.reader import Store


def remove_dead_staging(files: StoreFiles) -> None:
    """Remove staging left by dead writers; quarantined files stay until a clean-up."""
    for path in _dead_staging(files):
        files.remove_tree(path)


@dataclass(frozen=True)
class Removal:
    """A file or folder that a clean-up removes.

    Attributes:
        path: of the file or folder, relative to the store.
        why: superseded, old, retired, abandoned, unread text, unused factors,
            staging or quarantine.
        bytes: of all files in it.
    """

    path: str
    why: str
    bytes: int


@dataclass(frozen=True)
class CleanUp:
    """Effect of a clean-up on a store as it is.

    Attributes:
        retire: full names of the generations that readers can open now and could not after it.
        abandoned: full names of planned generations without a commit, which a later attempt
            superseded.
        unread: sha256 of the row sets whose text no generation would have.
        removals: what it removes, in this order.
    """

    retire: tuple[str, ...]
    abandoned: tuple[str, ...]
    unread: tuple[str, ...]
    removals: tuple[Removal, ...]

    @property
    def bytes(self) -> int:
        """Bytes of everything that goes."""
        return sum(each.bytes for each in self.removals)


def plan_clean_up(files: StoreFiles, store: Store, keep_generations: int | None) -> CleanUp:
    """List what a clean-up of a store removes; changes nothing.

    Args:
        files: the store's files.
        store: the store as it is now.
        keep_generations: newest steps to keep of each (run, space, role, set); None keeps all.

    Raises:
        BadInput: `keep_generations` is below 1.
    """
    if keep_generations is not None and keep_generations < 1:
        raise BadInput(f"keep_generations is {keep_generations}; keep at least 1, or null for all")
    superseded = _superseded(store)
    why = dict.fromkeys(_too_old(store, keep_generations), "old")
    why |= dict.fromkeys(superseded, "superseded")
    unread = _without_rows(files, store, why)
    abandoned = _abandoned(store)
    indexes = {c.generation: f"{INDEX}/{c.sha256}" for c in store.commits if c.kind == "generation"}
    paths: dict[str, str] = {}
    for name, reason in [*_retired(store), *why.items()]:
        paths |= dict.fromkeys((generation_path(name), plan_path(name)), reason)
        if name in indexes:  # it was committed
            paths |= {indexes[name] + kind: reason for kind in INDEX_KINDS}
    kept = store.text_commits().keys() - set(unread)
    paths |= dict.fromkeys(texts_but(files, store, kept), "unread text")
    for name in abandoned:
        paths |= dict.fromkeys((generation_path(name), plan_path(name)), "abandoned")
    unused = _unused_factors(files, store, [*why, *abandoned])
    paths |= dict.fromkeys(unused, "unused factors")
    paths |= dict.fromkeys(_dead_staging(files), "staging")
    paths[QUARANTINE] = "quarantine"
    there = files.at_once(lambda path: _is_there(files, path), paths)
    removals = tuple(
        Removal(path, reason, files.bytes_below(path))
        for (path, reason), is_there in zip(paths.items(), there, strict=True)
        if is_there
    )
    return CleanUp(tuple(why), tuple(abandoned), tuple(unread), removals)


def clean_store(
    files: StoreFiles, view: Callable[[], Store], keep_generations: int | None
) -> CleanUp:
    """Remove dead staging, quarantine, abandoned plans, superseded and old generations.

    Args:
        files: the store's files, under the writer's lock.
        view: gives the store as it is now.
        keep_generations: newest steps to keep of each (run, space, role, set); None keeps all.

    Returns:
        What was removed.
    """
    store = view()
    found = plan_clean_up(files, store, keep_generations)
    abandoned = found.abandoned if files.late_writes else ()
    retire(files, view, [*found.retire, *abandoned], found.unread)
    for each in found.removals:
        remove_whole(files, store, each.path)
    return found


def retire(
    files: StoreFiles,
    view: Callable[[], Store],
    generations: Sequence[str],
    texts: Sequence[str] = (),
) -> None:
    """Commit that generations, and the text of row sets, are readable no more.

    Where writes may come late, of planned generations too, before their files go: no commit of them
    can come after this one, which has its number, and no attempt is called so again.
    """
    if not generations and not texts:
        return
    store = view()
    draft = Commit(
        number=len(store.commits) + 1,
        store_uuid=store.uuid,
        parent=None if store.head is None else store.head.sha256,
        kind="retire",
        generations=tuple(generations),
        texts=tuple(map(TextTable, texts)),
    )
    publish_commit(files, draft, view)


def remove_retired(files: StoreFiles, store: Store) -> None:
    """Remove the files of every generation that a commit has retired."""
    for each in plan_clean_up(files, store, None).removals:
        if each.why == "retired":
            remove_whole(files, store, each.path)


def remove_whole(files: StoreFiles, store: Store, path: str) -> None:
    """Remove a file or folder, and all that a plan or commit says is in it, listed or not."""

    def known() -> Iterator[str]:
        folder, _, name = path.partition("/")
        if folder == GENERATIONS:
            plan = _readable(files, name)
            yield from [] if plan is None else files_of(plan)
        for table in (each for commit in store.commits for each in commit.texts):
            if path == f"{TEXTS}/{table.rows_sha256}":
                yield from (part_path(name, number) for number in range(len(table.parts)))

    files.remove_tree(path, known)


def texts_but(files: StoreFiles, store: Store, kept: Collection[str]) -> list[str]:
    """List the folders of texts but for those of some row sets: what is listed or was committed."""
    ever = {each.rows_sha256 for commit in store.commits for each in commit.texts}
    return [f"{TEXTS}/{sha}" for sha in sorted({*files.names(TEXTS), *ever} - set(kept))]


def _is_there(files: StoreFiles, path: str) -> bool:
    """Tell whether there is something to remove; a listing may not show it."""
    folder, _, name = path.partition("/")
    first = {GENERATIONS: plan_path(name), TEXTS: part_path(name, 0)}.get(folder)
    return files.exists(path) or (first is not None and files.has(first))


def _readable(files: StoreFiles, name: str) -> Plan | None:
    """Return the plan of a generation; None where there is none to be read."""
    try:
        return Plan.from_bytes(files.read(plan_path(name)))[0]
    except (ValueError, BadInput, DamagedFile):
        return None


def _dead_staging(files: StoreFiles) -> list[str]:
    paths = {f"{STAGING}/{name}": files.is_in_use(name) for name in files.names(STAGING)}
    if any(used for path, used in paths.items() if path != f"{STAGING}/{files.own}"):
        paths[LEASES] = True  # of whoever lives
    return [path for path, used in paths.items() if path != QUARANTINE and not used]


def _retired(store: Store) -> list[tuple[str, str]]:
    """List the generations that earlier clean-ups retired; a crash may have left their files."""
    taken_back = (c.generations for c in store.commits if c.kind == "retire")
    return [(name, "retired") for name in chain.from_iterable(taken_back)]


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
    read = {plan.rows.sha256 for plan in _plans(files, store, retire)}
    return [sha for sha in kept if sha not in read]


def _unused_factors(files: StoreFiles, store: Store, gone: Collection[str]) -> list[str]:
    """List the files of factors that no generation will name."""
    kept = files.names(CURVATURE)
    if not kept:
        return []
    told = [plan.record.curvature for plan in _plans(files, store, gone)]
    named = {f"{each['sha256']}.safetensors" for each in told if each}
    return [f"{CURVATURE}/{name}" for name in kept if name not in named]


def _plans(files: StoreFiles, store: Store, without: Collection[str]) -> Iterator[Plan]:
    """Read the plans of all generations, committed and not, but for some."""
    for commit in store.live_commits(superseded=True):
        if commit.generation not in without:
            yield read_committed_plan(files, commit)
    for name in store.planned():
        if name not in without and (plan := _readable(files, name)) is not None:
            yield plan  # else it is set aside, and planned again, by whoever begins it


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
        check_unseen(files)
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
