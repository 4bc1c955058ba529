"""Weighting of samples by comparison of their loss with the others of the step."""

from __future__ import annotations

from typing import Literal

import numpy as np

from dataflex.config.parameters import Positive
from dataflex.config.registry import register
from dataflex.weighters.base import FloatArray, WeightContext, Weighter

LossStrategy = Literal["linupper", "quadratic", "extremes", "linear", "uniform"]


@register("weighter", "loss")
class LossWeighter(Weighter):
    """Soft-max weights from where a loss lies between the smallest and the largest.

    Over the samples of an optimizer step, losses l become h in [-delta, delta]; a score of h goes
    through a soft-max (ALGORITHMS 3.1). With one micro-batch a step this costs nothing; with more,
    one forward pass over the step's samples goes before training on them.

    Args:
        strategy: the score. linupper: min(h + delta, delta), so all above the middle of the range
            count alike; quadratic: 1 - h^2 / delta^2, the middle; extremes: |h|, both ends;
            linear: h, the hard ones; uniform: equal weights.
        delta: half the width of the range that losses are mapped to.
        r: temperature of the soft-max; larger is more even.
    """

    paper = "https://arxiv.org/abs/2502.06733"
    scope = "window"

    def __init__(
        self, strategy: LossStrategy = "linupper", delta: Positive = 1.0, r: Positive = 1.0
    ) -> None:
        self.strategy = strategy
        self.delta = float(delta)
        self.r = float(r)

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        """Compute (n,) weights that sum to 1; 0 where a loss is not finite."""
        return loss_weights(losses, self.strategy, self.delta, self.r)


def loss_weights(losses: FloatArray, strategy: LossStrategy, delta: float, r: float) -> FloatArray:
    """Compute the soft-max over the finite losses (n,) of the strategy's score (E25)."""
    found = np.zeros(len(losses))
    finite = np.isfinite(losses)
    if not finite.any():
        return found
    low, high = losses[finite].min(), losses[finite].max()
    h = delta * (2 * losses[finite] - high - low) / max(high - low, 1e-6)
    score = {
        "linupper": np.minimum(h + delta, delta),
        "quadratic": 1 - (h / delta) ** 2,
        "extremes": np.abs(h),
        "linear": h,
        "uniform": np.zeros_like(h),
    }[strategy]
    odds = np.exp((score - score.max()) / r)
    found[finite] = odds / odds.sum()
    return found
