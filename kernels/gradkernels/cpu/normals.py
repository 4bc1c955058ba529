"""Standard normals by Box-Muller, made where they are used: the compiled loop of the Gaussian path.

`randomness.gaussians` says which numbers; this loop computes them in float32 without a call of the
platform's log or sine, so that LLVM makes 8 or 16 at once and every machine makes the same ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gradkernels.cpu.loops import F32, U32, mix, word
from numba import njit

PART = 1024  # pairs of a row that are made pass by pass

_ONE, _HALF = np.float32(1), np.float32(0.5)
_SCALE = np.float32(2.0**-24)
_U1, _U8, _U9, _U23, _U31 = (np.uint32(bits) for bits in (1, 8, 9, 23, 31))
_FRACTION, _EXPONENT = np.uint32(0x007FFFFF), np.uint32(0x3F800000)
_ROOT2 = np.float32(2**0.5)
_TWO = np.uint32(2)
#: ln 2 in two parts, the first with few bits: an exponent times it is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
#: ln(1 + f) = f - f^2 / 2 + f^3 q(f), for sqrt(1/2) - 1 <= f <= sqrt(2) - 1: within 9e-10 of it.
_Q = tuple(
    np.float32(c)
    for c in (
        0.33333310898963886, -0.2500001627905777, 0.20002204183611252, -0.16667643716133257,
        0.14217891534663687, -0.12411268686346918, 0.11904712128235699, -0.11646434418799095,
        0.06675271895345536,
    )
)  # fmt: skip
#: sin(pi / 2 t) = t p(t^2), for 0 <= t <= 1: within 3e-11 of it.
_P = tuple(
    np.float32(c)
    for c in (
        1.570796326761672, -0.6459640952644679, 0.07969260125988198, -0.004681651016339328,
        0.0001602470288346869, -3.428790731757614e-06,
    )
)  # fmt: skip
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7, _Q8 = _Q
_P0, _P1, _P2, _P3, _P4, _P5 = _P


@njit(inline="always")  # type: ignore[untyped-decorator]
def _radius(bits: Any) -> Any:  # noqa: ANN401
    """Return sqrt(-2 ln u) for u = ((bits >> 8) + 1) / 2^24."""
    pattern = np.float32(np.int32((bits >> _U8) + _U1)).view(np.uint32)
    exponent = np.float32(np.int32(pattern >> _U23) - np.int32(127 + 24))
    fraction = np.uint32((pattern & _FRACTION) | _EXPONENT).view(np.float32)
    large = fraction > _ROOT2
    fraction = fraction * _HALF if large else fraction
    exponent = exponent + _ONE if large else exponent
    f = fraction - _ONE
    q = _Q7 + f * _Q8
    q = _Q6 + f * q
    q = _Q5 + f * q
    q = _Q4 + f * q
    q = _Q3 + f * q
    q = _Q2 + f * q
    q = _Q1 + f * q
    q = _Q0 + f * q
    square = f * f
    small = square * (f * q) + exponent * _LN2_LOW - _HALF * square
    log = exponent * _LN2_HIGH + (f + small)
    return np.sqrt(np.float32(-2) * log)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _sine(t: Any) -> Any:  # noqa: ANN401
    """Return sin(pi / 2 t)."""
    square = t * t
    p = _P4 + square * _P5
    p = _P3 + square * p
    p = _P2 + square * p
    p = _P1 + square * p
    return t * (_P0 + square * p)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _angle(bits: Any) -> Any:  # noqa: ANN401
    """Return t of a word, the angle over pi / 2: an odd number over 2^24, so 1 - t is exact."""
    return np.float32(np.int32(((bits >> _U9) << _U1) + _U1)) * _SCALE


@njit(inline="always")  # type: ignore[untyped-decorator]
def _with_sign(x: Any, bit: Any) -> Any:  # noqa: ANN401
    """Return x >= 0 with the sign bit given, 0 or 1."""
    return np.uint32(np.float32(x).view(np.uint32) | np.uint32(bit << _U31)).view(np.float32)


@njit  # type: ignore[untyped-decorator]
def _fill_words(out: U32, a: Any, b: Any, c: U32) -> None:  # noqa: ANN401
    for k in range(out.shape[0]):
        out[k] = word(a, b, c[k])


@njit  # type: ignore[untyped-decorator]
def _fill_radii(out: F32, first: U32) -> None:
    for k in range(out.shape[0]):
        out[k] = _radius(first[k])


@njit  # type: ignore[untyped-decorator]
def _fill_cosines(out: F32, radius: F32, second: U32) -> None:
    for k in range(out.shape[0]):
        bits = second[k]
        out[k] = _with_sign(radius[k] * _sine(_ONE - _angle(bits)), bits & _U1)


@njit  # type: ignore[untyped-decorator]
def _fill_sines(out: F32, radius: F32, second: U32) -> None:
    for k in range(out.shape[0]):
        bits = second[k]
        out[k] = _with_sign(radius[k] * _sine(_angle(bits)), (bits & _TWO) >> _U1)


def normals_loop(
    start: int, key_a: np.uint32, key_b: np.uint32, even: U32, odd: U32, out: F32
) -> None:
    """Make the normals of consecutive parameters.

    A few passes over a part of a row that stays in the first cache: LLVM makes vectors of each,
    and of none where they are one.

    Args:
        start: global index of the first one.
        key_a: first key.
        key_b: second key.
        even: (k,) `mix(w * GOLDEN + key_c)` of words w = 0, 2, 4, ...
        odd: (k,) the same of words 1, 3, 5, ...
        out: (m, 2 k): outputs 0, 2, 4, ... of each parameter, then outputs 1, 3, 5, ...
    """
    pairs = even.shape[0]
    words_held = np.empty(PART, np.uint32)
    radii_held = np.empty(PART, np.float32)
    for i in range(out.shape[0]):
        j = np.uint32(start + i)
        a, b = mix(np.uint32(j + key_a)), mix(np.uint32(j ^ key_b))
        for low in range(0, pairs, PART):
            high = min(low + PART, pairs)
            words, radii = words_held[: high - low], radii_held[: high - low]
            _fill_words(words, a, b, even[low:high])
            _fill_radii(radii, words)
            _fill_words(words, a, b, odd[low:high])
            _fill_cosines(out[i, low:high], radii, words)
            _fill_sines(out[i, pairs + low : pairs + high], radii, words)
