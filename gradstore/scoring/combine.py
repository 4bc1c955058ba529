"""The weighted sum over checkpoints, streamed: the pass that every score is made from.

Letters: n train rows, q sub-tasks, m rows of one chunk.

A weighted sum over checkpoints of mean cosines is one inner product of concatenated unit rows with
concatenated, weighted query vectors; it is accumulated checkpoint by checkpoint, so nothing is
concatenated in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.format.layout import RowStatus
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.scan import FeatureSource, Scan, exact_float32, round_chunk
from gradstore.scoring.subspace import usable_targets_of
from gradstore.scoring.subtasks import Subtask, subtask_queries

#: Rows between two progress calls; a store is read 256 rows at a time whatever this is.
CHUNK_ROWS = 4096

_UNUSABLE = 255
_REASONS = {int(status): status.name.lower() for status in RowStatus if status}
_REASONS[_UNUSABLE] = "unusable"


def combine(
    checkpoints: Sequence[CheckpointFeatures],
    subtasks: Sequence[Subtask],
    keep: Callable[[int, int, npt.NDArray[np.float32]], None],
    device: torch.device,
    chunk_rows: int,
    product: InnerProduct = COSINE,
) -> npt.NDArray[np.uint8]:
    """Sum similarities of every train row and every sub-task over checkpoints, chunk by chunk.

    Args:
        checkpoints: checked ones (`check_checkpoints`).
        subtasks: q of them.
        keep: gets `(start, stop, sums)` for consecutive chunks, sums (stop - start, q) float32:
            sum over checkpoints of weight * (mean product with the sub-task's usable rows); nan
            where a row is not usable at a checkpoint.
        device: where the products are computed.
        chunk_rows: rows per chunk; rounded up to whole blocks.
        product: of a train row and a target row.

    Returns:
        (n,) uint8 codes, `RowStatus.OK` where the row is usable at every checkpoint.

    Raises:
        BadInput: chunk_rows < 1, a sub-task without a usable row, no usable train row at all, or
            rows that the product can't be taken of.
    """
    check_pass(checkpoints, chunk_rows, product)
    trains = [checkpoint.train for checkpoint in checkpoints]
    codes = start_codes(trains)
    step = round_chunk(chunk_rows)
    with exact_float32():
        queries = weighted_queries(checkpoints, subtasks, product, device)
        sums = RowSums(trains, queries, product, device, chunk_rows)
        for start in range(0, codes.size, step):
            stop = min(start + step, codes.size)
            keep(start, stop, sums.chunk(start, codes[start:stop]))
    check_any_usable(codes)
    return codes


def check_pass(
    checkpoints: Sequence[CheckpointFeatures], chunk_rows: int, product: InnerProduct
) -> None:
    """Refuse what `combine` can't work with, before a feature is read.

    Raises:
        BadInput: chunk_rows < 1, no `InnerProduct`, or rows that the product can't be taken of.
    """
    expect_whole(chunk_rows, "chunk_rows")
    wanted = "an InnerProduct, such as InnerProduct('cosine', 'fisher')"
    expect(isinstance(product, InnerProduct), "product", product, wanted)
    product.check(checkpoints)


def weighted_queries(
    checkpoints: Sequence[CheckpointFeatures],
    subtasks: Sequence[Subtask],
    product: InnerProduct,
    device: torch.device,
) -> list[npt.NDArray[np.float64]]:
    """Compute each checkpoint's (q, d) queries: its weight times the direction of each sub-task.

    Raises:
        BadInput: a sub-task without a usable row, one whose direction is zero at every checkpoint
            (all rows would score 0), or a curvature that is singular.
    """
    usable = usable_targets_of(checkpoints)
    queries, points = [], np.zeros(len(subtasks), dtype=bool)
    for one in checkpoints:
        as_queries = product.query_map(one, usable, device)
        found = subtask_queries(one.targets, subtasks, usable, as_queries)
        points |= found.any(axis=1)
        queries.append(one.weight * found)
    if not points.all():
        raise subtasks[int(np.flatnonzero(~points)[0])].no_direction()
    return queries


class RowSums:
    """Sums over checkpoints of the products of some train rows and the queries.

    Args:
        trains: the train rows of each checkpoint.
        queries: (q, d) of each, weighted.
        product: of a train row and a target row.
        device: where the products are computed.
        chunk_rows: the most rows asked for at a time; rounded up to whole blocks.
    """

    def __init__(
        self,
        trains: Sequence[FeatureSource],
        queries: Sequence[npt.NDArray[np.float64]],
        product: InnerProduct,
        device: torch.device,
        chunk_rows: int,
    ) -> None:
        self._trains, self._product, self._queries = trains, product, len(queries[0])
        self._scans = [
            Scan(train, asked, chunk_rows=chunk_rows, device=device)
            for train, asked in zip(trains, queries, strict=True)
        ]

    def chunk(self, start: int, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Sum rows start, start + 1, ...; within `exact_float32`.

        Args:
            start: first row; a multiple of the block.
            codes: (m,) as `start_codes` made them for these rows; what a scan finds is set in it.

        Returns:
            (m, q) float32, nan where a row is not usable.
        """
        total = np.zeros((codes.size, self._queries), dtype=np.float32)
        for scan, train in zip(self._scans, self._trains, strict=True):
            products, found = scan.chunk(start, start + codes.size)
            total += self._product.scaled(train, start, products)
            new = codes == RowStatus.OK
            codes[new] = found[new]
        total[codes != RowStatus.OK] = np.nan
        return total


def check_any_usable(codes: npt.NDArray[np.uint8]) -> None:
    """Raise BadInput unless a row is usable."""
    if not (codes == RowStatus.OK).any():
        raise BadInput(
            f"none of the {codes.size} train rows is usable: {count_skipped(codes)}; check their "
            "labels and the model's weights, and export them again"
        )


def start_codes(sources: Sequence[FeatureSource]) -> npt.NDArray[np.uint8]:
    """Return (n,) uint8: OK where every source can use the row, else the first failure's reason."""
    codes = np.full(sources[0].rows, RowStatus.OK, dtype=np.uint8)
    for source in sources:
        bad = (codes == RowStatus.OK) & ~np.asarray(source.usable, dtype=bool)
        status = getattr(source, "status", None)
        codes[bad] = _UNUSABLE if status is None else np.asarray(status)[bad]
        codes[bad & (codes == RowStatus.OK)] = _UNUSABLE
    return codes


def count_skipped(codes: npt.NDArray[np.uint8]) -> dict[str, int]:
    """Count the rows per reason, reasons that occur only."""
    counts = np.bincount(codes, minlength=_UNUSABLE + 1)
    return {reason: int(counts[code]) for code, reason in _REASONS.items() if counts[code]}
