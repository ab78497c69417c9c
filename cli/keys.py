"""Where a chat's lines come from: a line editor on a terminal, plain reading elsewhere.

Both return one message, and raise KeyboardInterrupt for Ctrl-C on an empty line and EOFError for Ctrl-D.
"""

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

BLOCK = '"""'
PROMPT, CONTINUED = ">>> ", "... "


class Reader(Protocol):
    def read(self) -> str:
        """The next message, without the quotes of a block."""


def history_file() -> Path:
    """Under the XDG state directory."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "hybrid" / "chat_history"


def is_open_block(text: str) -> bool:
    '''Whether `text` opens a """ block and does not close it.'''
    text = text.strip()
    return text.startswith(BLOCK) and (len(text) < 2 * len(BLOCK) or not text.endswith(BLOCK))


def unquoted(text: str) -> str:
    """A block's inside; other text with the blanks around it gone."""
    text = text.strip()
    if text.startswith(BLOCK) and not is_open_block(text):
        return text[len(BLOCK) : -len(BLOCK)].strip("\n")
    return text


class PlainReader:
    """Reads lines of stdin; for dumb terminals, screen readers and a redirected stdout."""

    def read(self) -> str:
        text = self._line(PROMPT)
        while is_open_block(text):
            text += "\n" + self._line(CONTINUED)
        return unquoted(text)

    @staticmethod
    def _line(prompt: str) -> str:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class EditReader:
    """prompt-toolkit: editing, history with Ctrl-R, blocks. Enter sends; Alt-Enter and Ctrl-J start a line.

    Args:
        history: the file that keeps what was typed; None keeps it for this run only.
    """

    def __init__(self, history: Path | None, *, colour: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import ColorDepth

        usable = history is not None and _private_file(history)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=_bindings(),
            history=FileHistory(str(history)) if usable else InMemoryHistory(),
            color_depth=None if colour else ColorDepth.DEPTH_1_BIT,
        )

    def read(self) -> str:
        return unquoted(self._session.prompt())


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """What is typed during a reply waits unseen for the next line, and its Enter still means Enter.

    Without this the terminal would mix it into the reply and hand Enter on as Ctrl-J. Ctrl-C stays a signal.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _bindings() -> "KeyBindings":
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()
    typing = ~is_searching  # Ctrl-R has its own meaning for these keys

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open_block(buffer.text):
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    @keys.add("c-c", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


def _private_file(path: Path) -> bool:
    """Make `path` a file that only its owner reads. -> whether it can be used."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    except OSError:
        return False
    return True
