"""A conversation's settings, and what is written to disk and read back."""

import json
import stat
from pathlib import Path

import pytest

from cli.conversation import Conversation
from hybrid.request import SamplingParams
from offload.errors import UsageError

TURNS = [{"role": "user", "content": "héllo\n"}, {"role": "assistant", "content": "wörld"}]


def test_save_and_load_give_the_same(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.3, top_p=0.9, max_tokens=7, stop=("end",), seed=5)
    path = tmp_path / "chat.json"
    Conversation("Be brief.", params, list(TURNS)).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Conversation.load(path) == Conversation("Be brief.", params, TURNS)
    body = json.loads(path.read_text())
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert list(tmp_path.iterdir()) == [path]


def test_whatever_is_saved_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    with pytest.raises(UsageError, match="nothing to save"):
        Conversation().save(path)
    assert not path.exists()
    Conversation("Be brief.").save(path)
    assert Conversation.load(path) == Conversation("Be brief.")


def test_a_saved_chat_may_be_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    Conversation(turns=TURNS[:1]).save(path)
    Conversation(turns=list(TURNS)).save(path)
    assert len(Conversation.load(path).turns) == 2
    other = tmp_path / "notes.txt"
    other.write_text("precious")
    with pytest.raises(UsageError, match="not a saved chat"):
        Conversation(turns=list(TURNS)).save(other)
    assert other.read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[]", "Expected `object`"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "messages\\[0\\].role"),
        ('{"messages": [{"role": "user", "content": "x"}], "temperature": -4}', "temperature"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=f"chat.json: not a saved chat .*{says}"):
        Conversation.load(path)


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Conversation.load(tmp_path / "absent.json")
    with pytest.raises(UsageError, match="cannot be read"):
        Conversation.load(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        Conversation(turns=list(TURNS)).save(tmp_path / "no" / "such" / "folder.json")


def test_settings() -> None:
    chat = Conversation()
    for name, text, value in [
        ("temperature", "0.2", 0.2),
        ("max_tokens", "9", 9),
        ("seed", "4", 4),
        ("stop", "END OF IT", ("END OF IT",)),
        ("max_tokens", "none", None),
        ("temperature", "none", 0.6),
    ]:
        chat.set(name, text)
        assert getattr(chat.params, name) == value
    for name, text, says in [("colour", "1", "top_p"), ("seed", "x", "number"), ("top_p", "2", "at most 1")]:
        with pytest.raises(UsageError, match=says):
            chat.set(name, text)


def test_taking_back_a_question() -> None:
    chat = Conversation("s", turns=[*TURNS, *TURNS])
    assert chat.take_back_reply() == TURNS
    assert chat.turns == TURNS
    assert chat.take_back_reply() == TURNS
    assert chat.take_back_reply() == []
