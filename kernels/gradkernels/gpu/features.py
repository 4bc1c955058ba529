"""Features inside a kernel, and squared norms: `gradkernels.features` as numbers are read.

A row's squares are added exactly, so that neither a kernel's layout nor the number of rows beside
it changes them: numbers are scaled by a power of two to below 2**15, and their squares, in whole
numbers of 2**-26, fit 64 bits by the CHAIN. Chains are added in float64, in one order.

Arguments bear no annotations: Triton reads these as its own types.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gradkernels.gpu.bits import magnitude

KINDS = {None: 0, "sign": 1, "adam": 2, "adam_marginal": 3}
_SIGN = tl.constexpr(KINDS["sign"])
_ADAM = tl.constexpr(KINDS["adam"])
_MARGINAL = tl.constexpr(KINDS["adam_marginal"])


@triton.jit
def feature(
    g, at, known, n, alive, factors, a, base, still, pull, curve, outer, KIND: tl.constexpr
):
    """Return features of gradients g, float32; roots and quotients are rounded as IEEE 754 has it.

    Args:
        g: (rows, parameters) or (parameters, rows).
        at, known: index of each parameter in the vectors, and whether there is one; broadcast to g.
        n, alive: of each row, alike.
        factors: (rows,) float32 that gradients are multiplied by first, or None.
        a, base, still, pull: (parameters,) float32; None where KIND has no use for it.
        curve, outer: numbers.
        KIND: of `KINDS`.
    """
    if factors is not None:
        g *= tl.load(factors + n, mask=alive, other=0.0)
    if KIND == _SIGN:
        # g - g is 0, or NaN where g is not finite.
        return tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)) + (g - g)
    if KIND == _ADAM:
        root = tl.sqrt_rn(tl.load(base + at, mask=known, other=1.0) + curve * (g * g))
        return tl.div_rn(tl.load(a + at, mask=known, other=0.0) + g, root + outer)
    if KIND == _MARGINAL:
        root = tl.sqrt_rn(tl.load(base + at, mask=known, other=1.0) + curve * (g * g))
        both = root + tl.load(still + at, mask=known, other=1.0)
        pulled = both - tl.load(pull + at, mask=known, other=0.0) * g
        return g * tl.div_rn(pulled, (root + outer) * both)
    return g


@triton.jit
def exponents(f):
    """Return exponents (rows,) int32 of the largest magnitudes of f (rows, CHAIN), 15 to 255.

    So f * 2**(141 - exponent) lies below 2**15; that factor would not be a float32 below 15.
    """
    return tl.maximum(tl.max(magnitude(f), axis=1) >> 23, 15)


@triton.jit
def scales(exponent):
    """Return the factors 2**(141 - exponent) float32."""
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def steps_of(exponent):
    """Return what a scaled 1 stands for, 2**(exponent - 141) float32."""
    return ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def squared(scaled, exponent):
    """Return sums of squares (rows,) float64 of scaled numbers (rows, CHAIN); NaN if not finite."""
    finite = exponent < 255
    number = tl.where(finite[:, None], scaled * scaled * 67108864.0, 0.0).to(tl.int64)
    total = tl.sum(number, axis=1).to(tl.float64) * 1.4901161193847656e-08
    step = steps_of(exponent).to(tl.float64)
    return tl.where(finite, total * step * step, float("nan"))


@triton.jit(do_not_specialize=["stride", "count"])
def settle(squares, magnitudes, stride, count, sums, largest, BLOCK: tl.constexpr):
    """Add up the parts of a row's squares; one program takes one row, of whatever batch.

    Args:
        squares: (rows, stride) float64.
        magnitudes: (rows, stride) int32, `magnitude` of the largest number; or None.
        stride: of the parts, in elements.
        count: parts.
        sums: (rows,) float64, added to.
        largest: (rows,) float32, out: the largest of the magnitudes; or None.
        BLOCK: parts read at once.
    """
    n = tl.program_id(0)
    row = n.to(tl.int64) * stride
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    most = tl.zeros((BLOCK,), tl.int32)
    for low in range(0, count, BLOCK):
        inside = low + i < count
        total += tl.load(squares + row + low + i, mask=inside, other=0.0)
        if magnitudes is not None:
            most = tl.maximum(most, tl.load(magnitudes + row + low + i, mask=inside, other=0))
    tl.store(sums + n, tl.load(sums + n) + tl.sum(total, axis=0))
    if magnitudes is not None:
        tl.store(largest + n, tl.max(most, axis=0).to(tl.float32, bitcast=True))
