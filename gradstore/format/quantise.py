"""One bit a coordinate: the signs of a rotated row, and how to estimate the row from them.

Letters: k rows, d dimensions; x a row, y = R x the rotated one, s its signs, +1 where y >= 0.

R is `gradkernels.rotation`'s, of d alone. The estimate of x is a R^T s with
a = |y|^2 / |y|_1, whose product with any vector z has the mean x.z over uniformly random rotations
(Vargaftik et al. 2021, arXiv 2105.08339; Gao and Long 2024, arXiv 2405.12497). With z rotated too
it costs additions only: a s.(R z).
"""

from __future__ import annotations

import math

import numpy as np
from gradkernels.rotation import rotate

#: Rows at a time, which stay in the cache.
_ROWS = 16


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
    for low in range(0, len(rows), _ROWS):
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
