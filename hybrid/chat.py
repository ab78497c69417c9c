"""`ChatTemplate`: a conversation -> prompt token ids, by the checkpoint's own Jinja template in a sandbox.

Only the template's own text can become control tokens. Everything that a caller supplied (contents, names, ids, tool
declarations down to their keys, arguments, results) is broken up before rendering wherever it could spell one, also
together with its neighbours, and restored before it is encoded.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2

from hybrid.messages import check_tools, normalise
from hybrid.template_sandbox import TemplateSandbox
from hybrid.tokenizer import CONFIG_FILE, Tokenizer, read_tokenizer_config
from offload.errors import RequestError, TemplateError

TEMPLATE_FILE = "chat_template.jinja"

# Code points that are never characters (Unicode, section 23.7), then private ones: one of them breaks up spellings.
BREAKERS = [*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900)]
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")
_FIRST = re.compile(r"\A\s*\S")


class ChatTemplate:
    """One model's chat template.

    Args:
        source: Jinja, as published with the checkpoint.
        tokenizer: whose special tokens' spellings are control tokens in the template's own text.
        origin: the file it is from, for messages.

    Raises:
        TemplateError: the source is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, origin: Path) -> None:
        self._tokenizer = tokenizer
        self._origin = origin
        names = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._starts = re.compile("[" + "".join(re.escape(c) for c in sorted({n[0] for n in names})) + "]")
        self._sandbox = TemplateSandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"{origin}: line {error.lineno}: not a valid Jinja template ({error.message})"
            ) from None
        except RecursionError:
            raise TemplateError(f"{origin}: the chat template is nested too deeply") from None

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template beside the weights, else the one in tokenizer_config.json; None if there is neither.

        Raises:
            TemplateError: there is one and it is unusable.
        """
        file = directory / TEMPLATE_FILE
        if file.exists():
            try:
                return cls(file.read_text(encoding="utf-8"), tokenizer, file)
            except (OSError, UnicodeDecodeError) as error:
                raise TemplateError(f"{file}: cannot be read ({error})") from None
        config_file = directory / CONFIG_FILE
        source = read_tokenizer_config(config_file).get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise TemplateError(f"{config_file}: chat_template is not a string")
        return cls(source, tokenizer, config_file)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Prompt token ids of a conversation in OpenAI's format.

        Args:
            tools: declared tools in OpenAI's format; None or empty: none.
            add_generation_prompt: end where the assistant's reply begins.

        Raises:
            RequestError: the messages or tools are malformed.
            TemplateError: the template refuses them.
        """
        if tools:
            check_tools(tools)
        try:
            given = {"messages": normalise(messages), "tools": tools or None}
            breaker = _absent_character(given)
            broken = self._broken(given, breaker)
        except RecursionError:
            raise RequestError("messages or tools are nested too deeply", param="messages") from None
        try:
            text = self._sandbox.render(
                self._template.generate, **broken, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"{self._origin.name}: the chat template cannot render this: {error}"
            ) from None
        except (
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise TemplateError(
                f"{self._origin.name}: the chat template fails on this: {type(error).__name__}: {error}"
            ) from None
        return list(chain.from_iterable(self._encode(part, breaker) for part in self._control.split(text)))

    def _encode(self, part: str, breaker: str) -> Iterable[int]:
        control = self._tokenizer.special_ids.get(part)
        if control is not None:
            return (control,)
        return self._tokenizer.encode(part.replace(breaker, "").replace(_escaped(breaker), ""))

    def _broken(self, value: Any, breaker: str, *, literal: bool = False) -> Any:
        """A copy with `breaker` behind every character that could begin a control token's spelling, and behind a
        string's first visible one, so that it cannot complete what the template began. Templates look up keys
        and compare roles and types (`literal`), so those get only the former."""
        if isinstance(value, str):
            value = self._starts.sub(lambda found: found.group() + breaker, value)
            return value if literal else _FIRST.sub(lambda found: found.group() + breaker, value)
        if isinstance(value, list | tuple):
            return [self._broken(item, breaker) for item in value]
        if isinstance(value, dict):
            return {
                self._broken(k, breaker, literal=True): self._broken(
                    v, breaker, literal=k in ("role", "type")
                )
                for k, v in value.items()
            }
        return value


def _absent_character(value: Any) -> str:
    """A code point that occurs nowhere in the strings of `value`, not even escaped. RequestError: all occur."""
    present: set[str] = set()
    for text in _strings(value):
        present.update(text, (chr(int(code, 16)) for code in _ESCAPE.findall(text)))
    for code in BREAKERS:
        if chr(code) not in present:
            return chr(code)
    raise RequestError("the messages use every private Unicode character; leave one out", param="messages")


def _escaped(breaker: str) -> str:
    """How JSON without other than ASCII characters, and Python's repr, write `breaker`."""
    return json.dumps(breaker)[1:-1]


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
