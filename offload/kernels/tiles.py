"""Intel AMX: 64 weight rows x 16 tokens at a time, with float32 results, for prefill.

`tdpbf16ps` adds products of two bfloat16 tiles to a float32 tile. An e4m3 code is a bfloat16 exactly, and a
float32 activation is exactly the sum of three (its leading eight bits, the next eight, the rest), so three
products give float32's precision at a third of AMX's rate, still ten times that of AVX512. AMX takes subnormal
numbers for zero: rows whose largest magnitude is far from 1 are multiplied by a power of two first.

Layouts, all in steps of 64 columns. The weights of 64 rows ("A"): for each step its even, then its odd columns;
of those four tiles of 16 rows; a row is 32 bfloat16. 16 tokens ("B"): for each step even, odd; of those three
tiles, one for each piece; in row k the columns 4k and 4k + 2 (odd: 4k + 1, 4k + 3) of each token. Sums: float32
[rows, stride], tokens side by side.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.dot import copy_padded, fma, splat
from offload.kernels.forms import F32, I16, constant, load, pick, rare_codes, shifted_codes, vector
from offload.kernels.intrinsics import I8, I32, I64, declare, emit_prefetch, pointer

TILE_ROWS = 64  # weight rows that are multiplied at once
LANES = 16  # tokens of a tile
STEP = 64  # columns
PIECES = 3
TILE = 1024  # bytes
A_STEP = 2 * 4 * TILE
B_STEP = 2 * PIECES * TILE
_VOID, _ADDRESS = ir.VoidType(), I8.as_pointer()
_SUMS, _A, _B = range(4), 4, (5, 6, 7)  # the eight tile registers
_KEPT, _OFFSET = (
    0x87F0,
    0x3800,
)  # of a code in 16 bits: sign, exponent, mantissa; and what makes it value x 2^-8
CODES_FACTOR = 256.0  # makes up for that


def tile_instruction(builder: Any, name: str, *arguments: Any) -> None:
    """One tile instruction; tile registers and addresses in its order."""
    values = [I8(a) if isinstance(a, int) else a for a in arguments]
    builder.call(declare(builder, f"llvm.x86.{name}", _VOID, [v.type for v in values]), values)


def load_tile(builder: Any, register: int, address: Any, stride: Any = I64(64)) -> None:  # noqa: B008 (a constant)
    """A tile register from memory, its rows `stride` bytes apart."""
    tile_instruction(builder, "tileloadd64", register, pointer(builder, address, I8), stride)


def store_tile(builder: Any, register: int, address: Any, stride: Any = I64(64)) -> None:  # noqa: B008
    """A tile register to memory, its rows `stride` bytes apart."""
    tile_instruction(builder, "tilestored64", register, pointer(builder, address, I8), stride)


@intrinsic
def configure_tiles(_context: Any) -> Any:
    """Make all eight tile registers of this thread 16 rows of 64 bytes; `release_tiles` in the end."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        config = bytes([1] + 15 * [0] + 8 * [64, 0] + 16 * [0] + 8 * [16] + 8 * [0])
        place = cgutils.alloca_once_value(builder, cgutils.make_bytearray(config))
        tile_instruction(builder, "ldtilecfg", builder.bitcast(place, _ADDRESS))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release_tiles(_context: Any) -> Any:
    """Give the tile registers back: a thread that holds none is cheaper to switch."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        tile_instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _bfloats(builder: Any, address: Any) -> list[Any]:
    """64 codes without rare ones as <32 x bfloat16 bits> of value x 2^-8: even columns, odd columns."""
    kept, offset = constant(I16, 32, _KEPT), constant(I16, 32, _OFFSET)
    return [builder.or_(builder.and_(bits, kept), offset) for bits in shifted_codes(builder, address, LANES)]


def _mend_rare(builder: Any, bits: Any) -> Any:
    """Such bits with those of zero exponent put right: such a code, mantissa m, is 2^-14 m / 8."""
    table = [0, 0x3700, 0x3780, 0x37C0, 0x3800, 0x3820, 0x3840, 0x3860] * 4  # bfloat16 of that
    wide = vector(I16, 32)
    mantissas = builder.lshr(bits, constant(I16, 32, 4))  # of an index, the instruction takes the low 5 bits
    lookup = declare(builder, "llvm.x86.avx512.permvar.hi.512", wide, [wide, wide])
    values = builder.call(lookup, [ir.Constant(wide, table), mantissas])
    mended = builder.or_(values, builder.and_(bits, constant(I16, 32, 0x8000)))
    exponents = builder.and_(bits, constant(I16, 32, 0x0780))
    rare = builder.icmp_unsigned("==", exponents, constant(I16, 32, 0))
    return builder.select(rare, mended, bits)


def _store_bfloats(builder: Any, parts: list[Any], target: Any) -> None:
    for i, part in enumerate(parts):
        at = builder.add(target, I64(A_STEP // 2 * i))
        builder.store(part, pointer(builder, at, part.type), align=64)


@intrinsic
def widen_tile_row(_context: Any, source: Any, columns: Any, target: Any) -> Any:
    """Write a row's `columns` codes at `source` to its place `target` in an A, zeros up to a whole
    step behind."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        source, columns, target = args
        buffer = cgutils.alloca_once(builder, I8, STEP)
        place = cgutils.alloca_once(builder, I64)
        with cgutils.for_range_slice(builder, I64(0), columns, I64(STEP)) as (column, _):
            builder.store(builder.add(source, column), place)
            rest = builder.sub(columns, column)
            with builder.if_then(builder.icmp_signed("<", rest, I64(STEP)), likely=False):
                builder.store(copy_padded(builder, buffer, builder.load(place), rest, STEP), place)
            codes = builder.load(place)
            to = builder.add(target, builder.mul(column, I64(A_STEP // STEP)))
            parts = _bfloats(builder, codes)
            _store_bfloats(builder, parts, to)
            rare = builder.bitcast(rare_codes(builder, codes, LANES), I64)
            with builder.if_then(builder.icmp_unsigned("!=", rare, I64(0)), likely=False):
                _store_bfloats(builder, [_mend_rare(builder, bits) for bits in parts], to)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def transpose_floats(_context: Any, addresses: Any, offset: Any, target: Any) -> Any:
    """target[c, n] = float32 c, of 16, at the int64 address n, of 16, plus `offset`."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        addresses, offset, target = args
        rows = []
        for n in range(LANES):
            row = builder.load(pointer(builder, builder.add(addresses, I64(8 * n)), I64))
            rows.append(load(builder, builder.add(row, offset), F32, LANES))
        for c, column in enumerate(_transposed(builder, rows)):
            at = builder.add(target, I64(TILE // LANES * c))
            builder.store(column, pointer(builder, at, column.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16, exchanged in blocks of 1, 2, 4, 8."""
    for size in (1, 2, 4, 8):
        upper = [lane ^ size ^ 16 if lane & size else lane for lane in range(LANES)]
        lower = [lane + 16 if lane & size else lane + size for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & size):
            a, b = rows[i], rows[i + size]
            rows[i], rows[i + size] = pick(builder, a, b, upper), pick(builder, a, b, lower)
    return rows


@intrinsic
def pack_tokens(_context: Any, source: Any, columns: Any, scales: Any, target: Any) -> Any:
    """Write 16 tokens, float32 [columns, 16] times float32 `scales` [16], as a B, zeros up to a whole step."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        source, columns, scales, target = args
        buffer = cgutils.alloca_once(builder, I8, TILE)
        place = cgutils.alloca_once(builder, I64)
        scale = load(builder, scales, F32, LANES)
        whole = builder.mul(builder.sdiv(builder.add(columns, I64(STEP - 1)), I64(STEP)), I64(STEP))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(16)) as (column, _):
            builder.store(builder.add(source, builder.mul(column, I64(4 * LANES))), place)
            rest = builder.sub(columns, column)
            with builder.if_then(builder.icmp_signed("<", rest, I64(16)), likely=False):
                some = builder.select(builder.icmp_signed(">", rest, I64(0)), rest, I64(0))
                size = builder.mul(some, I64(4 * LANES))
                builder.store(copy_padded(builder, buffer, builder.load(place), size, TILE), place)
            at = builder.load(place)
            step, quarter = builder.sdiv(column, I64(STEP)), builder.srem(column, I64(STEP))
            to = builder.add(target, builder.mul(step, I64(B_STEP)))
            to = builder.add(to, builder.mul(quarter, I64(4 * 64 // 16)))
            for odd in range(2):
                for k in range(4):
                    pair = [
                        load(builder, builder.add(at, I64(64 * (4 * k + odd + i))), F32, LANES)
                        for i in (0, 2)
                    ]
                    pair = [builder.fmul(x, scale) for x in pair]
                    for piece, bits in enumerate(_pieces(builder, *pair)):
                        there = builder.add(to, I64(TILE * (PIECES * odd + piece) + 64 * k))
                        builder.store(bits, pointer(builder, there, bits.type), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _pieces(builder: Any, a: Any, b: Any) -> list[Any]:
    """The three bfloat16 pieces of two vectors of float32, those of `a` in the low halves."""
    wide, single = vector(I32, LANES), vector(F32, LANES)
    upper, half = constant(I32, LANES, 0xFFFF0000), constant(I32, LANES, 16)
    pieces = []
    for i in range(PIECES):
        leading = [builder.and_(builder.bitcast(x, wide), upper) for x in (a, b)]
        pieces.append(builder.or_(builder.lshr(leading[0], half), leading[1]))
        if i < PIECES - 1:
            a, b = (builder.fsub(x, builder.bitcast(y, single)) for x, y in zip((a, b), leading, strict=True))
    return pieces


@intrinsic
def multiply_tiles(
    _context: Any, a: Any, b: Any, columns: Any, scale: Any, out: Any, stride: Any, ahead: Any
) -> Any:
    """out[r, n] += row r of an A . token n of a B, over the columns of one block at most.

    `scale`: address of the block's scale; `out` of float32, `stride` the bytes of its rows.
    `ahead`: () or (address, bytes from row to row): as many columns of as many rows of codes are prefetched from
    there, spread evenly, so that memory works while the tiles do.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        a, b, columns, scale, out, stride, ahead = args
        _Multiply(builder, a, b, cgutils.unpack_tuple(builder, ahead)).emit(columns, scale, out, stride)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, ahead), generate


class _Multiply:
    """Emits the products of an A with a B: the three pieces of the tokens' tile stay in registers
    while the four tiles of rows pass."""

    def __init__(self, builder: Any, a: Any, b: Any, ahead: list[Any]) -> None:
        self.builder, self.a, self.b, self.ahead = builder, a, b, ahead
        self.buffer = cgutils.alloca_once(builder, ir.ArrayType(I8, TILE), len(_SUMS))
        self.buffer.align = 64

    def emit(self, columns: Any, scale: Any, out: Any, stride: Any) -> None:
        """Add the scaled sums of one block's columns to `out`."""
        builder = self.builder
        for register in _SUMS:
            tile_instruction(builder, "tilezero", register)
        with cgutils.for_range_slice(builder, I64(0), columns, I64(STEP)) as (column, _):
            self.add_step(column)
        self.add_block(builder.load(pointer(builder, scale, F32), align=1), out, stride)

    def add_step(self, column: Any) -> None:
        """Add the products of a step to the sums in the tile registers."""
        builder = self.builder
        step = builder.sdiv(column, I64(STEP))
        a = builder.add(self.a, builder.mul(step, I64(A_STEP)))
        b = builder.add(self.b, builder.mul(step, I64(B_STEP)))
        for odd in range(2):
            for piece, register in enumerate(_B):
                load_tile(builder, register, builder.add(b, I64(TILE * (PIECES * odd + piece))))
            for i, register in enumerate(_SUMS):
                load_tile(builder, _A, builder.add(a, I64(TILE * (4 * odd + i))))
                self.prefetch(column, range(8 * (4 * odd + i), 8 * (4 * odd + i + 1)))
                for piece in _B:
                    tile_instruction(builder, "tdpbf16ps", register, _A, piece)

    def prefetch(self, column: Any, rows: range) -> None:
        """A step's codes of some rows ahead."""
        builder = self.builder
        if self.ahead:
            base, stride = self.ahead
            for row in rows:
                emit_prefetch(
                    builder, builder.add(base, builder.add(builder.mul(stride, I64(row)), column)), 2
                )

    def add_block(self, scale: Any, out: Any, stride: Any) -> None:
        """out += the sums times `scale`."""
        builder = self.builder
        buffer = builder.ptrtoint(self.buffer, I64)
        for register in _SUMS:
            store_tile(builder, register, builder.add(buffer, I64(TILE * register)))
        factor = splat(builder, scale, LANES)
        for r in range(TILE_ROWS):
            place = pointer(builder, builder.add(out, builder.mul(stride, I64(r))), vector(F32, LANES))
            part = load(builder, builder.add(buffer, I64(64 * r)), F32, LANES)
            builder.store(fma(builder, part, factor, builder.load(place, align=64)), place, align=64)


@intrinsic
def swiglu_tokens(
    _context: Any, gate: Any, up: Any, stride: Any, rows: Any, factors: Any, target: Any
) -> Any:
    """target[r, n] = silu(g) u, g and u being row r of gate and up [rows, stride bytes], times factors[n], of
    16 tokens; target is float32 [rows, 16]."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        gate, up, stride, rows, factors, target = args
        factor, one = load(builder, factors, F32, LANES), constant(F32, LANES, 1.0)
        with cgutils.for_range(builder, rows) as loop:
            offset = builder.mul(loop.index, stride)
            g, u = (
                builder.fmul(load(builder, builder.add(base, offset), F32, LANES), factor)
                for base in (gate, up)
            )
            gated = builder.fdiv(g, builder.fadd(one, _exp(builder, builder.fneg(g))))
            at = builder.add(target, builder.mul(loop.index, I64(4 * LANES)))
            builder.store(builder.fmul(gated, u), pointer(builder, at, u.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _exp(builder: Any, x: Any) -> Any:
    """e^x of float32, to 2 in the last place: 2^n e^r, n the nearest whole number to x / ln 2, |r| < 0.35, by
    the Taylor series of degree 7. x is capped where the result is 0 or infinite anyway."""
    wide, kind = vector(I32, x.type.count), x.type

    def number(value: float) -> Any:
        return constant(F32, kind.count, value)

    def call(name: str, *values: Any) -> Any:
        function = declare(builder, f"llvm.{name}.v{kind.count}f32", kind, [kind] * len(values))
        return builder.call(function, list(values))

    x = call("maximum", call("minimum", x, number(173.0)), number(-173.0))
    n = call("nearbyint", builder.fmul(x, number(1.44269504)))
    r = fma(builder, n, number(-0.693359375), x)  # ln 2 in two parts, the first exact in 9 bits
    r = fma(builder, n, number(2.12194440e-4), r)
    total = number(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        total = fma(builder, total, r, number(term))
    saturated = declare(builder, f"llvm.fptosi.sat.v{kind.count}i32.v{kind.count}f32", wide, [kind])
    whole = builder.call(saturated, [n])  # of a NaN, a number
    half = builder.ashr(whole, constant(I32, kind.count, 1))
    for part in (half, builder.sub(whole, half)):  # 2^n itself may not be a float32
        power = builder.shl(builder.add(part, constant(I32, kind.count, 127)), constant(I32, kind.count, 23))
        total = builder.fmul(total, builder.bitcast(power, kind))
    return total
