"""Unscaled projections on a GPU, summed over blocks of parameters by the Triton kernels.

Both kinds read a block's gradients, turn them into features, and keep the rows' squared norms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gradkernels.features import Feature
from gradkernels.gpu import dense, sparse
from gradkernels.gpu.launching import (
    GATHERED,
    Arguments,
    add_squares,
    arguments,
    kind_of,
    on_device,
    parts_of,
    readable,
    width_of,
)
from gradkernels.portable import offsets, signed
from gradkernels.randomness import derive_keys
from gradkernels.spec import ProjectionSpec
from torch import Tensor

OUTPUTS = 128  # of a tile: one group of warps' worth, so that two programs share a processor
WARPS = 4
READING_WARPS = 8  # where features are made, in many registers: as many as leave two programs room
STAGES = 3
#: Chains staged before they are multiplied, 2**19 parameters: 130 MB for 64 rows of float32.
CHAINS = 8192
#: Programs of one product, about 4 rounds of an H100's 264. A constant: the parts in which a sum is
#: added decide its last bits, which may not depend on the rows.
PROGRAMS = 1056


class Stage(NamedTuple):
    """Memory between the passes; `dense` says what each holds."""

    high: Tensor
    low: Tensor
    steps: Tensor
    state_a: Tensor
    state_b: Tensor
    squares: Tensor


class RademacherSums:
    """float64 sums of a batch in the kernels' own layout: (tiles, OUTPUTS, width).

    Blocks are staged, and multiplied when the stage is full. A row's sums depend on its own numbers
    and on the blocks' bounds alone: neither on the other rows nor on how many there are. Nothing
    waits for the device, nothing is copied from the host. The memory used does not grow with p:
    `CHAINS` chains, and `PROGRAMS` tiles or the outputs.

    Args:
        spec: a "rademacher" projection.
        rows: 1 <= b <= 64.
        device: a CUDA device; a CPU where Triton interprets its kernels (TRITON_INTERPRET=1).
    """

    def __init__(self, spec: ProjectionSpec, rows: int, device: torch.device) -> None:
        keys = derive_keys(spec)
        tiles = -(-spec.d // OUTPUTS)
        self._d = spec.d
        self._rows = rows
        self._width = width_of(rows)
        self._keys = signed(keys.a), signed(keys.b)
        self._squares = torch.zeros(self._width, dtype=torch.float64, device=device)
        self._sums = torch.zeros(tiles, OUTPUTS, self._width, dtype=torch.float64, device=device)
        self._device = self._sums.device  # "cuda" has got its index
        words = torch.arange(tiles * (OUTPUTS // dense.BITS), device=self._device)
        self._offsets = offsets(keys, words).view(torch.uint32)
        bits = torch.arange(dense.BITS, dtype=torch.int32, device=self._device)
        self._places = (torch.ones_like(bits) << (dense.BITS - 1 - bits)).view(torch.uint32)
        self._splits = max(1, PROGRAMS // tiles)
        self._capacity = min(CHAINS, -(-spec.p // dense.CHAIN))
        self._stage: Stage | None = None
        self._parts = 0
        self._used = 0  # chains

    def add(
        self,
        block: Tensor,
        start: int,
        feature: Feature | None = None,
        factors: Tensor | None = None,
    ) -> None:
        """Add the features of block (b, m), any float type and strides.

        Args:
            block: of parameters [start, start + m).
            start: its first parameter's index.
            feature: of its parameters; None for the gradients themselves.
            factors: (b,) float32 that its rows are multiplied by first.
        """
        block = readable(block)
        parts = parts_of(block.dtype, feature, factors)
        if parts != self._parts:
            self._multiply()
            self._parts = parts
        low = 0
        while low < block.shape[1]:
            if self._used == self._capacity:
                self._multiply()
            high = min(block.shape[1], low + (self._capacity - self._used) * dense.CHAIN)
            part = feature and feature.part(low, high)
            self._pack(block[:, low:high], start + low, part, factors)
            low = high

    def total(self) -> Tensor:
        """Return the sums so far: (b, d) float64."""
        self._multiply()
        tiles = len(self._sums)
        # The rows of a tile are (half, word, bit of the half): to the order of the outputs.
        parted = self._sums.view(tiles, 2, OUTPUTS // dense.BITS, dense.BITS // 2, self._width)
        rows = parted.permute(4, 0, 2, 1, 3).reshape(self._width, tiles * OUTPUTS)
        return rows[: self._rows, : self._d]

    def squares(self) -> Tensor:
        """Return the squared norms of the features so far: (b,) float64."""
        self._multiply()
        return self._squares[: self._rows]

    def _pack(
        self, piece: Tensor, start: int, feature: Feature | None, factors: Tensor | None
    ) -> None:
        """Stage a piece (b, m) that fits into what is free."""
        stage = self._stage or self._new_stage()
        chains = -(-piece.shape[1] // dense.CHAIN)
        with on_device(self._device):
            dense.pack[(chains,)](
                piece,
                piece.stride(0),
                piece.stride(1),
                self._rows,
                piece.shape[1],
                start,
                self._used,
                *stage,
                self._capacity,
                *self._keys,
                *arguments(feature, factors),
                KIND=kind_of(feature),
                PARTS=self._parts,
                BN=self._width,
                CHAIN=dense.CHAIN,
                num_warps=READING_WARPS,
            )
        self._used += chains

    def _multiply(self) -> None:
        """Add what is staged to the sums, and empty the stage."""
        if not self._used or self._stage is None:
            return
        tiles, size = len(self._sums), self._sums.numel()
        each = -(-self._used // self._splits)
        splits = -(-self._used // each)
        partial = torch.empty(splits, size, dtype=torch.float32, device=self._device)
        with on_device(self._device):
            dense.multiply[(tiles, splits)](
                *self._stage[:5],
                self._offsets,
                self._places,
                partial,
                self._used,
                each,
                PARTS=self._parts,
                BM=OUTPUTS,
                BN=self._width,
                CHAIN=dense.CHAIN,
                num_warps=WARPS,
                num_stages=STAGES,
            )
            dense.gather[(-(-size // GATHERED),)](partial, self._sums, splits, size, BLOCK=GATHERED)
            add_squares(self._stage.squares, self._used, self._squares)
        self._used = 0

    def _new_stage(self) -> Stage:
        """Allocate the staging area: of each chain only what `pack` writes is ever read."""

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(self._capacity, width, dtype=dtype, device=self._device)

        parts = self._width * dense.CHAIN
        self._stage = Stage(
            empty(parts, torch.float16),
            empty(parts, torch.float16),
            empty(self._width, torch.float32),
            empty(dense.CHAIN, torch.uint32),
            empty(dense.CHAIN, torch.uint32),
            empty(self._width, torch.float64).view(self._width, self._capacity),
        )
        return self._stage


class SjltSums:
    """float64 sums of a batch, rows innermost: (d, width).

    A row's sums depend on its own numbers and on the blocks' bounds alone: neither on the other
    rows nor on how many there are. A row with an inf or a NaN becomes NaN throughout. Nothing waits
    for the device.

    Args:
        spec: an "sjlt" projection.
        rows: 1 <= b <= 64.
        device: a CUDA device; a CPU where Triton interprets its kernels (TRITON_INTERPRET=1).
    """

    def __init__(self, spec: ProjectionSpec, rows: int, device: torch.device) -> None:
        keys = derive_keys(spec)
        self._rows = rows
        self._s = spec.s
        self._width = width_of(rows)
        self._keys = signed(keys.a), signed(keys.b)
        self._squares = torch.zeros(self._width, dtype=torch.float64, device=device)
        self._sums = torch.zeros(spec.d, self._width, dtype=torch.float64, device=device)
        self._whole = torch.zeros_like(self._sums, dtype=torch.int64)
        device = self._sums.device
        self._offsets = offsets(keys, torch.arange(spec.s, device=device)).view(torch.uint32)
        repetitions = torch.arange(spec.s + 1, dtype=torch.int64, device=device)
        self._bounds = (repetitions * spec.d // spec.s).to(torch.int32)  # `randomness.sjlt_bounds`

    def add(
        self,
        block: Tensor,
        start: int,
        feature: Feature | None = None,
        factors: Tensor | None = None,
    ) -> None:
        """Add the features of block (b, m); the arguments are those of `RademacherSums.add`."""
        block = readable(block)
        length = block.shape[1]
        bits = 62 - length.bit_length()  # so that as many of the largest do not overflow 64
        size = self._sums.numel()
        kind = kind_of(feature)
        given = arguments(feature, factors)
        with on_device(block.device):
            largest = self._measure(block, kind, given)
            sparse.scatter[(-(-length // sparse.BLOCK),)](
                block,
                block.stride(0),
                block.stride(1),
                self._rows,
                length,
                start,
                largest,
                bits,
                self._whole,
                self._offsets,
                self._bounds,
                self._s,
                *self._keys,
                *given,
                KIND=kind,
                BN=self._width,
                BLOCK=sparse.BLOCK,
                num_warps=WARPS,
            )
            sparse.fold[(-(-size // GATHERED),)](
                self._whole,
                largest,
                bits,
                self._rows,
                self._sums,
                size,
                BN=self._width,
                BLOCK=GATHERED,
            )

    def total(self) -> Tensor:
        """Return the sums so far: (b, d) float64."""
        return self._sums[:, : self._rows].T

    def squares(self) -> Tensor:
        """Return the squared norms of the features so far: (b,) float64."""
        return self._squares[: self._rows]

    def _measure(self, block: Tensor, kind: int, given: Arguments) -> Tensor:
        """Add to the squared norms; return the largest magnitude of each row, (width,) float32."""
        chains = -(-block.shape[1] // sparse.CHAIN)
        each = -(-chains // PROGRAMS)
        programs = -(-chains // each)
        squares = self._squares.new_empty(self._width, programs)
        magnitudes = torch.empty_like(squares, dtype=torch.int32)
        largest = torch.empty_like(self._squares, dtype=torch.float32)
        sparse.measure[(programs,)](
            block,
            block.stride(0),
            block.stride(1),
            self._rows,
            block.shape[1],
            squares,
            magnitudes,
            programs,
            each,
            *given,
            KIND=kind,
            BN=self._width,
            CHAIN=sparse.CHAIN,
            num_warps=READING_WARPS,
        )
        add_squares(squares, programs, self._squares, magnitudes, largest)
        return largest
