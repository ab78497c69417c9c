"""Conversations in OpenAI's message format, checked and brought into the form that chat templates read.

Nothing here renders: hybrid/chat.py does, with the checkpoint's own template.
"""

import re
from typing import Any

from offload.errors import RequestError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
NATIVE_ID = re.compile(r"functions\.(?P<name>.+):(?P<index>\d{1,9})")


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A checked copy of `messages` with only what templates use.

    Content becomes one string. Tool calls get K2's own ids, `functions.NAME:INDEX` with INDEX counted over the
    conversation, and so do the results that answer them: on foreign ids the model calls tools far worse. A
    result without a name gets its call's.

    Raises:
        RequestError: a message is not of OpenAI's form, or holds something other than text.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is empty; give at least one message", param="messages")
    ids = _CallIds()
    return [_message(message, f"messages[{i}]", ids) for i, message in enumerate(messages)]


def check_tools(tools: list[dict[str, Any]]) -> None:
    """Raises RequestError unless each tool is an object with a named function."""
    if not isinstance(tools, list):
        raise RequestError("tools must be a list", param="tools")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RequestError(f"tools[{i}] needs function.name, a non-empty string", param=f"tools[{i}]")


class _CallIds:
    """Gives calls their native ids and remembers which caller's id became which."""

    def __init__(self) -> None:
        self._next = 0
        self._given: dict[str, tuple[str, str]] = {}

    def give(self, caller_id: str, name: str) -> str:
        native = NATIVE_ID.fullmatch(caller_id)
        if native and native["name"] == name:
            self._next = max(self._next, int(native["index"]) + 1)
            given = caller_id
        else:
            given = f"functions.{name}:{self._next}"
            self._next += 1
        self._given[caller_id] = given, name
        return given

    def answered(self, caller_id: str) -> tuple[str, str | None]:
        """(native id, tool's name) of the call that `caller_id` answers; the id itself if there is none."""
        return self._given.get(caller_id, (caller_id, None))


def _message(message: Any, where: str, ids: _CallIds) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}.role is {role!r}; use one of {', '.join(ROLES)}", param=f"{where}.role")
    out: dict[str, Any] = {"role": ROLES[role], "content": _text(message.get("content"), f"{where}.content")}
    if name := _optional(message, "name", where):
        out["name"] = name
    if role == "assistant":
        if reasoning := _optional(message, "reasoning_content", where):
            out["reasoning_content"] = reasoning
        if calls := message.get("tool_calls"):
            out["tool_calls"] = _calls(calls, f"{where}.tool_calls", ids)
    if role == "tool":
        call_id, name = ids.answered(_optional(message, "tool_call_id", where) or "")
        out["tool_call_id"] = call_id
        if name is not None:
            out.setdefault("name", name)
    return out


def _optional(message: dict[str, Any], key: str, where: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{where}.{key} must be a string", param=f"{where}.{key}")
    return value


def _text(content: Any, where: str) -> str:
    """Content as one string: null is empty, text parts are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where}[{i}] is of type {kind!r}; this model reads text parts only", param=f"{where}[{i}]"
            )
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: Any, where: str, ids: _CallIds) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list", param=where)
    out = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where}[{i}] needs function.name, a non-empty string", param=f"{where}[{i}]")
        arguments = function.get("arguments") if function else None
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = "{}"
        if not isinstance(arguments, str | dict):
            raise RequestError(
                f"{where}[{i}].function.arguments must be JSON text or an object", param=f"{where}[{i}]"
            )
        given = ids.give(_optional(call, "id", f"{where}[{i}]") or "", name)
        out.append({"id": given, "type": "function", "function": {"name": name, "arguments": arguments}})
    return out
