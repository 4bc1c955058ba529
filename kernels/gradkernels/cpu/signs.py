"""Products of packed signs with float queries, on a CPU: four coordinates a lookup."""

from __future__ import annotations

import numpy as np
from gradkernels.cpu import compiled
from gradkernels.cpu.lookups import PLANE, PLANES, WIDTH
from gradkernels.cpu.loops import F32, U8

#: Half of the numbers that a table's entry may be: what stands for a sum of zero.
_ZERO = 1 << (PLANES * PLANE - 1)
#: Signs of four coordinates, (16, 4): coordinate i is positive where bit i is set.
_PATTERNS = (np.arange(16)[:, None] >> np.arange(4) & 1) * 2.0 - 1


class SignProducts:
    """Inner products of rows of d signs with q queries, a quarter of an addition a coordinate.

    The sums that four coordinates can have are rounded to 2^20 steps either way, as large as the
    largest needs: an error of half a step for each four at most, as float32 has. They are added as
    integers: equal rows get equal bits, wherever they are and on any machine. Runs in the calling
    thread, without the GIL: several may share one.

    Args:
        queries: (q, d) float32, finite.
    """

    def __init__(self, queries: F32) -> None:
        if not np.isfinite(queries).all():
            raise ValueError("queries must be finite")
        count, dim = queries.shape
        self._width = -(-dim // 8)
        shuffles = compiled.has_avx2()
        columns = -(-self._width // WIDTH) * WIDTH if shuffles else self._width
        padded = np.zeros((count, 8 * columns))
        padded[:, :dim] = queries
        # Added one by one: a matrix product may round otherwise on another machine.
        signed = padded.reshape(count, columns, 2, 1, 4) * _PATTERNS
        sums = (signed[..., 0] + signed[..., 1]) + (signed[..., 2] + signed[..., 3])
        largest = np.abs(sums).max(axis=(1, 2, 3), initial=0)
        self._step = np.where(largest > 0, largest / (_ZERO - 1), 1.0)
        entries = (np.rint(sums / self._step[:, None, None, None]) + _ZERO).astype(np.uint32)
        self._zero = 2 * columns * _ZERO  # total of a product that is zero
        if shuffles:
            shifts = PLANE * np.arange(PLANES, dtype=np.uint32)[:, None]
            planes = entries[:, :, :, None] >> shifts & (1 << PLANE) - 1
            self._tables, self._loop = planes.astype(np.uint8), compiled.shuffled()
        else:
            self._tables, self._loop = entries, compiled.gathered()

    def products(self, bits: U8) -> F32:
        """Multiply rows.

        Args:
            bits: (m, ceil(d / 8)) uint8, contiguous; coordinate i in bit i % 8 of byte i // 8, set
                where it is +1.

        Returns:
            (m, q) float32.
        """
        if bits.shape[1:] != (self._width,):
            raise ValueError(f"rows of {bits.shape[1:]} bytes, not {self._width}")
        totals = np.empty((len(bits), len(self._tables)), dtype=np.int64)
        self._loop(bits, self._tables, totals)
        return np.asarray((totals - self._zero) * self._step, dtype=np.float32)
