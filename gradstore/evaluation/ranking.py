"""Metrics of a ranking against rows that are known: planted facts, poison, exact scores.

Rows with equal scores have no order: a metric is the mean over all their orders, so a score that
cannot tell rows apart gains nothing from their place in the file. Every metric is computed for each
query alone and averaged over queries, with an interval.

Letters: n training rows, q queries, k rows at the top.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect_whole
from gradstore.evaluation.estimates import (
    Estimate,
    Floats,
    Mask,
    Numbers,
    estimate,
    row_masks,
    score_matrix,
    spearman,
)
from gradstore.scoring.selection import rows_for_fraction, select_top

_LEAST_ROWS = 3


def recall_at_k(scores: Numbers, relevant: npt.ArrayLike, k: int, *, seed: int = 0) -> Estimate:
    """Compute the share of the relevant rows that are among the k best.

    Per query |top k and relevant| / |relevant| (DATE-LM 2507.09424, Recall@50). A query with more
    than k relevant rows cannot reach 1.

    Args:
        scores: (q, n), higher for rows that matter more; (n,) for one query.
        relevant: (q, n) bool, such as the rows that state the query's fact; (n,) for all queries.
        k: from 1 to n.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a score that is not finite, a query without a relevant
            row, k outside 1..n.

    Examples:
        >>> recall_at_k([0.9, 0.1, 0.8, 0.3], [True, True, False, False], 2).mean
        0.5
    """
    values, marks = _with_relevant(scores, relevant, "relevant")
    count = _cut(k, values.shape[1])
    return estimate(
        [
            float((chance * mark).sum() / mark.sum())
            for chance, mark in zip((_in_top(row, count) for row in values), marks, strict=True)
        ],
        seed=seed,
    )


def mean_reciprocal_rank(scores: Numbers, relevant: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Compute the mean of 1 / rank of the first relevant row.

    Source: Voorhees, TREC-8 question answering track (1999); DATE-LM's MRR. With ties, the mean
    over the orders of the tied rows.

    Args:
        scores: (q, n), higher for rows that matter more; (n,) for one query.
        relevant: (q, n) bool; (n,) for all queries.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a score that is not finite, a query without a relevant
            row.

    Examples:
        >>> mean_reciprocal_rank([0.9, 0.1, 0.8, 0.3], [False, True, True, False]).mean
        0.5
    """
    values, marks = _with_relevant(scores, relevant, "relevant")
    ranks = [_reciprocal_rank(row, mark) for row, mark in zip(values, marks, strict=True)]
    return estimate(ranks, seed=seed)


def average_precision(scores: Numbers, planted: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Compute the area under the precision-recall curve of planted rows (AUPRC).

    Per query the sum over thresholds t, from the highest score down, of
    (recall_t - recall_before) * precision_t; equal scores share one threshold. This is
    `sklearn.metrics.average_precision_score`; DATE-LM joins the same points by straight
    lines, which gives slightly other areas. A ranking without any knowledge reaches about the share
    of planted rows.

    Args:
        scores: (q, n), higher for rows suspected more; (n,) for one query.
        planted: (q, n) bool, the rows to be found; (n,) for all queries.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a score that is not finite, a query without a planted row.

    Examples:
        >>> round(average_precision([0.9, 0.1, 0.8, 0.3], [True, False, False, True]).mean, 4)
        0.8333
    """
    values, marks = _with_relevant(scores, planted, "planted")
    return estimate(
        [_average_precision(row, mark) for row, mark in zip(values, marks, strict=True)], seed=seed
    )


def ndcg_at_k(scores: Numbers, exact: Numbers, k: int = 20, *, seed: int = 0) -> Estimate:
    """Compute the normalised discounted cumulative gain of a ranking against exact scores.

    Per query DCG(scores) / DCG(exact), DCG the sum over ranks i = 1..k of gain_i / log2(i + 1)
    (Jarvelin and Kekalainen 2002; `sklearn.metrics.ndcg_score`). A row's gain is its exact score;
    one below zero gains 0, since a row that hurts is no answer to "which rows helped".

    Args:
        scores: (q, n) the cheap scores; (n,) for one query.
        exact: (q, n) the scores they stand in for.
        k: rows that count, from 1 to n.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a number that is not finite, a query without an exact
            score above zero, k outside 1..n.

    Examples:
        >>> round(ndcg_at_k([0.1, 0.9, 0.5], [3.0, 2.0, 0.0], 2).mean, 4)
        0.4693
    """
    values, truth = _paired(scores, exact)
    count = _cut(k, values.shape[1])
    gains = np.maximum(truth, 0)
    if (empty := np.flatnonzero(~gains.any(axis=1))).size:
        raise BadInput(
            f"no exact score of query {empty[0]} is above zero: no row is right for it; leave such "
            "queries out"
        )
    discount = np.zeros(values.shape[1])
    discount[:count] = 1 / np.log2(np.arange(2, count + 2))
    return estimate(
        [
            _gain(row, gain, discount) / _gain(gain, gain, discount)
            for row, gain in zip(values, gains, strict=True)
        ],
        seed=seed,
    )


def rank_correlation(scores: Numbers, exact: Numbers, *, seed: int = 0) -> Estimate:
    """Compute Spearman's rank correlation of scores and exact ones, such as those of a replay.

    Per query over the rows; equal scores share their mean rank. 1 is the same order, -1 the
    reverse; a query whose scores are all equal counts as 0, since they order nothing.

    Args:
        scores: (q, n); (n,) for one query.
        exact: (q, n) the scores they stand in for.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a number that is not finite, fewer than 3 rows.

    Examples:
        >>> rank_correlation([0.1, 0.9, 0.5], [3.0, 9.0, 5.0]).mean
        1.0
    """
    values, truth = _paired(scores, exact)
    if values.shape[1] < _LEAST_ROWS:
        raise BadInput(
            f"{values.shape[1]} rows have no rank correlation worth the name; score at least "
            f"{_LEAST_ROWS}"
        )
    return estimate(
        [spearman(row, other) for row, other in zip(values, truth, strict=True)], seed=seed
    )


def overlap_at(scores: Numbers, exact: Numbers, share: float = 0.05, *, seed: int = 0) -> Estimate:
    """Compute the share of rows that two scores both select.

    Per query |top k of scores and top k of exact| / k, with k = share * n, rounded down but at
    least 1. It compares selections, so ties are cut as `select_top` cuts them: the lower row first.

    Args:
        scores: (q, n); (n,) for one query.
        exact: (q, n) the scores they stand in for.
        share: of the rows, above 0 and at most 1.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a number that is not finite, a share outside (0, 1].

    Examples:
        >>> overlap_at([4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 2.0], 0.5).mean
        0.5
    """
    values, truth = _paired(scores, exact)
    count = rows_for_fraction(share, values.shape[1])
    return estimate(
        [
            np.intersect1d(select_top(row, count), select_top(other, count)).size / count
            for row, other in zip(values, truth, strict=True)
        ],
        seed=seed,
    )


# ---- one query ---------------------------------------------------------------------------------


def _in_top(scores: Floats, k: int) -> Floats:
    """Compute each row's chance (n,) of being among the k best, ties in any order."""
    threshold = np.partition(scores, scores.size - k)[scores.size - k]
    above, tied = scores > threshold, scores == threshold
    return np.asarray(above + tied * ((k - above.sum()) / tied.sum()), dtype=np.float64)


def _reciprocal_rank(scores: Floats, relevant: Mask) -> float:
    """Compute the mean of 1 / rank of the first relevant row over the orders of tied rows."""
    best = scores[relevant].max()
    above, tied = int((scores > best).sum()), int((scores == best).sum())
    marked = int((relevant & (scores == best)).sum())
    # chance is that no relevant row came before: drawing the tied rows one by one.
    mean, chance = 0.0, 1.0
    for drawn in range(tied - marked + 1):
        hit = marked / (tied - drawn)
        mean += chance * hit / (above + drawn + 1)
        chance *= 1 - hit
    return mean


def _average_precision(scores: Floats, planted: Mask) -> float:
    """Compute the average precision with one threshold per distinct score."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), scores.size - 1)
    found = np.cumsum(planted[order])[ends]
    gained = np.diff(found, prepend=0)
    return float((gained * found / (ends + 1)).sum() / found[-1])


def _gain(scores: Floats, gains: Floats, discount: Floats) -> float:
    """Sum gains by discounted rank; tied rows share the mean of their gains."""
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    mean_gain = np.bincount(group, weights=gains) / sizes
    starts = np.cumsum(sizes) - sizes
    return float(mean_gain @ np.add.reduceat(discount, starts))


# ---- checks ------------------------------------------------------------------------------------


def _with_relevant(scores: object, relevant: object, what: str) -> tuple[Floats, Mask]:
    """Return scores (q, n) and marks (q, n); raise BadInput for a query without a marked row."""
    values = score_matrix(scores)
    queries, rows = values.shape
    marks = row_masks(relevant, what, rows, queries)
    if (empty := np.flatnonzero(~marks.any(axis=1))).size:
        raise BadInput(f"{what} marks no row for query {empty[0]}; leave such queries out")
    return values, marks


def _paired(scores: object, exact: object) -> tuple[Floats, Floats]:
    """Return both scores (q, n); raise BadInput unless they are of the same queries and rows."""
    values, truth = score_matrix(scores), score_matrix(exact, "exact")
    if values.shape != truth.shape:
        raise BadInput(
            f"scores are {values.shape} and exact {truth.shape} (queries, rows); give both for the "
            "same queries and rows"
        )
    return values, truth


def _cut(k: object, rows: int) -> int:
    """Return k; raise BadInput unless it is a whole number from 1 to the rows."""
    count = expect_whole(k, "k")
    if count > rows:
        raise BadInput(f"k is {count}, but there are {rows} rows; give a k from 1 to {rows}")
    return count
