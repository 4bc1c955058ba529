"""Losses of training rows, computed once per model state and shared by all callers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import Rows


class Measure(Protocol):
    """A pass over some training rows under the present model; collective."""

    def __call__(
        self, positions: npt.NDArray[np.int64], *, max_rows: int
    ) -> npt.NDArray[np.float64]:
        """Take losses of rows (m,), in batches of at most `max_rows`.

        Returns:
            (n,) float64, NaN for rows not asked for.
        """
        ...


class Scoreboard:
    """Per row, the newest loss and the step it was taken at (ALGORITHMS 5, rule 7)."""

    def __init__(self, rows: Rows, measure: Measure, *, batch_tokens: int = 4096) -> None:
        """Begin with no loss known.

        Args:
            rows: n training rows.
            measure: takes the losses that are not known.
            batch_tokens: padded tokens of one of its batches, which a forecast of it counts by.
        """
        self.batch_tokens = batch_tokens
        self._rows = rows
        self._measure = measure
        self._values = np.full(len(rows), np.nan)
        self._taken = np.full(len(rows), -1, dtype=np.int64)
        self._max_age = 0
        self._max_rows: int | None = None
        #: Tokens of the last call's forward passes; 0 where all losses were cached.
        self.tokens = 0

    def losses(
        self,
        step: int,
        positions: npt.NDArray[np.int64] | None = None,
        *,
        max_age: int = 0,
        max_rows: int = 1024,
    ) -> npt.NDArray[np.float64]:
        """Return mean token cross-entropy of rows under the model of `step`, or of a bit earlier.

        Collective: every rank must ask, each then has every loss.

        Args:
            step: g, optimizer steps finished.
            positions: (m,) rows asked for; None for all.
            max_age: how many steps old a loss may be.
            max_rows: rows of a scoring batch, at most.

        Returns:
            (n,) float64, NaN for rows not asked for, and for rows without a target token.
        """
        asked = np.arange(len(self._values)) if positions is None else positions
        oldest = step - max(max_age, self._max_age)
        known = (self._taken[asked] >= 0) & (self._taken[asked] >= oldest)
        wanted = asked[~known]
        self.tokens = int(self._rows.lengths[wanted].sum())
        if len(wanted):
            measured = self._measure(wanted, max_rows=self._max_rows or max_rows)
            self._values[wanted] = measured[wanted]
            self._taken[wanted] = step
        found = np.full(len(self._values), np.nan)
        found[asked] = self._values[asked]
        return found

    def view(self, *, max_age: int, max_rows: int | None = None) -> Scoreboard:
        """Return this board for a caller that accepts losses `max_age` steps old in every request.

        Args:
            max_age: steps.
            max_rows: rows of a scoring batch, at most, whatever is asked for; None: as asked.
        """
        found = copy.copy(self)
        found._max_age, found._max_rows = max_age, max_rows
        return found

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"values": self._values.copy(), "taken": self._taken.copy()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._values[:], self._taken[:] = state["values"], state["taken"]
