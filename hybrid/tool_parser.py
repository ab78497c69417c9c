"""`ToolParser`: generated text -> content, reasoning and tool calls, as the text arrives.

K2 writes calls as marker tokens around `functions.NAME:INDEX` and JSON arguments. Text is held back only while it
may be the beginning of a marker, or names a call; everything else is handed on at once. No text is lost and no
marker is shown: what cannot be a call to a declared tool comes out as content.
"""

import re
from enum import Enum, auto
from typing import Any, Literal

from hybrid.request import Delta, ToolCallPiece

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
THINK_BEGIN, THINK_END = "<think>", "</think>"
TOOL_MARKERS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENTS_BEGIN)
ALL_MARKERS = (*TOOL_MARKERS, THINK_BEGIN, THINK_END)

_INDEX = re.compile(r":(\d{1,9})\s*$")
_NAME = re.compile(r"[\w.-]+")


class _State(Enum):
    CONTENT = auto()
    REASONING = auto()
    SECTION = auto()  # between calls
    HEADER = auto()  # a call's id
    ARGUMENTS = auto()  # of a call that is being streamed
    REFUSED = auto()  # of a call to no declared tool: they become content


# Inside arguments a thought's marker is ordinary text: JSON strings may hold anything.
_ACTIVE = {**dict.fromkeys(_State, ALL_MARKERS), _State.ARGUMENTS: TOOL_MARKERS}
_PATTERNS = {state: re.compile("|".join(map(re.escape, markers))) for state, markers in _ACTIVE.items()}


class ToolParser:
    """One reply's parser.

    Args:
        tools: declared tools in OpenAI's format; a call to any other name is handed on as content, with an empty
            list every call. None: nothing is known of the tools, and every well-formed name is a call.
    """

    def __init__(self, tools: list[dict[str, Any]] | None = None) -> None:
        functions = (tool.get("function", tool) for tool in tools or [])
        self._names: list[str] = [name for f in functions if isinstance(name := f.get("name"), str)]
        self._any_name = tools is None
        self._state = _State.CONTENT
        self._buffer = ""  # not yet interpreted: may hold the beginning of a marker
        self._header = ""  # text of HEADER or SECTION, which only the next marker explains
        self._blank = ""  # white space at the edge of arguments
        self._begun = False  # whether the current call's arguments have any text
        self._ids: set[int] = set()
        self._calls = 0
        self._out: list[Delta] = []

    @property
    def has_tool_calls(self) -> bool:
        return self._calls > 0

    def feed(self, text: str, *, literal: bool = False) -> list[Delta]:
        """Take more text; returns what it made certain.

        Args:
            literal: the text holds no marker, whatever it spells. For callers that see tokens: text of ordinary
                ones is literal, and a marker's token is fed as its spelling.
        """
        self._buffer += text
        while not literal and (found := _PATTERNS[self._state].search(self._buffer)):
            before, marker = self._buffer[: found.start()], found.group()
            self._buffer = self._buffer[found.end() :]
            self._text(before)
            self._marker(marker)
        keep = 0 if literal else self._partial()
        certain, self._buffer = (
            self._buffer[: len(self._buffer) - keep],
            self._buffer[len(self._buffer) - keep :],
        )
        self._text(certain)
        return self._take()

    def finish(self) -> list[Delta]:
        """The text has ended, perhaps in the middle of a call; returns what was still held back."""
        rest, self._buffer = self._buffer, ""
        self._text(rest)
        if self._state is _State.HEADER:  # cut off: half a name may spell another tool
            self._state = _State.SECTION
        self._leave()
        self._state = _State.CONTENT
        return self._take()

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _partial(self) -> int:
        """Length of the buffer's end that may begin a marker; markers hold `<` only at their start."""
        at = self._buffer.rfind("<")
        end = self._buffer[at:] if at >= 0 else ""
        return len(end) if end and any(m.startswith(end) for m in _ACTIVE[self._state]) else 0

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._state in (_State.CONTENT, _State.REFUSED):
            self._emit("content", text)
        elif self._state is _State.REASONING:
            self._emit("reasoning", text)
        elif self._state is _State.ARGUMENTS:
            self._arguments(text)
        else:
            self._header += text

    def _marker(self, marker: str) -> None:
        if (
            marker == ARGUMENTS_BEGIN
            and self._state in (_State.HEADER, _State.SECTION)
            and self._header.strip()
        ):
            self._open()
            return
        if self._state is _State.REFUSED and marker in (THINK_BEGIN, THINK_END):
            return
        self._leave()
        if marker == THINK_BEGIN:
            self._state = _State.REASONING
        elif marker == CALL_BEGIN:
            self._state = _State.HEADER
        elif marker in (SECTION_BEGIN, CALL_END):
            self._state = _State.SECTION
        elif marker in (THINK_END, SECTION_END):
            self._state = _State.CONTENT

    def _leave(self) -> None:
        """End what the current state was collecting."""
        if self._state is _State.HEADER and self._header.strip():
            # No arguments marker: a call without arguments, or with them right behind its id.
            name, brace, rest = self._header.partition("{")
            if self._resolve(name) is not None:
                self._header = name
                self._open()
                self._arguments(brace + rest)
            else:
                self._emit("content", self._header)
        elif self._header.strip():
            self._emit("content", self._header)
        if self._state is _State.ARGUMENTS and not self._begun:
            self._piece("{}")
        self._header = self._blank = ""
        if self._state in (_State.ARGUMENTS, _State.REFUSED, _State.HEADER):
            self._state = _State.SECTION

    def _open(self) -> None:
        """The header is complete: begin a call if it names one."""
        resolved = self._resolve(self._header)
        if resolved is None:
            self._emit("content", self._header)
            self._state = _State.REFUSED
        else:
            name, index = resolved
            while index is None or index in self._ids:
                index = max(self._ids, default=-1) + 1
            self._ids.add(index)
            call = ToolCallPiece(self._calls, f"functions.{name}:{index}", name, "")
            self._calls += 1
            self._out.append(Delta(tool_calls=[call]))
            self._begun, self._blank = False, ""
            self._state = _State.ARGUMENTS
        self._header = ""

    def _resolve(self, header: str) -> tuple[str, int | None] | None:
        """(name, index if it has one) of `functions.name:0`, `name:0`, `name`, or a bare counter where only one
        tool is declared; None if it names no tool."""
        text, index = header.strip(), None
        if found := _INDEX.search(text):
            text, index = text[: found.start()], int(found.group(1))
        elif text.isdecimal() and len(text) < 10 and text not in self._names:
            text, index = "", int(text)
        bare = text.removeprefix("functions").lstrip(".")
        if self._any_name:
            return (bare, index) if _NAME.fullmatch(bare) else None
        for name in (text, bare):
            if name in self._names:
                return name, index
        alike = {name for name in self._names if name.lower() == bare.lower()}
        if not bare:
            alike = set(self._names)
        return (alike.pop(), index) if len(alike) == 1 else None

    def _arguments(self, text: str) -> None:
        """Stream arguments as written, but for white space around them."""
        text = self._blank + text
        if not self._begun:
            text = text.lstrip()
        stripped = text.rstrip()
        self._blank = text[len(stripped) :]
        if stripped:
            self._begun = True
            self._piece(stripped)

    def _piece(self, arguments: str) -> None:
        last = self._out[-1].tool_calls if self._out else []
        if last and last[-1].index == self._calls - 1:
            last[-1] = last[-1]._replace(arguments=last[-1].arguments + arguments)
        else:
            self._out.append(Delta(tool_calls=[ToolCallPiece(self._calls - 1, None, None, arguments)]))

    def _emit(self, kind: Literal["content", "reasoning"], text: str) -> None:
        before = getattr(self._out[-1], kind) if self._out else None
        if before is not None:
            self._out.pop()
        text = (before or "") + text
        self._out.append(Delta(content=text) if kind == "content" else Delta(reasoning=text))
