"""Tools, those of tools.txt among them, and their declarations in OpenAI's format.

Names, descriptions, parameter names and the order of everything vary from declaration to declaration; what a
request's slots mean is kept by the parameter's first name, its label.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from hybrid.demo.data.arguments import SCHEMAS
from hybrid.demo.data.grammar import SPLITS, Pattern, all_wordings, blocks, framed_phrase
from hybrid.demo.data.lexicon import common_words, split_of


@dataclass(frozen=True)
class Parameter:
    names: list[str]
    kind: str
    abouts: list[str]
    required: bool

    @property
    def label(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Tool:
    """What a tool may be called, takes, returns, and how people ask for it.

    `result`: keys its result may have, kind of the value, and the answer; keys empty: an action that only
    succeeds or fails. `plain`: training's most ordinary wordings, which come up more often than the others;
    `near`: by split, requests that sound like the tool's and are not.
    """

    names: list[str]
    abouts: list[str]
    parameters: list[Parameter]
    result_keys: list[str]
    result_kind: str
    answer: str
    wordings: dict[str, list[Pattern]]
    missing: list[Pattern] = field(default_factory=list)
    plain: list[Pattern] = field(default_factory=list)
    near: dict[str, list[Pattern]] = field(default_factory=dict)
    novel_root: str = ""

    @property
    def key(self) -> str:
        return self.names[0]

    @property
    def novel(self) -> bool:
        """Whether it was made up on the spot."""
        return bool(self.novel_root)

    @property
    def root(self) -> str:
        """What it is about: two tools of one root answer to the same requests."""
        return self.novel_root or self.key

    @property
    def telling(self) -> frozenset[str]:
        """The words of its root, which a request must keep to be known as its."""
        return frozenset(re.split("[_ ]", self.root))

    @property
    def open_ended(self) -> frozenset[str]:
        """Labels of the parameters that are free text."""
        return _open_ended(self.parameters)

    @property
    def required(self) -> list[Parameter]:
        return [p for p in self.parameters if p.required]


@dataclass(frozen=True)
class Declared:
    """A tool as one conversation declares it: `names` maps labels to the parameters' declared names."""

    tool: Tool
    name: str
    names: dict[str, str]
    declaration: dict[str, Any]

    def arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """Labels' values as arguments, in the order of the declaration."""
        return {self.names[label]: values[label] for label in self.names if label in values}


_OPEN_ENDED = {"message", "task", "topic", "event", "title", "dish", "item", "snippet"}
"""Kinds of free text, which nothing but quotes would set apart from the words around it."""


def _open_ended(parameters: list[Parameter]) -> frozenset[str]:
    return frozenset(p.label for p in parameters if p.kind in _OPEN_ENDED)


@cache
def written_tools() -> list[Tool]:
    """The tools of tools.txt."""
    return [_read(block) for block in blocks("tools.txt") if "tool" in block]


def _read(block: dict[str, list[str]]) -> Tool:
    parameters = []
    for heading in ("arg", "opt"):
        for line in block.get(heading, []):
            names, kind, abouts = line.split(" : ", 2)
            parameters.append(Parameter(names.split("/"), kind, abouts.split(" / "), heading == "arg"))
    keys, kind, answer = "", "", ""
    parts = block["result"][0].split(" : ")
    if len(parts) == 3:
        keys, kind, answer = parts
    else:
        kind, answer = parts[0], parts[-1]
    missing = [Pattern(part) for line in block.get("missing", []) for part in line.split(" / ")]
    return Tool(
        block["tool"][0].split("/"), block["about"][0].split(" / "), parameters,
        [k for k in keys.split("/") if k], kind, answer, all_wordings(block, of_tool=True, open_ended=_open_ended(parameters)), missing,
        [Pattern(line) for line in block.get("plain", [])],
        {split: _near_misses(block, split) for split in SPLITS},
    )  # fmt: skip


def _near_misses(block: dict[str, list[str]], split: str) -> list[Pattern]:
    """Those of a split; training's phrases also in other phrases' sentences."""
    whole, phrases = (
        [line for line in block.get(heading, []) if split_of(line) == split]
        for heading in ("near", "near_do")
    )
    framed = [framed_phrase("do", line) for line in phrases] if split == "train" else []
    return [*(Pattern(line) for line in [*whole, *phrases]), *framed]


# What people put around a name; training only, so that no end of a name is known by heart.
_NAME_HEADS = (
    "my do run the use call api home user new fast auto smart quick our x all ask go a tool main app".split()
)
_NAME_TAILS = "tool api v2 service function info data helper action for_user 2 by_name plus fn cmd job here main".split()


_UNDOING = set("cancel close delete drop end forget never not remove stop undo without".split())


@cache
def _name_ends() -> list[str]:
    return [word for word in common_words() if word not in _UNDOING]


def _renamed_freely(name: str, rng: Random) -> str:
    """A name made from one that a list has, so that it can only be read in the declaration."""
    words = name.split("_")
    if len(words) > 1 and rng.random() < 0.4:
        words.reverse()
    ends = rng.choice(["head", "tail", "both"])
    if ends != "tail":
        words = [rng.choice(_NAME_HEADS if rng.random() < 0.6 else _name_ends()), *words]
    if ends != "head":
        words = [*words, rng.choice(_NAME_TAILS if rng.random() < 0.6 else _name_ends())]
    free = "_".join(words)
    return _renamed_freely(name, rng) if free in _listed_names() else free


@cache
def _listed_names() -> frozenset[str]:
    return frozenset(name for tool in written_tools() for name in tool.names)


def declare(tool: Tool, rng: Random, *, freely: float = 0.0) -> Declared:
    """A declaration of the tool as some client might write it; `freely`: how often under a name that no list has."""
    taken = [p for p in tool.parameters if p.required or rng.random() < 0.5]
    names: dict[str, str] = {}
    for p in taken:
        free = [n for n in p.names if n not in names.values() and n != "key"]
        names[p.label] = free[0] if rng.random() < 0.4 else rng.choice(free)
    described = rng.random() < 0.8
    properties = {}
    for p in taken:
        schema = dict(SCHEMAS.get(p.kind, {"type": "string"}))
        if described:
            about = {"description": rng.choice(p.abouts)}
            schema = schema | about if rng.random() < 0.8 else about | schema
        properties[names[p.label]] = schema
    fields: dict[str, Any] = {"properties": properties}
    required = [names[p.label] for p in taken if p.required]
    fields = {"required": required, **fields} if rng.random() < 0.3 else {**fields, "required": required}
    parameters: dict[str, Any] = {"type": "object", **fields}
    if rng.random() < 0.1:
        parameters["additionalProperties"] = False
    name = tool.names[0] if rng.random() < 0.3 else rng.choice(tool.names)
    if rng.random() < freely:
        name = _renamed_freely(name, rng)
    if rng.random() < 0.08:
        first, *rest = name.split("_")
        name = first + "".join(word.capitalize() for word in rest)
    function: dict[str, Any] = {"name": name, "parameters": parameters}
    if rng.random() < 0.92:
        function = {"name": name, "description": rng.choice(tool.abouts), "parameters": parameters}
    if rng.random() < 0.04:
        function["strict"] = True
    return Declared(tool, name, names, {"type": "function", "function": function})
