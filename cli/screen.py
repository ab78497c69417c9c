"""`Screen`: how a chat looks. Replies go to stdout; what is said about them is dim, errors are on stderr."""

import os
import sys
from typing import Any

from cli.painter import DIM, RESET, Painter, visible
from cli.progress import SlowBar
from hybrid.request import Delta


class Screen:
    """A `Listener` that writes to the terminal.

    Args:
        plain: no colours (also when NO_COLOR is set, stdout is no terminal, or TERM is dumb).
    """

    def __init__(self, *, plain: bool = False) -> None:
        dumb = os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))
        self.colour = sys.stdout.isatty() and not (plain or dumb)
        self._painter: Painter | None = None
        self._bar: SlowBar | None = None
        self._thinking = False

    def note(self, text: str) -> None:
        """A remark of ours."""
        self._write(f"{DIM}{visible(text)}{RESET}\n" if self.colour else f"{visible(text)}\n")

    def error(self, text: str) -> None:
        print(f"hybrid: {visible(text)}", file=sys.stderr, flush=True)

    def prefill(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = SlowBar()
        self._bar.update(f"reading the prompt, {done} of {total} tokens", done / max(total, 1))

    def show(self, delta: Delta) -> None:
        self._end_prefill()
        if delta.reasoning:
            self._think(delta.reasoning)
        if delta.content:
            self._end_thinking()
            if self._painter is None:
                self._painter = Painter(self._write, colour=self.colour)
            self._painter.push(delta.content)

    def end_reply(self) -> None:
        """After the last piece, or an error: everything back to normal, on a line of its own."""
        self._end_prefill()
        self._end_thinking()
        if self._painter is not None:
            self._painter.finish()
            self._painter = None
        self._write("\n")

    def _think(self, text: str) -> None:
        if not self._thinking:
            self._thinking = True
            self._write(DIM if self.colour else "[thinking]\n")
        self._write(visible(text))

    def _end_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self._write(f"{RESET}\n" if self.colour else "\n[answer]\n")

    def _end_prefill(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class PipeScreen:
    """A `Listener` for one answer into a pipe or file: the reply's content and nothing else, as it is."""

    def prefill(self, done: int, total: int) -> None:
        """Nobody watches."""

    def show(self, delta: Delta) -> None:
        if delta.content:
            sys.stdout.write(delta.content)
            sys.stdout.flush()


def summary(last: dict[str, Any], finish_reason: str | None) -> str:
    """The one line after a reply, from `Engine.stats()["last"]`."""
    parts = [f"{last['new_tokens']} tokens"]
    if last["tokens_per_s"]:
        parts.append(f"{last['tokens_per_s']:.1f} tokens/s")
    if last["expert_gb_per_s"]:
        parts.append(f"{last['expert_gb_per_s']:.1f} GB/s of experts")
    parts.append(f"bound by {last['bound_by']}")
    ends = {"length": "stopped at the token limit", "cancelled": "stopped"}
    if finish_reason in ends:
        parts.append(ends[finish_reason])
    return " · ".join(parts)
