"""Orders of a sorted list: seven patterns, each a permutation of ranks (ALGORITHMS 4).

The patterns are those of Dai et al. 2026 (arXiv:2605.30334), who call stair STR, saw SAW and the
shuffled windows JIT; folding is older (DELT, arXiv:2506.21545).

A pattern says which rank of the sorted list is served at which place. It knows nothing of rows:
`Pattern.arrange` sorts them by score and reads the sorted list in the pattern's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Interval, Lt

from dataflex.config.parameters import Count
from dataflex.config.registry import grouped

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

Polarity = Literal["higher_later", "higher_earlier", "higher_is_better", "lower_is_better"]

#: Whether a high score belongs early; the second pair are other names for the first.
POLARITIES: Mapping[Polarity, bool] = {
    "higher_later": False,
    "higher_earlier": True,
    "higher_is_better": False,
    "lower_is_better": True,
}

PatternName = Literal["shuffle", "sorting", "folding", "zigzag", "segment", "stair", "saw"]

#: Names under which the published code knows `layers`.
LAYERS = ("folding_layer", "zigzag_layer")


Percentage = Annotated[float, Interval(ge=0, le=100)]


@dataclass(frozen=True)
class PatternParams:
    """`pattern_params`; each pattern reads its own.

    Attributes:
        layers: L, strides of folding and zigzag; None for 5, around a section's end for 2.
        num_sections: n, sections of stair and saw.
        folding_ratio: rho, part of all rows on each side of a section's end that is folded.
        x_pct: per cent of the rows in segment's head.
        y_pct: per cent of the rows in segment's tail.
        front_is_high: whether the head is taken from the end of the sorted list.
        back_is_high: whether the tail is taken from the end of the sorted list.
    """

    layers: Count | None = None
    num_sections: Count = 2
    folding_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0
    x_pct: Percentage = 10.0
    y_pct: Percentage = 10.0
    front_is_high: bool = False
    back_is_high: bool = True

    def __post_init__(self) -> None:
        """Refuse a head and a tail that overlap, whichever pattern they are for."""
        if self.x_pct + self.y_pct > 100:
            raise ValueError(
                f"pattern_params.x_pct is {self.x_pct} and y_pct {self.y_pct}; give two "
                "percentages that are together at most 100"
            )

    def check_sections(self) -> None:
        """Check for stair and saw that the folded parts do not touch each other."""
        if self.num_sections > 1 and 2 * self.folding_ratio >= 1 / self.num_sections:
            raise ValueError(
                f"pattern_params.folding_ratio is {self.folding_ratio}: the folded parts of "
                f"{self.num_sections} sections would overlap. Give less than "
                f"{1 / (2 * self.num_sections):.4g}, or fewer num_sections"
            )


@dataclass(frozen=True)
class Pattern:
    """One order of a sorted list.

    Attributes:
        name: one of PATTERNS.
        descending: whether the list is sorted from high to low.
        window_size: rows of each window that is shuffled afterwards; 0 or 1 for none.
        seed: of every shuffle.
        params: of the pattern.
    """

    name: PatternName
    descending: bool = False
    window_size: int = 0
    seed: int = 42
    params: PatternParams = PatternParams()

    @property
    def needs_scores(self) -> bool:
        """Flag for patterns that need a sorted list."""
        return self.name != "shuffle"

    def ranks(self, n: int) -> IntArray:
        """Compute (n,) int64 ranks of the sorted list to serve at each place: a permutation."""
        # Another stream than that of the windows, so that the two shuffles are independent.
        order = _PATTERNS[self.name](n, self.params, np.random.default_rng([self.seed, 1]))
        if self.window_size > 1:
            order = window_shuffled(order, self.window_size, np.random.default_rng(self.seed))
        if not np.array_equal(np.sort(order), np.arange(n)):
            raise RuntimeError(f"pattern {self.name} of {n} rows is no permutation: a bug")
        return order

    def sort(self, positions: IntArray, scores: FloatArray | None) -> IntArray:
        """Sort (n,) `positions` from first to last rank; without scores they stay as they are."""
        if scores is None or not self.needs_scores:
            return positions
        return positions[sorting_order(scores, descending=self.descending)]

    def arrange(self, positions: IntArray, scores: FloatArray | None) -> IntArray:
        """Arrange (n,) `positions` in serving order, by their `scores` (n,)."""
        return self.sort(positions, scores)[self.ranks(len(positions))]


def make_pattern(
    name: PatternName,
    polarity: Polarity,
    ascending: bool,
    window_size: int,
    seed: int,
    params: Mapping[str, Any],
) -> Pattern:
    """Build a pattern from configured values.

    Raises:
        ValueError: `params` has an unknown name or a value out of range, or its values do not fit
            each other.
    """
    given = {"layers" if key in LAYERS else key: value for key, value in params.items()}
    made = grouped(PatternParams, "pattern_params", given)
    if name in ("stair", "saw"):
        made.check_sections()
    return Pattern(name, ascending == POLARITIES[polarity], window_size, seed, made)


def sorting_order(scores: FloatArray, *, descending: bool = False) -> IntArray:
    """Compute (n,) places of `scores` from first to last rank; ties keep their order both ways.

    A score that is not finite counts as the median of those that are.
    """
    known = np.isfinite(scores)
    filled = np.where(known, scores, np.median(scores[known]) if known.any() else 0.0)
    return np.argsort(-filled if descending else filled, kind="stable")


def window_shuffled(order: IntArray, size: int, generator: np.random.Generator) -> IntArray:
    """Shuffle every window of `size` consecutive entries of (n,) `order` within itself."""
    windows = [generator.permutation(order[i : i + size]) for i in range(0, len(order), size)]
    return _joined(windows)


def folding(n: int, layers: int) -> IntArray:
    """Build (n,) strides of ranks: 0, L, 2L, ...; then 1, L + 1, ...; and so on."""
    return _joined([np.arange(first, n, layers) for first in range(min(layers, n))])


def zigzag(n: int, layers: int) -> IntArray:
    """Fold (n,) ranks, every second stride reversed: no hard-to-easy jump between strides."""
    strides = [np.arange(first, n, layers) for first in range(min(layers, n))]
    return _joined([stride[::-1] if i % 2 else stride for i, stride in enumerate(strides)])


def segment(n: int, params: PatternParams, generator: np.random.Generator) -> IntArray:
    """Build (n,) ranks: head and tail from chosen ends of the sorted list, parts shuffled."""
    front, back = int(n * params.x_pct // 100), int(n * params.y_pct // 100)
    ranks = np.arange(n, dtype=np.int64)
    if params.front_is_high == params.back_is_high:
        split = n - front - back if params.front_is_high else front + back
        low, high = ranks[:split], ranks[split:]
        taken, middle = (high, low) if params.front_is_high else (low, high)
        taken = generator.permutation(taken)
        head, tail = taken[:front], taken[front:]
    else:
        below, above = (back, front) if params.front_is_high else (front, back)
        low, middle, high = np.split(ranks, [below, n - above])
        head, tail = (high, low) if params.front_is_high else (low, high)
    return _joined([generator.permutation(part) for part in (head, middle, tail)])


def stepped(n: int, params: PatternParams, fold: Callable[[int, int], IntArray]) -> IntArray:
    """Build (n,) sorted ranks, folded within round(rho n) of the end of each section."""
    order = np.arange(n, dtype=np.int64)
    radius, done = round(params.folding_ratio * n), 0
    for i in range(1, params.num_sections):
        end = round(n * i / params.num_sections)
        # Rounding can make windows of a few rows overlap: each begins where the last one ended.
        start, stop = max(done, end - radius), min(n, end + radius)
        if start < stop:
            order[start:stop] = start + fold(stop - start, params.layers or 2)
            done = stop
    return order


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


_PATTERNS: Mapping[PatternName, Callable[[int, PatternParams, np.random.Generator], IntArray]] = {
    "shuffle": lambda n, _, generator: generator.permutation(n),
    "sorting": lambda n, _, __: np.arange(n, dtype=np.int64),
    "folding": lambda n, params, _: folding(n, params.layers or 5),
    "zigzag": lambda n, params, _: zigzag(n, params.layers or 5),
    "segment": segment,
    "stair": lambda n, params, _: stepped(n, params, folding),
    "saw": lambda n, params, _: stepped(n, params, zigzag),
}

PATTERNS = tuple(_PATTERNS)
