"""What the keys do in the line editor, through prompt-toolkit's own pipe input."""

import stat
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from cli.keys import EditReader, history_file, is_open_block, unquoted

PASTE = "\x1b[200~one\ntwo\n\x1b[201~"


def read(keys: str, history: Path | None = None) -> str:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return EditReader(history, colour=False).read()


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("hello\r", "hello"),
        ("one\ntwo\r", "one\ntwo"),  # Ctrl-J
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt-Enter
        ('"""\rone\r\rtwo\r"""\r', "one\n\ntwo"),
        ('"""one line"""\r', "one line"),
        (f"{PASTE}three\r", "one\ntwo\nthree"),
        ("wrong\x03right\r", "right"),  # Ctrl-C clears what is typed
    ],
)
def test_keys(keys: str, text: str) -> None:
    assert read(keys) == text


def test_ctrl_c_and_ctrl_d_on_an_empty_line() -> None:
    with pytest.raises(KeyboardInterrupt):
        read("\x03")
    with pytest.raises(EOFError):
        read("\x04")


def test_history_is_private_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_file()
    assert read("a secret\r", path) == "a secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "a secret" in path.read_text()
    assert read("\x1b[A\r", path) == "a secret"  # up
    assert read("\x12secr\r\r", path) == "a secret"  # Ctrl-R


def test_a_history_that_cannot_be_kept_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert read("hello\r", tmp_path / "file" / "history") == "hello"


def test_blocks() -> None:
    assert is_open_block('"""')
    assert is_open_block('"""a\n')
    assert not is_open_block('"""a"""')
    assert not is_open_block('a """')
    assert unquoted('"""\n  a\n"""') == "  a"
    assert unquoted("  a ") == "a"
