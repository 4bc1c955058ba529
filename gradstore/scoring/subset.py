"""Rules that turn scores, or each target row's best rows, into a choice of exactly k rows.

Letters: n train rows, t target rows, k chosen, r best rows of each target row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect_whole
from gradstore.scoring.best_rows import Ranked
from gradstore.scoring.quotas import Limits
from gradstore.scoring.selection import select_top

#: Constants of KNN-Uniform where it is compared with other rules (arXiv 2602.14696): the weight
#: alpha of distance against spread, the scale C of distances, and the most neighbours L.
ALPHA, SCALE, MOST_NEIGHBOURS = 0.01, 5.0, 5000


@dataclass(frozen=True)
class NeighbourRule:
    """The way by which `knn_uniform` finds K.

    Attributes:
        alpha: weight of distance against spread, between 0 and 1.
        scale: C, of distances, above 0.

    Raises:
        BadInput: a number outside its limits.
    """

    alpha: float = ALPHA
    scale: float = SCALE

    def __post_init__(self) -> None:
        """Refuse what has no K."""
        if not (0 < self.alpha < 1 and 0 < self.scale < float("inf")):
            raise BadInput(
                f"alpha is {self.alpha}, scale {self.scale}; alpha must be between 0 and 1, scale "
                "above 0 and finite."
            )


def best_first(
    scores: npt.NDArray[np.floating],
    k: int | None,
    *,
    usable: npt.NDArray[np.bool_],
    limits: Limits | None = None,
) -> npt.NDArray[np.int64]:
    """Take the usable rows of the highest scores; no k rows within the limits have a higher sum.

    Args:
        scores: (n,) float; a nan is never taken.
        k: how many rows, at most those that the limits leave; None takes all of these.
        usable: (n,) bool, rows that may be taken.
        limits: the most rows of a data set.

    Returns:
        int64 rows, best first; ties go to the lower row.
    """
    allowed = usable & ~np.isnan(scores)
    if limits is not None:
        every = select_top(scores, int(allowed.sum()), usable=allowed)
        return limits.within(every)[:k]
    return select_top(scores, int(allowed.sum()) if k is None else k, usable=allowed)


def drop_harmful(
    scores: npt.NDArray[np.floating],
    k: int | None = None,
    *,
    usable: npt.NDArray[np.bool_],
    limits: Limits | None = None,
) -> npt.NDArray[np.int64]:
    """Keep the usable rows whose score is above 0, or the k best of them.

    To first order a step of plain gradient descent on a row lowers the target's loss by the dot
    product of their gradients (TracIn, arXiv 2002.08484, section 3): a score of 0 does nothing and
    one below 0 hurts. Of Adam's features it says so of a step with the row beside one without it.

    Args:
        scores: (n,) float influences; a nan is never above 0.
        k: how many rows; None keeps all that help, as far as the limits allow.
        usable: (n,) bool, rows that may be kept.
        limits: the most rows of a data set.

    Returns:
        int64 rows, best first; ties go to the lower row.

    Raises:
        BadInput: no usable row helps, or fewer than k do, or the limits leave fewer of them.

    Examples:
        >>> drop_harmful(np.array([0.1, -0.2, 0.0, 0.7]), usable=np.ones(4, dtype=bool)).tolist()
        [3, 0]
    """
    helpful = usable & (scores > 0)
    count, among = int(helpful.sum()), int(usable.sum())
    if count == 0:
        raise BadInput(
            f"none of {among} usable rows has a score above 0, so 'drop_harmful' keeps none; "
            "choose another target set or the subset 'top'."
        )
    most = count if limits is None else limits.room(helpful)
    if k is not None and k > most:
        within = "" if most == count else f", and the quotas leave {most} of them"
        raise BadInput(
            f"asked {k} rows, but only {count} of {among} usable rows have a score above 0{within};"
            f" ask for at most {most}, or leave the number out to keep them all."
        )
    return best_first(scores, k, usable=helpful, limits=limits)


def round_robin(
    rows: npt.NDArray[np.integer[Any]], k: int, *, limits: Limits | None = None
) -> npt.NDArray[np.int64]:
    """Let target rows choose in turn: each takes its best row that none has taken yet.

    The subset rule that "A Critical Look at Targeted Instruction Selection" (arXiv 2602.14696)
    finds best beside gradient scores. Every target row is served equally often, to within one.

    Args:
        rows: (t, r) whole, each target row's best rows, best first, -1 at the end of a shorter
            list. With those of `best_of_each`, or all rows in each list, the choice is exact.
        k: how many rows; at least t, so that every target row gets one.
        limits: the most rows of a data set; a row of a full one is passed over.

    Returns:
        (k,) int64 distinct rows, in the order of choice.

    Raises:
        BadInput: k below t, or a list that ends before its turn.

    Examples:
        >>> round_robin(np.array([[0, 1, 2], [0, 2, 1]]), 3).tolist()
        [0, 2, 1]
    """
    check_serves_all(k, len(rows))
    lists = [(int(row) for row in best) for best in rows]
    taken: dict[int, None] = {}
    left = [] if limits is None else limits.most.tolist()
    while len(taken) < k:
        for target, best in enumerate(lists[: k - len(taken)]):
            for row in best:
                of_set = -1 if limits is None or row < 0 else int(limits.of_row[row])
                if row not in taken and (of_set < 0 or left[of_set]):
                    break
            else:
                row = -1
            if row < 0:
                raise BadInput(
                    f"target row {target} has no row left to take after {len(taken)} of {k}; ask "
                    "for fewer rows."
                )
            taken[row] = None
            if of_set >= 0:
                left[of_set] -= 1
    return np.fromiter(taken, dtype=np.int64, count=k)


def check_serves_all(k: int, targets: int) -> None:
    """Raise BadInput unless k rows are enough for every target row to get one."""
    if targets < 1 or k < targets:
        raise BadInput(
            f"{k} rows cannot serve {targets} target rows in turn, one each: choose at least "
            f"{max(1, targets)} rows, fewer target rows, or the subset 'top'."
        )


def knn_uniform(
    best: Ranked,
    k: int,
    *,
    neighbours: int | NeighbourRule = NeighbourRule(),
    most: int = MOST_NEIGHBOURS,
    limits: Limits | None = None,
) -> npt.NDArray[np.int64]:
    """Take the rows that are among the K nearest of the most target rows.

    KNN-Uniform of TSDS (arXiv 2410.11303, Algorithm 1), as "A Critical Look at Targeted Instruction
    Selection" (arXiv 2602.14696) turns it into a choice: every target row spreads a mass of 1/t
    equally over its K nearest rows, a row's probability p(i) is the sum of what it is given,

        p(i) = sum over target rows j of [i is among the K nearest of j] / (t K),

    and the rows of the largest p are taken. Distances are d = 1 - similarity, K the first for which

        (alpha / C) sum over j, a <= K of (d(j, K+1) - d(j, a))  >=  (1 - alpha) t,

    with alpha = .01 and C = 5, and `most` where none is. Beyond the paper: where fewer than k rows
    have a share, K goes on until k rows have one; equal shares are ordered by the sum of the
    similarities that gave them, then by the lower row (the authors' code: by the lower row alone,
    so that one target row's choice is that of the lowest numbers among its neighbours).

    Args:
        best: each target row's best rows; without limits, at least `most` or `neighbours`, and k.
        k: how many rows.
        neighbours: K, or the way to find it.
        most: the largest K that is found.
        limits: the most rows of a data set. Shares are given to the rows of `best`, which holds no
            more of a data set than its limit for each target row.

    Returns:
        (k,) int64 distinct rows, largest share first.

    Raises:
        BadInput: fewer than k rows in all lists, neighbours below 1.
    """
    r = best.rows.shape[1]
    if isinstance(neighbours, NeighbourRule):
        wanted = neighbours_by_rule(1.0 - best.scores[:, :most], min(r, most), neighbours)
    else:
        wanted = min(r, expect_whole(neighbours, "neighbours"))
    width = _width_for(best.rows, k, wanted, limits)
    rows, share, likeness = shares(best, width)
    order = rows[np.lexsort((rows, -likeness, -share))]
    return (order if limits is None else limits.within(order))[:k]


def neighbours_by_rule(
    distances: npt.NDArray[np.floating[Any]], most: int, rule: NeighbourRule = NeighbourRule()
) -> int:
    """Find the K of `knn_uniform` from (t, r) rising distances; `most` where no K fulfils it.

    Examples:
        >>> neighbours_by_rule(np.array([[0.0, 0.0, 400.0, 900.0]]), 4)
        2
    """
    total = distances.sum(axis=0, dtype=np.float64)
    count = np.arange(1, len(total))
    spread = count * total[1:] - np.cumsum(total)[:-1]
    weight, least = rule.alpha / rule.scale, (1.0 - rule.alpha) * len(distances)
    enough = np.flatnonzero(weight * spread >= least)
    return min(most, int(enough[0]) + 1 if enough.size else most)


def _width_for(rows: npt.NDArray[np.int64], k: int, start: int, limits: Limits | None) -> int:
    """Return the first number of columns, from `start` on, that k rows can be taken from."""
    named, first = np.unique(rows.T.ravel(), return_index=True)
    order = np.argsort(np.where(named >= 0, first, rows.size), kind="stable")
    order = order[: np.count_nonzero(named >= 0)]
    if limits is not None:
        order = order[np.isin(named[order], limits.within(named[order]))]
    if len(order) < k:
        raise BadInput(f"asked {k} rows, but the target rows name {len(order)}; ask for fewer.")
    return max(start, int(first[order[k - 1]]) // len(rows) + 1)


def shares(
    best: Ranked, width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Count how many target rows name a row among their first `width`.

    Returns:
        Distinct rows in rising order, the target rows that name each, and the sum of those
        similarities.
    """
    named, scores = best.rows[:, :width], best.scores[:, :width]
    there = named >= 0
    rows, inverse = np.unique(named[there], return_inverse=True)
    likeness = np.bincount(inverse, weights=scores[there]).astype(np.float64)
    return rows, np.bincount(inverse).astype(np.float64), likeness
