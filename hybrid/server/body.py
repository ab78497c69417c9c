"""JSON bodies over HTTP: read with bounds on size and time, written by msgspec."""

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from hybrid.server.errors import ApiError

MAX_BODY_BYTES = 16 << 20
READ_TIMEOUT_S = 60.0


def json_response(payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(payload), status, headers, media_type="application/json")


async def read_json_body(request: HttpRequest) -> bytes:
    """The request's body, undecoded.

    Raises:
        ApiError: 415 for another content type (JSON alone makes a browser ask before it posts across
            origins), 413 beyond `MAX_BODY_BYTES`, 408 when it does not arrive in time.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, f"content-type is {media_type or 'missing'!r}; send application/json")
    too_large = ApiError(413, f"the body exceeds {MAX_BODY_BYTES} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {READ_TIMEOUT_S:.0f} s") from None
    return bytes(body)
