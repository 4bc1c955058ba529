"""Check of every byte of all committed data; lists every fault, does not stop at the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gradstore.errors import BadInput, DamagedFile, Fault
from gradstore.format.commits import Commit
from gradstore.format.layout import (
    FORGOTTEN,
    GENERATIONS,
    METADATA,
    SPACES,
    generation_path,
    group_json,
    plan_path,
    provenance_path,
    unit_path,
)
from gradstore.format.plans import Plan
from gradstore.format.provenance import read_provenance
from gradstore.format.text_table import part_path, texts_path
from gradstore.storage.location import Place
from gradstore.storage.places import reads_at
from gradstore.storage.reading import ReadFiles
from gradstore.store.documents import check_metadata, metadata, read_committed_plan, read_space
from gradstore.store.generation import Generation
from gradstore.store.reader import Store
from gradstore.store.texts import RowTexts
from gradstore.store.unit_files import check_unit, read_record


def verify_store(path: Place) -> VerifyReport:
    """Read the whole store again from disk, without relying on earlier checks.

    Checked: the root, the commit chain, each space's provenance, each table of text, and of every
    committed generation the plan, the factors of its metric, each zarr.json, each unit record, and
    size, crc32c and sha256 of each chunk.

    Args:
        path: where the store is.

    Raises:
        BadInput: there is no store.
        ProvenanceMismatch: its schema is newer than this release.
    """
    files = reads_at(path)
    try:
        store = Store(files)
    except DamagedFile as error:
        return VerifyReport((error.fault,), 1, 0, ())
    check = _Check(files)
    check.count(METADATA)
    check.metadata(f"{GENERATIONS}/{METADATA}", group_json())
    for commit in store.commits:
        check.count(f"commits/{commit.number}.json")
    for space in files.names(SPACES):
        check.space(space)
    check.requests(store)
    live = store.live_commits(superseded=True)
    for commit in live:
        check.generation(commit)
    for commit in store.text_commits().values():
        check.texts(commit)
    names = tuple(commit.generation for commit in live)
    return VerifyReport(
        tuple(check.faults), check.files_seen, check.bytes_seen, names, tuple(store.planned())
    )


class _Check:
    """Collector of faults, and of counts of what was read."""

    def __init__(self, files: ReadFiles) -> None:
        self._files = files
        self._counted: set[str] = set()
        self.faults: list[Fault] = []
        self.files_seen = 0
        self.bytes_seen = 0

    def count(self, path: str, size: int | None = None) -> None:
        """Count one file, once."""
        if path in self._counted:
            return
        self._counted.add(path)
        self.files_seen += 1
        with self._guarded():
            self.bytes_seen += self._files.size(path) if size is None else size

    def add(self, fault: Fault) -> None:
        """Record a fault, once."""
        if fault not in self.faults:
            self.faults.append(fault)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Record the fault that ends the block."""
        try:
            yield
        except DamagedFile as error:
            self.add(error.fault)

    def metadata(self, path: str, expected: bytes) -> None:
        """Check one zarr.json."""
        self.count(path)
        with self._guarded():
            check_metadata(self._files, path, expected)

    def space(self, space: str) -> None:
        """Check that a space's provenance matches its own seal."""
        path = provenance_path(space)
        with self._guarded():
            if not self._files.has(path):
                return
            self.count(path)
            try:
                read_provenance(self._files.read(path), space)
            except (ValueError, BadInput) as error:
                self.add(Fault(path, "the provenance that was written", str(error)))

    def requests(self, store: Store) -> None:
        """Check the documents of what was removed on request."""
        for name in self._files.names(FORGOTTEN):
            self.count(f"{FORGOTTEN}/{name}")
        with self._guarded():
            store.requests()

    def generation(self, commit: Commit) -> None:
        """Check one committed generation, every byte."""
        self.count(plan_path(commit.generation))
        try:
            plan = read_committed_plan(self._files, commit)
        except DamagedFile as error:
            self.add(error.fault)
            return
        with self._guarded():
            read_space(self._files, plan)
        expected = metadata(plan)
        for path, data in expected.items():
            self.metadata(path, data)
        seen = {path for path in expected if path.startswith(f"{generation_path(plan.name)}/")}
        for unit, sha in zip(plan.units, commit.units, strict=True):
            seen.add(unit_path(plan.name, unit.index))
            seen.update(
                f"{generation_path(plan.name)}/{spec.chunk_path(unit.index)}"
                for spec in plan.arrays
            )
            self.unit(plan, commit, unit.index, sha)
        with self._guarded():
            for path in self._files.walk(generation_path(plan.name)):
                if path not in seen:
                    self.add(Fault(path, "no file of this name", "one"))
        self.factors(plan)
        self.values(commit)

    def factors(self, plan: Plan) -> None:
        """Check the Kronecker factors that a generation's features were made with."""
        if not plan.record.curvature:
            return
        from gradstore.store.curvature import factors_of_record  # torch, which others do without

        path, fault = factors_of_record(self._files, plan.record)
        if fault is not None:
            self.add(fault)
        if self._files.has(path):
            self.count(path)

    def texts(self, commit: Commit) -> None:
        """Check the files of a table of text, and that its rows are those it is named by."""
        table = commit.texts[0]
        expected = [part_path(table.rows_sha256, i) for i in range(len(table.parts))]
        for path, part in zip(expected, table.parts, strict=True):
            self.count(path, part.bytes)
        for fault in RowTexts(self._files, table).check():
            self.add(fault)
        with self._guarded():
            for path in self._files.walk(texts_path(table.rows_sha256)):
                if path not in expected:
                    self.add(Fault(path, "no file of this name", "one"))

    def unit(self, plan: Plan, commit: Commit, index: int, sha: str) -> None:
        """Check a unit's record and each of its chunks."""
        self.count(unit_path(plan.name, index))
        try:
            record, _ = read_record(self._files, plan, commit.plan_sha256, plan.units[index], sha)
        except DamagedFile as error:
            self.add(error.fault)
            return
        for name, each in record.files.items():
            self.count(f"{generation_path(plan.name)}/{name}", each.bytes)
        for fault in check_unit(self._files, record, deep=True):
            self.add(fault)

    def values(self, commit: Commit) -> None:
        """Check that the row hashes match the plan, and the statuses match the unit counts."""
        if self.faults:
            return
        with self._guarded():
            Generation(self._files, commit).check_values()


@dataclass(frozen=True)
class VerifyReport:
    """Result of a check of every byte.

    Attributes:
        faults: every fault, in the order of the files checked.
        files: number of files checked.
        bytes: number of bytes read and hashed.
        generations: names of the committed generations that were checked.
        uncommitted: names of planned generations without a commit; not a fault.
    """

    faults: tuple[Fault, ...]
    files: int
    bytes: int
    generations: tuple[str, ...]
    uncommitted: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when nothing is damaged."""
        return not self.faults
