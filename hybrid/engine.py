"""`Engine`: the public face. One thread owns the model; requests wait their turn in a bounded queue.

Text comes in at `prompt` and `chat` and leaves through `Step.text`; in between there are only token ids.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hybrid.chat import ChatTemplate
from hybrid.config import RuntimeConfig
from hybrid.generation import Generation
from hybrid.kv_cache import CachePool
from hybrid.reply import Reply
from hybrid.request import Delta, Request, SamplingParams, Step
from hybrid.runtime import Runtime, load_runtime
from hybrid.tokenizer import Tokenizer
from offload.errors import EngineClosed, HybridError, Overloaded, RequestError, TemplateError

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING = 64
"""Requests that may wait for their turn."""

KEPT_SEQUENCES = 4
"""Recent sequences whose KV cache is kept for the next prompt to share."""


class Ticket:
    """A submitted request. `cancel` may be called from any thread, any number of times."""

    def __init__(
        self, engine: "Engine", job: Callable[["Ticket"], None], sink: Callable[[Step], None]
    ) -> None:
        self._engine = engine
        self.job = job
        self.sink = sink
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop soon, or never start; the sink still gets its last step, with finish reason "cancelled"."""
        self.cancelled.set()
        self._engine._forget(self)

    @property
    def waiting(self) -> bool:
        """Whether its turn has not come yet."""
        with self._engine._changed:
            return self in self._engine._waiting


class Stream(Iterator[T]):
    """What one request yields, as it comes. `close` cancels the request, started or not; so does losing the
    last reference.

    Args:
        steps: where the ticket's sink puts its steps.
        parts: what to yield for each of them.
    """

    def __init__(
        self, ticket: Ticket, steps: "queue.SimpleQueue[Step]", parts: Callable[[Step], list[T]]
    ) -> None:
        self._ticket = ticket
        self._steps = steps
        self._parts = parts
        self._ready: deque[T] = deque()
        self._ended = False

    def __next__(self) -> T:
        """Raises HybridError if the request failed while running."""
        while not self._ready:
            if self._ended:
                raise StopIteration
            step = self._steps.get()
            self._ended = step.finish_reason is not None
            if step.error is not None:
                raise step.error
            self._ready.extend(self._parts(step))
        return self._ready.popleft()

    def close(self) -> None:
        """Cancel what is still to come. May be called any number of times."""
        self._ended = True
        self._ready.clear()
        self._ticket.cancel()

    def __del__(self) -> None:
        self.close()


class Engine:
    """A loaded model that answers requests one at a time, in the order they came.

    Use `Engine.load`; close it (or use it as a context manager) to stop its thread and workers.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.config = runtime.files.config
        self.tokenizer: Tokenizer = runtime.tokenizer
        self.template: ChatTemplate | None = runtime.template
        self.eos_token_ids = runtime.files.eos_token_ids
        self.context = runtime.context
        self.name = runtime.files.directory.resolve().name
        self.notice: str | None = runtime.notice
        self._caches = CachePool(KEPT_SEQUENCES, self.context)
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._totals = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "new_tokens": 0}
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._serve, name="hybrid-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        path: Path | str | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        experts: Literal["auto", "mmap"] = "auto",
        ram: int | None = None,
        vram: int | None = None,
        threads: int | None = None,
        context: int | None = None,
        *,
        level: str | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> "Engine":
        """Open a model directory and make it ready to run.

        Args:
            path: a directory in Kimi K2's published file format; None: the model that comes with hybrid.
            device: where everything but the routed experts runs; "auto" is the GPU where there is one.
            experts: where routed experts live: "mmap" runs them from the page cache.
            ram, vram: bytes; limits for expert stores that manage their own memory (none does yet).
            threads: worker threads; None: one a physical core.
            context: tokens a sequence may have; None: the model's, as far as a quarter of the free memory goes.
            level: the CPU kernels' vector instructions: "amx", "avx512", "avx2" or "portable"; None: the best there is.
            progress: called with what is being done and how much of it is done, 0 to 1.

        Raises:
            UsageError: the directory, the options or the machine cannot be used; the message says why.
        """
        options = RuntimeConfig(device, experts, ram, vram, threads, context, level)
        return cls(load_runtime(None if path is None else Path(path), options, progress or (lambda *_: None)))

    # Requests

    def submit(
        self,
        request: Request,
        sink: Callable[[Step], None],
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Ticket:
        """Queue a request. `sink` is called from the engine's thread; the last step has a finish reason.

        Args:
            on_prefill: called with (prompt tokens computed, to compute) as prefill goes on.

        Raises:
            RequestError: the prompt is empty, too long for the context, or has ids the model does not know.
            Overloaded: too many requests wait already.
            EngineClosed: the engine is closed.
        """
        self._check(request.token_ids)

        def job(ticket: Ticket) -> None:
            self._generate(request, ticket, on_prefill)

        return self._enqueue(Ticket(self, job, sink))

    def generate(self, token_ids: Sequence[int], params: SamplingParams | None = None) -> "Stream[Step]":
        """Continue a prompt; yields a step a token. Closing the iterator, or dropping it, cancels the request.

        Raises what `submit` raises, and HybridError if the request fails while running.
        """
        return self._stream(token_ids, params, lambda step: [step])

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Prompt token ids of a conversation, by the model's own chat template.

        Raises:
            TemplateError: the model has no chat template, or it refuses these messages.
        """
        if self.template is None:
            raise TemplateError(
                f"{self.name} has no chat template (a base model?): use `hybrid complete --raw`, or a directory with "
                "chat_template.jinja"
            )
        return self.template.render(messages, tools)

    def chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        params: SamplingParams | None = None,
    ) -> "Stream[Delta]":
        """Answer a conversation in OpenAI's message format; the last delta has the finish reason and usage.

        Closing the iterator, or dropping it, cancels the request. Raises what `prompt` and `generate` raise.
        """
        prompt = self.prompt(messages, tools)
        return self._stream(prompt, params, self.reply(tools or []).push)

    def _stream(
        self, token_ids: Sequence[int], params: SamplingParams | None, parts: Callable[[Step], list[T]]
    ) -> "Stream[T]":
        steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
        ticket = self.submit(Request(tuple(token_ids), params or SamplingParams()), steps.put)
        return Stream(ticket, steps, parts)

    def reply(self, tools: list[dict[str, Any]] | None) -> Reply:
        """What turns one request's steps into deltas; see `Reply`."""
        return Reply(tools, self.tokenizer.special_ids)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Teacher-forced: float32 [len(token_ids), vocab_size], row t being what follows token t."""
        ids = list(token_ids)
        self._check(ids)
        done: Future[Tensor] = Future()

        def job(_: Ticket) -> None:
            try:
                done.set_result(self._runtime.logits(ids))
            except BaseException as error:
                done.set_exception(error)

        def abandoned(_: Step) -> None:
            done.set_exception(EngineClosed("the engine was closed"))

        self._enqueue(Ticket(self, job, abandoned))
        return done.result()

    def stats(self) -> dict[str, Any]:
        """Counters since loading, and what the last request cost."""
        with self._changed:
            return {
                "model": self.name,
                "device": str(self._runtime.model.ops.device),
                "context": self.context,
                "waiting": len(self._waiting),
                "running": int(self._running is not None),
                **self._totals,
                "expert_bytes": self._runtime.experts.bytes_read,
                "tiers": {"experts": "mmap"},
                "cache": {"tokens": self._caches.tokens},
                "last": self._last,
            }

    def close(self) -> None:
        """Cancel what runs and waits, then stop the engine's thread and the workers. May be called twice."""
        with self._changed:
            self._closing = True
            running, waiting = self._running, list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        if running is not None:
            running.cancelled.set()
        for ticket in waiting:
            _deliver(ticket, Step(-1, "", finish_reason="error", error=EngineClosed("the engine was closed")))
        self._thread.join()
        self._runtime.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The engine's thread

    def _check(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
        if len(token_ids) >= self.context:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens and the context is {self.context}; shorten the prompt or "
                "load the model with a larger --context",
                param="messages",
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self.config.vocab_size:
            raise RequestError(f"token ids must be 0 to {self.config.vocab_size - 1}", param="prompt")

    def _enqueue(self, ticket: Ticket) -> Ticket:
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine was closed")
            if len(self._waiting) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} requests are waiting already; try again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _forget(self, ticket: Ticket) -> None:
        """A waiting ticket was cancelled: free its place at once."""
        with self._changed:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        _deliver(ticket, Step(-1, "", finish_reason="cancelled"))

    @torch.inference_mode()
    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                self._running = self._waiting.popleft()
            ticket = self._running
            try:
                ticket.job(ticket)
            except HybridError as error:
                if not isinstance(error, RequestError):
                    log.error("a request failed: %s", error)
                _deliver(ticket, Step(-1, "", finish_reason="error", error=error))
            except Exception as error:
                log.exception("a request failed")
                wrapped = HybridError(f"internal error: {type(error).__name__}: {error}")
                wrapped.__cause__ = error
                _deliver(ticket, Step(-1, "", finish_reason="error", error=wrapped))
            finally:
                with self._changed:
                    self._running = None

    def _generate(
        self, request: Request, ticket: Ticket, on_prefill: Callable[[int, int], None] | None
    ) -> None:
        runtime = self._runtime
        generation = Generation(
            request,
            runtime.model,
            self.tokenizer,
            self._caches,
            eos_token_ids=self.eos_token_ids,
            context=self.context,
            max_new_tokens=runtime.files.max_new_tokens,
            is_cancelled=ticket.cancelled.is_set,
            on_prefill=on_prefill,
        )
        meter = runtime.meter()

        def emit(step: Step) -> None:
            if step.finish_reason is not None:
                last = meter.summary(generation.measured)
                with self._changed:
                    self._last = last
                    self._totals["requests"] += 1
                    for key in ("prompt_tokens", "cached_tokens", "new_tokens"):
                        self._totals[key] += last[key]
            _deliver(ticket, step)

        generation.run(emit)


def _deliver(ticket: Ticket, step: Step) -> None:
    """Hand a step over; a sink that fails has nobody behind it any more."""
    try:
        ticket.sink(step)
    except Exception:
        log.exception("the receiver of a reply failed; its request is cancelled")
        ticket.cancelled.set()
