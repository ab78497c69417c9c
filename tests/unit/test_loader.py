"""hybrid/loader.py: the tensors that a config implies, and what a directory must hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid.config import ModelConfig
from hybrid.loader import expected_tensors, open_model
from hybrid.presets import K2_SHAPE
from hybrid.synth import synthesize
from hybrid.tokenizer import Tokenizer
from offload.checkpoint import INDEX_NAME
from offload.errors import CheckpointError, ConfigError

SMALL = {
    "hidden_size": 136,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 120,
}


def config_of(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict({**K2_SHAPE, "vocab_size": 163840, **fields})


def test_k2s_tensors_are_those_published() -> None:
    """The published index lists 139,644: with block scales, and with an inv_freq in each layer to be ignored."""
    expected = expected_tensors(config_of())
    scaled = [name for name, e in expected.items() if e.kind in ("attention", "dense", "shared", "routed")]
    assert len(expected) + len(scaled) + 61 == 139_644
    layer = "model.layers.60"
    shapes = {
        "model.embed_tokens.weight": (163840, 7168),
        "lm_head.weight": (163840, 7168),
        "model.norm.weight": (7168,),
        "model.layers.0.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.0.mlp.down_proj.weight": (7168, 18432),
        f"{layer}.self_attn.q_a_proj.weight": (1536, 7168),
        f"{layer}.self_attn.q_a_layernorm.weight": (1536,),
        f"{layer}.self_attn.q_b_proj.weight": (12288, 1536),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        f"{layer}.self_attn.kv_b_proj.weight": (16384, 512),
        f"{layer}.self_attn.o_proj.weight": (7168, 8192),
        f"{layer}.mlp.gate.weight": (384, 7168),
        f"{layer}.mlp.gate.e_score_correction_bias": (384,),
        f"{layer}.mlp.shared_experts.up_proj.weight": (2048, 7168),
        f"{layer}.mlp.experts.383.gate_proj.weight": (2048, 7168),
        f"{layer}.mlp.experts.383.down_proj.weight": (7168, 2048),
    }
    assert {name: expected[name].shape for name in shapes} == shapes


@pytest.mark.parametrize(
    ("fields", "gained", "lost"),
    [
        ({"tie_word_embeddings": True}, set(), {"lm_head.weight"}),
        (
            {"q_lora_rank": None},
            {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"},
            {
                f"model.layers.{i}.self_attn.{part}.weight"
                for i in range(2)
                for part in ("q_a_proj", "q_a_layernorm", "q_b_proj")
            },
        ),
        (
            {"n_shared_experts": 0},
            set(),
            {f"model.layers.1.mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
        ),
    ],
)
def test_variants_gain_and_lose_tensors(fields: dict[str, Any], gained: set[str], lost: set[str]) -> None:
    plain, varied = (
        set(expected_tensors(config_of(**SMALL))),
        set(expected_tensors(config_of(**SMALL, **fields))),
    )
    assert (varied - plain, plain - varied) == (gained, lost)


def test_shared_experts_are_one_wide_mlp() -> None:
    expected = expected_tensors(config_of(**SMALL, n_shared_experts=3))
    assert expected["model.layers.1.mlp.shared_experts.gate_proj.weight"].shape == (3 * 2048, 136)


# -- whole directories


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return synthesize(tmp_path / "model", "tiny", SMALL)


def rewrite(model: Path, edit: Any) -> None:
    """Make one model.safetensors of the model, after `edit` changed the dict of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        tensors.update(load_file(file))
        file.unlink()
    (model / INDEX_NAME).unlink()
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


def set_config(model: Path, **fields: Any) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, **fields}))


def test_opens_a_sound_model(model: Path) -> None:
    files = open_model(model)
    assert files.directory == model
    assert files.config.kv_lora_rank == 120
    assert files.eos_token_ids == {json.loads((model / "generation_config.json").read_text())["eos_token_id"]}
    scales = {name for name in files.checkpoint.names if name.endswith("_scale_inv")}
    assert set(files.checkpoint.names) - scales == set(expected_tensors(files.config))
    assert files.checkpoint.weight("model.layers.1.mlp.experts.3.down_proj").shape == (136, 48)


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))


def test_without_generation_config_a_turns_end_is_a_reply_s_end_too(model: Path) -> None:
    special = Tokenizer.load(model).special_ids
    generation = model / "generation_config.json"
    assert open_model(model).eos_token_ids == {special["<|im_end|>"]}
    write_json(generation, {"eos_token_id": special["[EOT]"]})
    assert open_model(model).eos_token_ids == {special["[EOT]"]}
    write_json(generation, {"max_length": 9})
    assert open_model(model).eos_token_ids == {special["[EOS]"], special["<|im_end|>"]}
    generation.unlink()
    assert open_model(model).eos_token_ids == {special["[EOS]"], special["<|im_end|>"]}


@pytest.mark.parametrize("added", [None, [], {}, {"x": {"content": "<|im_end|>"}, "3": "<|im_end|>"}])
def test_a_tokenizer_without_k2s_end_of_turn(model: Path, added: Any) -> None:
    (model / "generation_config.json").unlink()
    write_json(model / "tokenizer_config.json", {"added_tokens_decoder": added})
    assert open_model(model).eos_token_ids == {
        json.loads((model / "config.json").read_text())["eos_token_id"]
    }


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_beyond_the_vocabulary_names_its_file(model: Path, name: str) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "generation_config.json").unlink()
    write_json(model / name, {**values, "eos_token_id": values["vocab_size"]})
    with pytest.raises(
        ConfigError, match=rf"{model / name}: eos_token_id is .* below {values['vocab_size']}"
    ):
        open_model(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_but_routed_experts_may_be_unquantised(model: Path, dtype: torch.dtype) -> None:
    def unquantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if ".mlp.experts." in name or name.endswith("correction_bias"):
                continue
            if name.endswith("_scale_inv"):
                del tensors[name]
            else:
                tensors[name] = tensors[name].to(dtype)

    rewrite(model, unquantise)
    weight = open_model(model).checkpoint.weight("model.layers.0.self_attn.o_proj")
    assert (weight.data.dtype, weight.scale) == (dtype, None)


def test_a_stray_inv_freq_and_prediction_layers_are_ignored(model: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(4, 4)

    rewrite(model, add)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.2\.eh_proj\.weight: the model .* has no such tensor"
    ):
        open_model(model)
    set_config(model, num_nextn_predict_layers=1)
    open_model(model)


@pytest.mark.parametrize("count", [-1, "1", 1.5, None])
def test_a_number_of_prediction_layers_that_is_none(model: Path, count: Any) -> None:
    set_config(model, num_nextn_predict_layers=count)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        open_model(model)


def test_an_unused_scale_is_unknown(model: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=rf"{name}_scale_inv: the model .* has no such tensor"):
        open_model(model)


def test_fp8_without_quantization_config(model: Path) -> None:
    set_config(model, quantization_config=None)
    with pytest.raises(
        CheckpointError, match=r"dtype is F8_E4M3, but config\.json has no quantization_config"
    ):
        open_model(model)
