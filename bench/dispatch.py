"""`hybrid bench dispatch`: what it costs to hand a job to the worker threads, and what idle workers use.

One layer of K2 is a dozen dispatches, a token some seven hundred: at 3 microseconds each they are 2 ms of it.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from offload.workers import Workers

CALLS = 20_000
CALLS_WITH_TORCH = 2_000
QUIET_SECONDS = 5.0


def _microseconds(
    call: Callable[[], None], count: int, between: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    taken = []
    for _ in range(count):
        between()
        begin = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - begin))
    taken.sort()
    return {"median_us": round(statistics.median(taken), 2), "p99_us": round(taken[int(0.99 * count)], 2)}


def _idle_share(workers: "Workers") -> float:
    """CPU seconds a second of this process while nobody has work, once the threads have gone to sleep."""
    time.sleep(0.5)
    cpu, begin = time.process_time(), time.perf_counter()
    time.sleep(QUIET_SECONDS)
    return (time.process_time() - cpu) / (time.perf_counter() - begin) / workers.threads


def measure(threads: int) -> dict[str, Any]:
    """Dispatch of an empty job from Python: alone, and each time after a matrix product of torch's."""
    import torch

    from offload.kernels.jit import DONE, compile_job
    from offload.workers import Workers

    def empty(args: int, lane: int, lanes: int, control: int) -> int:  # noqa: ARG001 (a job's signature)
        return DONE

    job = compile_job(empty)
    workers = Workers(threads)
    torch.set_num_threads(threads)  # as the runtime does
    a = torch.randn(64, 512)
    b = torch.randn(512, 512)
    try:

        def run() -> None:
            workers.run(job.address, 0)

        _microseconds(run, 1000)
        return {
            "threads": threads,
            "empty": _microseconds(run, CALLS),
            "after_torch": _microseconds(run, CALLS_WITH_TORCH, lambda: torch.mm(a, b)),
            "idle_cpu_share": round(_idle_share(workers), 5),
        }
    finally:
        workers.close()


def dispatch(
    threads: Annotated[int, typer.Option("--threads", "-t", min=1, help="Lanes, the caller's included.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure how long handing a job to the worker threads takes."""
    result = measure(threads)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        typer.echo(f"{key:15s} {value}")
