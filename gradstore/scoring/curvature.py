"""Curvature of the stored features: the Fisher matrix of the train rows, damped and inverted.

Letters: N rows that the matrix is fitted on, d projected dimensions, m target rows.

Nothing is exported again: the second moment R of stored, projected gradients is the projected
empirical Fisher matrix. It is fitted on about `ROWS_PER_DIMENSION` * d usable rows (but
`FEWEST_ROWS` at least), whole blocks spread evenly over the store, because N rows cost N d^2
multiplications. The scan that follows costs what it costs without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.scan import BLOCK_ROWS, FeatureSource, exact_float32, unit_rows

#: Rows that determine a d x d matrix well: its eigenvalues are within a factor (1 +- 1/2)^2 of
#: those of all rows (Marchenko and Pastur 1967, with d / N = 1/4).
ROWS_PER_DIMENSION = 4
#: Fewer than this cost little in any dimension, and spare a small store the noise of a sample.
FEWEST_ROWS = 16_384

_SINGULAR = (
    "the second moment of {rows} train rows in {dim} dimensions is singular but for rounding, and "
    "damping is {damping}, too little; give a larger one, such as 1."
)


class Fisher:
    """C = R + l I for R = X^T X / N, ready to be inverted.

    With N < d it is never formed: by Woodbury's identity
    C^-1 q = (q - X^T (X X^T + N l I)^-1 X q) / l.
    """

    def __init__(self, factor: Tensor, rows: Tensor | None, level: float) -> None:
        """Keep what `of` computed.

        Args:
            factor: lower Cholesky factor, float64: of C (d, d), or of X X^T + N l I (N, N).
            rows: X (N, d) float64 where the factor is (N, N), otherwise None.
            level: l.
        """
        self._factor, self._rows = factor, rows
        self.level = level

    @classmethod
    def of(
        cls,
        train: FeatureSource,
        *,
        unit: bool,
        damping: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Fit it to the usable train rows.

        Args:
            train: n rows.
            unit: whether rows are taken at length 1, or with their norms.
            damping: l as a multiple of the mean eigenvalue of R, its trace over d; above 0.
            device: where the matrix lives: 8 d^2 bytes, or 8 N (N + d) where N < d.

        Raises:
            BadInput: no usable row, damping of 0 or less, or so little of it that a singular R
                can't be told from its rounding.
        """
        check_damping(damping)
        device, dim = torch.device(device), train.dim
        blocks = _blocks_to_fit(train)
        with exact_float32():
            count = sum(len(rows) for rows in blocks)
            if count < dim:
                parts = [torch.from_numpy(x) for x in _rows_of(train, blocks, unit=unit)]
                held = torch.cat([*parts, torch.empty(0, dim)]).to(device, torch.float64)
                return cls._of_few(held, damping, dim)
            moment = torch.zeros(dim, dim, dtype=torch.float64, device=device)
            for x in _rows_of(train, blocks, unit=unit):
                block = torch.from_numpy(x).to(device)
                moment += block.T @ block
        moment /= count
        level = damping * float(moment.trace()) / dim
        moment.diagonal().add_(level)
        # Blocks are multiplied in float32, whatever they are summed in.
        noise = float(np.finfo(np.float32).eps)
        return cls(_cholesky(moment, noise, (count, dim, damping)), None, level)

    @classmethod
    def _of_few(cls, rows: Tensor, damping: float, dim: int) -> Self:
        """Invert through the (N, N) inner products of fewer rows than dimensions."""
        count = len(rows)
        gram = rows @ rows.T
        trace = float(gram.trace())
        level = damping * trace / count / dim
        gram.diagonal().add_(count * level)
        noise = float(np.finfo(np.float64).eps)
        return cls(_cholesky(gram, noise, (count, dim, damping)), rows, level)

    def solve(self, queries: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Compute l C^-1 q for each of (m, d) queries; tends to q as l grows."""
        given = torch.from_numpy(np.ascontiguousarray(queries)).to(self._factor.device).T
        if self._rows is None:
            solved = self.level * torch.cholesky_solve(given, self._factor)
        else:
            inner = torch.cholesky_solve(self._rows @ given, self._factor)
            solved = given - self._rows.T @ inner
        return np.ascontiguousarray(solved.T.cpu().numpy())

    def whitened_unit(self, queries: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Compute sqrt(l) C^-1 q / sqrt(q^T C^-1 q): a unit vector of the whitened space.

        Its product with a unit row is at most 1, and tends to the cosine as l grows.
        """
        solved = self.solve(queries)
        lengths = np.sqrt(np.maximum((solved * queries).sum(axis=1, keepdims=True), 0.0))
        return solved / np.where(lengths > 0, lengths, 1.0)


def check_damping(damping: float) -> None:
    """Raise BadInput unless damping is above 0: every product has a factor of it."""
    if not damping > 0:
        raise BadInput(
            f"damping is {damping}, and preconditioner: fisher needs a number above 0: its products"
            " are l times the inverse's, and tend to 0 with l; 1 is the usual one."
        )


def _cholesky(matrix: Tensor, noise: float, of: tuple[int, int, float]) -> Tensor:
    """Return the lower factor of a damped matrix.

    A factorisation that ends says little: rounding may leave a singular matrix a small positive
    pivot. The noise of sums moves a random-like m x m matrix by about noise * sqrt(m) times its
    mean diagonal (in the spectral norm), and no pivot is below the smallest eigenvalue: a pivot
    smaller than that is one that rounding may have made.

    Args:
        matrix: (m, m) float64.
        noise: relative error of one of its entries.
        of: rows, dimensions and damping, for the message.

    Raises:
        BadInput: it is singular, or can't be told from one that is.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    least = float(factor.diagonal().amin()) ** 2
    rounding = noise * len(matrix) ** 0.5 * float(matrix.diagonal().mean())
    if int(failed) or not least > rounding:  # written so that NaN is refused
        rows, dim, damping = of
        raise BadInput(_SINGULAR.format(rows=rows, dim=dim, damping=damping))
    return factor


def fisher_told(trains: Sequence[FeatureSource], *, unit: bool, damping: float) -> dict[str, Any]:
    """Tell what `Fisher.of` fits to each checkpoint's train rows, without reading a feature.

    Args:
        trains: each checkpoint's.
        unit: as there.
        damping: as there.

    Returns:
        `damping`, the multiple; `level`, l at each checkpoint; `rows`, N at each.

    Raises:
        BadInput: no usable row.
    """
    levels, counts = [], []
    for train in trains:
        rows = np.concatenate(_blocks_to_fit(train))
        # The trace of R is the mean of the rows' squared lengths.
        squares = 1.0 if unit else float((_norms(train, rows) ** 2).mean())
        levels.append(damping * squares / train.dim)
        counts.append(len(rows))
    return {"damping": damping, "level": levels, "rows": counts}


def _blocks_to_fit(train: FeatureSource) -> list[npt.NDArray[np.int64]]:
    """List the rows that the matrix is fitted on, block by block.

    Raises:
        BadInput: no usable row.
    """
    blocks = _sampled_blocks(train, max(FEWEST_ROWS, ROWS_PER_DIMENSION * train.dim))
    if not sum(len(rows) for rows in blocks):
        raise BadInput(
            f"none of the {train.rows} train rows is usable, so there is no second moment; "
            "check their labels and the model's weights, and export them again"
        )
    return blocks


def _sampled_blocks(train: FeatureSource, most: int) -> list[npt.NDArray[np.int64]]:
    """List the usable rows of whole blocks spread evenly over the source, about `most` rows.

    As many blocks as hold so many usable rows, but for less than a block's: where few rows of a
    block are usable, more blocks are taken.
    """
    usable = np.flatnonzero(np.asarray(train.usable, dtype=bool))
    blocks = np.split(usable, np.flatnonzero(np.diff(usable // BLOCK_ROWS)) + 1)
    if len(usable) <= most:
        return blocks
    sizes = np.array([len(rows) for rows in blocks])

    def spread(count: int) -> npt.NDArray[np.int64]:
        return np.linspace(0, len(blocks) - 1, count).round().astype(np.int64)

    count = max(1, most // BLOCK_ROWS)
    while count < len(blocks) and sizes[spread(count)].sum() <= most - sizes.max():
        count += max(1, count // 64)  # other counts take other blocks: no bisection finds the first
    return [blocks[i] for i in spread(min(count, len(blocks)))]


def _rows_of(
    train: FeatureSource, blocks: list[npt.NDArray[np.int64]], *, unit: bool
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the rows block by block, of length 1 or of their norms before projection."""
    for rows in blocks:
        if rows.size == 0:
            continue
        start = int(rows[0]) // BLOCK_ROWS * BLOCK_ROWS
        read = train.read(start, min(start + BLOCK_ROWS, train.rows))[rows - start]
        directions, codes = unit_rows(read)
        good = codes == RowStatus.OK  # the scan reports the others
        if not unit:
            directions *= _norms(train, rows)[:, None]
        yield directions[good].astype(np.float32)


def _norms(train: FeatureSource, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.asarray(train.norm, dtype=np.float64)[rows]  # type: ignore[attr-defined]
