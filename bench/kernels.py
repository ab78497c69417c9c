"""`hybrid bench kernels`: one MoE layer's routed experts, against a plain read of as many bytes and torch.

The floor of a layer that few tokens pass is the time to read its weights; of one that many pass, the time
of its multiplications. So each line states both: `fraction_of_stream` against a plain read on the same
threads, and `gflop_per_s` beside torch's float32 matmul on weights dequantised beforehand.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from offload.experts import ExpertWeights
    from offload.kernels.cpu import CpuKernels

SECONDS = 3.0  # of measuring, for each count of tokens
CALLS = 6, 60  # at least and at most
DECODE_TOKENS = 8  # as many at most are timed as decode rows, more as prefill
BLAS_EXPERTS = 4  # dequantised experts the baseline rotates over: 700 MB at K2's size


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the benchmark. GB and GFLOP are 10^9; a multiply-add is two FLOP."""

    tokens: int
    threads: int
    level: str
    experts_touched: int
    ms_median: float
    ms_min: float
    weight_gb_per_s: float
    gflop_per_s: float
    blas_gflop_per_s: float
    stream_read_gb_per_s: float
    fraction_of_stream: float
    rel_error: float


def random_experts(hidden: int, intermediate: int, count: int, seed: int = 0) -> "list[ExpertWeights]":
    """Experts with Gaussian weights in block-fp8, made fast: codes are slices of one quantised pool."""
    import torch

    from offload.experts import ExpertShape, ExpertWeights
    from offload.fp8 import BLOCK, Weight, quantize

    generator = torch.Generator().manual_seed(seed)
    shape = ExpertShape(hidden, intermediate)
    pool = quantize(torch.randn(4096 + 128, 4096, generator=generator))[0].view(torch.uint8).flatten()

    def weight(rows: int, columns: int) -> Weight:
        data = torch.empty(rows * columns, dtype=torch.uint8)
        for part in data.split(4096 * 4096):
            start = int(torch.randint(128 * 4096, (1,), generator=generator))
            part.copy_(pool[start : start + len(part)])
        scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) * 2e-4 + 1e-4
        return Weight(data.view(rows, columns).view(torch.float8_e4m3fn), scale)

    return [ExpertWeights(*(weight(*matrix) for matrix in shape.matrices)) for _ in range(count)]


def routings(tokens: int, experts: int, top_k: int, seed: int) -> "Iterator[torch.Tensor]":
    """Endless int64 [tokens, top_k]: distinct experts per token, moving on so that no cache holds them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(experts, generator=generator)
    first = 0
    while True:
        if tokens == 1:
            yield order[(first + torch.arange(top_k)) % experts][None]
            first += top_k
        else:
            yield torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


def stream_reader(kernels: "CpuKernels") -> "Callable[[list[ExpertWeights]], float]":
    """A function that reads all of some experts' matrices on the kernels' threads: seconds it took."""
    import numpy as np
    from numba import carray, types

    from offload.kernels.intrinsics import as_pointer
    from offload.kernels.jit import DONE, compile_job
    from offload.workers import claim

    chunk = 512 << 10

    def read(args: int, lane: int, lanes: int, control: int) -> int:
        count, sink = carray(as_pointer(args, types.int64), 2)
        pieces = carray(as_pointer(args + 16, types.int64), 2 * count)
        total = 0
        while True:
            number = claim(control, 0)
            if number >= count:
                carray(as_pointer(sink, types.int64), lanes)[lane] = total
                return DONE
            words = carray(as_pointer(pieces[2 * number], types.int64), pieces[2 * number + 1] // 8)
            for i in range(len(words)):
                total ^= words[i]

    job = compile_job(read)
    sink = np.zeros(kernels.threads, np.int64)

    def run(experts: "list[ExpertWeights]") -> float:
        pieces = [
            (weight.data.data_ptr() + start, min(chunk, weight.data.nbytes - start))
            for expert in experts
            for weight in expert
            for start in range(0, weight.data.nbytes, chunk)
        ]
        args = np.array([(len(pieces), sink.ctypes.data), *pieces], np.int64)
        begin = time.perf_counter()
        kernels.run(job.address, args.ctypes.data)
        return time.perf_counter() - begin

    return run


def _blas_seconds(
    dense: "list[tuple[torch.Tensor, ...]]", x: "torch.Tensor", counts: list[int], threads: int
) -> float:
    """torch's time for the three products of each expert with its count of tokens, weights in float32."""
    import torch

    torch.set_num_threads(threads)
    hidden = x.new_ones(max(counts), dense[0][0].shape[0])
    begin = time.perf_counter()
    for i, count in enumerate(counts):
        gate, up, down = dense[i % len(dense)]
        torch.mm(x[:count], gate.T)
        torch.mm(x[:count], up.T)
        torch.mm(hidden[:count], down.T)
    return time.perf_counter() - begin


def float64_layer(
    experts: "list[ExpertWeights]", calls: "list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]"
) -> "list[torch.Tensor]":
    """The layer in float64 for several calls (x, topk_ids, topk_weights), each expert dequantised once."""
    import torch
    from torch.nn.functional import silu

    out = [torch.zeros(x.shape, dtype=torch.float64) for x, _, _ in calls]
    for index, expert in enumerate(experts):
        used = [(ids == index).any() for _, ids, _ in calls]
        if not any(used):
            continue
        gate, up, down = (_float64(weight) for weight in expert)
        for y, (x, ids, weights) in zip(out, calls, strict=True):
            rows, slots = torch.nonzero(ids == index, as_tuple=True)
            if len(rows):
                rows_x = x[rows].double()
                value = (silu(rows_x @ gate.T) * (rows_x @ up.T)) @ down.T
                y.index_add_(0, rows, value * weights[rows, slots].double()[:, None])
    return out


def _float64(weight: Any) -> "torch.Tensor":
    """float64 codes times float64 scales, with no float32 rounding in between."""
    codes: torch.Tensor = weight.data.double()
    return codes.mul_(
        weight.scale.double()
        .repeat_interleave(128, 0)[: codes.shape[0]]
        .repeat_interleave(128, 1)[:, : codes.shape[1]]
    )


def measure(
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    tokens: list[int],
    threads: int | None,
    level: str | None,
) -> Iterator[Result]:
    """Yields a Result for each count of tokens. Timings of ours, the read and torch are interleaved."""
    import numpy as np
    import torch

    from offload.executor import ExpertExecutor
    from offload.kernels.cpu import CpuKernels
    from offload.store import MmapStore

    kernels = CpuKernels(threads, level)
    try:
        kernels.warm_up()
        weights = random_experts(hidden, intermediate, experts)
        store = MmapStore({0: weights})
        store.touch(0, np.arange(experts), kernels)
        executor = ExpertExecutor(store, kernels)
        read = stream_reader(kernels)
        dense = [tuple(w.dequantize() for w in expert) for expert in weights[:BLAS_EXPERTS]]
        generator = torch.Generator().manual_seed(1)
        inputs = [
            (
                torch.randn(count, hidden, generator=generator),
                next(routings(count, experts, top_k, seed=count)),
                torch.rand(count, top_k, generator=generator),
            )
            for count in tokens
        ]
        wanted = float64_layer(weights, inputs)
        for (x, ids, gates), reference in zip(inputs, wanted, strict=True):
            got = executor.run(0, x, ids, gates, decode=len(x) <= DECODE_TOKENS).double()
            error = float((got - reference).norm() / reference.norm())
            yield _measure_one(executor, read, weights, dense, x, gates, kernels, error)
    finally:
        kernels.close()


def _measure_one(
    executor: Any,
    read: "Callable[[list[ExpertWeights]], float]",
    weights: "list[ExpertWeights]",
    dense: "list[tuple[torch.Tensor, ...]]",
    x: "torch.Tensor",
    gates: "torch.Tensor",
    kernels: "CpuKernels",
    error: float,
) -> Result:
    import torch

    tokens, top_k = gates.shape
    ours: list[float] = []
    stream: list[float] = []
    blas: list[float] = []
    touched_counts: list[int] = []
    routing = routings(tokens, len(weights), top_k, seed=7)
    begin = time.perf_counter()
    flop = 6.0 * tokens * top_k * weights[0].gate.data.numel()
    while len(ours) < CALLS[0] or (time.perf_counter() - begin < SECONDS and len(ours) < CALLS[1]):
        ids = next(routing)
        before = executor.bytes_read
        torch.set_num_threads(1)
        start = time.perf_counter()
        executor.run(0, x, ids, gates, decode=tokens <= DECODE_TOKENS)
        ours.append(time.perf_counter() - start)
        read_bytes = executor.bytes_read - before
        touched, counts = torch.unique(next(routing) if tokens == 1 else ids, return_counts=True)
        touched_counts.append(len(touched))
        some = [weights[i] for i in touched.tolist()]
        stream.append(read_bytes / read(some))
        some_counts = counts.tolist()[: max(1, 2 * BLAS_EXPERTS)]
        share = sum(some_counts) / (tokens * top_k)
        blas.append(flop * share / _blas_seconds(dense, x, some_counts, kernels.threads))
    median = statistics.median(ours)
    touched_median = round(statistics.median(touched_counts))
    rate = touched_median * weights[0].nbytes / median
    return Result(
        tokens=tokens,
        threads=kernels.threads,
        level=kernels.level,
        experts_touched=touched_median,
        ms_median=median * 1e3,
        ms_min=min(ours) * 1e3,
        weight_gb_per_s=rate / 1e9,
        gflop_per_s=flop / median / 1e9,
        blas_gflop_per_s=statistics.median(blas) / 1e9,
        stream_read_gb_per_s=statistics.median(stream) / 1e9,
        fraction_of_stream=rate / statistics.median(stream),
        rel_error=error,
    )


def kernels(
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 7168,
    intermediate: Annotated[int, typer.Option(help="Width of one expert.")] = 2048,
    expert_format: Annotated[str, typer.Option(help="Format of the experts: fp8.")] = "fp8",
    experts: Annotated[int, typer.Option(help="Routed experts of the layer.")] = 48,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
    tokens: Annotated[str, typer.Option(help="Counts of tokens, comma-separated.")] = "1,2,4,8,16,64,256,512",
    threads: Annotated[int | None, typer.Option(help="Lanes; default: physical cores.")] = None,
    level: Annotated[
        str | None, typer.Option(help="amx, avx512, avx2 or portable; default: the best.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure one MoE layer's routed experts on this machine."""
    from offload.errors import UsageError

    try:
        counts = [int(part) for part in tokens.split(",")]
    except ValueError:
        raise UsageError(f"--tokens is {tokens!r}; give whole numbers, comma-separated.") from None
    if min(counts) < 1 or not 1 <= top_k <= experts or min(hidden, intermediate) < 1:
        raise UsageError("Sizes and token counts must be at least 1, and --top-k at most --experts.")
    if expert_format != "fp8":
        raise UsageError(f"--expert-format is {expert_format!r}; fp8 is what there is.")
    for result in measure(hidden, intermediate, experts, top_k, counts, threads, level):
        if as_json:
            typer.echo(json.dumps(asdict(result)))
        else:
            typer.echo(
                f"{result.tokens:5d} tokens  {result.ms_median:9.2f} ms  {result.weight_gb_per_s:6.2f} GB/s "
                f"({result.fraction_of_stream:.2f} of stream)  {result.gflop_per_s:6.1f} GFLOP/s "
                f"(torch {result.blas_gflop_per_s:.1f})  error {result.rel_error:.1e}"
            )


if __name__ == "__main__":
    typer.run(kernels)
