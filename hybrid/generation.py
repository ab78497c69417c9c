"""One request's life in the engine: prefill its prompt, then choose a token at a time until it ends.

Knows the model, the sampler and the text that stops a reply; knows nothing of queues, threads or chat.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hybrid.kv_cache import CachePool, LatentCache
from hybrid.model import Model
from hybrid.request import FinishReason, Request, Step, Usage
from hybrid.sampling import Sampler
from hybrid.tokenizer import Tokenizer

PREFILL_CHUNK = 2048
"""Prompt tokens computed at a time; chunks end at multiples of this, whatever the load."""


class Cancelled(Exception):
    """Raised inside a forward pass to abandon it."""


class StopText:
    """Withholds text that may be the start of a stop string, and ends at the first one found."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """-> (text that is now certain, whether a stop string was reached)."""
        if not self.stops:
            return text, False
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            certain, self.held = self.held[: min(found)], ""
            return certain, True
        keep = max(_overlap(self.held, stop) for stop in self.stops)
        cut = len(self.held) - keep
        certain, self.held = self.held[:cut], self.held[cut:]
        return certain, False

    def push_control(self, text: str) -> tuple[str, bool]:
        """`push` for a control token's text, which is all or nothing: a stop string inside ends the reply before
        it, none reaches across its edges. So readers of steps can tell the token from text that spells it."""
        before = self.finish()
        if any(stop in text for stop in self.stops):
            return before, True
        return before + text, False

    def finish(self) -> str:
        certain, self.held = self.held, ""
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True)
class Measured:
    """What one request cost. Times in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    parts: dict[str, float] = field(default_factory=dict)


class Generation:
    """Runs one request on the model; `run` calls `emit` for every step, the last with a finish reason."""

    def __init__(
        self,
        request: Request,
        model: Model,
        tokenizer: Tokenizer,
        caches: CachePool,
        *,
        eos_token_ids: frozenset[int],
        context: int,
        max_new_tokens: int | None,
        is_cancelled: Callable[[], bool],
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        self.request = request
        self.model = model
        self.caches = caches
        self.eos_token_ids = eos_token_ids
        self.is_cancelled = is_cancelled
        self.on_prefill = on_prefill
        self.context = context
        room = context - len(request.token_ids)
        self.max_tokens = min(request.params.max_tokens or max_new_tokens or room, room)
        self.tokenizer = tokenizer
        self.detokenizer = tokenizer.detokenizer()
        self.control_ids = frozenset(tokenizer.special_ids.values())
        self.vocab_size = tokenizer.vocab_size  # a padded head has rows that stand for no token
        self.sampler = Sampler(request.params)
        self.stop = StopText(request.params.stop)
        self.measured = Measured(prompt_tokens=len(request.token_ids))

    def run(self, emit: Callable[[Step], None]) -> None:
        prompt = list(self.request.token_ids)
        cache = self.caches.take(prompt) or self.model.new_cache(self.context)
        self.measured.cached_tokens = cache.length
        self.measured.parts = self.model.watch.start()
        try:
            begin = time.perf_counter()
            try:
                hidden = self._prefill(prompt, cache)
            finally:
                self.measured.prefill_s = time.perf_counter() - begin
            self._decode(hidden, cache, emit)
        except Cancelled:
            emit(self._last(-1, "", None, "cancelled"))
        finally:
            self.caches.keep(cache)

    def _check(self) -> None:
        if self.is_cancelled():
            raise Cancelled

    def _prefill(self, prompt: list[int], cache: LatentCache) -> torch.Tensor:
        """-> the last prompt token's hidden state, [1, hidden]."""
        while True:
            chunk = prompt[cache.length : (cache.length // PREFILL_CHUNK + 1) * PREFILL_CHUNK]
            hidden = self.model.prefill(chunk, cache, between_layers=self._check)
            if self.on_prefill is not None:
                self.on_prefill(
                    cache.length - self.measured.cached_tokens, len(prompt) - self.measured.cached_tokens
                )
            if cache.length == len(prompt):
                return hidden[-1:]

    def _decode(self, hidden: torch.Tensor, cache: LatentCache, emit: Callable[[Step], None]) -> None:
        begin = time.perf_counter()
        while True:
            logits = self.model.logits(hidden, decode=True)[0].numpy()
            token_id, logprob = self.sampler.choose(logits[: self.vocab_size])
            self.measured.new_tokens += 1
            step = self._step(token_id, logprob)
            if step.finish_reason is not None:
                break
            emit(step)
            hidden = self.model.decode([token_id], [cache], between_layers=self._check)
            self.measured.decode_steps += 1
            self.measured.decode_s = time.perf_counter() - begin
        emit(step)

    def _step(self, token_id: int, logprob: float | None) -> Step:
        if token_id in self.eos_token_ids and not self.request.params.ignore_eos:
            return self._last(token_id, "", logprob, "stop")
        text, stopped = self._text(token_id)
        if stopped:
            return self._ended(token_id, text, logprob, "stop")
        if self.measured.new_tokens >= self.max_tokens:
            return self._last(token_id, text, logprob, "length")
        return Step(token_id, text, logprob)

    def _text(self, token_id: int) -> tuple[str, bool]:
        """-> (text that is certain with this token, whether a stop string was reached).

        A control token's own text, if it has any, comes with its token and last.
        """
        text = self.detokenizer.push(token_id)
        if not text or token_id not in self.control_ids:
            return self.stop.push(text)
        control = self.tokenizer.decode([token_id])
        before, stopped = self.stop.push(text.removesuffix(control))  # bytes of a character left unfinished
        if stopped:
            return before, True
        certain, stopped = self.stop.push_control(control)
        return before + certain, stopped

    def _last(self, token_id: int, text: str, logprob: float | None, reason: FinishReason) -> Step:
        """The closing step, with the text that was withheld."""
        rest, stopped = self.stop.push(self.detokenizer.finish())
        text += rest
        if stopped:
            return self._ended(token_id, text, logprob, "stop")
        return self._ended(token_id, text + self.stop.finish(), logprob, reason)

    def _ended(self, token_id: int, text: str, logprob: float | None, reason: FinishReason) -> Step:
        m = self.measured
        return Step(token_id, text, logprob, reason, Usage(m.prompt_tokens, m.new_tokens, m.cached_tokens))
