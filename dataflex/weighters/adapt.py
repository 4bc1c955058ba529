"""Weighting of samples by closeness to the target rows (ADAPT)."""

from __future__ import annotations

import numpy as np

from dataflex.config.parameters import Count, Positive
from dataflex.config.registry import register
from dataflex.weighters.base import FloatArray, MeasuredBatch, WeightContext
from dataflex.weighters.by_target import TargetWeighter


@register("weighter", "adapt")
class AdaptWeighter(TargetWeighter):
    """Larger weights for samples whose embedding is like the target rows'.

    s is the mean cosine of a sample's embedding to those of the anchors, which are all target rows;
    its weight is min(sigmoid(s / tau), clip). A row's embedding is its last hidden state, averaged
    with weights that rise with the token's position. A weight of 1 is what the plain trainer gives:
    unless normalised, weights below 1 make the step smaller.

    Args:
        tau: temperature of the sigmoid; smaller separates more.
        refresh_interval: steps after which the anchors are embedded again.
        anchor_batch_size: target rows of one forward pass.
        clip: largest weight; null for none.
        eps: shortest length an embedding is divided by.
        self_normalize: only ratios of weights count, over all samples of a step; with several
            micro-batches a step this takes an extra forward pass.
    """

    paper = "https://arxiv.org/abs/2605.05227"

    def __init__(
        self,
        tau: Positive = 1.0,
        refresh_interval: Count = 50,
        anchor_batch_size: Count = 8,
        clip: Positive | None = None,
        eps: Positive = 1e-8,
        self_normalize: bool = False,
    ) -> None:
        super().__init__(
            layer=-1,
            pooling="position",
            shortest=float(eps),
            every=refresh_interval,
            batch_rows=anchor_batch_size,
            batches=0,
        )
        self.tau = float(tau)
        self.clip = clip
        self.relative = self_normalize
        self.scope = "window" if self_normalize else "micro"

    def measure(self, batch: MeasuredBatch) -> FloatArray:
        """Compute (b, 1) mean cosine to anchors: that to their mean, which is not of length 1."""
        cosines: FloatArray = super().measure(batch) @ self.mean
        return cosines[:, None]

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        """Compute (n,) weights in (0, 1)."""
        if context.measured is None:
            raise RuntimeError("the samples were not measured")
        return adapt_weights(context.measured[:, 0], self.tau, self.clip)


def adapt_weights(cosines: FloatArray, tau: float, clip: float | None) -> FloatArray:
    """Compute min(sigmoid(s / tau), clip) of mean cosines (n,) (E26)."""
    # tanh does not overflow, however small tau is.
    weights = 0.5 * (1.0 + np.tanh(cosines / (2.0 * tau)))
    return np.asarray(weights if clip is None else np.minimum(weights, clip))
