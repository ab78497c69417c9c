"""A range of a matrix's rows times any number of arranged tokens, on one lane.

Up to `FEW` tokens take the weights straight from their bytes; more take them from a tile of `ROWS` rows,
widened once to float32 in the L1 cache. Both do the same sums in the same order (dot.py), so a token's
result does not depend on how many share the call.
"""

from typing import Any

from numba import types
from numba.extending import overload

from offload.kernels import portable
from offload.kernels.dot import BLOCK, ROWS, TILE, dot_vectors, widen_vectors
from offload.kernels.forms import BF16, FORMS, PLAIN, TILED, step_columns
from offload.kernels.intrinsics import call_address
from offload.kernels.jit import DONE, Static, compile_c, jit
from offload.kernels.memory import clear, integers

FEW = 3
FP8_NUMBER, BF16_NUMBER, F32_NUMBER = range(
    3
)  # a matrix's format, as compiled code knows it: log2 of its itemsize
TILE_BYTES = ROWS * TILE * 4  # scratch of one lane for the widened tile
N_ARGUMENTS = 12


def dot(
    level: Static,
    form: Static,
    rows: Any,
    scales: Any,
    xs: Any,
    columns: int,
    out: int,
    stride: int,
    ahead: Any,
) -> None:
    """out[t * stride + r] += row r . token t (see dot.py); in compiled code only."""
    raise TypeError("dot runs in compiled code only")


def widen(level: Static, form: Static, source: int, columns: int, target: int, ahead: Any) -> None:
    """Weights at `source` as float32 at `target` (see dot.py); in compiled code only."""
    raise TypeError("widen runs in compiled code only")


def codes_form(level: Static) -> Any:
    """The form in which this level reads fp8 codes; in compiled code only."""
    raise TypeError("codes_form runs in compiled code only")


def few_tokens(level: Static) -> int:
    """The most tokens that take weights straight from their bytes; in compiled code only."""
    raise TypeError("few_tokens runs in compiled code only")


def widened_columns(level: Static, columns: int) -> int:
    """Columns of a row of `columns` as `widen` leaves it; in compiled code only."""
    raise TypeError("widened_columns runs in compiled code only")


@overload(widened_columns)
def _widened_columns(level: Any, columns: Any) -> Any:
    step = step_columns(level.value.width) if level.value.width > 1 else 1

    def round_up(level: Any, columns: Any) -> Any:
        return -(-columns // step) * step

    return round_up


@overload(codes_form)
def _codes_form(level: Any) -> Any:
    form = FORMS[level.value.codes]

    def choose(level: Any) -> Any:
        return form

    return choose


@overload(few_tokens)
def _few_tokens(level: Any) -> Any:
    few = FEW if level.value.width > 1 else 0

    def choose(level: Any) -> Any:
        return few

    return choose


@overload(dot)
def _dot(
    level: Any, form: Any, rows: Any, scales: Any, xs: Any, columns: Any, out: Any, stride: Any, ahead: Any
) -> Any:
    if level.value.width > 1:

        def vectors(
            level: Any,
            form: Any,
            rows: Any,
            scales: Any,
            xs: Any,
            columns: Any,
            out: Any,
            stride: Any,
            ahead: Any,
        ) -> None:
            dot_vectors(level, form, rows, scales, xs, columns, out, stride, ahead)

        return vectors
    scaled = form.value == "tile"

    def plain(
        level: Any,
        form: Any,
        rows: Any,
        scales: Any,
        xs: Any,
        columns: Any,
        out: Any,
        stride: Any,
        ahead: Any,
    ) -> None:
        portable.dot_floats(rows, scales, scaled, xs, columns, out, stride)

    return plain


@overload(widen)
def _widen(level: Any, form: Any, source: Any, columns: Any, target: Any, ahead: Any) -> Any:
    if level.value.width > 1:

        def vectors(level: Any, form: Any, source: Any, columns: Any, target: Any, ahead: Any) -> None:
            widen_vectors(level, form, source, columns, target, ahead)

        return vectors
    plain = {"bf16": portable.widen_bf16, "f32": portable.widen_f32}.get(form.value, portable.widen_codes)

    def loops(level: Any, form: Any, source: Any, columns: Any, target: Any, ahead: Any) -> None:
        plain(source, columns, target)

    return loops


@jit
def _four_rows(data: int, size: int, first: int, last: int) -> tuple[int, int, int, int]:
    """Addresses of rows of `size` bytes from `first`; beyond `last`, that row again."""
    return (
        data + first * size,
        data + min(first + 1, last) * size,
        data + min(first + 2, last) * size,
        data + min(first + 3, last) * size,
    )


@jit
def _four_scales(scale: int, columns: int, first: int, last: int) -> tuple[int, int, int, int]:
    """Addresses of the first scales of the same rows."""
    size = -(-columns // BLOCK) * 4
    return (
        scale + first // BLOCK * size,
        scale + min(first + 1, last) // BLOCK * size,
        scale + min(first + 2, last) // BLOCK * size,
        scale + min(first + 3, last) // BLOCK * size,
    )


@jit
def _few(
    level: Static,
    form: Static,
    itemsize: int,
    data: int,
    scale: int,
    columns: int,
    first: int,
    rows: int,
    xs: Any,
    tokens: int,
    out: int,
    stride: int,
    after: int,
) -> None:
    """As `project`, for at most FEW tokens, from the weights' own bytes."""
    last, size = first + rows - 1, columns * itemsize
    for r in range(first, first + rows, ROWS):
        at, scales = _four_rows(data, size, r, last), _four_scales(scale, columns, r, last)
        ahead = (data + (r + ROWS) * size if r + ROWS <= last else after,)
        place = out + 4 * (r - first)
        if tokens == 1:
            dot(level, form, at, scales, (xs[0],), columns, place, stride, ahead)
        elif tokens == 2:
            dot(level, form, at, scales, (xs[0], xs[1]), columns, place, stride, ahead)
        else:
            dot(level, form, at, scales, (xs[0], xs[1], xs[2]), columns, place, stride, ahead)


@jit
def _many(
    level: Static,
    form: Static,
    wide: Static,
    itemsize: int,
    data: int,
    scale: int,
    columns: int,
    first: int,
    rows: int,
    xs: Any,
    tokens: int,
    out: int,
    stride: int,
    tile: int,
    after: int,
) -> None:
    """As `project`, for any number of tokens, widening each tile of weights once."""
    last, size = first + rows - 1, columns * itemsize
    tiles = _four_rows(tile, TILE * 4, 0, ROWS)
    for column in range(0, columns, TILE):
        count, x, block = min(TILE, columns - column), 4 * column, column // BLOCK * 4
        wide_count = widened_columns(level, count)
        for r in range(first, first + rows, ROWS):
            at = _four_rows(data + column * itemsize, size, r, last)
            next_ = ROWS * size if r + ROWS <= last else (first - r) * size + TILE * itemsize
            for i in range(ROWS):
                widen(level, form, at[i], count, tiles[i], at[i] + next_)
            scales = _four_scales(scale + block, columns, r, last)
            place, t = out + 4 * (r - first), 0
            while t + 3 <= tokens:
                some = (xs[t] + x, xs[t + 1] + x, xs[t + 2] + x)
                dot(level, wide, tiles, scales, some, wide_count, place + 4 * t * stride, stride, ())
                t += 3
            if t + 2 == tokens:
                some_two = (xs[t] + x, xs[t + 1] + x)
                dot(level, wide, tiles, scales, some_two, wide_count, place + 4 * t * stride, stride, ())
            elif t + 1 == tokens:
                dot(level, wide, tiles, scales, (xs[t] + x,), wide_count, place + 4 * t * stride, stride, ())


def compile_project(level: Static) -> Any:
    """`_project` for a level, as a C function that jobs call by address (`project`)."""

    def _project(
        number: int, data: int, scale: int, columns: int, first: int, rows: int,
        xs_address: int, tokens: int, out: int, stride: int, tile: int, after: int,
    ) -> int:  # fmt: skip
        clear(out, tokens * stride)
        xs = integers(xs_address)
        few = tokens <= few_tokens(level)
        if number == FP8_NUMBER and few:
            _few(
                level, codes_form(level), 1, data, scale, columns, first, rows, xs, tokens, out, stride, after
            )
        elif number == FP8_NUMBER:
            _many(
                level,
                codes_form(level),
                TILED,
                1,
                data,
                scale,
                columns,
                first,
                rows,
                xs,
                tokens,
                out,
                stride,
                tile,
                after,
            )
        elif number == BF16_NUMBER and few:
            _few(level, BF16, 2, data, scale, columns, first, rows, xs, tokens, out, stride, after)
        elif number == BF16_NUMBER:
            _many(
                level, BF16, PLAIN, 2, data, scale, columns, first, rows, xs, tokens, out, stride, tile, after
            )
        else:
            _many(
                level,
                PLAIN,
                PLAIN,
                4,
                data,
                scale,
                columns,
                first,
                rows,
                xs,
                tokens,
                out,
                stride,
                tile,
                after,
            )
        return DONE

    return compile_c(_project, types.int64(*[types.int64] * N_ARGUMENTS))


@jit
def project(
    kernel: int,
    number: int,
    data: int,
    scale: int,
    columns: int,
    first: int,
    rows: int,
    xs: Any,
    tokens: int,
    out: int,
    stride: int,
    tile: int,
    after: int,
) -> None:
    """out[t, r] = row `first + r` . token t, for `rows` rows and `tokens` tokens.

    Args:
        kernel: address of `compile_project(level)`.
        number: the weights' format, one of the _NUMBERs.
        data, scale: addresses of the whole matrix [any, columns] and its block scales.
        xs: address of int64 addresses, the tokens' arranged rows.
        out, stride: address of float32 [tokens, stride]; stride >= rows, and a multiple of ROWS.
        tile: address of TILE_BYTES of scratch.
        after: address of what this lane reads next: prefetched while the last rows are computed.
    """
    arguments = (number, data, scale, columns, first, rows, xs, tokens, out, stride, tile, after)
    call_address(kernel, arguments)
