"""`load_runtime`: a directory and options -> everything that runs, put together once.

This is where the parts meet: files, tokenizer, kernels, expert store, model. Nothing here computes.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
CHECKED_AT_ONCE = 16
"""Weights that are looked at between two reports of progress, and between two chances to stop."""
GPU_ROOM = 2 << 30
"""Bytes on a GPU for activations, the latent cache and CUDA itself."""


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
    torch_threads: int
    """What the process had before; torch gets as many threads as our workers, which sleep while it works."""

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
        torch.set_num_threads(self.torch_threads)


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
    notice = None
    if path is None:
        path, notice = default_model()
    progress("opening the checkpoint", 0.0)
    files = open_model(path)
    tokenizer, template = open_text(path, files.config)
    device = _device(options.device, files)
    before = torch.get_num_threads()
    kernels = CpuKernels(options.threads, options.level)
    try:
        with ThreadPoolExecutor(1) as beside:
            warm = beside.submit(kernels.warm_up)
            progress("mapping the experts", 0.0)
            store = _store(files)
            experts = ExpertExecutor(store, kernels)
            ops: DeviceOps = CpuOps(kernels) if device.type == "cpu" else PlainOps(device)
            model = Model(files.config, files.checkpoint, ops, experts)
            while not warm.done():
                progress("preparing the kernels", kernels.warmed)
                wait([warm], timeout=0.1)
            warm.result()
        torch.set_num_threads(kernels.threads)
        _check_resident(files, kernels, progress)
    except BaseException:
        kernels.close()
        torch.set_num_threads(before)
        raise
    context = _context(files.config, options, device)
    return Runtime(files, tokenizer, template, kernels, store, experts, model, context, notice, before)


def _check_options(options: RuntimeConfig) -> None:
    if options.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {options.device!r}; use 'auto', 'cpu' or 'cuda'")
    if options.experts not in ("auto", "mmap"):
        raise UsageError(f"experts is {options.experts!r}; use 'auto' or 'mmap'")
    if options.ram is not None or options.vram is not None:
        raise UsageError("experts run from the page cache (mmap), which takes no ram or vram limit")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"threads is {options.threads}; use 1 or more")
    if options.context is not None and options.context < 2:
        raise UsageError(f"context is {options.context}; use 2 tokens or more")


def wants_gpu(device: str) -> bool:
    """Whether "auto", "cpu" or "cuda" means a GPU on this machine.

    Raises:
        UsageError: "cuda", and there is none.
    """
    if device == "cpu":
        return False
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UsageError(
            "device is 'cuda' and torch finds no CUDA GPU; use --device cpu, or install torch's CUDA build"
        )
    return found


def _device(name: str, files: ModelFiles) -> torch.device:
    """The GPU where there is one that everything but the routed experts fits on."""
    if not wants_gpu(name):
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info()
    needed = _device_bytes(files)
    if needed <= free:
        return torch.device("cuda")
    problem = f"the GPU has {free / 1e9:.1f} GB free and this model needs {needed / 1e9:.1f} GB of it"
    if name == "cuda":
        raise UsageError(f"{problem}; free some of it, or use --device cpu")
    log.warning("%s: everything runs on the CPU", problem)
    return torch.device("cpu")


def _device_bytes(files: ModelFiles) -> int:
    """What a GPU has to hold: resident weights, the largest of them once more in float32, and room to work in."""
    resident = [
        files.checkpoint.tensor(name)
        for name, expected in expected_tensors(files.config).items()
        if expected.kind not in ("routed", "embedding")
    ]
    return sum(t.nbytes for t in resident) + 4 * max(t.numel() for t in resident) + GPU_ROOM


def _check_resident(files: ModelFiles, kernels: CpuKernels, progress: Progress) -> None:
    """Look for NaN in all fp8 weights but the routed experts, which are looked at when first used."""
    text = "checking the weights that every token needs"
    progress(text, 0.0)
    names = [
        name
        for name, expected in expected_tensors(files.config).items()
        if expected.kind != "routed" and files.checkpoint.info(name).dtype == FP8
    ]
    for begin in range(0, len(names), CHECKED_AT_ONCE):
        some = names[begin : begin + CHECKED_AT_ONCE]
        weights = [files.checkpoint.weight(name.removesuffix(".weight")) for name in some]
        for name, damaged in zip(some, kernels.hold_nan(weights), strict=True):
            if damaged:
                raise CheckpointError(
                    "a weight is NaN", file=files.checkpoint.info(name).file, tensor=name, remedy=AGAIN
                )
        progress(text, (begin + len(some)) / len(names))


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


def _context(config: ModelConfig, options: RuntimeConfig, device: torch.device) -> int:
    """Tokens a sequence may have: the model's own length, as far as free memory, the GPU's on a GPU, goes.

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
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
    affordable = free // 8 // token_bytes
    return int(max(2, min(config.max_position_embeddings, affordable)))
