"""`Conversation`, and `Talk`, which writes one turn by turn."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from hybrid.demo.data.grammar import (
    SLOT,
    Pattern,
    blocks,
    by_split,
    fill,
    loosen,
    move_slot,
    plainly,
    reword,
    slots_of,
    tidy,
)
from hybrid.demo.data.toolbox import Declared
from hybrid.demo.data.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Probe:
    """An assistant message that can be examined: where it is, what it shows, the wording that asked for it, and
    whether it is the one right answer (of stories and jokes there are many)."""

    index: int
    kind: str
    wording: str
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools as a client sends them, every assistant turn being the wanted one."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    probes: list[Probe]


@dataclass
class Talk:
    """A conversation being written, in the words of one split."""

    split: str
    rng: Random
    declared: list[Declared] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        self.words = Vocabulary(self.split, self.rng)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(
        self, wordings: dict[str, list[Pattern]], usable: Callable[[Pattern], bool] = lambda _: True
    ) -> Pattern:
        """A wording of this split; longer lists of alternatives come up somewhat more often, though less so where
        phrases within frames, which have the most, would crowd out sentences of their own."""
        options = [p for p in wordings[self.split] if usable(p)]
        power = 0.3 if self.split == "train" else 0.5
        return self.rng.choices(options, [min(p.count(), 64) ** power for p in options])[0]

    def system(self) -> None:
        text = self.words.expand(self.pick(_around("system")).sample(self.rng))
        self.messages.append({"role": "system", "content": text})

    def user(self, request: str, *, around: float = 0.0, more: bool = True) -> None:
        """A user's message: `request` as people type it, with chance `around` among other sentences; `more`: of
        which some may follow it."""
        rng, text = self.rng, request
        hasty = rng.random()
        if text[-1].isalnum() or text[-1] in "\"'}":
            text += "" if hasty < 0.5 else "." if hasty < 0.88 else "!"
        elif text[-1] == "?" and hasty < 0.12:
            text = text[:-1]
        if rng.random() < around:
            sides = rng.choice(["before", "before", "after", "both"]) if more else "before"
            if sides != "after":
                text = f"{self._sentence('before')} {text}"
            if sides != "before":
                text = f"{text if text[-1] in '.?!' else text + '.'} {self._sentence('after')}"
        self.messages.append({"role": "user", "content": text})

    def _sentence(self, place: str) -> str:
        text = self.pick(_around(place)).sample(self.rng)
        drawn = [self.words.text(slot) for slot in slots_of(text)]
        for told, fact in _TOLD.items():
            if re.match(told, text):
                self.facts[fact] = drawn[0]
        left = iter(drawn)
        return SLOT.sub(lambda _: next(left), text)

    def says(self, text: str, kind: str, wording: str, *, exact: bool = True) -> None:
        self.probes.append(Probe(len(self.messages), kind, wording, exact))
        self.messages.append({"role": "assistant", "content": text})

    def call(self, calls: list[tuple[Declared, dict[str, Any]]], kind: str, wording: str) -> None:
        """The assistant's call of tools with the values of their labels, ids counted over the conversation."""
        entries = []
        for target, values in calls:
            call_id = f"functions.{target.name}:{self.calls}"
            arguments = json.dumps(target.arguments(values), ensure_ascii=False)
            function = {"name": target.name, "arguments": arguments}
            entries.append({"id": call_id, "type": "function", "function": function})
            self.calls += 1
        self.probes.append(Probe(len(self.messages), kind, wording))
        self.messages.append({"role": "assistant", "content": "", "tool_calls": entries})

    def returned(self, contents: list[str]) -> None:
        """The results of the calls just made, in their order."""
        named, results = self.chance(0.5), []
        for entry, content in zip(self.messages[-1]["tool_calls"], contents, strict=True):
            message = {"role": "tool", "tool_call_id": entry["id"], "content": content}
            if named:
                message["name"] = entry["function"]["name"]
            results.append(message)
        self.messages += results

    def done(self) -> Conversation:
        tools = [d.declaration for d in self.declared] or None
        return Conversation(self.messages, tools, self.probes)


_TOLD = {r"(?:I am|I'm|My name is) \{person\}": "name", r"(?:I|We) (?:like|love) \{topic\}": "like"}
"""What the first slot of a sentence around a request tells, and may be asked for later."""


@cache
def _around(place: str) -> dict[str, list[Pattern]]:
    return next(by_split(block) for block in blocks("around.txt") if place in block)


def spoken(
    talk: Talk, pattern: Pattern, values: dict[str, str], *, loosely: float = 0.0, begins: bool = True
) -> str:
    """What `worded` gives, with `values` in its slots as they are."""
    return fill(worded(talk, pattern, loosely=loosely, begins=begins), values)


_UNQUOTED = 0.4
"""How often training leaves out the quotes around what a request hands over, as most people do."""


def worded(
    talk: Talk,
    pattern: Pattern,
    *,
    loosely: float = 0.0,
    begins: bool = True,
    open_ended: frozenset[str] = frozenset(),
    telling: frozenset[str] | None = None,
) -> str:
    """The pattern with alternatives chosen, its slots still open.

    While training, with chance `loosely` each, one of its verbs is replaced (if it is known which of its words are
    `telling`, and by none of those), it is not quite in the pattern's own words, and its slot is moved; `open_ended`
    slots hold free text, which would run into words put beside it. At the beginning of a sentence its own first
    letter is mostly a capital.
    """
    free_text = bool(pattern.slots & open_ended)
    text = pattern.sample(talk.rng)
    if talk.split == "train":
        if telling is not None and talk.chance(loosely):
            text = reword(text, talk.rng, telling)
        if talk.chance(loosely) and not free_text:
            text = loosen(text, talk.rng)
        if talk.chance(loosely):
            text = move_slot(text, talk.rng, free_text=free_text)
        if telling is not None and talk.chance(_UNQUOTED):
            text = re.sub(r'"(\{[a-z_]+\})"', r"\1", text)
        while plainly(pattern.unsaid(text)) in _held_out():
            text = pattern.sample(talk.rng)
    if talk.chance(0.6):
        text = _carefully(text)
    if begins and talk.chance(0.75):
        text = text[:1].upper() + text[1:]  # of a slot, the brace
    return tidy(text)


_NAMES = """German French Spanish Chinese Italian Latin Russian English Kimi Claude Siri Gemini Llama Moonshot Google Monday
Tuesday Friday Sunday""".split()
_CAPITALS = {
    **{name.lower(): name for name in _NAMES},
    "chatgpt": "ChatGPT",
    "gpt": "GPT",
    "openai": "OpenAI",
    "k2": "K2",
}


def _carefully(text: str) -> str:
    """A wording, its slots still open, with the capitals that hasty people leave out."""
    text = re.sub(r"(?<![{\w])i(?![}\w])", "I", text)
    text = re.sub(r"(?<![{\w])[a-z]+2?(?![}\w])", lambda word: _CAPITALS.get(word[0], word[0]), text)
    return re.sub(r"(?<=[.?!] )[a-z]", lambda letter: letter[0].upper(), text)


@cache
def _held_out() -> frozenset[str]:
    """Wordings of the other splits, which training must not come upon by chance."""
    found = set()
    for file in ("chat.txt", "facts.txt", "numbers.txt", "tools.txt", "made_up.txt"):
        for block in blocks(file):
            for split, patterns in by_split(block).items():
                if split != "train":
                    found |= {
                        plainly(p.sample(Random(i))) for p in patterns for i in range(min(p.count(), 50))
                    }
    return frozenset(found)
