"""The engine on a real (small, random) checkpoint: reproducibility, prefix reuse, queueing, failure."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid import Engine, SamplingParams
from hybrid import engine as engine_module
from hybrid.engine import Stream
from hybrid.generation import Generation
from hybrid.kv_cache import CachePool
from hybrid.request import Request, Step
from hybrid.synth import synthesize
from offload.errors import CheckpointError, EngineClosed, HybridError, Overloaded, RequestError, UsageError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine.load(tiny_model, device="cpu") as loaded:
        yield loaded


class Sink:
    """Collects one request's steps; `first` and `last` are set when those arrive."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.first, self.last = threading.Event(), threading.Event()

    def __call__(self, step: Step) -> None:
        self.steps.append(step)
        self.first.set()
        if step.finish_reason is not None:
            self.last.set()

    def wait(self) -> Step:
        assert self.last.wait(60)
        return self.steps[-1]


def long_request(engine: Engine) -> Request:
    return Request((5, 6, 7), SamplingParams(max_tokens=engine.context, ignore_eos=True))


def ids(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [step.token_id for step in engine.generate(prompt, params)]


def test_a_greedy_text_is_reproducible_whatever_came_before(engine: Engine) -> None:
    first = ids(engine, [1, 2, 3])
    ids(engine, [9, 8, 7, 6])
    assert ids(engine, [1, 2, 3]) == first


def test_decode_rows_have_the_same_bits_in_any_batch(engine: Engine) -> None:
    model = engine._runtime.model
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], *([i, i + 1] for i in range(20, 30))]

    def run(chosen: list[list[int]]) -> list[torch.Tensor]:
        with torch.inference_mode():
            caches = []
            for prompt in chosen:
                caches.append(model.new_cache())
                model.prefill(prompt, caches[-1])
            rows = [model.logits(model.decode([7] * len(chosen), caches), decode=True) for _ in range(3)]
        return list(torch.stack(rows, dim=1))

    together = run(prompts)
    for i, prompt in enumerate(prompts):
        assert torch.equal(run([prompt])[0], together[i])


def test_decode_has_the_same_bits_on_one_thread(engine: Engine, tiny_model: Path) -> None:
    prompt = list(range(40, 60))
    with Engine.load(tiny_model, device="cpu", threads=1) as single:
        assert torch.equal(single.logits(prompt), engine.logits(prompt))
        assert ids(single, prompt) == ids(engine, prompt)


def test_the_next_turn_computes_only_what_is_new(engine: Engine) -> None:
    prompt = list(range(100, 160))
    reply = ids(engine, prompt)
    follow_up = [*prompt, *reply, 3, 4, 5]
    steps = list(engine.generate(follow_up, GREEDY))
    usage = steps[-1].usage
    assert usage is not None
    assert usage.cached_tokens == len(prompt) + len(reply) - 1
    assert engine.stats()["last"]["cached_tokens"] == usage.cached_tokens


def test_usage_and_finish_reasons(engine: Engine) -> None:
    steps = list(engine.generate([1, 2, 3], GREEDY))
    assert [s.finish_reason for s in steps] == [None] * 7 + ["length"]
    assert steps[-1].usage == (3, 8, steps[-1].usage.cached_tokens)  # type: ignore[union-attr]

    eos = steps[3].token_id
    engine.eos_token_ids, before = frozenset({eos}), engine.eos_token_ids
    try:
        stopped = list(engine.generate([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=8)))
    finally:
        engine.eos_token_ids = before
    assert [s.token_id for s in stopped] == [s.token_id for s in steps[: steps.index(steps[3]) + 1]]
    assert stopped[-1].finish_reason == "stop"
    assert stopped[-1].text == ""


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    text = "".join(s.text for s in engine.generate([1, 2, 3], params))
    stop = text[len(text) // 2 :][:3]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=(stop,))
    steps = list(engine.generate([1, 2, 3], params))
    assert "".join(s.text for s in steps) == text[: text.index(stop)]
    assert steps[-1].finish_reason == "stop"


def test_chat_ends_in_one_delta_with_reason_and_usage(engine: Engine) -> None:
    deltas = list(engine.chat([{"role": "user", "content": "Hello"}], params=GREEDY))
    assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].usage is not None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([-1], "token ids must be"), ([10**6], "token ids must be")],
)
def test_prompts_out_of_bounds(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(prompt)


def test_a_prompt_longer_than_the_context(tiny_model: Path) -> None:
    with Engine.load(tiny_model, device="cpu", context=16) as small:
        with pytest.raises(RequestError, match="16 tokens and the context is 16"):
            small.generate(list(range(16)))
        steps = list(small.generate(list(range(10)), SamplingParams(ignore_eos=True)))
        assert len(steps) == 6
        assert steps[-1].finish_reason == "length"


def test_closing_the_iterator_frees_the_turn(engine: Engine) -> None:
    steps = engine.generate([5, 6, 7], long_request(engine).params)
    next(steps)
    steps.close()
    assert list(steps) == []
    assert len(ids(engine, [1, 2])) == 8


@pytest.mark.parametrize("end", ["close", "drop"])
@pytest.mark.parametrize("kind", ["steps", "deltas"])
@pytest.mark.parametrize("started", [False, True])
def test_letting_an_iterator_go_cancels_its_request(
    engine: Engine, kind: str, end: str, started: bool
) -> None:
    params = long_request(engine).params
    if kind == "steps":
        stream: Stream[Any] = engine.generate([5, 6, 7], params)
    else:
        stream = engine.chat([{"role": "user", "content": "Hello"}], params=params)
    if started:
        next(stream)
    ticket = stream._ticket
    assert not ticket.cancelled.is_set()
    if end == "close":
        stream.close()
        stream.close()
    else:
        del stream
    assert ticket.cancelled.is_set()
    assert len(ids(engine, [1, 2])) == 8


def test_an_iterator_that_failed_is_at_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise HybridError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runtime.model, "decode", broken)
        steps = engine.generate([1, 2, 3], GREEDY)
        next(steps)
        with pytest.raises(HybridError, match="the disk"):
            next(steps)
    assert list(steps) == []


def test_a_token_is_abandoned_between_two_layers(engine: Engine) -> None:
    runtime, layers = engine._runtime, engine.config.num_hidden_layers
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > layers + 2  # the prompt, then two layers of the first token

    generation = Generation(
        Request((11, 12, 13), GREEDY),
        runtime.model,
        runtime.tokenizer,
        caches := CachePool(1, 1000),
        eos_token_ids=frozenset(),
        context=100,
        max_new_tokens=None,
        is_cancelled=cancelled,
    )
    steps: list[Step] = []
    with torch.inference_mode():
        generation.run(steps.append)
    assert [step.finish_reason for step in steps] == [None, "cancelled"]
    assert asked == layers + 3
    assert caches.tokens == 3  # the abandoned token is not one of them


def test_cancelling_while_waiting_and_while_running(engine: Engine) -> None:
    running, waiting = Sink(), Sink()
    first = engine.submit(long_request(engine), running)
    assert running.first.wait(60)
    second = engine.submit(long_request(engine), waiting)
    second.cancel()
    assert waiting.wait().finish_reason == "cancelled"
    assert not running.last.is_set()
    first.cancel()
    first.cancel()
    assert running.wait().finish_reason == "cancelled"


def test_the_queue_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_WAITING", 2)
    sinks = [Sink() for _ in range(3)]
    tickets = [engine.submit(long_request(engine), sinks[0])]
    assert sinks[0].first.wait(60)
    tickets += [engine.submit(long_request(engine), sink) for sink in sinks[1:]]
    with pytest.raises(Overloaded):
        engine.submit(long_request(engine), Sink())
    for ticket in tickets:
        ticket.cancel()
    assert {sink.wait().finish_reason for sink in sinks} == {"cancelled"}


def test_a_failing_request_ends_in_an_error_and_the_engine_lives_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runtime.model, "decode", broken)
        with pytest.raises(HybridError, match="ZeroDivisionError: boom"):
            ids(engine, [1, 2, 3])
    assert "a request failed" in caplog.text
    assert len(ids(engine, [1, 2, 3])) == 8


def test_what_a_request_finds_broken_is_logged_and_what_it_asks_wrongly_is_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raising(error: HybridError) -> None:
        def broken(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(engine._runtime.model, "decode", broken)
            with pytest.raises(type(error)):
                ids(engine, [1, 2, 3])

    raising(RequestError("an id is out of range"))
    assert caplog.text == ""
    raising(CheckpointError("a weight is NaN", file="model-1.safetensors", remedy="Mend it."))
    assert "a request failed: model-1.safetensors: a weight is NaN" in caplog.text


def test_closing_ends_what_runs_and_what_waits(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    running, waiting = Sink(), Sink()
    engine.submit(long_request(engine), running)
    assert running.first.wait(60)
    engine.submit(long_request(engine), waiting)
    engine.close()
    engine.close()
    assert running.wait().finish_reason == "cancelled"
    assert isinstance(waiting.wait().error, EngineClosed)
    with pytest.raises(EngineClosed):
        engine.generate([1])


def test_a_models_own_limit_ends_a_reply_that_names_none(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "limited"))
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**generation, "max_new_tokens": 5}))
    with Engine.load(model, device="cpu") as limited:
        assert len(ids(limited, [1, 2, 3], SamplingParams(ignore_eos=True))) == 5
        assert len(ids(limited, [1, 2, 3], SamplingParams(ignore_eos=True, max_tokens=7))) == 7


def test_rows_of_a_padded_head_are_never_chosen(tmp_path: Path) -> None:
    sizes = {"n_routed_experts": 16, "num_hidden_layers": 2, "vocab_size": 20_000}
    with Engine.load(synthesize(tmp_path / "padded", "tiny", sizes), device="cpu") as padded:
        params = SamplingParams(temperature=5.0, max_tokens=100, ignore_eos=True, seed=1)
        assert max(ids(padded, [1, 2, 3], params)) < padded.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"experts": "floppy"}, "experts is 'floppy'"),
        ({"context": 1}, "context is 1"),
        ({"context": 10**9}, "the model was made for"),
        ({"threads": 0}, "threads"),
        ({"ram": 10**9}, "ram"),
    ],
)
def test_options_that_cannot_be(tiny_model: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.load(tiny_model, **options)  # type: ignore[arg-type]
