"""Target features of rewarded responses: sum of what each was worth times its own gradient.

For one target row with responses y_1 ... y_K to prompt x, rewards r_k and a baseline, the feature
is that of (1/K) * sum_k a_k * grad(-log p(y_k | x)), the descent direction of the expected reward's
negative (NICE). a_k is r_k, or r_k minus the mean of the row's other rewards (leave one out).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dataflex.rewards.base import Answered, Verdict, shortened
from dataflex.rewards.responses import Sampled
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from gradstore.export.combined import WeightedRow

Baseline = Literal["loo", "none"]

_log = logging.getLogger(__name__)


def advantages(rewards: npt.NDArray[np.float64], baseline: Baseline) -> npt.NDArray[np.float64]:
    """(K,) rewards -> (K,) what each response counts; equal rewards count exactly 0 under `loo`.

    Args:
        rewards: of one target row's responses; at least two for `loo`.
        baseline: `loo` subtracts the mean of the row's other rewards, `none` nothing.
    """
    if baseline == "none" or not len(rewards):
        return rewards
    if np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return np.asarray(rewards - others)


def check_scored(verdicts: Sequence[Verdict], most: float) -> int:
    """How many responses have no score.

    Raises:
        BadInput: more than the share `most`; tells what the judge said instead.
    """
    missing = [v for v in verdicts if math.isnan(v.reward)]
    if len(missing) > most * len(verdicts):
        ((said, _),) = Counter(shortened(v.said) for v in missing).most_common(1)
        raise BadInput(
            f"{len(missing)} of {len(verdicts)} responses got no score from 0 to 1; the judge "
            f"said {said!r}, for example. Choose another judge or other reward prompts, or raise "
            f"max_unscored, which is {most:g}."
        )
    return len(missing)


@dataclass(frozen=True)
class Rewarded:
    """One target row.

    Attributes:
        sampled: its prompt and K responses; none where it has no prompt.
        rewards: (K,) float64, 0 to 1.
    """

    sampled: Sampled
    rewards: npt.NDArray[np.float64]

    def weights(self, baseline: Baseline) -> npt.NDArray[np.float64]:
        """(K,) what each response's gradient is multiplied by."""
        return advantages(self.rewards, baseline) / max(1, len(self.rewards))


def answers_of(sampled: Sampled) -> list[Answered]:
    """What a judge is asked about one target row."""
    return [Answered(sampled.prompt_text, text, sampled.reference_text) for text in sampled.texts]


class RewardedTargets:
    """Target features of one model state.

    Attributes:
        sets: target set -> its rows.
        options: what the features depend on, recorded with them.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Rewarded]],
        *,
        baseline: Baseline,
        gold_fallback: bool,
        options: Mapping[str, Any],
    ) -> None:
        """Refuse a set in which no reward says anything.

        Raises:
            BadInput: such a set; names the way out.
        """
        self.sets = sets
        self.options = {**options, "baseline": baseline, "gold_fallback": gold_fallback}
        self._baseline = baseline
        self._gold = gold_fallback
        for name, rows in sets.items():
            if not gold_fallback and not any(self._has_signal(row) for row in rows):
                raise BadInput(
                    f"target set {name!r}: the rewards carry no signal. Of every row's responses "
                    f"{'all were rewarded alike' if baseline == 'loo' else 'none was rewarded'} "
                    f"(mean reward {self.numbers['reward_mean']:.3g}). Raise mc_samples or "
                    "generation_temperature, take a finer reward, or set gold_fallback: true."
                )

    @cached_property
    def numbers(self) -> dict[str, float]:
        """What a log wants to know."""
        rows = [row for held in self.sets.values() for row in held if row.sampled.responses]
        rewards = np.concatenate([row.rewards for row in rows])
        tokens = [len(ids) for row in rows for ids in row.sampled.responses]
        return {
            "reward_mean": float(rewards.mean()),
            "reward_spread": float(np.mean([row.rewards.std() for row in rows])),
            "rows_without_signal": float(sum(not self._has_signal(row) for row in rows)),
            "response_tokens_mean": float(np.mean(tokens)),
        }

    def weighted(self, name: str, positions: Sequence[int]) -> list[WeightedRow]:
        """Some rows of a target set as sums of gradients."""
        return [self._weighted(i, self.sets[name][i]) for i in positions]

    def _weighted(self, position: int, row: Rewarded) -> WeightedRow:
        from gradstore.export.combined import WeightedRow

        pairs = [
            (ids, weight)
            for ids, weight in zip(
                row.sampled.responses, row.weights(self._baseline).tolist(), strict=True
            )
            if weight
        ]
        if not pairs and self._gold and row.sampled.responses:
            pairs = [(row.sampled.reference, 1.0)]
        sequences = [row.sampled.row(ids) for ids, _ in pairs]
        return WeightedRow(
            position,
            sequences,
            [weight for _, weight in pairs],
            [len(sequence["input_ids"]) for sequence in sequences],
            sum(len(ids) for ids in row.sampled.responses),
        )

    def _has_signal(self, row: Rewarded) -> bool:
        return bool(row.weights(self._baseline).any())
