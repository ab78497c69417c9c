"""`MmapStore`: routed experts where the checkpoint's mapping has them, in the page cache or still on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from offload.errors import CheckpointError
from offload.experts import BlockFp8, ExpertFormat, ExpertId, ExpertWeights
from offload.kernels.cpu import CpuKernels, addresses
from offload.pages import will_need

Location = Callable[[ExpertId, str], tuple[Path, str]]


class MmapStore:
    """All experts of all layers, computed from their mapped bytes; nothing is copied.

    Args:
        layers: each MoE layer's experts, by layer index; within a layer all have one shape and format.
        location: where a matrix comes from, for error messages: (expert, "gate", "up" or "down") ->
            (file, tensor).
        format: how experts are laid out.
    """

    def __init__(
        self,
        layers: dict[int, list[ExpertWeights]],
        location: Location | None = None,
        format: ExpertFormat = BlockFp8(),  # noqa: B008 (immutable)
    ) -> None:
        self._layers = layers
        self._location = location
        self._format = format
        self._tables = {layer: _address_table(experts) for layer, experts in layers.items()}
        self._seen = {layer: np.zeros(len(experts), np.bool_) for layer, experts in layers.items()}

    def table(self, layer: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """int64 [experts, 6]: addresses of each expert's gate, up and down, data and scale."""
        return self._tables[layer]

    def experts(self, layer: int) -> list[ExpertWeights]:
        """The layer's experts, by index."""
        return self._layers[layer]

    def touch(
        self, layer: int, expert_ids: "np.ndarray[Any, np.dtype[np.int64]]", kernels: CpuKernels
    ) -> None:
        """Prepare experts for use: on first touch their weights are fetched together and scanned for NaN.

        Args:
            expert_ids: int64, any number of times each.

        Raises:
            CheckpointError: a weight is NaN.
        """
        seen = self._seen[layer]
        if seen[expert_ids].all():
            return
        fresh = [int(expert) for expert in np.unique(expert_ids) if not seen[expert]]
        parts = [
            (ExpertId(layer, expert), name, weight)
            for expert in fresh
            for name, weight in self._layers[layer][expert]._asdict().items()
        ]
        for _, _, weight in parts:
            will_need(weight, kernels.workers.nodes)
        nan = kernels.hold_nan([weight for _, _, weight in parts])
        for (expert_id, name, _), damaged in zip(parts, nan, strict=True):
            if damaged:
                raise self._damaged(expert_id, name)
        seen[fresh] = True

    def _damaged(self, expert: ExpertId, name: str) -> CheckpointError:
        file, tensor = self._location(expert, name) if self._location else (None, None)
        return CheckpointError(
            "a weight is NaN",
            file=file,
            tensor=tensor or f"layer {expert.layer}, expert {expert.expert}, {name}",
            remedy="The file is damaged: download it again and compare its checksum",
        )


def _address_table(experts: list[ExpertWeights]) -> "np.ndarray[Any, np.dtype[np.int64]]":
    for expert in experts:
        for weight, like in zip(expert, experts[0], strict=True):
            assert weight.shape == like.shape and weight.data.dtype == like.data.dtype, (
                weight.shape,
                like.shape,
            )
    return np.array([[a for weight in expert for a in addresses(weight)] for expert in experts], np.int64)
