"""Random rotations of rows: signs and Hadamard transforms, round after round.

Letters: k rows, d dimensions; x a row, y = R x the rotated one.

R is orthogonal and depends on d and a seed alone: `ROUNDS` times random signs, then a Hadamard
transform of the first m coordinates or, every other time, of the last m, where m is the largest
power of two up to d. Where that is not d itself, coordinates change places half-way, the even ones
first: the first and the last m may share few, and no row shall stay on one side (Ailon and Chazelle
2009, The fast Johnson-Lindenstrauss transform; rounds as in Andoni et al. 2015, arXiv 1509.02897).

Every sum is of two float32, in one order: a row's bits depend neither on the other rows nor on the
machine, nor on whether a processor or a GPU adds (`gradkernels.gpu.rotation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from gradkernels.gpu.usable import rotation_refusal
from gradkernels.randomness import GOLDEN, mix

ROUNDS = 4
SEED = 0
#: Rows at a time: as many as the compiled transform takes.
_ROWS = 16


def rotate(rows: np.ndarray, seed: int = SEED, device: torch.device | None = None) -> np.ndarray:
    """Compute R x.

    Args:
        rows: (k, d) float.
        seed: of R; stored rows have the default.
        device: that computes it, with equal bits; None for the processor.

    Returns:
        (k, d) float32, each row as long as it was.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    if cuda is not None and rotation_refusal(cuda, rows.shape[1]) is None:
        from gradkernels.gpu.rotation import rotated  # Triton is imported where it runs

        narrow = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
        return rotated(narrow.to(cuda), seed).cpu().numpy()
    out = np.empty(rows.shape, dtype=np.float32)
    order = order_of(rows.shape[1])
    for low, columns in _columns(rows):
        for number, flips in enumerate(flips_of(len(columns), seed)):
            if number == ROUNDS // 2 and order is not None:
                columns = columns[order]
            columns *= flips[:, None]
            _hadamard(columns[part_of(len(columns), number)])
        out[low : low + _ROWS] = columns.T[: len(rows) - low]
    return out


def unrotate(rows: np.ndarray, seed: int = SEED) -> np.ndarray:
    """Compute R^T y of (k, d) float rows, as (k, d) float32."""
    out = np.empty(rows.shape, dtype=np.float32)
    order = order_of(rows.shape[1])
    for low, columns in _columns(rows):
        for number, flips in reversed(list(enumerate(flips_of(len(columns), seed)))):
            _hadamard(columns[part_of(len(columns), number)])
            columns *= flips[:, None]
            if number == ROUNDS // 2 and order is not None:
                columns = columns[np.argsort(order)]
        out[low : low + _ROWS] = columns.T[: len(rows) - low]
    return out


def _columns(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, (d, 16) float32, a copy of that row and the next ones to work in)."""
    for low in range(0, len(rows), _ROWS):
        some = rows[low : low + _ROWS]
        columns = np.zeros((rows.shape[1], _ROWS), dtype=np.float32)
        columns[:, : len(some)] = some.T
        yield low, columns


def flips_of(dim: int, seed: int) -> Iterator[np.ndarray]:
    """Yield each round's random signs, (d,) float32."""
    counters = np.arange(dim, dtype=np.uint32)
    for number in range(1, ROUNDS + 1):
        offset = np.uint32(number * GOLDEN & 0xFFFFFFFF)
        words = mix(mix(counters + offset) ^ np.uint32(seed))
        yield np.where(words >> np.uint32(31), np.float32(-1), np.float32(1))


def order_of(dim: int) -> np.ndarray | None:
    """Return the coordinates (d,) in the order of the later rounds; None where it is the same."""
    if dim & (dim - 1) == 0:
        return None
    return np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2)])


def part_of(dim: int, number: int) -> slice:
    """Return the m coordinates that a round mixes."""
    size = 1 << (dim.bit_length() - 1)
    return slice(0, size) if number % 2 == 0 else slice(dim - size, dim)


def _hadamard(values: np.ndarray) -> None:
    """Apply the orthogonal Hadamard matrix, in place, to the columns of (m, 16) float32."""
    from gradkernels.cpu import compiled  # imports numba, which takes its time

    compiled.hadamard()(values)
    values *= np.float32(1 / math.sqrt(len(values)))
