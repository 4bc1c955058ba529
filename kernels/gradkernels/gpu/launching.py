"""Arguments of the kernels, and launches that both projections share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from gradkernels.features import Feature
from gradkernels.gpu.features import KINDS, settle
from torch import Tensor

WIDTHS = (16, 64)  # rows that a product may have
GATHERED = 1024  # sums that one program of `dense.gather` adds, parts that `settle` reads at once

#: Factors, a, base, still, pull, curve and outer of `gpu.features.feature`.
Arguments = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float
]


def arguments(feature: Feature | None, factors: Tensor | None) -> Arguments:
    """Return what a kernel is given of a feature, in the kernels' order."""
    if feature is None:
        return (factors, None, None, None, None, 0.0, 0.0)
    vectors = feature.a, feature.base, feature.still, feature.pull
    return (factors, *vectors, feature.curve, feature.outer)


def kind_of(feature: Feature | None) -> int:
    """Return the number that stands for a feature's kind in the kernels."""
    return KINDS[None if feature is None else feature.kind]


def parts_of(dtype: torch.dtype, feature: Feature | None, factors: Tensor | None) -> int:
    """Return how many float16 numbers a feature needs: 1 where the type's own bits are enough."""
    if feature is not None and feature.kind == "sign":
        return 1
    return 2 if dtype == torch.float32 or feature is not None or factors is not None else 1


def add_squares(
    squares: Tensor,
    count: int,
    sums: Tensor,
    magnitudes: Tensor | None = None,
    largest: Tensor | None = None,
) -> None:
    """Add the first `count` parts of each row's squares to its sum; find its largest magnitude."""
    stride = squares.stride(0)
    settle[(len(squares),)](squares, magnitudes, stride, count, sums, largest, BLOCK=GATHERED)


def readable(block: Tensor) -> Tensor:
    """Return a block in a type that the kernels read: float32 for what they do not."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    return block if block.dtype in known else block.to(torch.float32)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launch on the tensors' device, which need not be the process's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def width_of(rows: int) -> int:
    """Return the rows that the kernels compute for `rows` <= 64 of them."""
    return next(width for width in WIDTHS if rows <= width)
