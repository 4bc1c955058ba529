"""Length bias: scores that depend on how long an answer is, measured and taken out.

A row's gradient is the mean over its target tokens. A short answer's is long and points one way, a
long one's is an average: scores by it may favour either, whatever the rows teach
(benchmarks/length_bias.py measures it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput

CORRECTIONS: tuple[str, ...] = ("none", "regression", "bins")

#: Bins of lengths at most, and rows of a bin at least.
MOST_BINS, LEAST_ROWS = 10, 20

FloatArray = npt.NDArray[np.float64]


def length_correlation(
    scores: npt.NDArray[np.floating[Any]],
    tokens: npt.NDArray[np.integer[Any]],
    *,
    usable: npt.NDArray[np.bool_],
) -> float:
    """Measure Spearman's correlation of scores with target tokens over the usable rows.

    Returns:
        From -1 (short rows score highest) to 1; 0 where all rows are equally long or score alike.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(values[usable]) for values in (scores, tokens)]
    centred = [each - each.mean() for each in ranks]
    size = float(np.sqrt(np.prod([(each**2).sum() for each in centred])))
    return float((centred[0] * centred[1]).sum() / size) if size else 0.0


def without_length(
    scores: npt.NDArray[np.floating[Any]],
    tokens: npt.NDArray[np.integer[Any]],
    how: str,
    *,
    usable: npt.NDArray[np.bool_],
) -> FloatArray:
    """Take the part that follows the number of target tokens out of scores.

    regression: the residual of a least-squares line over the log of the tokens; scores keep their
    unit. bins: a row's percentile among rows of about its length: at most `MOST_BINS` bins of as
    many rows each as equal lengths allow, so that the best share of every length is taken.

    Args:
        scores: (n,) float.
        tokens: (n,) target tokens, 1 or more where usable.
        how: none, regression or bins.
        usable: (n,) bool, rows that are compared.

    Returns:
        (n,) float64, the larger the better; nan where a row is not usable.

    Raises:
        BadInput: another correction.

    Examples:
        >>> every = np.ones(4, dtype=bool)
        >>> short_first = np.array([0.9, 0.8, 0.3, 0.2])
        >>> found = without_length(short_first, np.array([2, 4, 8, 16]), "regression", usable=every)
        >>> found.round(2).tolist()
        [0.51, 0.67, 0.43, 0.59]
    """
    check_correction(how)
    found = np.full(len(scores), np.nan)
    values, lengths = scores[usable].astype(np.float64), tokens[usable]
    if how == "none":
        found[usable] = values
    elif how == "regression":
        found[usable] = _residual(values, np.log(np.maximum(lengths, 1)))
    else:
        found[usable] = _percentile(values, bins_of(lengths))
    return found


def check_correction(how: str) -> None:
    """Raise BadInput for a correction that there is not."""
    if how not in CORRECTIONS:
        raise BadInput(f"length correction is {how!r}; choose {' or '.join(CORRECTIONS)}.")


def bins_of(lengths: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Return the bin of each of n lengths; equal lengths share one.

    Examples:
        >>> np.bincount(bins_of(np.repeat([3, 4, 5], 20))).tolist()
        [20, 20, 20]
    """
    count = max(1, min(MOST_BINS, len(lengths) // LEAST_ROWS))
    edges = np.quantile(lengths, np.arange(1, count) / count, method="lower")
    return np.unique(np.searchsorted(edges, lengths, side="left"), return_inverse=True)[1]


def _residual(values: FloatArray, x: FloatArray) -> FloatArray:
    """Subtract a least-squares line over x, and add the mean back: the zero of a score stays."""
    x = x - x.mean()
    spread = float((x**2).sum())
    slope = float((x * values).sum()) / spread if spread else 0.0
    return values - slope * x


def _percentile(values: FloatArray, bins: npt.NDArray[np.int64]) -> FloatArray:
    """Rank values within bins, equal ones alike, in (0, 1)."""
    from scipy.stats import rankdata

    found = np.empty(len(values))
    for number in range(int(bins.max()) + 1):
        mine = bins == number
        found[mine] = (rankdata(values[mine]) - 0.5) / mine.sum()
    return found
