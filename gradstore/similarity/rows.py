"""Rows of a generation as unit vectors, read in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradstore.errors import expect, expect_whole
from gradstore.format.layout import RowStatus
from gradstore.scoring.plain_rows import is_source
from gradstore.scoring.scan import BLOCK_ROWS, FeatureSource, unit_rows
from gradstore.store.generation import Generation


@dataclass(frozen=True)
class UnitRows:
    """Some rows of a generation, each of length 1.

    Attributes:
        start: first row.
        stop: one past the last row.
        rows: (m, d) float32 unit rows; NaN where the row cannot be used.
        status: (m,) uint8, `RowStatus`.
    """

    start: int
    stop: int
    rows: npt.NDArray[np.float32]
    status: npt.NDArray[np.uint8]


def read_unit_rows(generation: Generation, chunk_rows: int = 4096) -> Iterator[UnitRows]:
    """Yield all rows of a generation, in order, rescaled to length 1 after storage.

    Args:
        generation: of embeddings, or of gradient features.
        chunk_rows: rows at a time; memory is one chunk, whatever n is.

    Raises:
        BadInput: `chunk_rows` is below 1.
        DamagedData: a chunk is not the committed one.
    """
    expect(is_source(generation), "generation", generation, "one of store.generations()")
    expect_whole(chunk_rows, "chunk_rows")
    for start in range(0, generation.rows, chunk_rows):
        stop = min(start + chunk_rows, generation.rows)
        status = generation.status[start:stop]
        rows = unit_rows(generation.read(start, stop))[0].astype(np.float32)
        rows[status != RowStatus.OK] = np.nan
        yield UnitRows(start, stop, rows, status)


class UsableRows:
    """Usable rows of a generation as an (m, d) float32 matrix that is read when it is indexed.

    Takes the place of an array where one reads chunks and single rows, as clustering does.
    """

    ndim = 2

    def __init__(self, generation: Generation, usable: npt.NDArray[np.bool_] | None = None) -> None:
        """Choose the rows.

        Args:
            generation: whose.
            usable: (n,) bool, some of its usable rows; None takes all.
        """
        self._generation = generation
        chosen = generation.usable if usable is None else usable
        #: (m,) int64, positions in the data set.
        self.rows = np.flatnonzero(chosen).astype(np.int64)
        self.shape = (len(self.rows), generation.dim)

    def __len__(self) -> int:
        """Return m, the number of usable rows."""
        return len(self.rows)

    def __getitem__(self, key: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return (k, d) float32 unit rows, those at positions `key` of `rows`."""
        wanted = self.rows[key]
        found = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        bounds = np.array([start for start, _ in self._generation.units])
        unit_of = np.searchsorted(bounds, wanted, side="right") - 1
        for unit in np.unique(unit_of):
            start, stop = self._generation.units_range(int(unit))
            here = unit_of == unit
            rows = self._generation.read(start, stop)[wanted[here] - start]
            found[here] = unit_rows(rows)[0]
        return found


class ClusterDirections:
    """Each cluster's direction as a row of features: the mean of its representatives' unit rows."""

    def __init__(self, sample: FeatureSource, owners: npt.NDArray[np.int64], count: int) -> None:
        """Read the representatives.

        Args:
            sample: (r, d) features.
            owners: (r,) cluster of each.
            count: k.
        """
        self.name = str(getattr(sample, "name", "clusters"))
        self.space = getattr(sample, "space", None)
        self.rows, self.dim = count, sample.dim
        sums = np.zeros((count, sample.dim))
        for start in range(0, sample.rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, sample.rows)
            directions, codes = unit_rows(sample.read(start, stop))
            good = (codes == RowStatus.OK) & sample.usable[start:stop]
            np.add.at(sums, owners[start:stop][good], directions[good])
        lengths = np.linalg.norm(sums, axis=1)
        #: (k,) bool: a representative could be used.
        self.usable: npt.NDArray[np.bool_] = lengths > 0
        self._directions = (sums / np.where(lengths > 0, lengths, 1.0)[:, None]).astype(np.float32)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return directions [start, stop) as (stop - start, d)."""
        return self._directions[start:stop]
