"""The micro-kernels of level `portable`: plain loops, same tiles and blocks as dot.py, any CPU."""

from typing import Any

import numba
import numpy as np

from offload.kernels.dot import BLOCK, ROWS, TILE
from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import jit
from offload.kernels.memory import floats


def _e4m3(code: int) -> float:
    """The value of an e4m3fn code (OCP 8-bit floating point specification, E4M3)."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 512 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


VALUES = np.array([_e4m3(code) for code in range(256)], dtype=np.float32)


@jit
def widen_codes(source: int, columns: int, target: int) -> None:
    codes, values = as_pointer(source, numba.uint8), floats(target)
    for i in range(columns):
        values[i] = VALUES[codes[i]]


@jit
def widen_bf16(source: int, columns: int, target: int) -> None:
    bits, values = as_pointer(source, numba.uint16), as_pointer(target, numba.uint32)
    for i in range(columns):
        values[i] = numba.uint32(bits[i]) << numba.uint32(16)


@jit
def widen_f32(source: int, columns: int, target: int) -> None:
    given, values = floats(source), floats(target)
    for i in range(columns):
        values[i] = given[i]


@jit
def dot_floats(rows: Any, scales: Any, scaled: bool, xs: Any, columns: int, out: int, stride: int) -> None:
    """As `dot_vectors`, for rows of float32; `scaled`: whether `scales` apply."""
    for t in range(len(xs)):
        x, totals = floats(xs[t]), floats(out + 4 * t * stride)
        for r in range(ROWS):
            row, scale = floats(rows[r]), floats(scales[r])
            for tile in range(0, columns, TILE):
                tile_end, total = min(tile + TILE, columns), np.float32(0)
                for start in range(tile, tile_end, BLOCK):
                    part = np.float32(0)
                    for i in range(start, min(start + BLOCK, tile_end)):
                        part += row[i] * x[i]
                    total += part * scale[start // BLOCK] if scaled else part
                totals[r] += total
