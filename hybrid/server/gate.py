"""ASGI middleware at the door: request ids, the API key, and no entry for web pages of other sites."""

import hmac
import re
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.server.body import json_response
from hybrid.server.errors import ApiError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}


class Gate:
    """Checks every request before the routes see it.

    With a key, /v1/* needs it. Without one the server listens on loopback alone (`run.serve` sees to
    that), and the Host header must say so too: a web page whose name was rebound to 127.0.0.1 says its own.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out["x-request-id"] = out["request-id"] = request_id
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        if refusal is None:
            await self.app(scope, receive, send_with_id)
        else:
            response = json_response(refusal.body(), refusal.status, refusal.headers)
            await response(scope, receive, send_with_id)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self.api_key is None:
            host = headers.get("host", "")
            if _hostname(host) in _LOOPBACK_HOSTS:
                return None
            return ApiError(
                403,
                f"the Host header is {host!r}; without an API key only localhost is answered (set --api-key)",
            )
        if not path.startswith("/v1/"):
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        for key in (bearer, headers.get("x-api-key", "")):
            if hmac.compare_digest(key.encode(), self.api_key.encode()):
                return None
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY or x-api-key: KEY"
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
