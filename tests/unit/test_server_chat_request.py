"""What of a chat completions body is accepted, refused and passed on."""

import json
from typing import Any

import pytest

from hybrid.server.chat_request import parse_chat_request
from hybrid.server.errors import ApiError
from offload.errors import RequestError

USER = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": USER, **fields}).encode()


def tool(name: str = "look", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        (b"", None, "not JSON"),
        (b"{", None, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', None, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "not JSON"),
        (b"[" * 100_000, None, "Expected `object`"),
        (b'{"x": ' + b"[" * 100_000, None, "nested too deeply"),
        (b'{"model": "m"}', None, "`messages`"),
        (body(messages=[]), "messages", "length"),
        (body(messages="hi"), "messages", "array"),
        (body(messages=["hi"]), "messages[0]", "object"),
        (body(temperature="warm"), "temperature", "float"),
        (body(temperature=True), "temperature", "float"),
        (body(max_tokens=2.5), "max_tokens", "int"),
        (body(stop=[1]), "stop[0]", "str"),
        (body(stream="yes"), "stream", "bool"),
        (body(stream_options={"include_usage": 1}), "stream_options.include_usage", "bool"),
        (body(tools=[{"type": "function"}]), "tools[0]", "function"),
        (body(tools=[{"type": "web_search"}]), "tools[0].type", "web_search"),
        (body(tools=[tool("two words")]), "tools[0].function.name", "letters"),
        (body(tools=[tool(), tool()]), "tools[1].function.name", "two tools"),
        (body(tools=[tool(parameters="none")]), "tools[0].function.parameters", "object"),
        (body(tools=[tool()], parallel_tool_calls=False), "parallel_tool_calls", "not supported"),
        (body(n=2), "n", "use 1"),
        (body(n=True), "n", "use 1"),
        (body(logprobs=True), "logprobs", "not supported"),
        (body(top_logprobs=3), "top_logprobs", "not supported"),
        (body(logit_bias={"5": 1}), "logit_bias", "not supported"),
        (body(presence_penalty=0.5), "presence_penalty", "not supported"),
        (body(tool_choice="required"), "tool_choice", '"auto"'),
        (
            body(tool_choice={"type": "function", "function": {"name": "look"}}),
            "tool_choice",
            "not supported",
        ),
        (body(response_format={"type": "json_object"}), "response_format", '"text"'),
        (body(response_format={"type": "json_schema"}), "response_format", "not supported"),
        (body(functions=[{"name": "f"}]), "functions", "not supported"),
        (body(modalities=["text", "audio"]), "modalities", "not supported"),
        (body(audio={"voice": "x"}), "audio", "leave it out"),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_field(raw: bytes, param: str | None, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(raw)
    error = caught.value.body()["error"]
    assert caught.value.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "n": 1,
            "logprobs": False,
            "top_logprobs": 0,
            "logit_bias": {},
            "presence_penalty": 0.0,
            "top_k": -1,
        },
        {"tool_choice": "auto", "parallel_tool_calls": True, "tools": [tool()]},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
        {
            "user": "me",
            "metadata": {"a": "b"},
            "store": False,
            "prompt_cache_key": "k",
            "reasoning_effort": "low",
        },
        {
            "thinking": {"type": "disabled"},
            "service_tier": "auto",
            "safety_identifier": "x",
            "verbosity": "low",
        },
        {
            "temperature": None,
            "max_tokens": None,
            "stop": None,
            "seed": None,
            "tools": None,
            "stream_options": None,
        },
    ],
)
def test_fields_that_ask_for_nothing_special_change_nothing(fields: dict[str, Any]) -> None:
    given, plain = parse_chat_request(body(**fields)), parse_chat_request(body())
    assert given.messages == plain.messages == USER
    assert given.sampling() == plain.sampling()
    assert not given.stream
    assert not given.include_usage
    declared = fields.get("tools") or []
    assert [t["function"]["name"] for t in given.template_tools() or []] == [
        t["function"]["name"] for t in declared
    ]


def test_sampling_takes_openais_names() -> None:
    given = body(temperature=0, top_p=0.9, max_tokens=5, max_completion_tokens=9, stop=["a", "b"], seed=3)
    params = parse_chat_request(given).sampling()
    assert (params.temperature, params.top_p, params.max_tokens) == (0.0, 0.9, 9)
    assert (params.stop, params.seed) == (("a", "b"), 3)
    assert parse_chat_request(body(stop="x")).sampling().stop == ("x",)
    defaults = parse_chat_request(body()).sampling()
    assert (defaults.temperature, defaults.max_tokens) == (0.6, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_values_out_of_range_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat_request(body(**fields)).sampling()
    assert caught.value.param == param


def test_tools_reach_the_template_in_one_form() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "number"}}}
    given = tool("look.up-2", strict=True, parameters=schema, description="Looks.")
    request = parse_chat_request(body(tools=[given]))
    function = {"name": "look.up-2", "description": "Looks.", "parameters": schema}
    assert json.dumps(request.template_tools()) == json.dumps([{"type": "function", "function": function}])
    assert parse_chat_request(body(tools=[given], tool_choice="none")).template_tools() is None
    assert parse_chat_request(body(tools=[])).template_tools() is None
