"""Mean of a metric over queries, with its bootstrap interval, and the checks that metrics share.

Letters: n training rows, q queries, s subsets, k rows at the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.scoring.plain_rows import as_numbers

#: Numbers as a caller may give them.
Numbers = npt.NDArray[Any] | torch.Tensor | list[float] | list[list[float]]

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Draws of the bootstrap; its own noise in a bound is then far below the interval's width.
RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """Mean of a metric over queries.

    Attributes:
        mean: over the queries.
        low: lower bound of the interval; None for a single query, which has no spread.
        high: upper bound of the interval; None for a single query.
        confidence: share of intervals made this way that hold the mean over all such queries.
        values: (q,) the metric of each query.
    """

    mean: float
    low: float | None
    high: float | None
    confidence: float
    values: tuple[float, ...]

    def as_json(self) -> dict[str, object]:
        """Return the estimate as plain JSON values."""
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "queries": len(self.values),
            "values": list(self.values),
        }

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} (1 query)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] ({len(self.values)} queries)"


def estimate(values: Numbers, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Estimate the mean of a metric over queries, with a percentile bootstrap interval.

    Queries are drawn with replacement 9,999 times; the interval lies between the quantiles
    (1 - confidence) / 2 and (1 + confidence) / 2 of the means (Efron 1979;
    `scipy.stats.bootstrap`). It says how the mean would differ with other queries, not with other
    retrained models, which all queries share: `two_way` draws these too.

    Args:
        values: (q,) the metric of each query, finite.
        confidence: above 0, below 1.
        seed: of the draws; the same values and seed give the same interval.

    Raises:
        BadInput: no values, values that are not finite, a confidence outside (0, 1).

    Examples:
        >>> print(estimate([0.2, 0.4, 0.6]))
        0.400 [0.200, 0.600] (3 queries)
    """
    found = numbers(values, "values", 1, "one number per query")
    check_confidence(confidence)
    mean, low, high = float(found.mean()), None, None
    if found.size > 1:
        from scipy.stats import bootstrap

        interval = bootstrap(
            (found,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, 2**22 // found.size),
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(expect_whole(seed, "seed", 0)),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Estimate(mean, low, high, float(confidence), tuple(found.tolist()))


def check_confidence(confidence: float) -> None:
    """Raise BadInput unless a confidence is a share above 0 and below 1."""
    confident = isinstance(confidence, int | float) and 0 < confidence < 1
    expect(confident, "confidence", confidence, "a share above 0 and below 1, such as 0.95")


def numbers(given: object, what: str, axes: int, wanted: str) -> Floats:
    """Return finite numbers as float64 with `axes` axes.

    Raises:
        BadInput: no numbers, other axes, nothing in them, or one that is not finite (names where).
    """
    found = as_numbers(given, what, wanted)
    if found.ndim != axes or found.size == 0:
        raise BadInput(f"{what} has shape {found.shape}; give {wanted}.")
    values = found.astype(np.float64)
    if not (finite := np.isfinite(values)).all():
        place = [int(axis) for axis in np.argwhere(~finite)[0]]
        raise BadInput(
            f"{what}{place} is {values[tuple(place)]}; every number must be finite: leave out rows "
            "and queries that could not be scored"
        )
    return values


def score_matrix(given: object, what: str = "scores") -> Floats:
    """Return scores (q, n) float64; a single query's (n,) becomes (1, n).

    Raises:
        BadInput: they are neither, or not finite.
    """
    wanted = "scores (q queries, n rows), or (n,) for one query"
    found = as_numbers(given, what, wanted)
    return numbers(found[None] if found.ndim == 1 else found, what, 2, wanted)


def row_masks(given: object, what: str, rows: int, count: int | None = None) -> Mask:
    """Return True or False for each row, (m, n); a single (n,) becomes (1, n).

    Args:
        given: bool array or tensor.
        what: what messages call it.
        rows: n.
        count: m; (n,) then stands for each of them. None takes any m.

    Raises:
        BadInput: it is not bool, or its shape does not fit.
    """
    found = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given)
    wanted = f"True or False, ({'m' if count is None else count}, {rows}) or ({rows},)"
    if found.dtype != bool:
        raise BadInput(f"{what} holds {found.dtype}; give {wanted}.")
    masks: Mask = found[None] if found.ndim == 1 else found
    fits = masks.ndim == 2 and masks.shape[1] == rows
    if not fits or (found.ndim == 2 and count not in (None, len(masks))):
        raise BadInput(f"{what} has shape {found.shape}; give {wanted}.")
    return masks if count is None else np.broadcast_to(masks, (count, rows))


def spearman(predicted: Floats, measured: Floats) -> float:
    """Compute the rank correlation of two scores, (m,) and (m,); 0 where one is constant."""
    from scipy.stats import rankdata

    one, other = (rankdata(values) - (len(values) + 1) / 2 for values in (predicted, measured))
    norm = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / norm) if norm else 0.0
