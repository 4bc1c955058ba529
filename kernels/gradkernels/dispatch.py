"""The public way in: check the input, choose a backend, add up blocks of parameters."""

from __future__ import annotations

import sys
from typing import Literal, Protocol, cast, get_args

import torch
from gradkernels.cpu.vnni import vnni_missing
from gradkernels.features import Feature, FeatureKind
from gradkernels.gpu.usable import index_of, refusal
from gradkernels.methods import check_backend, doing, entry_of, sums_of
from gradkernels.published import missing
from gradkernels.reference import scale
from gradkernels.spec import ProjectionSpec, check_int, check_spec
from torch import Tensor

Backend = Literal["numba", "torch", "triton", "trak", "int8"]

BACKENDS: tuple[str, ...] = get_args(Backend)
_GROUP_ROWS = 64  # rows whose float32 sums stay in a core's cache


class _Sums(Protocol):
    def add(self, block: Tensor, start: int) -> None: ...

    def total(self) -> Tensor: ...


class _FusedSums(_Sums, Protocol):
    """Sums that make features as they read gradients, and know the features' squared norms."""

    def add(
        self,
        block: Tensor,
        start: int,
        feature: Feature | None = None,
        factors: Tensor | None = None,
    ) -> None: ...

    def squares(self) -> Tensor: ...


class Accumulator:
    """Projection of a (b, p) matrix that is never built: blocks come one by one, in any order.

    Parameters that no block covers count as zeros; blocks that overlap add up. A row's result never
    depends on the other rows. Another order or another cut of the blocks changes it within
    rounding (float32 relative 1e-6 of the row's norm; of "int8", its bound below); the number of
    threads changes nothing.

    Args:
        spec: the projection.
        rows: b >= 0, rows of every block.
        device: where blocks come from and the result goes; "cuda" is the current one, as it is now.
        backend: None chooses the fastest: "numba" on a CPU, "triton" on a CUDA device where its
            kernels pass their test (Gaussian: "torch"), else "torch". Method "trak" has none but
            "trak", which keeps (b, p) in RAM and projects there, from whatever device. "int8" is
            chosen by name alone: "rademacher" on a CPU with AVX-512 VNNI, by products of bytes. It
            projects gradients g' that are rounded to 16 bits, by the same matrix: |g'_j - g_j| is
            under 1 / 64,000 of the row's largest number among the 2,048 of a tile, and |g' - g|_2
            under 7.1e-4 of |g|_2 (`gradkernels.cpu.int8` derives both).
        squares: whether `squares` will be asked for. The Triton kernels know them anyway.

    Raises:
        TypeError: spec is no ProjectionSpec, or rows no int.
        ValueError: rows is negative, the device unknown, or the backend is unknown or cannot do
            this.
    """

    def __init__(
        self,
        spec: ProjectionSpec,
        rows: int,
        *,
        device: str | torch.device = "cpu",
        backend: Backend | None = None,
        squares: bool = False,
    ) -> None:
        check_spec(spec)
        check_int("rows", rows)
        if rows < 0:
            raise ValueError(f"rows={rows} is below 0; give 0 or more")
        self.spec = spec
        self.rows = rows
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={device!r} is none that torch knows; take 'cpu'") from error
        self.backend = choose_backend(spec, self.device, backend)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", index_of(self.device))
        self._groups = [
            (low, min(low + _GROUP_ROWS, rows), self._new_sums(min(_GROUP_ROWS, rows - low)))
            for low in range(0, rows, _GROUP_ROWS)
        ]
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        asked = squares and self.backend != "triton"
        self._squares = torch.zeros(rows, dtype=wide, device=self.device) if asked else None

    def add(
        self,
        block: Tensor,
        start: int,
        feature: Feature | None = None,
        factors: Tensor | None = None,
    ) -> None:
        """Add parameters [start, start + p_block).

        The Triton kernels make features as they read gradients; elsewhere plain torch does, in new
        memory of the block's size.

        Args:
            block: (b, p_block), any float type and strides, on the accumulator's device; computed
                in float32.
            start: global index of the block's first parameter.
            feature: of the block's parameters, to be projected in the gradients' place.
            factors: (b,) float32 that gradients are multiplied by, before their feature is taken.

        Raises:
            TypeError: block is no floating-point tensor, or start no int.
            ValueError: a shape, device or place does not fit.
        """
        _check_block(block, self.rows)
        if _place(block.device) != _place(self.device):
            raise ValueError(
                f"block is on {block.device}, the accumulator on {self.device}; move one of them"
            )
        check_int("start", start)
        stop = start + block.shape[1]
        if not 0 <= start <= stop <= self.spec.p:
            raise ValueError(
                f"block covers [{start}, {stop}), outside [0, p={self.spec.p}); "
                "check start and the projection's p"
            )
        if block.shape[1] == 0:
            return
        _check_feature(block, feature, factors)
        block = block.detach()
        if feature is not None or factors is not None:
            kind = None if feature is None else feature.kind
            if self.backend != "triton" or refusal(self.device, self.spec.method, kind) is not None:
                block, feature, factors = _applied(block, feature, factors), None, None
        for low, high, sums in self._groups:
            part = block[low:high]
            if self.backend == "triton":  # its kernels read any strides, and half the bytes
                own = None if factors is None else factors[low:high]
                cast(_FusedSums, sums).add(part, start, feature, own)
                continue
            part = part.to(torch.float32).contiguous()
            if self._squares is not None:
                norms = torch.linalg.vector_norm(part, dim=1)
                self._squares[low:high] += norms.to(self._squares.dtype).square_()
            sums.add(part, start)

    def squares(self) -> Tensor:
        """Return the squared norms of what was added so far: (b,) float64, a new tensor.

        Blocks that overlap count one by one. A row that is not finite has inf or NaN.

        Raises:
            ValueError: the accumulator was made without `squares=True`, and sums without them.
        """
        if self.backend == "triton":
            parts = [cast(_FusedSums, sums).squares() for _, _, sums in self._groups]
            return torch.cat([torch.zeros(0, dtype=torch.float64, device=self.device), *parts])
        if self._squares is None:
            raise ValueError("squared norms were not kept; make the Accumulator with squares=True")
        return self._squares.clone()

    def result(self) -> Tensor:
        """Return the projection of what was added so far: (b, d) float32, a new tensor."""
        out = torch.empty(self.rows, self.spec.d, dtype=torch.float32, device=self.device)
        for low, high, sums in self._groups:
            out[low:high] = sums.total() * scale(self.spec)
        return out

    def _new_sums(self, rows: int) -> _Sums:
        where = (self.device,) if self.backend in ("torch", "triton") else ()
        sums: _Sums = sums_of(self.spec.method, self.backend)(self.spec, rows, *where)
        return sums


def project(x: Tensor, spec: ProjectionSpec, *, backend: Backend | None = None) -> Tensor:
    """Project x (b, p), any float type, to (b, d) float32 on the same device.

    Raises:
        TypeError: x is no floating-point tensor, or spec no ProjectionSpec.
        ValueError: x is not (b, spec.p), or the backend is unknown or cannot do this.
    """
    check_spec(spec)
    _check_block(x, None)
    if x.shape[1] != spec.p:
        raise ValueError(f"x has shape {tuple(x.shape)}, not (b, p={spec.p})")
    accumulator = Accumulator(spec, len(x), device=x.device, backend=backend)
    accumulator.add(x, 0)
    return accumulator.result()


def choose_backend(spec: ProjectionSpec, device: torch.device, backend: str | None) -> Backend:
    """Return the backend that will run, given the one asked for (None: the fastest).

    Triton's kernels are tested at their first use.

    Raises:
        ValueError: the backend is unknown or cannot do this.
    """
    if "trak" in (spec.method, backend):
        return _published(spec, backend)
    known = entry_of(spec.method).sums
    # The numba loops read 32-bit words as four bytes, lowest first.
    can_numba = device.type == "cpu" and sys.byteorder == "little"
    if backend is None:
        if device.type == "cuda" and refusal(device, spec.method) is None:
            return "triton"
        backend = "numba" if can_numba and "numba" in known else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)} or None")
    if backend == "numba" and not can_numba:
        raise ValueError(
            f"backend='numba' runs on a (little-endian) CPU, not on {device}; choose "
            "backend='torch' or None"
        )
    if backend == "triton":
        on_cuda = device.type == "cuda"
        why = refusal(device, spec.method) if on_cuda else f"the device is {device}"
        if why is not None:
            raise ValueError(
                f"backend='triton' does {' and '.join(doing('triton'))} on a CUDA device, not "
                f"this: {why} (method={spec.method!r}); choose backend='torch' or None"
            )
    check_backend(spec.method, backend)
    if backend == "int8":
        why = vnni_missing() if device.type == "cpu" else f"the device is {device}"
        if why is not None:
            raise ValueError(
                "backend='int8' does rademacher on a CPU with VNNI, not this: "
                f"{why}; choose backend=None"
            )
    return cast(Backend, backend)


def fuses(spec: ProjectionSpec, device: torch.device, kind: FeatureKind | None) -> bool:
    """Return whether a projection makes a kind of feature itself, as it reads gradients.

    Asked before a pass, its kernels are tested while memory is free, and not at their first use:
    in an export that is inside the first backward.

    Args:
        spec: the projection.
        device: of the gradients.
        kind: of the feature; None for plain gradients.

    Raises:
        ValueError: the projection cannot be computed at all.
    """
    triton = choose_backend(spec, device, None) == "triton"
    return triton and refusal(device, spec.method, kind) is None


def _published(spec: ProjectionSpec, backend: str | None) -> Backend:
    """Return the backend of the published projection; raise ValueError where it cannot run."""
    if spec.method != "trak":
        raise ValueError(f"backend='trak' does method trak, not {spec.method}; choose None")
    if backend not in (None, "trak"):
        raise ValueError(
            f"backend={backend!r} does not do method trak, which is TRAK's own code, on the CPU; "
            "choose None"
        )
    why = missing()
    if why is not None:
        raise ValueError(f"method='trak' cannot be computed: {why}")
    return "trak"


def _applied(block: Tensor, feature: Feature | None, factors: Tensor | None) -> Tensor:
    """Return the features of a block (b, m) by plain torch: a new float32 tensor."""
    out = block.to(torch.float32, copy=True)
    if factors is not None:
        out.mul_(factors[:, None])
    return out if feature is None else feature.apply_(out)


def _check_feature(block: Tensor, feature: Feature | None, factors: Tensor | None) -> None:
    """Raise unless a feature and factors fit a block (b, m)."""
    vectors = None if feature is None else feature.base
    for name, given in (("the feature's vectors", vectors), ("the factors", factors)):
        if given is not None and _place(given.device) != _place(block.device):
            raise ValueError(
                f"{name} are on {given.device}, the block on {block.device}; move one of them"
            )
    length = None if feature is None else feature.length
    if length is not None and length != block.shape[1]:
        raise ValueError(
            f"the feature is of {length} parameters, the block of {block.shape[1]}; "
            "Feature.part(low, high) cuts one"
        )
    if factors is not None and (factors.shape != block.shape[:1] or factors.dtype != torch.float32):
        raise ValueError(
            f"factors are {factors.dtype} {tuple(factors.shape)}, not float32 of the block's "
            f"b={len(block)} rows"
        )


def _place(device: torch.device) -> tuple[str, int]:
    """Return what two names of one device have in common; "cpu" and "cpu:0" are one."""
    return device.type, device.index or 0


def _check_block(block: object, rows: int | None) -> None:
    """Raise unless block is a floating-point tensor (rows, anything)."""
    if not isinstance(block, Tensor) or not block.is_floating_point():
        kind = block.dtype if isinstance(block, Tensor) else type(block).__name__
        raise TypeError(
            f"expected a floating-point tensor, got {kind}; "
            "torch.as_tensor(x, dtype=torch.float32) makes one"
        )
    if block.ndim != 2 or (rows is not None and len(block) != rows):
        wanted = "b" if rows is None else f"b={rows}"
        raise ValueError(f"block has shape {tuple(block.shape)}, not ({wanted}, parameters)")
