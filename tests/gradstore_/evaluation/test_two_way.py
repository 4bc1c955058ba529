"""Intervals over queries and models: scipy on what is drawn, known spreads, pairs, groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr

from gradstore.errors import BadInput
from gradstore.evaluation import (
    Resamples,
    draw_subsets,
    lds,
    query_loss_difference,
    resampled,
    resampled_lds,
    resampled_qld,
)

RNG = np.random.default_rng(5)
SCORES, SUBSETS = RNG.normal(size=(6, 30)), draw_subsets(30, 14, 0.5)
#: Rounded, so that some models have the same loss.
LOSSES = np.round(RNG.normal(size=(14, 6)), 1)


def test_a_resamples_lds_is_scipys_on_the_queries_and_models_that_it_drew() -> None:
    drawn = Resamples.draw(6, 14, count=5, seed=1)
    sums = np.stack([SCORES[:, mask].sum(axis=1) for mask in SUBSETS])
    expected = []
    for queries, models in zip(drawn.queries.astype(int), drawn.models.astype(int), strict=True):
        took = np.repeat(np.arange(14), models)
        each = [spearmanr(sums[took, q], -LOSSES[took, q]).statistic for q in range(6)]
        expected.append(np.repeat(each, queries).mean())
    found = resampled_lds(SCORES, LOSSES, SUBSETS, drawn)
    np.testing.assert_allclose(found.means, expected)
    assert found.estimate().values == lds(SCORES, LOSSES, SUBSETS).values


def test_models_that_all_queries_share_widen_the_interval() -> None:
    """Queries that are one query told twenty times: Spearman's of 100 models has 1 / sqrt(99)."""
    scores = np.tile(RNG.normal(size=(1, 50)), (20, 1))
    losses = np.tile(RNG.normal(size=(100, 1)), (1, 20))
    subsets = draw_subsets(50, 100, 0.5)
    alone = lds(scores, losses, subsets)
    both = resampled_lds(scores, losses, subsets, Resamples.draw(20, 100)).estimate()
    assert alone.low == pytest.approx(alone.high)
    assert both.mean == pytest.approx(alone.mean)
    assert both.low is not None
    assert both.high is not None
    assert both.high - both.low == pytest.approx(2 * 1.96 / 99**0.5, rel=0.15)


def test_queries_of_a_group_are_drawn_together() -> None:
    drawn = Resamples.draw(6, 3, groups=["a", "b", "a", "c", "b", "b"], count=50)
    np.testing.assert_array_equal(drawn.queries[:, 0], drawn.queries[:, 2])
    np.testing.assert_array_equal(drawn.queries[:, 1], drawn.queries[:, 4])
    assert (drawn.queries[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert (drawn.models.sum(axis=1) == 3).all()


def test_groups_that_are_alike_within_widen_the_interval() -> None:
    values = np.repeat(RNG.normal(size=8), 4)
    alone = resampled(values, Resamples.draw(32, 1)).estimate()
    grouped = resampled(values, Resamples.draw(32, 1, groups=np.repeat(range(8), 4))).estimate()
    wide, narrow = (each.high - each.low for each in (grouped, alone))  # type: ignore[operator]
    assert wide == pytest.approx(2 * narrow, rel=0.15)


def test_a_difference_is_paired_by_query_and_by_model() -> None:
    drawn = Resamples.draw(6, 14)
    one = resampled_lds(SCORES, LOSSES, SUBSETS, drawn)
    same = (one - resampled_lds(3 * SCORES, LOSSES, SUBSETS, drawn)).estimate()
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    near = resampled_lds(SCORES + RNG.normal(size=SCORES.shape) / 50, LOSSES, SUBSETS, drawn)
    apart = (one - near).estimate()
    assert apart.mean == pytest.approx(one.values.mean() - near.values.mean())
    widths = [each.estimate().high - each.estimate().low for each in (one - near, one)]  # type: ignore[operator]
    assert widths[0] < widths[1] / 2


def test_qld_is_resampled_over_queries_and_controls() -> None:
    removed, controls = RNG.normal(size=6), RNG.normal(size=(4, 6))
    drawn = Resamples.draw(6, 4, count=7)
    expected = [
        np.repeat(removed - np.repeat(controls, models, axis=0).mean(axis=0), queries).mean()
        for queries, models in zip(drawn.queries.astype(int), drawn.models.astype(int), strict=True)
    ]
    found = resampled_qld(removed, controls, drawn)
    np.testing.assert_allclose(found.means, expected)
    assert found.estimate().values == query_loss_difference(removed, controls).values


def test_the_same_seed_draws_the_same() -> None:
    one, other, third = (Resamples.draw(6, 14, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.models, other.models)
    assert (one.models != third.models).any()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Resamples.draw(3, 2, groups=[1, 2]), r"groups has shape \(2,\)"),
        (lambda: Resamples.draw(0, 2), "queries is 0"),
        (lambda: Resamples.draw(3, 2, count=0), "count is 0"),
        (lambda: resampled([1.0, 2.0], Resamples.draw(3, 2)), "of 3 queries, but there are 2"),
        (lambda: resampled_lds(SCORES, LOSSES, SUBSETS, Resamples.draw(6, 9)), "of 9 models"),
        (lambda: resampled_qld([1.0], [[1.0]], Resamples.draw(1, 2)), "of 2 models"),
        (lambda: resampled([1.0], Resamples.draw(1, 1)).estimate(1.0), "confidence is 1.0"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        call()


def test_no_resample_of_three_models_has_one_alone_which_has_no_order() -> None:
    """Else a score that orders them rightly would have 0 in its interval."""
    drawn = Resamples.draw(5, 3, count=2000)
    assert ((drawn.models > 0).sum(axis=1) >= 2).all()
    assert (drawn.models.sum(axis=1) == 3).all()
