"""Server-sent events: lines, and a response that always lets go of what it streams from."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

KEEPALIVE = b": keepalive\n\n"
KEEPALIVE_S = 15.0
"""Silence after which a comment is sent, so that neither clients nor proxies give up in a long prefill."""

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def event(payload: Any) -> bytes:
    """One event. JSON escapes newlines, so the payload is a single line."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


class EventStream(StreamingResponse):
    """Streams events; headers go out at once. `on_close` runs however it ends, a hang-up included."""

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        # x-accel-buffering: nginx would hold the events back otherwise
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
