"""Compile each loop once, for one signature, on first use; kept on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from gradkernels.cpu.loops import rademacher_loop, sjlt_loop
from numba import njit, types

_F32_2D = types.Array(types.float32, 2, "C")
_U32_1D = types.Array(types.uint32, 1, "C")
_I64_1D = types.Array(types.int64, 1, "C")
_BLOCK = (_F32_2D, types.int64, types.uint32, types.uint32)


@cache
def sjlt() -> Callable[..., None]:
    """Return `sjlt_loop`, compiled; it runs without the GIL."""
    out = types.Array(types.float64, 3, "C")
    ends = (types.int64, types.int64, out)
    return _compile(sjlt_loop, types.void(*_BLOCK, _U32_1D, _I64_1D, *ends))


@cache
def rademacher() -> Callable[..., None]:
    """Return `rademacher_loop`, compiled; it runs without the GIL."""
    out = types.Array(types.float64, 4, "C")
    return _compile(rademacher_loop, types.void(*_BLOCK, _U32_1D, types.int64, out))


def _compile(loop: Callable[..., None], signature: Any) -> Callable[..., None]:  # noqa: ANN401
    """Compile eagerly: with one signature, no call ever compiles again."""
    try:
        compiled: Callable[..., None] = njit(signature, nogil=True, cache=True)(loop)
    except (OSError, RuntimeError):
        # Neither the install folder nor the user's cache folder can be written: a few seconds per
        # process, and still the right numbers.
        compiled = njit(signature, nogil=True)(loop)
    return compiled
