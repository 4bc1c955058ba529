"""The contract of mixers: proportions of the domains for the next interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from dataflex.run.context import DomainLosses, RunContext, UpdateContext
from dataflex.run.strategy import Strategy

__all__ = ["DomainLosses", "Mixer", "RunContext", "UpdateContext"]


class Mixer(Strategy):
    """Base of all mixers; a user's own class may subclass it or just look like it.

    `run.data.domains` names the k domains, in the order of `dataset`. A mixer that also weights
    the loss (DoReMi) subclasses `dataflex.weighters.base.LossContributor` as well.
    """

    required = "mix"
    needs_single_rows = False
    #: Changes its answer over time: a fixed `mixture_sample_rule` would silently discard it.
    dynamic: ClassVar[bool] = True

    def mix(self, context: UpdateContext) -> npt.NDArray[np.float64]:
        """(k,) proportions >= 0 of the domains, summing to 1, for the next interval.

        Called on every rank; rank 0's answer counts.
        """
        raise TypeError(f"{type(self).__name__} does not implement mix(context)")

    def by_domain(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Report numbers of the domains beside their proportions: name -> (k,).

        Goes to the Trainer's log, to events.jsonl and, as `weights`, into the picture.
        """
        return {}
