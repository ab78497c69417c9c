"""`Session`: the loop of an interactive chat. A line is a /command or something to answer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli.answer import ask
from cli.conversation import Conversation, Messages
from cli.keys import Reader, unquoted
from cli.screen import Screen, summary
from offload.errors import EngineClosed, HybridError, UsageError

if TYPE_CHECKING:
    from hybrid.engine import Engine

HELP = """\
/help                 this list
/reset, /clear        begin a new conversation (the system prompt and settings stay)
/system [TEXT]        show or set the system prompt; "none" removes it
/set NAME VALUE       temperature, top_p, max_tokens, seed or stop; "none" for the default
/show                 settings and the length of the conversation
/stats                what the engine counted
/save FILE            write the conversation as JSON
/load FILE            go on with a saved conversation
/retry                answer the last question again
/exit, /bye           leave (so does Ctrl-D)
Enter sends; Alt-Enter or Ctrl-J starts a new line; \"\"\" opens and closes a block. Ctrl-C stops a reply."""


class Session:
    """An interactive chat with one engine."""

    def __init__(self, engine: "Engine", conversation: Conversation, screen: Screen, reader: Reader) -> None:
        self.engine = engine
        self.conversation = conversation
        self.screen = screen
        self.reader = reader
        self.commands = {
            "help": self._help,
            "reset": self._reset,
            "clear": self._reset,
            "system": self._system,
            "set": self._set,
            "show": self._show,
            "stats": self._stats,
            "save": self._save,
            "load": self._load,
            "retry": self._retry,
        }

    def run(self) -> None:
        """Until /exit, Ctrl-D, or Ctrl-C twice on an empty line."""
        hinted = False
        while True:
            try:
                text = self.reader.read()
                hinted = False
                if text.strip() in ("/exit", "/bye", "/quit"):
                    return
                self._handle(text)
            except EOFError:
                self.screen.note("")
                return
            except KeyboardInterrupt:
                if hinted:
                    return
                hinted = True
                self.screen.note("Ctrl-C again, Ctrl-D or /exit leaves; /help lists commands")
            except EngineClosed:
                raise
            except HybridError as error:
                self.screen.error(str(error))

    def _handle(self, text: str) -> None:
        if not text.strip():
            return
        if not text.startswith("/"):
            self._answer(text)
            return
        name, _, argument = text[1:].partition(" ")
        if name not in self.commands:
            raise UsageError(
                f"there is no command /{name}; /help lists them (a space before / sends it as text)"
            )
        self.commands[name](argument.strip())

    def _answer(self, question: str, before: Messages | None = None) -> None:
        """Ask, and keep question and answer. If nothing is said: keep `before` in their place."""
        turns = self.conversation.turns
        turns.append({"role": "user", "content": question})
        answer = None
        try:
            answer = ask(self.engine, self.conversation.messages(), self.conversation.params, self.screen)
        finally:
            self.screen.end_reply()
            message = answer.message() if answer is not None else None
            if message is None:
                turns[-1:] = before or []  # an unanswered question would be answered along with the next one
            else:
                turns.append(message)
        self.screen.note(summary(self.engine.stats()["last"], answer.finish_reason))
        if message is None:
            kept = "the reply before stays" if before else "the question is not part of the conversation"
            self.screen.note(f"nothing was said, so {kept}")

    # Commands: each takes what follows its name

    def _help(self, _: str) -> None:
        self.screen.note(HELP)

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self.screen.note("a new conversation")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text.lower() == "none" else unquoted(text)
        self.screen.note(
            f"system prompt: {self.conversation.system or 'none (the chat template has its own)'}"
        )

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not value:
            raise UsageError("say which and what, as in /set temperature 0.2")
        self.conversation.set(name, value.strip())
        self._show("")

    def _show(self, _: str) -> None:
        params, chat = self.conversation.params, self.conversation
        stop = " ".join(map(repr, params.stop)) or "none"
        self.screen.note(
            f"model {self.engine.name}, context {self.engine.context} tokens\n"
            f"temperature {params.temperature}, top_p {params.top_p}, max_tokens {params.max_tokens or 'none'}, "
            f"seed {'none' if params.seed is None else params.seed}, stop {stop}\n"
            f"system prompt: {chat.system or 'none'}\n"
            f"{len(chat.turns)} messages"
        )

    def _stats(self, _: str) -> None:
        self.screen.note(json.dumps(self.engine.stats(), indent=2))

    def _save(self, text: str) -> None:
        path = _path(text)
        self.conversation.save(path)
        self.screen.note(f"saved to {path}")

    def _load(self, text: str) -> None:
        self.conversation = Conversation.load(_path(text))
        self.screen.note(f"{len(self.conversation.turns)} messages loaded")

    def _retry(self, _: str) -> None:
        before = self.conversation.take_back_reply()
        if not before:
            raise UsageError("there is no question to answer again")
        self._answer(before[0]["content"], before)


def _path(text: str) -> Path:
    if not text:
        raise UsageError("name a file, as in /save chat.json")
    return Path(text).expanduser()
