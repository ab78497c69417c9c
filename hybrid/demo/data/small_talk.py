"""Scenes without tools: small talk, facts, numbers, instructions, jokes and stories."""

import re
from functools import cache
from random import Random

from hybrid.demo.data.grammar import SLOT, Pattern, all_wordings, blocks, fill, slots_of, with_articles
from hybrid.demo.data.lexicon import NUMBER_WORDS, split_of
from hybrid.demo.data.talk import Talk, spoken
from hybrid.demo.data.vocabulary import ANIMALS

_Wordings = dict[str, list[Pattern]]


@cache
def _named(file: str, heading: str) -> dict[str, tuple[dict[str, list[str]], _Wordings]]:
    return {block[heading][0]: (block, all_wordings(block)) for block in blocks(file) if heading in block}


def intents() -> list[str]:
    """The intents of chat.txt that a conversation can turn to."""
    named = _named("chat.txt", "intent")
    return [name for name, (block, _) in named.items() if "follows" not in block]


def unknown() -> str:
    """What is said to a question that the model cannot answer."""
    return _named("chat.txt", "intent")["dontknow"][0]["reply"][0]


ANSWERS = frozenset({"ok", "no", "praise", "iamfine", "iamsad"})
"""Intents that, right after a question of the model's, would answer it."""


def expects_answer(talk: Talk) -> bool:
    """Whether the model has just asked something that has its own answers."""
    questions = {b["reply"][0] for b, _ in _named("chat.txt", "intent").values() if "then" in b}
    return bool(talk.messages) and talk.messages[-1]["content"] in questions


def chat(talk: Talk, name: str) -> None:
    """One exchange of an intent of chat.txt."""
    block, wordings = _named("chat.txt", "intent")[name]
    pattern = talk.pick(wordings)
    values = {slot: talk.words.text(slot) for slot in sorted(pattern.slots)}
    talk.user(with_articles(spoken(talk, pattern, values)), around=0.12)
    for line in block.get("remembers", []):
        remembered, slot = line.split(" ")
        talk.facts[remembered] = values[slot[1:-1]]
    reply, wording = block["reply"][0], f"{name}: {pattern.line}"
    if reply == "@joke":
        talk.says(talk.rng.choice(jokes()), "joke", wording, exact=False)
    elif reply == "@story":
        text = story(talk.rng, values.get("animal"), values.get("person") or talk.words.text("person"))
        talk.says(text, "story", wording, exact=False)
    else:
        known = {**talk.facts, **values}
        if talk.declared:
            known["tools"] = ", ".join(declared.name for declared in talk.declared)
        if "unknown" in block and not set(slots_of(reply)) <= set(known):
            reply = block["unknown"][0]
        kind = "chat" if "unknown" not in block else "not told" if reply in block["unknown"] else "memory"
        kind = block.get("kind", [kind])[0]
        talk.says(fill(reply, known), kind, wording)
    if "then" in block and talk.chance(0.4):
        chat(talk, talk.rng.choice(block["then"][0].split()))


_UNHEARD = {"capital": "city", "opposite": "word"}
"""Kinds of words that a question of a table may be about without an answer in it."""


def fact(talk: Talk, *, heard: bool = False) -> None:
    """A question from facts.txt, now and then, but with `heard`, about something that its table does not know."""
    tables = _named("facts.txt", "table")
    name = talk.rng.choice(list(tables))
    block, wordings = tables[name]
    a, _, b = (part.strip() for part in talk.rng.choice(block["pairs"][0].split(",")).partition("="))
    n = talk.rng.randint(2, 5)
    if not heard and name in _UNHEARD and talk.chance(0.25):
        unheard = talk.words.text(_UNHEARD[name])
        if not re.search(rf"(?:^|,)\s*{re.escape(unheard)}=", block["pairs"][0], re.IGNORECASE):
            a, b = unheard, ""
    if name == "lists":
        b = ", ".join(b.split(". ")[:n])
    subject = re.match(r"(?:(?:an?|the) )?\S+", a, re.IGNORECASE)
    assert subject
    values = {
        "a": a,
        "a.lower": a[:1].lower() + a[1:],
        "a.is": f"{subject[0]} is{a[subject.end() :]}",
        "b": b,
        "n": NUMBER_WORDS[n] if talk.chance(0.6) else str(n),
    }
    pattern = talk.pick(wordings)
    talk.user(spoken(talk, pattern, values, loosely=0.12), around=0.1)
    if b:
        talk.says(fill(block["reply"][0], values), "fact", f"{name}: {pattern.line}")
    else:
        talk.says(unknown(), "unknown", f"{name}: {pattern.line}")


_OPERATIONS: dict[str, float] = {
    "add": 10, "subtract": 4, "multiply": 2, "larger": 1.5, "isgreater": 1, "count": 1.5, "countfrom": 1,
    "countdown": 1, "next": 1, "repeat": 6, "twice": 1,
}  # fmt: skip


_RECKONED = {"add", "subtract", "multiply"}
_SPELT = {"add": 0.08, "subtract": 0.08, "multiply": 0.08, "count": 0.3, "countfrom": 0.3, "countdown": 0.3}
"""How often small numbers are written as words."""


def numbers(talk: Talk, *, reckoning: bool = True) -> None:
    """A question about numbers or a plain instruction, from numbers.txt; `reckoning`: sums among them."""
    weights = {k: w for k, w in _OPERATIONS.items() if reckoning or k not in _RECKONED}
    name = talk.rng.choices(list(weights), list(weights.values()))[0]
    block, wordings = _named("numbers.txt", "op")[name]
    values, kind = _numbers_for(talk, name)
    pattern = talk.pick(wordings)
    asked = dict(values)
    if talk.chance(_SPELT.get(name, 0.0)):
        asked |= {
            k: NUMBER_WORDS[int(v)] for k, v in values.items() if v.isdigit() and int(v) < len(NUMBER_WORDS)
        }
    talk.user(spoken(talk, pattern, asked, loosely=0.0 if kind == "repeat" else 0.12), around=0.1)
    talk.says(fill(block["reply"][0], values), kind, f"{name}: {pattern.line}")


def addition(talk: Talk, a: int, b: int) -> None:
    """The question for one sum."""
    block, wordings = _named("numbers.txt", "op")["add"]
    pattern, values = talk.pick(wordings), _strings(a, b, a + b)
    talk.user(spoken(talk, pattern, values))
    talk.says(fill(block["reply"][0], values), "sum", f"add: {pattern.line}")


def _numbers_for(talk: Talk, name: str) -> tuple[dict[str, str], str]:
    """The values of a question's slots, {c} being the answer, and its kind."""
    rng = talk.rng
    if name in ("repeat", "twice"):
        options = [
            "message",
            "person",
            "word",
            "city",
            "{word} {word}",
            "{word} {word} {word}",
            "number",
            "{item} and {item}",
        ]
        option = rng.choice(options)
        return {"x": talk.words.expand(option) if "{" in option else talk.words.text(option)}, "repeat"
    if name == "add":
        a, b = _pair(talk, rng.choice([9, 9, 10, 10, 20, 20, 50]))
        return _strings(a, b, a + b), "sum" if max(a, b) <= 10 else "large sum"
    if name == "subtract":
        a, b = sorted(_pair(talk, rng.choice([9, 10, 20])), reverse=True)
        return _strings(a, b, a - b), "arithmetic"
    if name == "multiply":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return _strings(a, b, a * b), "arithmetic"
    if name in ("larger", "isgreater"):
        a, b = _pair(talk, rng.choice([9, 30, 99]))
        if name == "isgreater":
            return _strings(a, b, "Yes." if a > b else "No."), "arithmetic"
        return _strings(a, b + (a == b), max(a, b + (a == b))), "arithmetic"
    if name == "next":
        a = talk.words.number(0, 98)
        return _strings(a, 0, a + 1), "arithmetic"
    low = rng.randint(2, 9) if name == "countfrom" else 1
    high = rng.randint(low + 1, low + 8) if name == "countfrom" else rng.randint(2, 12)
    run = range(high, 0, -1) if name == "countdown" else range(low, high + 1)
    return _strings(low, high, ", ".join(map(str, run))), "count"


def _pair(talk: Talk, high: int) -> tuple[int, int]:
    """Two numbers up to `high`; pairs up to 10 are in every split, larger ones dealt out, in either order."""
    while True:
        a, b = talk.rng.randint(0, high), talk.rng.randint(0, high)
        if max(a, b) <= 10 or split_of(f"{min(a, b)} {max(a, b)}") == talk.split:
            return a, b


def _strings(a: int, b: int, c: int | str) -> dict[str, str]:
    return {"a": str(a), "b": str(b), "c": str(c)}


@cache
def _grammar() -> dict[str, list[str]]:
    return {heading: lines for block in blocks("stories.txt") for heading, lines in block.items()}


def jokes() -> list[str]:
    """Every joke there is."""
    return _grammar()["joke"]


def story(rng: Random, animal: str | None, name: str) -> str:
    """A short story about `animal` (any, if None) called `name`."""
    rules = _grammar()

    def listed(key: str) -> list[str]:
        return rules[key][0].split(", ")

    hero = animal or rng.choice(ANIMALS)
    drawn = {
        "animal*": hero,
        "name*": name[:1].upper() + name[1:],
        "adjective*": rng.choice(listed("adjectives")),
        "place*": rng.choice(listed("places")),
        "thing*": rng.choice(listed("things")),
        "seeker*": rng.choice(listed("seekers")),
        "feeling*": rng.choice(listed("feelings")),
        "other*": rng.choice([a for a in ANIMALS if a != hero]),
        "friend*": rng.choice(
            [n for n in ("Bo", "Mimi", "Rolf", "Tilda", "Pip", "Otto", "Wanda", "Finn") if n != name]
        ),
    }
    parts = ["opening", "home", "problem", "search", "talk", "turn", "ending"]
    if rng.random() < 0.4:
        parts.remove("home")
    text = " ".join(SLOT.sub(lambda found: drawn[found[1]], rng.choice(rules[part])) for part in parts)
    return with_articles(text)


def is_story(text: str, asked: str) -> bool:
    """Whether `text` is a story by the grammar's own sentences, with the words it was `asked` to be about."""
    rules = _grammar()
    shapes = [
        SLOT.sub("[^.?]{1,40}", re.sub(r"([.?*+()])", r"\\\1", line.replace("*}", "}")))
        for part in ("opening", "ending")
        for line in rules[part]
    ]
    opening, ending = shapes[: len(rules["opening"])], shapes[len(rules["opening"]) :]
    begins = any(re.match(re.sub(r"\ba ", "an? ", shape), text) for shape in opening)
    ends = any(re.search(shape + "$", text) for shape in ending)
    return begins and ends and all(word in text for word in asked.split())
