"""Rows of a store as people name them: by position, or by data set and index in its file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.layout import plan_path
from gradstore.format.plans import Plan
from gradstore.format.records import HASH_BYTES, RowSet
from gradstore.storage.reading import ReadFiles
from gradstore.store.documents import read_committed_plan
from gradstore.store.reader import Store

#: An index in a file, as it is spelled; the most digits that 64 bits hold whatever they are.
_INDEX = re.compile(r"0|-?[1-9][0-9]{0,17}")


class AlreadyRemoved(BadInput):
    """A row that was asked for, and that an earlier request removed."""


def asked_rows(
    files: ReadFiles,
    store: Store,
    rows: Sequence[int] = (),
    sources: Sequence[str] = (),
    target: str = "",
) -> set[bytes]:
    """Return the hashes of rows that somebody named, wherever in the store they are.

    Args:
        files: the store's files.
        store: the store as it is now.
        rows: positions in the training set, or in `target`.
        sources: `NAME`, a whole data set, or `NAME:INDEX`, a row of its file.
        target: name of a target set, "" for the training rows.

    Raises:
        BadInput: a row or source that there is not, or that was removed before; a row by position
            that was is an `AlreadyRemoved`.
        DamagedData: a plan is damaged.
    """
    sets = _distinct(_row_sets(files, store))
    found: set[bytes] = set()
    if rows:
        found |= _by_position([each for name, each in sets if name == target], rows, target)
    for source in sources:
        found |= _by_source(list({id(each): each for _, each in sets}.values()), source)
    return found


def _distinct(sets: Iterable[tuple[str, RowSet]]) -> list[tuple[str, RowSet]]:
    """Hold equal row sets once, however many generations have them, in the order of the last."""
    held: dict[str, list[RowSet]] = {}
    found: dict[tuple[str, int], tuple[str, RowSet]] = {}
    for name, each in sets:
        alike = held.setdefault(each.sha256, [])
        rows = each.held_once(alike)  # the same hashes may have other sources
        if rows is each:
            alike.append(rows)
        found.pop((name, id(rows)), None)
        found[name, id(rows)] = name, rows
    return list(found.values())


def _row_sets(files: ReadFiles, store: Store) -> Iterator[tuple[str, RowSet]]:
    """Give target set ("" for train) and rows of every generation, the unfinished too."""
    for commit in store.live_commits(superseded=True):
        plan = read_committed_plan(files, commit)
        yield plan.record.set, plan.rows
    for name in store.planned():
        try:
            plan = Plan.from_bytes(files.read(plan_path(name)))[0]
        except (ValueError, BadInput):
            continue  # damaged, and removed whatever is asked for
        yield plan.record.set, plan.rows


def _by_position(sets: Sequence[RowSet], rows: Sequence[int], target: str) -> set[bytes]:
    what = f"target set {target!r}" if target else "training set"
    if not sets:
        raise BadInput(f"the store has no {what}, so it has none of its rows; check the name")
    size = len(sets[-1])
    outside = [row for row in rows if not 0 <= row < size]
    if outside:
        raise BadInput(f"row {outside[0]} was asked for, the {what} has rows 0 to {size - 1}")
    places = np.asarray(rows)
    gone = np.array([each.forgotten[places] for each in sets]).all(axis=0)
    if gone.any():
        raise AlreadyRemoved(f"row {rows[int(gone.argmax())]} of the {what} was removed before")
    return {each.hashes[i].tobytes() for each in sets for i in rows if not each.forgotten[i]}


def _by_source(sets: Sequence[RowSet], source: str) -> set[bytes]:
    named = [(each, each.sources) for each in sets if each.sources is not None]
    there = {
        own.names[code] for rows, own in named for code in np.unique(own.code[~rows.forgotten])
    }
    name, _, text = source.rpartition(":")
    whole = source in there  # a name may have a colon
    index = None if whole or _INDEX.fullmatch(text) is None else int(text)
    found: set[bytes] = set()
    for rows, own in named if whole or index is not None else ():
        codes = [c for c, each in enumerate(own.names) if each == (source if whole else name)]
        wanted = np.isin(own.code, codes) & ~rows.forgotten
        if index is not None:
            wanted &= own.row == index
        data = rows.hashes[wanted].tobytes()
        found.update(data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES))
    if not found:
        known = ", ".join(sorted(there)) or "none that are known by name"
        raise BadInput(
            f"no row of source {source!r} is in the store (it may have been removed before); give "
            f"NAME or NAME:INDEX. Data sets: {known}"
        )
    return found
