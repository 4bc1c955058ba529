"""An order that follows the model: the remaining rows are scored again at every update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dataflex.config.parameters import Count
from dataflex.config.registry import register
from dataflex.reorders.base import Ordering
from dataflex.reorders.by_score import FloatArray, IntArray, ScoredReorder, rows_of
from dataflex.reorders.scores import Source
from dataflex.run.context import UpdateContext

_NOTHING: IntArray = np.empty(0, dtype=np.int64)


@register("reorder", "dynamic")
class DynamicReorder(ScoredReorder):
    """Reorder that scores the rows still to come and serves the ranks its pattern needs next.

    The pattern is laid over a whole pass: after r of n rows its next part is that behind place r,
    read as ranks among the rows left. Scores that never change give the order of static (E31).
    A warm-up draws at random and uses up the beginning of the pass.

    Args:
        reorder_every: score at every so many-th update; in between the last order goes on.
        consume_once: a row served comes again in the next pass alone; false ranks all rows at
            every update, so that a row whose rank moves may come twice in a pass, or not at all.
        score_source: as below; model_loss is a pass over the rows to come.
    """

    def __init__(
        self,
        reorder_every: Count = 1,
        consume_once: bool = True,
        score_source: Source = "model_loss",
        **rest: Any,  # noqa: ANN401 - ScoredReorder's
    ) -> None:
        super().__init__(score_source=score_source, **rest)
        self.reorder_every = reorder_every
        self.consume_once = consume_once
        self._all = self._left = _NOTHING
        self._served = self._updates = 0
        self._next: IntArray = _NOTHING
        self._next_scores: FloatArray = np.empty(0)

    def warmup(self, count: int, context: UpdateContext) -> Ordering:
        """Draw rows at random from those left, without replacement while they last."""
        self._take_pool(context)
        self._forget_order()
        generator = np.random.default_rng([self.seed, context.step])
        rows = _NOTHING
        while (missing := count - len(rows)) > 0:
            self._refill()
            part = generator.permutation(self._left)[:missing]
            rows = np.append(rows, part)
            self._consume(part)
        return self.answer(rows, None, self._served, len(self._all))

    def order(self, count: int, context: UpdateContext) -> Ordering:
        """Return the next part of the pattern, from the rows left, by their present rank."""
        self._take_pool(context)
        if self._updates % self.reorder_every == 0:
            self._forget_order()
        self._updates += 1
        rows, scores = _NOTHING, np.empty(0)
        while (missing := count - len(rows)) > 0:
            if len(self._next) == 0:
                self._order_rest(context)
            part, self._next = np.split(self._next, [missing])
            known, self._next_scores = np.split(self._next_scores, [missing])
            rows, scores = np.append(rows, part), np.append(scores, known)
            self._consume(part)
        used = scores if self.pattern.needs_scores else None
        return self.answer(rows, used, self._served, len(self._all))

    def _order_rest(self, context: UpdateContext) -> None:
        """Lay the rest of the pattern over the rows left, by the scores of now."""
        self._refill()
        scores = self.score(self._left, context)
        ahead = self.pattern.ranks(len(self._all))[self._served % len(self._all) :]
        if self.consume_once:
            ahead = np.argsort(np.argsort(ahead))
        places = self.pattern.sort(np.arange(len(self._left)), scores)[ahead]
        known = np.full(len(places), np.nan) if scores is None else scores[places]
        self._next, self._next_scores = self._left[places], known

    def _take_pool(self, context: UpdateContext) -> None:
        """Start a new pass if the pool has changed."""
        pool = rows_of(context)
        if not np.array_equal(self._all, pool):
            self._all, self._left, self._served = pool, pool, 0
            self._forget_order()

    def _refill(self) -> None:
        if len(self._left) == 0:
            self._left = self._all

    def _consume(self, rows: IntArray) -> None:
        self._served += len(rows)
        if self.consume_once:
            self._left = np.setdiff1d(self._left, rows, assume_unique=True)

    def _forget_order(self) -> None:
        """Discard the order, so that rows are scored before any is served."""
        self._next, self._next_scores = _NOTHING, np.empty(0)

    def state(self) -> dict[str, Any]:
        """Return the state of the pass: all rows, rows left, their order, and the progress."""
        return {
            "all": self._all,
            "left": self._left,
            "next": self._next,
            "next_scores": self._next_scores,
            "served": self._served,
            "updates": self._updates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._all, self._left = state["all"], state["left"]
        self._next, self._next_scores = state["next"], state["next_scores"]
        self._served, self._updates = int(state["served"]), int(state["updates"])
