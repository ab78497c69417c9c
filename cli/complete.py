"""`hybrid complete`: one completion to stdout."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options

if TYPE_CHECKING:
    from hybrid.engine import Engine
    from hybrid.request import SamplingParams


def complete(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT|-",
            help="The prompt, after the model's directory if one is meant. '-' reads the prompt from stdin.",
            show_default=False,
        ),
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the reply; may be repeated.")] = None,
    temperature: options.Temperature = 0.6,
    top_p: options.TopP = 1.0,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    experts: options.Experts = "auto",
    threads: options.Threads = None,
    level: options.Level = None,
    context: options.Context = None,
) -> None:
    """Complete one prompt and print it as it comes."""
    from hybrid.request import SamplingParams

    if len(words) > 2:
        raise typer.BadParameter(
            f"{len(words)} arguments; give PROMPT, or MODEL and PROMPT (quote the prompt)"
        )
    model = Path(words[0]) if len(words) == 2 else None
    if model is None and (Path(words[0]) / "config.json").is_file():
        raise typer.BadParameter(
            f"{words[0]} is a model's directory: give a prompt behind it, or - for stdin"
        )
    prompt = read_stdin() if words[-1] == "-" else words[-1]
    params = SamplingParams(temperature, top_p, max_tokens, tuple(stop or ()), seed)
    begin = time.perf_counter()
    with options.loaded_engine(
        model, device=device, experts=experts, threads=threads, context=context, level=level
    ) as engine:
        load_s = time.perf_counter() - begin
        if engine.notice:
            typer.echo(engine.notice, err=True)
        if raw:
            token_ids = engine.tokenizer.encode(prompt)
        else:
            token_ids = engine.prompt([{"role": "user", "content": prompt}])
        result = run(engine, token_ids, params, show=not as_json)
        if as_json:
            result["timings"]["load_s"] = load_s
            print(json.dumps(result, ensure_ascii=False))
        else:
            print()


def read_stdin() -> str:
    """All of standard input, which must be UTF-8."""
    from offload.errors import UsageError

    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: {error}") from None


def run(engine: "Engine", token_ids: list[int], params: "SamplingParams", *, show: bool) -> dict[str, Any]:
    """Generate; `show` prints text as it comes. -> text, token_ids, finish_reason, usage, timings."""
    from cli.painter import visible

    begin = time.perf_counter()
    first_s = None
    texts, new_ids = [], []
    on_terminal = sys.stdout.isatty()
    for step in engine.generate(token_ids, params):
        if first_s is None:
            first_s = time.perf_counter() - begin
        texts.append(step.text)
        if step.token_id >= 0:
            new_ids.append(step.token_id)
        if show:
            sys.stdout.write(visible(step.text) if on_terminal else step.text)
            sys.stdout.flush()
    last = engine.stats()["last"]
    return {
        "text": "".join(texts),
        "token_ids": new_ids,
        "finish_reason": step.finish_reason,
        "usage": step.usage._asdict() if step.usage is not None else None,
        "timings": {"time_to_first_token_s": first_s, **last},
    }
