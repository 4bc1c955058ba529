"""LDS, QLD and tail-patch: published values, scipy, worked numbers and invariants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gradstore.errors import BadInput
from gradstore.evaluation import (
    draw_subsets,
    estimate,
    lds,
    query_loss_difference,
    tail_patch,
    tail_patch_log,
    without_top,
)

SCORES = np.random.default_rng(1).normal(size=(5, 30))
SUBSETS = draw_subsets(30, 12, 0.5)


def test_lds_is_dattris_on_the_values_of_its_own_test() -> None:
    """Dattri correlates with a value that rises as scores do: a loss with its sign changed."""
    scores = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]])
    values = np.array([[0.3, 0.3], [0.4, 0.4], [0.5, 0.3]])
    subsets = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], dtype=bool)
    assert lds(scores, -values, subsets).values == pytest.approx((1.0, 0.8660254037844387))


def test_lds_is_scipys_spearman_of_summed_scores_and_the_fall_of_the_loss() -> None:
    losses = np.round(np.random.default_rng(2).normal(size=(12, 5)), 1)
    expected = [
        spearmanr([row[mask].sum() for mask in SUBSETS], -losses[:, query]).statistic
        for query, row in enumerate(SCORES)
    ]
    assert lds(SCORES, losses, SUBSETS).values == pytest.approx(expected)


def test_scores_that_add_up_to_the_fall_of_the_loss_have_an_lds_of_one() -> None:
    losses = 7 - SUBSETS @ SCORES.T
    assert lds(SCORES, losses, SUBSETS).mean == pytest.approx(1)
    assert lds(-SCORES, losses, SUBSETS).mean == pytest.approx(-1)


@given(st.lists(st.integers(-20, 20), min_size=4, max_size=9, unique=True))
def test_with_subsets_of_one_row_only_the_order_of_scores_counts(scores: list[int]) -> None:
    values = np.array([scores], dtype=float)
    losses = np.arange(len(scores), dtype=float)[:, None] ** 2
    single = np.eye(len(scores), dtype=bool)
    assert lds(np.exp(values / 4), losses, single) == lds(values, losses, single)


def test_scores_that_order_nothing_count_as_zero() -> None:
    assert lds(np.ones((5, 30)), 7 - SUBSETS @ SCORES.T, SUBSETS).values == (0.0,) * 5


def test_qld_subtracts_each_querys_mean_control() -> None:
    found = query_loss_difference([3.0, 2.0], [[2.0, 2.5], [2.5, 2.5]])
    assert found.values == (0.75, -0.5)


def test_tail_patch_is_the_mean_rise_over_the_top_rows() -> None:
    found = tail_patch([0.2, 0.5], [[0.4, 0.2], [0.5, 0.1]])
    assert found.values == pytest.approx((0.1, -0.2))


def test_tail_patch_in_nats_is_the_rise_above_that_of_random_rows() -> None:
    found = tail_patch_log([-4.0, -2.0], [[-3.0, -2.0], [-2.0, -2.5]], [[-4.0], [-1.0]])
    assert found.values == pytest.approx((1.5, -1.25))


def test_each_query_loses_its_own_top_rows() -> None:
    kept = without_top([[1.0, 2, 3, 4], [4.0, 3, 2, 1]], 0.5)
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_subsets_have_one_size_and_more_of_them_begin_with_the_fewer() -> None:
    more = draw_subsets(101, 9, 0.25, seed=3)
    assert set(more.sum(axis=1)) == {25}
    assert len(np.unique(more, axis=0)) == 9
    assert (draw_subsets(101, 4, 0.25, seed=3) == more[:4]).all()
    assert (draw_subsets(101, 4, 0.25, seed=4) != more[:4]).any()


def test_an_interval_holds_the_mean_repeats_and_narrows_with_more_queries() -> None:
    few = np.random.default_rng(0).normal(size=20)
    found = estimate(few)
    assert found == estimate(few)
    assert found.low < found.mean < found.high
    wide = found.high - found.low
    # Of a normal mean: 2 * 1.96 * s / sqrt(q).
    assert wide == pytest.approx(3.92 * few.std() / np.sqrt(20), rel=0.1)
    many = estimate(np.tile(few, 16))
    assert many.high - many.low == pytest.approx(wide / 4, rel=0.1)


def test_one_query_has_no_interval_and_equal_ones_an_empty_one() -> None:
    assert (estimate([0.5]).low, estimate([0.5]).high) == (None, None)
    assert (estimate([0.5, 0.5]).low, estimate([0.5, 0.5]).high) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lds(SCORES, np.ones((12, 4)), SUBSETS), r"losses are \(12, 4\)"),
        (lambda: lds(SCORES, np.ones((12, 5)), SUBSETS), "query 0 are the same"),
        (lambda: lds(SCORES, np.ones((2, 5)), SUBSETS[:2]), "at least 3"),
        (lambda: lds(SCORES, np.ones((12, 5)), SUBSETS[:, :9]), r"subsets has shape \(12, 9\)"),
        (lambda: lds(SCORES, np.full((12, 5), np.nan), SUBSETS), r"losses\[0, 0\] is nan"),
        (lambda: lds(SCORES, np.ones((12, 5)), SUBSETS * 1), "subsets holds int64"),
        (lambda: query_loss_difference([1.0], [[1.0, 2.0]]), "without_random has shape"),
        (lambda: query_loss_difference([np.inf], [[1.0]]), r"without_top\[0\] is inf"),
        (lambda: tail_patch([0.5], [[0.5], [0.5]]), "after has shape"),
        (lambda: tail_patch([2.5], [[0.5]]), "before goes from 2.5"),
        (lambda: tail_patch_log([-1.0], [[-1.0]], [[-1.0], [-1.0]]), "random has shape"),
        (lambda: tail_patch_log([-1.0], [[0.5]], [[-1.0]]), "after and before go up to 0.5"),
        (lambda: estimate([]), r"values has shape \(0,\)"),
        (lambda: estimate([1.0, 2.0], confidence=1.0), "confidence is 1.0"),
        (lambda: draw_subsets(4, 0), "subsets is 0"),
        (lambda: without_top(SCORES, 2.0), "fraction is 2.0"),
    ],
)
def test_input_that_does_not_fit_is_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        call()
