"""Runs the server: binds at once, loads the model behind it, and drains on SIGTERM or SIGINT."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from hybrid.server.app import create_app
from hybrid.server.service import Service
from offload.errors import HybridError, UsageError

if TYPE_CHECKING:
    from hybrid.engine import Engine

Progress = Callable[[str, float], None]

KEEP_ALIVE_S = 75
CLOSING_S = 5
"""For connections to close after the last reply has ended."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen and for whom.

    Args:
        port: 0 picks a free one.
        api_key: None: loopback only.
        aliases: names for the model; none: its directory's.
        drain_s: seconds that running replies get after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    aliases: tuple[str, ...] = ()
    drain_s: float = 30.0


class LoadingStopped(HybridError):
    """A signal came while the model was loading."""


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: they end the process by the signal, we by exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    load: Callable[[Progress], "Engine"],
    options: ServerOptions,
    *,
    progress: Progress,
    on_ready: Callable[[str, "Engine"], None],
) -> None:
    """Serve until a signal; returns once everything is closed.

    Args:
        load: makes the engine; called on a thread of its own with a progress callback.
        progress: told what loading does.
        on_ready: called with the base URL and the engine when the first request can be answered.

    Raises:
        UsageError: the address cannot be used, or would be open to others without a key.
        HybridError: whatever `load` raises.
    """
    listener = _bind(options)
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(load, options, listener, progress, on_ready))


async def _serve(
    load: Callable[[Progress], "Engine"],
    options: ServerOptions,
    listener: socket.socket,
    progress: Progress,
    on_ready: Callable[[str, "Engine"], None],
) -> None:
    service = Service(options.aliases)
    server = _Uvicorn(
        uvicorn.Config(
            create_app(service, options.api_key),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(options.drain_s) + CLOSING_S,
        )
    )
    stopping = threading.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            service.refuse_all()
            return
        stopping.set()
        service.drain()
        loop.call_later(options.drain_s, service.refuse_all)
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)

    def checked_progress(stage: str, fraction: float) -> None:
        if stopping.is_set():
            raise LoadingStopped("stopped while loading")
        progress(stage, fraction)

    serving = asyncio.create_task(server.serve(sockets=[listener]))
    engine = None
    try:
        with contextlib.suppress(LoadingStopped):
            engine = await asyncio.to_thread(load, checked_progress)
        if engine is not None and not stopping.is_set():
            service.engine = engine
            on_ready(_url(options.host, listener), engine)
            await serving
    finally:
        server.should_exit = True
        await serving
        if engine is not None:
            await asyncio.to_thread(engine.close)


def _bind(options: ServerOptions) -> socket.socket:
    where = f"{options.host} port {options.port}"
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {options.host}: not an address of this machine ({error})") from None
    family, kind, protocol, _, address = found[0]
    if options.api_key is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise UsageError(
            f"--host {options.host} lets other machines in; give --api-key (or HYBRID_API_KEY) so that not everyone "
            "can use it"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {where} ({error.strerror}); choose another --port") from None
    return listener


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
