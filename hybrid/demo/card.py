"""The examination's figures as the tables of the README's model card."""

from typing import Any

_KINDS = {
    "call": "single calls of other tools",
    "novel call": "... of made-up tools",
    "parallel": "two or three calls at once",
    "weather": "the weather, amid a conversation",
    "result": "a tool's result told",
    "follow-up": 'the same call for something else ("and in Rome?")',
    "incomplete": "what a call needs is left out: asked for",
    "undeclared": "no declared tool fits: refused",
    "near miss": "... but one does something near: refused",
    "without tools": "a tool's work, without any tools: refused",
    "tools": "the declared tools named",
    "chat": "small talk",
    "small talk": "... at the default temperature",
    "fact": "facts",
    "unknown": "facts that it was not taught: said so",
    "sum": "sums up to 10 + 10",
    "large sum": "larger sums, up to 50 + 50",
    "arithmetic": "differences, products, comparisons",
    "count": "counting",
    "repeat": "repeating",
    "memory": "a name or liking told earlier: remembered",
    "not told": "... not told: said so",
}
"""Kinds of turns, in the order of the card, and what they are called there."""
_UNWANTED = {
    "no tool needed": "no tool needed",
    "undeclared": "no declared tool fits",
    "near miss": "... but one does something near",
    "incomplete": "something left out",
}
_ASKED = [
    ("single", "one call"),
    ("parallel", "two calls"),
    ("undeclared", "no declared tool fits: refused"),
    ("no_tool", "no tool needed: no call"),
]


def card(figures: dict[str, Any]) -> str:
    """What `hybrid.demo.evaluate.examine` found, in Markdown."""
    weather, kinds = figures["weather"], dict(figures["exact_match"])
    kinds["small talk"] = figures["chat_at_default_temperature"]
    prompts = weather["prompts"]
    rows = [
        ("", "turns", "right", "worst wording"),
        ("---", "--:", "--:", "--:"),
        ("the model card's `get_weather`: called", prompts, weather["called"], weather["worst"]),
        ("... at the default temperature", prompts, weather["called_at_default_temperature"], None),
        ("... its result told", prompts, weather["told"], None),
        *(
            (name, kinds[kind]["turns"], kinds[kind]["mean"], kinds[kind].get("worst"))
            for kind, name in _KINDS.items()
            if kind in kinds
        ),
        *(
            (name, figures[kind]["turns"], figures[kind]["good"], None)
            for kind, name in (("storyname", "stories about whom was asked for"), ("joke", "jokes"))
        ),
    ]
    unwanted, loads = figures["unwanted_calls"], figures["expert_load_max_over_mean"]
    turns = sum(group["turns"] for group in unwanted.values())
    calls = sum(group["rate"] * group["turns"] for group in unwanted.values())
    rest = [
        ("a call where none was due", "turns", "rate"),
        ("---", "--:", "--:"),
        *((name, unwanted[group]["turns"], unwanted[group]["rate"]) for group, name in _UNWANTED.items()),
        ("in all", turns, calls / max(turns, 1)),
    ]
    strange = [
        ("requests of a stranger", "turns", "right"),
        ("---", "--:", "--:"),
        *(
            (name, figures["requests"][kind]["turns"], figures["requests"][kind]["mean"])
            for kind, name in _ASKED
        ),
    ]
    return (
        f"{_table(rows)}\n\n{_table(rest)}\n\n{_table(strange)}\n\n"
        f"Loss on these conversations: {figures['held_out_loss']:.3f}. Tokens of a layer's busiest expert over the "
        f"mean: {min(loads)} to {max(loads)}; experts never used: {figures['dead_experts']}."
    )


def _table(rows: list[tuple[Any, ...]]) -> str:
    return "\n".join(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{100 * value:.1f} %".replace(".0 %", " %")
