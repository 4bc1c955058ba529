"""Online data mixing: more of the domains whose loss is high, by an adversarial bandit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

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

#: Default of `reward_scale` for each `averaging`: that of the authors' code, and of 0.1.0.
SCALES = {"none": 0.1, "moving": 1.0}

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


def accumulated_rewards(
    rewards: FloatArray, losses: DomainLosses, proportions: FloatArray, scale: float
) -> FloatArray:
    """Add one optimizer step's importance-weighted losses: R_d += scale * share_d * loss_d / pi_d.

    share_d is the domain's part of the step's rows, so that the expected increment is scale *
    loss_d, as in Exp3. A domain that was not seen adds nothing.

    Args:
        rewards: (k,) R.
        losses: sums of the step, over all ranks.
        proportions: (k,) pi that the step's rows were drawn with.
        scale: of the losses.
    """
    seen = (losses.tokens > 0) & (losses.rows > 0) & (proportions > 0)
    seen &= np.isfinite(losses.loss_sums)
    mean = np.divide(losses.loss_sums, losses.tokens, out=np.zeros_like(rewards), where=seen)
    share = losses.rows / max(float(losses.rows.sum()), 1.0)
    added = np.divide(share * mean, proportions, out=np.zeros_like(rewards), where=seen)
    return np.asarray(rewards + scale * added)


def averaged_rewards(
    rewards: FloatArray, losses: FloatArray, proportions: FloatArray, alpha: float
) -> FloatArray:
    """Compute R_d <- alpha R_d + (1 - alpha) loss_d / pi_d; unseen domains keep their own.

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
    """Compute (k,) proportions: (1 - K e_t) softmax(e_{t-1} R) + e_t."""
    scaled = exploration_before * rewards
    grown = np.exp(scaled - scaled.max())
    share = 1.0 - len(rewards) * exploration_now
    return np.asarray(share * grown / grown.sum() + exploration_now)


@register("mixer", "odm")
class OdmMixer(Mixer):
    """Proportions that follow the domains' training losses.

    A domain's reward is the sum over optimizer steps of its mean token loss, over all ranks, times
    its share of the step's rows over the proportion asked for. The sum grows faster than the
    exploration rate falls, so that proportions separate where losses stay apart (ALGORITHMS 2.4).

    Args:
        averaging: none, or moving: a reward is then the moving average of the updates' losses over
            their proportions. It is bounded, so that proportions tend to equal ones whatever the
            losses, as in DataFlex 1.1.0.
        alpha: part of the rewards so far that an update keeps, 0 to 1 (exclusive); of `moving`.
        warmup_steps: of DataFlex 1.1.0; the warm-up is `warmup_step` steps long.
        initial_proportions: the answer as long as nothing was trained on (`warmup_step: 0`); null
            for what the run opens with.
        reward_scale: multiplies the losses; null for 0.1, or 1 with `averaging: moving`.
        min_exploration_rate: every domain's smallest proportion; below 1/K.
    """

    paper = "Albalak et al. 2023, Efficient Online Data Mixing, arXiv:2312.02406"
    observes = True
    # `averaging` does change answers: `restore` compares it, and knows how 0.1.0 averaged.
    neutral = frozenset({"warmup_steps", "averaging"})

    def __init__(
        self,
        averaging: Literal["none", "moving"] = "none",
        alpha: Annotated[float, Ge(0), Lt(1)] = 0.9,
        warmup_steps: int | None = None,
        initial_proportions: Sequence[float] | None = None,
        reward_scale: Positive | None = None,
        min_exploration_rate: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        self.averaging = averaging
        self.alpha = alpha
        self.warmup_steps = warmup_steps
        self.initial_proportions = initial_proportions
        usual = SCALES[averaging]
        self.reward_scale = usual if reward_scale is None else reward_scale
        self.floor = min_exploration_rate
        self.exploration = 0.0
        empty = np.empty(0)
        self.rewards, self.proportions, self.loss_sums, self.tokens = empty, empty, empty, empty

    def check(self, config: RunConfig) -> list[str]:
        """Check that the exploration floor is below 1 / k, and the initial proportions."""
        domains = config.known.dataset
        faults = []
        if domains and self.floor >= 1 / len(domains):
            faults.append(
                f"min_exploration_rate is {self.floor}: with {len(domains)} domains it must be "
                f"below 1/{len(domains)}, or all proportions are fixed. "
                "Lower it."
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
        """Add up the losses of the running interval, and the rewards where they accumulate."""
        if self.averaging == "none":
            self.rewards = accumulated_rewards(
                self.rewards, losses, self.proportions, self.reward_scale
            )
        self.loss_sums = self.loss_sums + losses.loss_sums
        self.tokens = self.tokens + losses.tokens

    def mix(self, context: UpdateContext) -> FloatArray:
        """Compute (k,) proportions from the losses since the last update."""
        k = len(self.rewards)
        if not self.tokens.any() and self.initial_proportions is not None:
            domains = domains_of(context.run.data).names
            self.proportions = as_proportions(
                self.initial_proportions, domains, "initial_proportions"
            )
        elif self.tokens.any():
            self._learn(context.step)
        self.loss_sums, self.tokens = np.zeros(k), np.zeros(k)
        return self.proportions

    def _learn(self, step: int) -> None:
        """Move the proportions at the end of optimizer step t = `step`."""
        k = len(self.rewards)
        if self.averaging == "moving":
            losses = np.divide(
                self.loss_sums, self.tokens, out=np.full(k, np.nan), where=self.tokens > 0
            )
            self.rewards = averaged_rewards(
                self.rewards, self.reward_scale * losses, self.proportions, self.alpha
            )
            before = self.exploration
        else:
            before = exploration(k, step - 1, self.floor)
        self.exploration = exploration(k, step, self.floor)
        self.proportions = policy(self.rewards, before, self.exploration)

    def state(self) -> dict[str, Any]:
        """Return rewards, the current mixture, and the sums of the running interval."""
        return {
            "averaging": self.averaging,
            "rewards": self.rewards,
            "proportions": self.proportions,
            "exploration": self.exploration,
            "loss_sums": self.loss_sums,
            "tokens": self.tokens,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            BadInput: the checkpoint's rewards were made in the other way.
        """
        made = str(state.get("averaging", "moving"))
        if made != self.averaging:
            raise BadInput(
                f"odm: the checkpoint's rewards were made with averaging {made}, this run has "
                f"{self.averaging}. Set component_params.averaging: {made}, or start a new run."
            )
        self.rewards = np.asarray(state["rewards"], dtype=np.float64)
        self.proportions = np.asarray(state["proportions"], dtype=np.float64)
        self.exploration = float(state["exploration"])
        self.loss_sums = np.asarray(state["loss_sums"], dtype=np.float64)
        self.tokens = np.asarray(state["tokens"], dtype=np.float64)
