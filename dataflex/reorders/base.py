"""What a reorder is: an order in which every row is served once before any is served again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataflex.context import RunContext, UpdateContext
from dataflex.strategy import Strategy

__all__ = ["Reorder", "RunContext", "UpdateContext"]


class Reorder(Strategy):
    """Base of all reorders; a user's own class may subclass it or just look like it."""

    def warmup(self, count: int, context: UpdateContext) -> npt.NDArray[np.int64]:
        """(count,) positions to train on, in this order, before the first update of a stage."""
        raise TypeError(f"{type(self).__name__} does not implement warmup(count, context)")

    def order(self, count: int, context: UpdateContext) -> npt.NDArray[np.int64]:
        """(count,) positions to train on next, in this order.

        Called on every rank; rank 0's answer counts.
        """
        raise TypeError(f"{type(self).__name__} does not implement order(count, context)")
