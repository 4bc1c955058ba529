"""Values known at a few rows, estimated at all others from embeddings: kernel ridge regression.

Letters: m landmarks, n rows, d dimensions, q values of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Regression:
    """Values (q,) of a row as a function of its embedding.

    f(x) = mean + sum_j k(x, x_j) c_j over the landmarks j, with c = (K + ridge I)^-1 (y - mean).

    Attributes:
        points: (m, d) the landmarks' unit embeddings.
        coefficients: (m, q).
        mean: (q,) of the landmarks' values.
        width: of the kernel, see `kernel`.
        explained: share of the values' variance that is explained at landmarks left out one by
            one; at most 1, 0 or below where the embeddings say nothing.
    """

    points: Floats
    coefficients: Floats
    mean: Floats
    width: float
    explained: float

    def __call__(self, rows: npt.NDArray[Any]) -> Floats:
        """Estimate (n, q) of unit embeddings (n, d); NaN where one of its numbers is."""
        given = np.asarray(rows, dtype=np.float64)
        found: Floats = kernel(given, self.points, self.width) @ self.coefficients + self.mean
        return found


def kernel(rows: Floats, points: Floats, width: float) -> Floats:
    """Compute k(x, y) = (x, y) + exp(-|x - y|^2 / width) / 4, (n, m), of unit rows.

    Influence is linear in a row's gradient, so the linear part carries most; the other tells rows
    apart whose number is above d.
    """
    products = rows @ points.T
    return np.asarray(products + 0.25 * np.exp(np.minimum(2 * products - 2, 0) / width))


def fit(points: npt.NDArray[Any], values: npt.NDArray[Any], ridge: float) -> Regression:
    """Fit the regression of values on embeddings.

    Args:
        points: (m, d) unit embeddings of the landmarks, m >= 2.
        values: (m, q) finite.
        ridge: above 0, added to the kernel's diagonal, which is 1.25. Towards 0, a landmark's
            estimate becomes its own value.

    Raises:
        BadInput: shapes that do not fit, numbers that are not finite, fewer than 2 landmarks, a
            ridge too small for landmarks that are alike.
    """
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    at, y = np.asarray(points, dtype=np.float64), np.asarray(values, dtype=np.float64)
    expect(ridge > 0, "ridge", ridge, "a number above 0")
    if at.ndim != 2 or y.ndim != 2 or len(at) != len(y):
        raise BadInput(f"points {at.shape} and values {y.shape} do not fit; give (m, d) and (m, q)")
    if len(at) < 2 or not (np.isfinite(at).all() and np.isfinite(y).all()):
        raise BadInput(
            f"{len(at)} landmarks, of which {int(np.isfinite(y).all(axis=1).sum())} have a finite "
            "value; estimate from at least 2, all finite"
        )
    mean = y.mean(axis=0)
    width = _median_distance(at)
    gram = kernel(at, at, width) + ridge * np.eye(len(at))
    try:
        factor = cho_factor(gram, lower=True)
    except LinAlgError as error:
        raise BadInput(
            f"ridge is {ridge:g}, too little for landmarks as alike as these; raise it to 0.001"
        ) from error
    coefficients = cho_solve(factor, y - mean)
    # What a landmark's value misses when it is left out (Allen's PRESS), without another fit.
    missed = coefficients / np.diag(cho_solve(factor, np.eye(len(at))))[:, None]
    spread = float(((y - mean) ** 2).sum())
    explained = 1 - float((missed**2).sum()) / spread if spread > 0 else 0.0
    return Regression(at, coefficients, mean, width, explained)


def _median_distance(points: Floats) -> float:
    """Compute the median squared distance of two different points; 1 where all are alike."""
    above = np.triu_indices(len(points), 1)
    median = float(np.median(np.maximum(2 - 2 * (points @ points.T)[above], 0)))
    return median if median > 0 else 1.0
