"""Common base of the reorders by score: a pattern, and the source of its scores."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.config.keys import RunConfig
from dataflex.config.parameters import Natural
from dataflex.data.rows import RunData
from dataflex.reorders.base import Ordering, Reorder
from dataflex.reorders.patterns import PatternName, Polarity, make_pattern
from dataflex.reorders.scores import (
    Source,
    file_faults,
    fixed_scores,
    make_score_params,
    model_scores,
)
from dataflex.run.context import UpdateContext
from dataflex.run.strategy import FSDP
from gradstore.errors import BadInput

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class ScoredReorder(Reorder):
    """Base of static and dynamic.

    Args:
        pattern: shuffle, sorting, folding, zigzag, segment, stair or saw.
        polarity: the end of training that high scores belong to: higher_later (or
            higher_is_better), higher_earlier (or lower_is_better).
        ascending: false turns the direction that `polarity` gives around.
        window_size: rows of each window of the final order that is shuffled; 0 for none.
        seed: of every draw and shuffle.
        pattern_params: layers (strides of folding and zigzag 5, around a section's end 2);
            num_sections 2, folding_ratio 0 (stair, saw); x_pct 10, y_pct 10, front_is_high false,
            back_is_high true (segment).
        score_source: precomputed (a column or a file), cached_selection (an earlier run's) or
            model_loss.
        score_params: score_field "score", score_path (precomputed); cache_path, metric_key
            (cached_selection); batch_size 8, max_samples (model_loss).
    """

    paper = "Dai et al. 2026, Demystifying Data Organization, arXiv:2605.30334"

    def __init__(
        self,
        pattern: PatternName = "sorting",
        polarity: Polarity = "higher_later",
        ascending: bool = True,
        window_size: Natural = 0,
        seed: Natural = 42,
        pattern_params: Mapping[str, Any] | None = None,
        score_source: Source = "precomputed",
        score_params: Mapping[str, Any] | None = None,
    ) -> None:
        self.pattern = make_pattern(
            pattern, polarity, ascending, window_size, seed, pattern_params or {}
        )
        self.seed = seed
        self.source: Source = score_source
        if self.pattern.needs_scores and score_source == "model_loss":
            self.whole_model = frozenset({FSDP})
            self.scores_by_loss = True
        self.score_params = make_score_params(score_source, score_params or {})
        self._fixed: FloatArray | None = None
        self._tokens, self._seconds = 0, 0.0

    def check(self, config: RunConfig) -> list[str]:
        """Check that the file of scores exists."""
        if not self.pattern.needs_scores:
            return []
        return file_faults(self.source, self.score_params)

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Check that scores that need no model exist, one for each row."""
        if self.pattern.needs_scores and self.source != "model_loss":
            self._fixed = fixed_scores(self.source, self.score_params, data)

    def score(self, positions: IntArray, context: UpdateContext) -> FloatArray | None:
        """Compute (m,) present scores of `positions`; None where the pattern needs none."""
        if not self.pattern.needs_scores:
            return None
        if self.source == "model_loss":
            began = time.perf_counter()
            scores, tokens = model_scores(self.score_params, context, positions, self.seed)
            self._tokens += tokens
            self._seconds += time.perf_counter() - began
            return scores
        if self._fixed is None:
            self._fixed = fixed_scores(self.source, self.score_params, context.run.data)
        return self._fixed[positions]

    def answer(self, rows: IntArray, scores: FloatArray | None, served: int, size: int) -> Ordering:
        """Build the answer for the rows served, with the values to report.

        Args:
            rows: (k,) in their order.
            scores: (k,) theirs.
            served: rows served since the pool is what it is, these included.
            size: m, rows of the pool.
        """
        tokens, seconds, self._tokens, self._seconds = self._tokens, self._seconds, 0, 0.0
        return Ordering(rows, scores, tokens, seconds, {"passes": served / size})


def rows_of(context: UpdateContext) -> IntArray:
    """List (m,) ascending positions of the rows to order: the pool's, with a target token.

    Raises:
        BadInput: there is none.
    """
    rows = context.candidates
    if len(rows) == 0:
        raise BadInput(f"step {context.step}: the pool has no row with a target token to order.")
    return rows
