"""The choice of a step's rows against brute force over all rows, and over all sets of rows."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.scoring.joint_choice import choose_jointly, relative_products


def value(s: np.ndarray, g: np.ndarray, rows: list[int], k: int, redundancy: float) -> float:
    """The value of a set: mean product, less half the squared length of the mean gradient."""
    mean = g[rows].sum(axis=0) / k
    return float(s[rows].sum() / k - redundancy / 2 * mean @ mean)


def greedy(s: np.ndarray, g: np.ndarray, k: int, redundancy: float) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        left = [row for row in range(len(s)) if row not in chosen]
        gains = [round(value(s, g, [*chosen, row], k, redundancy), 12) for row in left]
        chosen.append(left[int(np.argmax(gains))])
    return chosen


def gradients(seed: int, n: int = 9, p: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, p)), random.normal(size=p)


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0, 5.0]))
def test_rows_are_chosen_as_brute_force_chooses_them(seed: int, k: int, redundancy: float) -> None:
    g, d = gradients(seed)
    found = choose_jointly(g @ d, g @ g.T, k, redundancy)
    assert found.tolist() == greedy(g @ d, g, k, redundancy)


def test_greedy_comes_near_the_best_set_there_is() -> None:
    shares = []
    for seed in range(20):
        g, d = gradients(seed)
        values = [value(g @ d, g, list(rows), 3, 1.0) for rows in combinations(range(9), 3)]
        reached = value(g @ d, g, choose_jointly(g @ d, g @ g.T, 3, 1.0).tolist(), 3, 1.0)
        shares.append((reached - np.mean(values)) / (max(values) - np.mean(values)))
    assert np.mean(shares) > 0.95


def test_with_relative_products_and_redundancy_1_the_mean_gradient_is_nearest_the_direction() -> (
    None
):
    g, d = gradients(3)
    s, among = relative_products(g @ d, g @ g.T, float(np.linalg.norm(d)))
    scaled, unit = g / np.sqrt((g**2).sum(axis=1).mean()), d / np.linalg.norm(d)
    for rows in combinations(range(9), 3):
        near = -(np.linalg.norm(scaled[list(rows)].mean(axis=0) - unit) ** 2 - 1) / 2
        pairs = among[np.ix_(rows, rows)].sum() / 9
        assert s[list(rows)].mean() - pairs / 2 == pytest.approx(near)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_relative_products_do_not_depend_on_the_scale_of_gradients(scale: float) -> None:
    g, d = gradients(1)
    for cosine in (False, True):
        plain = relative_products(g @ d, g @ g.T, float(np.linalg.norm(d)), cosine=cosine)
        scaled = relative_products(
            scale * g @ d, scale**2 * g @ g.T, float(np.linalg.norm(d)), cosine=cosine
        )
        for one, other in zip(plain, scaled, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
        assert np.diagonal(plain[1]).mean() == pytest.approx(1)
    lengths = np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(plain[0], g @ d / lengths / np.linalg.norm(d))


def test_rows_that_are_not_finite_or_zero_are_no_rivals() -> None:
    g, d = gradients(2)
    g[1], g[4] = np.nan, 0.0
    for cosine in (False, True):
        s, among = relative_products(g @ d, g @ g.T, float(np.linalg.norm(d)), cosine=cosine)
        assert np.flatnonzero(np.isnan(s)).tolist() == [1]
        assert s[4] == 0
        assert np.isfinite(among).all()
        assert sorted(choose_jointly(s, among, 9, 1.0).tolist()) == [0, 2, 3, 4, 5, 6, 7, 8]
    s, _ = relative_products(np.array([1.0, 2.0]), np.eye(2), 0.0)
    assert s.tolist() == [0, 0], "a target whose gradient is zero says nothing"


def test_ties_go_to_the_lower_row() -> None:
    assert choose_jointly(np.ones(4), np.eye(4), 2, 1.0).tolist() == [0, 1]


def test_gumbel_noise_draws_by_the_softmax_of_the_products() -> None:
    s, temperature = np.array([1.0, 0.5, 0.0, -1.0]), 0.7
    random = np.random.default_rng(0)
    first = [choose_jointly(s, np.eye(4), 2, 0.0, temperature * random.gumbel(size=4))[0]
             for _ in range(20_000)]  # fmt: skip
    expected = np.exp(s / temperature) / np.exp(s / temperature).sum()
    np.testing.assert_allclose(np.bincount(first, minlength=4) / 20_000, expected, atol=0.015)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(BadInput, match="k is 0"):
        choose_jointly(np.ones(2), np.eye(2), 0, 0.0)
    with pytest.raises(BadInput, match="redundancy is -1"):
        choose_jointly(np.ones(2), np.eye(2), 1, -1.0)
