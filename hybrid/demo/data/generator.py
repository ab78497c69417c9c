"""Conversations: what is talked about, and how much of each."""

from random import Random

from hybrid.demo.data import small_talk, tool_scenes
from hybrid.demo.data.talk import Conversation, Talk

_INTENT_WEIGHTS = {"dontknow": 4.0, "story": 1.5, "storyanimal": 1.5, "storyname": 1.5, "whoareyou": 2.5, "tellname": 2.0,
                   "askname": 1.0, "hello": 2.0, "howareyou": 1.5, "whatcanyou": 1.5,
                   "whichtools": 3.0}  # fmt: skip


def conversation(split: str, rng: Random) -> Conversation:
    """One conversation in the split's own wordings, names and numbers."""
    talk = Talk(split, rng)
    if talk.chance(0.35):
        talk.system()
    if talk.chance(0.68):
        _with_tools(talk)
    else:
        for _ in range(rng.choice([1, 2, 3, 4, 5, 6, 8])):
            _small_talk(talk)
        if talk.chance(0.12):
            tool_scenes.undeclared(talk)
            _small_talk(talk)
    return talk.done()


def _small_talk(talk: Talk) -> None:
    roll = talk.rng.random()
    declared = {d.tool.key for d in talk.declared}
    knowing = bool(declared & tool_scenes.KNOWING)
    if talk.facts and talk.chance(0.25):
        small_talk.chat(talk, f"ask{talk.rng.choice(list(talk.facts))}")
    elif roll < 0.47:
        barred = small_talk.ANSWERS if small_talk.expects_answer(talk) else frozenset()
        if knowing:
            barred |= {"dontknow"}
        names = [name for name in small_talk.intents() if name not in barred]
        weights = [_INTENT_WEIGHTS.get(name, 1.0) for name in names]
        small_talk.chat(talk, talk.rng.choices(names, weights)[0])
    elif roll < 0.61:
        small_talk.fact(talk, heard=knowing)
    else:
        small_talk.numbers(talk, reckoning=not declared & tool_scenes.RECKONING)


_TOOLS = [1, 1, 1, 1, 2, 2, 3, 4]
_SCENES = (0.37, 0.58, 0.76, 0.8)
"""Turns with tools up to here are single calls, several calls at once, what no tool does, and what lacks an
argument; the rest is small talk."""
_TRAINING_TOOLS = [1, 1, 1, 2, 2, 2, 3, 4]
_TRAINING_SCENES = (0.29, 0.56, 0.78, 0.82)
"""More of what is learnt last: which tool it is, whether it is one, and what a second call holds."""


def _with_tools(talk: Talk) -> None:
    rng, training = talk.rng, talk.split == "train"
    called, called_several, refused, lacking = _TRAINING_SCENES if training else _SCENES
    count = rng.choice(_TRAINING_TOOLS if training else _TOOLS)
    tool_scenes.declare_some(talk, count, weather=talk.chance(0.3))
    turns = rng.choice([3, 4, 5, 6, 7, 8])
    for turn in range(turns):
        last = turn == turns - 1
        roll = rng.random()
        if roll < called:
            tool_scenes.single(talk, rng.choice(talk.declared), answered=not last or talk.chance(0.8))
        elif roll < called_several:
            tool_scenes.parallel(talk, answered=not last or talk.chance(0.7))
        elif roll < refused:
            tool_scenes.undeclared(talk)
        elif roll < lacking:
            able = [d for d in talk.declared if tool_scenes.can_be_incomplete(d)]
            if able:
                tool_scenes.incomplete(talk, rng.choice(able))
        else:
            _small_talk(talk)
    if not talk.probes:
        _small_talk(talk)
