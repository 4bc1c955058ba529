"""Exact influence of every train row on the target rows, by cosine (LESS, Xia et al. 2024).

Letters: n train rows, q sub-tasks, d projected dimensions; j runs over target rows.

    score[i] = max_s  mean_{j in s}  sum_c  weight_c * cos(train_c[i], target_c[j])

(or another `InnerProduct` in the cosine's place): first the sum over checkpoints c, then the mean
over the rows of a sub-task s, then max (or mean) over sub-tasks. A mean of cosines is one inner
product with the mean of the unit target rows, so a checkpoint costs one product with q vectors,
however many target rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.combine import CHUNK_ROWS, combine, count_skipped
from gradstore.scoring.comparable import CheckpointFeatures, check_checkpoints
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.scan import as_device
from gradstore.scoring.subtasks import split_rows, subtasks_of

if TYPE_CHECKING:
    from gradstore.scoring.engines import RayScan

Aggregation = Literal["max", "mean"]


@dataclass(frozen=True)
class Scores:
    """One score per train row.

    Attributes:
        values: (n,) float32, a weighted mean of cosines or other products; nan where the row is not
            usable.
        usable: (n,) bool, rows that every combined generation can use.
        best_subtask: (n,) int32, the sub-task the row helps most (ties: the first); -1 where the
            row is not usable.
        skipped: number of unusable rows by reason, such as {"masked": 3}.
    """

    values: npt.NDArray[np.float32]
    usable: npt.NDArray[np.bool_]
    best_subtask: npt.NDArray[np.int32]
    skipped: dict[str, int]


@dataclass(frozen=True)
class SubtaskInfluence:
    """Every train row's influence on every sub-task.

    Attributes:
        values: (n, q) float32, weighted mean cosines or other products; nan where the row is not
            usable.
        usable: (n,) bool, rows that every combined generation can use.
        skipped: number of unusable rows by reason, such as {"masked": 3}.
    """

    values: npt.NDArray[np.float32]
    usable: npt.NDArray[np.bool_]
    skipped: dict[str, int]


def checkpoint_weights(learning_rates: Sequence[float]) -> npt.NDArray[np.float64]:
    """Compute each checkpoint's weight: its mean learning rate over the sum of all.

    Args:
        learning_rates: the mean learning rate of the steps before each checkpoint.

    Returns:
        (len(learning_rates),) float64 that sums to 1; uniform if every rate is zero.

    Raises:
        BadInput: none given, or one is negative, nan or infinite.

    Examples:
        >>> checkpoint_weights([2e-5, 2e-5, 1e-5]).round(3).tolist()
        [0.4, 0.4, 0.2]
        >>> checkpoint_weights([0.0, 0.0]).tolist()
        [0.5, 0.5]
    """
    rates = [float(rate) for rate in learning_rates]
    if not rates:
        raise BadInput(
            "no learning rates given; weights need one rate per checkpoint; "
            "give the mean learning rate before each"
        )
    for index, rate in enumerate(rates):
        if not (math.isfinite(rate) and rate >= 0):
            raise BadInput(
                f"learning rate of checkpoint {index} is {rate}; weights need finite rates >= 0; "
                "give the rate that the run logged"
            )
    largest = max(rates)
    if largest == 0:
        return np.full(len(rates), 1.0 / len(rates))
    shares = np.asarray(rates) / largest  # first, because a sum of tiny rates may underflow
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def aggregate(
    cosines: npt.NDArray[Any],
    subtask_sizes: Sequence[int],
    mode: Aggregation = "max",
    *,
    usable_targets: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Aggregate cosines to single target rows into one score per train row.

    Args:
        cosines: (n, m) for m target rows, already summed over checkpoints, in sub-task order.
        subtask_sizes: consecutive columns per sub-task, adding up to m.
        mode: over sub-tasks, the largest mean ("max") or the mean of the means ("mean").
        usable_targets: (m,) bool; other columns are left out of their sub-task's mean.

    Returns:
        (n,) float32 scores, nan where a row of `cosines` has nan; (n,) int32 best sub-task, -1
        where the score is nan.

    Raises:
        BadInput: sizes that do not fit, an unknown mode, a sub-task without a usable column.

    Examples:
        >>> cosines = np.array([[0.75, 0.25, 0.0], [0.25, 0.25, 1.0]])
        >>> scores, best = aggregate(cosines, [2, 1])
        >>> scores.tolist(), best.tolist()
        ([0.5, 1.0], [0, 1])
    """
    table = np.asarray(cosines)
    if table.ndim != 2:
        raise BadInput(
            f"cosines have shape {table.shape}; a matrix (n, m) is needed "
            "of n train rows and m target rows"
        )
    columns = np.ones(table.shape[1], dtype=bool)
    if usable_targets is not None:
        columns = np.asarray(usable_targets, dtype=bool)
        if columns.shape != (table.shape[1],):
            raise BadInput(
                f"usable_targets has shape {columns.shape}, not ({table.shape[1]},); "
                "give True or False for each column of cosines"
            )
    means = []
    for subtask in split_rows("the target set", table.shape[1], subtask_sizes):
        kept = np.flatnonzero(columns[subtask.start : subtask.stop]) + subtask.start
        if kept.size == 0:
            raise subtask.no_usable_row()
        means.append(table[:, kept].mean(axis=1, dtype=np.float64))
    return _over_subtasks(np.stack(means, axis=1), mode)


def _over_subtasks(
    means: npt.NDArray[Any], mode: Aggregation
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Reduce (n, q) sub-task means to (n,) float32 scores and (n,) int32 best sub-task."""
    if mode not in ("max", "mean"):
        raise BadInput(f"aggregation is {mode!r}; choose 'max' or 'mean'")
    values = (means.max(axis=1) if mode == "max" else means.mean(axis=1)).astype(np.float32)
    best = np.where(np.isnan(values), -1, means.argmax(axis=1)).astype(np.int32)
    return values, best


def influence_scores(
    checkpoints: Sequence[CheckpointFeatures],
    *,
    subtask_sizes: Sequence[int] | None = None,
    aggregation: Aggregation = "max",
    device: str | torch.device = "cpu",
    chunk_rows: int = CHUNK_ROWS,
    on_rows: Callable[[int], None] | None = None,
    product: InnerProduct = COSINE,
    engine: RayScan | None = None,
) -> Scores:
    """Score every train row by its cosine influence on the target sub-tasks.

    One pass over the train features, in memory that grows only by the 10 bytes kept per row. Scores
    do not depend on `chunk_rows`, and on a CPU equal rows get equal scores, bit for bit.

    Args:
        checkpoints: features of the same train and target rows at one or more checkpoints.
        subtask_sizes: cuts a single target set into consecutive sub-tasks; None makes each target
            set one sub-task.
        aggregation: over sub-tasks: "max" (LESS) or "mean".
        device: where the products are computed.
        chunk_rows: rows between two progress calls; rounded up to a multiple of 256.
        on_rows: called with the number of rows just scored.
        product: of a train row and a target row; a cosine unless another is asked for.
        engine: makes the pass elsewhere, on a CPU with the same scores; None makes it here.

    Returns:
        Scores in [-1, 1] where the weights sum to 1 and the product is a cosine. Above 0, a step
        that includes the row lowers the target's loss further than the same step without it, to
        first order; below 0, less far.

    Raises:
        BadInput: no checkpoint, sizes or weights that do not fit, an unknown aggregation, no usable
            train row, or a sub-task (named) without a usable row.
        ProvenanceMismatch: the checkpoints hold different rows, or dims differ.
    """
    check_checkpoints(checkpoints)
    _over_subtasks(np.zeros((0, 1)), aggregation)  # an unknown mode fails before the long pass
    subtasks = subtasks_of(checkpoints[0].targets, subtask_sizes)
    n = checkpoints[0].train.rows
    values = np.empty(n, dtype=np.float32)
    best = np.empty(n, dtype=np.int32)

    def keep(start: int, stop: int, means: npt.NDArray[np.float32]) -> None:
        values[start:stop], best[start:stop] = _over_subtasks(means, aggregation)
        if on_rows is not None:
            on_rows(stop - start)

    scan = combine if engine is None else engine.combine
    codes = scan(checkpoints, subtasks, keep, as_device(device), chunk_rows, product)
    values[codes != RowStatus.OK] = np.nan
    best[codes != RowStatus.OK] = -1
    return Scores(values, codes == RowStatus.OK, best, count_skipped(codes))


def subtask_influence(
    checkpoints: Sequence[CheckpointFeatures],
    *,
    subtask_sizes: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    chunk_rows: int = CHUNK_ROWS,
    on_rows: Callable[[int], None] | None = None,
    product: InnerProduct = COSINE,
) -> SubtaskInfluence:
    """Compute `influence_scores` before aggregation over sub-tasks, keeping 4 q bytes a row.

    Raises:
        BadInput: as for `influence_scores`.
        ProvenanceMismatch: as for `influence_scores`.
    """
    check_checkpoints(checkpoints)
    subtasks = subtasks_of(checkpoints[0].targets, subtask_sizes)
    values = np.empty((checkpoints[0].train.rows, len(subtasks)), dtype=np.float32)

    def keep(start: int, stop: int, means: npt.NDArray[np.float32]) -> None:
        values[start:stop] = means
        if on_rows is not None:
            on_rows(stop - start)

    codes = combine(checkpoints, subtasks, keep, as_device(device), chunk_rows, product)
    values[codes != RowStatus.OK] = np.nan
    return SubtaskInfluence(values, codes == RowStatus.OK, count_skipped(codes))
