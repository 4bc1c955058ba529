"""The weighters against the worked numbers E25 to E28."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dataflex.trainers.weights import multipliers
from dataflex.weighters.adapt import AdaptWeighter, adapt_weights
from dataflex.weighters.base import MeasuredBatch, WeightContext
from dataflex.weighters.custom import CustomWeighter
from dataflex.weighters.joint_update_aware import (
    JointUpdateAwareWeighter,
    Objective,
    joint_weights,
)
from dataflex.weighters.loss import LossStrategy, LossWeighter, loss_weights
from gradstore.capture.losses import Targets
from gradstore.errors import BadInput

LOSSES = np.array([1.0, 2.0, 3.0, 4.0])


def context(n: int, measured: np.ndarray | None = None) -> WeightContext:
    return WeightContext(cast("Any", None), 0, np.full(n, 5), measured=measured)


# -- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected", "loss"),
    [
        ("linupper", [0.119271, 0.232307, 0.324211, 0.324211], 2.853363),
        ("quadratic", [0.145670, 0.354330, 0.354330, 0.145670], 2.5),
        ("extremes", [0.330378, 0.169622, 0.169622, 0.330378], 2.5),
        ("linear", [0.070769, 0.137839, 0.268474, 0.522917], 3.243540),
        ("uniform", [0.25, 0.25, 0.25, 0.25], 2.5),
    ],
)
def test_e25_weights_and_loss(strategy: LossStrategy, expected: list[float], loss: float) -> None:
    found = LossWeighter(strategy).weights(LOSSES, context(4))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    each = multipliers(found, np.full(4, 5), relative=True)
    assert (each * LOSSES).mean() == pytest.approx(loss, abs=1e-5)


def test_a_sample_without_a_finite_loss_weighs_nothing_and_changes_nothing() -> None:
    found = loss_weights(np.array([1.0, np.nan, 2.0, 3.0, np.inf, 4.0]), "linupper", 1.0, 1.0)
    np.testing.assert_array_equal(found[[1, 4]], 0)
    np.testing.assert_array_equal(found[[0, 2, 3, 5]], loss_weights(LOSSES, "linupper", 1.0, 1.0))
    assert not loss_weights(np.array([np.nan, np.nan]), "linear", 1.0, 1.0).any()


def test_a_larger_temperature_is_more_even() -> None:
    spread = [np.ptp(loss_weights(LOSSES, "linear", 1.0, r)) for r in (0.1, 1.0, 10.0)]
    assert spread[0] > spread[1] > spread[2] > 0


@given(arrays(np.float64, st.integers(1, 9), elements=st.floats(0, 50)), st.floats(0.1, 5))
def test_weights_sum_to_1_whatever_the_losses(losses: np.ndarray, delta: float) -> None:
    for strategy in ("linupper", "quadratic", "extremes", "linear", "uniform"):
        found = loss_weights(losses, cast("Any", strategy), delta, 0.5)
        assert found.sum() == pytest.approx(1.0)
        assert (found > 0).all()


# -- adapt ----------------------------------------------------------------------------------------


def adapt_at(mean: list[float], **params: Any) -> AdaptWeighter:
    weighter = AdaptWeighter(**params)
    weighter.restore({"mean": np.array(mean), "looked": 0})
    return weighter


def measured_batch(hidden: torch.Tensor, mask: torch.Tensor) -> MeasuredBatch:
    labels = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {"attention_mask": mask, "labels": labels}
    targets = Targets.of(inputs)
    return MeasuredBatch(inputs, targets, torch.zeros(len(targets.rows)), hidden)


STATES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (0, 3)])
def test_e26_the_embedding_is_the_same_with_padding(left: int, right: int) -> None:
    noise = torch.full((left + right, 2), 7.0)
    hidden = torch.cat([noise[:left], STATES, noise[left:]])[None]
    mask = torch.tensor([[0] * left + [1] * 3 + [0] * right])
    for mean, cosine in (([1.0, 0.0], 0.624695), ([0.0, 1.0], 0.780869)):
        found = adapt_at(mean).measure(measured_batch(hidden, mask))
        np.testing.assert_allclose(found, [[cosine]], atol=1e-5)


def test_e26_weights_and_losses() -> None:
    cosines = np.array([[1.0, 0.0], [0.6, 0.8]]) @ np.array([0.5, 0.5])
    np.testing.assert_allclose(cosines, [0.5, 0.7])
    losses, tokens = np.array([2.0, 1.0]), np.array([4, 4])
    weights = AdaptWeighter().weights(losses, context(2, cosines[:, None]))
    np.testing.assert_allclose(weights, [0.622459, 0.668188], atol=1e-5)
    cold = AdaptWeighter(tau=0.1).weights(losses, context(2, cosines[:, None]))
    np.testing.assert_allclose(cold, [0.993307, 0.999089], atol=1e-5)
    assert AdaptWeighter().relative is False
    assert AdaptWeighter(self_normalize=True).relative is True
    for relative, loss in ((False, 0.956553), (True, 1.482285)):
        each = multipliers(weights, tokens, relative=relative)
        assert (each * losses).mean() == pytest.approx(loss, abs=1e-5)


def test_clip_is_the_largest_weight_and_a_tiny_tau_overflows_nowhere() -> None:
    np.testing.assert_allclose(adapt_weights(np.array([0.5, 0.7]), 0.1, 0.995), [0.993307, 0.995],
                               atol=1e-5)  # fmt: skip
    np.testing.assert_array_equal(adapt_weights(np.array([-1.0, 1.0]), 1e-9, None), [0.0, 1.0])


def test_an_embedding_shorter_than_eps_is_not_blown_up() -> None:
    hidden = STATES[None] * 1e-6
    batch = measured_batch(hidden, torch.ones(1, 3, dtype=torch.long))
    assert adapt_at([1.0, 0.0], eps=1.0).measure(batch).item() < 1e-5
    assert adapt_at([1.0, 0.0]).measure(batch).item() == pytest.approx(0.624695, abs=1e-5)


# -- joint_update_aware ---------------------------------------------------------------------------

Z = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
U = np.array([0.8, 0.6])


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.1, [0.040763, 0.479619, 0.479619]), (1.0, [0.307437, 0.346282, 0.346282])],
    ids=["e27", "e28"],
)
@pytest.mark.parametrize("damping", [1.0, 0.3])
def test_e27_e28_the_fixed_point(beta: float, expected: list[float], damping: float) -> None:
    weighter = JointUpdateAwareWeighter(beta=beta, damping=damping)
    weighter.restore({"mean": 0.37 * U, "looked": 0})
    np.testing.assert_allclose(weighter.weights(np.ones(3), context(3, Z)), expected, atol=1e-5)


@given(st.integers(0, 10_000), st.sampled_from([0.003, 0.05, 1.0]), st.sampled_from([0.1, 1, 10]))
@example(154, 0.003, 1)  # Newton's method alone ends in another corner
@example(1107, 0.003, 1)
def test_the_answer_is_a_fixed_point_where_undamped_steps_oscillate(
    seed: int, tau: float, beta: float
) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(int(rng.integers(1, 24)), 6)) + rng.normal(size=6)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    u = rng.normal(size=6)
    s, g = z @ (u / np.linalg.norm(u)), z @ z.T
    w = joint_weights(s, g, beta, tau)
    odds = (s - beta * g @ w) / tau
    again = np.exp(odds - odds.max())
    assert np.abs(again / again.sum() - w).max() < 1e-6
    assert w.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("align_only", np.exp(Z @ U / 0.5) / np.exp(Z @ U / 0.5).sum()),
    ],
)
def test_objective_modes_drop_their_term(mode: Objective, expected: Any) -> None:
    np.testing.assert_allclose(joint_weights(Z @ U, Z @ Z.T, 1.0, 0.5, mode=mode), expected)


def test_diverse_only_prefers_the_sample_unlike_the_others() -> None:
    w = joint_weights(Z @ U, Z @ Z.T, 1.0, 0.1, mode="diverse_only")
    assert w[0] > w[1] == pytest.approx(w[2])
    np.testing.assert_array_equal(w, joint_weights(0 * U[[0, 0, 0]], Z @ Z.T, 1.0, 0.1))


def test_samples_without_a_finite_loss_are_left_out_of_the_simplex() -> None:
    weighter = JointUpdateAwareWeighter(beta=1.0)
    weighter.restore({"mean": U, "looked": 0})
    z = np.insert(Z, 1, [[0.0, 1.0]], axis=0)
    found = weighter.weights(np.array([1.0, np.nan, 2.0, 3.0]), context(4, z))
    np.testing.assert_allclose(found, [0.307437, 0, 0.346282, 0.346282], atol=1e-5)
    assert not weighter.weights(np.array([np.nan]), context(1, z[:1])).any()


@pytest.mark.parametrize(("left", "right"), [(0, 2), (3, 0)])
def test_last_token_and_mean_ignore_padding_on_either_side(left: int, right: int) -> None:
    noise = torch.full((left + right, 2), 7.0)
    hidden = torch.cat([noise[:left], STATES, noise[left:]])[None]
    mask = torch.tensor([[0] * left + [1] * 3 + [0] * right])
    batch = measured_batch(hidden, mask)
    for pooling, raw in (("last_token", [1.0, 1.0]), ("mean_pool", [2 / 3, 2 / 3])):
        params: dict[str, Any] = {"pooling": pooling}
        found = JointUpdateAwareWeighter(**params).measure(batch)
        np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], atol=1e-6)
        found = JointUpdateAwareWeighter(**params, embed_normalize=False).measure(batch)
        np.testing.assert_allclose(found, [raw], atol=1e-6)


# -- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "params", "says"),
    [
        (LossWeighter, {"strategy": "upper"}, "strategy is 'upper'; choose linupper, quadratic"),
        (LossWeighter, {"delta": 0}, "delta is 0"),
        (LossWeighter, {"r": -1}, "r is -1"),
        (AdaptWeighter, {"tau": 0}, "tau is 0; it must be above 0"),
        (AdaptWeighter, {"clip": 0.0}, "clip is 0"),
        (AdaptWeighter, {"eps": float("nan")}, "eps is nan"),
        (AdaptWeighter, {"refresh_interval": 0}, "refresh_interval is 0"),
        (AdaptWeighter, {"anchor_batch_size": 0}, "anchor_batch_size is 0"),
        (JointUpdateAwareWeighter, {"tau": 0}, "tau is 0"),
        (JointUpdateAwareWeighter, {"beta": -0.1}, "beta is -0.1"),
        (JointUpdateAwareWeighter, {"damping": 0}, "damping is 0"),
        (JointUpdateAwareWeighter, {"damping": 1.5}, r"damping is 1.5; it must be above 0 and at"),
        (JointUpdateAwareWeighter, {"fixed_point_iters": 0}, "fixed_point_iters is 0"),
        (JointUpdateAwareWeighter, {"target_update_step": 0}, "target_update_step is 0"),
        (
            JointUpdateAwareWeighter,
            {"pooling": "cls"},
            "pooling is 'cls'; choose last_token or",
        ),
        (JointUpdateAwareWeighter, {"objective_mode": "both"}, "objective_mode is 'both'"),
    ],
)
def test_a_parameter_out_of_range_is_named(cls: Any, params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cls(**params)


def test_custom_needs_a_class_of_the_users() -> None:
    with pytest.raises(BadInput, match=r"target: package\.module:Class"):
        CustomWeighter()
