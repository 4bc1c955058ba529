"""From sample weights to the loss: one denominator over an optimizer step and all ranks.

Letters: n samples of a chunk (a micro-batch, or a whole accumulation window) over all ranks.

The plain trainer's loss of a step is the mean over its target tokens. A weight multiplies what a
sample counts in that mean, so that equal weights give the plain loss, whatever the micro-batches.
Where all samples have as many target tokens, this is sum(w * loss) / sum(w) over samples
(ALGORITHMS 0.8, E4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from dataflex.context import RunContext
    from gradstore.capture.losses import Targets

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredBatch:
    """One rank's micro-batch after a forward pass; nothing here carries a gradient.

    Attributes:
        inputs: what the model got, and `labels` (b, t), on the model's device.
        targets: the positions that predict a target token.
        token_losses: (s,) float32, cross-entropy at those positions.
        hidden: (b, t, h) hidden states of the layer that was asked for, or None.
    """

    inputs: Mapping[str, torch.Tensor]
    targets: Targets
    token_losses: torch.Tensor
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class WeightContext:
    """What is known of the samples that are weighted together, over all ranks.

    Attributes:
        run: what stays the same.
        step: g, optimizer steps finished.
        tokens: (n,) int64 target tokens of each sample.
        rows: (n,) int64 positions in the training set, or None where the stock loader serves.
        domains: (n,) int64 domain of each sample, or None where there are no domains.
        measured: (n, m) float64, what `measure` gave for each sample, or None.
    """

    run: RunContext
    step: int
    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64] | None = None
    domains: npt.NDArray[np.int64] | None = None
    measured: FloatArray | None = None


@dataclass(frozen=True)
class Weighted:
    """Weights of a chunk and what they mean for the loss.

    Attributes:
        weights: (n,) float64 >= 0.
        relative: only ratios count (the chunk keeps its share of the step); else a weight of 1
            is what the plain trainer gives, and smaller ones make the step smaller.
        numbers: for the Trainer's log.
    """

    weights: FloatArray
    relative: bool
    numbers: Mapping[str, float] = field(default_factory=dict)


def coefficients(
    weighted: Weighted, tokens: npt.NDArray[np.int64], step_tokens: float
) -> FloatArray:
    """What each sample's summed token loss is multiplied by.

    Args:
        weighted: weights (n,) of a chunk, all ranks.
        tokens: (n,) target tokens of its samples.
        step_tokens: target tokens of the whole optimizer step, all ranks.

    Returns:
        (n,) float64; the step's loss is the sum over all its samples of coefficient times the sum
        of the sample's token losses. All zero where no weight is positive.

    Examples:
        Two micro-batches with sample losses [1, 3] and [5], weights 1: 3.0 (E4).

        >>> tokens = np.array([2, 2, 2])
        >>> each = coefficients(Weighted(np.ones(3), relative=True), tokens, 6.0)
        >>> float((each * tokens * np.array([1.0, 3.0, 5.0])).sum().round(6))
        3.0
    """
    weights = np.where(np.isfinite(weighted.weights) & (tokens > 0), weighted.weights, 0.0)
    if not weighted.relative:
        return np.asarray(weights / step_tokens)
    total = float((weights * tokens).sum())
    if total <= 0:
        return np.zeros(len(weights))
    return np.asarray(weights * (float(tokens.sum()) / total) / step_tokens)


def summary(weights: FloatArray) -> dict[str, float]:
    """Smallest, mean and largest weight, and the share of samples that effectively count."""
    positive = weights[np.isfinite(weights)]
    if not len(positive) or positive.sum() <= 0:
        return {}
    effective = float(positive.sum() ** 2 / (positive**2).sum() / len(positive))
    return {
        "weight_min": float(positive.min()),
        "weight_mean": float(positive.mean()),
        "weight_max": float(positive.max()),
        "effective_share": effective,
    }


def as_json(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers alone: JSON has no NaN, and a chart no place for it."""
    return {k: float(v) for k, v in numbers.items() if np.isfinite(v)}
