"""Result of a replay: each training row's exact influence on each target, and its table.

Letters: n training rows, q targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """A loss that was differentiated.

    Attributes:
        name: of the target set.
        row: position in the set; None for the mean over its rows.
    """

    name: str
    row: int | None = None

    def __str__(self) -> str:
        return self.name if self.row is None else f"{self.name}[{self.row}]"


@dataclass(frozen=True, eq=False)
class ReplayTable:
    """Exact influence of n training rows on q targets.

    Attributes:
        targets: (q,).
        derivatives: (q, n) of a target's loss after training by a row's weight, at weight 1.
        times: (n,) int64, how often a row was trained on.
        row_hashes: (n, 16) uint8 of the training rows.
        before: (q,) losses before the first step.
        after: (q,) losses after the last.
        steps: T.
    """

    targets: tuple[Target, ...]
    derivatives: Floats
    times: npt.NDArray[np.int64]
    row_hashes: npt.NDArray[np.uint8]
    before: Floats
    after: Floats
    steps: int

    @property
    def scores(self) -> Floats:
        """(q, n) derivatives with their sign changed: higher for rows that lower the loss."""
        return 0.0 - self.derivatives  # no -0.0 for a row that was never trained on

    def to_arrow(self, rows: Sequence[int] | None = None) -> pa.Table:
        """Make a table of one line for each target and row.

        Args:
            rows: positions (m,) of the training rows to list; None for all.

        Returns:
            `target` (name of the set), `target_row` (null for a whole set), `row`, `row_hash`,
            `times`, `score`.

        Raises:
            BadInput: there is no such row.
        """
        import pyarrow as pa

        n = len(self.times)
        chosen = np.arange(n) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(outside := chosen[(chosen < 0) | (chosen >= n)]):
            raise BadInput(f"row {outside[0]} is not one of the {n:,} training rows (0 to {n - 1})")
        q, m = len(self.targets), len(chosen)
        targets = [each for each in self.targets for _ in range(m)]
        hashes = [bytes(self.row_hashes[row]).hex() for row in chosen]
        return pa.table({
            "target": [each.name for each in targets],
            "target_row": pa.array([each.row for each in targets], pa.int64()),
            "row": np.tile(chosen, q),
            "row_hash": hashes * q,
            "times": np.tile(self.times[chosen], q),
            "score": self.scores[:, chosen].ravel(),
        })  # fmt: skip
