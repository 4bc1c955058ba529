"""From sample weights to the loss: one denominator over an optimizer step and all ranks.

Letters: n samples that are weighted together (those of a micro-batch, or of a whole accumulation
window) over all ranks; b samples of one rank's micro-batch, t tokens, s target positions.

The plain trainer's loss of a step is the mean over its target tokens. A weight multiplies what a
sample counts in that mean, so that equal weights give the plain loss, however the step is cut into
micro-batches. Where all samples have as many target tokens, this is sum(w * loss) / sum(w) over
samples (ALGORITHMS 0.8, E4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


def multipliers(
    weights: FloatArray, tokens: npt.NDArray[np.int64], *, relative: bool
) -> FloatArray:
    """How many times each sample counts; 1 is what the plain trainer gives it.

    Args:
        weights: (n,) finite, >= 0.
        tokens: (n,) target tokens.
        relative: only ratios of weights count: the samples together keep the share of the step
            that the plain trainer gives them. Else a weight is the answer.

    Returns:
        (n,) float64; all zero where no weight is positive. The step's loss is the sum over its
        samples of multiplier times summed token losses, divided by the step's target tokens.

    Examples:
        Two micro-batches with sample losses [1, 3] and [5], weights 1: 3.0 (E4).

        >>> tokens = np.array([2, 2, 2])
        >>> each = multipliers(np.ones(3), tokens, relative=True)
        >>> float((each * tokens * np.array([1.0, 3.0, 5.0])).sum() / tokens.sum())
        3.0
    """
    if not relative:
        return weights
    weights = np.where(tokens > 0, weights, 0.0)
    if not (weights > 0).any():
        return weights
    weights = weights / weights.max()  # a sum of tiny ones would overflow its reciprocal
    return np.asarray(weights * (tokens.sum() / (weights * tokens).sum()), dtype=np.float64)


def summary(each: FloatArray) -> dict[str, float]:
    """Of multipliers (n,): smallest, mean, largest, and the share of samples that count.

    The effective share is (sum w)^2 / (n * sum w^2): 1 where all are equal, 1 / n where one has
    everything, 0 where all are 0.
    """
    if not len(each):
        return {}
    squares = float((each**2).sum())
    return {
        "weight_min": float(each.min()),
        "weight_mean": float(each.mean()),
        "weight_max": float(each.max()),
        "effective_share": float(each.sum()) ** 2 / (len(each) * squares) if squares else 0.0,
    }


def as_json(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers alone: JSON has no NaN, and a chart no place for it."""
    return {k: float(v) for k, v in numbers.items() if np.isfinite(v)}
