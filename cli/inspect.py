"""`hybrid inspect`: what a model directory holds, and what is wrong with it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hybrid.inspection import Inspection


def inspect(
    model: Annotated[Path, typer.Argument(help="Model directory.", show_default=False)],
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Read every weight and look for NaN: as long as reading the files takes."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="One object: architecture, parts {tensors, bytes}, dtypes, total_bytes, problems."
        ),
    ] = False,
) -> None:
    """Show a model's architecture, tensors and sizes, and check its files."""
    from cli.progress import SlowBar
    from hybrid.inspection import inspect_model
    from offload.errors import UsageError

    try:
        with SlowBar() as bar:
            found = inspect_model(model, full=full, progress=bar.update)
    except UsageError as error:
        if as_json:
            typer.echo(json.dumps({"directory": str(model), "problems": [str(error)]}))
        raise
    typer.echo(json.dumps(found.as_dict()) if as_json else _described(found))
    if found.problems:
        raise typer.Exit(2)


def _described(found: "Inspection") -> str:
    lines = [f"{found.directory}"]
    lines += [f"  {name:28s}{value}" for name, value in found.architecture.items()]
    lines.append("")
    rows: list[tuple[str, dict[str, Any]]] = [*found.parts.items(), ("total", found.total)]
    lines += [
        f"  {name:12s}{row['tensors']:>10,} tensors {row['bytes'] / 1e9:>10.3f} GB" for name, row in rows
    ]
    lines.append("")
    lines += [f"  {problem}" for problem in found.problems] or [f"  {found.verdict}"]
    return "\n".join(lines)
