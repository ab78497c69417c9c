"""Model text on a terminal: made harmless, and coloured as it streams.

Text is written once and never redrawn, so nothing flickers over ssh or in tmux and what is copied from the
screen is the model's own Markdown.
"""

from collections.abc import Callable

_CONTROL = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A, 0x0D)}
_VISIBLE = {
    **_CONTROL,
    0x0D: None,  # with the line feed after it, or a way to overwrite the line
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),  # text direction
}

RESET, BOLD, DIM, CODE = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[36m"


def visible(text: str) -> str:
    """`text` with control characters made visible: a model must not move the cursor or retitle a terminal."""
    return text.translate(_VISIBLE)


class Painter:
    """Colours headings, **bold**, `code` and fenced blocks; leaves every character in place.

    Args:
        write: takes finished text.
        colour: False writes the text as it is (but made harmless).
    """

    def __init__(self, write: Callable[[str], object], *, colour: bool) -> None:
        self._write = write
        self._colour = colour
        self._run = ""  # one marker repeated, held until what follows tells its meaning
        self._blank_line = True  # nothing but spaces on this line so far
        self._fenced = self._heading = self._bold = self._code = False
        self._line_is_fence = False

    def push(self, text: str) -> None:
        text = visible(text)
        self._write("".join(map(self._next, text)) if self._colour else text)

    def finish(self) -> None:
        """Write what is held back, and end all colours."""
        if self._colour:
            self._write(self._end_run("\n") + RESET)

    def _next(self, char: str) -> str:
        if char in "*`#" and self._run[:1] in ("", char):
            self._run += char
            return ""
        out = self._end_run(char)
        if char in "*`#":
            self._run = char
        elif char == "\n":
            out += char + self._end_line()
        else:
            self._blank_line = self._blank_line and char == " "
            out += char
        return out

    def _end_run(self, following: str) -> str:
        """The held markers, styled by what they turn out to be."""
        run, self._run = self._run, ""
        if not run:
            return ""
        starts_line, self._blank_line = self._blank_line, False
        before = self._style()
        if run[0] == "`" and len(run) >= 3 and starts_line:
            self._fenced = not self._fenced
            self._line_is_fence = True
        elif self._fenced:
            pass
        elif run[0] == "`":
            self._code = not self._code
        elif run == "**" and not self._code:
            self._bold = not self._bold
        elif run[0] == "#" and starts_line and len(run) <= 6 and following == " ":
            self._heading = True
        after = self._style()
        if before == after:
            return run
        # markers wear the style they open or close
        return f"{after}{run}" if after != RESET else f"{run}{after}"

    def _end_line(self) -> str:
        self._blank_line = True
        before = self._style()
        self._heading = self._bold = self._code = self._line_is_fence = False
        after = self._style()
        return "" if before == after else after

    def _style(self) -> str:
        if self._fenced or self._code or self._line_is_fence:
            return RESET + CODE
        return RESET + BOLD if self._bold or self._heading else RESET
