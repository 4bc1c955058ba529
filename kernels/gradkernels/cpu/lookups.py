"""Sums of table entries that packed rows pick, half a byte at a time, compiled by numba.

A row of w bytes is 2 w halves, each with a table of 16 numbers below 2^21. Totals are integers: the
same in any order, by either loop, on any machine. `gather_loop` is for every machine. For those
with AVX2 `shuffle_loop` turns 32 rows at a time, so that a column of bytes is one register, whose
halves are the indices of one lookup for all the rows (Andre, Kermarrec and Le Scouarnec 2015,
PVLDB 9(4)). Tables are three planes of seven bits there: two numbers of one still fit a byte.

Letters: m rows, w bytes, q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gradkernels.cpu.vectors import address, shuffled
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

#: Columns that are turned at a time.
WIDTH = 16
#: Planes of a table, and bits of each.
PLANES, PLANE = 3, 7
ROWS = 32  # bytes of an AVX2 register
#: Columns whose sums of two entries of a plane fit 16 bits: 256 (2^7 - 1) 2 < 2^16.
SEGMENT = 256
#: Bytes of a column's tables.
_COLUMN = 2 * PLANES * 16
#: Numbers that `sum_columns` stores.
SUMS = PLANES * ROWS

_I8, _I16, _I64 = (ir.IntType(bits) for bits in (8, 16, 64))
_HALF = ir.VectorType(_I8, WIDTH)
_BYTES = ir.VectorType(_I8, ROWS)
_WORDS = ir.VectorType(_I16, ROWS // 2)

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]


def gather_loop(bits: U8, entries: U32, out: I64) -> None:
    """Add up what each row picks, byte by byte.

    Args:
        bits: (m, w) packed rows.
        entries: (q, w, 2, 16): of each byte the low half's table, then the high one's.
        out: (m, q) totals.
    """
    m, width = bits.shape
    flat = entries.reshape(-1)
    four, low = np.uint8(4), np.uint8(15)
    both, one = np.uint64(32), np.uint64(16)
    for c in range(out.shape[1]):
        for r in range(m):
            total = np.uint64(0)
            table = np.uint64(c * width) * both
            for j in range(width):
                octet = bits[r, j]
                total += np.uint64(flat[table + np.uint64(octet & low)])
                total += np.uint64(flat[table + one + np.uint64(octet >> four)])
                table += both
            out[r, c] = np.int64(total)


def shuffle_loop(bits: U8, tables: U8, out: I64) -> None:
    """Do what `gather_loop` does, 32 rows at a time.

    Args:
        bits: (m, w) packed rows.
        tables: (q, columns, 2, PLANES, 16), columns a multiple of `WIDTH` from w on: as the
            entries, of each table the planes from the lowest on.
        out: (m, q) totals.
    """
    m, width = bits.shape
    columns = tables.shape[1]
    flat = tables.reshape(-1)
    turned = np.empty(SEGMENT * ROWS, np.uint8)
    sums = np.empty(SUMS, np.uint16)
    padded = np.zeros((ROWS, columns), np.uint8)
    out[:] = 0
    for start in range(0, columns, SEGMENT):  # its tables stay in the first cache
        count = min(SEGMENT, columns - start)
        for first in range(0, m, ROWS):
            rows = min(ROWS, m - first)
            if rows == ROWS and width == columns:
                for j in range(0, count, WIDTH):
                    turn(bits, first * width + start + j, width, turned, j * ROWS)
            else:
                stop = min(width, start + count)
                for r in range(rows):
                    padded[r, start:stop] = bits[first + r, start:stop]
                for j in range(0, count, WIDTH):
                    turn(padded, start + j, columns, turned, j * ROWS)
            for c in range(out.shape[1]):
                sum_columns(turned, flat, (c * columns + start) * _COLUMN, count, sums)
                _add(sums, out, first, rows, c)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _add(sums: U16, out: I64, first: int, rows: int, c: int) -> None:
    """Add the sums of all planes, even rows' before odd rows', to those rows' totals."""
    for r in range(rows):
        place = (r & 1) * (ROWS // 2) + (r >> 1)
        for plane in range(PLANES):
            out[first + r, c] += np.int64(sums[plane * ROWS + place]) << (plane * PLANE)


@intrinsic  # type: ignore[untyped-decorator]
def turn(
    typingctx: Any,  # noqa: ANN401
    bits: Any,  # noqa: ANN401
    offset: Any,  # noqa: ANN401
    stride: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
    out_offset: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Transpose 32 x 16 bytes: out[out_offset + 32 c + r] = bits.data[offset + r stride + c]."""
    signature = types.void(bits, types.int64, types.int64, out, types.int64)
    # Of two registers, the low or the high halves of each 16 bytes in turn.
    low, high = (
        [16 * lane + first + at // 2 + 32 * (at % 2) for lane in (0, 1) for at in range(16)]
        for first in (0, 8)
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        def row(number: int) -> Any:  # noqa: ANN401
            offset = builder.add(args[1], builder.mul(args[2], ir.Constant(_I64, number)))
            return _load(builder, address(context, builder, sig.args[0], args[0], offset), _HALF)

        both = list(range(ROWS))
        lanes = [shuffled(builder, (row(r), row(r + 16)), both) for r in range(16)]
        for _ in range(4):
            pairs = list(zip(lanes[:8], lanes[8:], strict=True))
            lanes = [shuffled(builder, pair, order) for pair in pairs for order in (low, high)]
        for c, value in enumerate(lanes):
            where = builder.add(args[4], ir.Constant(_I64, ROWS * c))
            place = address(context, builder, sig.args[3], args[3], where)
            _store(builder, value, place)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def sum_columns(
    typingctx: Any,  # noqa: ANN401
    turned: Any,  # noqa: ANN401
    tables: Any,  # noqa: ANN401
    tables_offset: Any,  # noqa: ANN401
    count: Any,  # noqa: ANN401
    sums: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Look up `count` <= SEGMENT columns of 32 bytes; store what each plane adds up to.

    sums gets 16 numbers of even rows and 16 of odd rows for each plane, from the lowest on.
    """
    signature = types.void(turned, tables, types.int64, types.int64, sums)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        shuffle = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_BYTES, [_BYTES, _BYTES]), "llvm.x86.avx2.pshuf.b"
        )
        columns = address(context, builder, sig.args[0], args[0], ir.Constant(_I64, 0))
        entries = address(context, builder, sig.args[1], args[1], args[2])
        zero = ir.Constant(_WORDS, [0] * (ROWS // 2))
        # Of each plane: bytes two by two, as words that overflow, and the upper ones alone.
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * PLANES)]
        with cgutils.for_range(builder, args[3]) as loop:
            at = builder.gep(columns, [builder.mul(loop.index, ir.Constant(_I64, ROWS))])
            octets = _load(builder, at, _BYTES)
            halves = (
                builder.and_(octets, ir.Constant(_BYTES, [15] * ROWS)),
                builder.lshr(octets, ir.Constant(_BYTES, [4] * ROWS)),
            )
            first = builder.mul(loop.index, ir.Constant(_I64, _COLUMN))
            for plane in range(PLANES):
                found = []
                for half, index in enumerate(halves):
                    offset = builder.add(first, ir.Constant(_I64, (PLANES * half + plane) * 16))
                    table = _load(builder, builder.gep(entries, [offset]), _HALF)
                    twice = shuffled(builder, (table, table), [*range(16), *range(16)])
                    found.append(builder.call(shuffle, [twice, index]))
                words = builder.bitcast(builder.add(*found), _WORDS)
                upper = builder.lshr(words, ir.Constant(_WORDS, [8] * (ROWS // 2)))
                for total, more in zip(totals[2 * plane :], (words, upper), strict=False):
                    builder.store(builder.add(builder.load(total), more), total)
        for plane in range(PLANES):
            words, upper = (builder.load(total) for total in totals[2 * plane : 2 * plane + 2])
            eight = ir.Constant(_WORDS, [8] * (ROWS // 2))
            lower = builder.sub(words, builder.shl(upper, eight))
            for number, value in enumerate((lower, upper)):
                where = ir.Constant(_I64, plane * ROWS + number * ROWS // 2)
                _store(builder, value, address(context, builder, sig.args[4], args[4], where))
        return context.get_dummy_value()

    return signature, codegen


def _load(builder: Any, place: Any, kind: Any) -> Any:  # noqa: ANN401
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, place: Any) -> None:  # noqa: ANN401
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=1)
