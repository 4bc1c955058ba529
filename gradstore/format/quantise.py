"""One bit a coordinate: the signs of a rotated row, and how to estimate the row from them.

Letters: k rows, d dimensions; x a row, y = R x the rotated one, s its signs, +1 where y >= 0.

R is orthogonal and depends on d alone: `ROUNDS` times random signs, then a Hadamard transform of
the first m coordinates or, every other time, of the last m, where m is the largest power of two up
to d. Where that is not d itself, coordinates change places half-way, the even ones first: the first
and the last m may share few, and no row shall stay on one side. The estimate of x is a R^T s with
a = |y|^2 / |y|_1, whose product with any vector z has the mean x.z over uniformly random rotations
(Vargaftik et al. 2021, arXiv 2105.08339; Gao and Long 2024, arXiv 2405.12497). With z rotated too
it costs additions only: a s.(R z).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from gradkernels.randomness import GOLDEN, mix

ROUNDS = 4
_SEED = 0
#: Rows at a time: as many as the compiled transform takes.
_ROWS = 16


def rotate(rows: np.ndarray, seed: int = _SEED) -> np.ndarray:
    """Compute R x.

    Float32 additions in a fixed order: a row's bits depend neither on the other rows nor on the
    machine.

    Args:
        rows: (k, d) float.
        seed: of R; stored rows have the default.

    Returns:
        (k, d) float32, each row as long as it was.
    """
    out = np.empty(rows.shape, dtype=np.float32)
    order = _order(rows.shape[1])
    for low, columns in _columns(rows):
        for number, flips in enumerate(_flips(len(columns), seed)):
            if number == ROUNDS // 2 and order is not None:
                columns = columns[order]
            columns *= flips[:, None]
            _hadamard(_part(columns, number))
        out[low : low + _ROWS] = columns.T[: len(rows) - low]
    return out


def unrotate(rows: np.ndarray, seed: int = _SEED) -> np.ndarray:
    """Compute R^T y of (k, d) float rows, as (k, d) float32."""
    out = np.empty(rows.shape, dtype=np.float32)
    order = _order(rows.shape[1])
    for low, columns in _columns(rows):
        for number, flips in reversed(list(enumerate(_flips(len(columns), seed)))):
            _hadamard(_part(columns, number))
            columns *= flips[:, None]
            if number == ROUNDS // 2 and order is not None:
                columns = columns[np.argsort(order)]
        out[low : low + _ROWS] = columns.T[: len(rows) - low]
    return out


def pack(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce rows to signs and a scale.

    Args:
        rows: (k, d) float32 whose squares neither overflow nor underflow.

    Returns:
        (k, ceil(d / 8)) uint8, coordinate i in bit i % 8 of byte i // 8, set where s is +1, other
        bits 0; (k,) float64 scales a, 0 for a row of zeros.
    """
    rotated = rotate(rows)
    bits = np.packbits(rotated >= 0, axis=1, bitorder="little")
    scale = np.zeros(len(rows))
    for low in range(0, len(rows), _ROWS):  # few at a time, which stay in the cache
        wide = rotated[low : low + _ROWS].astype(np.float64)
        sums = np.abs(wide).sum(axis=1)
        scale[low : low + _ROWS] = np.square(wide).sum(axis=1) / np.where(sums > 0, sums, 1.0)
    return bits, scale


def unpack(bits: np.ndarray, dim: int) -> np.ndarray:
    """Return the signs s of packed rows: (k, d) int8, +1 and -1."""
    return np.unpackbits(bits, axis=1, count=dim, bitorder="little").view(np.int8) * 2 - 1


def mean_length(dim: int) -> float:
    """Return the mean of |y|_1 over unit rows y of d coordinates, near sqrt(2 d / pi).

    So s.(Rz) over it is an estimate of the cosine of x and a unit vector z whose mean, over
    rotations, is that cosine. With rho the cosine and L this number, its variance is
    rho^2 ((1 + (d - 1) 2 / pi) / L^2 - 1) + (1 - rho^2) (1 - 2 / pi) / L^2: below 0.571 / d.
    """
    gammas = math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)
    return dim * math.exp(gammas) / math.sqrt(math.pi)


def _columns(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, (d, 16) float32, a copy of that row and the next ones to work in)."""
    for low in range(0, len(rows), _ROWS):
        some = rows[low : low + _ROWS]
        columns = np.zeros((rows.shape[1], _ROWS), dtype=np.float32)
        columns[:, : len(some)] = some.T
        yield low, columns


def _flips(dim: int, seed: int) -> Iterator[np.ndarray]:
    """Yield each round's random signs, (d,) float32."""
    counters = np.arange(dim, dtype=np.uint32)
    for number in range(1, ROUNDS + 1):
        offset = np.uint32(number * GOLDEN & 0xFFFFFFFF)
        words = mix(mix(counters + offset) ^ np.uint32(seed))
        yield np.where(words >> np.uint32(31), np.float32(-1), np.float32(1))


def _order(dim: int) -> np.ndarray | None:
    """Return the coordinates (d,) in the order of the later rounds; None where it is the same."""
    if dim & (dim - 1) == 0:
        return None
    return np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2)])


def _part(columns: np.ndarray, number: int) -> np.ndarray:
    """Return the m coordinates that a round mixes, as a view."""
    size = 1 << (len(columns).bit_length() - 1)
    return columns[:size] if number % 2 == 0 else columns[len(columns) - size :]


def _hadamard(values: np.ndarray) -> None:
    """Apply the orthogonal Hadamard matrix, in place, to the columns of (m, 16) float32."""
    from gradkernels.cpu import compiled  # imports numba, which takes its time

    compiled.hadamard()(values)
    values *= np.float32(1 / math.sqrt(len(values)))
