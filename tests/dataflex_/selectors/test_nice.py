"""NICE: rewards become advantages, advantages weights of gradients; what carries no signal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.presets import resolve
from dataflex.rewards.base import Verdict
from dataflex.rewards.function import FunctionJudge
from dataflex.rewards.local import LocalJudge
from dataflex.rewards.policy_gradient import (
    RewardedResponses,
    RewardedTargets,
    advantages,
    check_scored,
)
from dataflex.rewards.responses import SampledResponses
from dataflex.rewards.server import ApiJudge
from dataflex.selectors.nice import NiceSelector
from gradstore.errors import BadInput

#: E16's gradients of -log p of three responses, and their rewards.
GRADIENTS, REWARDS = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([1.0, 0.2, 0.0])


def row(rewards: list[float], tokens: int = 2) -> RewardedResponses:
    responses = tuple([10 + k] * tokens for k in range(len(rewards)))
    return RewardedResponses(SampledResponses([1, 2], responses, [7, 8, 9]), np.array(rewards))


def targets(*rows: RewardedResponses, baseline: Any = "loo", gold: bool = False) -> RewardedTargets:
    return RewardedTargets({"t": rows}, baseline=baseline, gold_fallback=gold, options={})


def test_e16_plain_rewards() -> None:
    feature = row(REWARDS.tolist()).weights("none") @ GRADIENTS
    assert feature == pytest.approx([0.333333, 0.066667], abs=1e-5)


def test_e16_leave_one_out() -> None:
    assert advantages(REWARDS, "loo") == pytest.approx([0.9, -0.3, -0.6], abs=1e-5)
    feature = row(REWARDS.tolist()).weights("loo") @ GRADIENTS
    assert feature == pytest.approx([0.1, -0.3], abs=1e-5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0, 1))
def test_leave_one_out_sums_to_zero_and_ignores_a_shift(rewards: list[float], by: float) -> None:
    found = advantages(np.array(rewards), "loo")
    assert abs(found.sum()) < 1e-9
    assert found == pytest.approx(advantages(np.array(rewards) + by, "loo"), abs=1e-9)
    if len(set(rewards)) == 1:
        assert not found.any()


def test_equal_rewards_say_exactly_nothing_whatever_their_sum_rounds_to() -> None:
    assert not advantages(np.array([0.1, 0.1, 0.1]), "loo").any()


def test_sequences_are_prompt_and_response_with_their_weights() -> None:
    found = targets(row([1.0, 0.0, 0.5], tokens=3)).weighted("t", [0])[0]
    assert [s["input_ids"] for s in found.sequences] == [[1, 2, 10, 10, 10], [1, 2, 11, 11, 11]]
    assert [s["labels"][:2] for s in found.sequences] == [[-100, -100]] * 2
    assert found.weights == pytest.approx([0.25, -0.25])  # (0.75, -0.75, 0) / 3
    assert (found.lengths, found.tokens) == ([5, 5], 9)


def test_rows_without_a_signal_or_a_prompt_add_nothing() -> None:
    silent, empty = row([0.5, 0.5]), RewardedResponses(SampledResponses([], (), []), np.empty(0))
    held = targets(row([1.0, 0.0]), silent, empty)
    assert held.numbers["rows_without_signal"] == 1
    assert held.numbers["reward_mean"] == 0.5
    found = held.weighted("t", [1, 2])
    assert [w.sequences for w in found] == [[], []]
    assert [w.tokens for w in found] == [4, 0]


def test_a_silent_row_can_fall_back_on_its_own_answer() -> None:
    found = targets(row([0.5, 0.5]), gold=True).weighted("t", [0])[0]
    assert [s["input_ids"] for s in found.sequences] == [[1, 2, 7, 8, 9]]
    assert found.weights == [1.0]


@pytest.mark.parametrize(("baseline", "reward"), [("loo", 1.0), ("none", 0.0)])
def test_a_set_in_which_no_reward_says_anything_is_refused(baseline: Any, reward: float) -> None:
    with pytest.raises(BadInput, match="target set 't': the rewards carry no signal"):
        targets(row([reward, reward]), baseline=baseline)


def test_responses_without_a_score_count_0_until_they_are_too_many() -> None:
    scored = [Verdict(0.5)] * 9
    assert check_scored([*scored, Verdict(math.nan, "hm")], 0.1) == 1
    with pytest.raises(BadInput, match=r"2 of 11 responses got no score .* answered 'hm'"):
        check_scored([*scored, *[Verdict(math.nan, " hm\n")] * 2], 0.1)


def test_the_preset_can_be_built_and_the_backend_follows_from_what_is_given() -> None:
    built: Any = resolve("dynamic_select", "nice", {}).build()
    assert isinstance(built.judge, FunctionJudge)
    assert not built.judge.faults()
    assert (built.sampling.mc_samples, built.sampling.seed) == (4, 123)
    assert isinstance(NiceSelector(reward_model_path="x").judge, LocalJudge)
    assert isinstance(NiceSelector(api_base_url="http://x").judge, ApiJudge)
    both = NiceSelector(reward_backend="function", reward_model_path="x")
    assert isinstance(both.judge, FunctionJudge)


def test_a_judge_may_be_named_as_in_1_1_0() -> None:
    url = "http://127.0.0.1:1/v1/chat/completions"
    held = {"api": {"api_url": url, "api_key": "KEY", "model_name": "m", "temperature": 0.0},
            "local_vllm": {"hf_model_name_or_path": "x", "vllm_top_k": 4}}  # fmt: skip
    api: Any = NiceSelector(reward_model_backend="api", reward_backend_params=held).judge
    assert api.settings.base_url == "http://127.0.0.1:1/v1"
    assert (api.settings.key_env, api.settings.model) == ("KEY", "m")
    local: Any = NiceSelector(reward_model_backend="local_vllm", reward_backend_params=held).judge
    assert local.path == "x"
    with pytest.raises(ValueError, match=r"'api_ur' \(did you mean 'api_url'"):
        NiceSelector(reward_model_backend="api", reward_backend_params={"api": {"api_ur": "x"}})
    with pytest.raises(ValueError, match="reward_model_backend: 'vllm'"):
        NiceSelector(reward_model_backend="vllm")


@pytest.mark.parametrize(
    ("params", "says"),
    [({"mc_samples": 1}, "baseline: loo compares"), ({"baseline": "mean"}, "baseline is 'mean'"),
     ({"reward_backend": "vllm"}, "reward_backend is 'vllm'"), ({"max_unscored": 2}, "from 0 to 1"),
     ({"reward_max_new_tokens": 0}, "reward_max_new_tokens is 0"),
     ({"mc_samples": 0}, "mc_samples is 0"), ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
     ({"generation_temperature": 0}, "generation_temperature is 0; it must be above 0"),
     ({"api_timeout": 0}, "api_timeout is 0"), ({"api_retries": -1}, "api_retries is -1"),
     ({"api_workers": 0}, "api_workers is 0")],
)  # fmt: skip
def test_parameters_that_cannot_work_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NiceSelector(**params)
