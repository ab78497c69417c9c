"""Products of a range of a matrix's rows with up to TOKENS tokens, on one lane's AMX tiles (tiles.py).

Tokens come in groups of 16. As many of their columns as the L2 cache has room for are packed; then each 64 rows'
columns are widened in the L1 cache, a block at a time, and multiplied with all groups. Sums of all rows and tokens
are added up in the L2 cache.
"""

import numba
import numpy as np

from offload.kernels.arrange import largest_exponent, power_of_two
from offload.kernels.dot import BLOCK
from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import jit
from offload.kernels.memory import clear, floats, integers
from offload.kernels.tiles import (
    B_STEP,
    LANES,
    STEP,
    TILE,
    TILE_ROWS,
    multiply_tiles,
    pack_tokens,
    transpose_floats,
    widen_tile_row,
)
from offload.workers import claim

WORTHWHILE = 10  # tokens that a matrix must meet for tiles to be about as fast as vectors (bench/NOTES.md)
TOKENS = 128  # of one matrix at a time
COLUMNS = BLOCK  # that are widened at a time: with 64 rows, 16 KB
CHUNK = 512  # the most rows in a chunk, of gate and of up each, or of the output
PACKED_BYTES = TOKENS // LANES * 1024 // STEP * B_STEP  # of tokens' columns packed at a time

# A lane's scratch: widened weights, packed tokens, 16 tokens' columns, two matrices' sums, 16 transposed sums,
# 16 addresses, 16 factors.
PACKED = TILE_ROWS * COLUMNS * 2
TURNED = PACKED + PACKED_BYTES
SUMS = TURNED + COLUMNS * LANES * 4
SUMS_BYTES = CHUNK * TOKENS * 4
OUTPUTS = SUMS + 2 * SUMS_BYTES
ADDRESSES = OUTPUTS + TILE
FACTORS = ADDRESSES + LANES * 8
TILES_BYTES = -(-(FACTORS + LANES * 4) // 4096) * 4096


def chunk_rows(rows: int, threads: int) -> int:
    """Rows in a chunk of a matrix: at least eight chunks for each lane, where that leaves enough of them."""
    return max(TILE_ROWS, min(CHUNK, rows // (8 * threads) // TILE_ROWS * TILE_ROWS))


@jit
def lift(exponent: int) -> np.float32:
    """What to multiply numbers of at most this exponent by, so that neither are their bfloat16 pieces subnormal nor
    a block's sums infinite."""
    return power_of_two(min(max(exponent, -60), 60) - exponent)


@jit
def scale_tokens(x: int, x_stride: int, tokens: int, columns: int, scales: int, control: int) -> None:
    """Each row's `lift`, shared out among the lanes by counter 0."""
    t = claim(control, 0)
    while t < tokens:
        floats(scales)[t] = lift(largest_exponent(as_pointer(x + t * x_stride, numba.uint32), columns))
        t = claim(control, 0)


@jit
def _turn_columns(addresses: int, column: int, columns: int, target: int) -> None:
    """target[c, n] = column `column + c` of the row at address n, of 16."""
    whole, rows, values = columns // LANES * LANES, integers(addresses), floats(target)
    for c in range(0, whole, LANES):
        transpose_floats(addresses, 4 * (column + c), target + 4 * LANES * c)
    for n in range(LANES):
        row = floats(rows[n] + 4 * column)
        for c in range(whole, columns):
            values[c * LANES + n] = row[c]


@jit
def group_count(tokens: int) -> int:
    """Groups that so many tokens make."""
    return -(-tokens // LANES)


@jit
def packed_columns(groups: int) -> int:
    """Columns that are packed at a time: the more, the fewer tokens there are."""
    return PACKED_BYTES // (groups * B_STEP) * STEP // COLUMNS * COLUMNS


@jit
def packed_at(scratch: int, group: int, count: int) -> int:
    """Address of a group's `count` packed columns."""
    return scratch + PACKED + group * -(-count // STEP) * B_STEP


@jit
def _widen(scratch: int, data: int, columns: int, first: int, last: int, column: int, count: int) -> None:
    """`count` columns of TILE_ROWS rows from `first`; beyond `last`, that row again."""
    for r in range(TILE_ROWS):
        source = data + min(first + r, last) * columns + column
        widen_tile_row(source, count, scratch + r // 16 * TILE + r % 16 * 64)


@jit
def point_at(scratch: int, x: int, x_stride: int, scales: int, tokens: int, first: int, end: int) -> None:
    """ADDRESSES and FACTORS of 16 rows of x, whose int64 numbers are at `tokens` from `first` on; beyond `end`,
    of the first again. `scales`: address of every row's `lift`."""
    numbers, lifts = integers(tokens), floats(scales)
    addresses, factors = integers(scratch + ADDRESSES), floats(scratch + FACTORS)
    for n in range(LANES):
        token = numbers[first + n if first + n < end else first]
        addresses[n], factors[n] = x + token * x_stride, lifts[token]


@jit
def pack_rows(scratch: int, column: int, count: int, target: int) -> None:
    """Pack `count` columns of the 16 rows at ADDRESSES, times FACTORS."""
    for c in range(0, count, COLUMNS):
        some = min(COLUMNS, count - c)
        _turn_columns(scratch + ADDRESSES, column + c, some, scratch + TURNED)
        pack_tokens(scratch + TURNED, some, scratch + FACTORS, target + c // STEP * B_STEP)


@jit
def clear_sums(sums: int, rows: int) -> None:
    """Set the sums of `rows` rows, and of those that `product` computes with them, to zero."""
    clear(sums, -(-rows // TILE_ROWS) * TILE_ROWS * TOKENS)


@jit
def product(
    data: int, scale: int, columns: int, first: int, rows: int, column: int, count: int,
    scratch: int, groups: int, sums: int, after: int,
) -> None:  # fmt: skip
    """sums[r, t] += row `first + r` . token t over `count` columns from `column`, for 16 `groups` tokens whose
    columns are packed. `first` is a multiple of TILE_ROWS; `after` is the address of the codes read next."""
    last, stride, across, parts = first + rows - 1, 4 * TOKENS, -(-columns // BLOCK), -(-count // COLUMNS)
    total, group_bytes = -(-rows // TILE_ROWS) * parts, -(-count // STEP) * B_STEP
    for part in range(total):
        start, c = first + part // parts * TILE_ROWS, part % parts * COLUMNS
        some = min(COLUMNS, count - c)
        _widen(scratch, data, columns, start, last, column + c, some)
        block_scale = scale + 4 * (start // BLOCK * across + (column + c) // BLOCK)
        ahead = after
        if part + 1 < total:
            ahead = (
                data
                + (first + (part + 1) // parts * TILE_ROWS) * columns
                + column
                + (part + 1) % parts * COLUMNS
            )
        out, b = sums + (start - first) * stride, scratch + PACKED + c // STEP * B_STEP
        multiply_tiles(scratch, b, some, block_scale, out, stride, (ahead, columns))
        for g in range(1, groups):
            b += group_bytes
            multiply_tiles(scratch, b, some, block_scale, out + 64 * g, stride, ())


@jit
def turn_sums(scratch: int, sums: int, row: int) -> None:
    """OUTPUTS[n, i] = sums[row + i, n] of one group."""
    addresses = integers(scratch + ADDRESSES)
    for i in range(LANES):
        addresses[i] = sums + (row + i) * 4 * TOKENS
    transpose_floats(scratch + ADDRESSES, 0, scratch + OUTPUTS)
