"""Options that several commands share, and how a command loads an engine with them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from hybrid.engine import Engine

Model = Annotated[
    Path | None,
    typer.Argument(
        help="Directory of a model in Kimi K2's published format. Left out: a small built-in one.",
        show_default=False,
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where everything but the routed experts runs.")
]
Experts = Annotated[Literal["auto", "mmap"], typer.Option(help="Where the routed experts live.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="CPU threads. Default: one a physical core.")
]
Level = Annotated[
    Literal["amx", "avx512", "avx2", "portable"] | None,
    typer.Option(help="Vector instructions of the CPU kernels. Default: the best this CPU has."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        "--ctx-size",
        "--max-model-len",
        min=2,
        help="Tokens a conversation may have. Default: the model's, as far as memory goes.",
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens of this mass.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest reply, in tokens. Default: what the context leaves."),
]
Seed = Annotated[int | None, typer.Option(help="Makes replies repeatable.")]


@contextmanager
def loaded_engine(
    model: Path | None,
    *,
    device: Literal["auto", "cpu", "cuda"],
    experts: Literal["auto", "mmap"],
    threads: int | None,
    context: int | None,
    level: Literal["amx", "avx512", "avx2", "portable"] | None,
) -> "Iterator[Engine]":
    """An engine, loaded behind a progress bar on stderr and closed at the end."""
    from cli.progress import SlowBar
    from hybrid import engine as engine_module

    with SlowBar() as bar:
        engine = engine_module.Engine.load(
            model, device, experts, threads=threads, context=context, level=level, progress=bar.update
        )
    engine_module.log.addFilter(_has_traceback)
    try:
        with engine:
            yield engine
    finally:
        engine_module.log.removeFilter(_has_traceback)


def _has_traceback(record: logging.LogRecord) -> bool:
    """The command itself shows why its request failed: of the engine's log only tracebacks are news."""
    return record.exc_info is not None
