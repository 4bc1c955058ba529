"""Target rows that choose in turn, within an update and over updates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradstore.scoring.subset import round_robin


class Turns:
    """Turns of target rows that choose training rows.

    An update of fewer rows than there are target rows goes on with the one whose turn is next, so
    that over a run all are served equally often, to within one.
    """

    def __init__(self) -> None:
        #: Target row whose turn is next.
        self.next = 0

    def take(self, ranked: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Let each target row in turn take its best row that none has taken in this update.

        Args:
            ranked: (q, r) rows, best first, -1 at the end of a shorter list; r >= count, or all
                rows that may be chosen.
            count: at most the rows that may be chosen.

        Returns:
            (count,) distinct rows, in the order of choice.
        """
        targets = len(ranked)
        turns = (self.next + np.arange(min(count, targets))) % targets
        rows = round_robin(ranked[turns], count)
        self.next = (self.next + count) % targets
        return rows
