"""One order for the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from dataflex.config.keys import RunConfig
from dataflex.config.registry import register
from dataflex.data.rows import RawRows, RunData
from dataflex.reorders.base import Ordering
from dataflex.reorders.by_score import FloatArray, IntArray, ScoredReorder, rows_of
from dataflex.reorders.scores import Source, raw_scores
from dataflex.run.context import UpdateContext

#: Keys of a configuration, and what they must be where raw rows are put in order.
RAW_NEEDS = {
    "mix_strategy": "concat",
    "streaming": "false",
    "val_size": "0",
    "tokenized_path": "null",
}


@register("reorder", "static")
class StaticReorder(ScoredReorder):
    """Reorder that sorts the rows once by score and repeats that order throughout the run.

    Args:
        apply_at: raw: rows are put in order before they are tokenised, so that packed rows follow
            the order as well, with precomputed scores; index: training rows, after that. Scores
            from elsewhere are of training rows: then it is always index.
        score_source: as below; model_loss is one pass before the first step (in a pipeline,
            whenever the pool is another one).
    """

    def __init__(
        self,
        apply_at: Literal["raw", "index"] = "raw",
        score_source: Source = "precomputed",
        **rest: Any,  # noqa: ANN401 - ScoredReorder's
    ) -> None:
        super().__init__(score_source=score_source, **rest)
        self.orders_raw_rows = apply_at == "raw" and score_source == "precomputed"
        self.needs_single_rows = not self.orders_raw_rows
        self._order: IntArray = np.empty(0, dtype=np.int64)
        self._scores: FloatArray | None = None
        self._served = 0

    def by_index(self) -> None:
        """Order training rows."""
        self.orders_raw_rows, self.needs_single_rows = False, True

    def check(self, config: RunConfig) -> list[str]:
        """Check that the raw rows to order are known, form one list, and are all trained on."""
        faults = super().check(config)
        if self.orders_raw_rows:
            faults += [
                f"{key} is {value!r}, but rows are put in order before they are tokenised: set "
                f"{key}: {needed}, or component_params.apply_at: index."
                for key, needed in RAW_NEEDS.items()
                if (value := getattr(config.known, key)) and value != needed
            ]
        return faults

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Load raw rows' scores for reports alone, as the rows are in order; else check scores."""
        if not self.orders_raw_rows:
            super().check_data(data, config)
        elif self.pattern.needs_scores and self.score_params.score_path is None:
            self._fixed = None if data.raw is None else raw_scores(self.score_params, data.raw)

    def order_raw_rows(self, rows: RawRows) -> IntArray:
        """Return the (n,) order of all raw rows under the pattern."""
        scores = raw_scores(self.score_params, rows) if self.pattern.needs_scores else None
        return self.pattern.arrange(np.arange(len(rows)), scores)

    def order(self, count: int, context: UpdateContext) -> Ordering:
        """Return the next rows of the order, from the start again when it ends."""
        self._lay(context)
        at = np.arange(self._served, self._served + count) % len(self._order)
        self._served += count
        scores = None if self._scores is None else self._scores[at]
        return self.answer(self._order[at], scores, self._served, len(self._order))

    def _lay(self, context: UpdateContext) -> None:
        """Compute the order of the pool if the pool has changed."""
        pool = rows_of(context)
        if np.array_equal(np.sort(self._order), pool):
            return
        self._served = 0
        if self.orders_raw_rows:
            self._order = pool
            self._scores = None if self._fixed is None else self._fixed[pool]
            return
        scores = self.score(pool, context)
        at = self.pattern.arrange(np.arange(len(pool)), scores)
        self._order, self._scores = pool[at], None if scores is None else scores[at]

    def state(self) -> dict[str, Any]:
        """Return the order and the position in it."""
        return {"order": self._order, "scores": self._scores, "served": self._served}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._order, self._scores = state["order"], state["scores"]
        self._served = int(state["served"])
