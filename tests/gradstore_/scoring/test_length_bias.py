"""Length corrections: what follows the length goes, what does not follow it stays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress, spearmanr

from gradstore.errors import BadInput
from gradstore.scoring.length_bias import (
    CORRECTIONS,
    MOST_BINS,
    bins_of,
    length_correlation,
    without_length,
)

SEEDS = st.integers(0, 999)


def biased(seed: int, n: int = 400) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Scores of which the length explains a half, and lengths."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 200, n)
    return 1.0 - 0.2 * np.log(tokens) + 0.2 * generator.standard_normal(n), tokens


@given(SEEDS)
def test_the_correlation_is_spearmans(seed: int) -> None:
    scores, tokens = biased(seed)
    usable = np.random.default_rng(seed).random(400) < 0.9
    expected = spearmanr(scores[usable], tokens[usable]).statistic
    assert length_correlation(scores, tokens, usable=usable) == pytest.approx(expected)
    flat = np.ones(400, dtype=np.int64)
    assert length_correlation(scores, flat, usable=usable) == 0.0


@given(SEEDS)
def test_regression_leaves_what_a_line_over_the_log_of_the_length_does_not_explain(
    seed: int,
) -> None:
    scores, tokens = biased(seed)
    usable = np.random.default_rng(seed).random(400) < 0.9
    line = linregress(np.log(tokens[usable]), scores[usable])
    x = np.log(tokens) - np.log(tokens[usable]).mean()
    found = without_length(scores, tokens, "regression", usable=usable)
    assert np.allclose(found[usable], (scores - line.slope * x)[usable])
    assert np.isnan(found[~usable]).all()
    assert linregress(np.log(tokens[usable]), found[usable]).slope == pytest.approx(0, abs=1e-12)


@given(SEEDS)
def test_bins_take_the_same_share_of_every_length(seed: int) -> None:
    scores, tokens = biased(seed)
    every = np.ones(400, dtype=bool)
    found, bins = without_length(scores, tokens, "bins", usable=every), bins_of(tokens)
    best = np.argsort(-found)[:100]
    sizes, taken = np.bincount(bins), np.bincount(bins[best], minlength=bins.max() + 1)
    assert np.abs(taken / sizes - 0.25).max() <= 1 / sizes.min()
    for number in range(bins.max() + 1):
        mine = np.flatnonzero(bins == number)
        assert np.array_equal(np.argsort(found[mine]), np.argsort(scores[mine]))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=400))
def test_equal_lengths_share_a_bin_and_longer_rows_never_a_lower_one(lengths: list[int]) -> None:
    bins = bins_of(np.array(lengths))
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(bins[order]) >= 0).all()
    assert set(bins.tolist()) == set(range(bins.max() + 1))
    assert bins.max() < MOST_BINS
    for length in set(lengths):
        assert len(set(bins[np.array(lengths) == length].tolist())) == 1


@pytest.mark.parametrize("how", CORRECTIONS[1:])
def test_a_correlation_of_minus_a_half_is_gone(how: str) -> None:
    scores, tokens = biased(0)
    every = np.ones(400, dtype=bool)
    assert length_correlation(scores, tokens, usable=every) < -0.5
    corrected = without_length(scores, tokens, how, usable=every)
    assert abs(length_correlation(corrected, tokens, usable=every)) < 0.1


def test_none_changes_no_score_and_another_word_is_refused() -> None:
    scores, tokens = biased(1)
    every = np.ones(400, dtype=bool)
    assert np.array_equal(without_length(scores, tokens, "none", usable=every), scores)
    with pytest.raises(BadInput, match="length correction is 'log'; choose none or regression"):
        without_length(scores, tokens, "log", usable=every)


@pytest.mark.parametrize("how", CORRECTIONS)
def test_rows_of_one_length_keep_their_order(how: str) -> None:
    scores = np.array([0.3, 0.1, 0.2])
    found = without_length(scores, np.full(3, 5), how, usable=np.ones(3, dtype=bool))
    assert np.argsort(found).tolist() == [1, 2, 0]
