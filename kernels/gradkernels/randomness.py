"""The randomness of version 1, defined in NumPy: every other implementation equals this file.

A word is 32 random bits, a function of three counters alone:

    a = mix(j + key_a)    b = mix(j ^ key_b)    c = mix(w * GOLDEN + key_c)
    x = a + c;  x ^= x >> 16;  x = x * M1 + b;  x ^= x >> 15;  x *= M2;  x ^= x >> 15

in 32-bit unsigned arithmetic, j the parameter's global index and w the word's index: output // 32
(Rademacher), repetition (SJLT), or 2 * (output // 2) and the next (Gaussian). Only the last line
runs p * d / 32 times. Each parameter brings 64 bits of state, a and b: with a alone, two parameters
whose a differ by a difference of two c would share a run of words; b distinguishes them. The three
keys come from (seed, method, version), of the method its `stream` in `methods.TABLE`. `mix` is a
bijection of 32 bits with near-perfect avalanche (constants from C. Wellons' hash-prospector search,
"[16 21f0aaad 15 d35a2d97 15]").
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gradkernels.methods import entry_of
from gradkernels.spec import ProjectionSpec
from numpy.typing import NDArray

MASK = 0xFFFFFFFF
M1 = 0x21F0AAAD
M2 = 0xD35A2D97
GOLDEN = 0x9E3779B9

U32 = NDArray[np.uint32]


class Keys(NamedTuple):
    """Three 32-bit keys, each 0 <= key < 2**32, that stand for (seed, method, version)."""

    a: int
    b: int
    c: int


def mix_int(x: int) -> int:
    """Mix one 32-bit integer, 0 <= x < 2**32, into another (bijective)."""
    x ^= x >> 16
    x = x * M1 & MASK
    x ^= x >> 15
    x = x * M2 & MASK
    return x ^ x >> 15


def derive_keys(spec: ProjectionSpec) -> Keys:
    """Absorb seed, method and version into three keys, each by its own chain of `mix`."""
    parts = (entry_of(spec.method).stream, spec.version, spec.seed & MASK, spec.seed >> 32)

    def chain(stream: int) -> int:
        state = mix_int(stream * GOLDEN & MASK)
        for part in parts:
            state = mix_int(((state ^ part) + GOLDEN) & MASK)
        return state

    return Keys(chain(1), chain(2), chain(3))


def mix(x: U32) -> U32:
    """Mix an array of 32-bit integers, shape kept."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(M1)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(M2)
    return x ^ (x >> np.uint32(15))


def word_offsets(keys: Keys, count: int) -> U32:
    """Return c of the words 0 <= w < count: (count,) uint32."""
    return mix(np.arange(count, dtype=np.uint32) * np.uint32(GOLDEN) + np.uint32(keys.c))


def words(keys: Keys, params: NDArray[np.integer], indices: NDArray[np.integer]) -> U32:
    """Return the words of parameters (m,) at word indices (k,): (m, k) uint32."""
    # Arrays of at least one dimension throughout: NumPy warns when a uint32 *scalar* wraps.
    j = np.atleast_1d(params).astype(np.uint32)
    w = np.atleast_1d(indices).astype(np.uint32)
    a = mix(j + np.uint32(keys.a))[:, None]
    b = mix(j ^ np.uint32(keys.b))[:, None]
    x = a + mix(w * np.uint32(GOLDEN) + np.uint32(keys.c))  # c of `word_offsets`
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(M1) + b
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(M2)
    return x ^ (x >> np.uint32(15))


def signs(spec: ProjectionSpec, params: NDArray[np.integer], outputs: int) -> NDArray[np.int8]:
    """Return Rademacher signs (m, outputs) int8: bit i % 32 of word i // 32; a set bit is -1."""
    index = np.arange(outputs)
    word = words(derive_keys(spec), params, np.arange(-(-outputs // 32)))[:, index // 32]
    bits = (word >> (index % 32).astype(np.uint32)) & np.uint32(1)
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def sjlt_entries(
    spec: ProjectionSpec, params: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return where each parameter goes: outputs (m, s) int64 and signs (m, s) int8.

    Repetition r owns the outputs r*d//s <= i < (r+1)*d//s, so a parameter's s outputs are distinct
    whether or not s divides d. The word's high bits choose the output (multiply and take the upper
    half: no modulo, nothing cyclic in j); its lowest bit, which hardly moves that choice, the sign.
    """
    word = words(derive_keys(spec), params, np.arange(spec.s)).astype(np.uint64)
    bounds = sjlt_bounds(spec)
    sizes = (bounds[1:] - bounds[:-1]).astype(np.uint64)
    outputs = bounds[:-1] + ((word * sizes) >> np.uint64(32)).astype(np.int64)
    sign = (1 - 2 * (word & np.uint64(1)).astype(np.int8)).astype(np.int8)
    return outputs, sign


def sjlt_bounds(spec: ProjectionSpec) -> NDArray[np.int64]:
    """Return (s + 1,) int64: repetition r owns the outputs bounds[r]:bounds[r + 1], never none."""
    return np.arange(spec.s + 1, dtype=np.int64) * spec.d // spec.s


def gaussians(
    spec: ProjectionSpec, params: NDArray[np.integer], outputs: int
) -> NDArray[np.float64]:
    """Return standard normals (m, outputs) float64 by Box-Muller.

    Outputs 2k and 2k+1 share radius and angle, from words 2k and 2k+1. Both uniforms have 24 bits,
    exact in float32, and the angle stays in the first quadrant (two bits of the second word are the
    signs), so that a float32 implementation agrees to the last bits. Largest value: 5.77.
    """
    pairs = -(-outputs // 2)
    word = words(derive_keys(spec), params, np.arange(2 * pairs))
    u1 = ((word[:, 0::2] >> np.uint32(8)).astype(np.float64) + 1) * 2.0**-24  # (0, 1]
    u2 = ((word[:, 1::2] >> np.uint32(9)).astype(np.float64) * 2 + 1) * 2.0**-24  # (0, 1)
    radius = np.sqrt(-2 * np.log(u1))
    angle = u2 * (np.pi / 2)
    flip_cos = 1 - 2 * (word[:, 1::2] & np.uint32(1)).astype(np.float64)
    flip_sin = 1 - (word[:, 1::2] & np.uint32(2)).astype(np.float64)
    normal = np.empty((len(word), 2 * pairs))
    normal[:, 0::2] = radius * np.cos(angle) * flip_cos
    normal[:, 1::2] = radius * np.sin(angle) * flip_sin
    return normal[:, :outputs]
