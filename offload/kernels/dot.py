"""The micro-kernels: four weight rows times one to three tokens, straight from the checkpoint's bytes.

One definition of a product, whatever the number of rows, tokens, lanes or threads. Columns are taken in
tiles of `TILE` and blocks of `BLOCK`. In a block each vector lane sums weight x activation by fused
multiply-adds in a fixed order of columns; a block's sums are multiplied by its scale and added to the
tile's; a tile's lanes are summed in a fixed tree and added to the result. Only the level changes the bits.
"""

from functools import reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.forms import (
    CODES,
    F32,
    ITEMSIZE,
    SCALED,
    constant,
    load,
    load_exact,
    load_floats,
    load_part,
    load_weights,
    pick,
    rare_codes,
    step_columns,
    vector,
)
from offload.kernels.intrinsics import I8, I32, I64, declare, emit_prefetch, opaque, pointer

BLOCK = 128
TILE = 1024
ROWS = 4  # weight rows a micro-kernel takes
LINE = 64  # bytes of a cache line
SOON = 1024  # bytes from a row's current line to the one fetched into L1


def _sum_rows(builder: Any, vectors: list[Any], width: int) -> Any:
    """<4 x float> of each of four vectors' lane sums, in one fixed tree."""
    while width > 4:
        half = width // 2
        lower, upper = list(range(half)), list(range(half, width))
        vectors = [builder.fadd(pick(builder, v, v, lower), pick(builder, v, v, upper)) for v in vectors]
        width = half
    a, b, c, d = vectors
    ab = builder.fadd(pick(builder, a, b, [0, 4, 1, 5]), pick(builder, a, b, [2, 6, 3, 7]))
    cd = builder.fadd(pick(builder, c, d, [0, 4, 1, 5]), pick(builder, c, d, [2, 6, 3, 7]))
    return builder.fadd(pick(builder, ab, cd, [0, 1, 4, 5]), pick(builder, ab, cd, [2, 3, 6, 7]))


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once, of float32 vectors."""
    function = declare(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a.type] * 3)
    return builder.call(function, [a, b, c])


def splat(builder: Any, value: Any, count: int) -> Any:
    one = builder.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, I32(0))
    return pick(builder, one, one, [0] * count)


def minimum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def copy_padded(builder: Any, buffer: Any, source: Any, size: Any, capacity: int) -> Any:
    """Copy `size` bytes at `source` into the stack `buffer` of `capacity`, zeros behind; its address."""
    cgutils.memset(builder, buffer, I64(capacity), 0)
    cgutils.raw_memcpy(builder, buffer, pointer(builder, source, I8), size, 1)
    return builder.ptrtoint(buffer, I64)


class _Dot:
    """Emits one micro-kernel: four rows' addresses times some tokens' over `columns`."""

    def __init__(
        self, builder: Any, width: int, form: str, rows: list[Any], scales: list[Any], xs: list[Any]
    ) -> None:
        self.builder, self.width, self.form = builder, width, form
        self.rows, self.scales, self.xs = rows, scales, xs
        self.itemsize, self.step = ITEMSIZE[form], step_columns(width)
        self.sums = self._new_sums()
        self.block_sums = self._new_sums() if form in SCALED else self.sums
        self.tails = [cgutils.alloca_once(builder, I8, self.step * self.itemsize) for _ in rows]

    def _new_sums(self) -> list[list[Any]]:
        """A vector for each row and token; LLVM keeps them in registers."""
        kind = vector(F32, self.width)
        return [[cgutils.alloca_once(self.builder, kind) for _ in self.xs] for _ in self.rows]

    def clear(self, sums: list[list[Any]]) -> None:
        for row in sums:
            for place in row:
                self.builder.store(constant(F32, self.width, 0.0), place)

    def add_step(self, rows: list[Any], column: Any) -> None:
        """block_sums += a step of columns, weights at these addresses."""
        if self.form in CODES:
            for row, sums in zip(rows, self.block_sums, strict=True):
                self._add_codes(row, sums, column, load_exact)
        else:
            self._add_parts(rows, column)

    def _add_codes(self, row: Any, sums: list[Any], column: Any, load_codes: Any) -> None:
        """sums += a step of one row: converting codes gives all of its vectors at once."""
        builder = self.builder
        if len(self.xs) > 1:  # else LLVM keeps all activations of a step in registers, and spills the sums
            column = opaque(builder, column)
        activations = [load_floats(builder, self._x_address(x, column), self.width) for x in self.xs]
        for i, weights in enumerate(load_codes(builder, self.form, row, self.width)):
            for x, place in zip(activations, sums, strict=True):
                builder.store(fma(builder, weights, x[i], builder.load(place)), place)

    def _add_parts(self, rows: list[Any], column: Any) -> None:
        """Vector by vector: few registers besides the sums."""
        builder = self.builder
        for i in range(4):
            column_i = builder.add(column, I64(i * self.width))
            activations = [load(builder, self._x_address(x, column_i), F32, self.width) for x in self.xs]
            for row, sums in zip(rows, self.block_sums, strict=True):
                weights = load_part(builder, self.form, row, self.width, i)
                for x, place in zip(activations, sums, strict=True):
                    builder.store(fma(builder, weights, x, builder.load(place)), place)

    def _x_address(self, x: Any, column: Any) -> Any:
        return self.builder.add(x, self.builder.mul(column, I64(4)))

    def prefetch(self, row: int, offset: Any, ahead: list[Any]) -> None:
        """The line `offset` bytes into a row of `ahead`, four rows as long as these, for L2, and this row's
        own soon to come for L1."""
        builder = self.builder
        size = builder.sub(self.rows[1], self.rows[0])
        for base in ahead:
            there = builder.add(base, builder.mul(size, I64(row)))
            emit_prefetch(builder, builder.add(there, offset), 2)
            soon = builder.add(offset, I64(SOON))
            emit_prefetch(builder, builder.add(self.rows[row], soon), 3)

    def add_whole_step(self, column: Any, ahead: list[Any]) -> None:
        """block_sums += a step of all rows from `column`, and prefetches as many bytes."""
        builder = self.builder
        offset = builder.mul(column, I64(self.itemsize))
        for r in range(ROWS):
            for byte in range(0, self.step * self.itemsize, LINE):
                self.prefetch(r, builder.add(offset, I64(byte)), ahead)
        self.add_step([builder.add(row, offset) for row in self.rows], column)

    def add_whole_block(self, start: Any, ahead: list[Any]) -> None:
        """block_sums += a whole block without rare codes, unrolled: row by row, whose two or more lines are
        then read together, with the prefetches spread evenly between."""
        builder = self.builder
        if self.form not in CODES:
            for i in range(0, BLOCK, self.step):
                self.add_whole_step(builder.add(start, I64(i)), ahead)
            return
        for r, (row, sums) in enumerate(zip(self.rows, self.block_sums, strict=True)):
            for i in range(0, BLOCK, self.step):
                column = builder.add(start, I64(i))
                if i % LINE == 0:
                    self.prefetch(r, column, ahead)
                self._add_codes(builder.add(row, column), sums, column, load_weights)

    def add_steps(self, start: Any, stop: Any, ahead: list[Any]) -> None:
        """block_sums += whole steps start..stop of a block."""
        with cgutils.for_range_slice(self.builder, start, stop, I64(self.step)) as (column, _):
            self.add_whole_step(column, ahead)

    def no_rare_codes(self, start: Any) -> Any:
        """Whether the whole block from `start` has none in any of the rows (only "offset" has any)."""
        builder = self.builder
        if self.form != "offset":
            return cgutils.true_bit
        found = [
            rare_codes(builder, builder.add(builder.add(row, start), I64(i)), self.width)
            for row in self.rows
            for i in range(0, BLOCK, self.step)
        ]
        lanes = ir.IntType(4 * self.width)
        return builder.icmp_unsigned("==", builder.bitcast(reduce(builder.or_, found), lanes), lanes(0))

    def add_tail(self, start: Any, count: Any) -> None:
        """The last `count` columns, less than a step, from buffers that end in zeros."""
        builder = self.builder
        offset, size = (builder.mul(value, I64(self.itemsize)) for value in (start, count))
        rows = [
            copy_padded(builder, buffer, builder.add(row, offset), size, self.step * self.itemsize)
            for buffer, row in zip(self.tails, self.rows, strict=True)
        ]
        self.add_step(rows, start)

    def add_block(self, start: Any, end: Any, ahead: list[Any]) -> None:
        """sums += the columns start..end of one block; meanwhile that block of `ahead` is prefetched."""
        builder = self.builder
        if self.form in SCALED:
            self.clear(self.block_sums)
        rest = builder.srem(builder.sub(end, start), I64(self.step))
        stop = builder.sub(end, rest)
        plain = cgutils.alloca_once_value(builder, cgutils.false_bit)
        builder.store(cgutils.false_bit, plain)
        whole = builder.icmp_signed("==", builder.sub(end, start), I64(BLOCK))
        with builder.if_then(whole, likely=True):
            builder.store(self.no_rare_codes(start), plain)
        with builder.if_else(builder.load(plain), likely=True) as (then, otherwise):
            with then:
                self.add_whole_block(start, ahead)
            with otherwise:
                self.add_steps(start, stop, ahead)
        with builder.if_then(builder.icmp_signed(">", rest, I64(0)), likely=False):
            self.add_tail(stop, rest)
        if self.form in SCALED:
            self.scale_block(builder.mul(builder.sdiv(start, I64(BLOCK)), I64(4)))

    def scale_block(self, offset: Any) -> None:
        """sums += block_sums times each row's scale, which is `offset` bytes from its first."""
        builder = self.builder
        for row, sums, block_sums in zip(self.scales, self.sums, self.block_sums, strict=True):
            scale = builder.load(pointer(builder, builder.add(row, offset), F32), align=1)
            factor = splat(builder, scale, self.width)
            for total, part in zip(sums, block_sums, strict=True):
                builder.store(fma(builder, builder.load(part), factor, builder.load(total)), total)

    def emit(self, columns: Any, out: Any, stride: Any, ahead: list[Any]) -> None:
        """out[t * stride + r] += row r times token t."""
        builder = self.builder
        with cgutils.for_range_slice(builder, I64(0), columns, I64(TILE)) as (tile, _):
            tile_end = minimum(builder, builder.add(tile, I64(TILE)), columns)
            self.clear(self.sums)
            with cgutils.for_range_slice(builder, tile, tile_end, I64(BLOCK)) as (start, _):
                self.add_block(start, minimum(builder, builder.add(start, I64(BLOCK)), tile_end), ahead)
            for t in range(len(self.xs)):
                total = _sum_rows(builder, [builder.load(row[t]) for row in self.sums], self.width)
                address = builder.add(out, builder.mul(stride, I64(4 * t)))
                place = pointer(builder, address, vector(F32, 4))
                builder.store(builder.fadd(builder.load(place, align=4), total), place, align=4)


@intrinsic
def dot_vectors(
    _context: Any,
    level: Any,
    form: Any,
    rows: Any,
    scales: Any,
    xs: Any,
    columns: Any,
    out: Any,
    stride: Any,
    ahead: Any,
) -> Any:
    """out[t * stride + r] += row r . token t, for the tuples of addresses `rows` (4) and `xs` (1 to 3).

    `level` and `form` are Statics; `scales` holds the address of each row's first scale (unused without
    scales); `out` is the address of float32; `ahead` is () or (address of the four rows to prefetch,).
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        rows_, scales_, xs_, ahead_ = (cgutils.unpack_tuple(builder, args[i]) for i in (2, 3, 4, 8))
        kernel = _Dot(builder, level.value.width, form.value, rows_, scales_, xs_)
        kernel.emit(args[5], args[6], args[7], ahead_)
        return context.get_dummy_value()

    return types.void(level, form, rows, scales, xs, *[types.int64] * 3, ahead), generate


def _store_step(builder: Any, parts: list[Any], address: Any) -> None:
    """Four float32 vectors, one behind the other."""
    for i, part in enumerate(parts):
        at = builder.add(address, I64(4 * part.type.count * i))
        builder.store(part, pointer(builder, at, part.type), align=4)


@intrinsic
def widen_vectors(
    _context: Any, level: Any, form: Any, source: Any, columns: Any, target: Any, ahead: Any
) -> Any:
    """Write `columns` weights at `source` as float32 to `target`, zeros up to a whole step behind.

    Codes become "tile", bf16 becomes "f32". The same columns of the row at `ahead` are prefetched.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        source, columns, target, ahead = args[2:]
        size, width = ITEMSIZE[form.value], level.value.width
        step = step_columns(width)
        buffer = cgutils.alloca_once(builder, I8, step * size)
        with cgutils.for_range_slice(builder, I64(0), columns, I64(step)) as (column, _):
            offset = builder.mul(column, I64(size))
            for byte in range(0, step * size, LINE):
                emit_prefetch(builder, builder.add(ahead, builder.add(offset, I64(byte))), 2)
            address = builder.add(source, offset)
            rest = builder.sub(columns, column)
            place = cgutils.alloca_once_value(builder, address)
            with builder.if_then(builder.icmp_signed("<", rest, I64(step)), likely=False):
                size_left = builder.mul(rest, I64(size))
                builder.store(copy_padded(builder, buffer, address, size_left, step * size), place)
            to = builder.add(target, builder.mul(column, I64(4)))
            at = builder.load(place)
            _store_step(builder, load_weights(builder, form.value, at, width), to)
            if form.value == "offset":
                lanes = ir.IntType(4 * width)
                rare = builder.bitcast(rare_codes(builder, at, width), lanes)
                with builder.if_then(builder.icmp_unsigned("!=", rare, lanes(0)), likely=False):
                    _store_step(builder, load_exact(builder, form.value, at, width), to)
        return context.get_dummy_value()

    return types.void(level, form, *[types.int64] * 4), generate
