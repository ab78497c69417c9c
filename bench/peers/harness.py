"""Another engine's experts against ours: same shapes, threads and routings, calls alternating in one run.

The peer lives in a process of its own, which is stopped while ours is timed: some keep a thread spinning, and
that would be measured as ours. One JSON object a line.
"""

import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    import torch

    from offload.experts import ExpertWeights

HIDDEN, INTERMEDIATE = 7168, 2048
CALLS = {64: 5, 256: 3}  # of each, from so many tokens on; else MOST_CALLS
MOST_CALLS = 21


@dataclass(frozen=True, slots=True)
class Setting:
    """What both are asked to do."""

    threads: int
    experts: int
    top_k: int
    most_tokens: int


class Peer(Protocol):
    """One layer's experts in another engine.

    Attributes:
        expert_bytes: what it reads of an expert's weights.
        same_weights: whether they are ours, so that its error can be stated.
    """

    expert_bytes: int
    same_weights: bool

    def __call__(self, x: "torch.Tensor", ids: "torch.Tensor", gates: "torch.Tensor") -> "torch.Tensor":
        """float32 [T, hidden], int64 and float32 [T, top_k] -> float32 [T, hidden]."""


Factory = Callable[["list[ExpertWeights]", Setting], Peer]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line: a count of tokens, ours and the peer. `ratio` above 1: ours is faster."""

    peer: str
    tokens: int
    threads: int
    ours_ms: float
    peer_ms: float
    ratio: float
    ours_fraction_of_stream: float
    peer_fraction_of_stream: float
    ours_error: float
    peer_error: float | None


def _serve(factory: Factory, setting: Setting, pipe: Connection) -> None:
    """The peer's process: answers each (x, ids, gates) with the seconds it took and the result."""
    import torch

    from bench.kernels import random_experts

    torch.set_num_threads(1)
    peer = factory(random_experts(HIDDEN, INTERMEDIATE, setting.experts), setting)
    pipe.send((peer.expert_bytes, peer.same_weights))
    while (call := pipe.recv()) is not None:
        x, ids, gates = (torch.from_numpy(array) for array in call)
        begin = time.perf_counter()
        out = peer(x, ids, gates)
        pipe.send((time.perf_counter() - begin, out.numpy()))


def compare(name: str, factory: Factory, tokens: list[int], threads: int, experts: int, top_k: int) -> None:
    """Print a Comparison for each count of tokens, at K2's dimensions."""
    setting = Setting(threads, experts, top_k, max(tokens))
    spawn = multiprocessing.get_context("spawn")
    ours_end, peer_end = spawn.Pipe()
    child = spawn.Process(target=_serve, args=(factory, setting, peer_end), daemon=True)
    child.start()
    peer_end.close()  # so that a peer that dies is an EOFError here
    try:
        expert_bytes, same_weights = ours_end.recv()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        for line in _lines(name, setting, tokens, child.pid, ours_end, expert_bytes, same_weights):
            typer.echo(json.dumps(asdict(line)))
    finally:
        child.kill()


def _lines(
    name: str, setting: Setting, tokens: list[int], pid: int, pipe: Any, expert_bytes: int, same_weights: bool
) -> Any:
    import numpy as np
    import torch

    from bench.kernels import DECODE_TOKENS, float64_layer, random_experts, routings, stream_reader
    from offload.executor import ExpertExecutor
    from offload.kernels.cpu import CpuKernels
    from offload.store import MmapStore

    weights = random_experts(HIDDEN, INTERMEDIATE, setting.experts)
    kernels = CpuKernels(setting.threads)
    kernels.warm_up()
    torch.set_num_threads(1)
    store = MmapStore({0: weights})
    store.touch(0, np.arange(setting.experts), kernels)
    ours, read = ExpertExecutor(store, kernels), stream_reader(kernels)

    def ask(*call: torch.Tensor) -> tuple[float, torch.Tensor]:
        os.kill(pid, signal.SIGCONT)
        pipe.send([part.numpy() for part in call])
        seconds, out = pipe.recv()
        os.kill(pid, signal.SIGSTOP)
        return seconds, torch.from_numpy(out)

    generator = torch.Generator().manual_seed(1)
    for count in tokens:
        x = (
            torch.randn(count, HIDDEN, generator=generator).bfloat16().float()
        )  # what every engine can take exactly
        gates = torch.rand(count, setting.top_k, generator=generator)
        routing = routings(count, setting.experts, setting.top_k, seed=count)
        ids = next(routing)
        (wanted,) = float64_layer(weights, [(x, ids, gates)])
        errors = [
            float((got.double() - wanted).norm() / wanted.norm())
            for got in (ours.run(0, x, ids, gates, decode=len(x) <= DECODE_TOKENS), ask(x, ids, gates)[1])
        ]
        calls = next((n for least, n in sorted(CALLS.items(), reverse=True) if count >= least), MOST_CALLS)
        times: list[tuple[float, float, float]] = []
        for _ in range(calls):
            ids = next(routing)
            begin = time.perf_counter()
            ours.run(0, x, ids, gates, decode=len(x) <= DECODE_TOKENS)
            mine = time.perf_counter() - begin
            touched = [weights[i] for i in ids.unique().tolist()]
            rate = sum(w.data.nbytes for expert in touched for w in expert) / read(touched)
            times.append((mine, ask(x, ids, gates)[0], rate))
        mine, theirs, rate = (statistics.median(column) for column in zip(*times, strict=True))
        yield Comparison(
            name, count, setting.threads, mine * 1e3, theirs * 1e3, theirs / mine,
            len(touched) * weights[0].nbytes / mine / rate, len(touched) * expert_bytes / theirs / rate,
            errors[0], errors[1] if same_weights else None,
        )  # fmt: skip
    kernels.close()


def run_command(name: str, factory: Factory) -> None:
    """A peer's command line: print a Comparison for each count of tokens."""

    def main(
        tokens: Annotated[str, typer.Option(help="Counts of tokens, comma-separated.")] = "1,2,8,64,512",
        threads: Annotated[int, typer.Option(help="Lanes of each.")] = 2,
        experts: Annotated[int, typer.Option(help="Experts of the layer.")] = 48,
        top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
    ) -> None:
        compare(name, factory, [int(part) for part in tokens.split(",")], threads, experts, top_k)

    typer.run(main)
