"""Proportions redrawn at every update."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Natural
from dataflex.config.registry import register
from dataflex.data.mixture import domains_of
from dataflex.mixers.base import Mixer
from dataflex.run.context import UpdateContext


@register("mixer", "random")
class RandomMixer(Mixer):
    """Uniform numbers, normalised: another mixture at every update.

    Args:
        seed: combined with the step.
    """

    def __init__(self, seed: Natural = 42) -> None:
        self.seed = seed

    def mix(self, context: UpdateContext) -> npt.NDArray[np.float64]:
        """Draw (k,) proportions, seeded by (seed, step)."""
        generator = np.random.default_rng([self.seed, context.step])
        numbers = generator.random(len(domains_of(context.run.data).names))
        return np.asarray(numbers / numbers.sum())
