"""Kernels of the SJLT: y[i, n] += sum of sign(j, r) * g[n, j] over the (j, r) that fall on i.

Three passes over a block of parameters:

1. `measure`: gradients are read and become features, of which the largest and the squares are
   kept; `features.settle` adds them up. Exact sums want the largest before the first addition, and
   reading twice costs less than keeping the features: a small block lies in the cache by then.
2. `scatter`: a row's features, made again, become whole numbers of 64 bits, of one power of two to
   a row, and are added to the s outputs of their parameter by integer atomics. Such sums are exact,
   so their order, which a GPU does not keep, changes nothing.
3. `fold`: the whole numbers, times their power of two, onto float64 sums; they are zeros again.

No table of outputs lies in memory: a program makes the words of its parameters. Rows are innermost,
so that a warp adds to neighbouring numbers.

Arguments bear no annotations: Triton reads these as its own types.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gradkernels.gpu.bits import magnitude, mix, word
from gradkernels.gpu.features import exponents, feature, scales, squared

BLOCK = 32
CHAIN = 64


@triton.jit(do_not_specialize=["rows", "length", "stride", "chains_each"])
def measure(
    x, row_stride, column_stride, rows, length, squares, magnitudes, stride, chains_each,
    factors, a, base, still, pull, curve, outer,
    KIND: tl.constexpr, BN: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Measure a block's rows; one program takes chains_each chains of all rows.

    Args:
        x: (rows, length), float32, float16 or bfloat16.
        row_stride, column_stride: of x, in elements.
        rows, length: shape of x, rows at most BN.
        squares: (BN, stride) float64, out: of each program's parameters.
        magnitudes: (BN, stride) int32, out: `magnitude` of its largest number.
        stride: of the programs, in elements.
        chains_each: chains of a program.
        factors, a, base, still, pull, curve, outer, KIND: of `feature`, for the block.
        BN: rows measured.
        CHAIN: parameters of a chain.
    """
    n = tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float64)
    most = tl.zeros((BN,), tl.int32)
    for chain in range(tl.program_id(0) * chains_each, (tl.program_id(0) + 1) * chains_each):
        column = chain * CHAIN + tl.arange(0, CHAIN)
        at = n.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
        known = (column < length)[None, :]
        alive = (n < rows)[:, None]
        g = tl.load(x + at, mask=known & alive, other=0.0).to(tl.float32)
        f = feature(g, column[None, :], known, n[:, None], alive, factors, a, base, still, pull,
                    curve, outer, KIND)  # fmt: skip
        f = tl.where(known & alive, f, 0.0)
        most = tl.maximum(most, tl.max(magnitude(f), axis=1))
        exponent = exponents(f)
        total += squared(f * scales(exponent)[:, None], exponent)
    to = n.to(tl.int64) * stride + tl.program_id(0)
    tl.store(squares + to, total)
    tl.store(magnitudes + to, most)


@triton.jit(do_not_specialize=["rows", "length", "start", "bits", "key_a", "key_b", "repetitions"])
def scatter(
    x, row_stride, column_stride, rows, length, start, largest, bits,
    whole, offsets, bounds, repetitions, key_a, key_b,
    factors, a, base, still, pull, curve, outer,
    KIND: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a block to whole numbers; one program takes BLOCK parameters of all rows.

    Args:
        x: (rows, length), float32, float16 or bfloat16; parameters start, start + 1, ...
        row_stride, column_stride: of x, in elements.
        rows, length: shape of x, rows at most BN.
        start: global index of its first parameter.
        largest: (rows,) float32, of the row's features in magnitude.
        bits: of a whole number, below 63 - log2(length).
        whole: (d, BN) int64, added to.
        offsets: (s,) uint32: c of each repetition.
        bounds: (s + 1,) int32: repetition r owns the outputs bounds[r]:bounds[r + 1].
        repetitions: s.
        key_a, key_b: as int32.
        factors, a, base, still, pull, curve, outer, KIND: of `feature`, for the block.
        BN: rows of `whole`.
        BLOCK: parameters of a program.
    """
    n = tl.arange(0, BN)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = column.to(tl.int64)[:, None] * column_stride + n.to(tl.int64)[None, :] * row_stride
    inside = (column < length)[:, None] & (n < rows)[None, :]
    g = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    f = feature(g, column[:, None], (column < length)[:, None], n[None, :], (n < rows)[None, :],
                factors, a, base, still, pull, curve, outer, KIND)  # fmt: skip
    exponent = magnitude(tl.load(largest + n, mask=n < rows, other=0.0)) >> 23
    # The row's numbers are below 2**(exponent - 126): times this, below 2**bits.
    scale = ((1149 + bits - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    finite = inside & (exponent < 255)[None, :]
    number = tl.where(finite, f.to(tl.float64) * scale[None, :], 0.0).to(tl.int64)
    j = (start + column).to(tl.uint32)
    state_a = mix(j + key_a.to(tl.uint32))
    state_b = mix(j ^ key_b.to(tl.uint32))
    for r in range(repetitions):
        random = word(state_a, state_b, tl.load(offsets + r))
        low = tl.load(bounds + r)
        size = (tl.load(bounds + r + 1) - low).to(tl.uint32)
        output = low + tl.umulhi(random, size).to(tl.int32)
        signed = tl.where(((random & 1) == 1)[:, None], -number, number)
        to = tl.multiple_of(output.to(tl.int64)[:, None] * BN + n[None, :], (1, 1))
        tl.atomic_add(whole + to, signed, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "bits"])
def fold(whole, largest, bits, rows, sums, size, BN: tl.constexpr, BLOCK: tl.constexpr):
    """Add whole numbers (d, BN) to sums (size = d * BN,) float64, and set them to 0.

    A row that is not finite becomes NaN in all outputs. The other arguments are `scatter`'s.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = (i % BN).to(tl.int32)
    inside = i < size
    exponent = magnitude(tl.load(largest + n, mask=inside & (n < rows), other=0.0)) >> 23
    step = ((897 - bits + exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    step = tl.where(exponent < 255, step, float("nan"))
    number = tl.load(whole + i, mask=inside, other=0).to(tl.float64)
    before = tl.load(sums + i, mask=inside, other=0.0)
    tl.store(sums + i, before + number * step, mask=inside)
    tl.store(whole + i, tl.zeros((BLOCK,), tl.int64), mask=inside)
