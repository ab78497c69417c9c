"""AMX instructions for `products`: rounding to bfloat16, and a product on tiles. Addresses are int64."""

# ruff: noqa: ARG001 (an intrinsic's parameters are only types; its code gets them as `args`)

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.intrinsics import I64, pointer
from offload.kernels.tiles import load_tile, store_tile, tile_instruction

STEP = 32
"""Sizes are multiples of this: two tiles of rows or columns, and one of depth."""

LANES = 16


def _rounded(builder: Any, address: Any) -> Any:
    """16 floats from memory as <16 x i32>, the upper halves of which are bfloat16."""
    integers = ir.VectorType(ir.IntType(32), LANES)
    bits = builder.load(pointer(builder, address, integers), align=4)
    return builder.add(bits, ir.Constant(integers, [0x8000] * LANES))


@intrinsic
def round_row(_context: Any, source: Any, count: Any, target: Any) -> Any:
    """`count` floats as bfloat16."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        source, count, target = args
        halves = ir.VectorType(ir.IntType(16), LANES)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES)) as (i, _):
            bits = _rounded(builder, builder.add(source, builder.mul(i, I64(4))))
            upper = builder.lshr(bits, ir.Constant(bits.type, [16] * LANES))
            at = pointer(builder, builder.add(target, builder.mul(i, I64(2))), halves)
            builder.store(builder.trunc(upper, halves), at, align=2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def round_pair(_context: Any, even: Any, odd: Any, count: Any, target: Any) -> Any:
    """Two rows of `count` floats as pairs of bfloat16, the first row's in the lower halves."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        even, odd, count, target = args
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES)) as (i, _):
            offset = builder.mul(i, I64(4))
            low, high = (_rounded(builder, builder.add(row, offset)) for row in (even, odd))
            low = builder.lshr(low, ir.Constant(low.type, [16] * LANES))
            high = builder.and_(high, ir.Constant(high.type, [0xFFFF0000] * LANES))
            at = pointer(builder, builder.add(target, offset), low.type)
            builder.store(builder.or_(low, high), at, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def tile_product(
    _context: Any,
    m: Any,
    n: Any,
    k: Any,
    a: Any,
    a_row: Any,
    b: Any,
    b_row: Any,
    c: Any,
    c_row: Any,
    add: Any,
) -> Any:
    """c [m,n] = (or +=) a @ b, from addresses and bytes from row to row: four tiles of c at a time."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        m, n, k, a, a_row, b, b_row, c, c_row, add = args
        sums, left, right = ((0, 1), (2, 3)), (4, 5), (6, 7)

        def down(address: Any, row: Any, rows: Any) -> Any:
            return builder.add(address, builder.mul(row, rows))

        with (
            cgutils.for_range_slice(builder, I64(0), n, I64(STEP)) as (j, _),
            cgutils.for_range_slice(builder, I64(0), m, I64(STEP)) as (i, _),
        ):
            corner = builder.add(down(c, c_row, i), builder.mul(j, I64(4)))
            places = [
                [builder.add(down(corner, c_row, I64(16 * r)), I64(64 * s)) for s in (0, 1)] for r in (0, 1)
            ]
            with builder.if_else(add) as (adding, setting):
                with adding:
                    for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        load_tile(builder, sums[r][s], places[r][s], c_row)
                with setting:
                    for register in (0, 1, 2, 3):
                        tile_instruction(builder, "tilezero", register)
            with cgutils.for_range_slice(builder, I64(0), k, I64(STEP)) as (depth, _):
                a_at = builder.add(down(a, a_row, i), builder.mul(depth, I64(2)))
                b_at = builder.add(down(b, b_row, builder.sdiv(depth, I64(2))), builder.mul(j, I64(4)))
                for r in (0, 1):
                    load_tile(builder, left[r], down(a_at, a_row, I64(16 * r)), a_row)
                    load_tile(builder, right[r], builder.add(b_at, I64(64 * r)), b_row)
                for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    tile_instruction(builder, "tdpbf16ps", sums[r][s], left[r], right[s])
            for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
                store_tile(builder, sums[r][s], places[r][s], c_row)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, types.boolean), generate
