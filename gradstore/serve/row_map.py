"""A map of a generation's rows: their two principal directions in gradient space.

Letters: n rows, d dimensions, s rows of the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.scan import Scan, exact_float32, unit_rows
from gradstore.similarity.rows import UsableRows
from gradstore.store.generation import Generation

#: Rows whose directions fix the axes; up to so many usable rows, the map is the exact PCA.
SAMPLE_ROWS = 2048

_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class RowMap:
    """Coordinates of all rows.

    Attributes:
        points: (n, 2) float32, unit rows less their mean, on the two axes; nan where a row is not
            usable.
        explained: share of the sample's variance on each axis.
        sampled: s.
    """

    points: npt.NDArray[np.float32]
    explained: tuple[float, float]
    sampled: int

    @property
    def nbytes(self) -> int:
        """Bytes of the coordinates."""
        return self.points.nbytes


def row_map(generation: Generation, on_rows: Callable[[int], None]) -> RowMap:
    """Map every row, in chunks.

    Args:
        generation: whose rows.
        on_rows: called with the number of rows just done; may raise to stop.

    Raises:
        BadInput: fewer than two usable rows.
        DamagedData: a chunk is not the committed one.
    """
    sample = _sample(generation)
    mean = sample.mean(axis=0)
    axes, explained = _principal(sample - mean)
    on_rows(0)
    n = generation.rows
    points = np.full((n, 2), np.nan, dtype=np.float32)
    with exact_float32():
        scan = Scan(generation, axes, chunk_rows=_CHUNK_ROWS, device=torch.device("cpu"))
        for start in range(0, n, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, n)
            products, codes = scan.chunk(start, stop)
            good = (codes == RowStatus.OK) & generation.usable[start:stop]
            points[start:stop][good] = products[good] - (axes @ mean).astype(np.float32)
            on_rows(stop - start)
    return RowMap(points, explained, len(sample))


def _sample(generation: Generation) -> npt.NDArray[np.float64]:
    """Read at most SAMPLE_ROWS usable rows, evenly spaced, as (s, d) unit rows."""
    usable = UsableRows(generation)
    if len(usable) < 2:
        raise BadInput(
            f"{generation.name} has {len(usable)} usable rows; a map needs two. See why the others "
            "were skipped, and export them again."
        )
    count = min(SAMPLE_ROWS, len(usable))
    positions = np.linspace(0, len(usable) - 1, count).astype(np.int64)
    return unit_rows(usable[positions])[0]


def _principal(centred: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64],
                                                          tuple[float, float]]:  # fmt: skip
    """Return the two principal axes, (2, d) of length 1, and their shares of the variance."""
    total = float(np.square(centred).sum()) or 1.0
    if min(centred.shape) <= 2:
        _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
        if len(axes) < 2:  # one dimension
            axes, sizes = np.vstack([axes, np.zeros_like(axes)]), np.append(sizes, 0.0)
    else:
        from scipy.sparse.linalg import svds

        start = np.random.default_rng(0).standard_normal(min(centred.shape))
        _, sizes, axes = svds(centred, k=2, v0=start)
        axes, sizes = axes[::-1], sizes[::-1]  # the largest first
    first = axes[:2].copy()
    # A singular vector's sign is arbitrary: its largest entry is made positive.
    largest = np.abs(first).argmax(axis=1)
    first *= np.where(first[np.arange(2), largest] < 0, -1.0, 1.0)[:, None]
    return first, (float(sizes[0] ** 2 / total), float(sizes[1] ** 2 / total))
