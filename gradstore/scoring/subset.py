"""Subsets that serve every target row or drop what hurts, quotas, and budgets counted in tokens.

Letters: n train rows, t target rows, k chosen, m rows of one chunk.

The (n, t) similarities are never held at once: of each target row only its k best are kept, 8 bytes
each, while chunks of rows pass by: 8 t k bytes, and up to six times that while chunks are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.format.layout import RowStatus
from gradstore.scoring.combine import CHUNK_ROWS, combine
from gradstore.scoring.comparable import CheckpointFeatures, check_checkpoints
from gradstore.scoring.scan import as_device
from gradstore.scoring.selection import check_k, select_top
from gradstore.scoring.subtasks import Subtask, source_name, usable_everywhere

_ROW_BITS = np.uint64(32)
_ROW_MASK = np.uint64(0xFFFFFFFF)
_NOTHING = np.uint64(0xFFFFFFFFFFFFFFFF)


class BestRows:
    """The k best rows of each target row, gathered chunk by chunk.

    A score and its row make one whole number that is smaller for a better score and, at equal
    scores, for a lower row: so ties never depend on how rows are cut into chunks.
    """

    def __init__(self, targets: int, k: int) -> None:
        """Keep the k best rows for each of `targets` columns."""
        self._k = k
        self._kept = np.empty((targets, 0), dtype=np.uint64)
        self._pending: list[npt.NDArray[np.uint64]] = []

    def add(self, start: int, scores: npt.NDArray[np.floating]) -> None:
        """Take (m, t) scores of rows start..start+m-1 in; a nan is no candidate."""
        self._pending.append(_keys(start, scores))
        if sum(part.shape[1] for part in self._pending) >= self._k:
            self._merge()

    def ranked(self) -> npt.NDArray[np.int64]:
        """Return (t, up to k) rows, best first; -1 where a column has no candidate left."""
        self._merge()
        keys = np.sort(self._kept, axis=1)
        return np.where(keys == _NOTHING, -1, (keys & _ROW_MASK).astype(np.int64))

    def _merge(self) -> None:
        keys = np.concatenate([self._kept, *self._pending], axis=1)
        self._pending = []
        if keys.shape[1] > self._k:
            keys = np.partition(keys, self._k - 1, axis=1)[:, : self._k].copy()
        self._kept = keys


def _keys(start: int, scores: npt.NDArray[np.floating]) -> npt.NDArray[np.uint64]:
    """Turn (m, t) scores into (t, m) uint64 keys, smaller for better; 0.0 and -0.0 tie."""
    values = -np.ascontiguousarray(scores.T, dtype=np.float32) + np.float32(0)
    bits = values.view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    order = np.where(negative, ~bits, bits | np.uint32(0x80000000)).astype(np.uint64)
    rows = np.arange(start, start + values.shape[1], dtype=np.uint64)
    return np.where(np.isnan(values), _NOTHING, order << _ROW_BITS | rows)


def round_robin(ranked: npt.NDArray[np.integer[Any]], k: int) -> npt.NDArray[np.int64]:
    """Let target rows choose in turn: each takes its best row that none has taken yet.

    The subset rule that "A Critical Look at Targeted Instruction Selection" (arXiv 2602.14696)
    finds best beside gradient scores. Every target row is served equally often, to within one.

    Args:
        ranked: (t, r) whole, each target row's best rows, best first, -1 at the end of a shorter
            list. With r >= k, or all rows in each list, the choice is exact.
        k: how many rows; at least t, so that every target row gets one.

    Returns:
        (k,) int64 distinct rows, in the order of choice.

    Raises:
        BadInput: k below t, or a list that ends before its turn.

    Examples:
        >>> round_robin(np.array([[0, 1, 2], [0, 2, 1]]), 3).tolist()
        [0, 2, 1]
    """
    check_serves_all(k, len(ranked))
    lists = [(int(row) for row in best) for best in ranked]
    taken: dict[int, None] = {}
    while len(taken) < k:
        for target, best in enumerate(lists[: k - len(taken)]):
            row = next((row for row in best if row not in taken), -1)
            if row < 0:
                raise BadInput(
                    f"target row {target} has no row left to take after {len(taken)} of {k}; ask "
                    "for fewer rows."
                )
            taken[row] = None
    return np.fromiter(taken, dtype=np.int64, count=k)


def check_serves_all(k: int, targets: int) -> None:
    """Raise BadInput unless k rows are enough for every target row to get one."""
    if targets < 1 or k < targets:
        raise BadInput(
            f"{k} rows cannot serve {targets} target rows in turn, one each: choose at least "
            f"{max(1, targets)} rows, fewer target rows, or the subset 'top'."
        )


def round_robin_rows(
    checkpoints: Sequence[CheckpointFeatures],
    k: int,
    *,
    device: str | torch.device = "cpu",
    chunk_rows: int = CHUNK_ROWS,
    on_rows: Callable[[int], None] | None = None,
) -> npt.NDArray[np.int64]:
    """Choose k train rows by `round_robin` over the usable target rows, in one pass of the store.

    Args:
        checkpoints: features of the same train and target rows at one or more checkpoints.
        k: rows to choose.
        device: where the products are computed.
        chunk_rows: rows between two progress calls; the choice does not depend on it.
        on_rows: called with the number of rows just compared.

    Returns:
        (k,) int64 rows, in the order of choice.

    Raises:
        BadInput: more rows asked than are usable, or fewer than there are usable target rows; both
            before the pass. A train row marked usable whose feature is zero or not finite.
    """
    check_checkpoints(checkpoints)
    wanted = usable_targets(checkpoints)
    usable = usable_everywhere(checkpoint.train for checkpoint in checkpoints)
    k = check_k(k, int(usable.sum()), usable.size)
    check_serves_all(k, len(wanted))
    best = BestRows(len(wanted), k)

    def keep(start: int, stop: int, cosines: npt.NDArray[np.float32]) -> None:
        best.add(start, np.where(usable[start:stop, None], cosines, np.float32("nan")))
        if on_rows is not None:
            on_rows(stop - start)

    codes = combine(checkpoints, wanted, keep, as_device(device), chunk_rows)
    if (wrong := np.flatnonzero(usable & (codes != RowStatus.OK))).size:
        raise BadInput(
            f"train row {wrong[0]} is marked usable but its feature is zero or not finite; export "
            "the train rows again."
        )
    return round_robin(best.ranked(), k)


def usable_targets(checkpoints: Sequence[CheckpointFeatures]) -> list[Subtask]:
    """List each target row that every checkpoint can use as a sub-task of its own."""
    sets = zip(*(checkpoint.targets for checkpoint in checkpoints), strict=True)
    return [
        Subtask(index, int(row), int(row) + 1, f"row {row} of {source_name(one_set[0])}")
        for index, one_set in enumerate(sets)
        for row in np.flatnonzero(usable_everywhere(one_set))
    ]


def drop_harmful(
    scores: npt.NDArray[np.floating], k: int | None = None, *, usable: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Keep the usable rows whose score is above 0, or the k best of them.

    To first order a step on a row lowers the target's loss by the dot product of their gradients
    (TracIn, arXiv 2002.08484, section 3), so a score of 0 does nothing and one below 0 hurts.

    Args:
        scores: (n,) float influences; a nan is never above 0.
        k: how many rows; None keeps all that help.
        usable: (n,) bool, rows that may be kept.

    Returns:
        int64 rows, best first; ties go to the lower row.

    Raises:
        BadInput: no usable row helps, or fewer than k do.

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
    if k is not None and k > count:
        raise BadInput(
            f"asked {k} rows, but only {count} of {among} usable rows have a score above 0; ask "
            f"for at most {count}, or leave the number out to keep them all."
        )
    return select_top(scores, count if k is None else k, usable=helpful)


def within_quotas(
    scores: npt.NDArray[np.floating],
    names: Sequence[str],
    quotas: Mapping[str, int],
    *,
    usable: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    """Leave of each data set with a quota only its best rows, as many as the quota allows.

    The best k of what is left have the highest sum of scores of all k rows within the quotas:
    rows in groups with a limit each are a partition matroid, where taking the best first is best.

    Args:
        scores: (n,) float.
        names: n data set names.
        quotas: the most rows of a data set, 1 or more; a data set without one may give any number.
        usable: (n,) bool, rows that may be left.

    Returns:
        (n,) bool, the rows that may be chosen; ties go to the lower row.

    Raises:
        BadInput: a quota below 1, or of a data set that no row is from.

    Examples:
        >>> every = np.ones(3, dtype=bool)
        >>> within_quotas(np.array([0.1, 0.7, 0.3]), ["a", "a", "b"], {"a": 1}, usable=every)
        array([False,  True,  True])
    """
    left: npt.NDArray[np.bool_] = usable & ~np.isnan(scores)
    of_row = np.asarray(names)
    for name, most in quotas.items():
        most = expect_whole(most, f"quota of {name!r}")
        of_set = of_row == name
        if not of_set.any():
            known = ", ".join(sorted(set(names)))
            raise BadInput(f"quota of {name!r}, but the train rows are of: {known}.")
        mine = left & of_set
        if mine.sum() > most:
            left &= ~of_set
            left[select_top(scores, most, usable=mine)] = True
    return left


def within_tokens(
    rows: npt.NDArray[np.int64], tokens: npt.NDArray[np.integer[Any]], budget: int
) -> npt.NDArray[np.int64]:
    """Cut an order of choice off where the next row would exceed a budget of tokens.

    It stops there: to go on with shorter rows further down would favour short answers.

    Args:
        rows: (k,) int64, best first.
        tokens: (n,) whole, target tokens of each row.
        budget: tokens that may be taken, at least those of the first row.

    Returns:
        The longest beginning of `rows` with at most `budget` tokens.

    Raises:
        BadInput: a budget below 1, or below the first row's tokens.

    Examples:
        >>> within_tokens(np.array([2, 0, 1]), np.array([5, 1, 3]), 8).tolist()
        [2, 0]
    """
    budget = expect_whole(budget, "token budget")
    expect(len(rows) > 0, "the number of rows", len(rows), "at least one row to take tokens of")
    total = np.cumsum(tokens[rows], dtype=np.int64)
    count = int(np.searchsorted(total, budget, side="right"))
    if count == 0:
        raise BadInput(
            f"token budget is {budget}, but row {rows[0]}, the first to be chosen, has {total[0]} "
            f"target tokens; allow at least {total[0]}."
        )
    return rows[:count]


def most_rows_within(tokens: npt.NDArray[np.integer[Any]], budget: int) -> int:
    """Count the shortest rows that fit a token budget: no choice of rows can hold more."""
    budget = expect_whole(budget, "token budget")
    total = np.cumsum(np.sort(tokens), dtype=np.int64)
    return int(np.searchsorted(total, budget, side="right"))
