"""Subsets: every target row is served, ties are settled by row number, budgets are kept."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradstore.errors import BadInput
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.selection import select_top
from gradstore.scoring.subset import (
    BestRows,
    drop_harmful,
    most_rows_within,
    round_robin,
    round_robin_rows,
    within_quotas,
    within_tokens,
)

#: Few distinct values, so that ties are common; -0.0 and nan among them.
SCORES = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 1.0, float("nan")])
TABLES = st.tuples(st.integers(1, 30), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=SCORES)
)


def ranked_by_sorting(table: npt.NDArray[np.float32], target: int) -> list[int]:
    """All candidates of a target row, best first, by Python's own sort."""
    rows = [row for row in range(len(table)) if not np.isnan(table[row, target])]
    return sorted(rows, key=lambda row: (-float(table[row, target]), row))


def in_turn(table: npt.NDArray[np.float32], k: int) -> list[int]:
    """Round robin by looking at the whole matrix for every single choice."""
    chosen: list[int] = []
    while len(chosen) < k:
        target = len(chosen) % table.shape[1]
        chosen.append(next(r for r in ranked_by_sorting(table, target) if r not in chosen))
    return chosen


@given(TABLES, st.integers(1, 30), st.integers(1, 30))
def test_the_best_rows_are_those_of_a_full_sort_however_rows_are_cut(
    table: npt.NDArray[np.float32], k: int, chunk: int
) -> None:
    best = BestRows(table.shape[1], k)
    for start in range(0, len(table), chunk):
        best.add(start, table[start : start + chunk])
    for target, found in enumerate(best.ranked().tolist()):
        expected = ranked_by_sorting(table, target)[:k]
        assert found == expected + [-1] * (len(found) - len(expected))


@given(TABLES, st.data())
def test_round_robin_is_what_choosing_from_the_whole_matrix_gives(
    table: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    table = np.nan_to_num(table[:, : len(table)], nan=0.75)
    k = data.draw(st.integers(table.shape[1], len(table)))
    best = BestRows(table.shape[1], k)
    best.add(0, table)
    chosen = round_robin(best.ranked(), k).tolist()
    assert chosen == in_turn(table, k)
    assert len(set(chosen)) == k


def test_a_target_row_that_all_rows_help_less_is_served_as_often() -> None:
    table = np.zeros((40, 2), dtype=np.float32)
    table[:20, 0], table[20:, 1] = 1.0, 0.01
    best = BestRows(2, 10)
    best.add(0, table)
    assert round_robin(best.ranked(), 10).tolist() == [0, 20, 1, 21, 2, 22, 3, 23, 4, 24]


def test_fewer_rows_than_target_rows_are_refused() -> None:
    with pytest.raises(BadInput, match=r"2 rows cannot serve 3 target rows .* at least 3"):
        round_robin(np.array([[0, 1], [1, 2], [2, 0]]), 2)


def test_a_list_that_ends_too_early_is_an_error_and_no_shorter_choice() -> None:
    with pytest.raises(BadInput, match="target row 1 has no row left"):
        round_robin(np.array([[0, 1], [0, -1]]), 2)


@given(arrays(np.float32, st.integers(1, 30), elements=SCORES), st.data())
def test_what_is_kept_helps_and_nothing_better_is_dropped(
    scores: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    usable = data.draw(arrays(np.bool_, len(scores)))
    helpful = [row for row in range(len(scores)) if usable[row] and float(scores[row]) > 0]
    helpful.sort(key=lambda row: (-float(scores[row]), row))
    if not helpful:
        with pytest.raises(BadInput, match="has a score above 0"):
            drop_harmful(scores, usable=usable)
        return
    k = data.draw(st.integers(1, len(helpful)))
    assert drop_harmful(scores, usable=usable).tolist() == helpful
    assert drop_harmful(scores, k, usable=usable).tolist() == helpful[:k]


@given(arrays(np.float32, st.integers(1, 8), elements=SCORES), st.data())
def test_the_best_within_quotas_are_the_best_of_all_choices_that_keep_them(
    scores: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    size = len(scores)
    names = data.draw(st.lists(st.sampled_from("abc"), min_size=size, max_size=size))
    quotas = data.draw(st.dictionaries(st.sampled_from(sorted(set(names))), st.integers(1, 3)))
    usable = data.draw(arrays(np.bool_, size)) & ~np.isnan(scores)
    left = within_quotas(scores, names, quotas, usable=usable)
    assert not (left & ~usable).any()
    for k in range(1, size + 1):
        kept = [
            rows
            for rows in combinations(np.flatnonzero(usable).tolist(), k)
            if all([names[row] for row in rows].count(n) <= most for n, most in quotas.items())
        ]
        assert bool(kept) == (left.sum() >= k)
        if kept:
            best = max(float(scores[list(rows)].sum()) for rows in kept)
            assert float(scores[select_top(scores, k, usable=left)].sum()) == best


@pytest.mark.parametrize(
    ("quotas", "told"), [({"c": 1}, "quota of 'c', .* of: a, b"), ({"a": 0}, "quota of 'a' is 0")]
)
def test_a_quota_that_means_nothing_is_refused(quotas: dict[str, int], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        within_quotas(np.zeros(2), ["a", "b"], quotas, usable=np.ones(2, dtype=bool))


def test_rows_that_hurt_never_fill_a_budget_up() -> None:
    with pytest.raises(BadInput, match=r"asked 3 rows, but only 2 of 4 usable .* at most 2"):
        drop_harmful(np.array([0.5, -0.5, 0.0, 0.25]), 3, usable=np.ones(4, dtype=bool))


@given(
    arrays(np.int32, st.integers(1, 30), elements=st.integers(1, 50)),
    st.integers(1, 500),
    st.randoms(),
)
def test_a_token_budget_is_kept_and_the_next_row_would_exceed_it(
    tokens: npt.NDArray[np.int32], budget: int, random: st.DataObject
) -> None:
    rows = list(range(len(tokens)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    order = np.array(rows)
    if tokens[order[0]] > budget:
        with pytest.raises(BadInput, match=f"allow at least {tokens[order[0]]}"):
            within_tokens(order, tokens, budget)
        return
    chosen = within_tokens(order, tokens, budget)
    assert chosen.tolist() == rows[: len(chosen)]
    assert tokens[chosen].sum() <= budget
    assert len(chosen) == len(rows) or tokens[order[: len(chosen) + 1]].sum() > budget
    assert len(chosen) <= most_rows_within(tokens, budget)


def test_a_token_budget_counts_beyond_32_bits() -> None:
    tokens = np.full(3, 2**31 - 1, dtype=np.int32)
    assert within_tokens(np.arange(3), tokens, 2**32).tolist() == [0, 1]


class Marked:
    """Rows in memory, with their marks; no mark is corrected."""

    def __init__(self, rows: npt.NDArray[np.float32], usable: list[bool]) -> None:
        self.rows, self.dim = rows.shape
        self.usable, self._rows = np.array(usable), rows

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self._rows[start:stop]


def marked(usable: list[bool], second: float) -> list[CheckpointFeatures]:
    """Rows that hurt the one target row, the second one aside."""
    train = np.array([[-1, 0.5], [second, 0], [-1, 0]], dtype=np.float32)
    target = Marked(np.array([[1, 0]], dtype=np.float32), [True])
    return [CheckpointFeatures(Marked(train, usable), (target,))]


def test_a_row_that_is_not_usable_is_not_chosen_before_one_that_hurts() -> None:
    assert round_robin_rows(marked([True, False, True], 1), 2).tolist() == [0, 2]


def test_a_zero_row_marked_usable_is_told_and_not_chosen() -> None:
    with pytest.raises(BadInput, match="train row 1 is marked usable"):
        round_robin_rows(marked([True, True, True], 0), 2)
