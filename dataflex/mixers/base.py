"""What a mixer is: proportions of the domains for the next interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.strategy import Strategy

__all__ = ["DomainLosses", "Mixer", "RunContext", "UpdateContext"]


@dataclass(frozen=True)
class DomainLosses:
    """Training losses of one optimizer step by domain, over all ranks and micro-batches.

    Attributes:
        step: g, optimizer steps finished before it.
        loss_sums: (k,) float64, sum of token losses; 0 where the step had no row of the domain.
        tokens: (k,) float64, target tokens.
        rows: (k,) float64, samples.
    """

    step: int
    loss_sums: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]
    rows: npt.NDArray[np.float64]


class Mixer(Strategy):
    """Base of all mixers; a user's own class may subclass it or just look like it.

    `run.data.domains` names the k domains, in the order of `dataset`. A mixer that also weights
    the loss (DoReMi) subclasses `dataflex.weighters.base.LossContributor` as well.
    """

    needs_single_rows = False
    #: Gets the training losses of every step (`observe`).
    observes: ClassVar[bool] = False
    #: Changes its answer over time: a fixed `mixture_sample_rule` would silently discard it.
    dynamic: ClassVar[bool] = True

    def mix(self, context: UpdateContext) -> npt.NDArray[np.float64]:
        """(k,) proportions >= 0 of the domains, summing to 1, for the next interval.

        Called on every rank; rank 0's answer counts.
        """
        raise TypeError(f"{type(self).__name__} does not implement mix(context)")

    def observe(self, losses: DomainLosses) -> None:
        """Take the training losses of a finished step; only where `observes` is true."""

    def by_domain(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """What it has to tell of the domains beside their proportions: name -> (k,).

        Goes to the Trainer's log, to events.jsonl and, as `weights`, into the picture.
        """
        return {}
