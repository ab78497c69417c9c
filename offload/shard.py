"""One safetensors file: mapped read-only, its header validated.

Everything in the file is untrusted: names, dtypes, shapes, offsets and sizes are checked against each
other before any of it is used. Format: https://huggingface.co/docs/safetensors (8 bytes of header length,
a JSON header, data). How files make up a checkpoint is offload/checkpoint.py's concern.
"""

import ctypes
import json
import mmap
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 8
AGAIN = "The file is damaged or incomplete: download it again."

DTYPES: dict[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
}


class TensorInfo(NamedTuple):
    """Where a tensor lies: bytes [start, end) of `file`. `dtype` is safetensors' name for it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def open_shard(file: Path) -> tuple[Tensor, list[TensorInfo]]:
    """Map `file` and read its header.

    Returns:
        The whole file as a uint8 tensor that views the mapping (writing to it is a segmentation fault;
        the mapping lives as long as any view of it), and its tensors in data order.

    Raises:
        CheckpointError: the file cannot be mapped, is truncated, or its header lies.
    """
    mapping = _map(file)
    infos = _read_header(file, mapping)
    # torch and numpy warn about read-only buffers, so they get the address; the window keeps the mapping.
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    window = (ctypes.c_uint8 * len(mapping)).from_address(address)
    window.mapping = mapping  # type: ignore[attr-defined]
    return torch.from_numpy(np.ctypeslib.as_array(window)), infos


def parse_json(text: bytes) -> Any:
    """JSON of an untrusted file. Raises ValueError, also for duplicate keys and absurd nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {brief(next(key for key in keys if keys.count(key) > 1))} appears twice")
        return values

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def brief(value: Any) -> str:
    """`value` from an untrusted file for a message: short, and nothing a terminal would obey."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_name(value: Any) -> bool:
    """Whether `value` can be a tensor's name and be printed as it is."""
    return isinstance(value, str) and 0 < len(value) <= 512 and value.isprintable()


def _map(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    except ValueError:  # what mmap says of an empty file
        raise CheckpointError("the file is empty", file=file, remedy=AGAIN) from None
    except OSError as error:
        problem = f"the file cannot be mapped ({error.strerror or error})"
        raise CheckpointError(problem, file=file, remedy="Check that it exists and is readable.") from None


def _read_header(file: Path, mapping: mmap.mmap) -> list[TensorInfo]:
    """The file's tensors in data order, their byte ranges proven to tile the data exactly."""
    size = len(mapping)
    length = int.from_bytes(mapping[:8], "little")
    data_start = 8 + length
    if size < 8 or length > MAX_HEADER_BYTES or data_start > size:
        problem = f"the header's length is given as {length} bytes, but the file holds {size}"
        if size >= data_start:
            problem = (
                f"the header's length is given as {length} bytes; at most {MAX_HEADER_BYTES} are allowed"
            )
        raise CheckpointError(problem, file=file, remedy=AGAIN)
    try:
        header = parse_json(mapping[8:data_start])
    except ValueError as error:
        raise CheckpointError(
            f"the header is not readable as JSON ({error})", file=file, remedy=AGAIN
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError("the header is not a JSON object", file=file, remedy=AGAIN)
    header.pop("__metadata__", None)
    infos = [_tensor_info(file, name, entry, data_start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_ranges(file, infos, data_start, size)
    return infos


def _check_ranges(file: Path, infos: list[TensorInfo], position: int, size: int) -> None:
    for info in infos:
        if info.start != position:
            relation = (
                "overlaps the tensor before it"
                if info.start < position
                else "leaves a hole after the one before"
            )
            problem = f"its data starts at byte {info.start}, which {relation} (that ends at {position})"
            raise CheckpointError(problem, file=file, tensor=info.name, remedy=AGAIN)
        if info.end > size:
            problem = f"its data ends at byte {info.end}, but the file holds only {size}: it is truncated"
            raise CheckpointError(problem, file=file, tensor=info.name, remedy=AGAIN)
        position = info.end
    if position != size:
        problem = f"the last tensor ends at byte {position}, but the file holds {size}"
        raise CheckpointError(problem, file=file, remedy=AGAIN)


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def bad(problem: str) -> CheckpointError:
        return CheckpointError(
            problem, file=file, tensor=name if is_name(name) else brief(name), remedy=AGAIN
        )

    if not is_name(name):
        raise bad("the tensor's name is empty, too long or holds control characters")
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"dtype {brief(dtype)} is unknown")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise bad(f"shape {brief(shape)} is not a list of up to {MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise bad(f"data_offsets {brief(offsets)} is not a pair of byte positions")
    begin, end = offsets
    needed = prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise bad(f"data_offsets {offsets} span {end - begin} bytes, but {dtype} {shape} takes {needed}")
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
