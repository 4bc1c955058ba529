"""The plain-torch path: any device, same matrix, memory bounded by small tiles of it.

Words are computed in int32, whose products and sums wrap as unsigned ones do; torch has no uint32
arithmetic and its `>>` copies the sign bit, so a logical shift masks it off again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gradkernels.randomness import GOLDEN, M1, M2, Keys, derive_keys, sjlt_bounds
from gradkernels.spec import ProjectionSpec
from torch import Tensor

_TILE_ENTRIES = {"cpu": 2**20}  # matrix entries made at once: few enough for a cache
_TILE_ENTRIES_ELSEWHERE = 2**24  # enough to fill a GPU, 64 MiB of float32
_TILE_PARAMS = 2048  # parameters summed in float32 (BLAS may add them one after another)


def words(keys: Keys, params: Tensor, indices: Tensor) -> Tensor:
    """Return the words of parameters (m,) at word indices (k,), any int type: (m, k) int32 bits."""
    j = params.to(torch.int32)
    a = _mix(j + signed(keys.a))[:, None]
    b = _mix(j ^ signed(keys.b))[:, None]
    x = a + offsets(keys, indices)
    x ^= _shift(x, 16)
    x *= signed(M1)
    x += b
    x ^= _shift(x, 15)
    x *= signed(M2)
    x ^= _shift(x, 15)
    return x


def offsets(keys: Keys, indices: Tensor) -> Tensor:
    """Return c of word indices (k,), any int type: (k,) int32 bits."""
    return _mix(indices.to(torch.int32) * signed(GOLDEN) + signed(keys.c))


class DenseSums:
    """Sums of a batch by products with tiles of a matrix: (b, d), float64 where the device has it.

    float64 sums make the order in which a GPU adds invisible in float32, almost always.

    Args:
        spec: the projection.
        rows: b.
        device: of the blocks.
        matrix: (keys, parameters (m,), d) -> entries (m, d) float32.
    """

    def __init__(
        self,
        spec: ProjectionSpec,
        rows: int,
        device: torch.device,
        matrix: Callable[[Keys, Tensor, int], Tensor],
    ) -> None:
        self._d = spec.d
        self._keys = derive_keys(spec)
        self._matrix = matrix
        self._sums = _zeros(rows, spec.d, device)

    def add(self, block: Tensor, start: int) -> None:
        """Add block (b, m) float32 of parameters [start, start + m)."""
        step = min(_TILE_PARAMS, _tile_entries(block) // self._d)
        for tile, params in _tiles(block, start, step):
            with full_float32():
                self._sums += tile @ self._matrix(self._keys, params, self._d)

    def total(self) -> Tensor:
        """Return the sums so far: (b, d)."""
        return self._sums


def rademacher_sums(spec: ProjectionSpec, rows: int, device: torch.device) -> DenseSums:
    """Return sums by signs."""
    return DenseSums(spec, rows, device, signs)


def gaussian_sums(spec: ProjectionSpec, rows: int, device: torch.device) -> DenseSums:
    """Return sums by standard normals."""
    return DenseSums(spec, rows, device, gaussians)


class SjltSums:
    """Sums of a batch at the s outputs of each parameter: (b, d), float64 as `DenseSums`'."""

    def __init__(self, spec: ProjectionSpec, rows: int, device: torch.device) -> None:
        self._s = spec.s
        self._keys = derive_keys(spec)
        self._bounds = torch.from_numpy(sjlt_bounds(spec)).to(device)
        self._sums = _zeros(rows, spec.d, device)

    def add(self, block: Tensor, start: int) -> None:
        """Add block (b, m) float32 of parameters [start, start + m)."""
        # Nothing is summed in float32: a tile may be as long as memory allows.
        step = _tile_entries(block) // (max(len(block), 1) * self._s)
        sizes = self._bounds[1:] - self._bounds[:-1]
        for tile, params in _tiles(block, start, step):
            word = words(self._keys, params, torch.arange(self._s, device=params.device))
            unsigned = word.to(torch.int64) & 0xFFFFFFFF
            outputs = self._bounds[:-1] + (unsigned * sizes >> 32)  # (m, s)
            sign = 1 - 2 * (word & 1)
            wide = tile.to(self._sums.dtype)
            for r in range(self._s):
                self._sums.index_add_(1, outputs[:, r], wide * sign[:, r])

    def total(self) -> Tensor:
        """Return the sums so far: (b, d)."""
        return self._sums


def _zeros(rows: int, d: int, device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(rows, d, dtype=dtype, device=device)


def _tile_entries(block: Tensor) -> int:
    return _TILE_ENTRIES.get(block.device.type, _TILE_ENTRIES_ELSEWHERE)


def _tiles(block: Tensor, start: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a block (b, m) after every `step` parameters; yield each tile and its parameters."""
    for tile in torch.split(block, max(1, step), dim=1):
        stop = start + tile.shape[1]
        yield tile, torch.arange(start, stop, device=block.device)
        start = stop


def signs(keys: Keys, params: Tensor, outputs: int) -> Tensor:
    """Return Rademacher signs (m, outputs) float32."""
    word = words(keys, params, torch.arange(-(-outputs // 32), device=params.device))
    bit = torch.arange(32, dtype=torch.int32, device=params.device)
    bits = (word[:, :, None] >> bit) & 1
    return (1 - 2 * bits).flatten(1)[:, :outputs].to(torch.float32)


def gaussians(keys: Keys, params: Tensor, outputs: int) -> Tensor:
    """Return standard normals (m, outputs) float32, as `randomness.gaussians` defines them."""
    pairs = -(-outputs // 2)
    word = words(keys, params, torch.arange(2 * pairs, device=params.device))
    first, second = word[:, 0::2], word[:, 1::2]
    u1 = (_shift(first, 8) + 1).to(torch.float32) * 2.0**-24
    u2 = (_shift(second, 9) * 2 + 1).to(torch.float32) * 2.0**-24
    radius = u1.log_().mul_(-2).sqrt_()
    angle = u2.mul_(math.pi / 2)
    normal = torch.stack(
        (radius * angle.cos() * (1 - 2 * (second & 1)), radius * angle.sin() * (1 - (second & 2))),
        dim=-1,
    )
    return normal.flatten(1)[:, :outputs]


def _mix(x: Tensor) -> Tensor:
    """Mix int32 bits (m,), as `randomness.mix`."""
    x = x ^ _shift(x, 16)
    x = x * signed(M1)
    x = x ^ _shift(x, 15)
    x = x * signed(M2)
    return x ^ _shift(x, 15)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int32 bits right, filling with zeros."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def signed(value: int) -> int:
    """Return the int32 number with the bits of a 32-bit unsigned one."""
    return value - 2**32 if value >= 2**31 else value


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 as float32 whatever the process allows (TF32 would keep 10 bits of x).

    An autocast around us, as a trainer or `gradstore.build` has one, would keep 7.

    torch has an old and a new interface to this setting, and raises where they disagree: so each
    is changed through the interface that the process used.
    """
    mkldnn: Any = torch.backends.mkldnn  # its `matmul` is made at run time
    places: tuple[Any, Any] = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    plain = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    if all(precision in ("none", "ieee") for precision in before):
        with plain[0], plain[1]:
            yield
        return
    try:
        old = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        old = None
        for place in places:
            place.fp32_precision = "ieee"
    try:
        with plain[0], plain[1]:
            yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old)
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
