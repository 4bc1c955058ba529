"""Damage of a store in the terms of its content: which rows, what is lost, and the remedy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gradstore.errors import DamagedData, Fault, StoreIOError
from gradstore.format.commits import Commit
from gradstore.format.foreign import read_object
from gradstore.format.layout import (
    COMMITS,
    CURVATURE,
    FORGOTTEN,
    GENERATIONS,
    INDEX,
    METADATA,
    PLANS,
    SPACES,
    generation_path,
)
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.text_table import TEXTS
from gradstore.storage.hashing import sha256_file
from gradstore.storage.location import Place
from gradstore.storage.places import reads_at
from gradstore.storage.reading import ReadFiles
from gradstore.store.documents import read_committed_plan
from gradstore.store.reader import Store
from gradstore.store.unit_files import lost_record, row_hash_file
from gradstore.store.verify import verify_store

#: What makes a damaged thing whole: the store's other files, the run's configuration, or nothing.
Remedy = Literal["store", "config", "none"]

#: A chunk of a unit, or its record; the generation's name may have slashes.
_OF_UNIT = re.compile(
    rf"{GENERATIONS}/(?P<name>.+)/"
    r"(?:units/(?P<record>[0-9]+)\.json|(?P<array>[a-z_]+)/c/(?P<chunk>[0-9]+)(?:/0)?)"
)
_STRAY = "no file of this name"

_LOST = {
    FORGOTTEN: "lost: which rows this request named; those it removed stay removed",
    CURVATURE: "lost: no further rows can be put into this metric; scores of what is stored need "
    "none",
    PLANS: "lost: which rows the generation has, and what made them",
    COMMITS: "lost: this commit and all after it cannot be told from forged ones; the files of "
    "their generations lie untouched",
}


@dataclass(frozen=True)
class Damage:
    """Something in a store that is not as it was committed.

    Attributes:
        what: unit: rows of a generation; text: the text of a row set; space: the provenance of a
            space; root or metadata: a zarr.json; index: derived; stray: a file that is no part of
            the store; document: a plan, a commit, or values that contradict their plan.
        faults: its files.
        remedy: what makes it whole.
        says: what is lost, or what a repair does.
        generation: full name of the generation, where it is one's.
        unit: the unit and its rows, of a unit.
        sources: (data set, index in its file) of those rows, where they are known.
    """

    what: Literal["unit", "text", "space", "root", "metadata", "index", "stray", "document"]
    faults: tuple[Fault, ...]
    remedy: Remedy
    says: str
    generation: str = ""
    unit: UnitRange | None = None
    sources: tuple[tuple[str, int], ...] = ()

    @property
    def arrays(self) -> set[str]:
        """Arrays of the unit with a damaged chunk; `units` stands for its record."""
        found = (_OF_UNIT.fullmatch(fault.file) for fault in self.faults)
        return {match["array"] or "units" for match in found if match is not None}


def assess(path: Place) -> list[Damage]:
    """Verify a store, and say of everything damaged what it is and what helps.

    Args:
        path: where the store is.

    Raises:
        BadInput: there is no store.
        ProvenanceMismatch: its schema is newer than this release.
    """
    files = reads_at(path)
    units: dict[tuple[str, int], list[Fault]] = defaultdict(list)
    found = []
    for fault in verify_store(path).faults:
        match = None if fault.expected == _STRAY else _OF_UNIT.fullmatch(fault.file)
        if match is None:
            found.append(of_file(files, fault))
        else:
            units[match["name"], int(match["record"] or match["chunk"])].append(fault)
    if units:
        store = Store(files)
        commits = {c.generation: c for c in store.live_commits(superseded=True)}
        plans = {n: read_committed_plan(files, commits[n]) for n in {name for name, _ in units}}
        found += [
            _of_unit(files, plans[name], commits[name], unit, faults)
            for (name, unit), faults in sorted(units.items())
        ]
    return [*found, *_indexes(files)]


def _of_unit(
    files: ReadFiles, plan: Plan, commit: Commit, index: int, faults: Sequence[Fault]
) -> Damage:
    unit = plan.units[index]
    sources = plan.rows.sources
    damage = Damage(
        "unit",
        tuple(faults),
        "config",
        "computed again from the run's configuration and its checkpoint",
        plan.name,
        unit,
        () if sources is None else sources[unit.start : unit.stop],
    )
    follows = damage.arrays == {"row_hash"}
    if "units" in damage.arrays:
        known = row_hash_file(plan, unit)
        follows = lost_record(files, plan, commit, unit, known) is not None
    if not follows:
        return damage
    says = "row hashes follow from the plan, and a record from its chunks"
    return replace(damage, remedy="store", says=says)


def of_file(files: ReadFiles, fault: Fault) -> Damage:
    """Tell what a damaged file outside of any unit is."""
    top, generation = fault.file.split("/")[0], ""
    if fault.expected == _STRAY:
        says = "no part of the store: it is set aside in staging/quarantine"
        return Damage("stray", (fault,), "store", says)
    if fault.file == METADATA:
        says = "written again: its store is named by every commit"
        rebuilt = "store" if files.names(COMMITS) else "none"
        return Damage("root", (fault,), rebuilt, says)  # type: ignore[arg-type]
    if fault.file.endswith(f"/{METADATA}"):
        return Damage("metadata", (fault,), "store", "written again: it follows from the plan")
    if top == TEXTS:
        says = "the text of these rows is kept again from the run's configuration"
        return Damage("text", (fault,), "config", says)
    if top == SPACES:
        says = "written again where the run's configuration gives the same fields"
        return Damage("space", (fault,), "config", says)
    if top == PLANS:
        generation = fault.file.removeprefix(f"{PLANS}/").removesuffix(".json")
    says = _LOST.get(top, "not told apart further: restore it from a copy")
    return Damage("document", (fault,), "none", says, generation)


def of_loose_plan(fault: Fault) -> Damage:
    """Tell what a damaged plan is that no commit names."""
    says = "never committed: set aside in staging/quarantine with its units, and planned again"
    generation = fault.file.removeprefix(f"{PLANS}/").removesuffix(".json")
    return Damage("document", (fault,), "store", says, generation)


def _indexes(files: ReadFiles) -> Iterator[Damage]:
    """Find the indexes that would not be used: they are removed, and built again when needed."""
    if not isinstance(files.root, Path):  # a bucket holds none
        return
    for name in files.names(INDEX):
        folder = files.on_disk(f"{INDEX}/{name}")
        try:
            manifest = read_object((folder / "index.json").read_bytes())
            expected, found = manifest.get("sha256"), sha256_file(folder / "faiss.bin", fresh=True)
        except (OSError, ValueError, StoreIOError) as error:
            expected, found = "an index and its index.json", str(error)
        if expected != found:
            fault = Fault(f"{INDEX}/{name}", str(expected), str(found))
            says = "removed: an index is built again when it is needed"
            yield Damage("index", (fault,), "store", says)


def plan_of(files: ReadFiles, store: Store, generation: str) -> tuple[Plan, Commit]:
    """Return the plan and the commit of a generation that may be damaged otherwise.

    Raises:
        DamagedData: there is no such commit, or the plan is damaged too.
    """
    for commit in store.live_commits(superseded=True):
        if commit.generation == generation:
            return read_committed_plan(files, commit), commit
    raise DamagedData(f'store "{files.root}" has no commit of {generation_path(generation)}')
