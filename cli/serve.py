"""`hybrid serve`: the model behind OpenAI's HTTP API."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options

if TYPE_CHECKING:
    from hybrid.engine import Engine


def serve(
    model: options.Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HYBRID_API_KEY", help="Ask clients for this key.", show_default=False),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", "-a", "--served-model-name", help="A name for the model; may be repeated."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="Time that running replies get when the server is told to stop.")
    ] = 30.0,
    device: options.Device = "auto",
    experts: options.Experts = "auto",
    threads: options.Threads = None,
    level: options.Level = None,
    context: options.Context = None,
) -> None:
    """Answer OpenAI's HTTP API (/v1/chat/completions, /v1/models) until told to stop."""
    from cli.progress import SlowBar
    from hybrid.server.run import ServerOptions
    from hybrid.server.run import serve as run_server

    def load(progress: Callable[[str, float], None]) -> "Engine":
        from hybrid.engine import Engine

        return Engine.load(
            model, device, experts, threads=threads, context=context, level=level, progress=progress
        )

    if api_key == "":
        raise typer.BadParameter(
            "the API key is empty; leave --api-key out to serve this machine without one"
        )
    with SlowBar() as bar:

        def ready(url: str, engine: "Engine") -> None:
            bar.close()
            if engine.notice:
                typer.echo(engine.notice, err=True)
            typer.echo(f"Serving {engine.name} at {url}")

        options_ = ServerOptions(host, port, api_key, tuple(alias or ()), drain_seconds)
        run_server(load, options_, progress=bar.update, on_ready=ready)
