"""Rankings against planted rows and exact scores: scikit-learn, brute force and worked numbers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from gradstore.errors import BadInput
from gradstore.evaluation import (
    average_precision,
    mean_reciprocal_rank,
    ndcg_at_k,
    overlap_at,
    rank_correlation,
    recall_at_k,
)

#: Five rows with few distinct scores (so ties are common), and which are relevant (at least one).
RANKED = st.tuples(
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5).filter(any),
)


def over_all_orders(scores: list[int], relevant: list[bool], k: int) -> tuple[float, float]:
    """Recall and reciprocal rank, the mean over every order that sorts the scores."""
    recalls, ranks = [], []
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            hits = [relevant[row] for row in order]
            recalls.append(sum(hits[:k]) / sum(hits))
            ranks.append(1 / (1 + hits.index(True)))
    return float(np.mean(recalls)), float(np.mean(ranks))


@given(RANKED, st.integers(1, 5))
def test_recall_and_reciprocal_rank_are_means_over_every_order_of_tied_rows(
    ranked: tuple[list[int], list[bool]], k: int
) -> None:
    recall, rank = over_all_orders(*ranked, k)
    assert recall_at_k(ranked[0], ranked[1], k).mean == pytest.approx(recall)
    assert mean_reciprocal_rank(*ranked).mean == pytest.approx(rank)


@given(RANKED)
def test_average_precision_is_scikit_learns_also_with_ties(
    ranked: tuple[list[int], list[bool]],
) -> None:
    expected = average_precision_score(ranked[1], ranked[0])
    assert average_precision(*ranked).mean == pytest.approx(expected)


@given(
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any),
    st.integers(1, 6),
)
def test_ndcg_is_scikit_learns_also_with_ties(scores: list[int], exact: list[int], k: int) -> None:
    expected = ndcg_score([exact], [scores], k=k)
    assert ndcg_at_k(scores, exact, k).mean == pytest.approx(expected)


def test_exact_scores_below_zero_gain_nothing() -> None:
    scores, exact = [3.0, 2.0, 1.0], np.array([2.0, -5.0, 1.0])
    assert ndcg_at_k(scores, exact, 3).mean == ndcg_at_k(scores, np.maximum(exact, 0), 3).mean


@given(st.lists(st.floats(0.125, 9, width=32), min_size=20, max_size=20, unique=True))
def test_perfect_scores_give_one(scores: list[float]) -> None:
    best = np.array(scores) >= np.sort(scores)[-3]
    assert recall_at_k(scores, best, 3).mean == 1
    assert mean_reciprocal_rank(scores, best).mean == 1
    assert average_precision(scores, best).mean == pytest.approx(1)
    assert ndcg_at_k(scores, scores, 5).mean == pytest.approx(1)
    assert overlap_at(np.exp(scores), scores, 0.2).mean == 1


def test_overlap_counts_rows_that_both_selections_hold() -> None:
    scores = np.array([np.arange(40.0), np.arange(40.0)])
    exact = np.array([np.arange(40.0), -np.arange(40.0)])
    assert overlap_at(scores, exact, 0.05).values == (1.0, 0.0)


def test_marks_of_all_queries_may_be_given_once() -> None:
    scores = np.array([[3.0, 2, 1], [1, 2, 3]])
    marks = np.array([True, False, False])
    assert mean_reciprocal_rank(scores, marks).values == (1.0, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: recall_at_k([1.0, 2.0], [True, False], 3), "k is 3, but there are 2 rows"),
        (lambda: recall_at_k([1.0, 2.0], [False, False], 1), "marks no row for query 0"),
        (lambda: recall_at_k([1.0, 2.0], [True], 1), r"relevant has shape \(1,\)"),
        (lambda: average_precision([1.0, 2.0], [1, 0]), "planted holds int64"),
        (lambda: mean_reciprocal_rank([1.0, np.nan], [True, False]), r"scores\[0, 1\] is nan"),
        (lambda: ndcg_at_k([1.0, 2.0], [0.0, -1.0], 1), "no exact score of query 0"),
        (lambda: overlap_at([1.0, 2.0], [1.0, 2.0, 3.0]), r"scores are \(1, 2\)"),
        (lambda: overlap_at([1.0, 2.0], [1.0, 2.0], 0), "fraction is 0"),
    ],
)
def test_input_that_does_not_fit_is_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        call()


@given(
    st.lists(st.integers(0, 4), min_size=7, max_size=7).filter(lambda v: len(set(v)) > 1),
    st.lists(st.integers(0, 4), min_size=7, max_size=7).filter(lambda v: len(set(v)) > 1),
)
def test_rank_correlation_is_scipys_also_with_ties(scores: list[int], exact: list[int]) -> None:
    from scipy.stats import spearmanr

    found = rank_correlation(scores, exact)
    assert found.mean == pytest.approx(spearmanr(scores, exact).statistic)


def test_rank_correlation_is_of_each_query_with_an_interval_over_them() -> None:
    exact = np.random.default_rng(0).normal(size=(3, 9))
    scores = np.stack([exact[0] ** 3, -exact[1], np.zeros(9)])
    found = rank_correlation(scores, exact)
    assert found.values == pytest.approx((1, -1, 0))
    assert found.low is not None
    with pytest.raises(BadInput, match="2 rows have no rank correlation"):
        rank_correlation([1.0, 2.0], [1.0, 2.0])
