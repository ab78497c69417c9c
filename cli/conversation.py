"""`Conversation`: what has been said and how to answer. Knows no terminal and no model.

On disk it is the body of a /v1/chat/completions request, so a saved chat can be sent to any server.
"""

import dataclasses
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hybrid.messages import normalise
from hybrid.request import SamplingParams
from hybrid.server.chat_request import parse_chat_request
from hybrid.server.errors import ApiError
from offload.errors import RequestError, UsageError

Messages = list[dict[str, Any]]


@dataclass
class Conversation:
    """Messages in OpenAI's format without the system prompt, which is kept apart."""

    system: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    turns: Messages = field(default_factory=list)

    def messages(self) -> Messages:
        """All of it, as the chat template takes it."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def take_back_reply(self) -> Messages:
        """Forget the last question and its answer. -> both, the question first; empty if there is none."""
        for at in range(len(self.turns) - 1, -1, -1):
            if self.turns[at]["role"] == "user":
                forgotten = self.turns[at:]
                del self.turns[at:]
                return forgotten
        return []

    def set(self, name: str, value: str) -> None:
        """Change a sampling parameter from text; "none" unsets. Raises UsageError."""
        kinds: dict[str, type] = {
            "temperature": float,
            "top_p": float,
            "max_tokens": int,
            "seed": int,
            "stop": str,
        }
        if name not in kinds:
            raise UsageError(f"there is no setting {name!r}; use {', '.join(kinds)}")
        parsed: Any
        if value.lower() == "none":
            parsed = {f.name: f.default for f in dataclasses.fields(SamplingParams)}[name]
        else:
            try:
                parsed = kinds[name](value)
            except ValueError:
                raise UsageError(f"{name} is {value!r}; give a number, or none") from None
        self.params = dataclasses.replace(self.params, **{name: parsed})

    def save(self, path: Path) -> None:
        """Write to `path`, all or nothing, readable by the owner alone.

        Raises:
            UsageError: there is nothing to write, it cannot be written, or it would replace something that is not a
                saved chat.
        """
        if not self.messages():
            raise UsageError("nothing has been said yet, so there is nothing to save")
        if path.exists():
            try:
                _read(path)
            except UsageError:
                raise UsageError(f"{path} exists and is not a saved chat; choose another name") from None
        sampling = {
            name: value
            for name, value in dataclasses.asdict(self.params).items()
            if name in ("temperature", "top_p", "max_tokens", "stop", "seed") and value not in (None, ())
        }
        text = msgspec.json.format(msgspec.json.encode({"messages": self.messages(), **sampling}), indent=2)
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(text + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read what `save` wrote, or any chat completions request. Raises UsageError, naming the file."""
        messages, params = _read(path)
        system = None
        if messages[:1] and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        return cls(system, params, messages)


def _read(path: Path) -> tuple[Messages, SamplingParams]:
    try:
        request = parse_chat_request(path.read_bytes())
        return normalise(request.messages), request.sampling()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ApiError, RequestError) as error:
        raise UsageError(f"{path}: not a saved chat ({error})") from None
