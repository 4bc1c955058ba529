"""Rotations of `gradkernels.rotation` on a CUDA device."""

from __future__ import annotations

import math

import torch
from gradkernels.gpu.hadamard import hadamard
from gradkernels.gpu.launching import on_device
from gradkernels.rotation import ROUNDS, flips_of, order_of, part_of
from torch import Tensor

#: Numbers of a row that a thread holds, up to the most warps: few enough for its registers.
EACH = 16
WARP, MOST_WARPS = 32, 16


def warps_of(size: int) -> int:
    """Return the warps of a program that transforms rows of `size` numbers."""
    return max(1, min(MOST_WARPS, size // (WARP * EACH)))


def rotated(x: Tensor, seed: int) -> Tensor:
    """Compute R x of (k, d) float32: a new tensor."""
    x, dim = x.clone(), x.shape[1]
    order = order_of(dim)
    for number, flips in enumerate(flips_of(dim, seed)):
        if number == ROUNDS // 2 and order is not None:
            x = x[:, torch.from_numpy(order).to(x.device)]
        x *= torch.from_numpy(flips).to(x.device)
        part = x[:, part_of(dim, number)]
        size = part.shape[1]
        with on_device(x.device):
            hadamard[(len(x),)](
                part,
                part.stride(0),
                1 / math.sqrt(size),
                SIZE=size,
                STAGES=size.bit_length() - 1,
                num_warps=warps_of(size),
            )
    return x
