"""Nearest rows of every row and repeated rows, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.similarity.nearest import nearest_rows


def unit(m: int, d: int = 12, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((m, d))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


@pytest.mark.parametrize("m", [2, 15, 16, 17, 70])
@pytest.mark.parametrize("block_rows", [16, 32, 4096])
def test_means_and_nearest_are_those_of_all_cosines(m: int, block_rows: int) -> None:
    rows = unit(m)
    cosines = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(cosines, -2)
    k = min(5, m - 1)
    found = nearest_rows(rows, k, repeats_at=0.99, block_rows=block_rows)
    np.testing.assert_allclose(found.cosine, -np.sort(-cosines)[:, :k].mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(found.nearest, cosines.argmax(axis=1))
    np.testing.assert_allclose(found.nearest_cosine, cosines.max(axis=1), atol=1e-6)
    assert (found.repeats == -1).all()


@pytest.mark.parametrize("block_rows", [16, 4096])
def test_a_row_repeats_the_first_of_its_group_whatever_the_group_s_size(block_rows: int) -> None:
    rows = unit(60)
    rows[[5, 20, 33, 34, 59]] = rows[2]  # more copies than neighbours asked for
    rows[40] = -rows[2]
    found = nearest_rows(rows, 2, repeats_at=1.0, block_rows=block_rows)
    expected = np.full(60, -1)
    expected[[5, 20, 33, 34, 59]] = 2
    np.testing.assert_array_equal(found.repeats, expected)
    assert found.nearest[[5, 20, 59]].tolist() == [2, 2, 2]
    assert found.nearest[2] == 5


def test_a_chain_of_near_rows_is_one_group() -> None:
    angles = np.radians([0, 80, 5, 10, 15])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = nearest_rows(rows, 1, repeats_at=float(np.cos(np.radians(6))))
    assert found.repeats.tolist() == [-1, -1, 0, 0, 0]


def test_a_row_on_its_own_has_no_neighbour() -> None:
    found = nearest_rows(unit(1), 1, repeats_at=0.9)
    assert np.isnan(found.cosine).all()
    assert np.isnan(found.nearest_cosine).all()
    assert found.nearest.tolist() == [-1]


@pytest.mark.parametrize("k", [0, 6, 100])
def test_k_must_be_among_the_other_rows(k: int) -> None:
    with pytest.raises(BadInput, match=f"neighbours is {k}"):
        nearest_rows(unit(6), k, repeats_at=0.9)


@pytest.mark.parametrize("cosine", [0.0, -0.5, 1.01, float("nan")])
def test_a_limit_that_is_no_cosine_of_alike_rows_is_refused(cosine: float) -> None:
    with pytest.raises(BadInput, match="duplicate_cosine is"):
        nearest_rows(unit(6), 1, repeats_at=cosine)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 999))
def test_other_orders_of_the_rows_give_the_same_neighbours(m: int, seed: int) -> None:
    rows, order = unit(m, seed=seed), np.random.default_rng(seed).permutation(m)
    k = min(3, m - 1)
    found = nearest_rows(rows, k, repeats_at=0.99, block_rows=16)
    moved = nearest_rows(rows[order], k, repeats_at=0.99, block_rows=16)
    np.testing.assert_allclose(moved.cosine, found.cosine[order], atol=1e-6)
    np.testing.assert_array_equal(order[moved.nearest], found.nearest[order])
    np.testing.assert_allclose(moved.nearest_cosine, found.nearest_cosine[order], atol=1e-6)


def test_every_row_is_counted_once() -> None:
    told: list[int] = []
    nearest_rows(unit(70), 3, repeats_at=0.9, block_rows=16, on_rows=told.append)
    assert sum(told) == 70
    assert min(told) >= 0
