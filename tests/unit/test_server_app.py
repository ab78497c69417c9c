"""The routes over a scripted engine: shapes, statuses, and that every request has one end."""

import asyncio
import json
import threading
from typing import Any

import httpx2 as httpx
import pytest

from hybrid.request import Step
from hybrid.server import openai
from hybrid.server.app import create_app
from hybrid.server.body import MAX_BODY_BYTES
from hybrid.server.service import Service
from offload.errors import (
    CheckpointError,
    ConfigError,
    EngineClosed,
    HybridError,
    Overloaded,
    RequestError,
    TemplateError,
)
from tests.scripted import ScriptedEngine, failed, said

MESSAGE_500 = "internal error; the server's log has the cause"
CHAT = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>",
    '{"at":',
    ' "sky"}<|tool_call_end|><|tool_calls_section_end|>',
)


def service_of(engine: ScriptedEngine | None, *aliases: str) -> Service:
    service = Service(aliases)
    service.engine = engine  # type: ignore[assignment]
    return service


def ask(
    service: Service,
    method: str,
    path: str,
    *,
    api_key: str | None = None,
    base_url: str = "http://localhost:8000",
    **request: Any,
) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service, api_key), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def chat(engine: ScriptedEngine, **fields: Any) -> httpx.Response:
    return ask(service_of(engine), "POST", "/v1/chat/completions", json={**CHAT, **fields})


def events(response: httpx.Response) -> list[Any]:
    """The data of all events; comments left out."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_plain_answer() -> None:
    engine = ScriptedEngine(said("Hel", "lo"))
    response = chat(engine, max_tokens=5, temperature=0)
    assert response.status_code == 200
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "scripted"
    message = {"role": "assistant", "content": "Hello", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    params = engine.requests[0].params
    assert (params.max_tokens, params.temperature) == (5, 0)


def test_streamed_answer_with_usage() -> None:
    response = chat(ScriptedEngine(said("Hel", "lo")), stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 5
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_usage_is_sent_only_when_asked_for() -> None:
    assert all(
        "usage" not in chunk
        for chunk in events(chat(ScriptedEngine(said("a")), stream=True))
        if chunk != "[DONE]"
    )


def test_tool_calls_plain_and_streamed() -> None:
    engine = ScriptedEngine(said("Looking.", *CALL), said(*CALL), said(*CALL))
    choice = chat(engine, tools=TOOLS).json()["choices"][0]
    call = {"id": "functions.look:0", "type": "function"}
    function = {"name": "look", "arguments": '{"at": "sky"}'}
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Looking."
    assert choice["message"]["tool_calls"] == [{**call, "function": function}]
    assert engine.prompts[0][1] == TOOLS
    assert chat(engine, tools=TOOLS).json()["choices"][0]["message"]["content"] is None

    chunks = [c["choices"][0] for c in events(chat(engine, tools=TOOLS, stream=True)) if c != "[DONE]"]
    assert chunks[-1]["finish_reason"] == "tool_calls"
    pieces = [piece for c in chunks for piece in c["delta"].get("tool_calls", [])]
    assert pieces[0]["id"] == "functions.look:0"
    assert pieces[0]["function"]["name"] == "look"
    assert all("id" not in piece and "name" not in piece["function"] for piece in pieces[1:])
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == {"at": "sky"}


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_where_no_tool_may_be_called_a_call_is_text(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine(said("Looking.", *CALL), said("Looking.", *CALL))
    choice = chat(engine, **fields).json()["choices"][0]
    text = 'Looking.functions.look:0{"at": "sky"}'
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert engine.prompts[0][1] is None
    chunks = [c["choices"][0] for c in events(chat(engine, stream=True, **fields))[:-1]]
    assert "".join(c["delta"].get("content", "") for c in chunks) == text
    assert chunks[-1]["finish_reason"] == "stop"


def test_reasoning_is_kept_apart() -> None:
    engine = ScriptedEngine(said("<think>Hm.</think>Yes."), said("<think>Hm.</think>Yes."))
    message = chat(engine).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    deltas = [c["choices"][0]["delta"] for c in events(chat(engine, stream=True))[:-1]]
    assert {"reasoning_content": "Hm."} in deltas
    assert {"content": "Yes."} in deltas


def test_a_failure_while_running_is_one_error() -> None:
    response = chat(ScriptedEngine(failed("the disk is gone")))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == MESSAGE_500
    *_, error, done = events(chat(ScriptedEngine(failed("the disk is gone")), stream=True))
    assert error == {"error": {"message": MESSAGE_500, "type": "server_error", "param": None, "code": None}}
    assert done == "[DONE]"


def test_a_bug_in_a_stream_ends_it_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine([Step(1, 5)])  # type: ignore[arg-type]
    *_, error, done = events(chat(engine, stream=True))
    assert error["error"]["message"].startswith("internal error")
    assert done == "[DONE]"
    assert "a streamed reply failed" in caplog.text


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "KEEPALIVE_S", 0.05)
    hold = threading.Event()
    threading.Timer(0.4, hold.set).start()
    response = chat(ScriptedEngine([hold, *said("late")]), stream=True)
    assert response.text.count(": keepalive\n\n") >= 3
    assert events(response)[-1] == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("64 requests wait"), 429, "rate_limit_exceeded"),
        (EngineClosed("closed"), 503, "service_unavailable"),
        (RequestError("token ids", param="prompt"), 400, None),
        (TemplateError("no template"), 400, None),
        (CheckpointError("NaN", file="/srv/model", remedy="Mend it."), 500, None),
        (ConfigError("/srv/model/config.json: broken"), 500, None),
        (HybridError("internal error: OSError: /srv/model"), 500, None),
    ],
)
def test_a_refused_request_has_a_status_even_if_streamed(
    error: Exception, status: int, code: str | None, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    response = chat(ScriptedEngine(error), stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert "/srv/model" not in response.text
    assert (str(error) in caplog.text) == (status >= 500)


def test_messages_are_checked_by_the_template() -> None:
    response = chat(ScriptedEngine(), messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0]"


def test_a_model_without_a_template_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()

    def refuse(*_: Any) -> list[int]:
        raise TemplateError("no chat template")

    monkeypatch.setattr(engine, "prompt", refuse)
    response = chat(engine)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "no chat template")


def test_a_prompt_beyond_the_context_has_openais_code() -> None:
    response = chat(ScriptedEngine(), messages=[{"role": "user", "content": "x" * 1000}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_unexpected_exceptions_are_a_500_with_no_detail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine()

    def explode(*_: Any) -> list[int]:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine, "prompt", explode)
    response = chat(engine)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "x-request-id" in response.headers


def test_content_type_and_size_are_bounded() -> None:
    service = service_of(ScriptedEngine())
    form = ask(service, "POST", "/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert form.status_code == 415
    headers = {"content-type": "application/json"}
    big = b" " * (MAX_BODY_BYTES + 1)
    assert ask(service, "POST", "/v1/chat/completions", content=big, headers=headers).status_code == 413

    async def parts() -> Any:  # no content-length
        for _ in range(17):
            yield b" " * (1 << 20)

    assert ask(service, "POST", "/v1/chat/completions", content=parts(), headers=headers).status_code == 413


def test_models() -> None:
    listed = ask(service_of(ScriptedEngine()), "GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [(m["id"], m["object"], m["max_model_len"]) for m in listed["data"]] == [
        ("scripted", "model", 1000)
    ]
    aliased = service_of(ScriptedEngine(said("x")), "a/b", "c")
    assert [m["id"] for m in ask(aliased, "GET", "/v1/models").json()["data"]] == ["a/b", "c"]
    assert ask(aliased, "GET", "/v1/models/a/b").json()["id"] == "a/b"
    missing = ask(aliased, "GET", "/v1/models/scripted")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert ask(aliased, "POST", "/v1/chat/completions", json=CHAT).json()["model"] == "a/b"


def test_index_health_and_unknown_routes() -> None:
    service = service_of(ScriptedEngine())
    assert ask(service, "HEAD", "/").status_code == 200
    assert "/v1/chat/completions" in ask(service, "GET", "/").json()["routes"]
    assert ask(service, "GET", "/health").json() == {"status": "ok"}
    unknown = ask(service, "GET", "/v2")
    assert (unknown.status_code, "error" in unknown.json()) == (404, True)
    wrong = ask(service, "GET", "/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_not_ready_is_503(state: str) -> None:
    service = service_of(None if state == "loading" else ScriptedEngine())
    if state == "draining":
        service.drain()
    health = ask(service, "GET", "/health")
    assert (health.status_code, health.json()) == (503, {"status": state})
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
        response = ask(service, method, path, json=CHAT)
        assert response.status_code == 503
        assert "retry-after" in response.headers


def test_the_api_key_guards_v1() -> None:
    service = service_of(ScriptedEngine())

    def status(path: str, **headers: str) -> int:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        url = "http://example.org"
        return ask(service, "GET", path, api_key="s3cret", base_url=url, headers=sent).status_code

    assert status("/v1/models") == 401
    assert status("/v1/models", authorization="Bearer wrong") == 401
    assert status("/v1/models", authorization="Basic s3cret") == 401
    assert status("/v1/models", x_api_key="s3cre") == 401
    assert status("/v1/models", authorization="Bearer s3cret") == 200
    assert status("/v1/models", authorization="bearer  s3cret") == 200
    assert status("/v1/models", x_api_key="s3cret") == 200
    assert status("/health") == 200


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://127.0.0.1:1", 200),
        ("http://localhost", 200),
        ("http://[::1]:9", 200),
        ("http://attacker.example", 403),
        ("http://localhost.attacker.example", 403),
    ],
)
def test_without_a_key_only_this_machines_names_are_answered(url: str, status: int) -> None:
    assert ask(service_of(ScriptedEngine()), "GET", "/v1/models", base_url=url).status_code == status


def test_request_ids() -> None:
    service = service_of(ScriptedEngine())
    own = ask(service, "GET", "/health", headers={"x-request-id": "abc-1"})
    assert own.headers["x-request-id"] == own.headers["request-id"] == "abc-1"
    other = ask(service, "GET", "/health", headers={"x-request-id": "a b"})
    assert other.headers["x-request-id"].startswith("req_")


def test_every_reader_is_released() -> None:
    service = service_of(ScriptedEngine(said("a"), said("b"), failed("c")))
    for stream in (True, False, True):
        ask(service, "POST", "/v1/chat/completions", json={**CHAT, "stream": stream})
    assert service.active == set()


def test_draining_turns_the_waiting_away_and_lets_the_running_finish() -> None:
    hold = threading.Event()
    engine = ScriptedEngine([hold, *said("done")], [hold, *said("never")])
    service = service_of(engine)

    async def scene() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            while len(engine.tickets) < 1:
                await asyncio.sleep(0.01)
            queued = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            while len(engine.tickets) < 2:
                await asyncio.sleep(0.01)
            engine.tickets[1].waiting = True
            service.drain()
            refused = await queued
            hold.set()
            return [refused, await running]

    refused, finished = asyncio.run(scene())
    assert refused.status_code == 503
    assert finished.json()["choices"][0]["message"]["content"] == "done"
