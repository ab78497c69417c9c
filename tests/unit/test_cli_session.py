"""The loop of a chat over a scripted engine: what is kept, what is shown, what a command does."""

import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from cli.chat import _one_answer
from cli.conversation import Conversation
from cli.screen import Screen, summary
from cli.session import Session
from hybrid.request import Step
from offload.errors import HybridError, RequestError
from tests.scripted import ScriptedEngine, failed, said


class Lines:
    """A reader of written lines; an exception among them is raised."""

    def __init__(self, lines: tuple[str | BaseException, ...]) -> None:
        self.lines = list(lines)

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def converse(engine: ScriptedEngine, *lines: str | BaseException, system: str | None = None) -> Session:
    chat = Conversation(system)
    session = Session(engine, chat, Screen(plain=True), Lines(lines))  # type: ignore[arg-type]
    session.run()
    return session


def test_turns_build_on_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(said("Hi", " there"), said("Fine"))
    converse(engine, "hello", "how are you?", system="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    first = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi there"}]
    assert engine.prompts[0][0] == [system, first[0]]
    assert engine.prompts[1][0] == [system, *first, {"role": "user", "content": "how are you?"}]
    out = capsys.readouterr().out
    assert "Hi there\n7 tokens · 12.3 tokens/s · 5.7 GB/s of experts · bound by experts\n" in out
    assert "\x1b" not in out


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(said("one"), said("two"), said("three"))
    path = tmp_path / "chat.json"
    session = converse(
        engine, "/system Be brief.", "/set temperature 0", "a", "/retry", f"/save {path}", "/reset", "/show",
        f"/load {path}", "/stats", "/help", "b", "/system none", "/bye", "never read",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "0 messages" in out
    assert "2 messages loaded" in out
    assert '"model": "scripted"' in out
    assert "/retry" in out
    assert [m["content"] for m in session.conversation.turns] == ["a", "two", "b", "three"]
    assert session.conversation.system is None
    assert engine.prompts[2][0][0]["content"] == "Be brief."
    assert engine.requests[2].params.temperature == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nope", "no command /nope"),
        ("/", "no command /"),
        ("/set", "temperature 0.2"),
        ("/set volume 11", "no setting 'volume'"),
        ("/save", "name a file"),
        ("/save /no/such/folder/chat.json", "nothing to save"),
        ("/load /no/such/file", "/no/such/file: cannot be read"),
        ("/retry", "no question"),
    ],
)
def test_a_wrong_command_is_an_error_and_the_chat_goes_on(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session = converse(ScriptedEngine(said("still here")), line, "hello")
    assert says in capsys.readouterr().err
    assert len(session.conversation.turns) == 2


def test_a_space_sends_a_slash_as_text() -> None:
    engine = ScriptedEngine(said("ok"))
    converse(engine, " /nope", "", "   ")
    assert len(engine.requests) == 1


@pytest.mark.parametrize("script", [RequestError("too long"), failed("too long")])
def test_a_failed_turn_is_taken_back(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = converse(ScriptedEngine(script, said("ok")), "first", "second")
    assert "hybrid: too long" in capsys.readouterr().err
    assert [m["content"] for m in session.conversation.turns] == ["second", "ok"]


def interrupt_when(event: threading.Event) -> None:
    def run() -> None:
        event.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=run, daemon=True).start()


class Announced(list[Any]):
    """A script that sets `reached` when it comes to its end, then holds until cancelled."""

    def __init__(self, *items: Any) -> None:
        super().__init__(items)
        self.reached = threading.Event()

    def __iter__(self) -> Any:
        yield from super().__iter__()
        self.reached.set()
        yield threading.Event()


def test_ctrl_c_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    script = Announced(Step(10, "Once upon"))
    interrupt_when(script.reached)
    before = signal.getsignal(signal.SIGINT)
    session = converse(ScriptedEngine(script, said("ok")), "tell a story", "go on")
    assert [m["content"] for m in session.conversation.turns] == ["tell a story", "Once upon", "go on", "ok"]
    assert "stopped" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_word_takes_the_question_back(capsys: pytest.CaptureFixture[str]) -> None:
    script = Announced()
    interrupt_when(script.reached)
    session = converse(ScriptedEngine(script), "tell a story")
    assert session.conversation.turns == []
    assert "nothing was said" in capsys.readouterr().out


@pytest.mark.parametrize("script", [RequestError("too long"), failed("too long"), said()])
def test_a_retry_that_says_nothing_leaves_the_reply_before(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(said("one"), said("two"), script, said("three"))
    session = converse(engine, "a", "b", "/retry", "c")
    assert [m["content"] for m in session.conversation.turns] == ["a", "one", "b", "two", "c", "three"]
    assert [m["content"] for m in engine.prompts[2][0]] == ["a", "one", "b"]
    out, err = capsys.readouterr()
    assert "the reply before stays" in out or "too long" in err


def test_ctrl_c_before_the_first_word_of_a_retry_leaves_the_reply_before() -> None:
    script = Announced()
    interrupt_when(script.reached)
    session = converse(ScriptedEngine(said("one"), script), "a", "/retry")
    assert [m["content"] for m in session.conversation.turns] == ["a", "one"]


def test_ctrl_c_on_an_empty_line_hints_then_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(said("a"), said("b"))
    converse(engine, KeyboardInterrupt(), "hello", KeyboardInterrupt(), KeyboardInterrupt(), "never read")
    assert len(engine.requests) == 1
    assert capsys.readouterr().out.count("Ctrl-C again") == 2


def test_thoughts_are_shown_and_kept_and_a_call_is_text_as_no_tool_is_declared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        '{"at": "sky"}<|tool_call_end|><|tool_calls_section_end|>'
    )
    session = converse(ScriptedEngine(said("<think>Hm.</think>Yes. ", call)), "look")
    text = 'Yes. functions.look:0{"at": "sky"}'
    assert f"[thinking]\nHm.\n[answer]\n{text}" in capsys.readouterr().out
    message = session.conversation.turns[1]
    assert message == {"role": "assistant", "content": text, "reasoning_content": "Hm."}


def test_a_pipe_gets_the_text_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    _one_answer(ScriptedEngine(said("<think>Hm.</think>It is ", "**so**\x1b.")), Conversation(), "why?")  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "It is **so**\x1b.\n"
    assert "bound by experts" in err


def test_a_pipe_raises_failures() -> None:
    with pytest.raises(HybridError, match="the disk"):
        _one_answer(ScriptedEngine(failed("the disk")), Conversation(), "why?")  # type: ignore[arg-type]


def test_the_line_after_a_reply() -> None:
    last = {"new_tokens": 1, "tokens_per_s": 0.0, "expert_gb_per_s": 0.0, "bound_by": "disk"}
    assert summary(last, "length") == "1 tokens · bound by disk · stopped at the token limit"
