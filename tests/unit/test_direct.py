"""offload/direct.py: what is written is what was given, in pieces of any size, on any file system."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload import direct
from offload.direct import BUFFER_BYTES, DirectWriter


@pytest.mark.parametrize(
    "size", [0, 1, 4096, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES + 5]
)
@pytest.mark.parametrize("piece", [1 << 20, 3_000_001])
def test_written_bytes_are_those_given(tmp_path: Path, size: int, piece: int) -> None:
    content = np.random.default_rng(0).bytes(size)
    with DirectWriter(tmp_path / "file") as writer:
        for begin in range(0, size, piece):
            writer.write(memoryview(content)[begin : begin + piece])
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def open_indirect(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(direct.os, "open", open_indirect)
    with DirectWriter(tmp_path / "file") as writer:
        writer.write(memoryview(b"abc"))
    assert (tmp_path / "file").read_bytes() == b"abc"
