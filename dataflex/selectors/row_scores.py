"""Scores of all training rows, and what chooses among them.

Letters: n training rows, t target rows, c rows that are ranked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gradstore.scoring.best_rows import TargetTable


@dataclass(frozen=True)
class RowScores:
    """One score per training row.

    Attributes:
        values: (n,) float, the larger the better; NaN where the row is not usable.
        usable: (n,) bool.
        skipped: number of unusable rows by reason.
        best: (n,) int, the sub-task that gives a row its score; None where all of them do.
        table: (n, t) similarities with each target row, for the rules that ask each; None where
            they are those of the stored features.
        again: (c,) int64, the rule's own choice of rows to rank again; None where those are the
            best scores.
    """

    values: npt.NDArray[np.floating[Any]]
    usable: npt.NDArray[np.bool_]
    skipped: Mapping[str, int]
    best: npt.NDArray[np.integer[Any]] | None = None
    table: TargetTable | None = None
    again: npt.NDArray[np.int64] | None = None
