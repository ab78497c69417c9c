"""The job for one fp8 matrix and many tokens, on AMX tiles (tile_product.py): linear layers in prefill."""

from typing import Any

import numba
import numpy as np

from offload.kernels.jit import DONE, FAILED, Static, compile_job, jit
from offload.kernels.memory import floats, record
from offload.kernels.tile_product import (
    OUTPUTS,
    SUMS,
    TILES_BYTES,
    TOKENS,
    clear_sums,
    group_count,
    pack_rows,
    packed_at,
    packed_columns,
    point_at,
    product,
    scale_tokens,
    turn_sums,
)
from offload.kernels.tiles import CODES_FACTOR, LANES, configure_tiles, release_tiles
from offload.workers import barrier, claim_near

# y = x W^T. Addresses, and row strides in bytes; scales float32 [tokens] is space for the job itself; order:
# int64 0, 1, ... tokens - 1; scratch TILES_BYTES a lane; chunk: rows of the matrix a lane takes at a time.
TILE_LINEAR = np.dtype(
    [
        *((name, "i8") for name in ("data", "scale", "rows", "columns", "chunk", "tokens", "x", "x_stride")),
        *((name, "i8") for name in ("y", "y_stride", "scales", "order", "scratch")),
    ]
)
_TILE_LINEAR = numba.from_dtype(TILE_LINEAR)


@jit
def _write_output(job: Any, scratch: int, token: int, start: int, rows: int, sums: int) -> None:
    """y of 16 tokens for rows `start` on."""
    scales, values = floats(job.scales), floats(scratch + OUTPUTS)
    for r in range(0, rows, LANES):
        turn_sums(scratch, sums, r)
        for n in range(min(LANES, job.tokens - token)):
            target = floats(job.y + (token + n) * job.y_stride + 4 * (start + r))
            factor = np.float32(CODES_FACTOR) / scales[token + n]
            for i in range(min(LANES, rows - r)):
                target[i] = values[n * LANES + i] * factor


@jit
def _chunk(job: Any, scratch: int, start: int, after: int) -> None:
    """y for rows `start` on; `after` is the row that this lane reads next."""
    rows, sums, at = min(job.chunk, job.rows - start), scratch + SUMS, job.data + start * job.columns
    for begin in range(0, job.tokens, TOKENS):
        groups = group_count(min(TOKENS, job.tokens - begin))
        clear_sums(sums, rows)
        width = packed_columns(groups)
        for column in range(0, job.columns, width):
            count = min(width, job.columns - column)
            for g in range(groups):
                point_at(scratch, job.x, job.x_stride, job.scales, job.order, begin + LANES * g, job.tokens)
                pack_rows(scratch, column, count, packed_at(scratch, g, count))
            following = (
                at + column + width if column + width < job.columns else job.data + after * job.columns
            )
            product(
                job.data, job.scale, job.columns, start, rows, column, count, scratch, groups, sums, following
            )
        for g in range(groups):
            _write_output(job, scratch, begin + LANES * g, start, rows, sums + 64 * g)


def tile_linear_job(_level: Static) -> Any:
    """y = x W^T for all tokens of a call (TILE_LINEAR)."""

    def tile_linear(args: int, lane: int, lanes: int, control: int) -> int:
        job = record(args, _TILE_LINEAR)
        scale_tokens(job.x, job.x_stride, job.tokens, job.columns, job.scales, control)
        if not barrier(control, lanes, 0):
            return FAILED
        configure_tiles()
        chunks = -(-job.rows // job.chunk)
        number, turn = claim_near(control, lane, 0, 1, chunks, 0)
        while number < chunks:
            following, turn = claim_near(control, lane, 0, 1, chunks, turn)
            after = min(following, chunks - 1) * job.chunk
            _chunk(job, job.scratch + lane * TILES_BYTES, number * job.chunk, after)
            number = following
        release_tiles()
        return DONE

    return compile_job(tile_linear)
