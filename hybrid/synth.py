"""Random checkpoints in Kimi K2's exact file format: names, dtypes, shards, index and sidecar files.

Tensors are made and written a piece at a time, so that a checkpoint may be far larger than memory. What the numbers
are distributed like is hybrid/random_weights.py's concern.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.chat import TEMPLATE_FILE
from hybrid.config import ModelConfig
from hybrid.loader import LAYER_NAME, expected_tensors
from hybrid.presets import config_values
from hybrid.random_weights import STORAGE, distribution, fill, quantile_table, scale_distribution, stream_key
from hybrid.tokenizer import CONFIG_FILE, RANKS_FILE, Tokenizer
from offload.checkpoint import INDEX_NAME, SCALE_SUFFIX
from offload.direct import BUFFER_BYTES, DirectWriter
from offload.errors import HybridError, UsageError
from offload.fp8 import scale_shape

ASSETS = Path(__file__).parent / "assets"
"""Our own small tokenizer and chat template, in K2's format."""

PIECE = 1 << 20
"""Elements of a tensor made at a time; a multiple of 4."""

SLACK = 16
"""Bytes past a piece's end that making four elements at a time may touch."""


class _Planned(NamedTuple):
    """One tensor of a shard to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize

    @property
    def itemsize(self) -> int:
        return np.dtype(STORAGE[self.dtype]).itemsize

    def piece_bytes(self, first: int) -> int:
        """Bytes of the up to PIECE elements from `first` on."""
        return min(PIECE, self.elements - first) * self.itemsize


def synthesize(
    out: Path,
    preset: str = "tiny",
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
    like: Path | None = None,
    template: Path | None = None,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> Path:
    """Write a random checkpoint to the directory `out`, which must be absent or empty. -> `out`.

    Args:
        preset: a name of PRESETS: what it changes of K2's shape.
        overrides: config.json fields on top, `rope_scaling.factor` and its like included.
        seed: the same seed and sizes give the same bytes.
        like: directory whose config.json, tokenizer files and chat template are taken instead of our own.
        template: chat template to use instead.
        progress: called with what is being done and how much of it is done, 0 to 1.

    Raises:
        UsageError: an argument cannot be used, or there is not enough room; nothing is left behind.
        HybridError: writing failed; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory; choose another, or remove it")
    if template is not None and not template.is_file():
        raise UsageError(f"{template}: no such file; --template takes a chat template (jinja)")
    source = ASSETS if like is None else like
    tokenizer = Tokenizer.load(source)
    values = config_values(preset, overrides or {}, like, tokenizer)
    shards = _plan(ModelConfig.from_dict(values))
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if total + (64 << 20) > free:
            raise UsageError(
                f"{out}: the checkpoint takes {total / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
            )
        _write_shards(out, shards, seed, total, progress)
        _write_sidecars(out, values, source, template, tokenizer)  # last: what lacks config.json is no model
    except BaseException as error:
        _remove(out, made)
        if isinstance(error, OSError):
            raise HybridError(f"{out}: writing the checkpoint failed ({error.strerror or error})") from None
        raise
    return out


def _plan(config: ModelConfig) -> list[list[_Planned]]:
    """One shard a layer, the embedding in the first, the last norm and the head in the last; within one as
    the safetensors library orders tensors: wide dtypes first, so all scales lie together, then by name."""
    shards: list[list[_Planned]] = [[] for _ in range(config.num_hidden_layers)]
    for name, expected in expected_tensors(config).items():
        layer = LAYER_NAME.match(name)
        at = int(layer[1]) if layer else (0 if expected.kind == "embedding" else -1)
        mean, std = distribution(config, name, expected)
        if expected.kind in ("attention", "dense", "shared", "routed") and len(expected.shape) == 2:
            rows, columns = expected.shape
            shards[at].append(_Planned(name, "F8_E4M3", expected.shape, 0.0, 1.0))
            shards[at].append(
                _Planned(name + SCALE_SUFFIX, "F32", scale_shape(rows, columns), *scale_distribution(std))
            )
        else:
            dtype = "F32" if expected.kind == "router_bias" else "BF16"
            shards[at].append(_Planned(name, dtype, expected.shape, mean, std))
    for shard in shards:
        shard.sort(key=lambda tensor: (-tensor.itemsize, tensor.name))
    return shards


def _write_sidecars(
    out: Path, values: dict[str, Any], source: Path, template: Path | None, tokenizer: Tokenizer
) -> None:
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for name in (RANKS_FILE, CONFIG_FILE, "generation_config.json", TEMPLATE_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if template is not None:
        shutil.copyfile(template, out / TEMPLATE_FILE)
    if not (out / "generation_config.json").exists():
        end = tokenizer.special_ids["<|im_end|>"]
        generation = {"max_length": values["max_position_embeddings"], "eos_token_id": end}
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _write_shards(
    out: Path, shards: list[list[_Planned]], seed: int, total: int, progress: Callable[[str, float], None]
) -> None:
    written = 0
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(1) as maker:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number}-of-{len(shards)}.safetensors"
            weight_map.update((tensor.name, name) for tensor in shard)
            with DirectWriter(out / name) as file:
                file.write(memoryview(_header(shard)))
                for piece in _made_ahead(maker, _pieces(shard), seed):
                    file.write(piece)
                    written += len(piece)
                    progress(f"writing {name}", written / total)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: list[_Planned]) -> bytes:
    """A safetensors header: its length, then JSON padded so that the data begin on a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(shard: list[_Planned]) -> Iterator[list[tuple[_Planned, int]]]:
    """(tensor, first element) of what goes into each next piece; small tensors share one."""
    piece: list[tuple[_Planned, int]] = []
    held = 0
    for tensor in shard:
        for first in range(0, tensor.elements, PIECE):
            size = tensor.piece_bytes(first)
            if held + size > BUFFER_BYTES:
                yield piece
                piece, held = [], 0
            piece.append((tensor, first))
            held += size
    if piece:
        yield piece


def _make(buffer: NDArray[np.uint8], piece: list[tuple[_Planned, int]], seed: int) -> memoryview:
    """Fill `buffer` with the piece. -> the bytes used."""
    end = 0
    for tensor, first in piece:
        begin, end = end, end + tensor.piece_bytes(first)
        table = quantile_table(tensor.dtype, tensor.mean, tensor.std)
        whole = begin + -(-(end - begin) // (4 * table.itemsize)) * 4 * table.itemsize
        fill(
            np.uint64(stream_key(seed, tensor.name)), first // 4, table, buffer[begin:whole].view(table.dtype)
        )
    return buffer[:end].data


def _made_ahead(
    maker: ThreadPoolExecutor, pieces: Iterator[list[tuple[_Planned, int]]], seed: int
) -> Iterator[memoryview]:
    """Each piece, in one of two buffers; the next is being made while the caller writes this one."""
    buffers = cycle(np.empty((2, BUFFER_BYTES + SLACK), np.uint8))
    ahead: Future[memoryview] | None = None
    for piece in pieces:
        following = maker.submit(_make, next(buffers), piece, seed)
        if ahead is not None:
            yield ahead.result()
        ahead = following
    if ahead is not None:
        yield ahead.result()


def _remove(out: Path, made: bool) -> None:
    """Undo a failed write: the directory if it is ours, else what is in it (it was empty)."""
    if made:
        shutil.rmtree(out, ignore_errors=True)
    else:
        for entry in out.iterdir():
            os.unlink(entry)
