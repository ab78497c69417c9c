"""The Starlette application: routes, and every failure as an answer in OpenAI's error shape."""

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hybrid import __version__
from hybrid.server import openai
from hybrid.server.body import json_response
from hybrid.server.errors import RETRY_AFTER_S, ApiError, from_hybrid, internal_error
from hybrid.server.gate import Gate
from hybrid.server.service import Service
from offload.errors import HybridError

log = logging.getLogger(__name__)


def create_app(service: Service, api_key: str | None = None) -> ASGIApp:
    """The routes over `service`, whose engine may arrive later (until then: 503), behind the gate."""
    app = Starlette(
        routes=[
            Route("/", index),
            Route("/health", health),
            Route("/v1/models", openai.list_models),
            Route("/v1/models/{name:path}", openai.get_model),
            Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _api_error,
            HybridError: _hybrid_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _unexpected,
        },
    )
    app.state.service = service
    return Gate(app, api_key)


async def index(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    routes = [route.path for route in request.app.routes if isinstance(route, Route)]
    return json_response(
        {"name": "hybrid", "version": __version__, "status": service.status, "routes": routes}
    )


async def health(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    if service.status == "ok":
        return json_response({"status": "ok"})
    return json_response({"status": service.status}, 503, {"retry-after": str(RETRY_AFTER_S)})


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error.body(), error.status, error.headers)


async def _hybrid_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HybridError)
    answer = from_hybrid(error)
    if answer.status >= 500:
        log.error("%s %s: %s", request.method, request.url.path, error)
    return await _api_error(request, answer)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such route", 405: "this route has no such method"}
    message = f"{request.method} {request.url.path}: {what.get(error.status_code, error.detail)}"
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _gone(_: HttpRequest, __: Exception) -> Response:
    """Nobody is left to read this."""
    return Response(status_code=499)


async def _unexpected(request: HttpRequest, _: Exception) -> Response:
    """Starlette raises the exception again after this, so that uvicorn logs its traceback."""
    return await _api_error(request, internal_error())
