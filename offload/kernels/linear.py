"""Jobs for one matrix at a time: linear layers, and the two products of absorbed latent attention."""

from typing import Any

import numba
import numpy as np

from offload.kernels.arrange import MAX_STEP, arrange, padded_columns
from offload.kernels.dot import BLOCK, ROWS
from offload.kernels.forms import BF16, HALVES, PLAIN
from offload.kernels.jit import DONE, FAILED, OPTIONS, Static, compile_job, jit
from offload.kernels.memory import clear, floats, integers, record
from offload.kernels.project import BF16_NUMBER, FP8_NUMBER, TILE_BYTES, codes_form, project, widen
from offload.workers import barrier, claim, claim_near

TOKENS = 96  # tokens a lane takes at a time: bounds its scratch and keeps their activations in L2
CHUNK = 128  # the most rows in a chunk

# A lane's scratch: the widened tile, the tokens' addresses, two outputs [TOKENS, CHUNK].
ADDRESSES = TILE_BYTES
OUTPUTS = ADDRESSES + TOKENS * 8
OUTPUT_BYTES = TOKENS * CHUNK * 4
ABSORBED = 64  # or, in the absorbed product: ROWS coefficients, then ROWS widened rows
SCRATCH_BYTES = -(-(OUTPUTS + 2 * OUTPUT_BYTES) // 4096) * 4096 + 4096

MAX_ABSORBED_COLUMNS = (SCRATCH_BYTES - ABSORBED) // (4 * ROWS) // MAX_STEP * MAX_STEP

# One product per group (attention head): y[t, g] = weight[g * group_rows + first :][:rows] x[t, g].
# Strides are in bytes; rows counts a group's rows. arranged is float32 [tokens, groups,
# padded_columns(columns)] and factors float32 [tokens, groups]: space for the job itself.
LINEAR = np.dtype(
    [
        *((name, "i8") for name in ("number", "data", "scale", "rows", "columns")),
        *((name, "i8") for name in ("groups", "group_rows", "first", "chunk", "tokens")),
        *((name, "i8") for name in ("x", "x_stride", "x_group", "y", "y_stride", "y_group")),
        *((name, "i8") for name in ("arranged", "factors", "scratch", "project")),
    ]
)
_LINEAR = numba.from_dtype(LINEAR)


@jit
def arrange_for(level: Static, number: int, source: int, columns: int, target: int) -> Any:
    """Prepare a row for a matrix of format `number` (arrange.py); returns the products' factor."""
    if number == FP8_NUMBER:
        return arrange(level, codes_form(level), source, columns, target)
    return arrange(level, PLAIN, source, columns, target)


@jit
def _linear_chunk(job: Any, scratch: int, number: int, next_number: int) -> None:
    """Chunk `number` of all groups' chunks; `next_number` is the one this lane takes next."""
    chunks = -(-job.rows // job.chunk)
    group, start = number // chunks, number % chunks * job.chunk
    rows = min(job.chunk, job.rows - start)
    first = group * job.group_rows + job.first + start
    row_bytes = job.columns << job.number
    after = (
        job.data
        + (next_number // chunks * job.group_rows + job.first + next_number % chunks * job.chunk) * row_bytes
    )
    padded, arranged_bytes = (rows + 3) // 4 * 4, 4 * padded_columns(job.columns)
    xs, values, factors = integers(scratch + ADDRESSES), floats(scratch + OUTPUTS), floats(job.factors)
    for begin in range(0, job.tokens, TOKENS):
        tokens = min(TOKENS, job.tokens - begin)
        for t in range(tokens):
            xs[t] = job.arranged + ((begin + t) * job.groups + group) * arranged_bytes
        project(
            job.project, job.number, job.data, job.scale, job.columns, first, rows,
            scratch + ADDRESSES, tokens, scratch + OUTPUTS, padded, scratch, after,
        )  # fmt: skip
        for t in range(tokens):
            target = floats(job.y + (begin + t) * job.y_stride + group * job.y_group + 4 * start)
            factor = factors[(begin + t) * job.groups + group]
            for r in range(rows):
                target[r] = values[t * padded + r] * factor


def linear_job(level: Static) -> Any:
    """y = x W^T of every group, shared out by chunks of rows."""

    def linear(args: int, lane: int, lanes: int, control: int) -> int:
        job = record(args, _LINEAR)
        number, count = claim(control, 0), job.tokens * job.groups
        while number < count:
            token, group = number // job.groups, number % job.groups
            x = job.x + token * job.x_stride + group * job.x_group
            target = job.arranged + number * 4 * padded_columns(job.columns)
            floats(job.factors)[number] = arrange_for(level, job.number, x, job.columns, target)
            number = claim(control, 0)
        if not barrier(control, lanes, 0):
            return FAILED
        chunks = -(-job.rows // job.chunk)
        count = chunks * job.groups
        number, turn = claim_near(control, lane, 0, job.groups, chunks, 0)
        while number < count:
            following, turn = claim_near(control, lane, 0, job.groups, chunks, turn)
            _linear_chunk(job, job.scratch + lane * SCRATCH_BYTES, number, min(following, count - 1))
            number = following
        return DONE

    return compile_job(linear)


@jit
def _widen_row(level: Static, number: int, data: int, row: int, columns: int, target: int) -> None:
    """A row's weights as float32 in natural order, codes in the scaling of form "half"."""
    at = data + (row * columns << number)
    if number == FP8_NUMBER:
        widen(level, HALVES, at, columns, target, at)
    elif number == BF16_NUMBER:
        widen(level, BF16, at, columns, target, at)
    else:
        widen(level, PLAIN, at, columns, target, at)


@numba.njit(**OPTIONS, fastmath={"contract"})
def _add_rows(weights: int, stride: int, factors: Any, count: int, out: Any, width: int) -> None:
    """out += factors[i] * row i of `weights` for up to four rows `stride` bytes apart, added in order."""
    a, b = floats(weights), floats(weights + stride)
    c, d = floats(weights + 2 * stride), floats(weights + 3 * stride)
    if count == ROWS:
        p, q, r, s = factors[0], factors[1], factors[2], factors[3]
        for j in range(width):
            out[j] = out[j] + p * a[j] + q * b[j] + r * c[j] + s * d[j]
        return
    for i in range(count):
        row, factor = floats(weights + i * stride), factors[i]
        for j in range(width):
            out[j] = out[j] + factor * row[j]


@jit
def _absorb_group(level: Static, codes_factor: Any, job: Any, scratch: int, group: int) -> None:
    across, stride = -(-job.columns // BLOCK), 4 * padded_columns(job.columns)
    weights, factors = scratch + ABSORBED, floats(scratch)
    for t in range(job.tokens):
        clear(job.y + t * job.y_stride + group * job.y_group, job.columns)
    for start in range(0, job.rows, ROWS):
        count = min(ROWS, job.rows - start)
        first = group * job.group_rows + job.first + start
        for i in range(count):
            _widen_row(level, job.number, job.data, first + i, job.columns, weights + i * stride)
        for t in range(job.tokens):
            x = floats(job.x + t * job.x_stride + group * job.x_group)
            y = job.y + t * job.y_stride + group * job.y_group
            for begin in range(0, job.columns, BLOCK):
                for i in range(count):
                    factors[i] = x[start + i]
                    if job.number == FP8_NUMBER:
                        scales = floats(job.scale + (first + i) // BLOCK * across * 4)
                        factors[i] = factors[i] * (scales[begin // BLOCK] * codes_factor)
                width = min(BLOCK, job.columns - begin)
                _add_rows(weights + 4 * begin, stride, factors, count, floats(y + 4 * begin), width)


def absorb_job(level: Static) -> Any:
    """y[t, g] = x[t, g] W_g, the sum of a group's rows weighted by x; shared out by groups.

    Rows are added in order, so a token's result does not depend on the others.
    """
    factor = np.float32(256 if level.value.width > 1 else 1)  # what form "half" leaves to the scale

    def absorb(args: int, lane: int, lanes: int, control: int) -> int:
        job = record(args, _LINEAR)
        while True:
            group = claim(control, 0)
            if group >= job.groups:
                return DONE
            _absorb_group(level, factor, job, job.scratch + lane * SCRATCH_BYTES, group)

    return compile_job(absorb)
