"""Kernel ridge regression over landmarks against scikit-learn, its limits and its own check."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from gradstore.errors import BadInput
from gradstore.similarity.landmarks import fit, kernel


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


RNG = np.random.default_rng(4)
ROWS = unit(RNG.normal(size=(60, 7)))
#: Nearly linear in a row, as influence is in its gradient.
VALUES = ROWS @ RNG.normal(size=(7, 3)) + 0.02 * RNG.normal(size=(60, 3))


def by_sklearn(points: np.ndarray, values: np.ndarray, rows: np.ndarray, ridge: float) -> Any:
    distances = ((points[:, None] - points[None]) ** 2).sum(-1)
    width = np.median(distances[np.triu_indices(len(points), 1)])

    def own(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other + 0.25 * np.exp(-((one - other) ** 2).sum() / width))

    model = KernelRidge(kernel=own, alpha=ridge).fit(points, values - values.mean(0))
    return model.predict(rows) + values.mean(0)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_estimate_is_scikit_learns_kernel_ridge_around_the_landmarks_mean(ridge: float) -> None:
    found = fit(ROWS[:25], VALUES[:25], ridge)(ROWS)
    np.testing.assert_allclose(found, by_sklearn(ROWS[:25], VALUES[:25], ROWS, ridge), atol=1e-10)


def test_with_every_row_a_landmark_and_a_vanishing_ridge_the_estimate_is_exact() -> None:
    noise = RNG.normal(size=(60, 2))  # as far from linear as can be, and 60 rows in 7 dimensions
    found = fit(ROWS, noise, 1e-10)
    np.testing.assert_allclose(found(ROWS), noise, atol=1e-6)
    smoothed = fit(ROWS, noise, 1.0)(ROWS)
    assert np.abs(smoothed - noise).max() > 0.5


def test_far_fewer_landmarks_than_rows_order_the_others() -> None:
    found = fit(ROWS[:20], VALUES[:20], 0.01)(ROWS[20:])
    for query in range(3):
        assert np.corrcoef(found[:, query], VALUES[20:, query])[0, 1] > 0.95


def test_what_is_explained_is_what_fits_without_each_landmark_say() -> None:
    points, values, ridge = ROWS[:12], VALUES[:12], 0.1
    regression = fit(points, values, ridge)
    mean, missed = values.mean(0), []
    gram = kernel(points, points, regression.width)
    for left_out in range(12):
        rest = np.delete(np.arange(12), left_out)
        inner = gram[np.ix_(rest, rest)] + ridge * np.eye(11)
        others = np.linalg.solve(inner, values[rest] - mean)
        missed.append(values[left_out] - mean - gram[left_out, rest] @ others)
    expected = 1 - np.square(missed).sum() / np.square(values - mean).sum()
    assert regression.explained == pytest.approx(expected)
    assert fit(points, RNG.normal(size=(12, 3)), ridge).explained < 0.5 < regression.explained


def test_copies_of_a_row_have_one_estimate_and_a_row_without_numbers_has_none() -> None:
    points, values = np.concatenate([ROWS[:5]] * 2), np.concatenate([VALUES[:5]] * 2)
    rows = ROWS[:3].copy()
    rows[1] = np.nan
    found = fit(points, values, 1e-6)(rows)
    np.testing.assert_allclose(found[[0, 2]], VALUES[[0, 2]], atol=1e-4)
    assert np.isnan(found[1]).all()
    assert (fit(np.tile(ROWS[:1], (4, 1)), VALUES[:4], 0.1)(ROWS[:1]) == 0).sum() == 0


@pytest.mark.parametrize(
    ("points", "values", "ridge", "said"),
    [
        (ROWS[:1], VALUES[:1], 0.1, "at least 2"),
        (ROWS[:4], VALUES[:3], 0.1, "do not fit"),
        (ROWS[:4], np.full((4, 1), np.nan), 0.1, "0 have a finite"),
        (ROWS[:4], VALUES[:4], 0.0, "ridge is 0"),
        (np.tile(ROWS[:1], (40, 1)), VALUES[:40], 1e-300, "as alike as these"),
    ],
)
def test_what_cannot_be_fitted_is_named(
    points: np.ndarray, values: np.ndarray, ridge: float, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        fit(points, values, ridge)
