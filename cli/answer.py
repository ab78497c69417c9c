"""One answer from the engine, as it streams: shown piece by piece, stopped by Ctrl-C, kept as a message."""

import queue
import signal
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from hybrid.request import Delta, FinishReason, Request, SamplingParams, Step

if TYPE_CHECKING:
    from hybrid.engine import Engine, Ticket

TICK_S = 0.5
"""How often progress is shown while nothing else happens."""


class Listener(Protocol):
    """Where an answer is shown."""

    def prefill(self, done: int, total: int) -> None:
        """Prompt tokens computed so far; called now and then until the first token."""

    def show(self, delta: Delta) -> None:
        """The next piece of the answer."""


@dataclass
class Answer:
    """What the model said, as far as it came."""

    content: str = ""
    reasoning: str = ""
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.content += delta.content or ""
        self.reasoning += delta.reasoning or ""
        self.finish_reason = delta.finish_reason or self.finish_reason

    def message(self) -> dict[str, Any] | None:
        """The assistant's message for the conversation; None if nothing was said."""
        if not self.content:
            return None
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message


def ask(
    engine: "Engine", messages: list[dict[str, Any]], params: SamplingParams, listener: Listener
) -> Answer:
    """Answer `messages`. The first Ctrl-C ends the reply where it is, a second one is KeyboardInterrupt.

    Call it on the main thread, which is where signals arrive.

    Raises:
        HybridError: the request was refused, or failed while running.
    """
    steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
    prefilled = (0, 0)

    def on_prefill(done: int, total: int) -> None:
        nonlocal prefilled
        prefilled = (done, total)

    with _Interruption() as interruption:
        token_ids = engine.prompt(messages)
        prefilled = (0, len(token_ids))
        ticket = engine.submit(Request(tuple(token_ids), params), steps.put, on_prefill=on_prefill)
        interruption.cancels(ticket)
        reply, answer, started = engine.reply([]), Answer(), False  # no tools are declared
        try:
            while answer.finish_reason is None:
                try:
                    step = steps.get(timeout=None if started else TICK_S)
                except queue.Empty:
                    listener.prefill(*prefilled)
                    continue
                started = True
                if step.error is not None:
                    raise step.error
                for delta in reply.push(step):
                    answer.add(delta)
                    listener.show(delta)
        finally:
            ticket.cancel()
    return answer


class _Interruption:
    """Within, the first SIGINT cancels the ticket, even one still to come; the next is KeyboardInterrupt."""

    def __init__(self) -> None:
        self._wanted = False
        self._ticket: Ticket | None = None

    def cancels(self, ticket: "Ticket") -> None:
        self._ticket = ticket
        if self._wanted:
            ticket.cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._wanted:
            signal.default_int_handler(number, frame)
        self._wanted = True
        if self._ticket is not None:
            self._ticket.cancel()

    def __enter__(self) -> "_Interruption":
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
