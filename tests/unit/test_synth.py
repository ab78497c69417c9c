"""hybrid/synth.py: checkpoints in K2's format, sized, seeded and distributed as asked; nothing left on failure."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import hybrid.synth
from hybrid.loader import expected_tensors, open_model
from hybrid.presets import config_values
from hybrid.synth import synthesize
from hybrid.tokenizer import Tokenizer
from offload import direct
from offload.checkpoint import INDEX_NAME
from offload.errors import ConfigError, HybridError, TokenizerError, UsageError

SMALL = {"num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2}


def test_a_tiny_model_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    out = synthesize(tmp_path / "model", "tiny", SMALL)
    ours = open_model(out).checkpoint
    index = json.loads((out / INDEX_NAME).read_text())["weight_map"]
    assert set(index) == set(ours.names)
    assert set(index.values()) == {"model-1-of-2.safetensors", "model-2-of-2.safetensors"}
    for file in sorted(set(index.values())):
        with safe_open(out / file, "pt") as reference:
            assert set(reference.keys()) == {name for name, shard in index.items() if shard == file}
            for name in reference.keys():  # noqa: SIM118 (not a dict)
                theirs = reference.get_tensor(name)
                assert theirs.dtype == ours.tensor(name).dtype
                assert torch.equal(theirs.view(torch.uint8), ours.tensor(name).view(torch.uint8))


def test_tiny_is_what_the_preset_promises(tmp_path: Path) -> None:
    files = open_model(synthesize(tmp_path / "model", "tiny"))
    config = files.config
    assert (config.n_routed_experts, config.num_experts_per_tok, config.first_k_dense_replace) == (384, 8, 1)
    assert 20e6 < sum(file.stat().st_size for file in files.directory.iterdir()) < 100e6
    matrices = [
        e.shape for e in expected_tensors(config).values() if len(e.shape) == 2 and e.kind == "routed"
    ]
    assert all(rows % 128 or columns % 128 for rows, columns in matrices)
    assert config.vocab_size == Tokenizer.load(files.directory).vocab_size
    assert files.eos_token_ids == {Tokenizer.load(files.directory).special_ids["<|im_end|>"]}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        synthesize(tmp_path / str(i), "tiny", SMALL, seed) for i, seed in enumerate((3, 3, 4))
    )
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
    shard = "model-2-of-2.safetensors"
    assert (first / shard).read_bytes() != (other / shard).read_bytes()


def test_tensors_that_share_a_shape_differ(tmp_path: Path) -> None:
    checkpoint = open_model(synthesize(tmp_path / "model", "tiny", SMALL)).checkpoint
    experts = [checkpoint.tensor(f"model.layers.1.mlp.experts.{i}.up_proj.weight") for i in range(8)]
    distinct = {tensor.view(torch.uint8).numpy().tobytes() for tensor in experts}
    assert len(distinct) == 8


def test_weights_have_the_spread_that_keeps_signals_alive(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 256, "n_routed_experts": 64}
    files = open_model(synthesize(tmp_path / "model", "tiny", {**SMALL, **sizes}))

    def std_of(name: str) -> float:
        return float(files.checkpoint.weight(name).dequantize().double().std())

    layer = "model.layers.1"
    assert std_of(f"{layer}.mlp.experts.5.up_proj") == pytest.approx(512**-0.5, rel=0.05)
    assert std_of(f"{layer}.self_attn.q_a_proj") == pytest.approx(512**-0.5, rel=0.05)
    assert std_of(f"{layer}.mlp.gate") == pytest.approx(1.5 * 512**-0.5, rel=0.05)
    assert std_of("model.embed_tokens") == pytest.approx(1.0, rel=0.01)
    boost = (0.1 * np.log(32.0) + 1) ** 2
    assert std_of(f"{layer}.self_attn.q_b_proj") == pytest.approx(
        1.5 / boost / 256**0.5, rel=0.2
    )  # four blocks
    norm = files.checkpoint.tensor(f"{layer}.input_layernorm.weight").float()
    assert float(norm.mean()) == pytest.approx(1.0, abs=0.05)
    scale = files.checkpoint.tensor(f"{layer}.mlp.shared_experts.up_proj.weight_scale_inv")
    assert scale.unique().numel() == scale.numel() > 1  # a block taken for another shows
    bias = files.checkpoint.tensor(f"{layer}.mlp.gate.e_score_correction_bias")
    assert 0.02 < float(bias.std()) < 0.1


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_group": 4, "topk_group": 2},
        {"q_lora_rank": None},
        {"n_shared_experts": 3, "first_k_dense_replace": 2, "num_hidden_layers": 5, "moe_layer_freq": 2},
        {"n_shared_experts": 0, "first_k_dense_replace": 0},
        {"tie_word_embeddings": True, "rope_scaling": None},
        {"hidden_size": 1, "moe_intermediate_size": 129, "v_head_dim": 3},
        {"num_hidden_layers": 1, "rope_scaling.factor": 64.0, "rope_scaling.beta_fast": 32},
    ],
)
def test_every_variant_opens(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = open_model(synthesize(tmp_path / "model", "tiny", {**SMALL, **overrides})).config
    for key, value in overrides.items():
        outer, _, inner = key.partition(".")
        held = getattr(config, outer)
        assert (getattr(held, inner) if inner else held) == value


def test_like_takes_config_tokenizer_and_template(tmp_path: Path, k2_files: Path) -> None:
    template = k2_files / "templates" / "K2-Instruct-final.jinja"
    overrides = {**SMALL, "hidden_size": 32}
    out = synthesize(tmp_path / "model", "tiny", overrides, like=k2_files, template=template)
    for name in ("tiktoken.model", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (k2_files / name).read_bytes()
    assert (out / "chat_template.jinja").read_bytes() == template.read_bytes()
    published = json.loads((k2_files / "config.json").read_text())
    made = json.loads((out / "config.json").read_text())
    changed = {key for key in published if published[key] != made.get(key)}
    assert changed == {
        "auto_map", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "q_lora_rank",
        "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size",
        "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok",
    }  # fmt: skip
    assert open_model(out).config.vocab_size == 163840


def test_slice_keeps_k2s_layer_dimensions(k2_files: Path) -> None:
    values = config_values("slice", {"n_routed_experts": 16}, k2_files, Tokenizer.load(k2_files))
    published = json.loads((k2_files / "config.json").read_text())
    assert {key for key in published if published[key] != values.get(key)} == {
        "auto_map", "num_hidden_layers", "n_routed_experts",
    }  # fmt: skip


# -- refusals; nothing is left behind


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("huge", {}, "there is no preset 'huge'; use tiny or slice"),
        ("tiny", {"n_experts": 3}, "--set n_experts: config.json has no such field"),
        ("tiny", {"weight_block_size": [64, 64]}, "--set weight_block_size: config.json has no such field"),
        ("tiny", {"rope_scaling.gamma": 3}, "--set rope_scaling.gamma: config.json has no such field"),
        ("tiny", {"rope_scaling": None, "rope_scaling.factor": 3}, "rope_scaling is None, not an object"),
        ("tiny", {"hidden_size": "big"}, "hidden_size is 'big', expected int"),
        ("tiny", {"vocab_size": 5}, "vocab_size is 5, but the tokenizer has"),
        ("tiny", {"num_experts_per_tok": 500}, "num_experts_per_tok 500 exceeds"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, preset: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        synthesize(tmp_path / "model", preset, overrides)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError, match="exists and is not an empty directory"):
            synthesize(out, "tiny", SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_sources_that_lack_their_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError):
        synthesize(tmp_path / "model", "tiny", SMALL, like=tmp_path)
    with pytest.raises(UsageError, match=r"nothing\.jinja: no such file"):
        synthesize(tmp_path / "model", "tiny", SMALL, template=tmp_path / "nothing.jinja")
    for name in ("tiktoken.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hybrid.synth.ASSETS / name).read_bytes())
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        synthesize(tmp_path / "model", "tiny", SMALL, like=tmp_path)
    assert not (tmp_path / "model").exists()


def test_what_does_not_fit_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the checkpoint takes \d+\.\d GB and \d+\.\d GB are free"):
        synthesize(tmp_path / "model", "slice", {**SMALL, "moe_intermediate_size": 1_000_000_000})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_disk_that_fills_up_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    """/dev/full, which answers every write with "no space", in the place of the second shard."""
    out = tmp_path / "model"
    if existed:
        out.mkdir()
    opened = os.open

    def open_full(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        return opened(
            "/dev/full" if str(path).endswith("-2-of-2.safetensors") else path, flags, *rest, **named
        )

    monkeypatch.setattr(direct.os, "open", open_full)
    with pytest.raises(
        HybridError, match=r"model: writing the checkpoint failed \(No space left on device\)"
    ):
        synthesize(out, "tiny", SMALL)
    assert list(tmp_path.iterdir()) == ([out] if existed else [])
    assert not existed or list(out.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_what: str, fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "model", "tiny", SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_one(tmp_path: Path) -> None:
    seen: list[float] = []
    synthesize(tmp_path / "model", "tiny", SMALL, progress=lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
