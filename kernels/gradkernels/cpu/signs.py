"""Products of packed signs with float queries, on a CPU: the sign goes into the float's own bit."""

from __future__ import annotations

import numpy as np
from gradkernels.cpu import compiled
from gradkernels.cpu.loops import F32, U8


class SignProducts:
    """Inner products of rows of d signs with q queries, one addition a coordinate and query.

    Equal rows get equal bits, wherever they are. Float32 sums of d / 64 numbers each, then a tree.
    Runs in the calling thread, without the GIL: several may share one.

    Args:
        queries: (q, d) float32.
    """

    def __init__(self, queries: F32) -> None:
        count, dim = queries.shape
        self._width = -(-dim // 8)
        whole = self._width // 8
        padded = np.zeros((count, 8 * self._width), dtype=np.float32)
        padded[:, :dim] = -queries  # a bit that is set stands for +1, and sets the sign
        head = padded[:, : 64 * whole].reshape(count, whole, 8, 8)
        self._queries = np.ascontiguousarray(head.swapaxes(2, 3)).reshape(count, 64 * whole)
        self._tails = np.ascontiguousarray(padded[:, 64 * whole :])
        self._loop = compiled.signs()

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
        out = np.empty((len(bits), len(self._queries)), dtype=np.float32)
        self._loop(bits, self._queries, self._tails, out)
        return out
