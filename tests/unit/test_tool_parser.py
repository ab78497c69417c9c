"""K2's native tool calls out of streamed text, against whole-text expectations and any way of splitting."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.request import Delta
from hybrid.tool_parser import ALL_MARKERS, ToolParser

SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CB, AB, CE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


def call(header: str, arguments: str) -> str:
    return f"{CB}{header}{AB}{arguments}{CE}"


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


TOOLS = [tool("get_weather"), tool("db.query-all")]


class Result:
    def __init__(self) -> None:
        self.content, self.reasoning = "", ""
        self.calls: list[list[str]] = []  # id, name, arguments

    def add(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self.content += delta.content or ""
            self.reasoning += delta.reasoning or ""
            for piece in delta.tool_calls:
                if piece.id is not None:
                    assert piece.name is not None
                    assert piece.index == len(self.calls)
                    self.calls.append([piece.id, piece.name, ""])
                self.calls[piece.index][2] += piece.arguments

    @property
    def everything(self) -> tuple[str, str, list[list[str]]]:
        return self.content, self.reasoning, self.calls


def parse(pieces: list[str], tools: list[dict[str, Any]] | None = TOOLS) -> Result:
    parser, result = ToolParser(tools), Result()
    for piece in pieces:
        result.add(parser.feed(piece))
    result.add(parser.finish())
    assert parser.has_tool_calls == bool(result.calls)
    return result


CASES = {
    "plain": ("Hello <b>world</b> < 3", ("Hello <b>world</b> < 3", "", [])),
    "the published vector": (
        "Let me check that for you." + SB + call("functions.get_weather:0", '{"city": "Berlin"}') + SE,
        (
            "Let me check that for you.",
            "",
            [["functions.get_weather:0", "get_weather", '{"city": "Berlin"}']],
        ),
    ),
    "parallel calls stay apart": (
        SB
        + call("functions.get_weather:0", '{"city": "A"}')
        + call("functions.get_weather:1", '{"city": "B"}')
        + SE,
        (
            "",
            "",
            [
                ["functions.get_weather:0", "get_weather", '{"city": "A"}'],
                ["functions.get_weather:1", "get_weather", '{"city": "B"}'],
            ],
        ),
    ),
    "later index kept": (
        SB + call("functions.get_weather:7", "{}") + SE,
        ("", "", [["functions.get_weather:7", "get_weather", "{}"]]),
    ),
    "an index used twice is made unique": (
        SB + call("functions.get_weather:0", "{}") + call("functions.get_weather:0", "{}") + SE,
        (
            "",
            "",
            [
                ["functions.get_weather:0", "get_weather", "{}"],
                ["functions.get_weather:1", "get_weather", "{}"],
            ],
        ),
    ),
    "dots and hyphens": (
        SB + call("functions.db.query-all:2", "{}") + SE,
        ("", "", [["functions.db.query-all:2", "db.query-all", "{}"]]),
    ),
    "no functions prefix": (
        SB + call("get_weather:0", "{}") + SE,
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "no index": (
        SB + call("get_weather", "{}") + SE,
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "empty arguments": (
        SB + call("functions.get_weather:0", " \n") + SE,
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "no arguments marker": (
        SB + CB + "functions.get_weather:0" + CE + SE,
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "arguments right behind the id": (
        SB + CB + 'functions.get_weather:0 {"a": {"b": 1}}' + CE + SE,
        ("", "", [["functions.get_weather:0", "get_weather", '{"a": {"b": 1}}']]),
    ),
    "white space around": (
        SB + "\n" + call(" functions.get_weather:0\n", '\n {"a": " x "} \n') + "\n" + SE,
        ("", "", [["functions.get_weather:0", "get_weather", '{"a": " x "}']]),
    ),
    "no section": (
        call("functions.get_weather:0", "{}"),
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "section never closed": (
        SB + call("functions.get_weather:0", "{}"),
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "cut off in the arguments": (
        SB + CB + "functions.get_weather:0" + AB + '{"city": "Ber',
        ("", "", [["functions.get_weather:0", "get_weather", '{"city": "Ber']]),
    ),
    "cut off in the name": (SB + CB + "functions.get_weather", ("functions.get_weather", "", [])),
    "cut off before the arguments": (
        SB + CB + "functions.get_weather:0" + AB,
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "call end missing": (
        SB + CB + "functions.get_weather:0" + AB + "{}" + CB + "functions.get_weather:1" + AB + "{}" + SE,
        (
            "",
            "",
            [
                ["functions.get_weather:0", "get_weather", "{}"],
                ["functions.get_weather:1", "get_weather", "{}"],
            ],
        ),
    ),
    "call begin missing": (
        SB + "functions.get_weather:0" + AB + "{}" + CE + SE,
        ("", "", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "text after and between": (
        SB
        + call("functions.get_weather:0", "{}")
        + "and"
        + call("functions.get_weather:1", "{}")
        + SE
        + " done",
        (
            "and done",
            "",
            [
                ["functions.get_weather:0", "get_weather", "{}"],
                ["functions.get_weather:1", "get_weather", "{}"],
            ],
        ),
    ),
    "undeclared tool": (
        "Hm. " + SB + call("functions.rm_rf:0", '{"path": "/"}') + SE,
        ('Hm. functions.rm_rf:0{"path": "/"}', "", []),
    ),
    "junk for a name": (SB + call("?? what", "{}") + SE, ("?? what{}", "", [])),
    "thought": ("<think>hmm</think>Yes", ("Yes", "hmm", [])),
    "call inside an unclosed thought": (
        "<think>I should look" + SB + call("functions.get_weather:0", "{}") + SE + "so",
        ("so", "I should look", [["functions.get_weather:0", "get_weather", "{}"]]),
    ),
    "markers of a thought inside arguments": (
        SB + call("functions.get_weather:0", '{"city": "<think>x</think>"}') + SE,
        ("", "", [["functions.get_weather:0", "get_weather", '{"city": "<think>x</think>"}']]),
    ),
    "stray markers": (f"a{CE}b{SE}c{AB}d</think>e", ("abcde", "", [])),
    "ends in part of a marker": ("a<|tool_call", ("a<|tool_call", "", [])),
    "empty call": (SB + CB + CE + SE, ("", "", [])),
}


@pytest.mark.parametrize("name", CASES)
def test_whole_and_one_character_at_a_time(name: str) -> None:
    text, expected = CASES[name]
    assert parse([text]).everything == expected
    assert parse(list(text)).everything == expected


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_split_gives_the_same(data: st.DataObject) -> None:
    text, expected = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(pieces).everything == expected


FRAGMENTS = st.sampled_from(
    [
        *ALL_MARKERS,
        "<",
        "<|",
        "|>",
        "<|tool_",
        "functions.get_weather:0",
        "get_weather",
        "7",
        '{"a": "b"}',
        "{",
        " ",
        "x",
    ]
)


@settings(deadline=None, max_examples=500)
@given(st.lists(FRAGMENTS, max_size=14), st.integers(1, 5))
def test_whatever_comes_no_text_is_lost_and_no_marker_is_shown(fragments: list[str], size: int) -> None:
    text = "".join(fragments)
    whole = parse([text])
    assert parse([text[i : i + size] for i in range(0, len(text), size)]).everything == whole.everything
    arguments = "".join(c[2] for c in whole.calls)
    shown = whole.content + whole.reasoning
    assert not any(marker in shown for marker in ALL_MARKERS)
    # Every visible character of ordinary text arrives: as content, as a thought, as arguments or as a call's id.
    rest = text
    for marker in ALL_MARKERS:
        rest = rest.replace(marker, "")
    if not whole.calls:
        assert sorted(shown.replace(" ", "")) == sorted(rest.replace(" ", ""))
    assert rest.count("x") == (shown + arguments).count("x")


def test_of_unknown_tools_every_good_name_is_a_call() -> None:
    assert parse([SB + call("functions.any.thing:3", "{}") + SE], None).calls == [
        ["functions.any.thing:3", "any.thing", "{}"]
    ]


@pytest.mark.parametrize("header", ["functions.any.thing:3", "functions:0", "0", "?"])
def test_where_no_tools_are_declared_a_call_is_text(header: str) -> None:
    text = "a" + SB + call(header, '{"b": 1}') + SE + "c"
    for pieces in ([text], list(text)):
        assert parse(pieces, []).everything == (f'a{header}{{"b": 1}}c', "", [])


@pytest.mark.parametrize("marker", ALL_MARKERS)
def test_literal_text_spells_markers_and_means_none(marker: str) -> None:
    parser, result = ToolParser(TOOLS), Result()
    for piece in (f"a {marker} b", marker[:5]):
        assert parser.feed(piece, literal=True) == [Delta(content=piece)]
    for piece in (SB, CB, "functions.get_weather:0", AB):
        result.add(parser.feed(piece))
    result.add(parser.feed(f'{{"city": "{marker}"}}', literal=True))
    for piece in (CE, SE):
        result.add(parser.feed(piece))
    result.add(parser.feed(marker, literal=True))
    result.add(parser.finish())
    call_ = ["functions.get_weather:0", "get_weather", f'{{"city": "{marker}"}}']
    assert result.everything == (marker, "", [call_])


def test_literal_text_completes_no_marker() -> None:
    parser = ToolParser(TOOLS)
    assert parser.feed("a<thi") == [Delta(content="a")]
    assert parser.feed("nk>", literal=True) == [Delta(content="<think>")]


@pytest.mark.parametrize("header", ["0", "functions:0", ":0", "functions.:0", "GET_WEATHER:0"])
def test_a_bare_counter_means_the_only_tool(header: str) -> None:
    text = SB + call(header, "{}") + SE
    assert parse([text], [tool("get_weather")]).calls == [["functions.get_weather:0", "get_weather", "{}"]]
    if "WEATHER" not in header:
        assert parse([text], TOOLS).calls == []


def test_arguments_are_streamed_as_they_come() -> None:
    parser, result = ToolParser(TOOLS), Result()
    result.add(parser.feed(SB + CB + "functions.get_weather:0" + AB + '{"ci'))
    assert result.calls == [["functions.get_weather:0", "get_weather", '{"ci']]
    result.add(parser.feed('ty": "Oslo"}'))
    assert json.loads(result.calls[0][2]) == {"city": "Oslo"}


def test_plain_text_is_never_delayed() -> None:
    parser = ToolParser(TOOLS)
    assert parser.feed("Hello") == [Delta(content="Hello")]
    assert parser.feed(" <") == [Delta(content=" ")]
    assert parser.feed("b>") == [Delta(content="<b>")]
