"""Exact influence without a projection: q * p multiply-adds per training row.

When the targets are known before the training rows are seen (inside training they are), nothing of
a training row has to be stored: its feature meets the q sub-task directions and is forgotten. This
is the ground truth that projected scores are measured against, and `scoring: direct` for users.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.moments import AdamMoments
from gradstore.export.smaller import computed_batches
from gradstore.export.units import Batch, RowBatch, row_status
from gradstore.format.layout import RowStatus

RowBatches = Iterable[RowBatch]


@dataclass(frozen=True)
class TargetDirections:
    """Mean gradient of each sub-task, of unit rows unless they were asked for with their norms.

    Attributes:
        matrix: (q, p) float32; a sub-task's row is the mean of its rows, not re-normalised.
        rows: (q,) usable rows behind each direction.
        each: (t, p) float32, the rows themselves, in the order of sub-tasks and rows; None unless
            asked for.
    """

    matrix: Tensor
    rows: tuple[int, ...]
    each: Tensor | None = None

    @property
    def all(self) -> Tensor:
        """The sub-tasks' directions, and behind them those of each row: (q + t, p)."""
        return self.matrix if self.each is None else torch.cat([self.matrix, self.each])


#: Gradients (u, p) of some usable rows, and the rows' numbers.
Kept = list[tuple[Tensor, npt.NDArray[np.int64]]]


def target_directions(
    model: nn.Module,
    subtasks: Sequence[RowBatches],
    features: FeatureSpec,
    *,
    each_row: bool = False,
    unit: bool = True,
) -> TargetDirections:
    """Compute one direction per sub-task from its rows' gradients.

    Args:
        model: the model whose gradients are taken.
        subtasks: for each sub-task, its batches; smaller ones where memory runs out, if they are
            `PlannedRows`.
        features: `sgd`, or `sign` where the training features are `sign`.
        each_row: keep the rows as well, 4 p bytes each.
        unit: whether a row counts at length 1, or with its norm.

    Raises:
        BadInput: a sub-task without a usable row, named by its position.
    """
    means, counts, each = [], [], []
    with GradientCapture(model, features.modules) as capture:
        feature_map = FeatureMap(features, capture.slots, None, device=_device(model))
        for number, batches in enumerate(subtasks):
            whole = computed_batches(
                batches,
                lambda rows, batch: (
                    *_whole_features(capture, feature_map, batch, _device(model)), rows,
                ),
            )  # fmt: skip
            kept: Kept | None = [] if each_row else None
            direction, used = mean_direction(whole, number, kept, unit=unit)
            means.append(direction)
            counts.append(used)
            each.append(in_order(kept))
    return TargetDirections(torch.stack(means), tuple(counts), joined(each))


def mean_direction(
    parts: Iterable[tuple[Tensor, Tensor, Sequence[int] | npt.NDArray[np.int64]]],
    number: int,
    kept: Kept | None = None,
    *,
    unit: bool = True,
) -> tuple[Tensor, int]:
    """Compute the mean row of a sub-task, and count its usable rows.

    Args:
        parts: whole features (b, p), their target tokens (b,) and rows (b,).
        number: position of the sub-task, for the message.
        kept: receives the rows.
        unit: whether a row counts at length 1, or with its norm.

    Raises:
        BadInput: no row can be used.
    """
    total: Tensor | None = None
    used = 0
    for features, tokens, rows in parts:
        norm = torch.linalg.vector_norm(features, dim=1)
        good = torch.isfinite(norm) & (norm > 0) & (tokens > 0)
        taken = features[good] / norm[good, None] if unit else features[good]
        part = taken.sum(dim=0)
        total = part if total is None else total + part
        used += int(good.sum())
        if kept is not None:
            kept.append((taken, np.asarray(rows, dtype=np.int64)[good.cpu().numpy()]))
    if total is None or not used:
        raise BadInput(
            f"sub-task {number} of the target has no usable row: every row is masked or "
            "its gradient is zero or not finite. Give it rows with target tokens, or leave it out."
        )
    return total / used, used


def in_order(kept: Kept | None) -> Tensor | None:
    """Join gradients (u, p) in the order of their rows; None where none were kept."""
    if kept is None:
        return None
    order = np.argsort(np.concatenate([numbers for _, numbers in kept]), kind="stable")
    return torch.cat([rows for rows, _ in kept])[torch.from_numpy(order)]


def joined(each: Sequence[Tensor | None]) -> Tensor | None:
    """Join the kept rows of sub-tasks; None where none were kept."""
    kept = [rows for rows in each if rows is not None]
    return torch.cat(kept) if kept else None


def direct_products(
    model: nn.Module,
    batches: RowBatches,
    n: int,
    directions: TargetDirections,
    features: FeatureSpec,
    moments: AdamMoments | None = None,
    status: npt.NDArray[np.uint8] | None = None,
    *,
    unit: bool = True,
) -> npt.NDArray[np.float32]:
    """Compute each training row's product with every direction, and with each row if kept.

    With unit target rows and unit training rows it is the mean cosine to a sub-task.

    Args:
        model: the model whose gradients are taken.
        batches: the training rows; in smaller batches where memory runs out, if they are
            `PlannedRows`.
        n: how many there are.
        directions: from `target_directions`, as they are or in a metric.
        features: how a training gradient becomes a feature.
        moments: Adam moments where `features` needs them.
        status: (n,) uint8, receives the `RowStatus` of every row given.
        unit: whether a training row counts at length 1, or with its norm.

    Returns:
        (n, q), or (n, q + t) with the directions of each row, float32; NaN for rows that cannot be
        used (masked, zero, not finite) or not given.
    """
    matrix, device = directions.all, _device(model)
    q = len(matrix)
    found = np.full((n, q), np.nan, dtype=np.float32)
    with GradientCapture(model, features.modules) as capture:
        feature_map = FeatureMap(features, capture.slots, moments, device=device)

        def multiplied(
            rows: npt.NDArray[np.int64], batch: Batch
        ) -> tuple[npt.NDArray[np.int64], Tensor, Tensor]:
            dots = torch.zeros((len(rows), q), dtype=torch.float64, device=device)
            squares = torch.zeros(len(rows), dtype=torch.float64, device=device)
            tokens = feature_map.tokens_of(batch)

            def sink(slot: ParameterSlot, gradient: Tensor) -> None:
                feature = feature_map.apply_(slot, gradient, tokens)
                block = matrix[:, slot.start : slot.start + slot.numel]
                dots.add_(feature @ block.T)
                squares.add_(torch.linalg.vector_norm(feature, dim=1).double().square_())

            stats = capture.capture(batch, sink)
            codes = row_status(squares.sqrt(), stats.target_tokens)
            products = dots / squares.sqrt()[:, None] if unit else dots
            products[codes != RowStatus.OK] = torch.nan
            return rows, codes, products

        for rows, codes, products in computed_batches(batches, multiplied):
            if status is not None:
                status[rows] = codes.cpu().numpy()
            found[rows] = products.float().cpu().numpy()
    return found


def _whole_features(
    capture: GradientCapture, feature_map: FeatureMap, batch: Batch, device: torch.device
) -> tuple[Tensor, Tensor]:
    b = len(batch["input_ids"])
    whole = torch.zeros((b, capture.p), device=device)

    def sink(slot: ParameterSlot, gradient: Tensor) -> None:
        whole[:, slot.start : slot.start + slot.numel] = feature_map.apply_(slot, gradient)

    stats = capture.capture(batch, sink)
    return whole, stats.target_tokens


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
