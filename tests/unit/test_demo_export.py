"""From a trained module to files and back: what is exported is what the engine runs, and the examination of it."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from hybrid import Engine
from hybrid.config import ModelConfig
from hybrid.demo import evaluate, train
from hybrid.demo.card import card
from hybrid.demo.data import small_talk
from hybrid.demo.data.encode import Encoder
from hybrid.demo.data.talk import Probe
from hybrid.demo.export import export, read_back
from hybrid.demo.shape import config_fields
from hybrid.demo.trainer.matching import Case, Tally, cases, exact_matches
from hybrid.demo.trainer.model import DemoModel
from hybrid.demo.trainer.ops import Documents, TorchOps
from hybrid.synth import ASSETS
from tests.unit.test_demo_trainer import SMALL


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoModel, Path]:
    torch.manual_seed(3)
    fields = config_fields(Encoder(ASSETS).tokenizer, SMALL)
    model = DemoModel(ModelConfig.from_dict(fields), TorchOps())
    with torch.no_grad():
        model.lm_head.normal_()  # not the embedding's, as in a new model
        for moe in model.moe_layers():
            moe.bias.normal_(0, 0.02)
    out = tmp_path_factory.mktemp("exported")
    (out / "model-9-of-9.safetensors").write_bytes(b"an earlier export")
    return model, export(model, fields, ASSETS, out)


def test_the_engine_runs_what_was_exported(exported: tuple[DemoModel, Path]) -> None:
    model, directory = exported
    ids = torch.randint(0, 1000, (60,), generator=torch.Generator().manual_seed(1))
    with Engine.load(directory, "cpu", threads=2) as engine:
        got = engine.logits(ids.tolist())
    with torch.no_grad():
        untouched, _ = model.logits(ids, Documents.of(torch.tensor([60]), torch.device("cpu")))
        back = DemoModel(model.config, TorchOps())
        read_back(directory, back)
        wanted, _ = back.logits(ids, Documents.of(torch.tensor([60]), torch.device("cpu")))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    assert 1e-4 < float((untouched - wanted).norm() / wanted.norm()) < 0.5  # fp8 has rounded


def test_files_are_laid_out_as_k2_publishes_them(exported: tuple[DemoModel, Path]) -> None:
    _, directory = exported
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = {f.name for f in directory.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())  # nothing is left of the earlier export
    assert index["weight_map"]["model.layers.1.mlp.experts.23.down_proj.weight_scale_inv"] in files
    for name in (
        "config.json",
        "generation_config.json",
        "tiktoken.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (directory / name).is_file()
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in directory.iterdir())


@torch.no_grad()
def test_fp8_costs_a_weight_little(exported: tuple[DemoModel, Path]) -> None:
    model, directory = exported
    back = DemoModel(model.config, TorchOps())
    read_back(directory, back)
    for mine, theirs in zip(model.moe_layers(), back.moe_layers(), strict=True):
        assert torch.equal(mine.bias, theirs.bias)
        assert float((mine.gate_up - theirs.gate_up).norm() / mine.gate_up.norm()) < 0.04
        assert float((mine.down_t - theirs.down_t).norm() / mine.down_t.norm()) < 0.04


def test_the_examination_has_every_figure(
    exported: tuple[DemoModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = exported
    monkeypatch.setattr(evaluate, "GREEDY", evaluate.SamplingParams(temperature=0.0, max_tokens=4))
    monkeypatch.setattr(evaluate, "SAMPLED", evaluate.SamplingParams(max_tokens=4, seed=0))
    with torch.no_grad(), Engine.load(directory, "cpu", threads=2) as engine:
        figures: dict[str, Any] = evaluate.examine(engine, directory, "dev", 4, 1)
    assert figures["split"] == "dev"
    assert figures["argmax_agreement_with_training_model"] > 0.99
    assert figures["exact_match"]["sum"]["turns"] >= 121  # all of 0 + 0 to 10 + 10
    assert figures["exact_match"]["sum"]["mean"] == 0.0  # of a model that was never trained
    assert set(figures["unwanted_calls"]) == {"no tool needed", "undeclared", "near miss", "incomplete"}
    assert len(figures["expert_load_max_over_mean"]) == 2
    assert figures["weather"]["prompts"] == 10
    assert figures["weather"]["called"] == figures["weather"]["called_at_default_temperature"] == 0.0
    assert figures["storyname"]["good"] == figures["joke"]["good"] == 0.0
    assert figures["chat_at_default_temperature"]["mean"] == 0.0
    assert {kind: share["mean"] for kind, share in figures["requests"].items()} == {
        "single": 0.0,
        "parallel": 0.0,
        "undeclared": 0.0,
        "no_tool": 1.0,  # nothing it says is a call
    }
    table = card(figures)
    assert "| sums up to 10 + 10 | " in table
    assert all(f"| {share['turns']} |" in table for share in figures["exact_match"].values())


def right(some: list[Case]) -> list[NDArray[np.int64]]:
    """The likeliest tokens of a model that knows every answer."""
    return [np.roll(case.encoded.tokens.astype(np.int64), -1) for case in some]


def test_perfect_answers_are_all_counted() -> None:
    some = cases(Encoder(ASSETS), "dev", 10)
    tally = exact_matches(some, right(some))
    assert tally.mean() == 1.0
    assert len(tally.kinds()) > 4


def test_only_unwanted_calls_are_counted() -> None:
    encoder = Encoder(ASSETS)
    some = cases(encoder, "dev", 60)
    likely = right(some)
    found = evaluate._unwanted_calls(encoder, some, likely)
    assert all(group["rate"] == 0 < group["turns"] for group in found.values())  # wanted calls there are
    turns = [
        (likely[i], first)
        for i, case in enumerate(some)
        for probe, (first, _) in zip(case.conversation.probes, case.spans, strict=True)
        if probe.kind == "undeclared"
    ]
    tokens, first = turns[0]
    tokens[first - 1] = encoder.tokenizer.special_ids["<|tool_calls_section_begin|>"]
    found = evaluate._unwanted_calls(encoder, some, likely)
    assert found["undeclared"] == {"rate": round(1 / len(turns), 4), "turns": len(turns)}
    assert found["no tool needed"]["rate"] == found["incomplete"]["rate"] == 0


def test_the_worst_wording_is_the_worst_of_those_often_asked() -> None:
    tally = Tally()
    for wording, hits, trials in (("well", 9, 10), ("badly", 2, 5), ("hardly asked", 0, 4)):
        for i in range(trials):
            tally.add(Probe(0, "call", wording), i < hits)
    tally.add(Probe(0, "sum", "other"), False)
    share = evaluate._share(tally, "call")
    assert (share["mean"], share["turns"], share["wordings"], share["judged"]) == (
        round(11 / 19, 4),
        19,
        3,
        2,
    )
    assert (share["worst"], share["worst_wording"]) == (0.4, "badly")
    assert evaluate._share(tally, "sum")["worst"] is None


def test_a_story_is_judged_by_its_animal_and_name() -> None:
    for i in range(100):
        text = small_talk.story(Random(i), "owl", "Anna Maria")
        assert evaluate._hero_of(text) == "owl Anna Maria"


@pytest.mark.parametrize(
    "option",
    [
        ["--tokens", "0"],
        ["--batch-tokens", "0"],
        ["--evaluate-every", "0.5"],
        ["--tokens", "inf"],
        ["--muon-rate", "nan"],
        ["--adam-rate", "-1"],
        ["--save-minutes", "nan"],
    ],
)
def test_training_refuses_nonsense(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main([str(tmp_path), *option])
    assert re.search("at least [01]", capsys.readouterr().err)


def failed(main: Callable[[list[str]], None], *arguments: object) -> int:
    """Exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_training_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert failed(train.main, tmp_path, "--tokens", "1e3", "--device", "cpu") == 2
    assert "checkpoint.pt: not a training checkpoint" in capsys.readouterr().err
    assert failed(train.main, tmp_path / "checkpoint.pt") == 1
    assert "checkpoint.pt" in capsys.readouterr().err
    with train._alone(tmp_path):
        assert failed(train.main, tmp_path, "--device", "cpu") == 2
    assert "another trainer" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert failed(train.main, tmp_path, "--device", "cuda") == 2
        assert "no CUDA GPU" in capsys.readouterr().err


def test_the_examination_says_what_is_wrong_with_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(evaluate.main, tmp_path) == 2
    assert "python -m hybrid.demo.evaluate: " in capsys.readouterr().err


def test_a_signal_to_all_processes_saves_and_stops(tmp_path: Path) -> None:
    """As a service manager sends it, here just when a process that writes data has been started."""
    command = [sys.executable, "-m", "hybrid.demo.train", str(tmp_path), "--batch-tokens", "5e3"]
    command += ["--device", "cpu"]
    subprocess.run([*command, "--stop-minutes", "0"], check=True, capture_output=True)
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["counters"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as trainer:
        try:
            deadline = time.monotonic() + 100
            while trainer.poll() is None and time.monotonic() < deadline:
                started = [" ".join(child.cmdline()) for child in psutil.Process(trainer.pid).children()]
                if any("spawn_main" in line for line in started):
                    os.killpg(trainer.pid, signal.SIGTERM)
                    break
                time.sleep(0.05)
            said, _ = trainer.communicate(timeout=100)
        finally:
            trainer.kill()
    assert trainer.returncode == 0
    assert "going on from 0.01M of 50.00M" in said
    assert "the same command goes on" in said
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["counters"]
    assert all(after >= before for after, before in zip(second, first, strict=True))


def test_an_export_that_fails_leaves_the_one_before(exported: tuple[DemoModel, Path], tmp_path: Path) -> None:
    model, directory = exported
    out = tmp_path / "model"
    shutil.copytree(directory, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="model: cannot be written"):
            export(model, {"max_position_embeddings": 64}, ASSETS, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [out]
    for file in directory.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the trainer train a small model and examine it little."""
    monkeypatch.setattr("hybrid.demo.shape.SIZES", SMALL)
    monkeypatch.setattr(
        "hybrid.demo.trainer.matching.cases", lambda encoder, split, _: cases(encoder, split, 3)
    )


@pytest.mark.usefixtures("small")
def test_one_command_trains_goes_on_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        str(tmp_path),
        "--tokens",
        "3e3",
        "--batch-tokens",
        "1024",
        "--device",
        "cpu",
        "--evaluate-every",
        "2e3",
    ]
    train.main([*command, "--stop-minutes", "0"])
    assert (tmp_path / "checkpoint.pt").is_file()
    assert not (tmp_path / "model").exists()
    del command[1:3]  # goes on as long as it was begun with
    train.main(command)
    with Engine.load(tmp_path / "model", "cpu", threads=2) as engine:
        first = engine.logits([1, 2, 3])
    assert first.isfinite().all()
    capsys.readouterr()
    train.main([*command, "--tokens", "5e3"])
    assert "of 0.01M tokens" in capsys.readouterr().out
    with Engine.load(tmp_path / "model", "cpu", threads=2) as engine:
        assert not engine.logits([1, 2, 3]).equal(first)
    learnt = (tmp_path / "checkpoint.pt").read_bytes()
    shutil.rmtree(tmp_path / "model")
    train.main([*command, "--tokens", "5e3"])  # complete: exports again
    assert (tmp_path / "model" / "config.json").is_file()
    assert (tmp_path / "checkpoint.pt").read_bytes() == learnt


@pytest.mark.usefixtures("small")
def test_a_run_that_begins_with_a_model_goes_on_and_does_not_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch-tokens", "1024", "--device", "cpu", "--muon-rate", "1e-3"]
    train.main([str(tmp_path / "one"), "--tokens", "1024", *options])
    model = tmp_path / "one" / "model"
    command = [str(tmp_path / "two"), "--tokens", "4096", *options, "--stop-minutes", "0", "--seed", "1"]
    train.main([*command, "--from", str(model)])
    capsys.readouterr()
    train.main([*command, "--from", str(model)])
    assert "stopped at 0.00M tokens" in capsys.readouterr().out
    state = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert state["counters"][0] == 2
    train.main(command)
    # A directory that holds no model any more, or by now another.
    train.main([*command, "--from", str(tmp_path / "two")])
    after = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert after["counters"][0] == 4
    assert after["settings"]["begun_with"] == state["settings"]["begun_with"] != ""
    capsys.readouterr()
    own = [str(tmp_path / "one"), "--tokens", "4096", *options]
    assert failed(train.main, *own, "--from", str(model)) == 2
    assert "other settings" in capsys.readouterr().err
    assert failed(train.main, str(tmp_path / "three"), "--from", str(tmp_path), *options) == 2


@pytest.mark.usefixtures("small")
def test_a_run_refuses_another_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(ASSETS, other)
    ranks = (other / "tiktoken.model").read_text().splitlines()
    ranks[-1], ranks[-2] = (
        f"{ranks[-2].split()[0]} {len(ranks) - 1}",
        f"{ranks[-1].split()[0]} {len(ranks) - 2}",
    )
    (other / "tiktoken.model").write_text("\n".join(ranks) + "\n")
    command = [str(tmp_path / "run"), "--batch-tokens", "1024", "--device", "cpu", "--stop-minutes", "0"]
    train.main(command)
    monkeypatch.setattr("hybrid.synth.ASSETS", other)
    assert failed(train.main, *command) == 2
    assert "other settings" in capsys.readouterr().err
