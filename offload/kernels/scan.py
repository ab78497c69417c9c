"""The job that looks for e4m3's NaN codes, 0x7F and 0xFF, in ranges of bytes: as fast as they can be read."""

from typing import Any

import numba
import numpy as np
from numba import carray

from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import DONE, compile_job, jit
from offload.workers import claim

CHUNK = 1 << 20  # bytes a lane takes at a time

SCAN = np.dtype([(name, "i8") for name in ("count", "ranges", "found")])
"""Addresses: ranges int64 [count, 2] (address, bytes, at most CHUNK), found uint8 [count]: set to 1 or 0."""

_SCAN = numba.from_dtype(SCAN)


@jit
def _holds_nan(address: int, nbytes: int) -> bool:
    """Adding 1 to a code's seven low bits carries into the eighth only from 0x7F."""
    low, one = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x0101010101010101)
    words = carray(as_pointer(address, numba.uint64), nbytes // 8)
    seen = np.uint64(0)
    for i in range(len(words)):
        seen |= (words[i] & low) + one
    codes = carray(as_pointer(address, numba.uint8), nbytes)
    for i in range(nbytes // 8 * 8, nbytes):
        seen |= np.uint64((codes[i] & 0x7F) + 1)
    return seen & np.uint64(0x8080808080808080) != 0


def scan_job() -> Any:
    """found[i] = whether range i holds a NaN code."""

    def scan(args: int, lane: int, lanes: int, control: int) -> int:
        job = carray(as_pointer(args, _SCAN), 1)[0]
        ranges = carray(as_pointer(job.ranges, numba.int64), (job.count, 2))
        found = carray(as_pointer(job.found, numba.uint8), job.count)
        while True:
            number = claim(control, 0)
            if number >= job.count:
                return DONE
            found[number] = _holds_nan(ranges[number, 0], ranges[number, 1])

    return compile_job(scan)
