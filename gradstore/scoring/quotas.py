"""Budgets: the most rows of a data set, and target tokens in place of a number of rows.

Letters: n rows, k chosen, g data sets with a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect, expect_whole


@dataclass(frozen=True)
class Limits:
    """The most rows that a choice may hold of each of g data sets.

    Attributes:
        of_row: (n,) int64, the number of a row's data set among those with a limit; -1 without one.
        most: (g,) int64, each 1 or more.
    """

    of_row: npt.NDArray[np.int64]
    most: npt.NDArray[np.int64]

    @classmethod
    def of(cls, names: Sequence[str], quotas: Mapping[str, int]) -> Limits:
        """Read the limits of data sets by name.

        Args:
            names: n data set names.
            quotas: the most rows of a data set; one without a quota may give any number.

        Raises:
            BadInput: a quota below 1, or of a data set that no row is from.

        Examples:
            >>> limits = Limits.of(["a", "a", "b"], {"a": 1})
            >>> limits.of_row.tolist(), limits.most.tolist()
            ([0, 0, -1], [1])
        """
        known = dict.fromkeys(names)
        for name, most in quotas.items():
            expect_whole(most, f"quota of {name!r}")
            if name not in known:
                listed = ", ".join(sorted(known))
                raise BadInput(f"quota of {name!r}, but the train rows are of: {listed}.")
        number = {name: index for index, name in enumerate(quotas)}
        of_row = np.fromiter((number.get(name, -1) for name in names), np.int64, len(names))
        return cls(of_row, np.fromiter(quotas.values(), np.int64, len(quotas)))

    def within(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Leave of an order of choice the first rows of each data set, as many as its limit allows.

        The best k of what is left have the highest sum of scores of all k rows within the limits:
        rows in groups with a limit each are a partition matroid, where taking the best first is
        best (Edmonds 1971, Matroids and the greedy algorithm).

        Args:
            order: distinct rows, best first.

        Examples:
            >>> Limits.of(["a", "a", "b"], {"a": 1}).within(np.array([1, 0, 2])).tolist()
            [1, 2]
        """
        of_set = self.of_row[order]
        left = np.ones(len(order), dtype=bool)
        for number, most in enumerate(self.most.tolist()):
            left[np.flatnonzero(of_set == number)[most:]] = False
        return order[left]

    def room(self, usable: npt.NDArray[np.bool_]) -> int:
        """Count the rows that a choice can hold: of each data set the usable ones, or its limit."""
        counts = np.bincount(self.of_row[usable] + 1, minlength=len(self.most) + 1)
        return int(counts[0] + np.minimum(counts[1:], self.most).sum())


def check_room(k: int, usable: npt.NDArray[np.bool_], limits: Limits | None) -> None:
    """Raise BadInput if quotas leave fewer than k of the usable rows."""
    if limits is not None and k > (most := limits.room(usable)):
        raise BadInput(
            f"asked {k} rows, but the quotas leave {most}; ask for at most {most}, or raise a "
            "quota."
        )


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
