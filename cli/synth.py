"""`hybrid synth`: a random checkpoint in K2's exact file format."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value`, the value being JSON or else a plain string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(f"{text!r} is not key=value, such as num_hidden_layers=3")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value


def synth(
    out: Annotated[Path, typer.Argument(help="Directory to write: absent or empty.", show_default=False)],
    preset: Annotated[
        Literal["tiny", "slice"],
        typer.Option(
            help="tiny: 384 experts in some tens of MB; slice: K2's layer sizes, few layers and experts."
        ),
    ] = "tiny",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of config.json; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same bytes.")] = 0,
    like: Annotated[
        Path | None, typer.Option(help="Directory to take config.json, tokenizer and chat template from.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="Chat template to use instead.")] = None,
) -> None:
    """Write a random checkpoint in Kimi K2's exact file format."""
    from cli.progress import SlowBar
    from hybrid.synth import synthesize

    overrides = dict(parse_setting(text) for text in settings or [])
    with SlowBar() as bar:
        synthesize(out, preset, overrides, seed, like, template, bar.update)
    size = sum(file.stat().st_size for file in out.iterdir())
    typer.echo(f"{out}: {size / 1e9:.2f} GB")
