"""Activations as the micro-kernels want them, by the form of the weights they meet.

Each token's row is copied once a call: padded with zeros to whole steps and, for interleaved weights, brought
into their order of columns and, for "shift" ones, multiplied by a power of two that makes up for theirs,
which is exact.
`arrange` returns the factor to multiply the token's products by in the end.
"""

from typing import Any

import numba
import numpy as np
from numba.extending import overload, register_jitable

from offload.kernels.forms import INTERLEAVED, step_columns
from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import Static, jit
from offload.kernels.memory import clear, floats

MAX_STEP = step_columns(16)
CODES_EXPONENT = {"shift": -120, "offset": -8}  # weights are value x 2^this


@register_jitable
def padded_columns(columns: int) -> int:
    """float32 in an arranged row of `columns`, whatever the level."""
    return -(-columns // MAX_STEP) * MAX_STEP


@jit
def power_of_two(exponent: int) -> np.float32:
    return np.float32(2.0**exponent)


@jit
def largest_exponent(x: Any, columns: int, first: int = 0, stride: int = 1) -> int:
    """The exponent of the largest magnitude in float32 bits x[first], x[first + stride]...; 0 if all are zeros,
    or for an infinity or NaN."""
    largest = np.uint32(0)
    for i in range(columns):
        largest = max(largest, x[first + i * stride] & np.uint32(0x7FFFFFFF))
    if largest == 0 or largest >= np.uint32(0x7F800000):
        return 0
    return int(largest >> np.uint32(23)) - 127


@jit
def _interleave(source: int, columns: int, target: int, step: int, codes: int) -> np.float32:
    """target[g, j, i] = source[g, i, j] * 2^k over steps g; returns what undoes 2^k and the weights' 2^codes."""
    x, y = floats(source), floats(target)
    exponent = 0
    if codes < -100:  # as near to the weights' own as the row's largest magnitude and a finite 2^-k allow
        largest = largest_exponent(as_pointer(source, numba.uint32), columns)
        exponent = max(min(-codes, 126 - largest), -127 - codes)
    scale, quarter = power_of_two(exponent), step // 4
    whole = columns // step * step
    for begin in range(0, whole, step):
        for j in range(4):
            for i in range(quarter):
                y[begin + j * quarter + i] = x[begin + 4 * i + j] * scale
    if whole < columns:
        clear(target + 4 * whole, step)
        for c in range(whole, columns):
            i, j = (c - whole) // 4, (c - whole) % 4
            y[whole + j * quarter + i] = x[c] * scale
    return power_of_two(-codes - exponent)


@jit
def _copy(source: int, columns: int, target: int, step: int) -> None:
    x, y = floats(source), floats(target)
    for c in range(columns):
        y[c] = x[c]
    clear(target + 4 * columns, -columns % step)


def arrange(level: Static, form: Static, source: int, columns: int, target: int) -> np.float32:
    """Prepare a row for weights of this form; in compiled code only. Returns the products' factor."""
    raise TypeError("arrange runs in compiled code only")


@overload(arrange)
def _arrange(level: Any, form: Any, source: Any, columns: Any, target: Any) -> Any:
    step = step_columns(level.value.width)
    if form.value in INTERLEAVED:
        codes = CODES_EXPONENT[form.value]

        def interleave(level: Any, form: Any, source: Any, columns: Any, target: Any) -> Any:
            return _interleave(source, columns, target, step, codes)

        return interleave
    factor = np.float32(256 if form.value == "half" and level.value.width > 1 else 1)

    def copy(level: Any, form: Any, source: Any, columns: Any, target: Any) -> Any:
        _copy(source, columns, target, step)
        return factor

    return copy
