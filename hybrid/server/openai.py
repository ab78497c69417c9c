"""OpenAI's /v1/models and /v1/chat/completions: `ChatRequest` in, translated `Delta`s out."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from hybrid.reply import Reply
from hybrid.request import Delta, Request, ToolCallPiece, Usage
from hybrid.server.body import json_response, read_json_body
from hybrid.server.chat_request import ChatRequest, parse_chat_request
from hybrid.server.errors import ApiError, bad_request, from_hybrid, internal_error, unavailable
from hybrid.server.service import Pending, Service
from hybrid.server.sse import DONE, KEEPALIVE, KEEPALIVE_S, EventStream, event

log = logging.getLogger(__name__)

_STARTED = int(time.time())


def model_object(name: str, context: int) -> dict[str, Any]:
    """One entry of /v1/models, with the fields that OpenAI's, vLLM's and Anthropic's clients look for."""
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "hybrid",
        "max_model_len": context,
        "context_length": context,
        "type": "model",
        "display_name": name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_STARTED)),
    }


async def list_models(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    context = service.ready_engine().context
    return json_response(
        {"object": "list", "data": [model_object(name, context) for name in service.names()]}
    )


async def get_model(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    context, name = service.ready_engine().context, request.path_params["name"]
    if name not in service.names():
        raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
    return json_response(model_object(name, context))


async def chat_completions(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    engine = service.ready_engine()
    chat = parse_chat_request(await read_json_body(request))
    tools = chat.template_tools()
    params = chat.sampling()
    # long prompts take seconds to tokenise: not on the event loop
    prompt = await asyncio.to_thread(engine.prompt, chat.messages, tools)
    if len(prompt) >= engine.context:
        message = (
            f"the prompt has {len(prompt)} tokens and the context is {engine.context}; shorten the messages"
        )
        raise bad_request(message, "messages", "context_length_exceeded")
    pending = service.submit(Request(tuple(prompt), params))
    answer = Answer(service.names()[0])
    reply = engine.reply(tools or [])
    if chat.stream:
        events = _events(pending, reply, answer, chat)
        return EventStream(events, on_close=lambda: service.release(pending))
    try:
        return await _collect_unless_gone(request, pending, reply, answer)
    finally:
        service.release(pending)


class Answer:
    """One reply in OpenAI's shapes: whole, or in chunks."""

    def __init__(self, model: str) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._object("chat.completion.chunk", []), "usage": usage_object(usage)}

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The complete answer; `deltas` ends with the one that has the finish reason."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(d.content or "" for d in deltas),
            "refusal": None,
        }
        if reasoning := "".join(d.reasoning or "" for d in deltas):
            message["reasoning_content"] = reasoning
        if calls := _merged_calls([piece for d in deltas for piece in d.tool_calls]):
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        last = deltas[-1]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        answer = self._object("chat.completion", [choice])
        if last.usage is not None:
            answer["usage"] = usage_object(last.usage)
        return answer


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _merged_calls(pieces: list[ToolCallPiece]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.index not in calls:
            function = {"name": piece.name, "arguments": ""}
            calls[piece.index] = {"id": piece.id, "type": "function", "function": function}
        calls[piece.index]["function"]["arguments"] += piece.arguments
    return [calls[index] for index in sorted(calls)]


def _delta_object(delta: Delta) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if delta.content:
        out["content"] = delta.content
    if delta.reasoning:
        out["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        out["tool_calls"] = [_piece_object(piece) for piece in delta.tool_calls]
    return out


def _piece_object(piece: ToolCallPiece) -> dict[str, Any]:
    function = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    return {
        "index": piece.index,
        "id": piece.id,
        "type": "function",
        "function": {"name": piece.name, **function},
    }


def _failure(delta: Delta) -> ApiError | None:
    """Why a reply that has ended is no answer, if so."""
    if delta.error is not None:
        return from_hybrid(delta.error)
    return unavailable("the request was cancelled") if delta.finish_reason == "cancelled" else None


async def _events(pending: Pending, reply: Reply, answer: Answer, chat: ChatRequest) -> AsyncIterator[bytes]:
    """Chunks of one answer; whatever happens, one final chunk or one error, then [DONE]."""
    null_usage = {"usage": None} if chat.include_usage else {}
    try:
        yield event({**answer.chunk({"role": "assistant", "content": ""}), **null_usage})
        async for delta in pending.deltas(reply, KEEPALIVE_S):
            if delta is None:
                yield KEEPALIVE
                continue
            if fields := _delta_object(delta):
                yield event({**answer.chunk(fields), **null_usage})
            if delta.finish_reason is None:
                continue
            if failure := _failure(delta):
                yield event(failure.body())
                break
            yield event({**answer.chunk({}, delta.finish_reason), **null_usage})
            if chat.include_usage and delta.usage is not None:
                yield event(answer.usage_chunk(delta.usage))
    except Exception:
        log.exception("a streamed reply failed")
        yield event(internal_error().body())
    yield DONE


async def _collect_unless_gone(
    request: HttpRequest, pending: Pending, reply: Reply, answer: Answer
) -> Response:
    """The whole answer. Raises ClientDisconnect as soon as the client hangs up."""

    async def collect() -> list[Delta]:
        return [delta async for delta in pending.deltas(reply) if delta is not None]

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientDisconnect
        deltas = collecting.result()
    finally:
        collecting.cancel()
        leaving.cancel()
    if failure := _failure(deltas[-1]):
        raise failure
    return json_response(answer.whole(deltas))
