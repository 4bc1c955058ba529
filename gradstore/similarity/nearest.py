"""Nearest rows of every row of a generation, exactly, block by block.

`FeatureIndex` answers a few questions at a time; here all m rows ask. Each pair of blocks is
multiplied once and serves both, in memory that does not grow with m.

Letters: m rows, d dimensions, b rows of a block, k nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput, expect_whole
from gradstore.scoring.scan import as_device, exact_float32
from gradstore.similarity.row_chunks import RowMatrix

#: Rows of a block: 64 MiB at d = 4096, and enough for a matrix product at full speed.
BLOCK_ROWS = 4096

#: A block's rows are a multiple of this: BLAS rounds the last few rows of others differently.
_STEP = 16

#: Below every cosine: a row does not count as its own neighbour.
_NEVER = -2.0


@dataclass(frozen=True)
class NearestRows:
    """Each row's neighbours.

    Attributes:
        cosine: (m,) float32, mean cosine to the k nearest other rows.
        nearest: (m,) int64, the row with the highest cosine (ties: the lowest); -1 where m is 1.
        nearest_cosine: (m,) float32.
        repeats: (m,) int64, the first row of the group that a row repeats; -1 where it repeats
            none. A row repeats the lowest earlier row whose cosine to it is high enough, and a
            group is what follows from that.
    """

    cosine: npt.NDArray[np.float32]
    nearest: npt.NDArray[np.int64]
    nearest_cosine: npt.NDArray[np.float32]
    repeats: npt.NDArray[np.int64]


def nearest_rows(
    rows: RowMatrix,
    k: int,
    *,
    repeats_at: float,
    device: str | torch.device = "cpu",
    block_rows: int = BLOCK_ROWS,
    on_rows: Callable[[int], None] | None = None,
) -> NearestRows:
    """Find every row's k nearest other rows by cosine, and the rows that repeat an earlier one.

    Takes m² d / 2 multiplications.

    Args:
        rows: (m, d) float32 unit rows, indexed by slices.
        k: from 1 to m - 1; not used where m is 1.
        repeats_at: cosine from which on a row repeats another, above 0 and at most 1.
        device: where the products are computed.
        block_rows: b.
        on_rows: called with the number of rows that are done, as a share of the work.

    Raises:
        BadInput: k or `repeats_at` is out of range.
    """
    m = len(rows)
    expect_whole(k, "neighbours")
    if m > 1 and k > m - 1:
        raise BadInput(
            f"neighbours is {k}, but each of {m} usable rows has {m - 1} others; "
            f"ask for at most {m - 1}"
        )
    if not 0 < repeats_at <= 1:
        raise BadInput(f"duplicate_cosine is {repeats_at}; choose one above 0 and at most 1")
    found = _Found.empty(m, k, repeats_at)
    block_rows = min(block_rows, -(-m // _STEP) * _STEP)
    blocks = [(start, min(start + block_rows, m)) for start in range(0, m, block_rows)]
    done, where = 0, as_device(device)
    with exact_float32():
        for number, (start, stop) in enumerate(blocks):
            here = _load(rows[start:stop], block_rows, where)
            for first, last in blocks[number:]:
                there = here if first == start else _load(rows[first:last], block_rows, where)
                products = (here @ there.T)[: stop - start, : last - first].cpu()
                found.add(products, start, first)
            # Of m blocks the first is multiplied with all others, the last with itself alone.
            now = m - (m - stop) ** 2 // m
            if on_rows is not None:
                on_rows(now - done)
            done = now
    return found.finished()


@dataclass
class _Found:
    """The best of the pairs seen so far."""

    best: Tensor
    nearest: Tensor
    nearest_cosine: Tensor
    repeats: Tensor
    limit: float

    @staticmethod
    def empty(m: int, k: int, limit: float) -> _Found:
        return _Found(
            best=torch.full((m, k), _NEVER),
            nearest=torch.full((m,), -1, dtype=torch.int64),
            nearest_cosine=torch.full((m,), _NEVER),
            repeats=torch.full((m,), -1, dtype=torch.int64),
            limit=limit,
        )

    def add(self, products: Tensor, start: int, first: int) -> None:
        """Take in the cosines of a block that begins at `start` to one at `first` >= start."""
        if first == start:
            products.fill_diagonal_(_NEVER)
        self._nearest(products, start, first)
        if first != start:
            self._nearest(products.T.contiguous(), first, start)
        twins = products >= self._rounded_limit
        if first == start:
            twins.triu_(1)
        some = twins.any(dim=0)
        if some.any():
            # The first True of each column: blocks come in order, so an earlier find is lower.
            lowest = twins.int().argmax(dim=0) + start
            here = self.repeats[first : first + products.shape[1]]
            here[:] = torch.where(some & (here < 0), lowest, here)

    @property
    def _rounded_limit(self) -> float:
        """The limit less float32's rounding: equal rows have a cosine of 1, or just below."""
        return self.limit - 1e-5

    def _nearest(self, products: Tensor, start: int, first: int) -> None:
        """Keep the k highest of each row of (r, c) cosines, rows from `start`, columns `first`."""
        span = slice(start, start + products.shape[0])
        best = self.best[span]
        k = best.shape[1]
        highest = products.topk(min(k, products.shape[1]), dim=1).values
        best[:] = torch.cat([best, highest], dim=1).topk(k, dim=1).values
        cosine, column = products.max(dim=1)
        # Blocks of lower rows come first, so an equal cosine does not replace what is there.
        better = cosine > self.nearest_cosine[span]
        self.nearest[span] = torch.where(better, column + first, self.nearest[span])
        self.nearest_cosine[span] = torch.where(better, cosine, self.nearest_cosine[span])

    def finished(self) -> NearestRows:
        """Return what was found, groups traced back to their first rows."""
        alone = len(self.nearest) == 1
        cosine = self.best.double().mean(dim=1).float().numpy()
        nearest_cosine = self.nearest_cosine.numpy()
        if alone:
            cosine, nearest_cosine = np.full_like(cosine, np.nan), np.full_like(cosine, np.nan)
        return NearestRows(
            cosine, self.nearest.numpy(), nearest_cosine, traced(self.repeats.numpy())
        )


def traced(repeats: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Replace each row's earlier twin by the first row of the group; -1 stays.

    Examples:
        >>> traced(np.array([-1, 0, 1, -1])).tolist()
        [-1, 0, 0, -1]
    """
    first = np.arange(len(repeats))
    for row in np.flatnonzero(repeats >= 0):  # ascending: an earlier row is traced already
        first[row] = first[repeats[row]]
    return np.where(repeats >= 0, first, -1)


def _load(rows: npt.NDArray[np.float32], block_rows: int, device: torch.device) -> Tensor:
    """Return a block on the device, padded: equal shapes give equal rows equal bits."""
    block = torch.zeros(block_rows, rows.shape[1], device=device)
    block[: len(rows)] = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(device)
    return block
