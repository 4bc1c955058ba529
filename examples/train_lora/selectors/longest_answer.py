"""A selector of one's own: prefer rows with long answers, and keep some chance in the choice.

Long answers are a strong and cheap baseline for instruction data (Zhao et al., "Long Is More for
Alignment", arXiv:2402.04833). Copy this file to begin a selector of your own: `select` is all that
a selector needs, and `context` shows what it may look at (dataflex/selectors/base.py).
"""

from __future__ import annotations

import numpy as np

from dataflex.api import Selection, Selector, UpdateContext


class LongestAnswer(Selector):
    """Draw from the rows with the longest answers.

    The constructor's parameters are the accepted `component_params`.

    Args:
        share: part of the candidates, by length of their answer, that the draw is made from.
        seed: combined with the step, so that every update makes a new draw.
    """

    def __init__(self, share: float = 0.25, seed: int = 42) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; give a number above 0 and at most 1")
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
