"""The job for one layer's routed experts: gate, up, SwiGLU, then down with the router's weights.

Works on pairs of (expert, token), which lane 0 first sorts by expert. Then a chunk is some rows of one
expert's gate and up, which give as many hidden values of each of its tokens. Then a chunk is some rows of the
output: one lane adds up all experts' contributions to them, by ascending expert, so a token's sum has one
order whatever the batch or the number of lanes. Before each, the activations are arranged (arrange.py). Every
lane knows what it reads next, across chunks and phases, and prefetches it.
"""

import functools
import itertools
import math
from typing import Any

import numba
import numpy as np

from offload.kernels.arrange import padded_columns
from offload.kernels.jit import DONE, FAILED, Static, compile_job, jit
from offload.kernels.linear import (
    ADDRESSES,
    OUTPUT_BYTES,
    OUTPUTS,
    SCRATCH_BYTES,
    TOKENS,
    arrange_for,
)
from offload.kernels.memory import clear, floats, integers, record
from offload.kernels.project import project
from offload.workers import barrier, claim, claim_near

UP_ROWS = 64  # rows of gate, and of up, in a chunk
DOWN_ROWS = 128  # the most rows of the output in a chunk

# An expert's row of the address table: data and scale of gate, up, down.
GATE, UP, DOWN = 0, 2, 4
TABLE_COLUMNS = 6

# Addresses: table int64 [count, 6]; ids int64 and weights float32 [tokens, top_k]; x, y float32 with row
# strides in bytes. Space for the job itself: experts int64 [count] (the touched ones, ascending), starts
# int64 [count + 1] (of each one's pairs), pair_tokens int64 [pairs] and, float32, pair_weights [pairs],
# arranged [tokens, padded_columns(hidden)], factors [tokens], between [pairs, intermediate],
# between_arranged [pairs, padded_columns(intermediate)], between_factors [pairs]; scratch SCRATCH_BYTES a
# lane. numbers: formats of gate and up, and of down. touched is set by the job; -1: an id is out of range.
_GIVEN = (
    *("table", "count", "up_number", "down_number", "hidden", "intermediate", "ids", "weights", "top_k"),
    *("tokens", "x", "x_stride", "y", "y_stride", "scratch", "project", "down_rows", "touched"),
)
_SPACE = ("experts", "starts", "pair_tokens", "pair_weights", "arranged", "factors", "between", "between_arranged",
          "between_factors")  # fmt: skip
EXPERTS = np.dtype([(name, "i8") for name in (*_GIVEN, *_SPACE)])
_EXPERTS = numba.from_dtype(EXPERTS)


def down_rows(hidden: int, threads: int) -> int:
    """Rows of the output in a chunk: fewer where many lanes share them, so that all end at about the same time."""
    return max(16, min(DOWN_ROWS, hidden // (8 * threads) // 4 * 4))


@functools.lru_cache(maxsize=256)
def space_offsets(count: int, top_k: int, tokens: int, hidden: int, intermediate: int) -> tuple[int, ...]:
    """Where in one piece of memory the job's own space begins: offsets in bytes in _SPACE's order, then the
    size of it all."""
    pairs = tokens * top_k
    words = (2 * count, 2 * count + 2, 2 * pairs, pairs, tokens * padded_columns(hidden), tokens,
             pairs * intermediate, pairs * padded_columns(intermediate), pairs)  # fmt: skip
    return tuple(itertools.accumulate((-(-4 * n // 64) * 64 for n in words), initial=0))


@jit
def sort_pairs(job: Any) -> None:
    """Find the touched experts and each one's pairs, in the tokens' order."""
    ids, weights = integers(job.ids), floats(job.weights)
    experts, starts = integers(job.experts), integers(job.starts)
    pair_tokens, pair_weights = integers(job.pair_tokens), floats(job.pair_weights)
    pairs = job.tokens * job.top_k
    for e in range(job.count):
        experts[e] = 0
    for i in range(pairs):
        if not 0 <= ids[i] < job.count:
            job.touched = -1
            return
        experts[ids[i]] += 1
    begin = 0
    for e in range(job.count):  # experts: from counts to each one's next place
        counted = experts[e]
        experts[e] = begin
        begin += counted
    for i in range(pairs):
        place = experts[ids[i]]
        experts[ids[i]] = place + 1
        pair_tokens[place], pair_weights[place] = i // job.top_k, weights[i]
    touched, begin = 0, 0
    for e in range(job.count):  # and from ends to the touched ones
        end = experts[e]
        if end > begin:
            experts[touched], starts[touched] = e, begin
            touched, begin = touched + 1, end
    starts[touched] = pairs
    job.touched = touched


@jit
def matrix_of(job: Any, touched: int, which: int) -> tuple[int, int]:
    """Addresses of a touched expert's matrix and of its scales."""
    expert = integers(job.experts)[touched]
    row = integers(job.table + expert * TABLE_COLUMNS * 8)
    return row[which], row[which + 1]


@jit
def _swiglu(gate: np.float32, up: np.float32) -> np.float32:
    return gate / (np.float32(1) + math.exp(-gate)) * up


@jit
def _up_chunk(job: Any, scratch: int, touched: int, start: int, after: int) -> None:
    """`between` for rows `start` on of one expert's gate and up, and all its tokens."""
    starts = integers(job.starts)
    pair_tokens = integers(job.pair_tokens)
    factors = floats(job.factors)
    gate, gate_scale = matrix_of(job, touched, GATE)
    up, up_scale = matrix_of(job, touched, UP)
    rows = min(UP_ROWS, job.intermediate - start)
    padded, x_bytes = (rows + 3) // 4 * 4, 4 * padded_columns(job.hidden)
    xs, gate_out, up_out = scratch + ADDRESSES, scratch + OUTPUTS, scratch + OUTPUTS + OUTPUT_BYTES
    gates, ups = floats(gate_out), floats(up_out)
    up_rows = up + (start * job.hidden << job.up_number)
    for begin in range(starts[touched], starts[touched + 1], TOKENS):
        tokens = min(TOKENS, starts[touched + 1] - begin)
        for t in range(tokens):
            integers(xs)[t] = job.arranged + pair_tokens[begin + t] * x_bytes
        project(
            job.project, job.up_number, gate, gate_scale, job.hidden, start, rows,
            xs, tokens, gate_out, padded, scratch, up_rows,
        )  # fmt: skip
        project(
            job.project, job.up_number, up, up_scale, job.hidden, start, rows,
            xs, tokens, up_out, padded, scratch, after,
        )  # fmt: skip
        for t in range(tokens):
            target = floats(job.between + 4 * ((begin + t) * job.intermediate + start))
            factor = factors[pair_tokens[begin + t]]
            for r in range(rows):
                target[r] = _swiglu(gates[t * padded + r] * factor, ups[t * padded + r] * factor)


@jit
def _down_rows(job: Any, touched: int, start: int) -> int:
    """Address of rows `start` on of a touched expert's down."""
    return matrix_of(job, touched, DOWN)[0] + (start * job.intermediate << job.down_number)


@jit
def _down_chunk(job: Any, scratch: int, start: int, after: int) -> None:
    """y for rows `start` on, from all touched experts."""
    starts = integers(job.starts)
    pair_tokens = integers(job.pair_tokens)
    pair_weights = floats(job.pair_weights)
    factors = floats(job.between_factors)
    rows = min(job.down_rows, job.hidden - start)
    padded, x_bytes = (rows + 3) // 4 * 4, 4 * padded_columns(job.intermediate)
    xs, out = scratch + ADDRESSES, scratch + OUTPUTS
    values = floats(out)
    for t in range(job.tokens):
        clear(job.y + t * job.y_stride + 4 * start, rows)
    for touched in range(job.touched):
        data, scale = matrix_of(job, touched, DOWN)
        following = _down_rows(job, touched + 1, start) if touched + 1 < job.touched else after
        for begin in range(starts[touched], starts[touched + 1], TOKENS):
            tokens = min(TOKENS, starts[touched + 1] - begin)
            for t in range(tokens):
                integers(xs)[t] = job.between_arranged + (begin + t) * x_bytes
            project(
                job.project, job.down_number, data, scale, job.intermediate, start, rows,
                xs, tokens, out, padded, scratch, following,
            )  # fmt: skip
            for t in range(tokens):
                target = floats(job.y + pair_tokens[begin + t] * job.y_stride + 4 * start)
                weight, factor = pair_weights[begin + t], factors[begin + t]
                for r in range(rows):
                    target[r] += weight * (values[t * padded + r] * factor)


@jit
def _arrange_rows(
    level: Static,
    number: int,
    x: Any,
    x_stride: int,
    count: int,
    columns: int,
    arranged: int,
    factors: int,
    control: int,
    counter: int,
) -> None:
    """Arrange rows shared out among the lanes."""
    row = claim(control, counter)
    while row < count:
        target = arranged + row * 4 * padded_columns(columns)
        floats(factors)[row] = arrange_for(level, number, x + row * x_stride, columns, target)
        row = claim(control, counter)


def experts_job(level: Static) -> Any:
    """One layer's routed experts for all tokens of a call (EXPERTS)."""

    def experts(args: int, lane: int, lanes: int, control: int) -> int:
        job = record(args, _EXPERTS)
        scratch = job.scratch + lane * SCRATCH_BYTES
        if lane == 0:
            sort_pairs(job)
        _arrange_rows(
            level, job.up_number, job.x, job.x_stride, job.tokens, job.hidden, job.arranged, job.factors, control, 0
        )  # fmt: skip
        if not barrier(control, lanes, 0) or job.touched < 0:
            return FAILED
        downs = -(-job.hidden // job.down_rows)
        first_down, down_turn = claim_near(control, lane, 1, 1, downs, 0)
        down = first_down * job.down_rows
        chunks = -(-job.intermediate // UP_ROWS)
        count = chunks * job.touched
        number, turn = claim_near(control, lane, 0, job.touched, chunks, 0)
        while number < count:
            following, turn = claim_near(control, lane, 0, job.touched, chunks, turn)
            if following < count:
                after = matrix_of(job, following // chunks, GATE)[0]
                after += following % chunks * UP_ROWS * job.hidden << job.up_number
            else:
                after = _down_rows(job, 0, min(down, job.hidden - 1))
            _up_chunk(job, scratch, number // chunks, number % chunks * UP_ROWS, after)
            number = following
        if not barrier(control, lanes, 1):
            return FAILED
        pairs = integers(job.starts)[job.touched]
        _arrange_rows(
            level, job.down_number, job.between, 4 * job.intermediate, pairs, job.intermediate,
            job.between_arranged, job.between_factors, control, 1,
        )  # fmt: skip
        if not barrier(control, lanes, 2):
            return FAILED
        while down < job.hidden:
            next_down, down_turn = claim_near(control, lane, 1, 1, downs, down_turn)
            following = next_down * job.down_rows
            _down_chunk(job, scratch, down, _down_rows(job, 0, min(following, job.hidden - 1)))
            down = following
        return DONE

    return compile_job(experts)
