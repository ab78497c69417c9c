"""kt-kernel (KTransformers' CPU experts, block-fp8) against ours: same weights, shapes, threads and routings.

    pip install --no-deps kt-kernel gguf pyyaml
    python -m bench.peers.kt --threads 2

Calls alternate, so both meet the same state of the machine. One JSON object a line: milliseconds of each,
their ratio (above 1: ours is faster), and each one's relative L2 error against float64. kt-kernel's
activations are bfloat16, which its error shows; its waiting queue thread takes part of a core.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from offload.experts import ExpertWeights

CALLS = 15


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line: a count of tokens, ours and the peer."""

    peer: str
    tokens: int
    threads: int
    ours_ms: float
    peer_ms: float
    ratio: float
    ours_error: float
    peer_error: float


class KtExperts:
    """One layer's experts in kt-kernel, which copies the weights into memory of its own."""

    def __init__(self, weights: "list[ExpertWeights]", top_k: int, threads: int, max_tokens: int) -> None:
        import torch
        from kt_kernel import kt_kernel_ext

        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [threads]
        self._queue = kt_kernel_ext.CPUInfer(pool)
        on_gpu = torch.zeros(len(weights), dtype=torch.bool)
        shape = weights[0].shape
        config = kt_kernel_ext.moe.MOEConfig(
            len(weights), top_k, shape.hidden, shape.intermediate, on_gpu.data_ptr()
        )
        config.layer_idx = 0
        config.pool = self._queue.backend_
        config.max_len = max_tokens
        config.quant_config.bits = 8
        config.quant_config.group_size = 128
        config.quant_config.zero_point = False
        scales: list[torch.Tensor] = []
        for name in ("gate", "up", "down"):
            parts = [getattr(expert, name) for expert in weights]
            scales += [part.scale for part in parts]
            setattr(config, f"{name}_projs", [[part.data.data_ptr() for part in parts]])
            setattr(config, f"{name}_scales", [[part.scale.data_ptr() for part in parts]])
        moe = kt_kernel_ext.moe
        self._layer = getattr(moe, "AMXFP8_MOE", moe.AVX2FP8_MOE)(config)
        order = torch.arange(len(weights))
        self._queue.submit(self._layer.load_weights_task(order.data_ptr()))
        self._queue.sync()
        self._keep = on_gpu

    def __call__(self, x: "torch.Tensor", ids: "torch.Tensor", gates: "torch.Tensor") -> "torch.Tensor":
        """x bfloat16 [T, hidden] -> bfloat16 [T, hidden]."""
        import torch

        out = torch.empty_like(x)
        count = torch.tensor([len(x)], dtype=torch.int32)
        self._queue.submit(
            self._layer.forward_task(
                count.data_ptr(),
                ids.shape[1],
                ids.data_ptr(),
                gates.data_ptr(),
                x.data_ptr(),
                out.data_ptr(),
                False,
            )
        )
        self._queue.sync()
        return out


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(
    tokens: Annotated[str, typer.Option(help="Counts of tokens, comma-separated.")] = "1,2,8,64,512",
    threads: Annotated[int, typer.Option(help="Lanes of each.")] = 2,
    experts: Annotated[int, typer.Option(help="Experts of the layer.")] = 48,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
) -> None:
    """Print a Comparison for each count of tokens, at K2's dimensions."""
    import torch

    from bench.kernels import float64_layer, random_experts, routings
    from offload.executor import ExpertExecutor
    from offload.kernels.cpu import CpuKernels
    from offload.store import MmapStore

    counts = [int(part) for part in tokens.split(",")]
    weights = random_experts(7168, 2048, experts)
    kernels = CpuKernels(threads)
    kernels.warm_up()
    torch.set_num_threads(1)
    ours = ExpertExecutor(MmapStore({0: weights}), kernels)
    peer = KtExperts(weights, top_k, threads, max(counts))
    generator = torch.Generator().manual_seed(1)
    for count in counts:
        x = torch.randn(count, 7168, generator=generator).bfloat16()
        gates = torch.rand(count, top_k, generator=generator)
        routing = routings(count, experts, top_k, seed=count)
        ids = next(routing)
        (wanted,) = float64_layer(weights, [(x.float(), ids, gates)])
        errors = [
            float((got.double() - wanted).norm() / wanted.norm())
            for got in (ours.run(0, x.float(), ids, gates), peer(x, ids, gates))
        ]
        our_times: list[float] = []
        peer_times: list[float] = []
        for _ in range(CALLS if count < 256 else 3):
            ids, wide = next(routing), x.float()
            our_times.append(_timed(partial(ours.run, 0, wide, ids, gates)))
            peer_times.append(_timed(partial(peer, x, ids, gates)))
        mine, theirs = statistics.median(our_times), statistics.median(peer_times)
        line = Comparison("kt-kernel", count, threads, mine * 1e3, theirs * 1e3, theirs / mine, *errors)
        typer.echo(json.dumps(asdict(line)))
    kernels.close()


if __name__ == "__main__":
    typer.run(main)
