"""Uniform draw: the baseline every other selector must beat."""

from __future__ import annotations

import numpy as np

from dataflex.registry import register
from dataflex.selectors.base import Selection, Selector, UpdateContext
from gradstore.errors import BadInput


@register("selector", "random")
class RandomSelector(Selector):
    """Draw rows uniformly, of those that have a target token.

    Args:
        seed: combined with the step, so that every update draws anew.
        replacement: draw each row independently; else rows are distinct.
    """

    needs_single_rows = False

    def __init__(self, seed: int = 42, replacement: bool = False) -> None:
        self.seed = seed
        self.replacement = replacement

    def select(self, count: int, context: UpdateContext) -> Selection:
        """The head of a permutation, or independent draws; seeded by seed + step."""
        usable = context.candidates
        n = len(usable)
        if count > n and not self.replacement:
            raise BadInput(
                f"random: {count} rows asked of {n} usable ones without replacement. "
                "Lower update_step or set component_params.replacement: true."
            )
        generator = np.random.default_rng(self.seed + context.step)
        rows = (
            usable[generator.integers(0, n, size=count)]
            if self.replacement
            else generator.permutation(usable)[:count]
        )
        return Selection(rows.astype(np.int64), manifest={"seed": self.seed + context.step})
