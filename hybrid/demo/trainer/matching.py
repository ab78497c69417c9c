"""Exact match of whole assistant turns, cheaply.

Greedy decoding gives exactly the wanted turn if and only if, with the wanted turn fed in, each of its tokens is
the most likely one. So one forward pass over a conversation examines all of its turns.
"""

from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.demo.data.encode import Encoded, Encoder
from hybrid.demo.data.generator import conversation
from hybrid.demo.data.talk import Conversation, Probe
from hybrid.demo.trainer.feed import collate
from hybrid.demo.trainer.model import DemoModel
from hybrid.demo.trainer.ops import Documents


@dataclass(frozen=True, slots=True)
class Case:
    """An encoded conversation; `spans[i]` are the tokens [first, last) of what probe i examines."""

    conversation: Conversation
    encoded: Encoded
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, encoder: Encoder, talk: Conversation) -> "Case":
        encoded = encoder.encode(talk)
        edges = np.flatnonzero(np.diff(encoded.produced.astype(np.int8), prepend=0, append=0))
        return cls(talk, encoded, [(int(a), int(b)) for a, b in edges.reshape(-1, 2)])


def cases(encoder: Encoder, split: str, count: int, seed: int = 0) -> list[Case]:
    """`count` conversations of a split."""
    return [Case.of(encoder, conversation(split, Random(f"{split} {seed} {i}"))) for i in range(count)]


@dataclass
class Tally:
    """Hits and trials, by kind of turn and by wording within it."""

    by_wording: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def add(self, probe: Probe, hit: bool) -> None:
        key = probe.kind, probe.wording
        hits, trials = self.by_wording.get(key, (0, 0))
        self.by_wording[key] = hits + hit, trials + 1

    def kinds(self) -> dict[str, tuple[int, int]]:
        """Hits and trials of each kind."""
        found: dict[str, tuple[int, int]] = {}
        for (kind, _), (hits, trials) in sorted(self.by_wording.items()):
            before = found.get(kind, (0, 0))
            found[kind] = before[0] + hits, before[1] + trials
        return found

    def mean(self) -> float:
        """Mean over kinds of the share of hits."""
        return float(np.mean([hits / trials for hits, trials in self.kinds().values()]))


def exact_matches(some: list[Case], likely: list[NDArray[np.int64]]) -> Tally:
    """Which turns of the cases come out exactly, given each case's most likely next token at every position."""
    tally = Tally()
    for case, tokens in zip(some, likely, strict=True):
        for probe, (first, last) in zip(case.conversation.probes, case.spans, strict=True):
            if probe.exact:
                hit = np.array_equal(tokens[first - 1 : last - 1], case.encoded.tokens[first:last])
                tally.add(probe, bool(hit))
    return tally


@torch.no_grad()
def survey(
    model: DemoModel, some: list[Case], batch_tokens: int = 8192
) -> tuple[float, Tensor, list[NDArray[np.int64]]]:
    """-> mean loss over produced tokens, tokens per expert [MoE layers, experts], likeliest next tokens per case."""
    device = model.embed_tokens.device
    total = torch.zeros((), dtype=torch.float64)
    scored, loads, likely = 0, torch.zeros(1), list[NDArray[np.int64]]()
    start = 0
    while start < len(some):
        end, size = start, 0
        while end < len(some) and (end == start or size + len(some[end].encoded.tokens) <= batch_tokens):
            size += len(some[end].encoded.tokens)
            end += 1
        batch = collate([case.encoded for case in some[start:end]], end)
        logits, seen = model.logits(batch.tokens.to(device), Documents.of(batch.lengths, device))
        targets = batch.targets.to(device)
        losses = torch.nn.functional.cross_entropy(logits, targets.clamp_min(0), reduction="none")
        total += losses[targets >= 0].double().sum().cpu()
        scored += int((targets >= 0).sum())
        loads = loads + seen.loads.cpu()
        likely += np.split(logits.argmax(-1).cpu().numpy(), np.cumsum(batch.lengths.numpy())[:-1])
        start = end
    return float(total / scored), loads, likely


def evaluate(model: DemoModel, some: list[Case]) -> tuple[Tally, float, Tensor]:
    """Exact matches, mean loss and expert loads of a model in training."""
    loss, loads, likely = survey(model, some)
    return exact_matches(some, likely), loss, loads
