"""The contract of reorders: an order that serves every row once before any again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import RawRows
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.strategy import Strategy

__all__ = ["Ordering", "RawRows", "Reorder", "RunContext", "UpdateContext"]


@dataclass(frozen=True)
class Ordering:
    """A reorder's answer.

    Attributes:
        rows: (k,) int64, positions in the training set in the order they are trained on.
        scores: (k,) float64 in the order of `rows`, NaN where unknown; None without scores.
        tokens: tokens of the passes that were made.
        score_seconds: time in those passes.
        numbers: what the Trainer's log gets beside the scores' range, name -> value.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64] | None = None
    tokens: int = 0
    score_seconds: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)


class Reorder(Strategy):
    """Base of all reorders; a user's own class may subclass it or just look like it.

    Rows are those of `context.candidates`. A pool other than the last one begins a pass of its
    own; the same pool goes on where the last answer ended.
    """

    required = "order"
    #: Raw rows are put in order before they are tokenised, and then served as they lie.
    orders_raw_rows: bool = False

    def order(self, count: int, context: UpdateContext) -> Ordering:
        """The next `count` rows, to be trained on in this order; past the end it begins again.

        Called on every rank; rank 0's answer counts.
        """
        raise TypeError(f"{type(self).__name__} does not implement order(count, context)")

    def warmup(self, count: int, context: UpdateContext) -> Ordering:
        """The `count` rows of a stage's warm-up; unless overridden, the next ones of the order."""
        return self.order(count, context)

    def order_raw_rows(self, rows: RawRows) -> npt.NDArray[np.int64]:
        """(n,) a permutation of the raw rows; asked for where `orders_raw_rows`."""
        raise TypeError(f"{type(self).__name__} does not implement order_raw_rows(rows)")

    def by_index(self) -> None:
        """Leave raw rows alone from now on: a pipeline decides about training rows."""
