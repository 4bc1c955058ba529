"""The loops of the CPU path, compiled by numba. Plain functions here; `compiled` wraps them.

numba computes integers in 64 bits, hence the many `np.uint32(...)`: they cut back to 32.

Every number of the result is the same sequence of float32 additions whatever the number of threads
(each thread owns outputs, not parameters) and whatever the other rows of the batch (rows never
meet). Sums of at most CHUNK parameters are float32; their totals are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gradkernels.cpu.vectors import (
    LANES,
    LOOKUPS,
    PART_WORDS,
    SJLT_LANES,
    TABLE,
    add_lookups,
    add_signed,
    butterfly,
    fill_table,
    move_wide,
    transpose8,
    two_butterflies,
)
from gradkernels.randomness import M1, M2
from numba import njit
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

_M1 = np.uint32(M1)
_M2 = np.uint32(M2)
_U15 = np.uint32(15)
_U16 = np.uint32(16)
_U31 = np.uint32(31)

#: Parameters. A repetition's outputs come from the second cache once for each tile: a short one
#: touches each line about once, a long one pushes them out of the first cache as it is read, but
#: in order, so that its numbers come ahead of their use.
SJLT_TILE = 2048
SJLT_CHUNK = 2**14
DENSE_TILE = 4 * LOOKUPS  # 64 parameters: their 16 tables fill 16 KiB
DENSE_CHUNK = 128 * DENSE_TILE
_S1, _S2, _S4 = np.uint32(1), np.uint32(2), np.uint32(4)
_EVEN1, _EVEN2, _EVEN4 = np.uint32(0x55555555), np.uint32(0x33333333), np.uint32(0x0F0F0F0F)


@njit(inline="always")  # type: ignore[untyped-decorator]
def mix(x: Any) -> Any:  # noqa: ANN401
    """Mix a 32-bit integer, as `randomness.mix`."""
    x = np.uint32(x ^ (x >> _U16))
    x = np.uint32(x * _M1)
    x = np.uint32(x ^ (x >> _U15))
    x = np.uint32(x * _M2)
    return np.uint32(x ^ (x >> _U15))


@njit(inline="always")  # type: ignore[untyped-decorator]
def word(a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401
    """Return the word of a parameter's a and b and of an index's c, as `randomness.words`."""
    x = np.uint32(a + c)
    x = np.uint32(x ^ (x >> _U16))
    x = np.uint32(x * _M1 + b)
    x = np.uint32(x ^ (x >> _U15))
    x = np.uint32(x * _M2)
    return np.uint32(x ^ (x >> _U15))


@njit(inline="always")  # type: ignore[untyped-decorator]
def _load_tile(tile: F32, lanes: int, x: F32, offsets: I64, column: int, n: int) -> None:
    """Load tile[c * lanes + r] = x[offsets[r] + column + c] for c < n, r < lanes."""
    whole = n // 8 * 8
    for half in range(lanes // 8):
        rows = offsets[8 * half : 8 * half + 8]
        for c in range(0, whole, 8):
            transpose8(tile, c * lanes + 8 * half, x, rows, column + c, lanes)
    for c in range(whole, n):
        for r in range(lanes):
            tile[c * lanes + r] = x[offsets[r] + column + c]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _sjlt_codes(
    place: U32, sign: U32, a: U32, b: U32, c: np.uint32, base: np.uint32, size: np.uint32
) -> None:
    """Write where parameter t of a repetition goes, in lanes from its sums' first, and its sign."""
    for t in range(a.shape[0]):
        h = word(a[t], b[t], c)
        output = np.uint32((np.uint64(h) * np.uint64(size)) >> np.uint64(32))
        place[t] = np.uint32(np.uint32(output + base) * np.uint32(SJLT_LANES))
        sign[t] = np.uint32(h << _U31)


def sjlt_loop(
    x: F32, start: int, key_a: np.uint32, key_b: np.uint32, c: U32, bounds: I64, out: F64
) -> None:
    """Add a block's unscaled SJLT to the outputs of some repetitions.

    Args:
        x: (b, m) block of parameters [start, start + m).
        start: global index of the block's first parameter.
        key_a: first key.
        key_b: second key.
        c: (k,) `mix(r * GOLDEN + key_c)` for k consecutive repetitions r.
        bounds: (k + 1,) outputs of each of them.
        out: (slices, d, 8): row k of the batch is lane k % 8 of slice k // 8; lanes beyond b
            receive copies of the last row, to be ignored.
    """
    b, m = x.shape
    slices, d = out.shape[0], out.shape[1]
    reps = c.shape[0]
    first = bounds[0]
    width = bounds[reps] - first
    flat = x.reshape(-1)
    flat_out = out.reshape(-1)
    rows = np.empty(SJLT_LANES, np.int64)
    a = np.empty(SJLT_TILE, np.uint32)
    bb = np.empty(SJLT_TILE, np.uint32)
    place = np.empty((reps, SJLT_TILE), np.uint32)
    sign = np.empty((reps, SJLT_TILE), np.uint32)
    tile = np.empty(SJLT_TILE * SJLT_LANES, np.float32)
    acc = np.zeros(slices * width * SJLT_LANES, np.float32)
    for t0 in range(0, m, SJLT_TILE):
        n = min(SJLT_TILE, m - t0)
        for t in range(n):
            j = np.uint32(start + t0 + t)
            a[t] = mix(np.uint32(j + key_a))
            bb[t] = mix(np.uint32(j ^ key_b))
        for r in range(reps):
            base, size = np.uint32(bounds[r] - first), np.uint32(bounds[r + 1] - bounds[r])
            _sjlt_codes(place[r], sign[r], a[:n], bb[:n], c[r], base, size)
        for k in range(slices):
            for lane in range(SJLT_LANES):
                rows[lane] = min(k * SJLT_LANES + lane, b - 1) * m
            _load_tile(tile, SJLT_LANES, flat, rows, t0, n)
            for r in range(reps):
                for t in range(n):
                    add_signed(acc, k * width * SJLT_LANES, tile, place[r], sign[r], t)
        if (t0 + SJLT_TILE) % SJLT_CHUNK == 0 or t0 + SJLT_TILE >= m:
            for k in range(slices):
                for o in range(width):
                    to, where = (k * d + first + o) * SJLT_LANES, (k * width + o) * SJLT_LANES
                    move_wide(flat_out, to, acc, where)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _pattern_words(index: U32, group: int, a: U32, b: U32, c: U32) -> None:
    """Turn the words of 8 parameters into one byte of 8 signs per output.

    The 8 words of a column are 4 squares of 8 x 8 bits, transposed in three rounds of exchanges:
    byte q of index[(group * 8 + k) * PART_WORDS + w] holds the signs at output 32 w + 8 q + k.
    """
    a0, a1, a2, a3, a4, a5, a6, a7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    b0, b1, b2, b3, b4, b5, b6, b7 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]
    base = group * 8 * PART_WORDS
    for w in range(c.shape[0]):
        cw = c[w]
        x0, x1 = _exchange(word(a0, b0, cw), word(a1, b1, cw), _S1, _EVEN1)
        x2, x3 = _exchange(word(a2, b2, cw), word(a3, b3, cw), _S1, _EVEN1)
        x4, x5 = _exchange(word(a4, b4, cw), word(a5, b5, cw), _S1, _EVEN1)
        x6, x7 = _exchange(word(a6, b6, cw), word(a7, b7, cw), _S1, _EVEN1)
        y0, y2 = _exchange(x0, x2, _S2, _EVEN2)
        y1, y3 = _exchange(x1, x3, _S2, _EVEN2)
        y4, y6 = _exchange(x4, x6, _S2, _EVEN2)
        y5, y7 = _exchange(x5, x7, _S2, _EVEN2)
        z0, z4 = _exchange(y0, y4, _S4, _EVEN4)
        z1, z5 = _exchange(y1, y5, _S4, _EVEN4)
        z2, z6 = _exchange(y2, y6, _S4, _EVEN4)
        z3, z7 = _exchange(y3, y7, _S4, _EVEN4)
        index[base + w] = z0
        index[base + PART_WORDS + w] = z1
        index[base + 2 * PART_WORDS + w] = z2
        index[base + 3 * PART_WORDS + w] = z3
        index[base + 4 * PART_WORDS + w] = z4
        index[base + 5 * PART_WORDS + w] = z5
        index[base + 6 * PART_WORDS + w] = z6
        index[base + 7 * PART_WORDS + w] = z7


@njit(inline="always")  # type: ignore[untyped-decorator]
def _exchange(low: Any, high: Any, shift: Any, even: Any) -> Any:  # noqa: ANN401
    """Swap the bits of `low` at odd places (of size shift) with those of `high` at even ones."""
    swap = np.uint32(((low >> shift) ^ high) & even)
    return np.uint32(low ^ (swap << shift)), np.uint32(high ^ swap)


def rademacher_loop(
    x: F32, start: int, key_a: np.uint32, key_b: np.uint32, c: U32, first_word: int, out: F64
) -> None:
    """Add a block's unscaled Rademacher projection to the outputs of some words.

    For 4 parameters at a time all 16 signed sums are tabled; an output then costs one lookup and
    one addition per 4 parameters, for 16 rows of the batch at once (the "method of four Russians").

    Args:
        x: (b, m) block of parameters [start, start + m).
        start: global index of the block's first parameter.
        key_a: first key.
        key_b: second key.
        c: (k,) `mix(w * GOLDEN + key_c)` for words first_word <= w < first_word + k,
            k <= PART_WORDS.
        first_word: the first word.
        out: (slices, words, 32, 16): row k of the batch is lane k % 16 of slice k // 16; lanes
            beyond b receive copies of the last row, to be ignored.
    """
    b, m = x.shape
    slices = out.shape[0]
    width = c.shape[0] * 4  # outputs of one k of _pattern_words
    flat = x.reshape(-1)
    rows = np.empty(LANES, np.int64)
    a = np.empty(8, np.uint32)
    bb = np.empty(8, np.uint32)
    index = np.empty(DENSE_TILE * PART_WORDS, np.uint32)
    patterns = index.view(np.uint8)
    tile = np.zeros(DENSE_TILE * LANES, np.float32)
    table = np.empty(LOOKUPS * TABLE, np.float32)
    acc = np.zeros(slices * 8 * width * LANES, np.float32)
    for t0 in range(0, m, DENSE_TILE):
        n = min(DENSE_TILE, m - t0)
        for group in range(DENSE_TILE // 8):
            for q in range(8):
                j = np.uint32(start + t0 + 8 * group + q)
                a[q] = mix(np.uint32(j + key_a))
                bb[q] = mix(np.uint32(j ^ key_b))
            _pattern_words(index, group, a, bb, c)
        tile[n * LANES :] = np.float32(0)
        for k in range(slices):
            for lane in range(LANES):
                rows[lane] = min(k * LANES + lane, b - 1) * m
            _load_tile(tile, LANES, flat, rows, t0, n)
            for group in range(LOOKUPS):
                fill_table(table, group * TABLE, tile, group * 4 * LANES)
            for octet in range(8):
                base = (k * 8 + octet) * width
                for o in range(width):
                    add_lookups(
                        acc, (base + o) * LANES, table, patterns, octet * 4 * PART_WORDS + o
                    )
        if (t0 + DENSE_TILE) % DENSE_CHUNK == 0 or t0 + DENSE_TILE >= m:
            for k in range(slices):
                for octet in range(8):
                    for o in range(width):
                        for lane in range(LANES):
                            where = ((k * 8 + octet) * width + o) * LANES + lane
                            out[k, first_word + o // 4, 8 * (o % 4) + octet, lane] += acc[where]
                            acc[where] = np.float32(0)


def signs_loop(
    start: int, key_a: np.uint32, key_b: np.uint32, c: U32, octets: U64, out: U64
) -> None:
    """Write the signs of consecutive parameters as bytes, eight outputs at a time.

    Args:
        start: global index of the first parameter.
        key_a: first key.
        key_b: second key.
        c: (k,) `mix(w * GOLDEN + key_c)` of k consecutive words w.
        octets: (256,) for each byte of a word, its eight signs as int8, lowest bit first.
        out: (m, 4 k): the 32 k outputs of each parameter, in order.
    """
    held = np.empty(c.shape[0], np.uint32)
    patterns = held.view(np.uint8)
    for t in range(out.shape[0]):
        j = np.uint32(start + t)
        a, b = mix(np.uint32(j + key_a)), mix(np.uint32(j ^ key_b))
        for w in range(c.shape[0]):
            held[w] = word(a, b, c[w])
        for q in range(out.shape[1]):
            out[t, q] = octets[patterns[q]]


def hadamard_loop(x: F32) -> None:
    """Apply Sylvester's Hadamard matrix, not scaled, to the columns of x, in place.

    Every sum is of two float32, round after round, whatever the machine.

    Args:
        x: (m, 16), m a power of two.
    """
    size = x.shape[0]
    half = 1
    while 4 * half <= size:
        for block in range(0, size, 4 * half):
            for i in range(block, block + half):
                two_butterflies(x, i * LANES, half * LANES)
        half *= 4
    if 2 * half == size:
        for i in range(half):
            butterfly(x, i * LANES, half * LANES)
