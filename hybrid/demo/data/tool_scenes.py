"""Scenes with tools: single calls, parallel calls, missing arguments, undeclared tools, answers to results."""

from typing import Any

from hybrid.demo.data import small_talk
from hybrid.demo.data.arguments import argument
from hybrid.demo.data.grammar import Pattern, last_slot
from hybrid.demo.data.made_up import novel_tool
from hybrid.demo.data.results import result
from hybrid.demo.data.talk import Talk, spoken
from hybrid.demo.data.toolbox import Declared, Tool, declare, written_tools

REFUSAL = "Sorry, I have no tool for that."
_CONFUSABLE = [
    {"calculate", "add_numbers"}, {"create_note", "add_task"}, {"get_directions", "book_flight"},
    {"set_timer", "add_task"}, {"send_message", "send_email"}, {"set_timer", "set_alarm"},
    {"open_app", "play_music"}, {"define_word", "search_web"}, {"get_recipe", "search_web"},
    {"create_event", "add_task"}, {"create_note", "add_to_list"},
]  # fmt: skip
"""Tools that answer to much the same requests: never declared together, nor one asked for when only the other is."""
KNOWING = {"search_web", "define_word", "get_recipe"}
RECKONING = {"calculate", "add_numbers"}
"""Tools that answer what small talk otherwise does."""
_SEARCHES = "search_web"  # would do for almost any request
_LISTABLE = {"city", "company", "person", "dish", "code"}


def _clash(a: Tool, b: Tool) -> bool:
    return a.root == b.root or any({a.key, b.key} <= group for group in _CONFUSABLE)


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


def request(
    talk: Talk, target: Declared, *, listed: int = 1, begins: bool = True
) -> tuple[str, list[dict[str, Any]], Pattern]:
    """A request for a declared tool: its text, the labels' values of each call it asks for, and the wording.

    `begins`: it stands at the beginning of a sentence. `listed` > 1 asks for that many values of the tool's one argument at once ("in Rome and Oslo")."""
    required = {p.label for p in target.tool.required}
    pattern = talk.pick(target.tool.wordings, lambda p: required <= p.slots <= set(target.names))
    values = {
        p.label: argument(talk.words, p.kind) for p in target.tool.parameters if p.label in pattern.slots
    }
    texts = {label: value.text for label, value in values.items()}
    calls = [{label: value.json for label, value in values.items()}]
    if listed > 1:
        first = target.tool.required[0]
        more = [argument(talk.words, first.kind) for _ in range(listed)]
        names = [value.text for value in more]
        joint = talk.rng.choice([" and ", " and ", " and also "])
        texts[first.label] = ", ".join(names[:-1]) + joint + names[-1]
        calls = [{**calls[0], first.label: value.json} for value in more]
    return spoken(talk, pattern, texts, loosely=0.13, begins=begins), calls, pattern


def answer(talk: Talk, calls: list[tuple[Declared, dict[str, Any]]], wording: str) -> None:
    """The results of the calls just made, and what the assistant says to them."""
    results = [result(talk, target, values) for target, values in calls]
    talk.returned([content for content, _ in results])
    talk.says(" ".join(sentence for _, sentence in results), "result", wording)


def _ends_open(target: Declared, pattern: Pattern) -> bool:
    """Whether a request so worded ends in free text, which words after it would seem to belong to."""
    return last_slot(pattern.line) in target.tool.open_ended


def _kind(target: Declared) -> str:
    if target.tool.result_kind == "weather":
        return "weather"
    return "novel call" if target.tool.novel else "call"


def single(talk: Talk, target: Declared, *, answered: bool) -> None:
    """One call, perhaps its result and answer, perhaps the same for something else ("and in Rome?")."""
    text, calls, pattern = request(talk, target)
    talk.user(text, around=0.35, more=not _ends_open(target, pattern))
    name = "novel" if target.tool.novel else target.tool.key
    talk.call([(target, calls[0])], _kind(target), f"{name}: {pattern.line}")
    if not answered:
        return
    answer(talk, [(target, calls[0])], target.tool.key)
    first = target.tool.required[0]
    if len(target.tool.required) == 1 and first.kind in _LISTABLE and talk.chance(0.25):
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
    listable = [
        d for d in talk.declared if len(d.tool.required) == 1 and d.tool.required[0].kind in _LISTABLE
    ]
    if listable and (len(talk.declared) < 2 or talk.chance(0.6)):
        target = rng.choice(listable)
        text, values, pattern = request(talk, target, listed=rng.choice([2, 2, 2, 3]))
        calls, wording = [(target, v) for v in values], f"{target.tool.key}: {pattern.line}"
    elif len(talk.declared) >= 2:
        chosen = rng.sample(talk.declared, 2)
        asked = [request(talk, chosen[0])]
        joints = [". ", ". Also, "] + [" and ", ", and ", " and also "] * (
            not _ends_open(chosen[0], asked[0][2])
        )
        joint = rng.choice(joints)
        asked.append(request(talk, chosen[1], begins=joint == ". "))
        one, two = (text for text, _, _ in asked)
        text = (one if joint[0] == "." and one[-1] == "?" else one.rstrip("?.") + joint[0]) + joint[1:] + two
        calls = [(target, values[0]) for target, (_, values, _) in zip(chosen, asked, strict=True)]
        wording = "two tools"
    else:
        single(talk, talk.declared[0], answered=answered)
        return
    talk.user(text, around=0.25)
    talk.call(calls, "parallel", wording)
    if answered:
        answer(talk, calls, "parallel")


def incomplete(talk: Talk, target: Declared) -> None:
    """A request that leaves out what the tool needs; the assistant asks, is told, and calls."""
    first = target.tool.required[0]
    pattern = talk.rng.choice(target.tool.missing)
    talk.user(spoken(talk, pattern, {}), around=0.15)
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
    if any(d.tool.key == _SEARCHES for d in talk.declared):
        return
    while True:
        tool = novel_tool(talk.split, rng) if talk.chance(0.25) else rng.choice(written_tools())
        if tool.key not in RECKONING and not any(_clash(tool, d.tool) for d in talk.declared):
            break
    if tool.missing and talk.chance(0.15):
        pattern = rng.choice(tool.missing)
        text = spoken(talk, pattern, {})
    else:
        text, _, pattern = request(talk, declare(tool, rng))
    talk.user(text, around=0.25)
    wording = f"{'novel' if tool.novel else tool.key}: {pattern.line}"
    if talk.declared:
        talk.says(REFUSAL, "undeclared", wording)
    elif tool.novel and tool.result_keys:  # a question as any other
        talk.says(small_talk.unknown(), "without tools", wording)
    else:
        talk.says(REFUSAL, "without tools", wording)


def can_be_incomplete(target: Declared) -> bool:
    return bool(target.tool.missing) and len(target.tool.required) == 1
