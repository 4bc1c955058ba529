"""A weighter of one's own: samples the model is already sure of count less.

The focal loss (Lin et al. 2017, arXiv:1708.02002), sample by sample. Copy this file to begin a
weighter of your own: `weights` is all that a weighter needs, and dataflex/weighters/base.py shows
what else it may say.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge

from dataflex.api import FloatArray, WeightContext, Weighter


class FocalWeighter(Weighter):
    """Weighter by (1 - p) ** gamma, where p is the model's mean probability of a sample's tokens.

    The constructor's parameters are the accepted `component_params`, their annotations the limits.

    Args:
        gamma: 0 for equal weights; the larger, the less a well known sample counts.
    """

    # Each micro-batch from the forward pass that trains on it: no extra pass.
    scope = "micro"

    def __init__(self, gamma: Annotated[float, Ge(0)] = 2.0) -> None:
        self.gamma = gamma

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        """Return one weight per sample, of which only the ratios count.

        A sample without a target token has a loss of NaN and counts 0.
        """
        return np.asarray((1.0 - np.exp(-losses)) ** self.gamma)
