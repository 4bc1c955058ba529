"""Vector operations that numba's own loops do not reach, as LLVM IR.

Numba's arrays may alias, so LLVM guards or gives up every loop that reads one array and writes
another. Inside our innermost loops (8 or 16 numbers) the guards cost more than the work. These
intrinsics say exactly what is loaded, added and stored. Offsets are in elements, not bytes, and are
not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

LANES = 16  # rows of a batch side by side: one AVX-512 register, two AVX2 ones
SJLT_LANES = 8
LOOKUPS = 16  # table rows summed for one output: 16 groups of 4 parameters
TABLE = 16 * LANES  # numbers in the table of one group: 16 sign patterns x LANES
PART_WORDS = 64  # words (of 32 outputs) in the index buffer of one thread
INDEX_BYTES = 32 * PART_WORDS  # one byte per output: the sign pattern of 8 parameters

_FLOAT = ir.FloatType()
_I8 = ir.IntType(8)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


def address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:  # noqa: ANN401
    """Return the address of element `offset` of an array's data."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [offset])


def _load(builder: Any, pointer: Any, lanes: int) -> Any:  # noqa: ANN401
    vector = ir.VectorType(_FLOAT, lanes)
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)


def _store(builder: Any, value: Any, pointer: Any) -> None:  # noqa: ANN401
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=4)


@intrinsic  # type: ignore[untyped-decorator]
def add_signed(
    typingctx: Any,  # noqa: ANN401
    acc: Any,  # noqa: ANN401
    acc_offset: Any,  # noqa: ANN401
    x: Any,  # noqa: ANN401
    place: Any,  # noqa: ANN401
    sign: Any,  # noqa: ANN401
    t: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Add x[8 t:+8] to acc[acc_offset + place[t]:+8], negated if sign[t] is 0x80000000 (else 0).

    Both are uint32 arrays: each is loaded as it is used, the place as a number, the sign at once
    into all lanes.
    """
    signature = types.void(acc, types.int64, x, place, sign, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        def at(k: int, offset: Any) -> Any:  # noqa: ANN401
            return address(context, builder, sig.args[k], args[k], offset)

        place = builder.zext(builder.load(at(3, args[5])), _I64)
        target = at(0, builder.add(args[1], place))
        value = _load(builder, at(2, builder.mul(args[5], ir.Constant(_I64, SJLT_LANES))),
                      SJLT_LANES)  # fmt: skip
        bits_type = ir.VectorType(_I32, SJLT_LANES)
        nothing = ir.Constant(bits_type, ir.Undefined)
        first = builder.insert_element(nothing, builder.load(at(4, args[5])), ir.Constant(_I32, 0))
        mask = shuffled(builder, (first, nothing), [0] * SJLT_LANES)
        flipped = builder.xor(builder.bitcast(value, bits_type), mask)
        value = builder.bitcast(flipped, value.type)
        _store(builder, builder.fadd(_load(builder, target, SJLT_LANES), value), target)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def move_wide(
    typingctx: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
    out_offset: Any,  # noqa: ANN401
    acc: Any,  # noqa: ANN401
    acc_offset: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Add float32 acc[acc_offset:+8] to float64 out[out_offset:+8], and set it to 0."""
    signature = types.void(out, types.int64, acc, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        source = address(context, builder, sig.args[2], args[2], args[3])
        value = _load(builder, source, SJLT_LANES)
        wide = builder.fpext(value, ir.VectorType(ir.DoubleType(), SJLT_LANES))
        target = address(context, builder, sig.args[0], args[0], args[1])
        before = builder.load(builder.bitcast(target, wide.type.as_pointer()), align=8)
        builder.store(builder.fadd(before, wide),
                      builder.bitcast(target, wide.type.as_pointer()), align=8)  # fmt: skip
        _store(builder, ir.Constant(value.type, [0.0] * SJLT_LANES), source)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def add_lookups(
    typingctx: Any,  # noqa: ANN401
    acc: Any,  # noqa: ANN401
    acc_offset: Any,  # noqa: ANN401
    table: Any,  # noqa: ANN401
    index: Any,  # noqa: ANN401
    index_offset: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Add one table row per group of 4 parameters to acc[acc_offset:+16].

    Byte index[index_offset + g * INDEX_BYTES], g < 8, holds the sign patterns of groups 2g (low 4
    bits) and 2g + 1 (high 4 bits); group h's table starts at h * TABLE.
    """
    signature = types.void(acc, types.int64, table, index, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        terms = []
        for pair in range(LOOKUPS // 2):
            offset = builder.add(args[4], ir.Constant(_I64, pair * INDEX_BYTES))
            pattern = builder.load(address(context, builder, sig.args[3], args[3], offset))
            low = builder.and_(pattern, ir.Constant(_I8, 15))
            high = builder.lshr(pattern, ir.Constant(_I8, 4))
            for half, nibble in enumerate((low, high)):
                row = builder.mul(builder.zext(nibble, _I64), ir.Constant(_I64, LANES))
                where = builder.add(row, ir.Constant(_I64, (2 * pair + half) * TABLE))
                pointer = address(context, builder, sig.args[2], args[2], where)
                terms.append(_load(builder, pointer, LANES))
        while len(terms) > 1:  # a tree: short chains, small rounding error
            terms = [builder.fadd(a, b) for a, b in zip(terms[::2], terms[1::2], strict=True)]
        target = address(context, builder, sig.args[0], args[0], args[1])
        _store(builder, builder.fadd(_load(builder, target, LANES), terms[0]), target)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def fill_table(
    typingctx: Any,  # noqa: ANN401
    table: Any,  # noqa: ANN401
    table_offset: Any,  # noqa: ANN401
    x: Any,  # noqa: ANN401
    x_offset: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Write all 16 signed sums of 4 parameters, x[x_offset:+64], at table[table_offset:+256].

    Row `pattern` is the sum over q < 4 of x[q], negated where bit q of the pattern is set.
    """
    signature = types.void(table, types.int64, x, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        x0, x1, x2, x3 = (
            _load(
                builder,
                address(
                    context,
                    builder,
                    sig.args[2],
                    args[2],
                    builder.add(args[3], ir.Constant(_I64, q * LANES)),
                ),
                LANES,
            )
            for q in range(4)
        )
        plus, minus = builder.fadd(x0, x1), builder.fsub(x0, x1)
        low = [plus, builder.fneg(minus), minus, builder.fneg(plus)]
        plus, minus = builder.fadd(x2, x3), builder.fsub(x2, x3)
        high = [plus, builder.fneg(minus), minus, builder.fneg(plus)]
        for pattern in range(16):
            where = builder.add(args[1], ir.Constant(_I64, pattern * LANES))
            total = builder.fadd(low[pattern % 4], high[pattern // 4])
            _store(builder, total, address(context, builder, sig.args[0], args[0], where))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def transpose8(
    typingctx: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
    out_offset: Any,  # noqa: ANN401
    x: Any,  # noqa: ANN401
    offsets: Any,  # noqa: ANN401
    column: Any,  # noqa: ANN401
    out_stride: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Transpose 8 x 8 numbers in registers.

    out[out_offset + c * out_stride + r] = x.data[offsets[r] + column + c] for r, c < 8, offsets
    an int64 array.
    """
    signature = types.void(out, types.int64, x, offsets, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        rows = []
        for r in range(8):
            where = address(context, builder, sig.args[3], args[3], ir.Constant(_I64, r))
            offset = builder.add(builder.load(where), args[4])
            rows.append(_load(builder, address(context, builder, sig.args[2], args[2], offset), 8))
        # Three rounds exchange the off-diagonal halves of 2x2, then 4x4, then 8x8 blocks.
        for distance in (1, 2, 4):
            keep_low = [c if not c & distance else 8 + c - distance for c in range(8)]
            keep_high = [c + distance if not c & distance else 8 + c for c in range(8)]
            for r in range(8):
                if not r & distance:
                    pair = rows[r], rows[r + distance]
                    rows[r] = shuffled(builder, pair, keep_low)
                    rows[r + distance] = shuffled(builder, pair, keep_high)
        offset = args[1]
        for r in range(8):
            _store(builder, rows[r], address(context, builder, sig.args[0], args[0], offset))
            offset = builder.add(offset, args[5])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def butterfly(
    typingctx: Any,  # noqa: ANN401
    x: Any,  # noqa: ANN401
    offset: Any,  # noqa: ANN401
    half: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Replace a = x[offset:+16] and b, `half` numbers further, by a + b and a - b."""
    signature = types.void(x, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        first = address(context, builder, sig.args[0], args[0], args[1])
        second = builder.gep(first, [args[2]])
        a, b = _load(builder, first, LANES), _load(builder, second, LANES)
        _store(builder, builder.fadd(a, b), first)
        _store(builder, builder.fsub(a, b), second)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def two_butterflies(
    typingctx: Any,  # noqa: ANN401
    x: Any,  # noqa: ANN401
    offset: Any,  # noqa: ANN401
    half: Any,  # noqa: ANN401
) -> tuple[Any, Callable[..., Any]]:
    """Do the butterflies at distance `half`, then those at twice that, of four times 16 numbers."""
    signature = types.void(x, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        place = address(context, builder, sig.args[0], args[0], args[1])
        places = [place]
        for _ in range(3):
            place = builder.gep(place, [args[2]])
            places.append(place)
        a, b, c, d = (_load(builder, each, LANES) for each in places)
        a, b = builder.fadd(a, b), builder.fsub(a, b)
        c, d = builder.fadd(c, d), builder.fsub(c, d)
        found = (builder.fadd(a, c), builder.fadd(b, d), builder.fsub(a, c), builder.fsub(b, d))
        for value, each in zip(found, places, strict=True):
            _store(builder, value, each)
        return context.get_dummy_value()

    return signature, codegen


def shuffled(builder: Any, pair: tuple[Any, Any], order: list[int]) -> Any:  # noqa: ANN401
    """Pick the elements `order` of two vectors, those of the second numbered after the first's."""
    return builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, len(order)), order))
