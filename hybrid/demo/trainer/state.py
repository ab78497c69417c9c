"""One training run: its settings, what it has to remember, and one step of it."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.demo.trainer.cuda import CapturedStep, CudaOps, require_support
from hybrid.demo.trainer.feed import Batch
from hybrid.demo.trainer.model import DemoModel
from hybrid.demo.trainer.muon import Muon, balance, qk_clip
from hybrid.demo.trainer.native import NativeOps
from hybrid.demo.trainer.ops import Documents, Ops, TorchOps
from offload.errors import HybridError, UsageError

_OBSERVED = "loss", "load", "peak", "clipped"
"""What a step tells: of the load the largest layer's maximum over mean, the largest logit, heads clipped."""
_DAMAGE = (RuntimeError, EOFError, LookupError, TypeError, ValueError, UnpicklingError)
"""What reading a damaged checkpoint may raise."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the outcome of a run, besides the data generator's code and, by rounding, the device and the
    number of threads. `text`: a digest of the tokenizer's and the chat template's files; `begun_with`: one of the
    weights that the run began with, "" if they were drawn."""

    seed: int = 0
    tokens: int = 50_000_000
    batch_tokens: int = 6_000
    muon_rate: float = 5e-3
    adam_rate: float = 3e-3
    warmup_steps: int = 60
    decay_power: float = 1.5
    balance_rate: float = 0.01
    qk_clip: float = 100.0
    text: str = ""
    begun_with: str = ""

    def schedule(self, tokens_seen: int, step: int) -> float:
        """Factor on every rate: linear warm-up, then the share of the run that is left to the power `decay_power`.

        More than 1, since at a high rate this model soon stops getting better (bench/NOTES.md).
        """
        left = max(1 - tokens_seen / self.tokens, 0.0)
        return min((step + 1) / self.warmup_steps, left**self.decay_power)


@dataclass
class Run:
    """A model in training. `threads`: of the compiled CPU path; None: torch's operations, on `device`; a GPU takes
    batches of exactly `settings.batch_tokens`.

    Raises:
        UsageError: the GPU, or torch for it, is too old.
    """

    settings: Settings
    config: dict[str, Any]
    device: torch.device
    threads: int | None = None
    step: int = 0
    tokens_seen: int = 0
    next_document: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        if cuda:
            require_support(self.device)
        ops: Ops = NativeOps(self.threads) if self.threads is not None else CudaOps() if cuda else TorchOps()
        torch.manual_seed(self.settings.seed)
        self.model = DemoModel(ModelConfig.from_dict(self.config), ops).to(self.device)
        self.muon = Muon(self.model, threads=self.threads)
        rest = [p for name, p in self.model.named_parameters() if name not in self.muon.momentum]
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._captured = self._capture()

    def _capture(self) -> CapturedStep | None:
        if self.device.type != "cuda":
            return None
        return CapturedStep(self._update, self.settings.batch_tokens, self.device)

    @property
    def complete(self) -> bool:
        return self.tokens_seen >= self.settings.tokens

    def train(self, batch: Batch) -> dict[str, float]:
        """One step. -> loss, load (largest layer's maximum over mean), peak logit, heads clipped.

        Raises:
            UsageError: on a GPU, a batch of another size.
        """
        factor = self.settings.schedule(self.tokens_seen, self.step)
        if self._captured is not None:
            observed = self._captured(batch, factor)
        else:
            docs = Documents.of(batch.lengths, self.device)
            observed = self._update(batch.tokens, batch.targets, docs, factor)
        self.step += 1
        self.tokens_seen += len(batch.tokens)
        self.next_document = batch.next_document
        return {"tokens": self.tokens_seen} | dict(zip(_OBSERVED, observed.tolist(), strict=True))

    def _update(self, tokens: Tensor, targets: Tensor, docs: Documents, factor: float | Tensor) -> Tensor:
        """One update of everything, the rates times `factor`. -> _OBSERVED, on the model's device."""
        settings = self.settings
        loss, seen = self.model.loss(tokens, targets, docs)
        loss.backward()  # type: ignore[no-untyped-call]
        self.muon.step(settings.muon_rate * factor)
        for group in self.adam.param_groups:
            group["lr"] = settings.adam_rate * factor
            group["capturable"] = self._captured is not None and torch.cuda.is_current_stream_capturing()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        clipped = qk_clip(self.model, seen.peaks, settings.qk_clip)
        balance(self.model, seen.loads, settings.balance_rate * factor)
        loads = seen.loads.float()
        load = (loads.amax(1) / loads.mean(1)).amax()
        return torch.stack([loss.detach(), load, seen.peaks.amax(), clipped.float()])

    def save(self, file: Path) -> None:
        """Everything, atomically: an interrupted save leaves the previous one.

        Raises:
            OSError: the disk is full or refuses.
            HybridError: the run has diverged; what is saved is better.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise HybridError(
                f"{file}: not saved, as weights are not finite any more; begin anew elsewhere, at lower rates"
            )
        state = {
            "settings": dataclasses.asdict(self.settings),
            "config": self.config,
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "counters": (self.step, self.tokens_seen, self.next_document),
            "history": self.history,
        }
        draft = file.with_suffix(".part")
        try:
            with draft.open("wb") as out:
                torch.save(state, out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(draft, file)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by either
            draft.unlink(missing_ok=True)
            raise OSError(f"{file}: cannot be saved: {error}") from error

    def restore(self, file: Path, tokens: int | None = None) -> None:
        """Go on from a save.

        Args:
            tokens: a length other than the save's; the rates are those of a run of this length from here on.

        Raises:
            UsageError: the file is of a run with other settings or another shape, has seen more tokens than
                `tokens`, or is damaged.
            OSError: it cannot be read.
        """
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            length, seen = state["settings"]["tokens"], state["counters"][1]
            saved = {"begun_with": "", **state["settings"]}
            # What a run began with stays so: the directory may hold another model by now.
            begun_with = saved["begun_with"] or self.settings.begun_with
            mine = dataclasses.asdict(self.settings) | {"tokens": length, "begun_with": begun_with}
            if mine != saved or state["config"] != self.config:
                raise UsageError(f"{file}: a run with other settings; use its settings, or another directory")
            if tokens not in (None, length) and tokens < seen:
                raise UsageError(f"{file}: has seen {seen:,} tokens; a length of {tokens:,} is less")
            length = length if tokens is None else tokens
            self.settings = dataclasses.replace(self.settings, tokens=length, begun_with=begun_with)
            self.model.load_state_dict(state["model"])
            self.muon.load_state_dict(state["muon"])
            self.adam.load_state_dict(state["adam"])
            self._captured = self._capture()  # the optimizer's state is in other memory now
            self.step, self.tokens_seen, self.next_document = state["counters"]
            self.history = state["history"]
        except _DAMAGE as error:
            raise UsageError(
                f"{file}: not a training checkpoint ({error}); delete it to start anew"
            ) from None
