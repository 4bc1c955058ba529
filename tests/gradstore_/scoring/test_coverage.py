"""Facility location: the lazy greedy choice is the plain one, and near the best of all."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradstore.errors import BadInput
from gradstore.scoring.best_rows import HeldTable, Ranked, best_of_each
from gradstore.scoring.coverage import MOST_ROWS, facility_location
from gradstore.scoring.quotas import Limits

#: Parts of 64: sums with discounts 1/2 and 1/4 are exact, so that ties are ties.
TABLES = st.tuples(st.integers(1, 9), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.integers(-8, 64).map(lambda x: x / 64))
)


def all_pairs(table: npt.NDArray[np.float32], limits: Limits | None = None) -> Ranked:
    usable = np.ones(len(table), dtype=bool)
    return best_of_each(HeldTable(table), len(table), usable=usable, limits=limits)


def value(table: npt.NDArray[np.float32], rows: list[int], discount: float) -> float:
    """F(S), straight from its definition."""
    total = 0.0
    for column in np.maximum(table[rows], 0).T.astype(np.float64):
        total += sum(discount**place * x for place, x in enumerate(sorted(column.tolist())[::-1]))
    return total


def plain_greedy(table: npt.NDArray[np.float32], k: int, discount: float) -> list[int]:
    likeness = table.astype(np.float64).sum(axis=1)
    chosen: list[int] = []
    while len(chosen) < k:
        left = [row for row in range(len(table)) if row not in chosen]
        chosen.append(
            min(left, key=lambda r: (-value(table, [*chosen, r], discount), -likeness[r], r))
        )
    return chosen


@given(TABLES, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.data())
def test_the_lazy_choice_is_the_plain_greedy_one(
    table: npt.NDArray[np.float32], discount: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(table)))
    chosen = facility_location(all_pairs(table), k, discount=discount).tolist()
    assert chosen == plain_greedy(table, k, discount)


@given(TABLES, st.sampled_from([0.0, 0.5]), st.data())
def test_it_reaches_its_part_of_the_best_choice(
    table: npt.NDArray[np.float32], discount: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(table)))
    best = max(value(table, list(rows), discount) for rows in combinations(range(len(table)), k))
    found = value(
        table, facility_location(all_pairs(table), k, discount=discount).tolist(), discount
    )
    assert found >= (1 - 1 / np.e) * best - 1e-12


def test_a_copy_of_a_taken_row_comes_after_one_that_serves_another_target_row() -> None:
    table = np.array([[0.9, 0.0], [0.9, 0.0], [0.0, 0.5]], dtype=np.float32)
    assert facility_location(all_pairs(table), 3).tolist() == [0, 2, 1]
    assert facility_location(all_pairs(table), 3, discount=1.0).tolist() == [0, 1, 2]


def test_it_does_not_depend_on_how_rows_are_numbered() -> None:
    table = np.random.default_rng(2).uniform(-0.2, 1, (80, 6)).astype(np.float32)
    chosen = facility_location(all_pairs(table), 30).tolist()
    order = np.random.default_rng(0).permutation(80)
    assert order[facility_location(all_pairs(table[order]), 30)].tolist() == chosen
    assert len(set(chosen)) == 30


def test_a_full_data_set_is_passed_over() -> None:
    table = np.array([[0.9, 0.9], [0.8, 0.8], [0.1, 0.0], [0.0, 0.1]], dtype=np.float32)
    limits = Limits.of(["a", "a", "b", "b"], {"a": 1})
    chosen = facility_location(all_pairs(table, limits), 3, limits=limits).tolist()
    assert chosen == [0, 2, 3]
    with pytest.raises(BadInput, match="asked 4 rows, but the target rows name 3"):
        facility_location(all_pairs(table, limits), 4, limits=limits)


def test_more_rows_than_its_stated_limit_are_refused() -> None:
    table = np.ones((2, 1), dtype=np.float32)
    with pytest.raises(BadInput, match=r"takes at most 20,000"):
        facility_location(all_pairs(table), MOST_ROWS + 1)
    with pytest.raises(BadInput, match="discount is 2"):
        facility_location(all_pairs(table), 1, discount=2.0)
