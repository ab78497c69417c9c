"""Markers are tokens: replies written token by token through a real engine, its tokenizer and its stop strings."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid import Engine, SamplingParams
from hybrid.request import Delta
from hybrid.tool_parser import ALL_MARKERS

SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CB, AB, CE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
MESSAGES = [{"role": "user", "content": "hi"}]


class Token(str):
    """A special token, by name; a plain str is text, in ordinary tokens whatever it spells."""


def call(arguments: str) -> list[str]:
    return [Token(SB), Token(CB), "functions.look:0", Token(AB), arguments, Token(CE), Token(SE)]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    """Of K2, which has markers for calls and none for thoughts."""
    with Engine.load(tiny_model, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def thinker(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With K2-Thinking's tokens."""
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "thinker"))
    file = model / "tokenizer_config.json"
    values = json.loads(file.read_text())
    free = max(map(int, values["added_tokens_decoder"])) - 100
    for i, name in enumerate(("<think>", "</think>")):
        values["added_tokens_decoder"][str(free + i)] = {"content": name, "special": False}
    file.write_text(json.dumps(values))
    with Engine.load(model, device="cpu") as loaded:
        yield loaded


Said = tuple[str, str, list[str], str | None]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    def run(
        engine: Engine, *pieces: str | bytes, tools: Any = TOOLS, stop: tuple[str, ...] = (), limit: int = 0
    ) -> Said:
        """-> (content, reasoning, arguments by call, finish reason) of a reply that is `pieces`."""
        special, ids = engine.tokenizer.special_ids, []
        for piece in pieces:
            if isinstance(piece, bytes):
                ids += [next(i for i in range(256) if engine.tokenizer.token_bytes(i) == piece)]
            else:
                ids += [special[piece]] if isinstance(piece, Token) else engine.tokenizer.encode(piece)
        script = iter([*ids, special["<|im_end|>"]])

        class Scripted:
            def __init__(self, params: SamplingParams) -> None: ...

            def choose(self, logits: object) -> tuple[int, None]:
                return next(script), None

        monkeypatch.setattr("hybrid.generation.Sampler", Scripted)
        params = SamplingParams(stop=stop, max_tokens=limit or None)
        deltas = list(engine.chat(MESSAGES, tools, params))
        calls: list[str] = []
        for piece in (piece for delta in deltas for piece in delta.tool_calls):
            if piece.id is not None:
                calls.append("")
            calls[piece.index] += piece.arguments
        return (
            "".join(delta.content or "" for delta in deltas),
            "".join(delta.reasoning or "" for delta in deltas),
            calls,
            deltas[-1].finish_reason,
        )

    return run


def test_a_call_in_its_tokens(engine: Engine, said: Any) -> None:
    assert said(engine, "Wait.", *call('{"at": "sky"}')) == ("Wait.", "", ['{"at": "sky"}'], "tool_calls")


@pytest.mark.parametrize("marker", ALL_MARKERS)
def test_a_quoted_marker_is_text(engine: Engine, thinker: Engine, said: Any, marker: str) -> None:
    quoted = f"Write {marker}functions.look:0 and {{}}."
    for model in (engine, thinker):
        assert said(model, quoted) == (quoted, "", [], "stop")
        arguments = f'{{"at": "{marker}"}}'
        assert said(model, *call(arguments)) == ("", "", [arguments], "tool_calls")


def test_a_whole_call_that_is_quoted_is_text(engine: Engine, said: Any) -> None:
    quoted = "".join(call("{}"))
    assert said(engine, quoted, *call("{}")) == (quoted, "", ["{}"], "tool_calls")


def test_thoughts_are_between_their_tokens(thinker: Engine, said: Any) -> None:
    think, end = Token("<think>"), Token("</think>")
    thought = "Is </think> the end?"
    assert said(thinker, think, thought, end, "No.") == ("No.", thought, [], "stop")
    assert said(thinker, think, "Hm.", *call("{}")) == ("", "Hm.", ["{}"], "tool_calls")


def test_a_call_where_no_tools_are_declared_is_text_without_markers(engine: Engine, said: Any) -> None:
    for tools in (None, []):
        assert said(engine, *call("{}"), tools=tools) == ("functions.look:0{}", "", [], "stop")


def test_bytes_of_an_unfinished_character_come_before_the_marker(engine: Engine, said: Any) -> None:
    assert said(engine, "a", b"\xe4", *call("{}")) == ("a\ufffd", "", ["{}"], "tool_calls")
    inside = [Token(SB), Token(CB), "functions.look:0", Token(AB), '{"', b"\xe4", Token(CE)]
    assert said(engine, *inside) == ("", "", ['{"\ufffd'], "tool_calls")


@pytest.mark.parametrize("stop", ["<|im_end|>", "less <never", ">functions", "|>", "x<|tool_calls"])
def test_text_withheld_for_a_stop_string_keeps_its_place(engine: Engine, said: Any, stop: str) -> None:
    content, reason = ("less <", "tool_calls") if stop != "|>" else ("less <", "stop")
    calls = ["{}"] if stop != "|>" else []
    assert said(engine, "less <", *call("{}"), stop=(stop,)) == (content, "", calls, reason)


def test_a_stop_string_may_be_a_marker_or_stand_in_the_text_before(engine: Engine, said: Any) -> None:
    assert said(engine, "Wait.", *call("{}"), stop=(SB,)) == ("Wait.", "", [], "stop")
    assert said(engine, "Wait.", *call('{"a": 1}'), stop=(CE,)) == ("Wait.", "", ['{"a": 1}'], "tool_calls")
    assert said(engine, "Wa", b"\xe4", *call("{}"), stop=("\ufffd",)) == ("Wa", "", [], "stop")


def test_a_reply_cut_at_a_marker(engine: Engine, said: Any) -> None:
    content = "Wait."
    limit = len(engine.tokenizer.encode(content)) + 1
    assert said(engine, content, *call("{}"), limit=limit) == (content, "", [], "length")


def test_ordinary_text_is_never_delayed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a <|tool_call_be <think"
    script = iter(engine.tokenizer.encode(text))
    monkeypatch.setattr("hybrid.generation.Sampler.choose", lambda *_: (next(script), None))
    stream = engine.chat(MESSAGES, TOOLS)
    ids = engine.tokenizer.encode(text)
    assert [next(stream) for _ in ids] == [Delta(content=engine.tokenizer.decode([i])) for i in ids]
    stream.close()
