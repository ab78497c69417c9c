"""Safetensors files taken apart and put together by hand, so that tests can make every kind of damage."""

import json
from pathlib import Path
from typing import Any


def join(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file's bytes; `length` is what its first 8 bytes claim instead of the header's own length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data)."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One tensor's header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
