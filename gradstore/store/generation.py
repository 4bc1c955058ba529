"""A committed generation, read row by row or unit by unit; never a byte before it is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from gradstore.errors import BadInput, Fault
from gradstore.format.canonical import Json
from gradstore.format.codec import decode
from gradstore.format.commits import Commit
from gradstore.format.layout import RowStatus, generation_path
from gradstore.format.names import Role
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.format.sources import Sources
from gradstore.format.unit_records import UnitRecord
from gradstore.storage.location import Location
from gradstore.storage.reading import ReadFiles
from gradstore.store.chunks import Chunks
from gradstore.store.documents import check_beside_plan, read_committed_plan
from gradstore.store.unit_files import read_record


class Generation:
    """Features of n rows at one checkpoint, as one commit published them.

    Opening checks the plan, the provenance, every zarr.json and every unit record against the
    commit. Each chunk's size and crc32c are checked before its first use, once per process. Several
    threads may read at the same time.

    Attributes:
        name: full name, with `.attempt` from the second on.
        record: what made it.
        commit: the commit that added it.
        rows: n.
        dim: d.
        dtype: of `layout.FeatureDtype`, as its rows are stored; bfloat16 as its bits in uint16.
        space: name of its space.
    """

    def __init__(
        self,
        files: ReadFiles,
        commit: Commit,
        explain: Callable[[str], None] | None = None,
        held: Iterable[RowSet] = (),
    ) -> None:
        """Check everything but the chunks.

        Args:
            files: the store's files.
            commit: what it must be.
            explain: called with the name when a file is not as it should be; may raise what the
                cause really is (a clean-up after this view was opened).
            held: rows that are in memory already; where they are the generation's, it shares them.
        """
        self._files = files
        self.commit = commit
        self.name = commit.generation
        plan = read_committed_plan(files, commit)
        self._plan = plan = replace(plan, rows=plan.rows.held_once(held))
        self._provenance = check_beside_plan(files, plan)
        sums = np.empty((len(plan.units), len(plan.arrays)), np.uint32)
        self._counts = {status.name.lower(): 0 for status in RowStatus}
        for record in committed_records(files, plan, commit):
            index = record.unit.index
            paths = (spec.chunk_path(index) for spec in plan.arrays)
            sums[index] = [record.files[path].crc32c for path in paths]
            for name, count in record.status.items():
                self._counts[name] = self._counts.get(name, 0) + count
        self._chunks = Chunks(files, plan, sums, explain)
        self.record: GenerationRecord = self._plan.record
        self.rows = len(self._plan.rows)
        self.dim = self._plan.dim
        self.dtype = self._plan.dtype
        self.space = self._plan.space

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"<Generation {self.name}: {self.rows:,} x {self.dim:,} {self.dtype}>"

    @property
    def role(self) -> Role:
        """Train or target."""
        return self.record.role

    @property
    def set(self) -> str:
        """Name of the target set, "" for train."""
        return self.record.set

    @property
    def step(self) -> int:
        """Optimizer step of the checkpoint."""
        return self.record.step

    @property
    def projection(self) -> Mapping[str, Json]:
        """`ProjectionSpec.to_dict()` with this generation's effective seed."""
        return self.record.projection

    @property
    def provenance(self) -> Mapping[str, Json]:
        """The MUST-EQUAL fields of its space."""
        return self._provenance

    @property
    def plan(self) -> Plan:
        """The plan it fulfils."""
        return self._plan

    @property
    def commit_sha(self) -> str:
        """Seal of the commit; an index belongs to it."""
        return self.commit.sha256

    @property
    def bytes(self) -> int:
        """Bytes of all chunks."""
        return self._plan.chunk_bytes

    @property
    def path(self) -> Location:
        """Place of the Zarr group."""
        return self._files.path(generation_path(self.name))

    @property
    def units(self) -> list[tuple[int, int]]:
        """(start, stop) of every unit, in order, half-open."""
        return [(unit.start, unit.stop) for unit in self._plan.units]

    @cached_property
    def status(self) -> np.ndarray:
        """(n,) uint8, a `RowStatus` per row."""
        return self._column("status")

    @cached_property
    def usable(self) -> np.ndarray:
        """(n,) bool, True where the status is ok."""
        return np.asarray(self.status == RowStatus.OK)

    @cached_property
    def scale(self) -> np.ndarray:
        """(n,) float32, what a stored row is multiplied by; NaN for rows that can't be used."""
        return self._column("scale")

    @cached_property
    def norm(self) -> np.ndarray:
        """(n,) float32, norm of each row's feature before projection, as the exporter gave it."""
        return self._column("norm")

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n,) int32, target tokens per row."""
        return self._column("tokens")

    @cached_property
    def loss(self) -> np.ndarray | None:
        """(n,) float32, mean loss over each row's target tokens; None where none were kept."""
        return self._column("loss") if self._plan.losses else None

    @cached_property
    def row_hash(self) -> np.ndarray:
        """(n, 16) uint8, hash of each row's token ids and labels."""
        found = self._column("row_hash")
        if not np.array_equal(found, self._plan.rows.hashes):
            path = f"{generation_path(self.name)}/row_hash"
            raise self._chunks.damaged(Fault(path, "the row hashes of the plan", "others"))
        return found

    def check_values(self) -> None:
        """Compare the row hashes with the plan, and the statuses with the units' counts.

        Raises:
            DamagedData: they are not the same.
        """
        counts = np.bincount(self.status, minlength=len(RowStatus)).tolist()
        if len(self.row_hash) != self.rows or counts != list(self.status_counts().values()):
            path = f"{generation_path(self.name)}/status"
            raise self._chunks.damaged(Fault(path, str(self.status_counts()), str(counts)))

    @property
    def sources(self) -> Sources | None:
        """(data set name, index in its file) of each row, if the exporter knew them."""
        return self._plan.rows.sources

    def status_counts(self) -> dict[str, int]:
        """Count the rows per status name, zeros included; from the unit records alone."""
        return dict(self._counts)

    def raw(self, unit: int) -> np.ndarray:
        """Return the stored features of one unit, mapped from disk, read-only.

        Args:
            unit: number of the unit.

        Returns:
            (rows of the unit, d) in the stored dtype; multiply by `scale` to decode. Of 1bit
            (rows of the unit, ceil(d / 8)) uint8, for `gradstore.format.quantise`.

        Raises:
            DamagedData: the chunk's size or crc32c is not the committed one.
        """
        if not 0 <= unit < len(self._plan.units):
            raise BadInput(
                f"{self.name} has units 0 to {len(self._plan.units) - 1}, not {unit}; "
                "ask for one of them"
            )
        start, stop = self.units_range(unit)
        return self._chunks.mapped(self._plan.arrays[0], unit)[: stop - start]

    def raw_reader(self) -> Callable[[int, int, int], np.ndarray]:
        """Return what reads stored features for one thread that goes over many of them once.

        Returns:
            (unit, start, stop) -> rows [start, stop) of `raw(unit)`, until the next call; there
            must be such rows. It raises DamagedData as `raw` does.
        """
        return self._chunks.reader(self._plan.arrays[0])

    def units_range(self, unit: int) -> tuple[int, int]:
        """Return (start, stop) of one unit."""
        bounds: UnitRange = self._plan.units[unit]
        return bounds.start, bounds.stop

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read and decode rows.

        Args:
            start: first row.
            stop: one past the last row.

        Returns:
            (stop - start, d) float32; rows that can't be used are NaN.

        Raises:
            BadInput: the range is not within 0 to n.
            DamagedData: a chunk is not the committed one.
        """
        if not 0 <= start <= stop <= self.rows:
            raise BadInput(
                f"{self.name} has rows 0 to {self.rows}, not {start} to {stop}; "
                "ask for rows within them"
            )
        out = np.empty((stop - start, self.dim), dtype=np.float32)
        size = self._plan.unit_rows
        for unit in range(start // size, -(-stop // size) if stop > start else start // size):
            first = unit * size
            low, high = max(start, first), min(stop, first + size)
            stored = self._chunks.mapped(self._plan.arrays[0], unit)[low - first : high - first]
            into = out[low - start : high - start]
            decode(stored, self.scale[low:high], self.dtype, self.dim, into)
        return out

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read and decode rows here and there, each unit once.

        Args:
            rows: (k,) positions, in any order.

        Returns:
            (k, d) float32 in that order; rows that can't be used are NaN.

        Raises:
            BadInput: a row is not within 0 to n.
            DamagedData: a chunk is not the committed one.
        """
        asked = np.asarray(rows, dtype=np.int64)
        return decode(self.take_raw(asked), self.scale[asked], self.dtype, self.dim)

    def take_raw(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read rows here and there as they are stored, each unit once.

        Args:
            rows: (k,) positions, in any order.

        Returns:
            (k, d) in the stored dtype, as `raw` gives them, in that order.

        Raises:
            BadInput: a row is not within 0 to n.
            DamagedData: a chunk is not the committed one.
        """
        asked = np.asarray(rows, dtype=np.int64)
        if len(asked) and not 0 <= asked.min() <= asked.max() < self.rows:
            raise BadInput(
                f"{self.name} has rows 0 to {self.rows - 1}, not {asked.min()} to {asked.max()}; "
                "ask for rows within them"
            )
        return self._chunks.rows(self._plan.arrays[0], asked)

    def _column(self, name: str) -> np.ndarray:
        spec = next(each for each in self._plan.arrays if each.name == name)
        parts = self._files.at_once(
            lambda unit: self._chunks.mapped(spec, unit.index, keep=False)[
                : unit.stop - unit.start
            ],
            self._plan.units,
        )
        column = np.concatenate(list(parts))
        column.flags.writeable = False
        return column


def committed_records(files: ReadFiles, plan: Plan, commit: Commit) -> Iterator[UnitRecord]:
    """Read the record of each unit that a commit names, in order.

    Raises:
        DamagedFile: one is missing, edited, or of another plan or unit.
    """
    return files.at_once(
        lambda each: read_record(files, plan, commit.plan_sha256, *each)[0],
        zip(plan.units, commit.units, strict=True),
    )
