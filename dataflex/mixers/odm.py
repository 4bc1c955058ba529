"""Online data mixing: more of the domains whose loss is high, by an adversarial bandit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Lt

from dataflex.config.keys import RunConfig
from dataflex.config.parameters import Positive
from dataflex.config.registry import register
from dataflex.data.mixture import as_proportions, domains_of, opening_proportions
from dataflex.mixers.base import DomainLosses, Mixer
from dataflex.run.context import RunContext, UpdateContext
from gradstore.errors import BadInput

FloatArray = npt.NDArray[np.float64]

_log = logging.getLogger(__name__)


def exploration(domains: int, step: int, floor: float) -> float:
    """Share that every domain gets whatever its reward: falls with the root of the step.

    Args:
        domains: K.
        step: t, optimizer steps finished.
        floor: it falls no lower.
    """
    if step <= 0:
        return 1.0 / domains
    return max(floor, min(1.0 / domains, math.sqrt(math.log(domains) / (domains * step))))


def averaged_rewards(
    rewards: FloatArray, losses: FloatArray, proportions: FloatArray, alpha: float
) -> FloatArray:
    """R_d <- alpha R_d + (1 - alpha) loss_d / pi_d; a domain that was not seen keeps its own.

    Args:
        rewards: (k,) R.
        losses: (k,) mean losses, NaN where a domain was not seen, already scaled.
        proportions: (k,) that were trained on.
        alpha: what is kept of the old.
    """
    seen = np.isfinite(losses) & (proportions > 0)
    fresh = np.divide(losses, proportions, out=np.zeros_like(rewards), where=seen)
    return np.where(seen, alpha * rewards + (1 - alpha) * fresh, rewards)


def policy(rewards: FloatArray, exploration_before: float, exploration_now: float) -> FloatArray:
    """(k,) proportions: (1 - K e_t) softmax(e_{t-1} R) + e_t."""
    scaled = exploration_before * rewards
    grown = np.exp(scaled - scaled.max())
    share = 1.0 - len(rewards) * exploration_now
    return np.asarray(share * grown / grown.sum() + exploration_now)


@register("mixer", "odm")
class OdmMixer(Mixer):
    """Proportions that follow the domains' training losses.

    The reward of a domain is its mean token loss since the last update, over all ranks, divided by
    the proportion it was trained on.

    Args:
        alpha: what an update keeps of the rewards so far, 0 to 1 (exclusive).
        warmup_steps: of DataFlex 1.1.0; the warm-up is `warmup_step` steps long.
        initial_proportions: the answer as long as nothing was trained on (`warmup_step: 0`); null
            for what the run opens with.
        reward_scale: multiplies the losses.
        min_exploration_rate: every domain's smallest proportion; below 1/K.
    """

    paper = "Albalak et al. 2023, Efficient Online Data Mixing, arXiv:2312.02406"
    observes = True
    neutral = frozenset({"warmup_steps"})

    def __init__(
        self,
        alpha: Annotated[float, Ge(0), Lt(1)] = 0.9,
        warmup_steps: int | None = None,
        initial_proportions: Sequence[float] | None = None,
        reward_scale: Positive = 1.0,
        min_exploration_rate: Annotated[float, Ge(0)] = 0.03,
    ) -> None:
        self.alpha = alpha
        self.warmup_steps = warmup_steps
        self.initial_proportions = initial_proportions
        self.reward_scale = reward_scale
        self.floor = min_exploration_rate
        self.exploration = 0.0
        empty = np.empty(0)
        self.rewards, self.proportions, self.loss_sums, self.tokens = empty, empty, empty, empty

    def check(self, config: RunConfig) -> list[str]:
        """The floor must leave something to decide."""
        domains = config.known.dataset
        faults = []
        if domains and self.floor >= 1 / len(domains):
            faults.append(
                f"min_exploration_rate is {self.floor}: with {len(domains)} domains it must be "
                f"below 1/{len(domains)}, or nothing is left to decide."
            )
        if self.initial_proportions is not None:
            try:
                as_proportions(self.initial_proportions, domains, "initial_proportions")
            except BadInput as error:
                faults.append(str(error))
        return faults

    def start(self, run: RunContext) -> None:
        """Begin with no reward; a resume has restored them already."""
        w = run.config.dataflex.warmup_step
        if self.warmup_steps not in (None, w) and run.ranks.leads:
            _log.warning("odm: warmup_steps is ignored, the warm-up is warmup_step (%d)", w)
        if len(self.rewards):
            return
        k = len(domains_of(run.data).names)
        self.exploration = 1.0 / k
        self.rewards, self.loss_sums, self.tokens = np.zeros(k), np.zeros(k), np.zeros(k)
        self.proportions = opening_proportions(run.config, run.data)

    def observe(self, losses: DomainLosses) -> None:
        """Add up the losses of the running interval."""
        self.loss_sums = self.loss_sums + losses.loss_sums
        self.tokens = self.tokens + losses.tokens

    def mix(self, context: UpdateContext) -> FloatArray:
        """(k,) proportions from the losses since the last update."""
        k = len(self.rewards)
        if not self.tokens.any() and self.initial_proportions is not None:
            domains = domains_of(context.run.data).names
            self.proportions = as_proportions(
                self.initial_proportions, domains, "initial_proportions"
            )
        elif self.tokens.any():
            losses = np.divide(
                self.loss_sums, self.tokens, out=np.full(k, np.nan), where=self.tokens > 0
            )
            self._learn(self.reward_scale * losses, context.step)
        self.loss_sums, self.tokens = np.zeros(k), np.zeros(k)
        return self.proportions

    def _learn(self, losses: FloatArray, step: int) -> None:
        """One turn of the bandit; `losses` (k,), NaN where a domain was not seen."""
        self.rewards = averaged_rewards(self.rewards, losses, self.proportions, self.alpha)
        now = exploration(len(losses), step, self.floor)
        self.proportions = policy(self.rewards, self.exploration, now)
        self.exploration = now

    def state(self) -> dict[str, Any]:
        """Rewards, the mixture in force, and what the running interval has summed up."""
        return {
            "rewards": self.rewards,
            "proportions": self.proportions,
            "exploration": self.exploration,
            "loss_sums": self.loss_sums,
            "tokens": self.tokens,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.rewards = np.asarray(state["rewards"], dtype=np.float64)
        self.proportions = np.asarray(state["proportions"], dtype=np.float64)
        self.exploration = float(state["exploration"])
        self.loss_sums = np.asarray(state["loss_sums"], dtype=np.float64)
        self.tokens = np.asarray(state["tokens"], dtype=np.float64)
