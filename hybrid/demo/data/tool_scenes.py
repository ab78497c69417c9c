"""Scenes with tools: single calls, parallel calls, missing arguments, undeclared tools, results and answers."""

import json
from typing import Any

from hybrid.demo.data import small_talk
from hybrid.demo.data.grammar import Pattern, fill, last_slot
from hybrid.demo.data.talk import Talk, spoken
from hybrid.demo.data.toolbox import Declared, Tool, declare, novel_tool, written_tools

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
_SKIES = """sunny cloudy rainy windy foggy clear snowy stormy overcast hazy warm cold hot mild freezing humid dry cool icy
partly_cloudy mostly_sunny light_rain heavy_rain light_snow heavy_snow scattered_clouds clear_sky thunderstorms drizzle fog
hail showers very_hot very_cold""".split()


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
    values = {p.label: talk.words.value(p.kind) for p in target.tool.parameters if p.label in pattern.slots}
    texts = {label: value.text for label, value in values.items()}
    calls = [{label: value.json for label, value in values.items()}]
    if listed > 1:
        first = target.tool.required[0]
        more = [talk.words.value(first.kind) for _ in range(listed)]
        names = [value.text for value in more]
        joint = talk.rng.choice([" and ", " and ", " and also "])
        texts[first.label] = ", ".join(names[:-1]) + joint + names[-1]
        calls = [{**calls[0], first.label: value.json} for value in more]
    return spoken(talk, pattern, texts, loosely=0.13, begins=begins), calls, pattern


def _result(talk: Talk, target: Declared, values: dict[str, Any]) -> tuple[str, str]:
    """What the tool returns for a call, and the sentence that tells it."""
    tool, rng = target.tool, talk.rng
    said = {label: _plain(value) for label, value in values.items()}
    if talk.chance(0.06):
        error = talk.words.text("error")
        content = rng.choice(
            [
                json.dumps({"error": error}),
                f"Error: {error}",
                json.dumps({"status": "error", "message": error}),
            ]
        )
        return content, f"Sorry, that did not work: {error}."
    if tool.result_kind == "weather":
        return _weather(talk, said["city"])
    if tool.result_kind == "ok":
        content = rng.choice(
            [
                '{"status": "ok"}',
                '{"success": true}',
                "ok",
                "done",
                '{"result": "ok"}',
                '{"status": "done"}',
                "OK",
            ]
        )
        return content, fill(tool.answer, said)
    drawn = _computed(talk, tool.key, values) or talk.words.text(tool.result_kind)
    sentence = fill(tool.answer, {**said, "result": drawn})
    value: Any = drawn
    if drawn.isdigit() and talk.chance(0.7):
        value = int(drawn)
    elif tool.result_kind == "money" and talk.chance(0.5) and str(float(drawn)) == drawn:
        value = float(drawn)
    if talk.chance(0.2):
        return drawn, sentence
    result = {rng.choice(tool.result_keys): value}
    if talk.chance(0.25):
        result = {**result, "status": "ok"} if talk.chance(0.5) else {"status": "ok", **result}
    if talk.chance(0.25):
        echo = {target.names[label]: v for label, v in values.items()}
        result = (
            {**echo, **{k: v for k, v in result.items() if k not in echo}}
            if not set(echo) & set(result)
            else result
        )
    return _dumps(talk, result), sentence


def _computed(talk: Talk, key: str, values: dict[str, Any]) -> str:
    """The result of a tool whose results are easily right; else nothing."""
    if key == "add_numbers":
        return str(values["a"] + values["b"])
    if key == "count_letters":
        return str(len(values["word"]))
    if key == "roll_dice":
        return str(talk.rng.randint(values["count"], 6 * values["count"]))
    return ""


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _dumps(talk: Talk, value: Any) -> str:
    compact = talk.chance(0.25)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else (", ", ": "))


def _weather(talk: Talk, city: str) -> tuple[str, str]:
    rng = talk.rng
    sky = rng.choice(_SKIES).replace("_", " ")
    if talk.chance(0.15):
        also = ["windy", "cold", "warm", "wet", "dry", "humid", "hot", "cool"]
        sky += " and " + rng.choice([word for word in also if word not in sky])
    degrees: float = rng.randint(-20, 40)
    if talk.chance(0.15):
        degrees += rng.randint(1, 9) / 10
    written = sky.capitalize() if talk.chance(0.5) else sky
    temperature = rng.choice(["temperature", "temperature", "temp", "degrees", "temp_c", "temperature_c"])
    condition = rng.choice(
        ["weather", "weather", "condition", "conditions", "sky", "description", "forecast", "summary"]
    )
    warm: Any = degrees
    told = f"{degrees} degrees"
    if talk.chance(0.3):
        warm = told = f"{degrees}{rng.choice(['°C', ' C', ' degrees', '°F', '°'])}"
    roll = rng.random()
    if roll < 0.3:
        content: Any = {condition: written}
        sentence = f"The weather in {city}: {sky}."
    elif roll < 0.45:
        content = {temperature: warm}
        sentence = f"The temperature in {city} is {told}."
    elif roll < 0.9:
        content = {condition: written, temperature: warm}
        if talk.chance(0.4):
            content = {temperature: warm, condition: written}
        sentence = f"The weather in {city}: {sky}, {told}."
    else:
        content = f"{written}, {warm}" if isinstance(warm, str) else written
        sentence = (
            f"The weather in {city}: {sky}, {told}."
            if isinstance(warm, str)
            else f"The weather in {city}: {sky}."
        )
        return content, sentence
    if talk.chance(0.25):
        extra: Any = rng.choice(
            [{"humidity": rng.randint(20, 99)}, {"wind": f"{rng.randint(1, 60)} km/h"}, {"unit": "celsius"}]
        )
        content = {**content, **extra} if talk.chance(0.7) else {**extra, **content}
    if talk.chance(0.25):
        content = {rng.choice(["city", "location"]): city, **content}
    return _dumps(talk, content), sentence


def answer(talk: Talk, calls: list[tuple[Declared, dict[str, Any]]], wording: str) -> None:
    """The results of the calls just made, and what the assistant says to them."""
    results = [_result(talk, target, values) for target, values in calls]
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
        value = talk.words.value(first.kind)
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
    value = talk.words.value(first.kind)
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
