"""Compilation of each loop once, for one signature, on first use; cached on disk if possible.

numba keeps machine code beside the file of the function that it was asked to compile, and looks
again only when *that* file changes: an edit to a function called from there would run the old code,
silently. So each entry here closes over a fingerprint of the sources, which numba makes part of
the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from gradkernels import randomness
from gradkernels.cpu import lookups, loops, normals, vectors
from llvmlite.binding import get_host_cpu_features  # type: ignore[import-untyped]
from numba import config, njit, types

_F32_2D = types.Array(types.float32, 2, "C")
_U32_1D = types.Array(types.uint32, 1, "C")
_U64_1D = types.Array(types.uint64, 1, "C", readonly=True)
_U64_2D = types.Array(types.uint64, 2, "C")
_I64_1D = types.Array(types.int64, 1, "C")
_I64_2D = types.Array(types.int64, 2, "C")
_U8_2D = types.Array(types.uint8, 2, "C", readonly=True)
_BLOCK = (_F32_2D, types.int64, types.uint32, types.uint32)

_sjlt_loop = njit(nogil=True)(loops.sjlt_loop)
_rademacher_loop = njit(nogil=True)(loops.rademacher_loop)
_signs_loop = njit(nogil=True)(loops.signs_loop)
_normals_loop = njit(nogil=True)(normals.normals_loop)
_gather_loop = njit(nogil=True)(lookups.gather_loop)
_shuffle_loop = njit(nogil=True)(lookups.shuffle_loop)
_hadamard_loop = njit(nogil=True)(loops.hadamard_loop)


@cache
def sjlt() -> Callable[..., None]:
    """Return `sjlt_loop`, compiled; it runs without the GIL."""
    out = types.Array(types.float64, 3, "C")
    signature = types.void(*_BLOCK, _U32_1D, _I64_1D, out)
    return _compile(_sjlt_entry, signature)


@cache
def rademacher() -> Callable[..., None]:
    """Return `rademacher_loop`, compiled; it runs without the GIL."""
    out = types.Array(types.float64, 4, "C")
    signature = types.void(*_BLOCK, _U32_1D, types.int64, out)
    return _compile(_rademacher_entry, signature)


@cache
def gaussian() -> Callable[..., None]:
    """Return `normals_loop`, compiled; it runs without the GIL."""
    keys = (types.int64, types.uint32, types.uint32)
    return _compile(_normals_entry, types.void(*keys, _U32_1D, _U32_1D, _F32_2D))


@cache
def signs() -> Callable[..., None]:
    """Return `signs_loop`, compiled; it runs without the GIL."""
    keys = (types.int64, types.uint32, types.uint32)
    return _compile(_signs_entry, types.void(*keys, _U32_1D, _U64_1D, _U64_2D))


def has_avx2() -> bool:
    """Return whether numba compiles for a processor with AVX2."""
    if config.CPU_FEATURES is not None:  # the variable NUMBA_CPU_FEATURES
        return "+avx2" in config.CPU_FEATURES.split(",")
    try:
        return bool(get_host_cpu_features().get("avx2"))
    except RuntimeError:  # LLVM does not know this kind of processor
        return False


@cache
def gathered() -> Callable[..., None]:
    """Return `gather_loop`, compiled; it runs without the GIL."""
    entries = types.Array(types.uint32, 4, "C")
    return _compile(_gather_entry, types.void(_U8_2D, entries, _I64_2D))


@cache
def shuffled() -> Callable[..., None]:
    """Return `shuffle_loop`, compiled, where `has_avx2`; it runs without the GIL."""
    planes = types.Array(types.uint8, 5, "C")
    return _compile(_shuffle_entry, types.void(_U8_2D, planes, _I64_2D))


@cache
def hadamard() -> Callable[..., None]:
    """Return `hadamard_loop`, compiled; it runs without the GIL."""
    return _compile(_hadamard_entry, types.void(_F32_2D))


def _sjlt_entry(fingerprint: int) -> Callable[..., None]:
    def sjlt_entry(x, start, a, b, c, bounds, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if fingerprint >= 0:
            _sjlt_loop(x, start, a, b, c, bounds, out)

    return sjlt_entry


def _rademacher_entry(fingerprint: int) -> Callable[..., None]:
    def rademacher_entry(x, start, a, b, c, first_word, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if fingerprint >= 0:
            _rademacher_loop(x, start, a, b, c, first_word, out)

    return rademacher_entry


def _normals_entry(fingerprint: int) -> Callable[..., None]:
    def normals_entry(start, a, b, even, odd, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if fingerprint >= 0:
            _normals_loop(start, a, b, even, odd, out)

    return normals_entry


def _signs_entry(fingerprint: int) -> Callable[..., None]:
    def signs_entry(start, a, b, c, octets, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if fingerprint >= 0:
            _signs_loop(start, a, b, c, octets, out)

    return signs_entry


def _gather_entry(fingerprint: int) -> Callable[..., None]:
    def gather_entry(bits, tables, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if fingerprint >= 0:
            _gather_loop(bits, tables, out)

    return gather_entry


def _shuffle_entry(fingerprint: int) -> Callable[..., None]:
    def shuffle_entry(bits, tables, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if fingerprint >= 0:
            _shuffle_loop(bits, tables, out)

    return shuffle_entry


def _hadamard_entry(fingerprint: int) -> Callable[..., None]:
    def hadamard_entry(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if fingerprint >= 0:
            _hadamard_loop(x)

    return hadamard_entry


def _compile(make: Callable[[int], Callable[..., None]], signature: Any) -> Callable[..., None]:  # noqa: ANN401
    """Compile eagerly: with one signature, no call ever compiles again."""
    try:
        compiled: Callable[..., None] = njit(signature, nogil=True, cache=True)(
            make(_fingerprint())
        )
    except (OSError, RuntimeError):
        # No writable cache folder or no readable source: compiling costs seconds per process, with
        # the same numbers.
        compiled = njit(signature, nogil=True)(make(0))
    return compiled


def _fingerprint() -> int:
    """Return 56 bits of a hash over every source that the machine code comes from."""
    digest = hashlib.blake2b(digest_size=7)
    for module in (randomness, loops, lookups, normals, vectors):
        digest.update(Path(str(module.__file__)).read_bytes())
    return int.from_bytes(digest.digest(), "little")
