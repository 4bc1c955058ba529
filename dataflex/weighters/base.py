"""The contract of weighters: weights of the samples that are trained on together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from dataflex.run.context import RunContext
from dataflex.run.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from dataflex.run.forecast import Forecast
    from gradstore.capture.losses import Targets

__all__ = [
    "FloatArray",
    "LossContributor",
    "MeasuredBatch",
    "RunContext",
    "WeightContext",
    "Weighter",
]


FloatArray = npt.NDArray[np.float64]
"""A NumPy array of float64."""


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
    """Known values of the samples that are weighted together, over all ranks.

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


class LossContributor(Strategy):
    """Anything that weights samples of a step: a weighter, or DoReMi's domain weights.

    With `scope` "window" a step's micro-batches are weighted together: where there are several, a
    scoring pass in eval mode goes before the training passes. With "micro" each micro-batch (of
    all ranks) is weighted by itself, from the training forward, at no cost.
    """

    required = "weights"
    needs_single_rows = False
    reads_losses = True
    scope: Literal["window", "micro"] = "window"
    #: Only ratios of weights count. Otherwise a weight of 1 is plain training.
    relative: bool = True
    #: Index into the model's `hidden_states` that `measure` reads; None for none.
    hidden_layer: int | None = None
    #: Whether `measure` is called.
    measures: ClassVar[bool] = False

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Name the passes of weighters, which are not measured."""
        from dataflex.run.forecast import Forecast

        note = "passes over target rows, a reference or a step's window"
        return [Forecast("weights", len(steps), note=note)]

    def refresh(self, run: RunContext, step: int) -> None:
        """Look at rows other than the step's own, before the passes of a step this weights.

        Called on every rank before every such step; passes over rows can be shared.
        """

    def measure(self, batch: MeasuredBatch) -> npt.NDArray[np.float64]:
        """Measure (b, m) values of this rank's samples, gathered over ranks in `context.measured`.

        Called with the model's outputs, only where `measures` is true.
        """
        raise TypeError(f"{type(self).__name__} does not implement measure(batch)")

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        """Compute weights (n,) >= 0 from mean token losses (n,), NaN where a sample has no target.

        Called with the same values on every rank, so it must give the same answer there.
        """
        raise TypeError(f"{type(self).__name__} does not implement weights(losses, context)")


class Weighter(LossContributor):
    """Base of all weighters; a user's own class may subclass it or just look like it."""
