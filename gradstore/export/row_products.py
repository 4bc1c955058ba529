"""Products of rows' gradients, in smaller batches where memory runs out.

Letters: n rows, b rows of a batch, p gradient length.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.products import RowProducts, row_products
from gradstore.export.smaller import computed_whole
from gradstore.export.units import RowBatch


def planned_products(
    capture: GradientCapture,
    batches: Iterable[RowBatch],
    direction: Tensor,
    scale: Tensor | None = None,
) -> tuple[npt.NDArray[np.int64], RowProducts]:
    """Multiply rows' gradients with a direction and with each other, see `row_products`.

    Args:
        capture: entered.
        batches: positions (b,) of n rows in all, and their batches (b, t); smaller ones where
            memory runs out, if they are `PlannedRows`.
        direction: (p,) float32, on the model's device.
        scale: (p,) float32 that every gradient is multiplied with; None leaves them as they are.

    Returns:
        Positions (n,) of the rows, and their products in the same order.
    """

    def multiply(pairs: Iterable[RowBatch]) -> tuple[npt.NDArray[np.int64], RowProducts]:
        rows, made = zip(*pairs, strict=True)
        return np.concatenate(rows), row_products(capture, made, direction, scale)

    return computed_whole(batches, multiply)
