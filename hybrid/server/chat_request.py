"""The body of a /v1/chat/completions request: its types, and what of it can be honoured.

A field that would change the answer and is not supported is refused by name; fields that only inform
(`user`, `metadata`, `store`, ...) are ignored.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from hybrid.request import SamplingParams
from hybrid.server.errors import ApiError, bad_request
from offload.errors import RequestError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "chat_template_kwargs": ({},),
}
"""Fields that would change the answer, and the values (besides null) that ask for nothing of the kind."""


class Function(Struct, omit_defaults=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Struct):
    function: Function
    type: Literal["function"]


class StreamOptions(Struct):
    include_usage: bool = False


class ChatRequest(Struct):
    """OpenAI's names. See `NEUTRAL` for the fields typed Any; the chat template checks the messages."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    parallel_tool_calls: bool | None = None
    n: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    top_k: Any = None
    min_p: Any = None
    response_format: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    chat_template_kwargs: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> SamplingParams:
        """Raises RequestError for values out of range."""
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise RequestError("max_completion_tokens must be 1 or more", param="max_completion_tokens")
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "stop": tuple(self.stop) if isinstance(self.stop, list) else self.stop,
            "seed": self.seed,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools to declare; none when `tool_choice` is "none"."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [{"type": "function", "function": msgspec.to_builtins(tool.function)} for tool in self.tools]


_decoder = msgspec.json.Decoder(ChatRequest)


def parse_chat_request(body: bytes) -> ChatRequest:
    """Decode and check a body. Raises ApiError 400 that names the field at fault."""
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise bad_request(_explain(problem, path), path.rstrip("`") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not JSON in UTF-8: {error}") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    _check(request)
    return request


def _explain(problem: str, path: str) -> str:
    field = path.rstrip("`")
    if field.endswith(".function.name") and "matching regex" in problem:
        problem = "a function's name is 1 to 128 letters, digits, '_', '.' or '-'"
    return f"{field}: {problem}" if field else problem


def _check(request: ChatRequest) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and not any(_same(value, ok) for ok in neutral):
            raise _unsupported(name, value, neutral)
    if request.tools:
        if request.parallel_tool_calls is False and request.tool_choice != "none":
            raise _unsupported("parallel_tool_calls", False, (True,))
        names = [tool.function.name for tool in request.tools]
        for i, tool in enumerate(request.tools):
            if tool.function.name in names[:i]:
                raise bad_request(f"two tools are called {tool.function.name!r}", f"tools[{i}].function.name")


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON: 0 is 0.0 and is not false."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _unsupported(name: str, value: Any, neutral: tuple[Any, ...]) -> ApiError:
    shown = msgspec.json.encode(value).decode()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    choices = " or ".join(msgspec.json.encode(ok).decode() for ok in neutral)
    remedy = f"use {choices} or leave it out" if neutral else "leave it out"
    return bad_request(f"{name} = {shown} is not supported; {remedy}", name, "unsupported_value")
