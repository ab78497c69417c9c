"""A directory of safetensors files as one checkpoint: the index, and tensors as mapped views.

One file's header and bytes are offload/shard.py's concern; what a model's config expects of the tensors
is hybrid/loader.py's.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload.errors import CheckpointError
from offload.fp8 import Weight
from offload.shard import AGAIN, DTYPES, MAX_HEADER_BYTES, TensorInfo, brief, is_name, open_shard, parse_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
SAME_REVISION = f"Download {INDEX_NAME} and all its shards again, from one revision."


class Checkpoint:
    """Safetensors files mapped read-only and validated.

    Tensors are views of the mapping: writing to one is a segmentation fault. The mapping outlives
    `close()` for as long as a tensor views it.
    """

    def __init__(self, directory: Path, infos: dict[str, TensorInfo], mappings: dict[Path, Tensor]) -> None:
        self.directory = directory
        self._infos = infos
        self._mappings = mappings
        self.names: tuple[str, ...] = tuple(sorted(infos))

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Map the shards named by model.safetensors.index.json, or else model.safetensors.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or index and shards disagree.
        """
        index_file = directory / INDEX_NAME
        index = _read_index(index_file) if index_file.exists() else None
        files = [_single_file(directory)] if index is None else _shards(directory, index)
        infos: dict[str, TensorInfo] = {}
        mappings: dict[Path, Tensor] = {}
        for file in files:
            mappings[file], held = open_shard(file)
            infos.update((info.name, info) for info in held)
            if index is not None:
                _check_listed(held, index)
        for name, shard in (index or {}).items():
            if name not in infos:
                problem = f"{INDEX_NAME} places this tensor in the shard, which does not hold it"
                raise CheckpointError(problem, file=directory / shard, tensor=name, remedy=SAME_REVISION)
        return cls(directory, infos, mappings)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return sorted(self._mappings)

    def info(self, name: str) -> TensorInfo:
        """Where and what tensor `name` is. Raises CheckpointError if there is none."""
        if name not in self._infos:
            raise CheckpointError(
                "no file holds this tensor", file=self.directory, tensor=name, remedy=SAME_REVISION
            )
        return self._infos[name]

    def tensor(self, name: str) -> Tensor:
        """A view of tensor `name`; a copy only where the file places it off its dtype's alignment."""
        info = self.info(name)
        dtype = DTYPES[info.dtype]
        raw = self._mappings[info.file][info.start : info.end]
        if info.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def weight(self, name: str) -> Weight:
        """`name`.weight with its `name`.weight_scale_inv if it is fp8. `name` is without ".weight"."""
        data = self.tensor(f"{name}.weight")
        if data.dtype != torch.float8_e4m3fn:
            return Weight(data)
        return Weight(data, self.tensor(f"{name}.weight{SCALE_SUFFIX}"))

    def check_scales(self) -> None:
        """Check that every float32 `*_scale_inv` is finite and above 0 throughout.

        Neighbouring scales (K2's shards hold theirs in one run) are read as one array.

        Raises:
            CheckpointError: naming the first tensor with another value, and that value.
        """
        for run in self._scale_runs():
            raw = self._mappings[run[0].file][run[0].start : run[-1].end]
            values = (raw.clone() if run[0].start % 4 else raw).view(torch.float32).numpy()
            if values.min(initial=1.0) > 0 and values.max(initial=1.0) < np.inf:  # NaN fails both
                continue
            position = int(np.argmin((values > 0) & (values < np.inf)))
            byte = run[0].start + 4 * position
            info = next(info for info in run if byte < info.end)
            at = [int(i) for i in np.unravel_index((byte - info.start) // 4, info.shape)]
            problem = f"the scale at {at} is {values[position]}; scales must be finite and above 0"
            raise CheckpointError(problem, file=info.file, tensor=info.name, remedy=AGAIN)

    def _scale_runs(self) -> Iterator[list[TensorInfo]]:
        """All float32 scales in runs that lie in one file without gaps."""
        scales = (self._infos[name] for name in self.names if name.endswith(SCALE_SUFFIX))
        ordered = sorted((i for i in scales if i.dtype == "F32"), key=lambda info: (info.file, info.start))
        before = np.cumsum([0] + [info.end - info.start for info in ordered])
        pairs = zip(ordered, before.tolist(), strict=False)
        for _, run in groupby(pairs, key=lambda pair: (pair[0].file, pair[0].start - pair[1])):
            yield [info for info, _ in run]

    def close(self) -> None:
        """Let each mapping go as soon as no tensor views it."""
        self._mappings.clear()


def _single_file(directory: Path) -> Path:
    file = directory / SINGLE_NAME
    if file.is_file():
        return file
    others = len(list(directory.glob("*.safetensors")))
    problem = f"there is no {INDEX_NAME} and no {SINGLE_NAME}" + (
        f", but {others} other safetensors files" if others else ""
    )
    raise CheckpointError(
        problem, file=directory, remedy=f"Download {INDEX_NAME}: it says which tensor is where."
    )


def _shards(directory: Path, index: dict[str, str]) -> list[Path]:
    files = [directory / name for name in sorted(set(index.values()))]
    absent = [file for file in files if not file.is_file()]
    if absent:
        problem = f"the shard is missing ({len(absent)} of {len(files)} shards are)"
        remedy = f"{INDEX_NAME} names it: download it into {directory}."
        raise CheckpointError(problem, file=absent[0], remedy=remedy)
    return files


def _check_listed(held: list[TensorInfo], index: dict[str, str]) -> None:
    for info in held:
        listed = index.get(info.name)
        if listed != info.file.name:
            says = "does not list it" if listed is None else f"places it in {listed}"
            problem = f"the shard holds this tensor, but {INDEX_NAME} {says}"
            raise CheckpointError(problem, file=info.file, tensor=info.name, remedy=SAME_REVISION)


def _read_index(file: Path) -> dict[str, str]:
    """The index's weight_map: tensor name -> name of a shard in the same directory."""
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES} bytes")
        index = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as JSON ({error})", file=file, remedy=AGAIN) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("holds no weight_map of tensors to shards", file=file, remedy=AGAIN)
    for name, shard in weight_map.items():
        if not is_name(name) or not is_name(shard):
            problem = f"maps {brief(name)} to {brief(shard)}, expected a tensor's name and a shard's"
            raise CheckpointError(problem, file=file, remedy=AGAIN)
    for shard in sorted(set(weight_map.values())):
        inside = Path(shard).name == shard and len(shard.encode()) <= 255
        if not inside or not shard.endswith(".safetensors"):
            problem = f"shard {brief(shard)} is not the name of a safetensors file in the same directory"
            raise CheckpointError(problem, file=file, remedy="Use the index published with the checkpoint.")
    return weight_map
