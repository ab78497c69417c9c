"""The job for one layer's routed experts when many tokens pass at once, on AMX tiles (tiles.py).

As experts.py: pairs sorted by expert, chunks of gate and up, then chunks of the output. Here a chunk takes up to
TOKENS of an expert's tokens, in groups of 16, and goes through the columns in tiles: it packs its tokens' columns,
then widens the weights 32 rows at a time and multiplies them with all groups, into sums that stay in the L2 cache.
A token's result does not depend on the others: tiles hold each token's sums apart, in one order of columns.
"""

import functools
import itertools
from typing import Any

import numba
import numpy as np

from offload.kernels.arrange import largest_exponent, power_of_two
from offload.kernels.dot import BLOCK
from offload.kernels.experts import DOWN, GATE, UP, matrix_of, sort_pairs
from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import DONE, FAILED, Static, compile_job, jit
from offload.kernels.memory import clear, floats, integers, record
from offload.kernels.tiles import (
    A_STEP,
    B_STEP,
    CODES_FACTOR,
    LANES,
    STEP,
    TILE,
    TILE_ROWS,
    configure_tiles,
    multiply_tiles,
    pack_tokens,
    release_tiles,
    swiglu_tokens,
    transpose_floats,
    widen_tile_row,
)
from offload.workers import barrier, claim, claim_near

TOKENS = 128  # of one expert at a time
COLUMNS = 512  # of a tile
CHUNK = 512  # the most rows in a chunk, of gate and of up each, or of the output

# A lane's scratch: widened weights, packed tokens, 16 tokens' columns, two matrices' sums, 16 transposed sums,
# 16 addresses, 16 factors.
PACKED = TILE_ROWS * COLUMNS * 2
TURNED = PACKED + TOKENS // LANES * (COLUMNS // STEP) * B_STEP
SUMS = TURNED + COLUMNS * LANES * 4
SUMS_BYTES = CHUNK * TOKENS * 4
OUTPUTS = SUMS + 2 * SUMS_BYTES
ADDRESSES = OUTPUTS + TILE
FACTORS = ADDRESSES + LANES * 8
PREFILL_SCRATCH_BYTES = -(-(FACTORS + LANES * 4) // 4096) * 4096

# Addresses: table int64 [count, 6]; ids int64 and weights float32 [tokens, top_k]; x, y float32 with row strides in
# bytes. Space for the job itself: experts, starts, pair_tokens, pair_weights as in experts.py; groups int64
# [count + 1], each touched expert's first group of 16 pairs; scales float32 [tokens], the powers of two that bring
# x near 1; between float32 [groups, intermediate, 16] and between_scales float32 [groups, 16] likewise; scratch
# PREFILL_SCRATCH_BYTES a lane. touched is set by the job; -1: an id is out of range.
_GIVEN = (
    *("table", "count", "hidden", "intermediate", "ids", "weights", "top_k", "tokens", "x", "x_stride"),
    *("y", "y_stride", "scratch", "up_rows", "down_rows", "touched"),
)
_SPACE = ("experts", "starts", "pair_tokens", "pair_weights", "groups", "scales", "between", "between_scales")
PREFILL = np.dtype([(name, "i8") for name in (*_GIVEN, *_SPACE)])
_PREFILL = numba.from_dtype(PREFILL)


def chunk_rows(rows: int, threads: int) -> int:
    """Rows in a chunk of a matrix: at least eight chunks for each lane, where that leaves enough of them."""
    return max(2 * TILE_ROWS, min(CHUNK, rows // (8 * threads) // TILE_ROWS * TILE_ROWS))


@functools.lru_cache(maxsize=256)
def prefill_offsets(count: int, top_k: int, tokens: int, hidden: int, intermediate: int) -> tuple[int, ...]:
    """Where in one piece of memory the job's own space begins: offsets in bytes in _SPACE's order, then the
    size of it all."""
    pairs = tokens * top_k
    groups = min(pairs, count + pairs // LANES)
    words = (2 * count, 2 * count + 2, 2 * pairs, pairs, 2 * count + 2, tokens,
             groups * intermediate * LANES, groups * LANES)  # fmt: skip
    return tuple(itertools.accumulate((-(-4 * n // 64) * 64 for n in words), initial=0))


@jit
def _count_groups(job: Any) -> None:
    """Each touched expert's first group."""
    starts, groups = integers(job.starts), integers(job.groups)
    groups[0] = 0
    for touched in range(job.touched):
        groups[touched + 1] = groups[touched] + -(-(starts[touched + 1] - starts[touched]) // LANES)


@jit
def _near_one(exponent: int) -> np.float32:
    """2^-exponent, kept such that it and its inverse are normal numbers."""
    return power_of_two(max(min(-exponent, 126), -126))


@jit
def _scale_tokens(job: Any, control: int) -> None:
    """`scales` of the tokens, shared out among the lanes."""
    t = claim(control, 0)
    while t < job.tokens:
        row = as_pointer(job.x + t * job.x_stride, numba.uint32)
        floats(job.scales)[t] = _near_one(largest_exponent(row, job.hidden))
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
def _product(
    data: int, scale: int, columns: int, first: int, rows: int, column: int, count: int,
    scratch: int, groups: int, sums: int,
) -> None:  # fmt: skip
    """sums[r, t] += row `first + r` . token t over `count` columns from `column`, for 16 `groups` tokens whose
    columns are packed. `first` is a multiple of TILE_ROWS."""
    packed, group_bytes, stride = scratch + PACKED, -(-count // STEP) * B_STEP, 4 * TOKENS
    at, last = data + column, first + rows - 1
    for start in range(first, first + rows, TILE_ROWS):
        for r in range(TILE_ROWS):
            row = at + min(start + r, last) * columns
            target = scratch + r // 16 * TILE + r % 16 * 64
            widen_tile_row(row, count, target, row + TILE_ROWS * columns)
        block_scale = scale + 4 * (start // BLOCK * -(-columns // BLOCK) + column // BLOCK)
        out = sums + (start - first) * stride
        for g in range(0, groups - 1, 2):
            b = packed + g * group_bytes
            multiply_tiles(scratch, (b, b + group_bytes), count, block_scale, out + 64 * g, stride)
        if groups % 2:
            g = groups - 1
            multiply_tiles(scratch, (packed + g * group_bytes,), count, block_scale, out + 64 * g, stride)


@jit
def _pack_rows(job: Any, scratch: int, pair: int, end: int, column: int, count: int, target: int) -> None:
    """Columns of 16 pairs' tokens; beyond `end`, of the first again."""
    tokens, scales = integers(job.pair_tokens), floats(job.scales)
    addresses, factors = integers(scratch + ADDRESSES), floats(scratch + FACTORS)
    for n in range(LANES):
        token = tokens[pair + n if pair + n < end else pair]
        addresses[n], factors[n] = job.x + token * job.x_stride, scales[token]
    _turn_columns(scratch + ADDRESSES, column, count, scratch + TURNED)
    pack_tokens(scratch + TURNED, count, scratch + FACTORS, target)


@jit
def _up_chunk(job: Any, scratch: int, touched: int, start: int) -> None:
    """`between` for rows `start` on of one expert's gate and up, and all its tokens."""
    starts, tokens, scales = integers(job.starts), integers(job.pair_tokens), floats(job.scales)
    gate, gate_scale = matrix_of(job, touched, GATE)
    up, up_scale = matrix_of(job, touched, UP)
    rows, end, factors = min(job.up_rows, job.intermediate - start), starts[touched + 1], floats(scratch + FACTORS)
    sums, up_sums = scratch + SUMS, scratch + SUMS + SUMS_BYTES
    group = integers(job.groups)[touched]
    for begin in range(starts[touched], end, TOKENS):
        groups = -(-min(TOKENS, end - begin) // LANES)
        clear(sums, rows * TOKENS)
        clear(up_sums, rows * TOKENS)
        for column in range(0, job.hidden, COLUMNS):
            count = min(COLUMNS, job.hidden - column)
            for g in range(groups):
                target = scratch + PACKED + g * -(-count // STEP) * B_STEP
                _pack_rows(job, scratch, begin + LANES * g, end, column, count, target)
            _product(gate, gate_scale, job.hidden, start, rows, column, count, scratch, groups, sums)
            _product(up, up_scale, job.hidden, start, rows, column, count, scratch, groups, up_sums)
        for g in range(groups):
            for n in range(LANES):
                pair = begin + LANES * g + n
                factors[n] = np.float32(CODES_FACTOR) / scales[tokens[pair if pair < end else begin + LANES * g]]
            target = job.between + 4 * LANES * (group * job.intermediate + start)
            swiglu_tokens(sums + 64 * g, up_sums + 64 * g, 4 * TOKENS, rows, scratch + FACTORS, target)
            group += 1


@jit
def _scale_between(job: Any, control: int) -> None:
    """`between_scales`, shared out among the lanes by groups."""
    group = claim(control, 1)
    while group < integers(job.groups)[job.touched]:
        values = as_pointer(job.between + 4 * LANES * group * job.intermediate, numba.uint32)
        scales = floats(job.between_scales + 4 * LANES * group)
        for n in range(LANES):
            scales[n] = _near_one(largest_exponent(values, job.intermediate, n, LANES))
        group = claim(control, 1)


@jit
def _add_output(
    job: Any, scratch: int, group: int, pair: int, end: int, start: int, rows: int, sums: int
) -> None:
    """y += a group's sums [rows, TOKENS], times its weights."""
    tokens, weights = integers(job.pair_tokens), floats(job.pair_weights)
    scales = floats(job.between_scales + 4 * LANES * group)
    addresses, values = integers(scratch + ADDRESSES), floats(scratch + OUTPUTS)
    for r in range(0, rows, LANES):
        for i in range(LANES):
            addresses[i] = sums + (r + i) * 4 * TOKENS
        transpose_floats(scratch + ADDRESSES, 0, scratch + OUTPUTS)
        for n in range(min(LANES, end - pair)):
            target = floats(job.y + tokens[pair + n] * job.y_stride + 4 * (start + r))
            weight, factor = weights[pair + n], np.float32(CODES_FACTOR) / scales[n]
            for i in range(min(LANES, rows - r)):
                target[i] += weight * (values[n * LANES + i] * factor)


@jit
def _down_chunk(job: Any, scratch: int, start: int) -> None:
    """y for rows `start` on, from all touched experts."""
    starts, sums = integers(job.starts), scratch + SUMS
    rows = min(job.down_rows, job.hidden - start)
    for t in range(job.tokens):
        clear(job.y + t * job.y_stride + 4 * start, rows)
    for touched in range(job.touched):
        data, scale = matrix_of(job, touched, DOWN)
        end, first_group = starts[touched + 1], integers(job.groups)[touched]
        for begin in range(starts[touched], end, TOKENS):
            groups = -(-min(TOKENS, end - begin) // LANES)
            clear(sums, rows * TOKENS)
            for column in range(0, job.intermediate, COLUMNS):
                count = min(COLUMNS, job.intermediate - column)
                for g in range(groups):
                    group = first_group + g
                    pack_tokens(
                        job.between + 4 * LANES * (group * job.intermediate + column), count,
                        job.between_scales + 4 * LANES * group,
                        scratch + PACKED + g * -(-count // STEP) * B_STEP,
                    )  # fmt: skip
                _product(data, scale, job.intermediate, start, rows, column, count, scratch, groups, sums)
            for g in range(groups):
                pair = begin + LANES * g
                _add_output(job, scratch, first_group + g, pair, end, start, rows, sums + 64 * g)
            first_group += groups


def prefill_job(_level: Static) -> Any:
    """One layer's routed experts for all tokens of a call (PREFILL)."""

    def prefill(args: int, lane: int, lanes: int, control: int) -> int:
        job = record(args, _PREFILL)
        scratch = job.scratch + lane * PREFILL_SCRATCH_BYTES
        if lane == 0:
            sort_pairs(job)
            _count_groups(job)
        _scale_tokens(job, control)
        if not barrier(control, lanes, 0) or job.touched < 0:
            return FAILED
        configure_tiles()
        chunks = -(-job.intermediate // job.up_rows)
        number, turn = claim_near(control, lane, 0, job.touched, chunks, 0)
        while number < chunks * job.touched:
            _up_chunk(job, scratch, number // chunks, number % chunks * job.up_rows)
            number, turn = claim_near(control, lane, 0, job.touched, chunks, turn)
        alive = barrier(control, lanes, 1)
        if alive:
            _scale_between(job, control)
            alive = barrier(control, lanes, 2)
        if alive:
            downs = -(-job.hidden // job.down_rows)
            number, turn = claim_near(control, lane, 1, 1, downs, 0)
            while number < downs:
                _down_chunk(job, scratch, number * job.down_rows)
                number, turn = claim_near(control, lane, 1, 1, downs, turn)
        release_tiles()
        return DONE if alive else FAILED

    return compile_job(prefill)
