"""The micro-kernels: four weight rows times one to three tokens, straight from the checkpoint's bytes.

One definition of a product, whatever the number of rows, tokens, lanes or threads. Columns are taken in
tiles of `TILE` and blocks of `BLOCK`. In a block each vector lane sums weight x activation by fused
multiply-adds in a fixed order of columns; a block's sums are multiplied by its scale and added to the
tile's; a tile's lanes are summed in a fixed tree and added to the result. Only the level changes the bits.
"""

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
    load_floats,
    load_part,
    load_weights,
    pick,
    step_columns,
    vector,
)
from offload.kernels.intrinsics import I8, I32, I64, declare, emit_prefetch, opaque, pointer

BLOCK = 128
TILE = 1024
ROWS = 4  # weight rows a micro-kernel takes
LINE = 64  # bytes of a cache line


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


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once, of float32 vectors."""
    function = declare(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a.type] * 3)
    return builder.call(function, [a, b, c])


def _splat(builder: Any, value: Any, count: int) -> Any:
    one = builder.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, I32(0))
    return pick(builder, one, one, [0] * count)


def _minimum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _copy_padded(builder: Any, buffer: Any, source: Any, size: Any, capacity: int) -> Any:
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
            self._add_codes(rows, column)
        else:
            self._add_parts(rows, column)

    def _add_codes(self, rows: list[Any], column: Any) -> None:
        """Row by row: converting codes gives all of a step's vectors at once."""
        builder = self.builder
        for row, sums in zip(rows, self.block_sums, strict=True):
            if (
                len(self.xs) > 1
            ):  # else LLVM keeps all activations of a step in registers, and spills the sums
                column = opaque(builder, column)
            activations = [load_floats(builder, self._x_address(x, column), self.width) for x in self.xs]
            for i, weights in enumerate(load_weights(builder, self.form, row, self.width)):
                for x, place in zip(activations, sums, strict=True):
                    builder.store(_fma(builder, weights, x[i], builder.load(place)), place)

    def _add_parts(self, rows: list[Any], column: Any) -> None:
        """Vector by vector: few registers besides the sums."""
        builder = self.builder
        for i in range(4):
            column_i = builder.add(column, I64(i * self.width))
            activations = [load(builder, self._x_address(x, column_i), F32, self.width) for x in self.xs]
            for row, sums in zip(rows, self.block_sums, strict=True):
                weights = load_part(builder, self.form, row, self.width, i)
                for x, place in zip(activations, sums, strict=True):
                    builder.store(_fma(builder, weights, x, builder.load(place)), place)

    def _x_address(self, x: Any, column: Any) -> Any:
        return self.builder.add(x, self.builder.mul(column, I64(4)))

    def prefetch(self, base: Any, offset: Any) -> None:
        """As many bytes as a step of the four rows has, `offset` bytes into each, from the rows at `base`.

        They are read in address order, as one stream: rows side by side would be four, which the memory
        serves less well.
        """
        builder = self.builder
        at = builder.add(base, builder.mul(offset, I64(ROWS)))
        for byte in range(0, ROWS * self.step * self.itemsize, LINE):
            emit_prefetch(builder, builder.add(at, I64(byte)), 2)

    def add_whole_step(self, column: Any, ahead: list[Any]) -> None:
        """block_sums += a step from `column`; meanwhile the step of `ahead` is prefetched."""
        builder = self.builder
        offset = builder.mul(column, I64(self.itemsize))
        for base in ahead:
            self.prefetch(base, offset)
        self.add_step([builder.add(row, offset) for row in self.rows], column)

    def add_tail(self, start: Any, count: Any) -> None:
        """The last `count` columns, less than a step, from buffers that end in zeros."""
        builder = self.builder
        offset, size = (builder.mul(value, I64(self.itemsize)) for value in (start, count))
        rows = [
            _copy_padded(builder, buffer, builder.add(row, offset), size, self.step * self.itemsize)
            for buffer, row in zip(self.tails, self.rows, strict=True)
        ]
        self.add_step(rows, start)

    def add_block(self, start: Any, end: Any, ahead: list[Any]) -> None:
        """sums += the columns start..end of one block."""
        builder = self.builder
        if self.form in SCALED:
            self.clear(self.block_sums)
        rest = builder.srem(builder.sub(end, start), I64(self.step))
        stop = builder.sub(end, rest)
        single = start
        if len(self.xs) == 1:  # so little work a step that its loop would show
            single = builder.sub(stop, builder.srem(builder.sub(stop, start), I64(BLOCK)))
            with cgutils.for_range_slice(builder, start, single, I64(BLOCK)) as (column, _):
                for i in range(0, BLOCK, self.step):
                    self.add_whole_step(builder.add(column, I64(i)), ahead)
        with cgutils.for_range_slice(builder, single, stop, I64(self.step)) as (column, _):
            self.add_whole_step(column, ahead)
        with builder.if_then(builder.icmp_signed(">", rest, I64(0)), likely=False):
            self.add_tail(stop, rest)
        if self.form in SCALED:
            self.scale_block(builder.mul(builder.sdiv(start, I64(BLOCK)), I64(4)))

    def scale_block(self, offset: Any) -> None:
        """sums += block_sums times each row's scale, which is `offset` bytes from its first."""
        builder = self.builder
        for row, sums, block_sums in zip(self.scales, self.sums, self.block_sums, strict=True):
            scale = builder.load(pointer(builder, builder.add(row, offset), F32), align=1)
            factor = _splat(builder, scale, self.width)
            for total, part in zip(sums, block_sums, strict=True):
                builder.store(_fma(builder, builder.load(part), factor, builder.load(total)), total)

    def emit(self, columns: Any, out: Any, stride: Any, ahead: list[Any]) -> None:
        """out[t * stride + r] += row r times token t."""
        builder = self.builder
        with cgutils.for_range_slice(builder, I64(0), columns, I64(TILE)) as (tile, _):
            tile_end = _minimum(builder, builder.add(tile, I64(TILE)), columns)
            self.clear(self.sums)
            with cgutils.for_range_slice(builder, tile, tile_end, I64(BLOCK)) as (start, _):
                self.add_block(start, _minimum(builder, builder.add(start, I64(BLOCK)), tile_end), ahead)
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
            emit_prefetch(builder, builder.add(ahead, offset), 2)
            address = builder.add(source, offset)
            rest = builder.sub(columns, column)
            place = cgutils.alloca_once_value(builder, address)
            with builder.if_then(builder.icmp_signed("<", rest, I64(step)), likely=False):
                size_left = builder.mul(rest, I64(size))
                builder.store(_copy_padded(builder, buffer, address, size_left, step * size), place)
            to = builder.add(target, builder.mul(column, I64(4)))
            for i, part in enumerate(load_weights(builder, form.value, builder.load(place), width)):
                at = pointer(builder, builder.add(to, I64(4 * width * i)), part.type)
                builder.store(part, at, align=4)
        return context.get_dummy_value()

    return types.void(level, form, *[types.int64] * 4), generate
