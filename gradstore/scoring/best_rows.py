"""The best rows of each target row, gathered while chunks of similarities pass by.

Letters: n train rows, t target rows, k rows kept of each target row, m rows of one chunk.

The (n, t) similarities are never held at once: of each target row only its k best are kept, 8 bytes
each: 8 t k bytes, and up to six times that while chunks are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gradstore.scoring.combine import CHUNK_ROWS, combine
from gradstore.scoring.comparable import CheckpointFeatures, check_checkpoints
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.quotas import Limits
from gradstore.scoring.scan import as_device
from gradstore.scoring.subspace import usable_targets_of
from gradstore.scoring.subtasks import Subtask, source_name

_ROW_BITS = np.uint64(32)
_ROW_MASK = np.uint64(0xFFFFFFFF)
_SIGN = np.uint32(0x80000000)
_NOTHING = np.uint64(0xFFFFFFFFFFFFFFFF)

#: Takes `(start, sums)` for consecutive chunks: sums (m, t) float32 of rows start..start+m-1.
Keep = Callable[[int, npt.NDArray[np.float32]], None]


@dataclass(frozen=True)
class Ranked:
    """Each target row's best rows, best first.

    Attributes:
        rows: (t, r) int64; -1 at the end of a shorter list.
        scores: (t, r) float32, the similarity of each; nan where there is no row.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


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

    def add(self, rows: npt.NDArray[np.integer[Any]], scores: npt.NDArray[np.floating]) -> None:
        """Take (m, t) scores of m rows in; a nan is no candidate."""
        self._pending.append(_keys(rows, scores))
        if sum(part.shape[1] for part in self._pending) >= self._k:
            self._merge()

    def keys(self) -> npt.NDArray[np.uint64]:
        """Return (t, up to k) keys, in any order."""
        self._merge()
        return self._kept

    def _merge(self) -> None:
        keys = np.concatenate([self._kept, *self._pending], axis=1)
        self._pending = []
        if keys.shape[1] > self._k:
            keys = np.partition(keys, self._k - 1, axis=1)[:, : self._k].copy()
        self._kept = keys


def ranked(best: Sequence[BestRows]) -> Ranked:
    """Join the rows of several gatherings into one list a target row, best first."""
    keys = np.sort(np.concatenate([each.keys() for each in best], axis=1), axis=1)
    order = (keys >> _ROW_BITS).astype(np.uint32)
    bits = np.where(order & _SIGN, order ^ _SIGN, ~order)
    rows = np.where(keys == _NOTHING, -1, (keys & _ROW_MASK).astype(np.int64))
    return Ranked(rows, np.where(rows < 0, np.float32("nan"), -bits.view(np.float32)))


def _keys(
    rows: npt.NDArray[np.integer[Any]], scores: npt.NDArray[np.floating]
) -> npt.NDArray[np.uint64]:
    """Turn (m, t) scores into (t, m) uint64 keys, smaller for better; 0.0 and -0.0 tie."""
    values = -np.ascontiguousarray(scores.T, dtype=np.float32) + np.float32(0)
    bits = values.view(np.uint32)
    order = np.where(bits & _SIGN, ~bits, bits | _SIGN).astype(np.uint64)
    return np.where(np.isnan(values), _NOTHING, order << _ROW_BITS | rows.astype(np.uint64))


class TargetTable(Protocol):
    """Similarities of n train rows with t target rows, read in chunks of rows."""

    @property
    def targets(self) -> int:
        """t, the target rows."""

    def stream(self, keep: Keep) -> None:
        """Give every chunk to `keep` once, in order; nan where a train row is not usable."""


class StoredTable:
    """Similarities that are computed from stored features, in one pass of them.

    Args:
        checkpoints: features of the same train and target rows at one or more checkpoints.
        device: where the products are computed.
        chunk_rows: rows between two progress calls; no choice depends on it.
        on_rows: called with the number of rows just compared.
        product: of a train row and a target row.
    """

    def __init__(
        self,
        checkpoints: Sequence[CheckpointFeatures],
        *,
        device: str | torch.device = "cpu",
        chunk_rows: int = CHUNK_ROWS,
        on_rows: Callable[[int], None] | None = None,
        product: InnerProduct = COSINE,
    ) -> None:
        check_checkpoints(checkpoints)
        self._product = product
        self._checkpoints = checkpoints
        self._wanted = usable_targets(checkpoints)
        self._device, self._chunk_rows, self._on_rows = device, chunk_rows, on_rows

    @property
    def targets(self) -> int:
        """t, the target rows that are usable at every checkpoint."""
        return len(self._wanted)

    def stream(self, keep: Keep) -> None:
        """Compute the weighted sums over checkpoints, chunk by chunk."""

        def told(start: int, stop: int, cosines: npt.NDArray[np.float32]) -> None:
            keep(start, cosines)
            if self._on_rows is not None:
                self._on_rows(stop - start)

        device = as_device(self._device)
        combine(self._checkpoints, self._wanted, told, device, self._chunk_rows, self._product)


@dataclass(frozen=True)
class HeldTable:
    """Similarities in memory.

    Attributes:
        values: (n, t) float; nan where a train row is not usable.
    """

    values: npt.NDArray[np.floating[Any]]

    @property
    def targets(self) -> int:
        """t, the target rows."""
        return int(self.values.shape[1])

    def stream(self, keep: Keep) -> None:
        """Give all rows, `CHUNK_ROWS` at a time."""
        for start in range(0, len(self.values), CHUNK_ROWS):
            keep(start, self.values[start : start + CHUNK_ROWS].astype(np.float32))


def best_of_each(
    table: TargetTable, k: int, *, usable: npt.NDArray[np.bool_], limits: Limits | None = None
) -> Ranked:
    """Gather each target row's best rows, as many as a choice of k rows can need, in one pass.

    Of rows without a limit the k best of a target row are enough: at its turn at most k - 1 rows
    are taken. Of a data set that may give L rows the L best are: at most L - 1 are taken, or the
    set gives no more.

    Args:
        table: similarities with t target rows.
        k: rows that will be chosen, or more.
        usable: (n,) bool, rows that may be chosen.
        limits: the most rows of a data set.
    """
    most = [] if limits is None else [min(k, int(each)) for each in limits.most]
    free = BestRows(table.targets, k)
    limited = [BestRows(table.targets, each) for each in most]

    def keep(start: int, sums: npt.NDArray[np.float32]) -> None:
        rows = np.arange(start, start + len(sums))
        here = usable[rows]
        of_set = np.full(len(rows), -1) if limits is None else limits.of_row[rows]
        for number, best in enumerate([free, *limited], -1):
            mine = here & (of_set == number)
            if mine.any():
                best.add(rows[mine], sums[mine])

    table.stream(keep)
    return ranked([free, *limited])


def usable_targets(checkpoints: Sequence[CheckpointFeatures]) -> list[Subtask]:
    """List each target row that every checkpoint can use as a sub-task of its own."""
    usable = usable_targets_of(checkpoints)
    return [
        Subtask(index, int(row), int(row) + 1, f"row {row} of {source_name(source)}")
        for index, source in enumerate(checkpoints[0].targets)
        for row in np.flatnonzero(usable[index])
    ]
