"""Rows of a batch told apart: where they lie in each input, one of them alone, and one more.

Most inputs have a row for each of the batch's. Images have not: a row may come with several, or
with none, and patches of all of them lie in one list.

Letters: b batch, t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradstore.capture.losses import IGNORED_LABEL, model_inputs
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput

Grid = tuple[int, int]


def row_axis(key: str, value: object, grid: Grid) -> int | None:
    """Return the dimension of an input along which the batch's rows lie; None where none is.

    Args:
        key: of the input.
        value: the input.
        grid: (b, t).
    """
    if not isinstance(value, Tensor):
        return None
    # Positions of several kinds for each token, as M-RoPE takes them: (3, b, t).
    if key == "position_ids" and value.dim() == 3 and tuple(value.shape[1:]) == grid:
        return 1
    return 0 if value.dim() and value.shape[0] == grid[0] else None


def row_of(batch: Mapping[str, Tensor], row: int, grid: Grid) -> dict[str, Tensor]:
    """Take one row of a batch, as a batch of its own; what is of no row stays."""
    axes = {key: row_axis(key, value, grid) for key, value in batch.items()}
    return {
        key: value if (axis := axes[key]) is None else value.narrow(axis, row, 1)
        for key, value in batch.items()
    }


def not_of_rows(batch: Mapping[str, Tensor], grid: Grid) -> list[str]:
    """List the inputs, with their shapes, that are neither divided by rows nor shared by them."""
    found, inputs = [], dict[str, object](model_inputs(batch))
    for key, value in inputs.items():
        if isinstance(value, list | tuple):
            found.append(f"{key}, a list of {len(value)}")
        elif isinstance(value, Tensor) and row_axis(key, value, grid) is None:
            shape, tokens = tuple(value.shape), grid[1]
            shared = shape in ((), (tokens,)) or (shape[0] == 1 and tokens in shape[1:])
            if not shared:
                found.append(f"{key} {shape}")
    return found


def check_apart(batch: Mapping[str, Tensor], grid: Grid) -> None:
    """Refuse a batch of several rows that cannot be passed one by one.

    Raises:
        BadInput: an input is of something else than rows; names it.
    """
    others = not_of_rows(batch, grid) if grid[0] > 1 else []
    if others:
        raise BadInput(
            "parameters that no hook covers need each row by itself, and of a batch of "
            f"{grid[0]} rows this is not divided by row: {', '.join(others)}. Set "
            "tokens_per_batch: 1, so that every row is a batch of its own, or do not train what "
            "sees images (freeze_vision_tower and freeze_multi_modal_projector: true)."
        )


def one_more_row(batch: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
    """Add a row without a target to a batch as many tokens wide as it has rows.

    A layer's input whose tokens come first, (t, b, h), has another shape then than (b, t, h).

    Returns:
        A batch of b + 1 rows, the last like the first; the batch itself where an input is of
        something else than rows.
    """
    if not_of_rows(batch, grid):
        return batch
    more = dict(batch)
    for key, value in batch.items():
        axis = row_axis(key, value, grid)
        if axis is not None:
            more[key] = torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)
    more["labels"][-1] = IGNORED_LABEL
    return more


def of_first(rows: int, take: Callable[..., None]) -> Callable[..., None]:
    """Return a receiver of blocks, or of what they are made of, that is shown the first rows."""

    def first(slot: ParameterSlot, *given: Any) -> None:  # noqa: ANN401 - tensors (b, ...)
        take(slot, *(x[:rows] for x in given))

    return first
