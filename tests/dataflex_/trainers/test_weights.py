"""What weights mean for the loss: one denominator, whatever the cut into micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.run.log import as_json
from dataflex.trainers.weights import multipliers, summary

SAMPLES = st.lists(
    st.tuples(st.floats(0, 1e3), st.integers(0, 50), st.floats(0, 20)), min_size=1, max_size=12
)


def loss_of(each: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> float:
    return float((each * tokens * losses).sum() / tokens.sum())


def test_e4_equal_weights_give_the_mean_of_all_samples() -> None:
    tokens, losses = np.array([7, 7, 7]), np.array([1.0, 3.0, 5.0])
    assert loss_of(multipliers(np.ones(3), tokens, relative=True), tokens, losses) == 3.0
    assert loss_of(multipliers(np.full(3, 0.2), tokens, relative=True), tokens, losses) == (
        pytest.approx(3.0, abs=1e-12)
    )


@given(SAMPLES)
def test_relative_weights_are_a_weighted_mean_over_tokens(
    samples: list[tuple[float, int, float]],
) -> None:
    weights, tokens, losses = map(np.array, zip(*samples, strict=True))
    each = multipliers(weights, tokens, relative=True)
    if not (weights * tokens).any():
        assert not each.any()
        return
    share = weights / weights[tokens > 0].max() * tokens
    expected = (share * losses).sum() / share.sum()
    assert loss_of(each, tokens, losses) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(each, multipliers(weights * 8, tokens, relative=True), rtol=1e-12)


def test_absolute_weights_stay_as_they_are() -> None:
    weights = np.array([0.5, 0.25])
    np.testing.assert_array_equal(multipliers(weights, np.array([3, 9]), relative=False), weights)


def test_a_chunk_keeps_its_share_of_the_step() -> None:
    """Two micro-batches weighted apart: each has the tokens it has in the plain loss."""
    tokens = np.array([2, 4, 6, 8])
    each = np.concatenate([
        multipliers(np.array([9.0, 1.0]), tokens[:2], relative=True),
        multipliers(np.array([0.0, 3.0]), tokens[2:], relative=True),
    ])  # fmt: skip
    assert (each * tokens)[:2].sum() == pytest.approx(6)
    assert (each * tokens)[2:].sum() == pytest.approx(14)


def test_the_summary_tells_range_and_effective_share() -> None:
    found = summary(np.array([0.0, 2.0, 2.0, 0.0]))
    assert found == {
        "weight_min": 0.0, "weight_mean": 1.0, "weight_max": 2.0, "effective_share": 0.5
    }  # fmt: skip
    assert summary(np.ones(3))["effective_share"] == pytest.approx(1.0)
    assert summary(np.zeros(3))["effective_share"] == 0.0
    assert summary(np.empty(0)) == {}


def test_json_has_finite_numbers_alone() -> None:
    assert as_json({"a": 1, "b": float("nan"), "c": float("inf")}) == {"a": 1.0}
