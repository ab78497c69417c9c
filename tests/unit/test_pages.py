"""Reading ahead: all of a mapped weight comes in, however long, without being touched."""

import ctypes
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.fp8 import Weight
from offload.pages import will_need

ROWS, COLUMNS = 6144, 8192


def resident(weight: Weight) -> float:
    """Share of the weight's pages that are in memory."""
    count = weight.data.nbytes // 4096
    found = np.zeros(count, np.uint8)
    failed = ctypes.CDLL(None).mincore(
        ctypes.c_void_p(weight.data.data_ptr()),
        ctypes.c_size_t(weight.data.nbytes),
        ctypes.c_void_p(found.ctypes.data),
    )
    assert failed == 0
    return float((found & 1).mean())


@pytest.mark.parametrize("nodes", [(0,), (0, 1)])
def test_all_of_a_weight_is_read(tmp_path: Path, nodes: tuple[int, ...]) -> None:
    file = tmp_path / "weight"
    file.write_bytes(np.arange(ROWS * COLUMNS, dtype=np.uint8).tobytes())
    descriptor = os.open(file, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    mapped = np.memmap(file, np.uint8, "c", shape=(ROWS, COLUMNS))
    weight = Weight(torch.from_numpy(mapped).view(torch.float8_e4m3fn))
    if resident(weight) > 0.5:
        pytest.skip("this file system keeps all its pages in memory")
    will_need(weight, nodes)
    deadline = time.monotonic() + 30
    while resident(weight) < 0.999 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert resident(weight) >= 0.999
    assert int(mapped[-1, -1]) == (ROWS * COLUMNS - 1) % 256
