"""Model text on a terminal: harmless, complete, and coloured the same however it is cut into pieces."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.painter import BOLD, CODE, RESET, Painter, visible

MARKDOWN = "# Title\nSome **bold** and `code`.\n```py\nx = 2 ** 3  # not a heading\n```\n* a * b\n"


def painted(pieces: list[str], *, colour: bool = True) -> str:
    out: list[str] = []
    painter = Painter(out.append, colour=colour)
    for piece in pieces:
        painter.push(piece)
    painter.finish()
    return "".join(out)


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[0-9]*m", "", text)


def styled(text: str) -> list[tuple[str, str]]:
    """(style, text) runs."""
    runs, style = [], RESET
    for part in re.split(r"((?:\x1b\[[0-9]*m)+)", text):
        if part.startswith("\x1b"):
            style = part
        elif part:
            runs.append((style.removeprefix(RESET) or RESET, part))
    return runs


def test_what_is_coloured() -> None:
    runs = styled(painted([MARKDOWN]))
    assert (BOLD, "# Title\n") in runs
    assert (BOLD, "**bold**") in runs
    assert (CODE, "`code`") in runs
    assert (CODE, "```py\nx = 2 ** 3  # not a heading\n```\n") in runs
    assert (RESET, "* a * b\n") in runs


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_do_not_matter(size: int) -> None:
    pieces = [MARKDOWN[i : i + size] for i in range(0, len(MARKDOWN), size)]
    assert painted(pieces) == painted([MARKDOWN])


@given(st.lists(st.text(st.sampled_from("*`# \nab"))))
def test_no_character_is_lost(pieces: list[str]) -> None:
    assert uncoloured(painted(pieces)) == "".join(pieces)
    assert painted(pieces).endswith(RESET)


@given(st.lists(st.text()))
def test_without_colour_nothing_is_added(pieces: list[str]) -> None:
    out = painted(pieces, colour=False)
    assert out == visible("".join(pieces))
    assert "\x1b" not in out


def test_control_characters_are_shown_not_obeyed() -> None:
    assert visible("a\x1b]0;title\x07b\x9b2Jc\u202ed") == "a␛]0;title␇b\ufffd2Jc\ufffdd"
    assert visible("tab\tline\r\nend") == "tab\tline\nend"
    allowed = {"\t", "\n"}
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000)]))
    assert all(ch in allowed or ch.isprintable() or ord(ch) > 0x9F for ch in visible(everything))
