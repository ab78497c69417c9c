"""Patterns of text, and the data files written in them.

`(a|b|)` is one of the alternatives, `{name}` a slot for a value. A pattern with its alternatives chosen and its
slots still open is what the splits call a wording.
"""

import re
from copy import copy
from functools import cache
from importlib import resources
from random import Random
from typing import Any

SPLITS = ("train", "dev", "sealed")
_FRAMES = {"do": ["do"], "want": ["want"], "thing": ["want", "ask"]}
"""Kinds of phrases, and the headings of frames.txt whose sentences they go into."""

_CLAUSE = re.compile(r"\(?(how|what|which|if|whether|whom?|where|why|when|regarding|as for)\b")
"""Begins a phrase that one can ask about but not want: "how cold it is"."""

_TOKEN = re.compile(r"[(|)]|\{\}|(?:(?!\{\})[^(|)])+")
SLOT = re.compile(r"\{([a-z_.*]+)\}")

_Tree = list[list[Any]]  # alternatives, each a sequence of str and nested _Tree
_HOLE: _Tree = [[]]
"""Stands in a pattern where "{}" does: for the phrase that is said within it."""


class Pattern:
    """One line of a data file."""

    def __init__(self, line: str) -> None:
        self.line = line
        tokens = _TOKEN.findall(line)
        self._tree, rest = _parse(tokens, 0)
        if rest != len(tokens):
            raise ValueError(f"unbalanced parentheses in {line!r}")
        self.slots = frozenset(SLOT.findall(line))
        self._phrase = _HOLE
        self._count = _count(self._tree)  # asked for at every choice
        self._words: dict[str, str] = {}

    def within(self, frames: "Pattern") -> "Pattern":
        """The same line as a phrase of longer sentences, `frames`, each of which has one "{}" for it."""
        other = copy(self)
        other._tree, other._phrase = frames._tree, self._tree
        other._count = frames._count * self._count
        return other

    def saying(self, words: dict[str, str]) -> "Pattern":
        """The same wording with `words` in the place of others ("NOUN", "ACT")."""
        other = copy(self)
        other._words = words
        return other

    def sample(self, rng: Random) -> str:
        """The text with alternatives chosen, slots still open."""
        text = _choose(self._tree, rng, self._phrase)
        for name, word in self._words.items():
            text = text.replace(name, word)
        return tidy(text)

    def unsaid(self, text: str) -> str:
        """A text of this wording with the words it was given taken out again."""
        for name, word in self._words.items():
            text = re.sub(rf"\b{re.escape(word)}\b", name, text)
        return text

    def count(self) -> int:
        """How many choices of alternatives there are."""
        return self._count


def _parse(tokens: list[str], at: int) -> tuple[_Tree, int]:
    tree: _Tree = [[]]
    while at < len(tokens) and tokens[at] != ")":
        if tokens[at] == "(":
            inner, at = _parse(tokens, at + 1)
            tree[-1].append(inner)
        elif tokens[at] == "|":
            tree.append([])
        else:
            tree[-1].append(_HOLE if tokens[at] == "{}" else tokens[at])
        at += 1
    return tree, at


def _choose(tree: _Tree, rng: Random, phrase: _Tree) -> str:
    parts = tree[0] if len(tree) == 1 else tree[int(rng.random() * len(tree))]
    return "".join(
        part if isinstance(part, str) else _choose(phrase if part is _HOLE else part, rng, phrase)
        for part in parts
    )


def _count(tree: _Tree) -> int:
    total = 0
    for parts in tree:
        ways = 1
        for part in parts:
            ways *= 1 if isinstance(part, str) else _count(part)
        total += ways
    return total


def tidy(text: str) -> str:
    """Without the gaps that empty alternatives leave."""
    return re.sub(r" ([?.,!:])", r"\1", re.sub(r" +", " ", text)).strip()


def plainly(text: str) -> str:
    """A wording as two are compared: without case and punctuation, which people leave out."""
    return re.sub(r"[?!.,:]", "", text.lower()).strip()


_SMALL_WORDS = """a an the please can could would will do does did you i me my we us it its it's is are was be been there
here what what's which how how's that this tell show give get let say know see want need wish like for of in on at to
about with now today just so and also maybe kindly have has got any some right really quickly look check find out""".split()
_SMALL = frozenset(_SMALL_WORDS)


def loosen(text: str, rng: Random) -> str:
    """A wording with its slots still open, said carelessly: small words left out, added or changed and, if it
    has one slot at most, its halves swapped. What it asks for is then told by its other words alone, which is
    what a reader of new wordings has to go by."""
    words = text.split()
    several = len(SLOT.findall(text)) > 1
    kept: list[str] = []
    for i, word in enumerate(words):
        held = several and i + 1 < len(words) and "{" in words[i + 1]  # "from {a} to {b}"
        roll = rng.random()
        if word.lower() in _SMALL and not held and roll < 0.4:
            if roll < 0.12:
                kept.append(rng.choice(_SMALL_WORDS))
            continue
        kept.append(word)
        if roll > 0.9:
            kept.append(rng.choice(_SMALL_WORDS))
    if not several and len(kept) > 2 and rng.random() < 0.35:
        cut = rng.randrange(1, len(kept))
        kept = kept[cut:] + kept[:cut]
    return tidy(" ".join(kept))


_VERBS = frozenset(
    """get give show tell find look check see know want need wish fetch bring take make put let go have use ask try
do pull dig work""".split()
)
"""Verbs that say nothing of what a tool does, as any tool may be asked for with them."""
_OTHER_VERBS = """hunt seek obtain grab gather collect acquire draw hand pass offer supply deliver present reveal discover uncover
locate determine verify confirm examine consult scan browse explore trace arrange manage handle perform execute complete
finish process prepare produce generate provide submit place lay drop attach include join push press toss carry lift drag
slide shape craft build form establish initiate begin trigger spin knock catch snatch gain win earn receive expect
demand request require beg crave desire fancy hope long suggest propose attempt aim plan intend decide choose select
organise figure sniff spot pick nail crack settle secure procure render throw feed pop stick slip shove hit tap
steer guide serve treat favour grant lend spare yield""".split()


def reword(text: str, rng: Random, telling: frozenset[str]) -> str:
    """A wording with its slots still open, one of its plain verbs, but none of the words `telling`, replaced by another
    or by a word that is none. A reader has to go by the other words then, as where a verb was never met."""
    words = text.split()
    plain = [i for i, word in enumerate(words) if word in _VERBS and word not in telling]
    if not plain:
        return text
    word = rng.choice(_OTHER_VERBS)
    if rng.random() < 0.3:
        word = word[: rng.randint(1, 3)] + rng.choice(_OTHER_VERBS)[-rng.randint(2, 3) :]
    words[rng.choice(plain)] = word
    return " ".join(words)


_PLACED = re.compile(
    r"""(?P<before> (?:in|for|at|of|over|around|to|on|about|with|named|called|from|by|saying))?:? ?(?P<slot>"?\{[a-z_]+\}"?)(?P<after>[^?.!,:;]*)[?.!]?$"""
)
"""The one slot of a wording, in its last phrase, and the little word before it that goes when it goes elsewhere."""
_BEHIND_SLOT = re.compile(
    r"'s\b| (?:minutes?|percent|dice|of|is|are|has|have|costs?|means?|stands|show|say)\b"
)
_PLAIN = "{v}: {h}|{v}, {h}|{v} - {h}|{v}. {h}|{v}; {h}".split("|")
_SPOKEN = """for {v}: {h}|about {v}: {h}|it is about {v}. {h}|this is for {v}, {h}|{v} is the one: {h}|take {v}: {h}
i have {v} here. {h}|you know {v}? {h}|with {v}, {h}|as for {v}, {h}|{v} again: {h}|{v} is what i mean. {h}
i think of {v}. {h}|{v}, please: {h}|next, {v}: {h}|there is {v}. {h}""".replace("\n", "|").split("|")
_BEHIND = """{h}: {v}|{h}, {v}|{h} - {v}|{h}, namely {v}|{h}. it is {v}|{h}, i mean {v}|{h}, that is, {v}|{h}; {v}
{h}. i am speaking of {v}|{h}. the one is {v}""".replace("\n", "|").split("|")


def move_slot(text: str, rng: Random, *, free_text: bool = False) -> str:
    """A wording with one slot, said so that the slot stands apart, mostly in front ("the weather in {city}" ->
    "{city}: the weather"); behind only where it already was. Wordings that would not bear it stay as they are.

    `free_text`: the slot holds words as any others, which only punctuation sets apart.
    """
    found = _PLACED.search(text)
    if len(SLOT.findall(text)) != 1 or not found or _BEHIND_SLOT.match(found["after"]):
        return text
    head = text[: found.start()]
    if not found["before"] and (found["after"].strip() or len(head.split()) < 3):
        return text  # the object of a verb: "play {song} now"
    head = tidy(head + found["after"])
    if not found["after"].strip() and rng.random() < 0.35:
        return rng.choice(_BEHIND[:1] if free_text else _BEHIND).format(h=head.rstrip(":, "), v=found["slot"])
    head += text[-1] if text[-1] == "?" else ""
    return rng.choice(_PLAIN if free_text else _PLAIN + _SPOKEN).format(
        h=head.lstrip(",:;-. "), v=found["slot"]
    )


def with_articles(text: str) -> str:
    """With "an" for "a" where a vowel follows."""
    return re.sub(r"\b([Aa]) (?=[aeio]|u(?!ni|s[aei]))", r"\1n ", text)


def fill(text: str, values: dict[str, str]) -> str:
    """Slots replaced by their values."""
    return SLOT.sub(lambda found: values[found[1]], text)


def slots_of(text: str) -> list[str]:
    """The slots of a pattern or wording, in order."""
    return SLOT.findall(text)


def last_slot(text: str) -> str:
    """The slot that a pattern or wording ends in; "" if it ends in something else."""
    return slots_of(text)[-1] if text.endswith("}") else ""


@cache
def blocks(name: str) -> list[dict[str, list[str]]]:
    """A data file's blocks (parted by blank lines): heading -> lines below it.

    A line `@heading rest` opens or reopens a heading, with `rest`, if any, as a line of it.
    """
    text = (resources.files(__package__) / "text" / name).read_text(encoding="utf-8")
    found = []
    for part in re.split(r"\n\s*\n", text):
        block: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in part.splitlines():
            if line.startswith("@"):
                heading, _, rest = line[1:].partition(" ")
                lines = block.setdefault(heading, [])
                lines += [rest] if rest else []
            elif line and not line.startswith("#"):
                lines.append(line)
        if block:
            found.append(block)
    return found


def by_split(block: dict[str, list[str]]) -> dict[str, list[Pattern]]:
    """The block's wordings."""
    return {split: [Pattern(line) for line in block.get(split, [])] for split in SPLITS}


def all_wordings(
    block: dict[str, list[str]], *, of_tool: bool = False, open_ended: frozenset[str] = frozenset()
) -> dict[str, list[Pattern]]:
    """The block's wordings; those of training also in the sentences that frames.txt has for its phrases.

    `open_ended`: slots for free text. A sentence that goes on after one leaves unclear where it ends.
    """
    found = by_split(block)
    for kind, headings in _FRAMES.items():
        taken = [*headings, *(f"{heading}_tool" for heading in headings if of_tool)]
        for phrase in block.get(kind, []):
            fitting = [h for h in taken if h != "want" or not _CLAUSE.match(phrase)]
            frames = _frames(*fitting, whole=last_slot(phrase) in open_ended)
            found["train"].append(Pattern(phrase).within(frames))
    return found


def framed_phrase(kind: str, phrase: str) -> Pattern:
    """A phrase of a kind in the sentences that frames.txt has for it."""
    return Pattern(phrase).within(_frames(*_FRAMES[kind], whole=False))


@cache
def _frames(*headings: str, whole: bool) -> Pattern:
    """The sentences under these headings, "{}" for the phrase; `whole`: only those that end with it."""
    lines = [line for block in blocks("frames.txt") for h in headings for line in block.get(h, [])]
    lines = [line.replace("{do}", "{}").replace("{thing}", "{}") for line in lines]
    return Pattern("|".join(line for line in lines if not whole or line.endswith("{}")))
