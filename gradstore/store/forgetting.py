"""Removal of rows that somebody asked for, from everything in a store (docs/adr/0017).

Committed bytes never change: every generation with such a row is written anew without it, as a
further attempt, then the old one is retired and its files go. A request is published first. From
then on the removal has begun, and whoever calls `finish_removals` carries it to its receipt.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from gradstore.errors import BadInput, DamagedData, DamagedFile, StoreBusy, StoreIOError
from gradstore.format.commits import Commit
from gradstore.format.forgotten import Receipt, Request, asked_for, row_ids
from gradstore.format.layout import (
    FORGOTTEN,
    FORGOTTEN_VERSION,
    GENERATIONS,
    INDEX,
    PLANS,
    generation_path,
    plan_path,
    receipt_path,
    request_path,
)
from gradstore.format.plans import Plan
from gradstore.format.records import HASH_BYTES, RowSet
from gradstore.format.text_table import TEXTS, Text
from gradstore.storage.local import STAGING, StoreFiles
from gradstore.storage.reading import ReadFiles
from gradstore.store.cleaning import (
    remove_dead_staging,
    remove_retired,
    remove_whole,
    retire,
    texts_but,
)
from gradstore.store.documents import read_committed_plan
from gradstore.store.encoding import without_forgotten
from gradstore.store.generation import Generation, committed_records
from gradstore.store.generation_writer import GenerationWriter, raise_schema
from gradstore.store.own_units import QUARANTINE
from gradstore.store.reader import Store
from gradstore.store.rewriting import next_attempt
from gradstore.store.text_writer import keep_texts
from gradstore.store.texts import RowTexts
from gradstore.store.unit_files import check_unit, read_record, read_values

_log = logging.getLogger(__name__)

View = Callable[[], Store]


@dataclass(frozen=True)
class Affected:
    """Content of a store that has rows of a request.

    Attributes:
        rows: positions still there, of every committed generation that readers could open.
        newest: those of them that are the newest attempt; they are written anew.
        unfinished: planned generations without a commit; they are removed, to be begun again.
        texts: sha256 of the row sets whose text is kept.
        chunk_bytes: bytes of the chunks of `rows`' generations.
    """

    rows: Mapping[str, int]
    newest: tuple[str, ...]
    unfinished: tuple[str, ...]
    texts: tuple[str, ...]
    chunk_bytes: int


def affected(files: ReadFiles, store: Store, key: str, ids: set[str]) -> Affected:
    """Find everything that has one of the rows with these ids; changes nothing."""
    live = {c.generation: c for c in store.live_commits(superseded=True)}
    asked = _Counts(key, ids)
    rows = {n: asked.of(read_committed_plan(files, commit).rows) for n, commit in live.items()}
    rows = {name: count for name, count in rows.items() if count}
    newest = tuple(c.generation for c in store.live_commits() if c.generation in rows)
    unfinished = []
    for name in store.planned():
        plan = _planned(files, name)
        if plan is None or asked.of(plan.rows):
            unfinished.append(name)
    kept = store.text_commits().items()
    texts = [sha for sha, commit in kept if asked.of_text(RowTexts(files, commit.texts[0]), sha)]
    size = sum(live[name].chunk_bytes for name in rows)
    return Affected(rows, newest, tuple(unfinished), tuple(texts), size)


class _Counts:
    """Counts of the rows with some ids, in each row set once, however many generations have it."""

    def __init__(self, key: str, ids: set[str]) -> None:
        self._key, self._ids = key, ids
        self._known: dict[str, int] = {}

    def of(self, rows: RowSet) -> int:
        """Count the rows of a set that are still there."""
        if rows.sha256 not in self._known:
            self._known[rows.sha256] = int(asked_for(rows, self._key, self._ids).sum())
        return self._known[rows.sha256]

    def of_text(self, texts: RowTexts, sha: str) -> int:
        """Count those of a table of text, which is read unless a generation has its rows."""
        return self._known[sha] if sha in self._known else self.of(_rows_of(texts))


def request_for(files: StoreFiles, store: Store, hashes: set[bytes]) -> Request:
    """Make the request for the removal of rows; nothing is written.

    Args:
        files: the store's files.
        store: the store as it is now.
        hashes: `row_hash` of each row, from `gradstore.store.asked_rows`.

    Raises:
        BadInput: there are none.
    """
    if not hashes:
        raise BadInput("no rows were named, so none are removed; name some")
    earlier = [request for request, _ in store.requests()]
    key = earlier[0].key if earlier else secrets.token_hex(HASH_BYTES)
    return Request(
        number=len(earlier) + 1,
        store_uuid=store.uuid,
        asked=_now(),
        key=key,
        ids=tuple(sorted(row_ids(RowSet.from_hashes(sorted(hashes)), key))),
        commits=len(store.commits),
        commit_before=None if store.head is None else store.head.sha256,
    )


def forget(files: StoreFiles, view: View, request: Request) -> Receipt:
    """Remove the rows of a request from everything in the store.

    Args:
        files: the store's files, under the writer's lock.
        view: gives the store as it is now.
        request: from `request_for`, under the same lock.

    Raises:
        DamagedData: a generation or a text with one of the rows is damaged; nothing was begun.
        StoreBusy: a process computes units of this store; nothing was begun.
        StoreIOError: the disk is full; nothing was begun, or the same call goes on.
    """
    store = view()
    found = affected(files, store, request.key, set(request.ids))
    _check(files, store, found)
    raise_schema(files, store, FORGOTTEN_VERSION)
    if not files.publish(request_path(request.number), request.to_bytes()):
        raise StoreBusy(
            f'another process asks store "{files.root}" to forget rows at the same moment, in '
            "spite of its lock. Run the command again"
        )
    return _finish(files, view, request)


def finish_removals(files: StoreFiles, view: View) -> list[Receipt]:
    """Carry every removal that was begun to its receipt; under the writer's lock."""
    done, requests = [], view().requests()
    if requests:  # who wrote the newest document may have died before it synced the name
        files.make_directory(FORGOTTEN)
        files.sync_directory(FORGOTTEN)
    for request, receipt in requests:
        if receipt is None:
            _log.warning("rows asked for at %s are not removed yet: going on", request.asked)
            done.append(_finish(files, view, request))
    return done


def _check(files: StoreFiles, store: Store, found: Affected) -> None:
    """Refuse, before anything is begun, what could not be carried to its end."""
    files.check_removal()
    busy = [name for name in files.names(STAGING) if name != files.own and files.is_in_use(name)]
    if busy:
        raise StoreBusy(
            f'store "{files.root}" has units in the making ({busy[0]}). Wait until that process '
            "ends, then forget the rows"
        )
    for name in found.newest:
        commit = next(c for c in store.live_commits() if c.generation == name)
        generation = Generation(files, commit)
        records = committed_records(files, generation.plan, commit)
        for fault in (f for record in records for f in check_unit(files, record, deep=True)):
            raise DamagedData(
                f"{fault}: rows of {name} can't be copied without the asked ones. Run "
                "`dataflex-cli gradstore repair` first; nothing was removed"
            )
    for sha in found.texts:
        for fault in RowTexts(files, store.text_commits()[sha].texts[0]).check():
            raise DamagedFile(fault, str(files.root))
    if found.chunk_bytes > files.free_bytes():
        raise StoreIOError(
            f"generations are written anew before the old ones go, which needs "
            f"{found.chunk_bytes:,} bytes; {files.free_bytes():,} are free on the disk of store "
            f'"{files.root}". Free some space (gradstore gc may), then forget the rows'
        )


def _finish(files: StoreFiles, view: View, request: Request) -> Receipt:
    """Remove what is left of a request's rows; any number of interrupted calls may precede."""
    key, ids = request.key, set(request.ids)
    store = view()
    found = affected(files, store, key, ids)
    # All units first, then all commits, one after the other: the time is short in which readers see
    # one generation with the rows and another without, whose scores are refused together.
    commits = {c.generation: c for c in store.live_commits()}
    written = [_written_anew(files, view, commits[name], key, ids) for name in found.newest]
    for writer in written:
        writer.commit()
    for sha in found.texts:
        _keep_others(files, view, RowTexts(files, store.text_commits()[sha].texts[0]))
    left = affected(files, view(), key, ids)
    unfinished = left.unfinished if files.late_writes else ()
    retire(files, view, (*left.rows, *unfinished), left.texts)
    remove_retired(files, view())
    store = view()
    for name in left.unfinished:
        remove_whole(files, store, generation_path(name))
        files.remove_tree(plan_path(name))
    for path in texts_but(files, store, store.text_commits()):
        remove_whole(files, store, path)
    files.remove_tree(INDEX)
    remove_dead_staging(files)
    files.remove_tree(QUARANTINE)
    _sync_removals(files)
    receipt = _receipt(files, view(), request)
    files.publish(receipt_path(request.number), receipt.to_bytes())
    return receipt


def _sync_removals(files: StoreFiles) -> None:
    """Let removals last of a process that died before it synced them: they are no longer found."""
    if not isinstance(files.root, Path):  # a bucket syncs what it answers
        return
    for folder in _folders(files, PLANS):
        for each in (folder, folder.replace(PLANS, GENERATIONS, 1)):
            if files.kind(each) == "directory":
                files.sync_directory(each)
    if files.kind(TEXTS) == "directory":
        files.sync_directory(TEXTS)


def _folders(files: StoreFiles, folder: str) -> Iterator[str]:
    """Yield a folder and all those below it."""
    yield folder
    for name in files.names(folder):
        if files.kind(f"{folder}/{name}") == "directory":
            yield from _folders(files, f"{folder}/{name}")


def _written_anew(
    files: StoreFiles, view: View, commit: Commit, key: str, ids: set[str]
) -> GenerationWriter:
    """Write all units of a generation again without the rows; the bytes of the others are equal."""
    old = read_committed_plan(files, commit)
    new = replace(old, rows=old.rows.without(asked_for(old.rows, key, ids)))
    writer = next_attempt(files, view, new)
    for unit in list(writer.pending):
        record = read_record(files, old, commit.plan_sha256, unit, commit.units[unit.index])[0]
        writer.copy_unit(unit.index, without_forgotten(new, unit, read_values(files, old, record)))
    return writer


def _keep_others(files: StoreFiles, view: View, texts: RowTexts) -> None:
    """Keep the text of a row set once more, without that of rows that were asked for."""
    rows = _rows_of(texts)
    kept = view().without_forgotten(rows)
    names = {name for name, _ in kept.sources or ()}
    formats = {name: form for name, form in texts.formats.items() if name in names}
    keep_texts(files, view, rows, _each(texts), formats)


def _each(texts: RowTexts) -> Iterator[Text]:
    columns = ["prompt", "response", "tokens", "original"]
    for part in texts.parts(columns):
        for row in part.to_pylist():
            yield Text(**row)


def _rows_of(texts: RowTexts) -> RowSet:
    """Return the row set of a table of text."""
    table = texts.table(["row_hash", "data_set", "source_row"])
    names, places = (table[name].to_pylist() for name in ("data_set", "source_row"))
    known = all(name is not None for name in names)
    sources = list(zip(names, places, strict=True)) if known else None
    return RowSet.from_hashes(table["row_hash"].to_pylist(), sources)


def _planned(files: ReadFiles, name: str) -> Plan | None:
    """Return the plan of an uncommitted generation; None where it is damaged, so may name any."""
    try:
        return Plan.from_bytes(files.read(plan_path(name)))[0]
    except (ValueError, BadInput, DamagedFile):
        return None


def _receipt(files: StoreFiles, store: Store, request: Request) -> Receipt:
    """State what the commits since the request did."""
    since = store.commits[request.commits :]
    removed = [name for c in since if c.kind == "retire" for name in c.generations]
    size = {c.generation: c.chunk_bytes for c in store.commits if c.kind == "generation"}
    rows = {}
    for commit in since:
        if commit.kind == "generation":
            plan = read_committed_plan(files, commit)
            rows[plan.name] = int(plan.rows.forgotten.sum())
    return Receipt(
        number=request.number,
        store_uuid=request.store_uuid,
        request_sha256=request.to_dict()["sha256"],
        asked=request.asked,
        done=_now(),
        commit_before=request.commit_before,
        commit_after=None if store.head is None else store.head.sha256,
        rows=rows,
        removed=tuple(removed),
        texts=tuple(t.rows_sha256 for c in since if c.kind == "retire" for t in c.texts),
        chunk_bytes=sum(size.get(name, 0) for name in removed),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
