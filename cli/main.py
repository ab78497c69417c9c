"""The `hybrid` command: registers the commands, and turns every failure into one clear message.

Nothing heavy is imported here or by the command modules at import time, so that `--help` is instant.
"""

import sys
import traceback
from dataclasses import dataclass
from typing import Annotated

import typer

from cli import bench, chat, complete, inspect, serve, synth
from hybrid import __version__
from offload.errors import HybridError

app = typer.Typer(
    name="hybrid",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(chat.chat)
app.command()(complete.complete)
app.command()(serve.serve)
app.command()(inspect.inspect)
app.command()(synth.synth)
app.add_typer(bench.app, name="bench")


@dataclass
class _Settings:
    debug: bool = False


_settings = _Settings()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hybrid {__version__}")
        raise typer.Exit


@app.callback()
def hybrid(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run Kimi K2 on one machine you own."""
    _settings.debug = debug


def main() -> None:
    """Exit codes: 0; 1 a failure while running; 2 bad input or usage; 130 Ctrl-C."""
    try:
        app(prog_name="hybrid")
    except HybridError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        hint = "" if _settings.debug else " (hybrid --debug ... shows where)"
        _fail(f"{type(error).__name__}: {error}{hint}", 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, code: int) -> None:
    if _settings.debug:
        traceback.print_exc()
    print(f"hybrid: {message}", file=sys.stderr)
    sys.exit(code)
