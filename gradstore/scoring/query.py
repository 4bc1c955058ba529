"""Query of the train rows that helped and that hurt one target row.

Letters: n train rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect_whole
from gradstore.format.layout import RowStatus
from gradstore.scoring.combine import CHUNK_ROWS, combine, count_skipped
from gradstore.scoring.comparable import CheckpointFeatures, check_checkpoints
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.scan import as_device
from gradstore.scoring.selection import select_top
from gradstore.scoring.subtasks import Subtask


@dataclass(frozen=True)
class RowInfluence:
    """Train rows that helped and that hurt one target row.

    Attributes:
        values: (n,) float32, each train row's cosines to the target row, or other products, summed
            over checkpoints with their weights; nan where a row is not usable.
        usable: (n,) bool.
        helped: (<= top,) int64 train rows, highest value first, ties to the lower row.
        hurt: (<= top,) int64 train rows, lowest value first, ties to the lower row.
        skipped: number of unusable rows by reason.
    """

    values: npt.NDArray[np.float32]
    usable: npt.NDArray[np.bool_]
    helped: npt.NDArray[np.int64]
    hurt: npt.NDArray[np.int64]
    skipped: dict[str, int]


def query_influence(
    checkpoints: Sequence[CheckpointFeatures],
    target_row: int,
    *,
    target: int = 0,
    top: int = 10,
    device: str | torch.device = "cpu",
    chunk_rows: int = CHUNK_ROWS,
    on_rows: Callable[[int], None] | None = None,
    product: InnerProduct = COSINE,
) -> RowInfluence:
    """Find the train rows that help one target row and those that hurt it.

    Args:
        checkpoints: as for `influence_scores`.
        target_row: row of the target set.
        target: which of the target sets, counted from 0.
        top: how many rows to name on each side; fewer where fewer are usable.
        device: where the products are computed.
        chunk_rows: rows between two progress calls; rounded up to a multiple of 256.
        on_rows: called with the number of rows just scored.
        product: of a train row and the target row.

    Raises:
        BadInput: no such target set or row, the row is not usable, top < 1, or as for
            `influence_scores`.
        ProvenanceMismatch: as for `influence_scores`.
    """
    one = one_row(checkpoints, target_row, target)
    expect_whole(top, "top")
    values = np.empty(checkpoints[0].train.rows, dtype=np.float32)

    def keep(start: int, stop: int, cosines: npt.NDArray[np.float32]) -> None:
        values[start:stop] = cosines[:, 0]
        if on_rows is not None:
            on_rows(stop - start)

    codes = combine(checkpoints, [one], keep, as_device(device), chunk_rows, product)
    values[codes != RowStatus.OK] = np.nan
    usable = codes == RowStatus.OK
    count = min(top, int(usable.sum()))
    helped = select_top(values, count, usable=usable)
    hurt = select_top(-values, count, usable=usable)
    return RowInfluence(values, usable, helped, hurt, count_skipped(codes))


def one_row(checkpoints: Sequence[CheckpointFeatures], target_row: int, target: int = 0) -> Subtask:
    """Name one target row as a sub-task of its own.

    Raises:
        BadInput: no such target set or row, or checkpoints that can't be combined.
        ProvenanceMismatch: the checkpoints hold different rows, or dims differ.
    """
    check_checkpoints(checkpoints)
    sets = checkpoints[0].targets
    if not 0 <= expect_whole(target, "target", None) < len(sets):
        raise BadInput(
            f"target set {target} requested, there are {len(sets)}, counted from 0; "
            "name one of them"
        )
    if not 0 <= expect_whole(target_row, "target_row", None) < sets[target].rows:
        raise BadInput(
            f"target row {target_row} requested, the set has rows 0-{sets[target].rows - 1}; "
            "name one of them"
        )
    return Subtask(target, target_row, target_row + 1, f"target row {target_row}")
