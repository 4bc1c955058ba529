"""A mixer in thirty lines: proportions follow the domains' training losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import Ge

from dataflex.api import DomainLosses, Mixer, RunContext, UpdateContext


class ByLoss(Mixer):
    """Mixer in the ratio of the mean losses since the last update.

    Args:
        power: of the losses: 0 for equal shares, the higher the more the worst domain gets.
    """

    observes = True

    def __init__(self, power: Annotated[float, Ge(0)] = 1.0) -> None:
        self.power = power
        self.sums = np.empty((2, 0))

    def start(self, run: RunContext) -> None:
        """Begin with no losses seen, unless a checkpoint says otherwise."""
        if not self.sums.size and run.data.domains is not None:
            self.sums = np.zeros((2, len(run.data.domains.names)))

    def observe(self, losses: DomainLosses) -> None:
        """Add up token losses and tokens (k,) of a step."""
        self.sums = self.sums + np.stack([losses.loss_sums, losses.tokens])

    def mix(self, context: UpdateContext) -> npt.NDArray[np.float64]:
        """Return (k,) proportions; a domain without a token counts as one with the mean loss."""
        loss_sums, tokens = self.sums
        self.sums = np.zeros_like(self.sums)
        if not loss_sums.sum() > 0:
            return np.full(len(tokens), 1.0 / len(tokens))
        mean = np.full(len(tokens), loss_sums.sum() / tokens.sum())
        losses = np.divide(loss_sums, tokens, out=mean, where=tokens > 0)
        grown = losses**self.power
        return np.asarray(grown / grown.sum())

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"sums": self.sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back the state that `state` returned."""
        self.sums = np.asarray(state["sums"], dtype=np.float64)
