"""`load_runtime`: a directory and options -> everything that runs, put together once.

This is where the parts meet: files, tokenizer, kernels, expert store, model. Nothing here computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from hybrid.chat import ChatTemplate
from hybrid.config import ModelConfig, RuntimeConfig
from hybrid.default_model import default_model
from hybrid.generation import PREFILL_CHUNK, Measured
from hybrid.layers.cpu import CpuOps
from hybrid.layers.ops import DeviceOps
from hybrid.layers.plain import PlainOps
from hybrid.loader import FP8, ModelFiles, expected_tensors, open_model, open_text
from hybrid.model import Model
from hybrid.tokenizer import Tokenizer
from offload.errors import CheckpointError, RequestError, UsageError
from offload.executor import ExpertExecutor
from offload.experts import ExpertId, ExpertWeights
from offload.hardware import require_supported_machine
from offload.kernels.cpu import CpuKernels
from offload.shard import AGAIN
from offload.store import MmapStore

Progress = Callable[[str, float], None]


@dataclass(slots=True)
class Runtime:
    """A model ready to run, and what it runs on."""

    files: ModelFiles
    tokenizer: Tokenizer
    template: ChatTemplate | None
    kernels: CpuKernels
    store: MmapStore
    experts: ExpertExecutor
    model: Model
    context: int
    notice: str | None

    def logits(self, token_ids: list[int]) -> Tensor:
        """Teacher-forced logits, float32 [len(token_ids), vocab_size]."""
        cache = self.model.new_cache()
        out = torch.empty((len(token_ids), self.files.config.vocab_size))
        for begin in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = token_ids[begin : begin + PREFILL_CHUNK]
            out[begin : begin + len(chunk)] = self.model.logits(
                self.model.prefill(chunk, cache), decode=False
            )
        return out

    def meter(self) -> "Meter":
        """Starts to measure one request."""
        return Meter(self.experts)

    def close(self) -> None:
        self.kernels.close()
        self.files.checkpoint.close()


class Meter:
    """What one request read and how long it took, in the words that `Engine.stats` uses."""

    def __init__(self, experts: ExpertExecutor) -> None:
        self._experts = experts
        self._process = psutil.Process()
        self._expert_bytes, self._disk_bytes = self._counters()

    def _counters(self) -> tuple[int, int]:
        return self._experts.bytes_read, self._process.io_counters().read_bytes

    def summary(self, measured: Measured) -> dict[str, Any]:
        expert_bytes, disk_bytes = self._counters()
        expert_bytes -= self._expert_bytes
        disk_bytes -= self._disk_bytes
        experts_s = measured.parts.get("experts", 0.0)
        computed = measured.prompt_tokens - measured.cached_tokens
        longest = max(measured.parts, key=lambda part: measured.parts[part], default="prefill")
        return {
            "prompt_tokens": measured.prompt_tokens,
            "cached_tokens": measured.cached_tokens,
            "new_tokens": measured.new_tokens,
            "prefill_s": measured.prefill_s,
            "decode_s": measured.decode_s,
            "prefill_tokens_per_s": computed / measured.prefill_s if measured.prefill_s else 0.0,
            "tokens_per_s": measured.decode_steps / measured.decode_s if measured.decode_s else 0.0,
            "expert_bytes": expert_bytes,
            "disk_bytes": disk_bytes,
            "expert_gb_per_s": expert_bytes / experts_s / 1e9 if experts_s else 0.0,
            "breakdown": measured.parts,
            "bound_by": "disk" if disk_bytes > expert_bytes / 4 else longest,
        }


def load_runtime(path: Path | None, options: RuntimeConfig, progress: Progress) -> Runtime:
    """Open, check and assemble. Raises UsageError types; see `Engine.load`."""
    require_supported_machine()
    _check_options(options)
    device = _device(options.device)
    notice = None
    if path is None:
        path, notice = default_model(progress)
    progress("opening the checkpoint", 0.0)
    files = open_model(path)
    tokenizer, template = open_text(path, files.config)
    kernels = CpuKernels(options.threads)
    try:
        kernels.warm_up(progress)
        torch.set_num_threads(1)  # the cores belong to our workers
        progress("mapping the experts", 0.0)
        store = _store(files)
        experts = ExpertExecutor(store, kernels)
        ops: DeviceOps = CpuOps(kernels) if device.type == "cpu" else PlainOps(device)
        model = Model(files.config, files.checkpoint, ops, experts)
        progress("checking the weights that every token needs", 0.0)
        _check_resident(files, kernels)
    except BaseException:
        kernels.close()
        raise
    context = _context(files.config, options)
    return Runtime(files, tokenizer, template, kernels, store, experts, model, context, notice)


def _check_options(options: RuntimeConfig) -> None:
    if options.experts not in ("auto", "mmap"):
        raise UsageError(f"experts is {options.experts!r}; use 'auto' or 'mmap'")
    if options.ram is not None or options.vram is not None:
        raise UsageError("experts run from the page cache (mmap), which takes no ram or vram limit")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"threads is {options.threads}; use 1 or more")
    if options.context is not None and options.context < 2:
        raise UsageError(f"context is {options.context}; use 2 tokens or more")


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {name!r}; use 'auto', 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device is 'cuda' and torch finds no CUDA GPU; use --device cpu, or install torch's CUDA build"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _check_resident(files: ModelFiles, kernels: CpuKernels) -> None:
    """Look for NaN in all fp8 weights but the routed experts, which are looked at when first used."""
    names = [
        name
        for name, expected in expected_tensors(files.config).items()
        if expected.kind != "routed" and files.checkpoint.info(name).dtype == FP8
    ]
    weights = [files.checkpoint.weight(name.removesuffix(".weight")) for name in names]
    for name, damaged in zip(names, kernels.hold_nan(weights) if weights else [], strict=True):
        if damaged:
            raise CheckpointError(
                "a weight is NaN", file=files.checkpoint.info(name).file, tensor=name, remedy=AGAIN
            )


def _store(files: ModelFiles) -> MmapStore:
    checkpoint, config = files.checkpoint, files.config

    def name(expert: ExpertId, part: str) -> str:
        return f"model.layers.{expert.layer}.mlp.experts.{expert.expert}.{part}_proj"

    def location(expert: ExpertId, part: str) -> tuple[Path, str]:
        info = checkpoint.info(f"{name(expert, part)}.weight")
        return info.file, info.name

    def weights(expert: ExpertId) -> ExpertWeights:
        return ExpertWeights(*(checkpoint.weight(name(expert, part)) for part in ExpertWeights._fields))

    every = range(config.n_routed_experts)
    layers = {layer: [weights(ExpertId(layer, e)) for e in every] for layer in config.moe_layers}
    return MmapStore(layers, location)


def _context(config: ModelConfig, options: RuntimeConfig) -> int:
    """Tokens a sequence may have: the model's own length, as far as free memory goes.

    The running sequence and those kept for reuse may each take as many: a quarter of the memory together.
    """
    if options.context is not None:
        if options.context > config.max_position_embeddings:
            raise RequestError(
                f"context is {options.context} and the model was made for {config.max_position_embeddings} tokens",
                param="context",
            )
        return options.context
    token_bytes = config.num_hidden_layers * config.latent_dim * 4
    affordable = psutil.virtual_memory().available // 8 // token_bytes
    return int(max(2, min(config.max_position_embeddings, affordable)))
