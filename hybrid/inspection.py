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

NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F8_E4M3": (np.uint8, 0x7F),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
}
"""Bits that are all set in a value which is NaN or infinite (e4m3 has only NaN), as an integer of its size."""


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
        full: read every weight; NaN and infinite values become `problems`, one a tensor.

    Raises:
        UsageError: what `open_model` finds wrong: the first problem that keeps the model from running.
    """
    progress("opening the checkpoint", 0.0)
    files = open_model(directory)
    open_text(directory, files.config)
    parts, dtypes = _sizes(files)
    total = {key: sum(part[key] for part in parts.values()) for key in ("tensors", "bytes")}
    problems = _damaged(files.checkpoint, progress) if full else []
    if problems:
        verdict = f"damaged tensors: {len(problems)}"
    elif full:
        verdict = "no problems: every weight was read"
    else:
        verdict = "no problems (weights not read; --full reads them)"
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


def _damaged(checkpoint: Checkpoint, progress: Callable[[str, float], None]) -> list[str]:
    """One line for each tensor that holds NaN or infinite values; files are read in order, not mapped (sequential
    reads are half again as fast as page faults)."""
    infos = [info for info in map(checkpoint.info, checkpoint.names) if info.dtype in NOT_FINITE]
    infos.sort(key=lambda info: (info.file, info.start))
    total, done, problems = sum(info.end - info.start for info in infos) or 1, 0, []
    for file, held in groupby(infos, key=lambda info: info.file):
        with file.open("rb", buffering=0) as stream:
            for info in held:
                count, first = _not_finite_in(stream, info)
                if count:
                    what = "NaN" if info.dtype == "F8_E4M3" else "NaN or infinite"
                    at = [int(i) for i in np.unravel_index(first, info.shape)]
                    problem = f"{what} weights: {count}, the first at {at}"
                    problems.append(str(CheckpointError(problem, file=file, tensor=info.name, remedy=AGAIN)))
                done += info.end - info.start
                progress(f"reading {file.name}", done / total)
    return problems


def _not_finite_in(stream: FileIO, info: TensorInfo) -> tuple[int, int]:
    """(how many values are NaN or infinite, the flat position of the first). Raises CheckpointError if the
    tensor cannot be read whole."""
    dtype, mask = NOT_FINITE[info.dtype]
    count, first = 0, 0
    buffer = np.empty(SCAN_BYTES, np.uint8)
    for start in range(info.start, info.end, SCAN_BYTES):
        part = buffer[: min(SCAN_BYTES, info.end - start)]
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
        codes = part.view(dtype)
        if _any_has_all(codes, mask):
            positions = np.flatnonzero((codes & mask) == mask)
            first = first if count else (start - info.start) // codes.itemsize + int(positions[0])
            count += len(positions)
    return count, first


def _any_has_all(codes: NDArray[np.unsignedinteger[Any]], mask: int) -> bool:
    """Whether a code has all bits of `mask`, which end below its top bit. Eight bytes at a time: adding the mask's
    lowest bit to the masked code carries into the top bit only if all are set."""
    size = 8 * codes.itemsize
    masks, lowest, tops = (
        sum(bits << at for at in range(0, 64, size)) for bits in (mask, mask & -mask, 1 << (size - 1))
    )
    whole = codes.nbytes // 8 * 8 // codes.itemsize
    words = codes[:whole].view(np.uint64) & np.uint64(masks)
    words += np.uint64(lowest)
    carries = int(np.bitwise_or.reduce(words)) & tops
    return carries != 0 or bool(((codes[whole:] & mask) == mask).any())
