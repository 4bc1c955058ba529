"""Kernels of the dense Rademacher projection: y[i, n] += sum over j of sign(i, j) * g[n, j].

Three passes over a staging area of parameters, cut into chains of CHAIN:

1. `pack`: the gradient is read, and becomes a feature. A chain of a row is scaled by a power of two
   to below 2**15 and split into two float16 numbers, high + low: 22 bits. bfloat16 and float16 fit
   into the high one alone. The row's squares are added up on the way.
2. `multiply`: signs (BM, CHAIN), made in registers as float16 +-1, times parts (CHAIN, BN) on the
   tensor cores. A chain's sum starts at 0 and is then added to float32 registers, because tensor
   cores cut their sums off instead of rounding them: the error grows with the length of a chain.
   For the same reason the low parts come first, while the sum is small.
3. `gather`: the partial sums of the programs, in one order, onto float64 sums.

A tile of BM outputs holds BM // 32 words of 32 bits. Its row (h, w, l) of (2, BM // 32, 16) is bit
16 * h + l of word w: in the layout of a tensor core's left operand the rows of one thread differ in
h and in one bit of l, so that a thread makes a word once and takes several signs from it.

Everything that the signs are made of is loaded, none of it computed in `multiply`: Triton then
makes them in the operand's own layout. Were j or the shifts computed there, they would be made in
another layout and carried through shared memory, in pieces of two bytes.

Arguments bear no annotations: Triton reads these as its own types.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gradkernels.gpu.bits import mix, word
from gradkernels.gpu.features import exponents, feature, scales, squared, steps_of

CHAIN = 64
BITS = 32


@triton.jit(do_not_specialize=["rows", "length", "start", "first", "stride", "key_a", "key_b"])
def pack(
    x, row_stride, column_stride, rows, length, start, first,
    high, low, steps, state_a, state_b, squares, stride, key_a, key_b,
    factors, a, base, still, pull, curve, outer,
    KIND: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Stage a piece of a block; one program takes one chain of all rows.

    Args:
        x: (rows, length), float32, float16 or bfloat16; parameters start, start + 1, ...
        row_stride, column_stride: of x, in elements.
        rows, length: shape of x, rows at most BN.
        start: global index of its first parameter.
        first: chain that its first parameter goes to.
        high: (chains, BN, CHAIN) float16, out; zeros where x ends.
        low: the same, out; only written with PARTS == 2.
        steps: (chains, BN) float32, out: what a part's 1 stands for.
        state_a, state_b: (chains, CHAIN) uint32, out: a and b of each parameter.
        squares: (BN, stride) float64, out: of each chain.
        stride: of the chains, in elements.
        key_a, key_b: as int32.
        factors, a, base, still, pull, curve, outer, KIND: of `feature`, for the piece.
        PARTS: 1 or 2; features of Adam need 2.
        BN: rows of the staging area.
        CHAIN: parameters of a chain.
    """
    k = tl.arange(0, CHAIN)
    n = tl.arange(0, BN)
    column = tl.program_id(0) * CHAIN + k
    chain = (first + tl.program_id(0)).to(tl.int64)
    at = n.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    inside = (n < rows)[:, None] & (column < length)[None, :]
    g = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    known = (column < length)[None, :]
    alive = (n < rows)[:, None]
    f = feature(g, column[None, :], known, n[:, None], alive, factors, a, base, still, pull, curve,
                outer, KIND)  # fmt: skip
    f = tl.where(inside, f, 0.0)
    exponent = exponents(f)
    tl.store(steps + chain * BN + n, steps_of(exponent))
    scaled = f * scales(exponent)[:, None]
    tl.store(squares + n.to(tl.int64) * stride + chain, squared(scaled, exponent))
    upper = scaled.to(tl.float16)
    to = (chain * BN + n[:, None]) * CHAIN + k[None, :]
    tl.store(high + to, upper)
    if PARTS == 2:
        rest = scaled - upper.to(tl.float32)
        # The rest of an inf is NaN, which would hide the inf's sign from the sums.
        tl.store(low + to, tl.where(rest == rest, rest, 0.0).to(tl.float16))
    j = (start + column).to(tl.uint32)
    tl.store(state_a + chain * CHAIN + k, mix(j + key_a.to(tl.uint32)))
    tl.store(state_b + chain * CHAIN + k, mix(j ^ key_b.to(tl.uint32)))


@triton.jit(do_not_specialize=["chains", "chains_each"])
def multiply(
    high,
    low,
    steps,
    state_a,
    state_b,
    offsets,
    places,
    partial,
    chains,
    chains_each,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Multiply signs and parts; program (tile, split) takes BM outputs and a range of chains.

    Args:
        high: (chains, BN, CHAIN) float16.
        low: the same; only read with PARTS == 2.
        steps: (chains, BN) float32.
        state_a, state_b: (chains, CHAIN) uint32.
        offsets: (tiles * BM // 32,) uint32: c of each word.
        places: (32,) uint32: 2**(31 - bit), which moves a bit to the sign's place.
        partial: (splits, tiles, BM, BN) float32, out.
        chains: chains staged.
        chains_each: chains of a split.
        PARTS: 1 or 2.
        BM: outputs of a tile.
        BN: rows.
        CHAIN: parameters of a chain.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tl.arange(0, BN)
    k = tl.arange(0, CHAIN)
    c = tl.load(offsets + tile * (BM // 32) + tl.arange(0, BM // 32))[None, :, None, None]
    place = tl.reshape(tl.load(places + tl.arange(0, 32)), (2, 1, 16, 1))
    total = tl.zeros((BM, BN), tl.float32)
    for chain in range(split * chains_each, min((split + 1) * chains_each, chains)):
        a = tl.load(state_a + chain * CHAIN + k)[None, None, None, :]
        b = tl.load(state_b + chain * CHAIN + k)[None, None, None, :]
        # (2, BM // 32, 16, CHAIN): a bit in the sign's place, and 1.0 below it.
        sign = ((word(a, b, c) * place) & 0x80000000) | 0x3C000000
        half = (sign >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        signs = tl.reshape(half, (BM, CHAIN))
        at = (chain * BN + n[None, :]) * CHAIN + k[:, None]
        product = tl.zeros((BM, BN), tl.float32)
        if PARTS == 2:
            product = tl.dot(signs, tl.load(low + at), product)
        product = tl.dot(signs, tl.load(high + at), product)
        total += product * tl.load(steps + chain * BN + n)[None, :]
    r = tl.arange(0, BM)[:, None]
    here = (split * tl.num_programs(0) + tile).to(tl.int64) * (BM * BN)
    tl.store(partial + here + r * BN + n[None, :], total)


@triton.jit(do_not_specialize=["splits"])
def gather(partial, sums, splits, size, BLOCK: tl.constexpr):
    """Add partial sums (splits, size) float32 to sums (size,) float64, split after split."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.load(sums + i, mask=inside, other=0.0)
    at = partial + i
    for _ in range(splits):
        total += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        at += size
    tl.store(sums + i, total, mask=inside)
