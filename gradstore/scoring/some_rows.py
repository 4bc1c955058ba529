"""Some rows of a source, as a source of their own: what looks at few rows reads few.

Letters: n rows of the whole source, m rows of these, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.scoring.scan import BLOCK_ROWS, FeatureSource, Reader
from gradstore.scoring.subtasks import source_name


class SomeRows:
    """Rows of a source at given positions; a scan gives each the score it has in the whole.

    Rows of a store's generation are read as they are stored, so that on a CPU scores are equal to
    the last bit. Columns of one number a row (status, norm) are read whole.

    Attributes:
        name: the source's.
        rows: m.
        dim: d.
        space: the source's; None of an array.
        usable: (m,) bool.
        status: (m,) uint8, a `RowStatus` per row; None where the source keeps none.
    """

    def __init__(self, source: FeatureSource, rows: npt.NDArray[np.int64]) -> None:
        """Choose the rows.

        Args:
            source: n rows of length d.
            rows: (m,) positions; chunks are opened least often where they rise.

        Raises:
            BadInput: a position that is not within 0 to n.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < source.rows:
            raise BadInput(
                f"{source_name(source)} has rows 0 to {source.rows - 1}, not {rows.min()} to "
                f"{rows.max()}; name rows within them"
            )
        self._source, self._rows = source, rows
        self.name, self.space = source_name(source), getattr(source, "space", None)
        self.rows, self.dim = len(rows), source.dim
        self.usable: npt.NDArray[np.bool_] = np.asarray(source.usable, dtype=bool)[rows]
        status = getattr(source, "status", None)
        self.status = None if status is None else np.asarray(status)[rows]
        take_raw = getattr(source, "take_raw", None)
        if take_raw is not None:  # attributes that a scan takes as the offer to read stored rows
            self.dtype = str(getattr(source, "dtype", ""))
            starts = range(0, self.rows, BLOCK_ROWS)
            self.units = [(start, min(start + BLOCK_ROWS, self.rows)) for start in starts]
            self.raw_reader: Callable[[], Reader] = lambda: self._raw

    @property
    def norm(self) -> npt.NDArray[np.floating[Any]] | None:
        """(m,) float, norm of each row's feature; None where the source keeps none."""
        norms: npt.NDArray[np.floating[Any]] | None = getattr(self._source, "norm", None)
        return None if norms is None else norms[self._rows]

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Read rows [start, stop) of these as (stop - start, d) float32."""
        wanted, source = self._rows[start:stop], self._source
        take: Callable[..., npt.NDArray[np.float32]] | None = getattr(source, "take", None)
        if take is not None:
            return take(wanted)
        found = np.empty((len(wanted), self.dim), dtype=np.float32)
        for place, row in enumerate(wanted.tolist()):
            found[place] = source.read(row, row + 1)[0]
        return found

    def _raw(self, unit: int, start: int, stop: int) -> npt.NDArray[Any]:
        first = self.units[unit][0]
        found: npt.NDArray[Any] = self._source.take_raw(  # type: ignore[attr-defined]
            self._rows[first + start : first + stop]
        )
        return found
