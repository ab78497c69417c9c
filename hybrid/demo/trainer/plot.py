"""A run's history as one SVG picture, written without a plotting library."""

import math
from collections.abc import Sequence
from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 760, 420, 70, 40, 70, 50
_STYLE = "font-family='sans-serif' font-size='12' fill='#333'"


def draw(history: Sequence[dict[str, float]], file: Path) -> None:
    """Loss on a logarithmic axis and, where measured, exact match on the development split, over tokens."""
    if len(history) < 2:
        return
    span = max(entry["tokens"] for entry in history)
    losses = [entry["loss"] for entry in history]
    low, high = math.log10(max(min(losses), 1e-4)), math.log10(max(losses))
    high = max(high, low + 0.1)

    def x(tokens: float) -> float:
        return _LEFT + tokens / span * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    def of_loss(loss: float) -> float:
        return y((math.log10(max(loss, 1e-4)) - low) / (high - low))

    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}'>"]
    parts.append("<rect width='100%' height='100%' fill='#fff'/>")
    for share in (0, 0.25, 0.5, 0.75, 1):
        across, down, right = x(share * span), y(share), _WIDTH - _RIGHT
        parts.append(f"<line x1='{_LEFT}' x2='{right}' y1='{down:.1f}' y2='{down:.1f}' stroke='#ddd'/>")
        parts.append(_text(_LEFT - 8, down + 4, f"{10 ** (low + share * (high - low)):.3g}", "end"))
        parts.append(_text(right + 8, down + 4, f"{share:.0%}", "start"))
        parts.append(_text(across, _HEIGHT - _BOTTOM + 18, f"{share * span / 1e6:.3g}M", "middle"))
    parts.append(_line([(x(e["tokens"]), of_loss(e["loss"])) for e in history], "#1f6fb4"))
    parts.append(_line([(x(e["tokens"]), y(e["exact"])) for e in history if "exact" in e], "#c8553d"))
    parts.append(_text(_LEFT, 22, "blue: training loss; red: development turns exactly right", "start"))
    parts.append("</svg>")
    file.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_STYLE}>{text}</text>"


def _line(points: list[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6'/>"
