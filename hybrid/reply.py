"""`Reply`: one request's steps, turned into the deltas that the terminal and every HTTP API translate."""

from typing import Any

from hybrid.request import Delta, FinishReason, Step
from hybrid.tool_parser import ToolParser


class Reply:
    """Feed it each `Step`; it returns what that step made certain. The last delta has the finish reason.

    Args:
        tools: the tools declared to the model, in OpenAI's format.
    """

    def __init__(self, tools: list[dict[str, Any]] | None = None) -> None:
        self._parser = ToolParser(tools)

    def push(self, step: Step) -> list[Delta]:
        deltas = self._parser.feed(step.text) if step.text else []
        if step.finish_reason is None:
            return deltas
        deltas += self._parser.finish()
        reason: FinishReason = step.finish_reason
        if reason == "stop" and self._parser.has_tool_calls:
            reason = "tool_calls"
        return [*deltas, Delta(finish_reason=reason, usage=step.usage, error=step.error)]
