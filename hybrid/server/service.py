"""`Service`: what the routes share, and `Pending`: one request in the engine, seen from the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from hybrid.request import Delta, Request, Step
from hybrid.server.errors import unavailable
from offload.errors import EngineClosed, HybridError

if TYPE_CHECKING:
    from hybrid.engine import Engine
    from hybrid.reply import Reply


class Pending:
    """A submitted request. Everything here runs on the event loop, except `_from_engine`.

    Raises what `Engine.submit` raises.
    """

    def __init__(self, engine: "Engine", request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step] = asyncio.Queue()
        self._ticket = engine.submit(request, self._from_engine)

    def _from_engine(self, step: Step) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    @property
    def waiting(self) -> bool:
        """Whether its turn has not come yet."""
        return self._ticket.waiting

    def cancel(self) -> None:
        """Free its turn, or its place in the queue."""
        self._ticket.cancel()

    def refuse(self, error: HybridError) -> None:
        """End it now: its reader gets `error` as the last step."""
        self._steps.put_nowait(Step(-1, "", finish_reason="error", error=error))
        self._ticket.cancel()

    async def deltas(self, reply: "Reply", silence_s: float | None = None) -> AsyncIterator[Delta | None]:
        """The reply, up to the delta with a finish reason; None after every `silence_s` without any."""
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    step = await self._steps.get()
            except TimeoutError:
                yield None
                continue
            for delta in reply.push(step):
                yield delta
            if step.finish_reason is not None:
                return


class Service:
    """The engine once it is loaded, the names it goes by, and every request now in it."""

    def __init__(self, aliases: tuple[str, ...] = ()) -> None:
        self.engine: Engine | None = None
        self.aliases = aliases
        self.draining = False
        self.active: set[Pending] = set()

    @property
    def status(self) -> str:
        if self.draining:
            return "draining"
        return "loading" if self.engine is None else "ok"

    def ready_engine(self) -> "Engine":
        """The engine, or ApiError 503."""
        if self.draining:
            raise unavailable("the server is shutting down")
        if self.engine is None:
            raise unavailable("the model is still loading")
        return self.engine

    def names(self) -> tuple[str, ...]:
        """What /v1/models lists; the first is how replies call the model."""
        return self.aliases or (self.ready_engine().name,)

    def submit(self, request: Request) -> Pending:
        """Hand a request to the engine; `release` it when its reader is done or gone."""
        pending = Pending(self.ready_engine(), request)
        self.active.add(pending)
        return pending

    def release(self, pending: Pending) -> None:
        pending.cancel()
        self.active.discard(pending)

    def drain(self) -> None:
        """Take nothing new and turn away whoever still waits; what runs goes on."""
        self.draining = True
        for pending in list(self.active):
            if pending.waiting:
                pending.refuse(EngineClosed("the server is shutting down"))

    def refuse_all(self) -> None:
        """End what still runs."""
        for pending in list(self.active):
            pending.refuse(EngineClosed("the server is shutting down"))
