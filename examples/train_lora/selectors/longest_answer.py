"""A selector of one's own: rows with long answers, with some chance in the choice.

Long answers are a strong and cheap baseline for instruction data (Zhao et al., "Long Is More for
Alignment", arXiv:2402.04833). Copy this file to begin a selector of your own: `select` is all that
a selector needs, and `context` shows what it may look at (dataflex/selectors/base.py).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Gt, Le

from dataflex.api import Selection, Selector, UpdateContext


class LongestAnswer(Selector):
    """Selector that draws from the rows with the longest answers.

    The constructor's parameters are the accepted `component_params`, their annotations the limits.

    Args:
        share: part of the candidates, by length of their answer, that the draw is made from.
        seed: combined with the step, so that every update makes a new draw.
    """

    def __init__(self, share: Annotated[float, Gt(0), Le(1)] = 0.25, seed: int = 42) -> None:
        self.share = share
        self.seed = seed

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Draw `count` rows without replacement from the longest of the candidates."""
        lengths = context.run.data.train.target_tokens
        # Rows that may be chosen: all with an answer, or what a pipeline's stages have left.
        candidates = context.candidates
        pool = max(count, int(self.share * len(candidates)))
        longest = candidates[np.argsort(-lengths[candidates], kind="stable")][:pool]
        rows = np.random.default_rng([self.seed, context.step]).permutation(longest)[:count]
        return Selection(rows, scores=lengths[rows].astype(np.float64))
