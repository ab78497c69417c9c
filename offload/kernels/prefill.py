"""The job for one layer's routed experts when many tokens pass at once, on AMX tiles (tile_product.py).

As experts.py: pairs sorted by expert, chunks of gate and up, then chunks of the output, to which one lane adds all
experts' contributions by ascending expert. A token's result does not depend on the others: its sums are its own,
in one order of columns.
"""

import functools
import itertools
from typing import Any

import numba
import numpy as np

from offload.kernels.arrange import largest_exponent
from offload.kernels.experts import DOWN, GATE, UP, matrix_of, sort_pairs
from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import DONE, FAILED, Static, compile_job, jit
from offload.kernels.memory import clear, floats, integers, record
from offload.kernels.tile_product import (
    FACTORS,
    OUTPUTS,
    SUMS,
    SUMS_BYTES,
    TILES_BYTES,
    TOKENS,
    clear_sums,
    group_count,
    lift,
    pack_rows,
    packed_at,
    packed_columns,
    point_at,
    product,
    scale_tokens,
    turn_sums,
)
from offload.kernels.tiles import (
    CODES_FACTOR,
    LANES,
    configure_tiles,
    pack_tokens,
    release_tiles,
    swiglu_tokens,
)
from offload.workers import barrier, claim, claim_near

# Addresses: table int64 [count, 6]; ids int64 and weights float32 [tokens, top_k]; x, y float32 with row strides in
# bytes. Space for the job itself: experts, starts, pair_tokens, pair_weights as in experts.py; groups int64
# [count + 1], each touched expert's first group of 16 pairs; scales float32 [tokens], what x is times when packed;
# between float32 [groups, intermediate, 16] and between_scales float32 [groups, 16] likewise; scratch TILES_BYTES a
# lane. touched is set by the job; -1: an id is out of range.
_GIVEN = (
    *("table", "count", "hidden", "intermediate", "ids", "weights", "top_k", "tokens", "x", "x_stride"),
    *("y", "y_stride", "scratch", "up_rows", "down_rows", "touched"),
)
_SPACE = ("experts", "starts", "pair_tokens", "pair_weights", "groups", "scales", "between", "between_scales")
PREFILL = np.dtype([(name, "i8") for name in (*_GIVEN, *_SPACE)])
_PREFILL = numba.from_dtype(PREFILL)


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
        groups[touched + 1] = groups[touched] + group_count(starts[touched + 1] - starts[touched])


@jit
def _up_chunk(job: Any, scratch: int, touched: int, start: int, after: int) -> None:
    """`between` for rows `start` on of one expert's gate and up, and all its tokens."""
    starts = integers(job.starts)
    gate, gate_scale = matrix_of(job, touched, GATE)
    up, up_scale = matrix_of(job, touched, UP)
    rows, end = min(job.up_rows, job.intermediate - start), starts[touched + 1]
    sums, up_sums, at = scratch + SUMS, scratch + SUMS + SUMS_BYTES, start * job.hidden
    group = integers(job.groups)[touched]
    for begin in range(starts[touched], end, TOKENS):
        groups = group_count(min(TOKENS, end - begin))
        clear_sums(sums, rows)
        clear_sums(up_sums, rows)
        width = packed_columns(groups)
        for column in range(0, job.hidden, width):
            count = min(width, job.hidden - column)
            for g in range(groups):
                point_at(scratch, job.x, job.x_stride, job.scales, job.pair_tokens, begin + LANES * g, end)
                pack_rows(scratch, column, count, packed_at(scratch, g, count))
            product(
                gate, gate_scale, job.hidden, start, rows, column, count, scratch, groups, sums,
                up + at + column,
            )  # fmt: skip
            following = gate + at + column + width if column + width < job.hidden else after
            product(up, up_scale, job.hidden, start, rows, column, count, scratch, groups, up_sums, following)
        for g in range(groups):
            point_at(scratch, job.x, job.x_stride, job.scales, job.pair_tokens, begin + LANES * g, end)
            factors = floats(scratch + FACTORS)
            for n in range(LANES):
                factors[n] = np.float32(CODES_FACTOR) / factors[n]
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
            scales[n] = lift(largest_exponent(values, job.intermediate, n, LANES))
        group = claim(control, 1)


@jit
def _add_output(
    job: Any, scratch: int, group: int, pair: int, end: int, start: int, rows: int, sums: int
) -> None:
    """y += a group's sums [rows, TOKENS], times its weights."""
    tokens, weights = integers(job.pair_tokens), floats(job.pair_weights)
    scales = floats(job.between_scales + 4 * LANES * group)
    values = floats(scratch + OUTPUTS)
    for r in range(0, rows, LANES):
        turn_sums(scratch, sums, r)
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
        after = matrix_of(job, min(touched + 1, job.touched - 1), DOWN)[0] + start * job.intermediate
        end, group = starts[touched + 1], integers(job.groups)[touched]
        for begin in range(starts[touched], end, TOKENS):
            groups = group_count(min(TOKENS, end - begin))
            clear_sums(sums, rows)
            width = packed_columns(groups)
            for column in range(0, job.intermediate, width):
                count = min(width, job.intermediate - column)
                for g in range(groups):
                    values = job.between + 4 * LANES * ((group + g) * job.intermediate + column)
                    scales = job.between_scales + 4 * LANES * (group + g)
                    pack_tokens(values, count, scales, packed_at(scratch, g, count))
                following = data + start * job.intermediate + column + width
                product(
                    data, scale, job.intermediate, start, rows, column, count, scratch, groups, sums,
                    following if column + width < job.intermediate else after,
                )  # fmt: skip
            for g in range(groups):
                _add_output(job, scratch, group + g, begin + LANES * g, end, start, rows, sums + 64 * g)
            group += groups


def prefill_job(_level: Static) -> Any:
    """One layer's routed experts for all tokens of a call (PREFILL)."""

    def prefill(args: int, lane: int, lanes: int, control: int) -> int:
        job = record(args, _PREFILL)
        scratch = job.scratch + lane * TILES_BYTES
        if lane == 0:
            sort_pairs(job)
            _count_groups(job)
        scale_tokens(job.x, job.x_stride, job.tokens, job.hidden, job.scales, control)
        if not barrier(control, lanes, 0) or job.touched < 0:
            return FAILED
        configure_tiles()
        chunks = -(-job.intermediate // job.up_rows)
        number, turn = claim_near(control, lane, 0, job.touched, chunks, 0)
        count = chunks * job.touched
        while number < count:
            following, turn = claim_near(control, lane, 0, job.touched, chunks, turn)
            near = min(following, count - 1)
            after = matrix_of(job, near // chunks, GATE)[0] + near % chunks * job.up_rows * job.hidden
            _up_chunk(job, scratch, number // chunks, number % chunks * job.up_rows, after)
            number = following
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
