"""Rademacher projections on a CPU as products of bytes, which VNNI adds four at a time.

The projection is that of gradients g' that differ from g by rounding alone. In a row, each
TILE_PARAMS parameters of a block have a step of their own, t = m / 32,512, m the largest |g_j|
among them, and g'_j = t q_j with q_j = round(g_j / t). A q is 255 h + l, two whole numbers of at
most 127 (32,512 = 255 * 127 + 127), and

    sum_j s_ij g'_j = t * (255 * sum_j s_ij h_j + sum_j s_ij l_j),    s_ij = +-1 as a byte

where both sums, and what follows but for float64's additions of tiles, are exact.

**Bound.** g_j / t is a float32 below 2**15, off by 2**-10 at most, so that q is within 1/2 + 2**-10
of the true quotient, and t is within a factor 1 + 2**-24 of m / 32,512:

    |g'_j - g_j| <= (1/2 + 2**-10) * (1 + 2**-24) * m / 32,512 < m / 64,000

or 2**-126 where m is below 2**-111, since a step is never below 2**-126 (whose half it would be,
were torch not free to take smaller numbers for zeros). With T = TILE_PARAMS, for every row:

    |y'_i - y_i|      <= |g' - g|_1 / sqrt(d)  <= (sum over tiles of T m) / (64,000 sqrt(d))
    |g' - g|_2        <= sqrt(T) / 64,000 * |g|_2  <= 7.1e-4 * |g|_2,    as m <= |g of a tile|_2

before y' is rounded to float32; over seeds, |y' - y|_2 squared is |g' - g|_2 squared on average.
The largest |g' - g|_2 is the cost of one number without equals in its tile; normally distributed
ones have 3e-5 of |g|_2. Features kept as float16 are rounded by up to 4.9e-4.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from gradkernels.cpu import compiled
from gradkernels.cpu.loops import U32, U64
from gradkernels.cpu.pool import run_all
from gradkernels.cpu.sums import split, thread_count
from gradkernels.randomness import derive_keys, word_offsets
from gradkernels.spec import ProjectionSpec
from torch import Tensor

#: Parameters of a tile. Its sums are of |q| <= 32,512 and so below 2**27: in int32 even where
#: 255 h + l are put together, in float64 even times a step of 24 bits.
TILE_PARAMS = 2048
#: Words of a tile for each thread: 512 outputs, 1 MiB of signs, which stay in a second cache.
_TILE_WORDS = 16
_BASE, _LARGEST = 255, 32_512
_SMALLEST_STEP = 2.0**-126  # float32's smallest number with all its bits


class RademacherSums:
    """float64 sums of a batch, (b, 32 * words), the same bits on every machine.

    A row's sums depend on no other row. Where a row has an inf or a NaN, all its sums are NaN.

    Args:
        spec: a "rademacher" projection.
        rows: b.
    """

    def __init__(self, spec: ProjectionSpec, rows: int) -> None:
        keys = derive_keys(spec)
        words = -(-spec.d // 32)
        self._spec = spec
        self._loop = compiled.signs()
        self._keys = np.uint32(keys.a), np.uint32(keys.b)
        self._offsets: U32 = word_offsets(keys, words)
        self._width = min(words, _TILE_WORDS * torch.get_num_threads())
        self._signs = np.empty(TILE_PARAMS * self._width * 4, np.uint64)
        self._sums = torch.zeros(rows, 32 * words, dtype=torch.float64)

    def add(self, block: Tensor, start: int) -> None:
        """Add block (b, m) float32 of parameters [start, start + m)."""
        for tile in torch.split(block, TILE_PARAMS, dim=1):
            parts, step = halves(tile)
            for low in range(0, len(self._offsets), self._width):
                signs = self._make_signs(start, tile.shape[1], low)
                high, rest = torch._int_mm(parts, signs).chunk(2)
                part = self._sums[:, 32 * low : 32 * low + signs.shape[1]]
                part += torch.add(rest, high, alpha=_BASE) * step
            start += tile.shape[1]

    def _make_signs(self, start: int, count: int, first_word: int) -> Tensor:
        """Return signs of parameters [start, start + count): (count, outputs) int8, overwritten."""
        c = self._offsets[first_word : first_word + self._width]
        tile = self._signs[: count * 4 * len(c)].reshape(count, 4 * len(c))
        spans = split(count, thread_count(8 * count * len(c)))
        run_all([
            partial(self._loop, start + low, *self._keys, c, _OCTETS, tile[low:high])
            for low, high in spans
        ])  # fmt: skip
        return torch.from_numpy(tile.view(np.int8))

    def total(self) -> Tensor:
        """Return the sums so far: (b, d) float64."""
        return self._sums[:, : self._spec.d].clone()


def halves(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Round a tile (b, m) float32 to whole steps.

    Returns:
        h above l, (2 b, m) int8, each within 127; steps (b, 1) float64, NaN or inf in a row that
        is not finite.
    """
    step = tile.abs().amax(dim=1, keepdim=True).div_(_LARGEST).clamp_(min=_SMALLEST_STEP)
    whole = (tile / step).round_().nan_to_num_(nan=0.0)
    high = (whole / _BASE).round_()
    parts = torch.cat([high, whole.sub_(high, alpha=_BASE)]).to(torch.int8)
    # Zeros times infinity: a row with an inf is NaN in each output.
    return parts, step.to(torch.float64)


def _make_octets() -> U64:
    """Return the signs of each byte's bits, lowest first, as eight bytes: (256,); -1 if set."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    octets: U64 = (1 - 2 * bits).astype(np.int8).view(np.uint64)[:, 0]
    return octets


_OCTETS = _make_octets()
