"""The same proportions throughout: the baseline every other mixer must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dataflex.config.keys import RunConfig
from dataflex.config.registry import register
from dataflex.data.mixture import FIXED_RULES, as_proportions, domains_of
from dataflex.mixers.base import Mixer
from dataflex.run.context import UpdateContext
from gradstore.errors import BadInput


@register("mixer", "static")
class StaticMixer(Mixer):
    """Fixed proportions of the domains.

    Args:
        proportions: one number >= 0 for each data set of `dataset`, in that order and in any
            scale; null for the same share of each.
    """

    dynamic = False

    def __init__(self, proportions: Sequence[float] | None = None) -> None:
        self.proportions = proportions

    def check(self, config: RunConfig) -> list[str]:
        """Check that there is one number per domain, and no rule that discards them."""
        if self.proportions is None:
            return []
        rule = config.dataflex.mixture_sample_rule
        faults = []
        if rule in FIXED_RULES:
            faults.append(
                f"mixture_sample_rule is {rule!r}, which fixes the mixture: remove it, or "
                "component_params.proportions."
            )
        try:
            as_proportions(self.proportions, config.known.dataset, "proportions")
        except BadInput as error:
            faults.append(str(error))
        return faults

    def mix(self, context: UpdateContext) -> npt.NDArray[np.float64]:
        """Return the proportions, normalized."""
        domains = domains_of(context.run.data).names
        given = np.ones(len(domains)) if self.proportions is None else self.proportions
        return as_proportions(given, domains, "proportions")
