"""Nearest rows by cosine, column by column."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradstore.pace import LONG_SECONDS, duration, product_seconds
from gradstore.scoring.best_rows import BestRows, ranked
from gradstore.scoring.combine import CHUNK_ROWS

if TYPE_CHECKING:
    from gradstore.store.generation import Generation


_log = logging.getLogger(__name__)

#: Multiplications that take less than a second on any machine: nothing is measured for them.
_SHORT = 10**9

Matrix = npt.NDArray[np.int64]


class Neighbours:
    """The training rows nearest to each target row, by cosine."""

    def __init__(
        self, train: Generation, targets: Sequence[Generation], cache_dir: Path | None
    ) -> None:
        """Index the training rows.

        Args:
            train: embeddings of the training rows.
            targets: of the target sets; rows that can't be used are left out.
            cache_dir: the store's folder of indexes, where this one is to be cached.
        """
        from gradstore.scoring.comparable import CheckpointFeatures
        from gradstore.similarity.index import FeatureIndex
        from gradstore.similarity.rows import UsableRows

        #: Both sides, as scores and subset rules read them.
        self.pair = CheckpointFeatures(train, targets)
        self._index = FeatureIndex.build(train, cache_dir)
        self._train = UsableRows(train)
        self._queries = np.concatenate([UsableRows(g)[:] for g in targets])
        self._held: tuple[npt.NDArray[np.float32], Matrix] | None = None
        self._sample: tuple[Matrix, npt.NDArray[np.float32]] | None = None
        #: (n,) bool, rows that may be found.
        self.usable: npt.NDArray[np.bool_] = train.usable

    def nearest(self, k: int) -> tuple[npt.NDArray[np.float32], Matrix]:
        """Return (q, k) cosines, highest first, and (q, k) rows; ties go to the lower row.

        Args:
            k: at most the usable rows.
        """
        if self._held is None or self._held[1].shape[1] < k:
            self._tell(len(self._queries))
            self._held = self._index.search(self._queries, k)
        cosines, rows = self._held
        return cosines[:, :k], rows[:, :k]

    def around(self, rows: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.float32]:
        """Return (len(rows), k) cosines of usable training rows to their nearest, self first."""
        self._tell(len(rows))
        places = np.searchsorted(self._train.rows, rows)
        return self._index.search(self._train[places], k)[0]

    def around_in_sample(
        self, rows: npt.NDArray[np.int64], k: int, size: int
    ) -> npt.NDArray[np.float32]:
        """Return (len(rows), k) cosines to the nearest of a sample of the training rows.

        The sample is evenly spaced, so that it is a function of the rows alone. A row is not
        counted as its own neighbour.

        Args:
            rows: usable training rows.
            k: at most `size`.
            size: rows of the sample; at most the usable rows.
        """
        if self._sample is None or len(self._sample[0]) != size:
            spaced = np.arange(size, dtype=np.int64) * len(self._train) // size
            self._sample = spaced, self._train[spaced]
        spaced, sample = self._sample
        places = np.searchsorted(self._train.rows, rows)
        cosines = self._train[places] @ sample.T
        cosines[places[:, None] == spaced[None, :]] = -1.0
        return -np.partition(-cosines, k - 1, axis=1)[:, :k]

    def ranked(
        self, k: int, allowed: npt.NDArray[np.bool_]
    ) -> tuple[Matrix, npt.NDArray[np.float64]]:
        """Rank, for each target row, the rows that may be chosen, in one pass over the rows.

        Args:
            k: rows of each target row's list, at least 1.
            allowed: (n,) bool, rows that may be chosen.

        Returns:
            (q, up to k) rows, nearest first, ties to the lower row, -1 where no allowed row is left
            (memory of it: 8 q k bytes, and up to six times that on the way); (n,) float64, each
            allowed row's highest cosine to a target row, NaN elsewhere.
        """
        self._tell(len(self._queries))
        best, rows = BestRows(len(self._queries), k), self._train.rows
        highest = np.full(len(self.usable), np.nan)
        for start in range(0, len(rows), CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            cosines = self._train[here] @ self._queries.T
            cosines[~allowed[rows[here]]] = np.nan
            best.add(rows[here], cosines)
            highest[rows[here]] = cosines.max(axis=1)  # the nan of a row that may not be chosen
        return ranked([best]).rows, highest

    def _tell(self, queries: int) -> None:
        """Log how long a search will take that compares the queries with every row, if long."""
        n, d = self._train.shape
        if queries * n * d < _SHORT:
            return
        seconds = product_seconds(queries * n * d)
        if seconds >= LONG_SECONDS:
            what = f"nearest of {n} rows to each of {queries}"
            _log.info("%s: about %s by this machine's matrix products", what, duration(seconds))


def column_order(
    nearest: Matrix, allowed: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Order rows by their first occurrence when the table is read column by column.

    Args:
        nearest: (q, k) rows of the training set, nearest first; negative where there is none.
        allowed: (n,) bool, rows that may be taken.

    Returns:
        (m,) distinct rows, and (m,) where each stands in the columns laid end to end.
    """
    flat = nearest.T.ravel()
    places = np.flatnonzero((flat >= 0) & allowed[flat])
    rows, first = np.unique(flat[places], return_index=True)
    order = np.argsort(first, kind="stable")
    return rows[order], places[first[order]]


def growing_order(
    neighbours: Neighbours, width: int, count: int, allowed: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Apply `column_order` to as many neighbours as are needed to reach `count` rows.

    Returns:
        (>= count,) rows, and the cosine each was found with.
    """
    most = int(neighbours.usable.sum())
    width = min(width, most)
    while True:
        cosines, nearest = neighbours.nearest(width)
        rows, places = column_order(nearest, allowed)
        if len(rows) >= count or width == most:
            return rows, cosines.T.ravel()[places].astype(np.float64)
        width = min(2 * width, most)
