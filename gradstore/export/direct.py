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
from gradstore.export.units import Batch, RowBatch, row_status
from gradstore.format.layout import RowStatus

RowBatches = Iterable[RowBatch]


@dataclass(frozen=True)
class TargetDirections:
    """Mean unit gradient of each sub-task.

    Attributes:
        matrix: (q, p) float32; a sub-task's row is the mean of its unit rows, not re-normalised.
        rows: (q,) usable rows behind each direction.
    """

    matrix: Tensor
    rows: tuple[int, ...]


def target_directions(
    model: nn.Module, subtasks: Sequence[RowBatches], features: FeatureSpec
) -> TargetDirections:
    """Compute one direction per sub-task from its rows' unit gradients.

    Args:
        model: the model whose gradients are taken.
        subtasks: for each sub-task, its batches.
        features: `sgd`, or `sign` where the training features are `sign`.

    Raises:
        BadInput: a sub-task without a usable row, named by its position.
    """
    means, counts = [], []
    with GradientCapture(model) as capture:
        feature_map = FeatureMap(features, capture.slots, None, device=_device(model))
        for number, batches in enumerate(subtasks):
            whole = (
                _whole_features(capture, feature_map, batch, _device(model)) for _, batch in batches
            )
            direction, used = mean_direction(whole, number)
            means.append(direction)
            counts.append(used)
    return TargetDirections(torch.stack(means), tuple(counts))


def mean_direction(parts: Iterable[tuple[Tensor, Tensor]], number: int) -> tuple[Tensor, int]:
    """Compute the mean unit row of a sub-task, and count its usable rows.

    Args:
        parts: whole features (b, p) and their target tokens (b,).
        number: position of the sub-task, for the message.

    Raises:
        BadInput: no row can be used.
    """
    total: Tensor | None = None
    used = 0
    for features, tokens in parts:
        norm = torch.linalg.vector_norm(features, dim=1)
        good = torch.isfinite(norm) & (norm > 0) & (tokens > 0)
        part = (features[good] / norm[good, None]).sum(dim=0)
        total = part if total is None else total + part
        used += int(good.sum())
    if total is None or not used:
        raise BadInput(
            f"sub-task {number} of the target has no usable row: every row is masked or "
            "its gradient is zero or not finite. Give it rows with target tokens, or leave it out."
        )
    return total / used, used


def direct_cosines(
    model: nn.Module,
    batches: RowBatches,
    n: int,
    directions: TargetDirections,
    features: FeatureSpec,
    moments: AdamMoments | None = None,
    status: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.float32]:
    """Compute the mean cosine of each training row to every sub-task.

    Args:
        model: the model whose gradients are taken.
        batches: the training rows.
        n: how many there are.
        directions: from `target_directions`.
        features: how a training gradient becomes a feature.
        moments: Adam moments where `features` needs them.
        status: (n,) uint8, receives the `RowStatus` of every row given.

    Returns:
        (n, q) float32; NaN for rows that cannot be used (masked, zero, not finite) or not given.
    """
    q = len(directions.rows)
    found = np.full((n, q), np.nan, dtype=np.float32)
    with GradientCapture(model) as capture:
        feature_map = FeatureMap(features, capture.slots, moments, device=_device(model))
        for rows, batch in batches:
            dots = torch.zeros((len(rows), q), dtype=torch.float64, device=_device(model))
            squares = torch.zeros(len(rows), dtype=torch.float64, device=_device(model))

            def sink(
                slot: ParameterSlot,
                gradient: Tensor,
                dots: Tensor = dots,
                squares: Tensor = squares,
            ) -> None:
                feature = feature_map.apply_(slot, gradient)
                block = directions.matrix[:, slot.start : slot.start + slot.numel]
                dots.add_(feature @ block.T)
                squares.add_(torch.linalg.vector_norm(feature, dim=1).double().square_())

            stats = capture.capture(batch, sink)
            codes = row_status(squares.sqrt(), stats.target_tokens)
            cosines = dots / squares.sqrt()[:, None]
            cosines[codes != RowStatus.OK] = torch.nan
            if status is not None:
                status[rows] = codes.cpu().numpy()
            found[rows] = cosines.float().cpu().numpy()
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
