"""Memory at an address, as compiled code sees it: pointers that are indexed like arrays, unchecked."""

from typing import Any

import numba
from numba import carray

from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import jit


@jit
def floats(address: int) -> Any:
    """float32 values."""
    return as_pointer(address, numba.float32)


@jit
def integers(address: int) -> Any:
    """int64 values."""
    return as_pointer(address, numba.int64)


@jit
def record(address: int, dtype: Any) -> Any:
    """One record of a Numba record type."""
    return carray(as_pointer(address, dtype), 1)[0]


@jit
def clear(address: int, count: int) -> None:
    """Set `count` float32 to zero."""
    values = floats(address)
    for i in range(count):
        values[i] = 0
