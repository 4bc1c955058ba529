"""Plain arrays as rows of features, so that scores need no store.

Letters: n rows, d dimensions.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect
from gradstore.format.layout import RowStatus
from gradstore.scoring.scan import BLOCK_ROWS, FeatureSource, unit_rows

#: Features that are no generation: (n, d) of a real dtype.
PlainArray = npt.NDArray[Any] | torch.Tensor | list[list[float]]

_WANTED = "a generation (`store.generation(name)`) or an array of numbers (n rows, d dims)"


def as_numbers(given: object, what: str, wanted: str) -> npt.NDArray[Any]:
    """Return an array, a tensor on any device or lists of numbers as a NumPy array.

    Args:
        given: real numbers; bfloat16, absent from NumPy, becomes exact float32.
        what: what messages call it.
        wanted: what to give, for messages.

    Raises:
        BadInput: something else.
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    expect(isinstance(given, np.ndarray | list | tuple), what, given, wanted)
    try:
        values = np.asarray(given)
    except ValueError as error:
        raise BadInput(f"{what} has rows of different lengths; give {wanted}.") from error
    if values.dtype.kind not in "fiu":
        raise BadInput(f"{what} holds {values.dtype}, no numbers; give {wanted}.")
    return values


class PlainRows:
    """Rows of an array as a `FeatureSource`; rows that are zero or not finite are not usable.

    Attributes:
        name: what messages call it.
        rows: n.
        dim: d.
        status: (n,) uint8, `RowStatus`.
        usable: (n,) bool.
    """

    def __init__(self, values: npt.NDArray[Any], name: str) -> None:
        """Look through the rows; they are not copied."""
        self.name = name
        self.rows, self.dim = values.shape
        self._values = values
        parts = [
            unit_rows(values[start : start + BLOCK_ROWS])[1]
            for start in range(0, self.rows, BLOCK_ROWS)
        ]
        self.status: npt.NDArray[np.uint8] = np.concatenate(parts)
        self.usable: npt.NDArray[np.bool_] = self.status == RowStatus.OK

    @cached_property
    def norm(self) -> npt.NDArray[np.float64]:
        """(n,) float64; nan or infinite where a row is."""
        blocks = range(0, self.rows, BLOCK_ROWS)
        parts = (self._values[start : start + BLOCK_ROWS].astype(np.float64) for start in blocks)
        return np.concatenate([np.linalg.norm(part, axis=1) for part in parts])

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows [start, stop) as (stop - start, d) float32, of length 1 where usable."""
        return unit_rows(self._values[start:stop])[0].astype(np.float32)


def as_source(given: object, what: str) -> FeatureSource:
    """Return a source of features as it is, and an array as a `PlainRows`.

    Args:
        given: a `FeatureSource`, or (n, d) numbers: a NumPy array, a tensor, lists.
        what: what messages call it.

    Raises:
        BadInput: it is neither.
    """
    if is_source(given):
        return cast(FeatureSource, given)
    values = as_numbers(given, what, _WANTED)
    if values.ndim != 2 or values.size == 0:
        raise BadInput(f"{what} has shape {values.shape}; give {_WANTED}.")
    return PlainRows(values, what)


def as_sources(given: object) -> tuple[FeatureSource, ...]:
    """Return target sets as sources; a single set needs no list around it.

    Raises:
        BadInput: one of them is neither a source nor an array (m, d).
    """
    if getattr(given, "ndim", None) == 2 or is_source(given):
        given = (given,)
    if not isinstance(given, list | tuple):
        raise BadInput(f"targets is a {type(given).__name__}; for each target set give {_WANTED}.")
    return tuple(as_source(one, f"target set {index}") for index, one in enumerate(given))


def is_source(given: object) -> bool:
    """Tell a `FeatureSource` from an array, without asking it for what it would have to read."""
    return hasattr(given, "dim") and callable(getattr(given, "read", None))
