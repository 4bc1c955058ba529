"""Uniform draw: the baseline every other selector must beat."""

from __future__ import annotations

import numpy as np

from dataflex.config.parameters import Natural
from dataflex.config.registry import register
from dataflex.data.rows import RunData
from dataflex.run.context import UpdateContext
from dataflex.selectors.base import Selection, Selector
from gradstore.errors import BadInput


@register("selector", "random")
class RandomSelector(Selector):
    """Selector that draws rows uniformly among those that have a target token.

    Args:
        seed: combined with the step, so that every update makes a new draw.
        replacement: draw each row independently; else rows are distinct.
    """

    needs_single_rows = False

    def __init__(self, seed: Natural = 42, replacement: bool = False) -> None:
        self.seed = seed
        self.replacement = replacement
        self.distinct = not replacement

    def check_count(self, count: int, data: RunData) -> None:
        """Raise BadInput if, without replacement, more rows are drawn than are usable."""
        self._check(count, int((data.train.target_tokens > 0).sum()))

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Draw the head of a permutation, or independent rows; seeded by seed + step."""
        usable = context.candidates
        n = len(usable)
        self._check(count, n)
        generator = np.random.default_rng(self.seed + context.step)
        rows = (
            usable[generator.integers(0, n, size=count)]
            if self.replacement
            else generator.permutation(usable)[:count]
        )
        return Selection(rows.astype(np.int64), manifest={"seed": self.seed + context.step})

    def _check(self, count: int, usable: int) -> None:
        if self.distinct and count > usable:
            raise BadInput(
                f"random: {count} rows requested of {usable} usable ones without replacement. "
                "Lower update_step or set component_params.replacement: true."
            )
