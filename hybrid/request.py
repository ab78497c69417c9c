"""What goes into the engine (`Request`, `SamplingParams`) and what comes out (`Step`, `Delta`).

Plain data; no behaviour beyond validation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from offload.errors import HybridError, RequestError

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]

MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; field names are vLLM's.

    Args:
        temperature: 0 is greedy. K2's recommended value is the default.
        top_p: nucleus mass in (0, 1].
        max_tokens: at most this many new tokens; None: what the context leaves.
        stop: a string or strings that end the text; they are not part of it.
        seed: makes sampling reproducible; None draws one.
        ignore_eos: go on after an end-of-text token (benchmarks).
        logprobs: fill `Step.logprob`.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:  # NaN fails too
            raise RequestError(f"temperature is {self.temperature}; use 0 to 100", param="temperature")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}; use a number above 0, at most 1", param="top_p")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; use 1 or more", param="max_tokens")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if len(self.stop) > MAX_STOP_STRINGS or any(not s for s in self.stop):
            raise RequestError(f"stop takes up to {MAX_STOP_STRINGS} non-empty strings", param="stop")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise RequestError("seed must fit in 64 bits", param="seed")


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: prompt token ids and how to continue them."""

    token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


class Usage(NamedTuple):
    """Token counts of one request. `cached_tokens` of the prompt came from a kept prefix."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Step(NamedTuple):
    """One generated token.

    `text` is what became certain with this token: whole UTF-8 characters, stop strings withheld.
    `token_id` is -1 on a closing step that only flushes text. `finish_reason` and `usage` are set on
    the last step alone; with `finish_reason` "error", `error` says what went wrong.
    """

    token_id: int
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: HybridError | None = None


class ToolCallPiece(NamedTuple):
    """Part of a tool call. The first piece of a call has `id` and `name`; `arguments` pieces are
    concatenated by `index` and give one JSON text."""

    index: int  # type: ignore[assignment] # OpenAI's name for it; it hides tuple.index, which nobody needs here
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a chat reply; the terminal and every HTTP API are translations of a stream of these."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallPiece] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: HybridError | None = None
