"""`hybrid chat` and `hybrid complete` as processes over a real model: on a terminal, in a pipe, interrupted."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])")
SUMMARY = re.compile(r"\d+ tokens · .*bound by \w+")
CTRL_C, CTRL_D = "\x03", "\x04"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from cli.main import main; main()", *arguments]


def hybrid(*arguments: str, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


class Terminal:
    """The other side of a pseudo-terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]", side: int) -> None:
        self.process = process
        self.side = side
        self.raw = ""

    def send(self, keys: str) -> None:
        os.write(self.side, keys.encode())

    def expect(self, pattern: str | re.Pattern[str], timeout: float = 60) -> str:
        """Read until `pattern` is on the screen; returns what came up to its end, without escapes."""
        deadline = time.monotonic() + timeout
        while True:
            text = ESCAPES.sub("", self.raw)
            if found := re.search(pattern, text):
                self.raw = text[found.end() :]
                return text[: found.end()]
            assert time.monotonic() < deadline, f"waited for {pattern!r}, saw:\n{text}"
            if select.select([self.side], [], [], 0.2)[0]:
                try:
                    self.raw += os.read(self.side, 1 << 16).decode(errors="replace")
                except OSError:  # the program has left
                    assert re.search(pattern, ESCAPES.sub("", self.raw)), self.raw


@contextmanager
def terminal(*arguments: str, home: Path) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 200))
    # NO_CPR: this terminal does not answer when prompt-toolkit asks where the cursor is
    variables = {"TERM": "xterm-256color", "XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: _make_controlling(theirs),
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **variables},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _make_controlling(descriptor: int) -> None:
    """So that Ctrl-C typed there is SIGINT."""
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def test_a_conversation(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with terminal("chat", str(tiny_model), "--max-tokens", "12", "--seed", "1", home=tmp_path) as screen:
        screen.expect(">>>")
        screen.send("hello\r")
        screen.send("and now?\r")  # typed ahead
        screen.expect(SUMMARY)
        screen.expect(SUMMARY)
        screen.send(f"/save {saved}\r")
        screen.expect("saved to")
        screen.send("/reset\r")
        screen.expect("a new conversation")
        screen.send(f"/load {saved}\r")
        screen.expect("4 messages loaded")
        screen.send("/stats\r")
        cached = screen.expect(r'"cached_tokens": \d+')
        assert int(cached.rsplit(" ", 1)[1]) > 0
        screen.send("/exit\r")
        assert screen.process.wait(30) == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"]
    history = tmp_path / "hybrid" / "chat_history"
    assert "and now?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_stops_the_reply_and_not_the_program(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with terminal("chat", str(tiny_model), "--seed", "1", "--no-history", home=tmp_path) as screen:
        screen.expect(">>>")
        screen.send("tell me everything\r")
        screen.expect(r"everything\s+\S.{20}")  # in the middle of a reply that would fill the context
        screen.send(CTRL_C)
        screen.expect(r"bound by \w+ · stopped")
        screen.expect(">>>")
        screen.send(f"/save {saved}\r")
        screen.expect("saved to")
        screen.expect(">>>")
        assert json.loads(saved.read_text())["messages"][1]["content"]
        screen.send("typed and taken back" + CTRL_C + CTRL_C)
        screen.expect("Ctrl-C again")
        screen.expect(">>>")
        screen.send(CTRL_C)
        assert screen.process.wait(30) == 0
    assert not (tmp_path / "hybrid").exists()


def test_a_paste_and_a_block_are_one_message(tiny_model: Path, tmp_path: Path) -> None:
    with terminal(
        "chat", str(tiny_model), "--max-tokens", "2", "--seed", "1", "--no-history", home=tmp_path
    ) as screen:
        screen.expect(">>>")
        screen.send("\x1b[200~first\nsecond\n\x1b[201~third\r")
        screen.expect(SUMMARY)
        screen.expect(">>>")
        screen.send('"""\rone\r\rtwo\r"""\r')
        screen.expect(SUMMARY)
        screen.expect(">>>")
        screen.send("/show\r")
        screen.expect("4 messages")
        screen.send(CTRL_D)
        assert screen.process.wait(30) == 0


def test_plain_writes_no_escapes(tiny_model: Path, tmp_path: Path) -> None:
    with terminal("chat", str(tiny_model), "--plain", "--max-tokens", "8", home=tmp_path) as screen:
        screen.expect(">>>")
        before = len(screen.raw)
        screen.send("hello\r")
        screen.expect(SUMMARY)
        assert "\x1b" not in screen.raw[before:]
        screen.send(CTRL_D)
        assert screen.process.wait(30) == 0


def test_piped_is_one_answer(tiny_model: Path) -> None:
    fixed = ("--temperature", "0", "--max-tokens", "12")
    piped = hybrid("chat", str(tiny_model), *fixed, stdin="hello\nyou\n")
    assert piped.returncode == 0
    completed = hybrid("complete", str(tiny_model), "hello\nyou", *fixed)
    assert piped.stdout == completed.stdout
    assert SUMMARY.search(piped.stderr)


def test_complete_as_text_and_as_json(tiny_model: Path) -> None:
    fixed = ("--seed", "3", "--max-tokens", "10")
    text = hybrid("complete", str(tiny_model), "Once", "--raw", *fixed)
    result = json.loads(
        hybrid("complete", str(tiny_model), "-", "--raw", "--json", *fixed, stdin="Once").stdout
    )
    assert text.stdout == result["text"] + "\n"
    assert len(result["token_ids"]) == result["usage"]["completion_tokens"] <= 10
    assert result["finish_reason"] in ("length", "stop")
    assert result["timings"]["time_to_first_token_s"] > 0
    chat = json.loads(hybrid("complete", str(tiny_model), "Once", "--json", *fixed).stdout)
    assert chat["usage"]["prompt_tokens"] > result["usage"]["prompt_tokens"]


def interrupted(seed: int, model: Path) -> tuple[int, bytes]:
    """Exit code and stderr of a completion that gets Ctrl-C after its first byte."""
    arguments = command("complete", str(model), "Once", "--seed", str(seed))
    # A test run in the background ignores Ctrl-C, and its children would.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        signal.signal(signal.SIGINT, before)
        try:
            assert process.stdout is not None
            process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            code = process.wait(30)
            return code, process.communicate()[1]
        finally:
            process.kill()


def test_ctrl_c_ends_a_completion_quietly(tiny_model: Path) -> None:
    for seed in range(8):  # a random model now and then ends by itself before the signal comes
        code, errors = interrupted(seed, tiny_model)
        assert errors == b""
        if code != 0:
            break
    assert code == 130


def test_a_reader_that_leaves_is_no_error(tiny_model: Path) -> None:
    pipeline = (
        f"'{sys.executable}' -c 'from cli.main import main; main()' complete '{tiny_model}' Once | head -c 1"
    )
    done = subprocess.run(
        ["bash", "-c", pipeline], capture_output=True, timeout=60
    )  # half a character, perhaps
    assert (len(done.stdout), done.stderr) == (1, b"")


def test_a_base_model_completes_raw_and_says_why_it_cannot_chat(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).symlink_to(file)
    config = json.loads((base / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    raw = hybrid("complete", str(base), "Once", "--raw", "--max-tokens", "3")
    assert (raw.returncode, raw.stderr) == (0, "")
    for arguments, stdin in ((("chat", str(base)), "hi"), (("complete", str(base), "hi"), "")):
        refused = hybrid(*arguments, stdin=stdin)
        assert refused.returncode == 2
        assert "chat template" in refused.stderr
        assert "complete --raw" in refused.stderr


def test_no_model_is_the_one_that_comes_along_and_says_so() -> None:
    done = hybrid("chat", "--temperature", "0", stdin="Hello!")
    assert done.returncode == 0, done.stderr
    assert "demonstration" in done.stderr
    assert "ello" in done.stdout
