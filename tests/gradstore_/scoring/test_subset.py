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
from gradstore.scoring.best_rows import BestRows, HeldTable, Ranked, best_of_each, ranked
from gradstore.scoring.quotas import Limits, most_rows_within, within_tokens
from gradstore.scoring.subset import (
    NeighbourRule,
    best_first,
    drop_harmful,
    knn_uniform,
    neighbours_by_rule,
    round_robin,
    shares,
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


def room(chosen: list[int], row: int, limits: Limits | None) -> bool:
    """Whether a row's data set may give one more."""
    if limits is None or limits.of_row[row] < 0:
        return True
    same = [each for each in chosen if limits.of_row[each] == limits.of_row[row]]
    return len(same) < limits.most[limits.of_row[row]]


def in_turn(table: npt.NDArray[np.float32], k: int, limits: Limits | None = None) -> list[int]:
    """Round robin by looking at the whole matrix for every single choice."""
    chosen: list[int] = []
    while len(chosen) < k:
        order = ranked_by_sorting(table, len(chosen) % table.shape[1])
        chosen.append(next(r for r in order if r not in chosen and room(chosen, r, limits)))
    return chosen


def gathered(table: npt.NDArray[np.float32], k: int, limits: Limits | None = None) -> Ranked:
    """Each target row's best rows of a whole matrix."""
    return best_of_each(HeldTable(table), k, usable=np.ones(len(table), dtype=bool), limits=limits)


@st.composite
def limits_of(draw: st.DrawFn, size: int) -> Limits | None:
    """Limits on some of three data sets, or none."""
    names = draw(st.lists(st.sampled_from("abc"), min_size=size, max_size=size))
    quotas = draw(st.dictionaries(st.sampled_from(sorted(set(names))), st.integers(1, 4)))
    return Limits.of(names, quotas) if quotas else None


@given(TABLES, st.integers(1, 30), st.integers(1, 30))
def test_the_best_rows_are_those_of_a_full_sort_however_rows_are_cut(
    table: npt.NDArray[np.float32], k: int, chunk: int
) -> None:
    best = BestRows(table.shape[1], k)
    for start in range(0, len(table), chunk):
        part = table[start : start + chunk]
        best.add(np.arange(start, start + len(part)), part)
    found = ranked([best])
    for target, rows in enumerate(found.rows.tolist()):
        expected = ranked_by_sorting(table, target)[:k]
        assert rows == expected + [-1] * (len(rows) - len(expected))
        there = found.scores[target, : len(expected)]
        assert np.array_equal(there, table[expected, target]), "scores come back as they went in"
        assert np.isnan(found.scores[target, len(expected) :]).all()


@given(TABLES, st.data())
def test_round_robin_is_what_choosing_from_the_whole_matrix_gives(
    table: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    table = np.nan_to_num(table, nan=0.75)
    limits = data.draw(limits_of(len(table)))
    most = len(table) if limits is None else limits.room(np.ones(len(table), dtype=bool))
    table = table[:, :most]
    k = data.draw(st.integers(table.shape[1], most))
    chosen = round_robin(gathered(table, k, limits).rows, k, limits=limits).tolist()
    assert chosen == in_turn(table, k, limits)
    assert len(set(chosen)) == k


def test_a_target_row_that_all_rows_help_less_is_served_as_often() -> None:
    table = np.zeros((40, 2), dtype=np.float32)
    table[:20, 0], table[20:, 1] = 1.0, 0.01
    chosen = round_robin(gathered(table, 10).rows, 10).tolist()
    assert chosen == [0, 20, 1, 21, 2, 22, 3, 23, 4, 24]


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
    limits = Limits.of(names, quotas)
    for k in range(1, size + 1):
        kept = [
            rows
            for rows in combinations(np.flatnonzero(usable).tolist(), k)
            if all([names[row] for row in rows].count(n) <= most for n, most in quotas.items())
        ]
        assert bool(kept) == (limits.room(usable) >= k)
        if kept:
            best = max(float(scores[list(rows)].sum()) for rows in kept)
            rows = best_first(scores, k, usable=usable, limits=limits)
            assert tuple(sorted(rows.tolist())) in kept
            assert float(scores[rows].sum()) == best


@pytest.mark.parametrize(
    ("quotas", "told"), [({"c": 1}, "quota of 'c', .* of: a, b"), ({"a": 0}, "quota of 'a' is 0")]
)
def test_a_quota_that_means_nothing_is_refused(quotas: dict[str, int], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        Limits.of(["a", "b"], quotas)


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


# -- KNN-uniform ----------------------------------------------------------------------------------


def shares_by_hand(table: npt.NDArray[np.float32], k: int, neighbours: int) -> list[int]:
    """Rows by the probability of KNN-Uniform, straight from its formula; K grows to reach k."""
    n, t = table.shape
    while True:
        probability, likeness = [0] * n, [0.0] * n
        for target in range(t):
            for row in ranked_by_sorting(table, target)[:neighbours]:
                probability[row] += 1
                likeness[row] += float(table[row, target])
        named = [row for row in range(n) if probability[row]]
        if len(named) >= k:
            return sorted(named, key=lambda r: (-probability[r], -likeness[r], r))[:k]
        neighbours += 1


@given(TABLES, st.data())
def test_knn_uniform_is_what_its_formula_gives(
    table: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    table = np.nan_to_num(table, nan=0.75)
    k = data.draw(st.integers(1, len(table)))
    neighbours = data.draw(st.integers(1, len(table)))
    best = gathered(table, max(k, neighbours))
    chosen = knn_uniform(best, k, neighbours=neighbours).tolist()
    assert chosen == shares_by_hand(table, k, neighbours)


@given(arrays(np.float64, (4, 12), elements=st.floats(0, 2)), st.floats(0.01, 0.99))
def test_the_neighbours_are_those_that_the_published_loop_stops_at(
    distances: npt.NDArray[np.float64], alpha: float
) -> None:
    distances = np.sort(distances, axis=1)
    neighbours = 1
    while neighbours < 12:
        gaps = distances[:, neighbours, None] - distances[:, :neighbours]
        total, enough = alpha / 5.0 * gaps.sum(), (1 - alpha) * 4
        if abs(total - enough) < 1e-9:
            return  # the two sums may round to either side
        if total >= enough:
            break
        neighbours += 1
    assert neighbours_by_rule(distances, 12, NeighbourRule(alpha)) == neighbours


@pytest.mark.parametrize(
    ("seed", "scale", "shape", "neighbours", "named", "most_named"),
    [
        (0, 40.0, (300, 6), 28, [162, 111, 24, 3], [7, 223, 232]),
        (1, 120.0, (500, 9), 10, [416, 80, 3, 0, 1], [373]),
        (2, 15.0, (200, 5), 54, [42, 73, 60, 23, 2], [114, 156]),
    ],
)
def test_knn_uniform_gives_the_shares_that_its_authors_code_gives(
    seed: int,
    scale: float,
    shape: tuple[int, int],
    neighbours: int,
    named: list[int],
    most_named: list[int],
) -> None:
    """K, rows by the number of target rows that name them, and the rows named most.

    Printed by `run_tsds_knn_uniform` of dcml-lab/targeted-instruction-selection at 38363fd.
    """
    table = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(scale)
    best = gathered(table, len(table))
    assert neighbours_by_rule(1.0 - best.scores, len(table)) == neighbours
    rows, count, _ = shares(best, neighbours)
    every = np.zeros(len(table), dtype=np.int64)
    every[rows] = count
    assert np.bincount(every).tolist() == named
    assert np.flatnonzero(every == every.max()).tolist() == most_named
    chosen = knn_uniform(best, len(most_named), most=len(table))
    assert sorted(chosen.tolist()) == most_named


@pytest.mark.parametrize(
    ("seed", "shape", "in_turns", "by_best"),
    [
        (
            0, (300, 6), [45, 175, 182, 36, 268, 207, 294, 269, 110, 155, 215, 129],
            [36, 175, 182, 45, 207, 294, 269, 41, 155, 129, 268, 110],
        ),
        (
            1, (500, 9), [369, 224, 493, 30, 388, 95, 373, 173, 364, 167, 333, 234],
            [95, 364, 388, 373, 156, 405, 330, 30, 224, 216, 369, 20],
        ),
        (
            2, (200, 5), [195, 46, 94, 153, 85, 166, 88, 182, 198, 144, 125, 58],
            [195, 85, 94, 166, 125, 46, 88, 144, 182, 58, 120, 175],
        ),
    ],
)  # fmt: skip
def test_rows_taken_in_turn_or_by_their_best_target_row_are_those_of_the_comparisons_authors_code(
    seed: int, shape: tuple[int, int], in_turns: list[int], by_best: list[int]
) -> None:
    """Printed by `round_robin_selection` and `doubly_greedy_selection` of its repository.

    dcml-lab/targeted-instruction-selection; the latter is `top` of each row's largest similarity.
    """
    table = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    every = np.ones(len(table), dtype=bool)
    assert round_robin(gathered(table, 12).rows, 12).tolist() == in_turns
    assert best_first(table.max(axis=1), 12, usable=every).tolist() == by_best


def test_a_row_near_two_target_rows_goes_before_the_nearest_of_one() -> None:
    table = np.array([[0.9, 0.0], [0.5, 0.4], [0.0, 0.8], [0.1, 0.1]], dtype=np.float32)
    assert knn_uniform(gathered(table, 4), 3, neighbours=2).tolist() == [1, 0, 2]


@given(TABLES, st.data())
def test_knn_uniform_keeps_limits_and_still_takes_k(
    table: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    table = np.nan_to_num(table, nan=0.75)
    limits = data.draw(limits_of(len(table)))
    most = len(table) if limits is None else limits.room(np.ones(len(table), dtype=bool))
    k = data.draw(st.integers(1, most))
    chosen = knn_uniform(gathered(table, k, limits), k, neighbours=1, limits=limits).tolist()
    assert len(set(chosen)) == k
    assert all(room(chosen[:place], row, limits) for place, row in enumerate(chosen))


def test_fewer_rows_than_asked_in_all_lists_are_an_error() -> None:
    with pytest.raises(BadInput, match="asked 3 rows, but the target rows name 2"):
        knn_uniform(gathered(np.ones((2, 2), dtype=np.float32), 2), 3)
