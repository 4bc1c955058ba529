"""Paired comparison of methods over the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """Mean paired difference to the method compared with, its 95% interval, and Holm's p."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        """Write it as a table's cell."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]  p {self.p:.3g}"


def against(table: Mapping[str, Sequence[float]], base: str) -> dict[str, Difference | str]:
    """Compare each method's values, one a seed, with the base's by a paired t test.

    Args:
        table: values by method, in the same order of seeds.
        base: the method compared with.

    Returns:
        By method, best first by mean is left to the caller; "" for the base, and for all methods
        where there are fewer than two seeds.
    """
    others = [name for name in table if name != base]
    if len(table[base]) < 2:
        return dict.fromkeys(table, "")
    gaps = {name: np.subtract(table[name], table[base]) for name in others}
    p_of = dict(zip(others, holm([_p_value(gaps[name]) for name in others]), strict=True))
    found: dict[str, Difference | str] = {}
    for name in table:
        if name == base:
            found[name] = ""
            continue
        gap = gaps[name]
        half = float(stats.t.ppf(0.975, len(gap) - 1)) * float(gap.std(ddof=1)) / len(gap) ** 0.5
        middle = float(gap.mean())
        found[name] = Difference(middle, middle - half, middle + half, p_of[name])
    return found


def _p_value(gap: np.ndarray) -> float:
    if not gap.std():
        return 1.0 if not gap.any() else 0.0
    return float(stats.ttest_1samp(gap, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values of several comparisons (Holm 1979).

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order, corrected, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected
