"""Spread of scores: small, of usable rows alone, with a cut only where there is one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.run.spread import BINS, LOWEST, spread_of


def test_only_usable_rows_with_a_finite_score_are_counted() -> None:
    scores = np.array([5.0, np.nan, np.inf, 1.0, 3.0])
    found = spread_of(scores, np.array([False, True, True, True, True]), np.array([4]))
    assert (found["low"], found["high"]) == (1.0, 3.0)
    assert len(found["counts"]) == len(found["chosen"]) == BINS
    assert (sum(found["counts"]), sum(found["chosen"])) == (2, 1)
    assert found["lowest_rows"] == [3, 4]


@pytest.mark.parametrize(
    ("chosen", "cut"),
    [([0, 2], 0.5), ([0, 2, 2], 0.5), ([0, 1], None), ([], None), ([0, 1, 2, 3], 0.1)],
)
def test_a_cut_is_told_where_every_row_above_it_was_chosen(
    chosen: list[int], cut: float | None
) -> None:
    scores = np.array([0.9, 0.2, 0.5, 0.1])
    found = spread_of(scores, np.ones(4, dtype=bool), np.array(chosen, dtype=np.int64))
    assert found["cut"] == cut


def test_rows_that_tie_at_the_cut_do_not_take_it_away() -> None:
    found = spread_of(np.array([0.5, 0.5, 0.9]), np.ones(3, dtype=bool), np.array([2, 0]))
    assert found["cut"] == 0.5


def test_the_lowest_rows_are_few_and_the_lowest_first_ties_to_the_lower_row() -> None:
    scores = np.repeat([2.0, 1.0], 20)
    found = spread_of(scores, np.ones(40, dtype=bool), np.array([0]))
    assert found["lowest_rows"] == list(range(20, 20 + LOWEST))
    assert found["lowest_scores"] == [1.0] * LOWEST


def test_equal_scores_and_no_scores_have_a_spread_of_json_values() -> None:
    found = spread_of(np.full(3, 2.5, np.float32), np.ones(3, dtype=bool), np.array([1]))
    assert (found["low"], found["high"], sum(found["counts"])) == (2.5, 2.5, 3)
    assert json.loads(json.dumps(found)) == found
    assert spread_of(np.full(3, np.nan), np.ones(3, dtype=bool), np.array([1])) == {}
