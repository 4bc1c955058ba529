"""The mixers static, random and odm: ALGORITHMS 2.2 and 2.4, E23."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import resolve
from dataflex.data.rows import RunData
from dataflex.mixers.base import DomainLosses
from dataflex.mixers.odm import OdmMixer
from dataflex.mixers.random import RandomMixer
from dataflex.mixers.static import StaticMixer
from dataflex.run.context import RunContext, UpdateContext
from gradstore.errors import BadInput

MakeData = Callable[..., RunData]


def config(**ours: Any) -> RunConfig:
    dataset = ours.pop("dataset", "a,b,c")
    return RunConfig(
        DataFlexConfig(train_type="dynamic_mix", **ours), {"dataset": dataset}, Path("run.yaml")
    )


def context(data: RunData, step: int, **ours: Any) -> UpdateContext:
    nothing: Any = None
    run = RunContext(config(**ours), data, nothing, nothing, Path("run"), "id", seed=0)
    return UpdateContext(run, step, update=1, updates=3, learning_rate=0.1, optimizer=None)


def losses(
    step: int, means: Sequence[float], tokens: Sequence[float] = (4.0, 4.0, 4.0)
) -> DomainLosses:
    """Sums such that each domain's mean token loss is the given one."""
    count = np.array(tokens)
    return DomainLosses(step, np.array(means) * count, count, count / 2)


# -- static and random ----------------------------------------------------------------------------


def test_static_answers_its_proportions_normalised_and_uniform_by_default(
    domain_data: MakeData,
) -> None:
    at = context(domain_data([3, 3, 3]), 0)
    np.testing.assert_allclose(StaticMixer([2, 1, 1]).mix(at), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(StaticMixer().mix(at), [1 / 3] * 3)


@pytest.mark.parametrize(
    ("proportions", "says"),
    [([0.5, 0.5], "expected 3 numbers"), ([1, 1, -1], ">= 0"), ([0, 0, 0], "positive sum")],
)
def test_static_refuses_bad_proportions_before_anything_is_loaded(
    proportions: list[float], says: str
) -> None:
    (fault,) = StaticMixer(proportions).check(config())
    assert says in fault
    assert StaticMixer().check(config(mixture_sample_rule="uniform")) == []
    (fault,) = StaticMixer([1, 1, 1]).check(config(mixture_sample_rule="uniform"))
    assert "fixes the mixture" in fault


def test_random_is_another_mixture_at_every_update_and_the_same_for_a_seed(
    domain_data: MakeData,
) -> None:
    data = domain_data([3, 3, 3])
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    answers = [RandomMixer(5).mix(context(data, step)) for step in (10, 20, 10)]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]
    np.testing.assert_array_equal(answers[0], answers[2])
    assert not np.allclose(answers[0], answers[1])
    assert not np.allclose(answers[0], RandomMixer(6).mix(context(data, 10)))
    assert all(p.sum() == pytest.approx(1.0) and (p > 0).all() for p in answers)


# -- odm ------------------------------------------------------------------------------------------


def started(data: RunData, **params: Any) -> OdmMixer:
    mixer = OdmMixer(**params)
    mixer.start(context(data, 0).run)
    return mixer


def test_e23_rewards_accumulate_and_proportions_follow_the_losses(domain_data: MakeData) -> None:
    """Every step an update, rows drawn as asked: R = t (.3, .2, .25)."""
    data = domain_data([5, 5, 5])
    mixer = started(data)
    expected = {
        1: [1 / 3] * 3,
        2: [1 / 3] * 3,
        3: [1 / 3] * 3,
        10: [0.347868, 0.319279, 0.332853],
        100: [0.419153, 0.255733, 0.325114],
        1000: [0.634675, 0.109867, 0.255458],
    }
    for step in range(1, 1001):
        count = 12.0 * mixer.proportions
        mixer.observe(DomainLosses(step - 1, np.array([3.0, 2.0, 2.5]) * count, count, count))
        answer = mixer.mix(context(data, step))
        np.testing.assert_allclose(mixer.rewards, step * np.array([0.3, 0.2, 0.25]), rtol=1e-9)
        if step in expected:
            np.testing.assert_allclose(answer, expected[step], atol=1e-5, err_msg=str(step))


def test_e23b_a_step_adds_its_share_of_rows_over_the_proportion(domain_data: MakeData) -> None:
    mixer = OdmMixer()
    mixer.start(context(domain_data([5, 5]), 0, init_mixture_proportions=(0.8, 0.2)).run)
    tokens = np.array([60.0, 14.0])
    mixer.observe(DomainLosses(0, np.array([2.0, 4.0]) * tokens, tokens, np.array([6.0, 2.0])))
    np.testing.assert_allclose(mixer.rewards, [0.1875, 0.5], atol=1e-12)


def test_steps_of_one_interval_add_up_and_its_length_sets_the_exploration(
    domain_data: MakeData,
) -> None:
    """Ten steps of uniform rows and one update give what E23 gives at t = 10."""
    data = domain_data([5, 5, 5])
    mixer = started(data)
    for step in range(10):
        mixer.observe(losses(step, (3.0, 2.0, 2.5)))
    answer = mixer.mix(context(data, 10))
    np.testing.assert_allclose(answer, [0.347868, 0.319279, 0.332853], atol=1e-5)


def test_a_checkpoint_of_averaged_rewards_is_not_gone_on_from_with_accumulated_ones(
    domain_data: MakeData,
) -> None:
    old = started(domain_data([5, 5, 5]), averaging="moving").state()
    del old["averaging"]  # as version 0.1.0 wrote it
    with pytest.raises(BadInput, match=r"component_params\.averaging: moving"):
        OdmMixer().restore(old)
    moving = OdmMixer(averaging="moving")
    moving.restore(old)
    assert (moving.reward_scale, OdmMixer().reward_scale) == (1.0, 0.1), "as each was by default"


def test_moving_rewards_and_proportions_of_three_updates(domain_data: MakeData) -> None:
    data = domain_data([5, 5, 5])
    mixer = started(data, averaging="moving", reward_scale=1.0)
    expected = {
        1: ([0.9, 0.6, 0.75], [1 / 3] * 3),
        2: ([1.71, 1.14, 1.425], [1 / 3] * 3),
        100: ([2.439, 1.626, 2.0325], [0.371019, 0.297310, 0.331671]),
    }
    for step, (rewards, proportions) in expected.items():
        mixer.observe(losses(step - 1, (3.0, 2.0, 2.5)))
        answer = mixer.mix(context(data, step))
        np.testing.assert_allclose(mixer.rewards, rewards, atol=1e-5)
        np.testing.assert_allclose(answer, proportions, atol=1e-5)
    assert mixer.exploration == pytest.approx(0.060515, abs=1e-5)


def test_odm_learns_from_the_whole_interval_and_forgets_it_afterwards(
    domain_data: MakeData,
) -> None:
    data = domain_data([5, 5, 5])
    mixer = started(data, averaging="moving", reward_scale=1.0)
    mixer.observe(losses(0, (9.0, 2.0, 2.0), (1.0, 1.0, 1.0)))
    mixer.observe(losses(1, (1.0, 2.0, 2.0), (3.0, 1.0, 1.0)))
    mixer.mix(context(data, 2))
    # (9 * 1 + 1 * 3) / 4 = 3, divided by 1/3, a tenth of it.
    np.testing.assert_allclose(mixer.rewards, [0.9, 0.6, 0.6])
    again = mixer.rewards.copy()
    held = mixer.mix(context(data, 4))
    np.testing.assert_array_equal(mixer.rewards, again, "nothing was trained on in between")
    np.testing.assert_array_equal(held, mixer.proportions)


def test_a_domain_that_was_not_seen_keeps_its_reward(domain_data: MakeData) -> None:
    data = domain_data([5, 5, 5])
    mixer = started(data, averaging="moving", reward_scale=1.0)
    mixer.observe(losses(0, (3.0, 2.0, 2.5)))
    mixer.mix(context(data, 1))
    mixer.observe(losses(1, (1.0, 0.0, math.nan), (4.0, 0.0, 4.0)))
    mixer.mix(context(data, 2))
    np.testing.assert_allclose(mixer.rewards, [0.81 + 0.3, 0.6, 0.75])


def test_the_floor_and_the_scale_arrive(domain_data: MakeData) -> None:
    """In 1.1.0 both were read from **kwargs and lost."""
    data = domain_data([5, 5, 5])

    def answer(**params: Any) -> np.ndarray[Any, Any]:
        mixer = started(data, **{"averaging": "moving", "reward_scale": 1.0, **params})
        for step in (1, 10_000):
            mixer.observe(losses(step - 1, (50.0, 1.0, 1.0)))
            mixer.mix(context(data, step))
        return mixer.proportions

    plain, floored = answer(min_exploration_rate=0.0), answer(min_exploration_rate=0.2)
    assert plain.min() < 0.04
    assert floored.min() >= 0.2
    assert answer(reward_scale=5.0)[0] > answer()[0] > 1 / 3


def test_odm_asked_at_the_first_step_answers_what_the_run_opens_with(
    domain_data: MakeData,
) -> None:
    data = domain_data([5, 5, 5])
    opening = {"init_mixture_proportions": (0.5, 0.3, 0.2)}
    mixer = OdmMixer()
    mixer.start(context(data, 0, **opening).run)
    np.testing.assert_allclose(mixer.mix(context(data, 0, **opening)), [0.5, 0.3, 0.2])
    own = started(data, initial_proportions=[2, 1, 1], averaging="moving", reward_scale=1.0)
    np.testing.assert_allclose(own.mix(context(data, 0)), [0.5, 0.25, 0.25])
    # What was trained on divides the reward.
    own.observe(losses(0, (3.0, 2.0, 2.5)))
    own.mix(context(data, 3))
    np.testing.assert_allclose(own.rewards, [0.6, 0.8, 1.0])


def test_odm_goes_on_from_its_state_in_mid_interval(domain_data: MakeData) -> None:
    data = domain_data([5, 5, 5])
    whole = started(data)
    for step in (1, 2, 3):
        whole.observe(losses(step - 1, (3.0, 2.0, 2.5 + step)))
        if step < 3:
            whole.mix(context(data, step))
    resumed = OdmMixer()
    resumed.restore(whole.state())
    resumed.start(context(data, 3).run)
    for mixer in (whole, resumed):
        mixer.observe(losses(3, (1.0, 2.0, 3.0)))
    np.testing.assert_array_equal(whole.mix(context(data, 4)), resumed.mix(context(data, 4)))
    np.testing.assert_array_equal(whole.rewards, resumed.rewards)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"averaging": "mean"}, "averaging is 'mean'"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"reward_scale": 0.0}, "reward_scale is 0.0"),
        ({"min_exploration_rate": -0.1}, "min_exploration_rate is -0.1"),
    ],
)
def test_odm_refuses_parameters_out_of_range(params: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        OdmMixer(**params)


def test_odm_refuses_what_the_number_of_domains_forbids() -> None:
    (fault,) = OdmMixer(min_exploration_rate=0.4).check(config())
    assert "with 3 domains it must be below 1/3" in fault
    (fault,) = OdmMixer(initial_proportions=[1, 1]).check(config())
    assert "initial_proportions" in fault
    assert OdmMixer(warmup_steps=2000, initial_proportions=[1, 1, 0]).check(config()) == []


# -- presets --------------------------------------------------------------------------------------


def test_presets_carry_the_names_of_1_1_0_and_a_users_class_may_take_their_place() -> None:
    built = {name: resolve("dynamic_mix", name, {}).build() for name in ("static", "random", "odm")}
    assert isinstance(built["static"], StaticMixer)
    assert isinstance(built["random"], RandomMixer)
    assert isinstance(built["odm"], OdmMixer)
    assert built["odm"].observes
    with pytest.raises(BadInput, match="custom needs component_params"):
        resolve("dynamic_mix", "custom", {}).build()
