"""Unscaled projections on a CPU, summed over blocks of parameters by the compiled loops."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from gradkernels.cpu import compiled
from gradkernels.cpu.loops import I64
from gradkernels.cpu.pool import run_all
from gradkernels.cpu.vectors import LANES, PART_WORDS, SJLT_LANES
from gradkernels.portable import full_float32
from gradkernels.randomness import U32, derive_keys, sjlt_bounds, word_offsets
from gradkernels.spec import ProjectionSpec
from numpy.typing import NDArray
from torch import Tensor

#: Waking a second thread costs about 50 microseconds: not for fewer additions than this.
_MIN_TASK_ADDITIONS = 2**17

#: Normals made at once, which stay in the second cache until they are multiplied; and parameters
#: that are summed in float32.
_TILE_NORMALS, _TILE_PARAMS = 2**18, 2048


class SjltSums:
    """float64 sums of a batch in the loop's own layout: (ceil(b / 8), d, 8)."""

    def __init__(self, spec: ProjectionSpec, rows: int) -> None:
        keys = derive_keys(spec)
        self._spec = spec
        self._rows = rows
        self._loop = compiled.sjlt()
        self._keys = np.uint32(keys.a), np.uint32(keys.b)
        self._offsets: U32 = word_offsets(keys, spec.s)
        self._bounds: I64 = sjlt_bounds(spec)
        self._sums = np.zeros((-(-rows // SJLT_LANES), spec.d, SJLT_LANES))

    def add(self, block: Tensor, start: int) -> None:
        """Add block (b, m) float32, contiguous, of parameters [start, start + m)."""
        x = block.numpy()
        work = x.shape[1] * self._spec.s * len(self._sums)
        spans = split(self._spec.s, thread_count(work))
        run_all([partial(self._run, x, start, low, high) for low, high in spans])

    def _run(self, x: NDArray[np.float32], start: int, low: int, high: int) -> None:
        c, bounds = self._offsets[low:high], self._bounds[low : high + 1]
        self._loop(x, start, *self._keys, c, bounds, self._sums)

    def total(self) -> Tensor:
        """Return the sums so far: (b, d) float64."""
        rows = self._sums.transpose(0, 2, 1).reshape(-1, self._spec.d)[: self._rows]
        return torch.from_numpy(np.ascontiguousarray(rows))


class RademacherSums:
    """float64 sums of a batch in the loop's own layout: (ceil(b / 16), words, 32, 16)."""

    def __init__(self, spec: ProjectionSpec, rows: int) -> None:
        keys = derive_keys(spec)
        words = -(-spec.d // 32)
        self._spec = spec
        self._rows = rows
        self._loop = compiled.rademacher()
        self._keys = np.uint32(keys.a), np.uint32(keys.b)
        self._offsets: U32 = word_offsets(keys, words)
        self._sums = np.zeros((-(-rows // LANES), words, 32, LANES))

    def add(self, block: Tensor, start: int) -> None:
        """Add block (b, m) float32, contiguous, of parameters [start, start + m)."""
        x = block.numpy()
        words = len(self._offsets)
        work = x.shape[1] * 8 * words * len(self._sums)
        threads = thread_count(work)
        parts = max(threads, -(-words // PART_WORDS))
        parts = -(-parts // threads) * threads
        spans = split(words, parts)
        run_all([partial(self._run, x, start, spans[thread::threads]) for thread in range(threads)])

    def _run(self, x: NDArray[np.float32], start: int, spans: list[tuple[int, int]]) -> None:
        for low, high in spans:
            self._loop(x, start, *self._keys, self._offsets[low:high], low, self._sums)

    def total(self) -> Tensor:
        """Return the sums so far: (b, d) float64."""
        slices, words = self._sums.shape[:2]
        rows = self._sums.transpose(0, 3, 1, 2).reshape(slices * LANES, words * 32)
        return torch.from_numpy(np.ascontiguousarray(rows[: self._rows, : self._spec.d]))


class GaussianSums:
    """float64 sums of a batch, even outputs before odd ones: (b, 2 * ceil(d / 2)).

    Tiles of normals come from the loop, their products with the batch from torch.
    """

    def __init__(self, spec: ProjectionSpec, rows: int) -> None:
        keys = derive_keys(spec)
        pairs = -(-spec.d // 2)
        offsets = word_offsets(keys, 2 * pairs)
        self._spec = spec
        self._loop = compiled.gaussian()
        self._keys = np.uint32(keys.a), np.uint32(keys.b)
        self._even, self._odd = (np.ascontiguousarray(offsets[odd::2]) for odd in (0, 1))
        self._sums = torch.zeros(rows, 2 * pairs, dtype=torch.float64)
        self._tile = np.empty((max(1, min(_TILE_PARAMS, _TILE_NORMALS // spec.d)), 2 * pairs),
                              np.float32)  # fmt: skip

    def add(self, block: Tensor, start: int) -> None:
        """Add block (b, m) float32 of parameters [start, start + m)."""
        for part in torch.split(block, len(self._tile), dim=1):
            tile = self._tile[: part.shape[1]]
            spans = split(len(tile), thread_count(8 * tile.size))
            run_all([partial(self._make, tile[low:high], start + low) for low, high in spans])
            with full_float32():
                self._sums += part @ torch.from_numpy(tile)
            start += len(tile)

    def _make(self, tile: NDArray[np.float32], start: int) -> None:
        self._loop(start, *self._keys, self._even, self._odd, tile)

    def total(self) -> Tensor:
        """Return the sums so far: (b, d) float64."""
        rows, width = self._sums.shape
        return self._sums.view(rows, 2, width // 2).mT.reshape(rows, width)[:, : self._spec.d]


def thread_count(additions: int) -> int:
    """Return the number of threads that pay off for a block: at most torch's own number."""
    return max(1, min(torch.get_num_threads(), additions // _MIN_TASK_ADDITIONS))


def split(n: int, parts: int) -> list[tuple[int, int]]:
    """Cut range(n) into at most `parts` half-open, non-empty, nearly equal ranges."""
    parts = min(n, parts)
    return [(n * k // parts, n * (k + 1) // parts) for k in range(parts)]
