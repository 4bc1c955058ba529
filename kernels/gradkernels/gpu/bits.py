"""Random bits inside a kernel: `gradkernels.randomness` on uint32 tensors of Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from gradkernels import randomness

M1 = tl.constexpr(randomness.M1)
M2 = tl.constexpr(randomness.M2)


@triton.jit
def mix(x):
    """Mix uint32 numbers, any shape, as `randomness.mix`."""
    x ^= x >> 16
    x *= M1
    x ^= x >> 15
    x *= M2
    return x ^ (x >> 15)


@triton.jit
def word(a, b, c):
    """Make words from a parameter's a and b and an index's c, uint32, shapes broadcast."""
    x = a + c
    x ^= x >> 16
    x = x * M1 + b
    x ^= x >> 15
    x *= M2
    return x ^ (x >> 15)


@triton.jit
def magnitude(x):
    """Return the bits of |x| for float32 x, as int32: in the order of the sizes, NaN the largest.

    The largest of such numbers doesn't depend on the order in which they are compared.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
