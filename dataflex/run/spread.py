"""A summary of the scores of all rows, small enough to be kept with every selection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

#: Bins of a histogram of scores; two neighbours make one bar where fewer are to be seen.
BINS = 80

#: Rows with the lowest scores that are named.
LOWEST = 8


#: Key of a selection's manifest that holds it.
ALL_SCORES = "all_scores"


def told_spread(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the spread in a selection's manifest; {} where a strategy has put none there."""
    found = manifest.get(ALL_SCORES)
    keys = {"low", "high", "counts", "chosen", "cut", "lowest_rows", "lowest_scores"}
    return found if isinstance(found, Mapping) and keys <= found.keys() else {}


def spread_of(
    scores: npt.NDArray[np.floating[Any]],
    usable: npt.NDArray[np.bool_],
    chosen: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """Summarise the scores that a selection was made from.

    Args:
        scores: (n,) of all rows; anything where they are not usable.
        usable: (n,) bool, rows that might have been chosen.
        chosen: (m,) positions of those that were.

    Returns:
        {} where no usable row has a finite score, else JSON values: `low` and `high`, the ends of
        equal bins; `counts` of usable rows and `chosen` of different chosen rows in each bin;
        `lowest_rows` and `lowest_scores`, from the lowest; and `cut`, the lowest chosen score where
        every row above it was chosen, else None.

    Examples:
        >>> found = spread_of(np.array([0.0, 2.0, 1.0]), np.ones(3, bool), np.array([1]))
        >>> found["low"], found["high"], sum(found["counts"]), sum(found["chosen"])
        (0.0, 2.0, 3, 1)
        >>> found["cut"], found["lowest_rows"], found["lowest_scores"]
        (2.0, [0, 2, 1], [0.0, 1.0, 2.0])
    """
    rows = np.flatnonzero(usable & np.isfinite(scores))
    if not len(rows):
        return {}
    values = np.asarray(scores[rows], np.float64)
    taken = np.isin(rows, chosen)
    low, high = float(values.min()), float(values.max())
    ends = (low, high) if high > low else (low, low + 1.0)
    order = np.argsort(values, kind="stable")[:LOWEST]
    cut = float(values[taken].min()) if taken.any() else None
    if cut is not None and (values[~taken] > cut).any():
        cut = None
    return {
        "low": low,
        "high": high,
        "counts": np.histogram(values, BINS, ends)[0].tolist(),
        "chosen": np.histogram(values[taken], BINS, ends)[0].tolist(),
        "cut": cut,
        "lowest_rows": rows[order].tolist(),
        "lowest_scores": values[order].tolist(),
    }
