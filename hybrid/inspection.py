"""What `hybrid inspect` finds in a model directory; reads everything only when asked to."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.config import ModelConfig
from hybrid.loader import ModelFiles, expected_tensors, open_model, open_text
from offload.checkpoint import SCALE_SUFFIX, Checkpoint
from offload.errors import CheckpointError
from offload.shard import AGAIN, TensorInfo

SCAN_BYTES = 1 << 20  # fits the cache, and leaves numpy's temporary arrays off the kernel's hands


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's shape, its sizes by part, and problems that `--full` found. Bytes are those of the files."""

    directory: str
    architecture: dict[str, Any]
    parts: dict[str, dict[str, int]]
    dtypes: dict[str, int]
    total: dict[str, int]
    problems: list[str]
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total["bytes"]}


def inspect_model(
    directory: Path, *, full: bool = False, progress: Callable[[str, float], None] = lambda *_: None
) -> Inspection:
    """Open, check and measure.

    Args:
        full: read every fp8 code; NaN codes become `problems`, one a tensor.

    Raises:
        UsageError: what `open_model` finds wrong: the first problem that keeps the model from running.
    """
    progress("opening the checkpoint", 0.0)
    files = open_model(directory)
    open_text(directory, files.config)
    parts, dtypes = _sizes(files)
    total = {key: sum(part[key] for part in parts.values()) for key in ("tensors", "bytes")}
    problems = _nan_codes(files.checkpoint, progress) if full else []
    verdict = (
        "no problems: every fp8 weight was read"
        if full
        else "no problems (weights not read; --full reads them)"
    )
    return Inspection(str(directory), _architecture(files.config), parts, dtypes, total, problems, verdict)


def _architecture(config: ModelConfig) -> dict[str, Any]:
    shown = asdict(config)
    shown["rope_scaling"] = shown["rope_scaling"] and {
        k: v for k, v in shown["rope_scaling"].items() if k != "type"
    }
    return shown


def _sizes(files: ModelFiles) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """(part -> tensors and bytes, dtype -> bytes); a weight's scales count to its part."""
    parts: dict[str, dict[str, int]] = {}
    dtypes: dict[str, int] = {}
    for name, expected in expected_tensors(files.config).items():
        part = parts.setdefault(expected.kind, {"tensors": 0, "bytes": 0})
        for stored in (name, name + SCALE_SUFFIX):
            if stored not in files.checkpoint:
                continue
            info = files.checkpoint.info(stored)
            part["tensors"] += 1
            part["bytes"] += info.end - info.start
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.end - info.start
    return parts, dtypes


def _nan_codes(checkpoint: Checkpoint, progress: Callable[[str, float], None]) -> list[str]:
    """One line for each fp8 tensor that holds e4m3's NaN, 0x7F or 0xFF; files are read in order, not mapped
    (sequential reads are half again as fast as page faults)."""
    infos = [info for info in map(checkpoint.info, checkpoint.names) if info.dtype == "F8_E4M3"]
    infos.sort(key=lambda info: (info.file, info.start))
    total, done, problems = sum(info.end - info.start for info in infos) or 1, 0, []
    for file, held in groupby(infos, key=lambda info: info.file):
        with file.open("rb", buffering=0) as stream:
            for info in held:
                count, first = _nan_codes_in(stream, info)
                if count:
                    at = [int(i) for i in np.unravel_index(first, info.shape)]
                    problem = f"NaN weights: {count}, the first at {at}"
                    problems.append(str(CheckpointError(problem, file=file, tensor=info.name, remedy=AGAIN)))
                done += info.end - info.start
                progress(f"reading {file.name}", done / total)
    return problems


def _nan_codes_in(stream: FileIO, info: TensorInfo) -> tuple[int, int]:
    """(how many NaN codes the tensor holds, the flat position of the first). Raises CheckpointError if it
    cannot be read whole."""
    count, first = 0, 0
    codes = np.empty(SCAN_BYTES, np.uint8)
    for start in range(info.start, info.end, SCAN_BYTES):
        part = codes[: min(SCAN_BYTES, info.end - start)]
        stream.seek(start)
        try:
            complete = stream.readinto(part.data) == part.size
        except OSError as error:
            raise CheckpointError(
                f"cannot be read ({error.strerror})", file=info.file, tensor=info.name, remedy=AGAIN
            ) from None
        if not complete:
            raise CheckpointError(
                "the file has become shorter", file=info.file, tensor=info.name, remedy=AGAIN
            )
        if _holds_nan(part):
            positions = np.flatnonzero((part & 0x7F) == 0x7F)
            first = first if count else start - info.start + int(positions[0])
            count += len(positions)
    return count, first


def _holds_nan(codes: NDArray[np.uint8]) -> bool:
    """Eight codes at a time: adding 1 to a code's seven low bits carries into the eighth only from 0x7F."""
    words = codes[: codes.size // 8 * 8].view(np.uint64) & np.uint64(0x7F7F7F7F7F7F7F7F)
    words += np.uint64(0x0101010101010101)
    carries = int(np.bitwise_or.reduce(words)) & 0x8080808080808080
    return carries != 0 or bool(((codes[codes.size // 8 * 8 :] & 0x7F) == 0x7F).any())
