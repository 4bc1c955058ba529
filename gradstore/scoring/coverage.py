"""Facility location over target rows, with a penalty on rows that serve the same ones.

Letters: t target rows, k chosen, m candidates; i runs over train rows, j over target rows.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.scoring.best_rows import Ranked
from gradstore.scoring.quotas import Limits

#: Part of its similarity that a row still counts for a target row that one better row serves.
DISCOUNT = 0.5

#: Most rows that the greedy choice takes: its cost grows faster than k.
MOST_ROWS = 20_000

#: Gains that are computed again together, when the first of them is wanted.
_AT_ONCE = 64

#: Below this part of a similarity further rows of a target row are not kept apart.
_NEGLIGIBLE = 1e-9

FloatArray = npt.NDArray[np.float64]


def facility_location(
    best: Ranked, k: int, *, discount: float = DISCOUNT, limits: Limits | None = None
) -> npt.NDArray[np.int64]:
    """Take, one by one, the row that adds most to how well all target rows are served.

    A set S serves target row j with its similarities above 0, the largest in full, the next ones
    discounted:

        F(S) = sum over j of  s(1, j) + discount s(2, j) + discount^2 s(3, j) + ...,

    where s(1, j) >= s(2, j) >= ... are the similarities of S with j, 0 where a row is not among
    j's best rows. discount 0 is facility location (Cornuejols et al. 1977), 1 the sum of scores;
    between them a row is penalised for each better row that serves the same target rows. F is
    monotone and submodular (a non-negative sum of ranks of uniform matroids), so the greedy choice
    reaches 1 - 1/e of the best F (Nemhauser et al. 1978), half of it under limits, and gains only
    fall: they are computed again only where a row comes first (lazy greedy, Minoux 1978).

    Args:
        best: each target row's best rows, which name at least k rows in all.
        k: how many rows, at most `MOST_ROWS`.
        discount: from 0 to 1.
        limits: the most rows of a data set.

    Returns:
        (k,) int64 distinct rows, in the order of choice; equal gains go to the row of the larger
        sum of similarities, then to the lower row.

    Raises:
        BadInput: k above `MOST_ROWS`, fewer than k rows in all lists, a discount outside [0, 1].
    """
    check_rows(k)
    check_discount(discount)
    served = _Served(best, discount)
    order: list[tuple[float, float, int]] = served.all_gains()
    heapq.heapify(order)
    known_at = np.zeros(len(order), dtype=np.int64)  # rows taken when a gain was computed
    left = [] if limits is None else limits.most.tolist()
    taken: list[int] = []
    while len(taken) < k:
        if not order:
            raise BadInput(f"asked {k} rows, but the target rows name {len(taken)}; ask for fewer.")
        place = order[0][2]
        of_set = -1 if limits is None else int(limits.of_row[served.rows[place]])
        if of_set >= 0 and not left[of_set]:
            heapq.heappop(order)
        elif known_at[place] < len(taken):
            _renew(order, known_at, len(taken), served)
        else:
            heapq.heappop(order)
            served.take(place)
            taken.append(int(served.rows[place]))
            if of_set >= 0:
                left[of_set] -= 1
    return np.array(taken, dtype=np.int64)


def _renew(
    order: list[tuple[float, float, int]],
    known_at: npt.NDArray[np.int64],
    now: int,
    served: _Served,
) -> None:
    """Compute the gains of the first candidates in order again, where they are of an earlier S."""
    stale: list[tuple[float, float, int]] = []
    while order and len(stale) < _AT_ONCE and known_at[order[0][2]] < now:
        stale.append(heapq.heappop(order))
    places = np.array([place for _, _, place in stale])
    known_at[places] = now
    for (_, likeness, place), gain in zip(stale, served.gains(places).tolist(), strict=True):
        heapq.heappush(order, (-gain, likeness, place))


def check_rows(k: int) -> None:
    """Raise BadInput for more rows than the greedy choice takes."""
    if k > MOST_ROWS:
        raise BadInput(
            f"asked {k} rows, but 'facility_location' takes at most {MOST_ROWS:,}: its cost grows "
            "faster than their number. Ask for fewer, or choose 'round_robin' or 'knn_uniform'."
        )


def check_discount(discount: float = DISCOUNT) -> None:
    """Raise BadInput for a discount outside [0, 1]."""
    if not 0 <= discount <= 1:
        raise BadInput(f"discount is {discount}; it must be from 0 to 1.")


class _Served:
    """The service that target rows get from what is taken, and the candidates' gains.

    Attributes:
        rows: (m,) int64 candidates, rising.
    """

    def __init__(self, best: Ranked, discount: float) -> None:
        there = best.rows >= 0
        self.rows, of_row = np.unique(best.rows[there], return_inverse=True)
        order = np.argsort(of_row, kind="stable")
        scores = best.scores[there].astype(np.float64)[order]
        self._bounds = np.searchsorted(of_row[order], np.arange(self.count + 1))
        self._likeness = np.add.reduceat(scores, self._bounds[:-1])
        self._target = np.nonzero(there)[0][order]
        self._value = np.maximum(scores, 0.0)
        depth = best.rows.shape[1]
        if discount < 1:
            enough = np.log(_NEGLIGIBLE) / np.log(discount) if discount else 1
            depth = min(depth, int(np.ceil(enough)))
        self._weight = np.append(discount ** np.arange(depth, dtype=np.float64), 0.0)
        # Similarities of the taken rows with each target row, largest first, and what those from a
        # place on lose when they move down by one.
        self._best = np.zeros((len(best.rows), depth))
        self._lost = np.zeros((len(best.rows), depth + 1))

    @property
    def count(self) -> int:
        """Number of candidates, m."""
        return len(self.rows)

    def all_gains(self) -> list[tuple[float, float, int]]:
        """Return (-gain, -sum of similarities, place) of every candidate when none is taken."""
        gains = np.add.reduceat(self._value, self._bounds[:-1])
        return list(zip((-gains).tolist(), (-self._likeness).tolist(), range(self.count),
                        strict=True))  # fmt: skip

    def gains(self, places: npt.NDArray[np.int64]) -> FloatArray:
        """Return what each of some candidates adds to what is taken."""
        sizes = self._bounds[places + 1] - self._bounds[places]
        starts = np.cumsum(sizes) - sizes
        pairs = np.repeat(self._bounds[places] - starts, sizes) + np.arange(sizes.sum())
        target, value = self._target[pairs], self._value[pairs]
        before = self._best[target]
        above = (before >= value[:, None]).sum(axis=1)
        # What is not above moves down by one place.
        lost = self._lost[target, above]
        return np.add.reduceat(value * self._weight[above] - lost, starts)

    def take(self, place: int) -> None:
        """Take a candidate."""
        target, value = self._of(place)
        with_it = np.column_stack([self._best[target], value])
        self._best[target] = best = -np.sort(-with_it, axis=1)[:, :-1]
        moved = best * (self._weight[:-1] - self._weight[1:])
        self._lost[target, :-1] = np.cumsum(moved[:, ::-1], axis=1)[:, ::-1]

    def _of(self, place: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        pairs = slice(self._bounds[place], self._bounds[place + 1])
        return self._target[pairs], self._value[pairs]
