"""`hybrid serve` as a process, asked by the official openai client; clients that vanish, and SIGTERM."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from offload.checkpoint import Checkpoint
from offload.shard import TensorInfo
from tests.serving import KEY, Server, command, serving

MESSAGES = [{"role": "user", "content": "Tell me something."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with serving(tiny_model, "--alias", "kimi") as server:
        yield server


def open_stream(server: Server, **fields: object) -> socket.socket:
    """A raw streamed request, so that hanging up is exactly that; its answer's headers are read."""
    body = json.dumps({"messages": MESSAGES, "stream": True, **fields}).encode()
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_plain_and_streamed_chat_agree(server: Server) -> None:
    client = server.client()
    settings = {"model": "kimi", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    plain = client.chat.completions.create(**settings)
    usage = plain.usage
    assert usage is not None
    assert usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert plain.choices[0].finish_reason in ("length", "stop")
    assert plain.choices[0].message.content

    chunks = list(
        client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens


def test_seed_repeats_a_sampled_reply(server: Server) -> None:
    client = server.client()

    def text(seed: int) -> str | None:
        reply = client.chat.completions.create(
            model="any", messages=MESSAGES, temperature=1, seed=seed, max_tokens=16
        )
        return reply.choices[0].message.content

    assert text(1) == text(1) != text(2)


def test_tools_are_part_of_the_prompt_and_their_history_is_accepted(server: Server) -> None:
    client = server.client()

    def prompt_tokens(messages: list[dict[str, object]], **fields: object) -> int:
        reply = client.chat.completions.create(model="kimi", messages=messages, max_tokens=4, **fields)  # type: ignore[call-overload]
        assert reply.usage is not None
        return int(reply.usage.prompt_tokens)

    bare = prompt_tokens([*MESSAGES])
    assert prompt_tokens([*MESSAGES], tools=TOOLS) > bare
    assert prompt_tokens([*MESSAGES], tools=TOOLS, tool_choice="none") == bare
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
    }
    history = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Rain."}]},
    ]
    assert prompt_tokens(history, tools=TOOLS) > bare
    streamed = client.chat.completions.create(
        model="kimi", messages=MESSAGES, tools=TOOLS, max_tokens=8, stream=True
    )
    assert [c.choices[0].finish_reason for c in streamed][-1] in ("length", "stop", "tool_calls")


def test_a_turn_reuses_the_conversation_so_far(server: Server) -> None:
    messages = [{"role": "user", "content": "A question that no other test asks, of some length. " * 4}]
    client = server.client()
    first = client.chat.completions.create(model="kimi", messages=messages, max_tokens=4)
    second = client.chat.completions.create(model="kimi", messages=messages, max_tokens=4)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert first.usage.prompt_tokens // 2 < cached < second.usage.prompt_tokens


def test_models_and_health(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["kimi"]
    assert server.client().models.retrieve("kimi").id == "kimi"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_errors_are_the_clients_own_exceptions(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="kimi", messages=MESSAGES, n=3)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="kimi", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.APIStatusError) as too_large:
        client.chat.completions.create(
            model="kimi", messages=[{"role": "user", "content": "x" * (17 << 20)}], max_tokens=1
        )
    assert too_large.value.status_code == 413
    assert client.chat.completions.create(model="kimi", messages=MESSAGES, max_tokens=1).choices


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        b"GET /%00%ff HTTP/1.1\r\nHost: \xff\r\n\r\n",
    ],
)
def test_broken_http_does_no_harm(server: Server, raw: bytes) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(raw)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_ten_clients_at_once_of_which_three_vanish(server: Server) -> None:
    settings = {"model": "kimi", "messages": MESSAGES, "temperature": 0, "max_tokens": 48}
    wanted = server.client().chat.completions.create(**settings).choices[0].message.content

    # no max_tokens: each would go on for minutes if its hang-up were not noticed
    vanishing = [open_stream(server, ignore="me", temperature=1.0, seed=i) for i in range(3)]
    assert vanishing[0].recv(1000).startswith(b"HTTP/1.1 200")

    async def plain(client: openai.AsyncOpenAI) -> str | None:
        return (await client.chat.completions.create(**settings)).choices[0].message.content

    async def streamed(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(**settings, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def scene() -> list[str | None]:
        async with server.async_client() as client:
            tasks = [asyncio.create_task(ask(client)) for ask in (plain, streamed, plain, streamed)]
            tasks += [asyncio.create_task(ask(client)) for ask in (plain, streamed, plain)]
            await asyncio.sleep(0.5)
            for connection in vanishing:
                connection.close()
            return await asyncio.gather(*tasks)

    begin = time.monotonic()
    assert asyncio.run(scene()) == [wanted] * 7
    assert time.monotonic() - begin < 60


def test_a_client_that_vanishes_unstreamed_frees_its_turn(server: Server) -> None:
    connection = open_stream(server, stream=False, temperature=1.0)
    time.sleep(0.5)
    connection.close()
    begin = time.monotonic()
    server.client().chat.completions.create(model="kimi", messages=MESSAGES, max_tokens=2)
    assert time.monotonic() - begin < 20


def test_a_full_queue_is_429(server: Server) -> None:
    connections = []
    try:
        connections += [open_stream(server, temperature=1.0) for _ in range(80)]
        with pytest.raises(openai.RateLimitError) as caught:
            server.client().chat.completions.create(model="kimi", messages=MESSAGES, max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) > 0
    finally:
        for connection in connections:
            connection.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            server.client().chat.completions.create(model="kimi", messages=MESSAGES, max_tokens=1)
            return
        except openai.RateLimitError:
            time.sleep(0.1)
    pytest.fail("the places of vanished clients were not freed")


def test_a_damaged_expert_is_the_servers_fault_and_it_lives_on(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "damaged"))
    infos = [
        Checkpoint.open(model).info(f"model.layers.1.mlp.experts.{expert}.down_proj.weight")
        for expert in range(32)  # whichever the router picks
    ]
    sound = [swap_byte(info, b"\xff") for info in infos]
    with serving(model) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=1)
        assert caught.value.status_code == 500
        assert "log has the cause" in caught.value.message
        assert str(tmp_path) not in caught.value.response.text
        with pytest.raises(openai.APIError, match="log has the cause"):
            list(client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=1, stream=True))
        for info, byte in zip(infos, sound, strict=True):
            swap_byte(info, byte)  # the mapping shows it at once
        assert client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=1).choices
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None
        log = server.process.stderr.read()
        assert len(re.findall(rf"{tmp_path}.*layers\.1\.mlp\.experts\.\d+.*a weight is NaN", log)) == 2


def swap_byte(info: TensorInfo, byte: bytes) -> bytes:
    """Write a tensor's first byte; returns what was there."""
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        before = stream.read(1)
        stream.seek(info.start)
        stream.write(byte)
    return before


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    out = b""
    with connection:
        while part := connection.recv(1 << 16):
            out += part
    return out


def test_sigterm_drains(tiny_model: Path) -> None:
    with serving(tiny_model, "--drain-seconds", "120") as server:
        running = open_stream(server, temperature=0, max_tokens=200)
        assert b"200 OK" in running.recv(100)
        queued = open_stream(server, max_tokens=400)
        assert b"200 OK" in queued.recv(100)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        finished, refused = read_all(running), read_all(queued)
        assert re.search(rb'"finish_reason":"(length|stop)"', finished)
        assert b"[DONE]" in finished
        assert b"shutting down" in refused
        assert b"[DONE]" in refused
        assert server.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        assert server.process.stderr is not None
        assert "Traceback" not in server.process.stderr.read()


def test_draining_is_bounded(tiny_model: Path) -> None:
    with serving(tiny_model, "--drain-seconds", "0.5") as server:
        endless = open_stream(server, temperature=1.0)
        assert b"200 OK" in endless.recv(100)
        server.process.send_signal(signal.SIGINT)
        rest = read_all(endless)
        assert b"shutting down" in rest or b'"finish_reason":"stop"' in rest
        assert server.process.wait(30) == 0


def test_health_is_503_while_loading_and_a_signal_ends_that_too(tiny_model: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        command("serve", str(tiny_model), "--port", str(port)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                first = httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                time.sleep(0.01)
        assert (first.status_code, first.json()) == (503, {"status": "loading"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.communicate() == (b"", b"")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "no.such.host.invalid"], "not an address"),
        (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen"),
        (["--api-key", ""], "empty"),
    ],
)
def test_bad_options_are_refused_before_loading(tiny_model: Path, arguments: list[str], says: str) -> None:
    done = subprocess.run(
        command("serve", str(tiny_model), "--port", "0", *arguments),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_refused(tiny_model: Path, server: Server) -> None:
    port = str(urlsplit(server.url).port)
    done = subprocess.run(
        command("serve", str(tiny_model), "--port", port), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "choose another --port" in done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    done = subprocess.run(
        command("serve", str(tmp_path), "--port", "0"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
