"""Scenes with tools: single calls, parallel calls, missing arguments, undeclared tools, answers to results."""

import re
from typing import Any, NamedTuple

from hybrid.demo.data import small_talk
from hybrid.demo.data.arguments import Value, argument
from hybrid.demo.data.grammar import Pattern, fill, last_slot
from hybrid.demo.data.made_up import alike, neighbour, novel_tool
from hybrid.demo.data.results import result
from hybrid.demo.data.talk import Talk, spoken, worded
from hybrid.demo.data.toolbox import Declared, Parameter, Tool, declare, written_tools

REFUSAL = "Sorry, I have no tool for that."
_CONFUSABLE = [
    {"calculate", "add_numbers"}, {"create_note", "add_task"}, {"get_directions", "book_flight"},
    {"set_timer", "add_task"}, {"send_message", "send_email"}, {"set_timer", "set_alarm"},
    {"open_app", "play_music"}, {"define_word", "search_web"}, {"get_recipe", "search_web"},
    {"create_event", "add_task"}, {"create_note", "add_to_list"}, {"create_event", "create_note"},
    {"add_task", "add_to_list"},
]  # fmt: skip
"""Tools that answer to much the same requests: never declared together, nor one asked for when only the other is."""
KNOWING = {"search_web", "define_word", "get_recipe"}
RECKONING = {"calculate", "add_numbers"}
"""Tools that answer what small talk otherwise does."""
_SEARCHES = "search_web"  # would do for almost any request
_AGAIN = {"city", "company", "person", "dish", "code"}
"""Kinds of which a tool's one argument is asked for again ("and in Rome?")."""
_LISTABLE = _AGAIN | {"room", "word", "item", "language", "contact"}
"""Kinds of which a request may name several ("in Rome and Oslo")."""
_JOINTS = [
    "{}. {}", "{}. {}", "{}. {}", "{}. Also, {}", "{}; {}", "{}. And {}", "{}. Then {}", "{}. Oh, and {}", "{}. Next, {}",
    "{}. After that, {}", "{}. Plus, {}", "{}.\n{}", "{}\n{}", "1. {}\n2. {}", "- {}\n- {}", "Two things: {}; {}",
]  # fmt: skip
_LOOSE_JOINTS = [
    "{} and {}", "{} and {}", "{} and {}", "{}, and {}", "{}, and {}", "{} and also {}", "{}, then {}", "{} and then {}",
    "{} and after that {}", "{} & {}", "{}, and please {}", "{}, and while you are at it, {}",
    "{}, and besides that, {}", "{}, also {}",
]  # fmt: skip
"""How two requests are put into one; the loose ones would seem to go on with free text."""
_ASKING_JOINTS = ["{}, and {}", "{}, and {}", "{}, and also {}", "{}, also, {}", "{} and {}"]
"""What free text may go on with where a question follows, as it would not hold one itself; training's alone."""
_ASKS = re.compile(
    r"(what|which|who|where|when|why|how|is|are|do|does|did|can|could|will|would|should|may|has|have)\b", re.I
)
"""Begins a question."""
_PLAINLY = 0.25
"""How often training asks in a tool's most ordinary wordings."""


def _clash(a: Tool, b: Tool) -> bool:
    return alike(a.root, b.root) or any({a.key, b.key} <= group for group in _CONFUSABLE)


def declare_some(talk: Talk, count: int, *, weather: bool = False) -> None:
    """Declare `count` tools that do not clash, a good part of them made up."""
    rng, chosen = talk.rng, list[Tool]()
    if weather:
        chosen.append(written_tools()[0])
    while len(chosen) < count:
        tool = novel_tool(talk.split, rng) if talk.chance(0.3) else rng.choice(written_tools())
        if not any(_clash(tool, other) for other in chosen):
            chosen.append(tool)
    rng.shuffle(chosen)
    names: set[str] = set()
    for tool in chosen:
        declared = declare(tool, rng, freely=0.3 if talk.split == "train" else 0.0)
        if declared.name not in names:
            names.add(declared.name)
            talk.declared.append(declared)


class Request(NamedTuple):
    """`calls`: the labels' values of each call it asks for; `wording`: the line it was made from; `open_ended`:
    whether it ends in free text, which words after it would seem to belong to."""

    text: str
    calls: list[dict[str, Any]]
    wording: str
    open_ended: bool


def request(talk: Talk, target: Declared, *, listed: int = 1, begins: bool = True) -> Request:
    """A request for a declared tool.

    `begins`: it stands at the beginning of a sentence. `listed` > 1 asks for that many values of one of the tool's
    arguments at once ("in Rome and Oslo"), the others being the same.
    """
    required = {p.label for p in target.tool.required}

    def usable(pattern: Pattern) -> bool:
        return required <= pattern.slots <= set(target.names)

    plain = [p for p in target.tool.plain if usable(p)]
    if talk.split == "train" and plain and talk.chance(_PLAINLY):
        pattern = talk.rng.choice(plain)
    else:
        pattern = talk.pick(target.tool.wordings, usable)
    values = _values(talk, target.tool, pattern)
    texts = {label: value.text for label, value in values.items()}
    calls = [{label: value.json for label, value in values.items()}]
    if listed > 1:
        first = talk.rng.choice(_listable(target.tool))
        more = _different(talk, first.kind, listed)
        names = [value.text for value in more]
        joint = talk.rng.choice([" and ", " and ", " and also "])
        texts[first.label] = ", ".join(names[:-1]) + joint + names[-1]
        calls = [{**calls[0], first.label: value.json} for value in more]
    free = target.tool.open_ended
    said = worded(talk, pattern, loosely=0.13, begins=begins, open_ended=free, telling=target.tool.telling)
    return Request(fill(said, texts), calls, pattern.line, last_slot(said.rstrip("?.! ")) in free)


def _values(talk: Talk, tool: Tool, pattern: Pattern) -> dict[str, Value]:
    """A value for each of the tool's parameters that the pattern has a slot for."""
    return {p.label: argument(talk.words, p.kind) for p in tool.parameters if p.label in pattern.slots}


def _listable(tool: Tool) -> list[Parameter]:
    alone = len(tool.required) == 1
    return [p for p in tool.required if p.kind in _LISTABLE or (alone and p.kind == "count")]


def _different(talk: Talk, kind: str, count: int) -> list[Value]:
    """Values of a kind that nobody could take for one another, or for two."""
    found: list[Value] = []
    while len(found) < count:
        value = argument(talk.words, kind)
        if " and " not in value.text and value.json not in [other.json for other in found]:
            found.append(value)
    return found


def answer(talk: Talk, calls: list[tuple[Declared, dict[str, Any]]], wording: str) -> None:
    """The results of the calls just made, and what the assistant says to them."""
    results = [result(talk, target, values) for target, values in calls]
    talk.returned([content for content, _ in results])
    talk.says(" ".join(sentence for _, sentence in results), "result", wording)


def _kind(target: Declared) -> str:
    if target.tool.result_kind == "weather":
        return "weather"
    return "novel call" if target.tool.novel else "call"


def single(talk: Talk, target: Declared, *, answered: bool) -> None:
    """One call, perhaps its result and answer, perhaps the same for something else ("and in Rome?")."""
    asked = request(talk, target)
    calls = [(target, asked.calls[0])]
    talk.user(asked.text, around=0.35, more=not asked.open_ended)
    name = "novel" if target.tool.novel else target.tool.key
    talk.call(calls, _kind(target), f"{name}: {asked.wording}")
    if not answered:
        return
    answer(talk, calls, target.tool.key)
    first = target.tool.required[0]
    if len(target.tool.required) == 1 and first.kind in _AGAIN and talk.chance(0.25):
        value = argument(talk.words, first.kind)
        where = " in" if first.kind == "city" and talk.chance(0.6) else ""
        talk.user(
            talk.rng.choice(["and", "what about", "how about", "and what about", "now"])
            + f"{where} {value.text}?"
        )
        again = [(target, {first.label: value.json})]
        talk.call(again, "follow-up", target.tool.key)
        answer(talk, again, target.tool.key)


def parallel(talk: Talk, *, answered: bool) -> None:
    """Two or three calls at once: of one tool, or of two."""
    rng = talk.rng
    listable = [d for d in talk.declared if _listable(d.tool)]
    if listable and (len(talk.declared) < 2 or talk.chance(0.5)):
        target = rng.choice(listable)
        listing = request(talk, target, listed=rng.choice([2, 2, 2, 3]))
        text, wording, more = listing.text, f"{target.tool.key}: {listing.wording}", not listing.open_ended
        calls = [(target, values) for values in listing.calls]
    elif len(talk.declared) >= 2 or talk.chance(0.7):
        if len(talk.declared) >= 2 and talk.chance(0.75 if talk.split == "train" else 0.85):
            chosen = rng.sample(talk.declared, 2)
        else:
            chosen = [rng.choice(talk.declared)] * 2
        text, calls, more = _joined(talk, *chosen)
        wording = "two tools"
    else:
        single(talk, talk.declared[0], answered=answered)
        return
    talk.user(text, around=0.25, more=more)
    talk.call(calls, "parallel", wording)
    if answered:
        answer(talk, calls, "parallel")


def _joined(
    talk: Talk, one: Declared, two: Declared
) -> tuple[str, list[tuple[Declared, dict[str, Any]]], bool]:
    """Two requests in one. -> the text, the calls, and whether another sentence may follow."""
    first = request(talk, one)
    asking = first.open_ended and talk.split == "train" and talk.chance(0.25)
    joints = _ASKING_JOINTS if asking else _JOINTS if first.open_ended else _JOINTS + _LOOSE_JOINTS
    head, joint, _ = talk.rng.choice(joints).split("{}")
    begins = joint[0] in ".\n" and not any(map(str.isalpha, joint))
    second = request(talk, two, begins=begins)
    while (one is two and second.calls == first.calls) or (asking and not _ASKS.match(second.text)):
        second = request(talk, two, begins=begins)
    text = first.text
    if joint[0] == "." and text[-1] == "?":
        joint = joint[1:]
    elif joint[0] != "\n":
        text = text.rstrip("?.")
    calls = [(one, first.calls[0]), (two, second.calls[0])]
    return head + text + joint + second.text, calls, not second.open_ended


def incomplete(talk: Talk, target: Declared) -> None:
    """A request that leaves out what the tool needs; the assistant asks, is told, and calls."""
    first = target.tool.required[0]
    pattern = talk.rng.choice(target.tool.missing)
    talk.user(spoken(talk, pattern, {}))  # alone: a sentence beside it might name what is missing
    label = first.label.replace("_", " ")
    talk.says(f"Please tell me the {label}.", "incomplete", f"{target.tool.key}: {pattern.line}")
    value = argument(talk.words, first.kind)
    talk.user(talk.rng.choice(["{}", "{}", "{} please", "it is {}", "{}, please"]).format(value.text))
    calls = [(target, {first.label: value.json})]
    talk.call(calls, "follow-up", target.tool.key)
    answer(talk, calls, target.tool.key)


def undeclared(talk: Talk) -> None:
    """A request for a tool that is not there: a polite refusal."""
    rng = talk.rng
    searching = [d for d in talk.declared if d.tool.key == _SEARCHES]
    if talk.declared and talk.chance(0.4) and _near_miss(talk, rng.choice(searching or talk.declared)):
        return
    if searching:
        return
    while True:
        tool = novel_tool(talk.split, rng) if talk.chance(0.25) else rng.choice(written_tools())
        if tool.key not in RECKONING and not any(_clash(tool, d.tool) for d in talk.declared):
            break
    if tool.missing and talk.chance(0.15):
        pattern = rng.choice(tool.missing)
        text, line = spoken(talk, pattern, {}), pattern.line
    else:
        text, _, line, _ = request(talk, declare(tool, rng))
    talk.user(text, around=0.25)
    wording = f"{'novel' if tool.novel else tool.key}: {line}"
    if talk.declared:
        talk.says(REFUSAL, "undeclared", wording)
    elif tool.novel and tool.result_keys:  # a question as any other
        talk.says(small_talk.unknown(), "without tools", wording)
    else:
        talk.says(REFUSAL, "without tools", wording)


def _near_miss(talk: Talk, target: Declared) -> bool:
    """A request that sounds like the tool's and is not: refused. -> whether there is one that no tool answers."""
    tool, split = target.tool, talk.split
    if tool.novel:
        other = neighbour(tool, split, talk.rng)
        if other is None or any(_clash(other, d.tool) for d in talk.declared):
            return False
        text, _, line, _ = request(talk, declare(other, talk.rng))
        talk.user(text, around=0.25)
        talk.says(REFUSAL, "near miss", f"novel: {line}")
        return True
    if not tool.near[split]:
        return False
    pattern = talk.pick(tool.near)
    texts = {label: value.text for label, value in _values(talk, tool, pattern).items()}
    talk.user(spoken(talk, pattern, texts, loosely=0.1), around=0.2, more=False)
    talk.says(REFUSAL, "near miss", f"{tool.key}: {pattern.line}")
    return True


def can_be_incomplete(target: Declared) -> bool:
    return bool(target.tool.missing) and len(target.tool.required) == 1
