"""Arguments of tools: a value of a kind as it stands in a sentence, together with what the argument must hold."""

from typing import Any, NamedTuple

from hybrid.demo.data.lexicon import NUMBER_WORDS
from hybrid.demo.data.vocabulary import Vocabulary

SIZES, UNITS = ["small", "medium", "large"], ["celsius", "fahrenheit"]


class Value(NamedTuple):
    """`text` as written in a sentence, `json` as an argument."""

    text: str
    json: Any


def argument(words: Vocabulary, kind: str) -> Value:
    """A value of a kind that a tool's parameter can have (`_KINDS`), or of a plain string kind."""
    special = _KINDS.get(kind)
    if special is not None:
        value: Value = special(words)
        return value
    text = words.text(kind)
    return Value(text, text)


def _count_of(words: Vocabulary) -> Value:
    n = words.number(1, words.rng.choice([12, 12, 99]))
    return Value(NUMBER_WORDS[n] if 1 < n < len(NUMBER_WORDS) and words.rng.random() < 0.15 else str(n), n)


def _percent(words: Vocabulary) -> Value:
    n = words.number(0, 100)
    return Value(str(n), n)


def _decimal(words: Vocabulary, low: int, high: int) -> Value:
    n = words.number(low, high)
    if words.rng.random() < 0.7:
        return Value(str(n), n)
    text = f"{n}.{words.rng.randint(1, 9)}"
    return Value(text, float(text))


def _closed(options: list[str]) -> Any:
    def draw(words: Vocabulary) -> Value:
        option = words.rng.choice(options)
        return Value(option.capitalize() if options is UNITS and words.rng.random() < 0.5 else option, option)

    return draw


def _on_off(words: Vocabulary) -> Value:
    on = words.rng.random() < 0.5
    return Value("on" if on else "off", on)


_KINDS: dict[str, Any] = {
    "count": _count_of,
    "percent": _percent,
    "amount": lambda words: _decimal(words, 1, words.rng.choice([20, 999])),
    "degrees": lambda words: _decimal(words, 5, 30),
    "onoff": _on_off,
    "unit": _closed(UNITS),
    "size": _closed(SIZES),
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "count": {"type": "integer"},
    "percent": {"type": "integer"},
    "amount": {"type": "number"},
    "degrees": {"type": "number"},
    "onoff": {"type": "boolean"},
    "unit": {"type": "string", "enum": UNITS},
    "size": {"type": "string", "enum": SIZES},
}
"""JSON schema of a kind's values; kinds not named here are plain strings."""
