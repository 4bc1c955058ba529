"""A matrix read in float32 chunks, and squared distances of its rows.

Letters: n rows, d dimensions, c rows of a chunk, m points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gradstore.errors import BadInput

#: Squared distances below this share of the squared norms are rounding: the rows are equal. So rows
#: should lie around the origin rather than far from it, as unit vectors do.
ROUNDING = 1e-6


class RowMatrix(Protocol):
    """An (n, d) array, or what is read like one: a memory map, rows of a store."""

    @property
    def ndim(self) -> int: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> npt.NDArray[Any]:  # noqa: ANN401
        """Return the rows of a slice, or at positions."""


class CountedRows:
    """Rows that report how many of them were read in slices, each once the next is asked for.

    Args:
        rows: an (n, d) matrix.
        on_rows: called with the number of rows of a slice.
    """

    def __init__(self, rows: RowMatrix, on_rows: Callable[[int], None]) -> None:
        self._rows, self._on_rows, self._read = rows, on_rows, 0

    @property
    def ndim(self) -> int:
        """2."""
        return self._rows.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""
        return self._rows.shape

    def __len__(self) -> int:
        """Return n."""
        return len(self._rows)

    def __getitem__(self, key: Any, /) -> npt.NDArray[Any]:  # noqa: ANN401
        """Return the rows of a slice, or at positions; only slices count."""
        if self._read:
            self._on_rows(self._read)
        found = self._rows[key]
        self._read = len(found) if isinstance(key, slice) else 0
        return found


@dataclass(frozen=True)
class RowChunks:
    """Rows in float32 chunks on a device.

    Attributes:
        rows: (n, d) finite floats.
        chunk_rows: rows of a chunk, at most.
        device: where the chunks are put.
        unit: rows are scaled to length 1.
    """

    rows: RowMatrix
    chunk_rows: int
    device: torch.device
    unit: bool

    @staticmethod
    def of(
        rows: RowMatrix,
        num_clusters: int,
        chunk_rows: int,
        device: str | torch.device,
        *,
        unit: bool,
    ) -> RowChunks:
        """Check what a clustering was given.

        Raises:
            BadInput: no row, or fewer than one cluster or row of a chunk.
        """
        if rows.ndim != 2 or not len(rows):
            raise BadInput(f"rows to cluster have shape {rows.shape}; give (n, d) with n >= 1")
        for name, value in (("num_clusters", num_clusters), ("chunk_rows", chunk_rows)):
            if value < 1:
                raise BadInput(f"{name} is {value}; it must be at least 1")
        return RowChunks(rows, chunk_rows, torch.device(device), unit)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, (c, d)) for all rows in order."""
        for start in range(0, len(self.rows), self.chunk_rows):
            yield start, self._load(self.rows[start : start + self.chunk_rows])

    def take(self, positions: npt.NDArray[np.int64]) -> Tensor:
        """Return the rows at `positions`: (len(positions), d)."""
        return self._load(self.rows[positions])

    def _load(self, rows: npt.NDArray[Any]) -> Tensor:
        loaded = torch.from_numpy(np.array(rows, dtype=np.float32)).to(self.device)
        return functional.normalize(loaded) if self.unit else loaded


def squared_distances(rows: Tensor, points: Tensor) -> Tensor:
    """Compute squared distances (c, m) of rows (c, d) to points (m, d); exactly 0 if equal."""
    norms = rows.square().sum(1)[:, None] + points.square().sum(1)[None, :]
    squared = norms - 2 * (rows @ points.T)
    return torch.where(squared <= ROUNDING * norms, 0.0, squared)
