"""`Reply`: one request's steps, turned into the deltas that the terminal and every HTTP API translate."""

from collections.abc import Mapping
from typing import Any

from hybrid.request import Delta, FinishReason, Step
from hybrid.tool_parser import ALL_MARKERS, ToolParser


class Reply:
    """Feed it each `Step`; it returns what that step made certain. The last delta has the finish reason.

    Args:
        tools: the tools declared to the model, in OpenAI's format; an empty list: none, so nothing it writes is a
            call. None: unknown.
        special_ids: the tokenizer's special tokens, name -> id. Only these tokens act as markers: a model that
            quotes a marker writes it in ordinary ones.
    """

    def __init__(self, tools: list[dict[str, Any]] | None, special_ids: Mapping[str, int]) -> None:
        self._parser = ToolParser(tools)
        self._markers = {special_ids[marker]: marker for marker in ALL_MARKERS if marker in special_ids}

    def push(self, step: Step) -> list[Delta]:
        text, marker = step.text, self._markers.get(step.token_id)
        if marker is not None and text.endswith(marker):  # what is before it was withheld until now
            deltas = self._parser.feed(text.removesuffix(marker), literal=True)
            deltas += self._parser.feed(marker)
        else:
            deltas = self._parser.feed(text, literal=True)
        if step.finish_reason is None:
            return deltas
        deltas += self._parser.finish()
        reason: FinishReason = step.finish_reason
        if reason == "stop" and self._parser.has_tool_calls:
            reason = "tool_calls"
        return [*deltas, Delta(finish_reason=reason, usage=step.usage, error=step.error)]
