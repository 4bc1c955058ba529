"""What a weighter is: weights of the samples that are trained on together."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from dataflex.context import RunContext
from dataflex.strategy import Strategy
from dataflex.window import FloatArray, MeasuredBatch, WeightContext

__all__ = [
    "FloatArray",
    "LossContributor",
    "MeasuredBatch",
    "RunContext",
    "WeightContext",
    "Weighter",
]


class LossContributor(Strategy):
    """Anything that weights samples of a step: a weighter, or DoReMi's domain weights.

    With `scope` "window" a step's micro-batches are weighted together: where there are several, a
    scoring pass in eval mode goes before the training passes. With "micro" each micro-batch (of
    all ranks) is weighted by itself, from the training forward, at no cost.
    """

    needs_single_rows = False
    reads_losses = True
    scope: Literal["window", "micro"] = "window"
    #: Only ratios of weights count. Else 1 is what the plain trainer gives a sample.
    relative: bool = True
    #: Which entry of the model's `hidden_states` `measure` reads; None for none.
    hidden_layer: int | None = None
    #: Whether `measure` is called.
    measures: ClassVar[bool] = False

    def refresh(self, run: RunContext, step: int) -> None:
        """Look at rows other than the step's own, before the passes of a step this weights.

        Called on every rank before every such step; passes over rows can be shared.
        """

    def measure(self, batch: MeasuredBatch) -> npt.NDArray[np.float64]:
        """(b, m) of this rank's samples, gathered over ranks into `context.measured`.

        Called with the model's outputs, only where `measures` is true.
        """
        raise TypeError(f"{type(self).__name__} does not implement measure(batch)")

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        """Weights (n,) >= 0 from mean token losses (n,), NaN where a sample has no target.

        Called with the same values on every rank, so it must give the same answer there.
        """
        raise TypeError(f"{type(self).__name__} does not implement weights(losses, context)")


class Weighter(LossContributor):
    """Base of all weighters; a user's own class may subclass it or just look like it."""
