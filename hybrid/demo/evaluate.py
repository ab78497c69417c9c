"""`python -m hybrid.demo.evaluate [DIR]`: examine an exported model on the sealed split, through the engine, and print
the tables of the README's model card.

Turns are matched by teacher forcing (hybrid.demo.trainer.matching says why that is exact); the weather prompts,
stories and jokes are really generated, greedily, and parsed as a client would get them.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.default_model import DIRECTORY
from hybrid.demo.card import card
from hybrid.demo.data import small_talk, tool_scenes
from hybrid.demo.data.arguments import argument
from hybrid.demo.data.encode import Encoder
from hybrid.demo.data.generator import conversation
from hybrid.demo.data.talk import Conversation, Talk, spoken
from hybrid.demo.data.toolbox import Declared, written_tools
from hybrid.demo.export import config_of, read_back
from hybrid.demo.trainer.matching import Case, Tally, exact_matches, survey
from hybrid.demo.trainer.model import DemoModel
from hybrid.demo.trainer.ops import TorchOps
from hybrid.engine import Engine
from hybrid.request import SamplingParams
from offload.errors import HybridError

CARD_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Retrieve current weather information. Call this when the user asks about the weather.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
        },
    },
}
"""The declaration of K2's model card."""

NO_CALL = {
    "chat",
    "fact",
    "unknown",
    "sum",
    "large sum",
    "arithmetic",
    "count",
    "repeat",
    "memory",
    "not told",
    "tools",
    "story",
    "joke",
}
"""Kinds of turns that need no tool."""

_Tokens = NDArray[np.int64]

GREEDY = SamplingParams(temperature=0.0, max_tokens=400)
SAMPLED = SamplingParams(max_tokens=400, seed=0)
"""As `hybrid chat` and the endpoint do when nothing is asked for."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hybrid.demo.evaluate", description="Examine the embedded model."
    )
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=DIRECTORY,
        help="an exported model (default: the one that comes with hybrid)",
    )
    parser.add_argument(
        "--conversations",
        type=int,
        default=1200,
        help="how many, and the most of stories and of each kind of request (default 1200)",
    )
    parser.add_argument(
        "--weather", type=int, default=10, help="prompts for each weather wording (default 10)"
    )
    parser.add_argument("--split", default="sealed", choices=["dev", "sealed"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    if args.conversations < 1 or args.weather < 1:
        parser.error("--conversations and --weather are at least 1")
    try:
        with Engine.load(args.directory, device="cpu", threads=args.threads) as engine:
            figures = examine(engine, args.directory, args.split, args.conversations, args.weather)
        print(card(figures))
        if args.json is not None:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (HybridError, OSError) as error:
        parser.exit(getattr(error, "exit_code", 1), f"{parser.prog}: {error}\n")


@torch.no_grad()
def examine(engine: Engine, directory: Path, split: str, conversations: int, weather: int) -> dict[str, Any]:
    """Every figure, as a JSON object."""
    encoder = Encoder(directory)
    model = DemoModel(config_of(directory), TorchOps())
    read_back(directory, model)
    some = [
        Case.of(encoder, conversation(split, Random(f"examination {split} {i}")))
        for i in range(conversations)
    ]
    some += [Case.of(encoder, sums) for sums in _sums(split)]
    likely = [_argmax(engine, case) for case in some]
    tally = exact_matches(some, likely)
    loss, loads, reference = survey(model, some)
    same = [np.mean(ours == theirs) for ours, theirs in zip(likely, reference, strict=True)]
    positions = [len(case.encoded.tokens) for case in some]
    return {
        "split": split,
        "turns": sum(trials for _, trials in tally.kinds().values()),
        "held_out_loss": round(loss, 4),
        "argmax_agreement_with_training_model": round(float(np.average(same, weights=positions)), 5),
        "exact_match": {kind: _share(tally, kind) for kind in tally.kinds()},
        "chat_at_default_temperature": _sampled_chat(engine, some),
        "unwanted_calls": _unwanted_calls(encoder, some, likely),
        "expert_load_max_over_mean": [round(float(x.max() / x.mean()), 2) for x in loads],
        "dead_experts": int((loads == 0).sum()),
        "weather": called_weather(engine, split, weather),
        **_told(engine, split, min(conversations, 40)),
        "requests": _requests(engine, conversations),
    }


def _argmax(engine: Engine, case: Case) -> _Tokens:
    logits = engine.logits([int(token) for token in case.encoded.tokens])
    return logits.argmax(-1).numpy()


def _share(tally: Tally, kind: str) -> dict[str, Any]:
    """Mean over turns, and the worst of the wordings asked at least five times (`judged`, of `wordings`)."""
    wordings = {w: (h, n) for (k, w), (h, n) in tally.by_wording.items() if k == kind}
    hits, trials = (sum(column) for column in zip(*wordings.values(), strict=True))
    often = {w: h / n for w, (h, n) in wordings.items() if n >= 5}
    worst = min(often, key=lambda w: often[w], default=None)
    return {
        "mean": round(hits / trials, 4),
        "turns": trials,
        "wordings": len(wordings),
        "judged": len(often),
        "worst": None if worst is None else round(often[worst], 3),
        "worst_wording": worst,
    }


def _sampled_chat(engine: Engine, some: list[Case], at_most: int = 300) -> dict[str, Any]:
    """Small talk as `hybrid chat` answers it."""
    asked = [
        (case.conversation, probe.index)
        for case in some
        for probe in case.conversation.probes
        if probe.kind == "chat"
    ][:at_most]
    right = [
        _reply(engine, talk.messages[:at], talk.tools, SAMPLED) == (talk.messages[at]["content"], [])
        for talk, at in asked
    ]
    return {"turns": len(asked), "mean": round(sum(right) / max(len(right), 1), 4)}


def _sums(split: str) -> Iterator[Conversation]:
    """Every sum up to 10 + 10, each a conversation of its own."""
    for a in range(11):
        for b in range(11):
            talk = Talk(split, Random(f"sum {a} {b}"))
            small_talk.addition(talk, a, b)
            yield talk.done()


def _unwanted_calls(encoder: Encoder, some: list[Case], likely: list[_Tokens]) -> dict[str, Any]:
    """How often a call turns up in a turn that needs no tool, asks for one that is not there, or leaves out what
    the tool needs; tools being declared."""
    begin = encoder.tokenizer.special_ids["<|tool_calls_section_begin|>"]
    found = {"no tool needed": [0, 0], "undeclared": [0, 0], "near miss": [0, 0], "incomplete": [0, 0]}
    for case, tokens in zip(some, likely, strict=True):
        for probe, (first, last) in zip(case.conversation.probes, case.spans, strict=True):
            group = "no tool needed" if probe.kind in NO_CALL else probe.kind
            if case.conversation.tools and group in found:
                found[group][0] += int((tokens[first - 1 : last - 1] == begin).any())
                found[group][1] += 1
    return {
        group: {"rate": round(calls / max(turns, 1), 4), "turns": turns}
        for group, (calls, turns) in found.items()
    }


class Chats(Protocol):
    """What chats as `Engine` does."""

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, params: SamplingParams, /
    ) -> Iterable[Any]: ...


def called_weather(engine: Chats, split: str, each: int) -> dict[str, Any]:
    """The model card's tool: called rightly, and its result told, for every weather wording of the split."""
    tool = written_tools()[0]
    declared = Declared(tool, "get_weather", {"city": "city"}, CARD_TOOL)
    patterns = [p for p in tool.wordings[split] if p.slots == {"city"}]
    called: dict[str, int] = dict.fromkeys((p.line for p in patterns), 0)
    sampled, told, failures = 0, 0, []
    for pattern in patterns:
        for i in range(each):
            talk = Talk(split, Random(f"weather {pattern.line} {i}"), declared=[declared])
            city = argument(talk.words, "city")
            talk.user(spoken(talk, pattern, {"city": city.text}))
            wanted = "", [("get_weather", {"city": city.json})]
            sampled += _reply(engine, talk.messages, [CARD_TOOL], SAMPLED) == wanted
            reply = _reply(engine, talk.messages, [CARD_TOOL])
            if reply == wanted:
                called[pattern.line] += 1
            else:
                failures.append([talk.messages[-1]["content"], repr(reply)])
            talk.call([(declared, {"city": city.json})], "weather", pattern.line)
            tool_scenes.answer(talk, [(declared, {"city": city.json})], "weather")
            told += _reply(engine, talk.messages[:-1], [CARD_TOOL]) == (talk.messages[-1]["content"], [])
    trials = each * len(patterns)
    worst = min(called, key=lambda line: called[line])
    return {
        "prompts": trials,
        "called": round(sum(called.values()) / trials, 4),
        "worst": round(called[worst] / each, 3),
        "worst_wording": worst,
        "called_at_default_temperature": round(sampled / trials, 4),
        "told": round(told / trials, 4),
        "failures": failures[:10],
    }


def _reply(
    engine: Chats,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    params: SamplingParams | None = None,
) -> tuple[str, list[tuple[str, Any]]]:
    """What the model says, and its calls with parsed arguments (None: not JSON)."""
    text, names, arguments = "", dict[int, str](), dict[int, str]()
    for delta in engine.chat(messages, tools, params or GREEDY):
        text += delta.content or ""
        for piece in delta.tool_calls:
            names.setdefault(piece.index, piece.name or "")
            arguments[piece.index] = arguments.get(piece.index, "") + piece.arguments
    calls = []
    for index, name in names.items():
        try:
            calls.append((name, json.loads(arguments[index])))
        except json.JSONDecodeError:
            calls.append((name, None))
    return text, calls


def _told(engine: Engine, split: str, trials: int) -> dict[str, Any]:
    """Stories and jokes, generated: whether they are what was asked for, and one of each."""
    found: dict[str, Any] = {}
    for name, judge in (
        ("storyname", small_talk.is_story),
        ("joke", lambda text, _: text in small_talk.jokes()),
    ):
        good, sample = 0, ""
        for i in range(trials):
            talk = Talk(split, Random(f"{name} {i}"))
            small_talk.chat(talk, name)
            asked = talk.messages[-1]["content"] if name == "storyname" else ""
            sample, _ = _reply(engine, talk.messages[:-1], None)
            good += judge(sample, _hero_of(asked) if asked else "")
        found[name] = {"turns": trials, "good": good / trials, "sample": sample}
    return found


def _requests(engine: Engine, at_most: int) -> dict[str, Any]:
    """requests.json: what somebody who had seen none of the wordings would ask, one request a conversation."""
    found = json.loads((resources.files("hybrid.demo.data") / "requests.json").read_text(encoding="utf-8"))
    tools = {tool["name"]: {"type": "function", "function": tool} for tool in found.pop("tools")}
    rates = {}
    for kind, requests in found.items():
        right, requests = 0, requests[:: math.ceil(len(requests) / at_most)]
        for asked in requests:
            message = {"role": "user", "content": asked["user"]}
            text, calls = _reply(engine, [message], [tools[name] for name in asked["tools"]])
            wanted = [(name, arguments) for name, arguments in asked.get("calls", [])]
            refused = kind != "undeclared" or text == tool_scenes.REFUSAL
            right += calls == wanted and refused
        rates[kind] = {"turns": len(requests), "mean": round(right / len(requests), 4)}
    return rates


def _hero_of(story: str) -> str:
    """The hero's animal and name, from a story's own first sentence."""
    found = re.search(r"(\w+) (?:called|with the name) (.+?)(?: lived alone)?$", story.split(".")[0])
    assert found, story
    return f"{found[1]} {found[2]}"


if __name__ == "__main__":
    main()
