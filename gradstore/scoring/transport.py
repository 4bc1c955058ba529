"""Unbalanced optimal transport from the target rows to their best train rows.

Letters: n train rows, t target rows, k chosen, r best rows of each target row; i runs over train
rows, j over target rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.scoring.best_rows import Ranked
from gradstore.scoring.quotas import Limits
from gradstore.scoring.subset import shares

FloatArray = npt.NDArray[np.float64]

#: Number of sweeps after which a plan that has not settled is refused.
MOST_SWEEPS = 2000


@dataclass(frozen=True)
class Marginals:
    """Weights of a transport: the freedom of its spread, and the bond to its marginals.

    Every target row sends exactly 1/t, a train row may receive almost any mass. The comparison in
    arXiv 2602.14696 has the same numbers (its public code's `eps`, `reg_m1` and `reg_m2`) for
    distances half as large: its rows are those of twice the blur and twice the train weight.

    Attributes:
        blur: epsilon > 0, weight of the entropy; similarities closer than it count as alike.
        target: weight of KL(sent || 1/t); infinite keeps the target rows' masses exactly.
        train: weight of KL(received || 1/n); infinite makes every train row receive the same.
    """

    blur: float = 0.01
    target: float = float("inf")
    train: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse weights that have no meaning."""
        if not (0 < self.blur < np.inf and self.target > 0 and self.train >= 0):
            raise BadInput(
                f"blur is {self.blur}, target {self.target}, train {self.train}; blur must be above"
                " 0 and finite, target above 0, train 0 or more."
            )


@dataclass(frozen=True)
class Plan:
    """A transport plan on the pairs of target rows and their best rows.

    Attributes:
        rows: (m,) int64, distinct train rows, rising.
        received: (m,) float64, log of the mass that each receives.
        sent: (t, r) float64, log of the mass sent along each pair; -inf where there is no row.
    """

    rows: npt.NDArray[np.int64]
    received: FloatArray
    sent: FloatArray


def transport_plan(
    best: Ranked, n: int, marginals: Marginals = Marginals(), tolerance: float = 1e-9
) -> Plan:
    """Solve entropic unbalanced optimal transport by Sinkhorn's scaling, in the log domain.

    Over plans P >= 0 on the given pairs, minimise

        sum P(i, j) (1 - s(i, j)) + blur sum P log P
          + target KL(sum_i P(i, j) || 1/t) + train KL(sum_j P(i, j) || 1/n)

    (Chizat et al. 2018, Scaling algorithms for unbalanced optimal transport, arXiv 1607.05816). A
    sweep is two sums over the t r pairs. A pair that is not given carries no mass: with r best
    rows of each target row what is left out weighs at most exp(-gap / blur) of the best pair.

    Args:
        best: each target row's best rows and similarities.
        n: usable train rows, which the train marginal is uniform over.
        marginals: the weights.
        tolerance: change of a sweep, in units of log mass, below which the plan has settled.

    Raises:
        BadInput: the plan has not settled within `MOST_SWEEPS` sweeps.
    """
    there = best.rows >= 0
    rows, inverse = np.unique(best.rows[there], return_inverse=True)
    kernel = (best.scores[there].astype(np.float64) - 1.0) / marginals.blur
    of_target = np.broadcast_to(np.arange(len(best.rows))[:, None], there.shape)[there]
    by_row, by_target = _Grouped(inverse, len(rows)), _Grouped(of_target, len(best.rows))
    keep_train = _exponent(marginals.train, marginals.blur)
    keep_target = _exponent(marginals.target, marginals.blur)
    at_target = np.zeros(len(best.rows))
    for _ in range(MOST_SWEEPS):
        at_row = keep_train * (-np.log(n) - by_row.logsumexp(kernel + at_target[of_target]))
        before = at_target
        arriving = by_target.logsumexp(kernel + at_row[inverse])
        at_target = keep_target * (-np.log(len(best.rows)) - arriving)
        if np.abs(at_target - before).max() <= tolerance:
            break
    else:
        raise BadInput(
            f"the transport has not settled in {MOST_SWEEPS} sweeps; raise blur "
            f"({marginals.blur}) or lower train ({marginals.train}) among subset_params."
        )
    pairs = kernel + at_target[of_target] + at_row[inverse]
    sent = np.full(there.shape, -np.inf)
    sent[there] = pairs
    return Plan(rows, by_row.logsumexp(pairs), sent)


def transport(
    best: Ranked,
    k: int,
    n: int,
    *,
    marginals: Marginals = Marginals(),
    limits: Limits | None = None,
) -> npt.NDArray[np.int64]:
    """Take the k rows that receive the most mass of `transport_plan`.

    Args:
        best: each target row's best rows, which name at least k rows in all.
        k: how many rows.
        n: usable train rows.
        marginals: the weights of the plan.
        limits: the most rows of a data set.

    Returns:
        (k,) int64 distinct rows, largest mass first; logs of masses that agree to the 9th decimal,
        beyond which the plan has not settled, are ordered by the sum of the similarities, then by
        the lower row.

    Raises:
        BadInput: fewer than k rows in all lists, or a plan that does not settle.
    """
    plan = transport_plan(best, n, marginals)
    _, _, likeness = shares(best, best.rows.shape[1])
    order = plan.rows[np.lexsort((plan.rows, -likeness, -plan.received.round(9)))]
    if limits is not None:
        order = limits.within(order)
    if len(order) < k:
        raise BadInput(f"asked {k} rows, but the target rows name {len(order)}; ask for fewer.")
    return order[:k]


def _exponent(weight: float, blur: float) -> float:
    """Return the power that a marginal's penalty leaves of a scaling step."""
    return 1.0 if np.isinf(weight) else weight / (weight + blur)


class _Grouped:
    """Sums of exponentials over groups of values that lie anywhere."""

    def __init__(self, of: npt.NDArray[np.int64], groups: int) -> None:
        self._order = np.argsort(of, kind="stable")
        self._starts = np.searchsorted(of[self._order], np.arange(groups))
        self._sizes = np.bincount(of, minlength=groups)

    def logsumexp(self, values: FloatArray) -> FloatArray:
        """Return log sum exp of each group's values; every group has one."""
        values = values[self._order]
        highest = np.maximum.reduceat(values, self._starts)
        parts = np.exp(values - np.repeat(highest, self._sizes))
        return np.asarray(highest + np.log(np.add.reduceat(parts, self._starts)))
