"""A reorder of one's own: short and long rows in turn, so that batches hold as many tokens each.

Copy this file to begin a reorder of your own: `order` is all that a reorder needs, and `context`
shows what it may look at (dataflex/reorders/base.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dataflex.api import Ordering, Reorder, UpdateContext


class EvenBatches(Reorder):
    """Reorder in pairs: the shortest row and the longest, the second shortest and longest, ...

    The constructor's parameters are the accepted `component_params`.

    Args:
        seed: of the order of the pairs, another one in every pass.
    """

    def __init__(self, seed: int = 42) -> None:
        self.seed = seed
        self.served = 0

    def order(self, count: int, context: UpdateContext) -> Ordering:
        """Return the next `count` rows; each row once before any comes again."""
        lengths = context.run.data.train.lengths
        rows = context.candidates
        rising = rows[np.argsort(lengths[rows], kind="stable")]
        begin, self.served = self.served, self.served + count
        passes = range(begin // len(rows), -(-self.served // len(rows)))
        served = np.concatenate([self._pass(rising, number) for number in passes])
        at = begin % len(rows)
        chosen = served[at : at + count]
        numbers = {"passes": self.served / len(rows)}
        return Ordering(chosen, lengths[chosen].astype(np.float64), numbers=numbers)

    def _pass(self, rising: np.ndarray[Any, Any], number: int) -> np.ndarray[Any, Any]:
        """Return all rows, the pairs of short and long in random order."""
        half = (len(rising) + 1) // 2
        pairs = [[short, long] for short, long in zip(rising[:half], rising[::-1], strict=False)]
        if len(rising) % 2:
            pairs[-1] = [rising[half - 1]]
        order = np.random.default_rng([self.seed, number]).permutation(len(pairs))
        return np.concatenate([pairs[i] for i in order])

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"served": self.served}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back the state that `state` returned."""
        self.served = int(state["served"])
