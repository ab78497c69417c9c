"""`ScriptedEngine`: an engine whose replies are written in the test, for the screen's and the protocols' logic.

What an engine really says is tested in tests/integration, with a real one.
"""

import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from hybrid.messages import normalise
from hybrid.reply import Reply
from hybrid.request import Request, Step, Usage
from hybrid.tool_parser import ALL_MARKERS
from offload.errors import HybridError

SPECIAL_IDS = {marker: 1000 + i for i, marker in enumerate(ALL_MARKERS)}
_MARKER = re.compile("(" + "|".join(map(re.escape, ALL_MARKERS)) + ")")


def said(*texts: str, reason: Any = "stop") -> list[Step]:
    """Steps that say `texts` and end; a marker is a step of its own, with its token."""
    pieces = [piece for text in texts for piece in _MARKER.split(text) if piece]
    last = Step(-1, "", finish_reason=reason, usage=Usage(3, len(pieces)))
    return [*(Step(SPECIAL_IDS.get(piece, 10), piece) for piece in pieces), last]


class ScriptedTicket:
    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.waiting = False

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """Answers each request with the next script: steps, and events that hold it up until set or cancelled.

    A script that is an exception is raised by `submit`.
    """

    name = "scripted"
    context = 1000
    notice = None
    template = object()

    def __init__(self, *scripts: Iterable[Step | threading.Event] | Exception) -> None:
        self.scripts = list(scripts)
        self.prompts: list[tuple[list[dict[str, Any]], Any]] = []
        self.requests: list[Request] = []
        self.tickets: list[ScriptedTicket] = []

    def prompt(self, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
        self.prompts.append((normalise(messages), tools))
        return [1] * sum(len(str(message["content"])) + 1 for message in messages)

    @staticmethod
    def reply(tools: Any) -> Reply:
        return Reply(tools, SPECIAL_IDS)

    def submit(
        self,
        request: Request,
        sink: Callable[[Step], None],
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> ScriptedTicket:
        script = self.scripts.pop(0)
        if isinstance(script, Exception):
            raise script
        self.requests.append(request)
        ticket = ScriptedTicket()
        self.tickets.append(ticket)
        threading.Thread(target=self._play, args=(script, sink, ticket), daemon=True).start()
        return ticket

    @staticmethod
    def _play(
        script: Iterable[Step | threading.Event], sink: Callable[[Step], None], ticket: ScriptedTicket
    ) -> None:
        for item in script:
            while isinstance(item, threading.Event) and not item.wait(0.01):
                if ticket.cancelled.is_set():
                    break
            if ticket.cancelled.is_set():
                sink(Step(-1, "", finish_reason="cancelled", usage=Usage(3, 0)))
                return
            if isinstance(item, Step):
                sink(item)

    def stats(self) -> dict[str, Any]:
        last = {"new_tokens": 7, "tokens_per_s": 12.34, "expert_gb_per_s": 5.67, "bound_by": "experts"}
        return {"model": self.name, "last": last}


def failed(message: str) -> list[Step]:
    """One word, then an error while running."""
    return [Step(10, "Well"), Step(-1, "", finish_reason="error", error=HybridError(message))]
