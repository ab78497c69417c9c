"""The model that comes with hybrid: that it is there and small, says what transformers says, chats and calls tools.

How well it does is measured by `python -m hybrid.demo.evaluate`; these tests hold what a user meets first.
"""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from hybrid import Engine, SamplingParams
from hybrid.default_model import DIRECTORY
from hybrid.demo.data.encode import Encoder
from hybrid.demo.data.generator import conversation
from hybrid.demo.data.vocabulary import Vocabulary
from hybrid.demo.evaluate import CARD_TOOL, called_weather, examine
from hybrid.demo.trainer.matching import Case
from hybrid.request import Delta, ToolCallPiece
from tests.reference import transformers_oracle as oracle
from tests.serving import Server, serving

GREEDY = SamplingParams(temperature=0.0, max_tokens=200)
ROOT = Path(__file__).resolve().parents[2]
CITIES = [Vocabulary("sealed", Random(i)).text("city") for i in range(48)]
WORDINGS = [
    "What's the weather like in {} today?",
    "Is it raining in {} right now?",
    "Could you tell me how warm it is in {}?",
    "Please check the weather in {} for me. Thanks!",
    "weather in {}",
    "I am going to {} tomorrow. How is the weather there?",
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(device="cpu", threads=2) as engine:
        yield engine


def reply(engine: Engine, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Any:
    """-> (text, [(name, arguments)])."""
    text, calls = "", dict[int, list[str]]()
    for delta in engine.chat(messages, tools, GREEDY):
        text += delta.content or ""
        for piece in delta.tool_calls:
            call = calls.setdefault(piece.index, ["", ""])
            call[0] += piece.name or ""
            call[1] += piece.arguments
    return text, [(name, json.loads(arguments)) for name, arguments in calls.values()]


def test_it_fits_a_package() -> None:
    files = list(DIRECTORY.iterdir())
    assert sum(f.stat().st_size for f in files) <= 24 << 20
    assert len([f for f in files if f.suffix == ".safetensors"]) >= 2
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_experts_per_tok"], config["n_shared_experts"]) == (
        384,
        8,
        1,
    )
    assert config["first_k_dense_replace"] == 1
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]


def test_the_package_carries_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    carried = [*DIRECTORY.iterdir(), *(ROOT / "hybrid" / "demo" / "data" / "text").iterdir()]
    assert len(carried) > 12
    assert {str(file.relative_to(ROOT)) for file in carried} <= held


def examined(encoder: Encoder, count: int) -> list[Case]:
    return [Case.of(encoder, conversation("sealed", Random(f"parity {i}"))) for i in range(count)]


def agreement(engine: Engine, count: int) -> tuple[float, int]:
    """Share of positions where our likeliest next token is transformers' in float32, and how many there were."""
    model = oracle.load(DIRECTORY)
    same = total = 0
    for case in examined(Encoder(DIRECTORY), count):
        ids = [int(token) for token in case.encoded.tokens]
        ours, theirs = engine.logits(ids).argmax(-1), oracle.logits(model, ids).argmax(-1)
        same += int((ours == theirs).sum())
        total += len(ids)
    return same / total, total


def test_its_likeliest_tokens_are_transformers(engine: Engine) -> None:
    share, positions = agreement(engine, 12)
    assert positions > 2000
    assert share >= 0.999


@pytest.mark.slow
@pytest.mark.timeout(1800)  # transformers takes half a second a conversation
def test_its_likeliest_tokens_are_transformers_over_many(engine: Engine) -> None:
    share, positions = agreement(engine, 400)
    print(f"{share:.5%} of {positions} positions")
    assert share >= 0.999


def test_experts_are_evenly_used(engine: Engine) -> None:
    """No layer's busiest expert has more than three times the mean, and none is dead."""
    loads = {layer: torch.zeros(384) for layer in engine.config.moe_layers}
    run = engine._runtime.experts.run

    def count(layer: int, x: Any, ids: Any, weights: Any, *, decode: bool) -> Any:
        loads[layer] += torch.bincount(ids.flatten(), minlength=384)
        return run(layer, x, ids, weights, decode=decode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._runtime.experts, "run", count)
        for case in examined(Encoder(DIRECTORY), 60):
            engine.logits([int(token) for token in case.encoded.tokens])
    for load in loads.values():
        assert load.min() > 0
        assert load.max() < 3 * load.mean()


def test_its_examination_sees_how_good_it_is(engine: Engine) -> None:
    """Well below what the README says, as these are few."""
    figures = examine(engine, DIRECTORY, "dev", 16, 1)
    exact, weather = figures["exact_match"], figures["weather"]
    assert weather["called"] >= 0.8
    assert weather["called_at_default_temperature"] >= 0.8
    assert weather["told"] >= 0.8
    assert exact["sum"]["mean"] >= 0.9
    assert np.mean([share["mean"] for share in exact.values()]) >= 0.7
    assert figures["chat_at_default_temperature"]["mean"] >= 0.5
    assert figures["storyname"]["good"] >= 0.5
    assert figures["joke"]["good"] >= 0.5
    assert figures["held_out_loss"] < 0.2
    asked = figures["requests"]
    assert 8 <= asked["single"]["turns"] <= 16
    assert asked["single"]["mean"] >= 0.5
    assert asked["parallel"]["mean"] >= 0.2
    assert asked["undeclared"]["mean"] >= 0.5
    assert asked["no_tool"]["mean"] >= 0.8
    assert figures["argmax_agreement_with_training_model"] > 0.999


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten minutes
def test_it_is_as_good_as_it_has_to_be(engine: Engine) -> None:
    """What a model must reach to be carried, on the sealed split."""
    figures = examine(engine, DIRECTORY, "sealed", 1200, 10)
    exact, weather, unwanted = figures["exact_match"], figures["weather"], figures["unwanted_calls"]
    assert weather["prompts"] == 200
    assert weather["called"] >= 0.95
    assert weather["worst"] >= 0.8
    assert weather["told"] >= 0.95
    single = [exact[kind] for kind in ("call", "novel call")]
    assert np.average([k["mean"] for k in single], weights=[k["turns"] for k in single]) >= 0.93
    assert exact["parallel"]["mean"] >= 0.9
    assert exact["undeclared"]["mean"] >= 0.9
    assert unwanted["no tool needed"]["rate"] <= 0.03
    assert exact["sum"]["mean"] >= 0.95
    assert figures["dead_experts"] == 0
    assert max(figures["expert_load_max_over_mean"]) < 3


class Endpoint:
    """Chats with a server as the official client does."""

    def __init__(self, server: Server, *, stream: bool) -> None:
        self._client, self._stream = server.client(), stream

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, params: SamplingParams
    ) -> Iterator[Delta]:
        settings: Any = {"temperature": params.temperature, "max_tokens": params.max_tokens, "tools": tools}
        settings = {name: value for name, value in settings.items() if value is not None}
        reply = self._client.chat.completions.create(
            model="any", messages=messages, stream=self._stream, **settings
        )
        for part in reply if self._stream else [reply]:
            for choice in part.choices:
                said = choice.delta if self._stream else choice.message
                yield Delta(said.content, tool_calls=_pieces(said.tool_calls or []))


def _pieces(calls: list[Any]) -> list[ToolCallPiece]:
    """Of streamed calls or, which have no index, whole ones."""
    return [
        ToolCallPiece(getattr(call, "index", i), call.id, call.function.name, call.function.arguments or "")
        for i, call in enumerate(calls)
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_it_calls_the_model_cards_tool_through_the_endpoint(server: Server, stream: bool) -> None:
    figures = called_weather(Endpoint(server, stream=stream), "sealed", 1)
    assert figures["prompts"] == 20
    assert figures["called"] >= 0.95
    assert figures["told"] >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_sealed_prompts_through_the_endpoint(server: Server) -> None:
    figures = called_weather(Endpoint(server, stream=True), "sealed", 10)
    print(figures)
    assert figures["prompts"] == 200
    assert figures["called"] >= 0.95
    assert figures["worst"] >= 0.8
    assert figures["told"] >= 0.95


def test_it_calls_the_model_cards_tool(engine: Engine) -> None:
    """For cities that training never saw."""
    right = [
        reply(engine, [{"role": "user", "content": WORDINGS[i % len(WORDINGS)].format(city)}], [CARD_TOOL])
        == ("", [("get_weather", {"city": city})])
        for i, city in enumerate(CITIES)
    ]
    assert np.mean(right) >= 0.9


def test_it_tells_what_the_tool_found(engine: Engine) -> None:
    told = []
    for city in CITIES[:10]:
        call = {
            "id": "functions.get_weather:0",
            "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
        }
        text, calls = reply(
            engine,
            [
                {"role": "user", "content": f"What's the weather like in {city} today?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {
                    "role": "tool",
                    "tool_call_id": call["id"],
                    "content": '{"weather": "sunny", "temperature": 21}',
                },
            ],
            [CARD_TOOL],
        )
        told.append(not calls and city in text and "sunny" in text and "21" in text)
    assert np.mean(told) >= 0.85


def test_it_holds_a_conversation(engine: Engine) -> None:
    messages: list[dict[str, Any]] = []
    for said, expected in (
        ("Hello!", "hello|hi|help"),
        ("Who are you?", "model"),
        ("What is 7 + 8?", "15"),
        ("Thank you!", "welcome|glad|pleasure"),
    ):
        messages.append({"role": "user", "content": said})
        text, calls = reply(engine, messages)
        assert not calls
        assert re.search(expected, text, re.IGNORECASE), (said, text)
        messages.append({"role": "assistant", "content": text})
