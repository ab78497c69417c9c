"""hybrid/config.py: config.json's fields, none assumed, none contradictory."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.config import ModelConfig, eos_token_ids, read_json
from hybrid.presets import K2_SHAPE
from offload.errors import ConfigError

VALUES: dict[str, Any] = {**K2_SHAPE, "vocab_size": 163840}
ROPE = VALUES["rope_scaling"]
SCALAR_FIELDS = [
    field for field in ModelConfig.__dataclass_fields__ if field not in ("rope_scaling", "weight_block_size")
]


def changed(**fields: Any) -> dict[str, Any]:
    return {**VALUES, **fields}


def test_k2s_own_config_is_read_with_its_own_names(k2_files: Path) -> None:
    config = ModelConfig.from_file(k2_files / "config.json")
    published = json.loads((k2_files / "config.json").read_text())
    for field in SCALAR_FIELDS:
        assert getattr(config, field) == published[field]
    assert config.rope_scaling is not None
    for field, value in published["rope_scaling"].items():
        assert getattr(config.rope_scaling, field) == value
    assert config.weight_block_size == (128, 128)
    assert (config.qk_head_dim, config.latent_dim) == (192, 576)
    assert config.moe_layers == list(range(1, 61))


def test_the_presets_shape_is_k2s_own(k2_files: Path) -> None:
    assert ModelConfig.from_dict(VALUES) == ModelConfig.from_file(k2_files / "config.json")


def test_which_layers_are_moe() -> None:
    config = ModelConfig.from_dict(changed(first_k_dense_replace=3, moe_layer_freq=2, num_hidden_layers=9))
    assert config.moe_layers == [4, 6, 8]


@pytest.mark.parametrize("field", [*SCALAR_FIELDS, "rope_scaling"])
def test_a_missing_field_is_named(field: str) -> None:
    values = changed()
    del values[field]
    with pytest.raises(
        ConfigError, match=rf"config\.json: field '{field}' is missing.*[Nn]o value is assumed"
    ):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("field", list(ROPE))
def test_a_missing_rope_field_is_named(field: str) -> None:
    rope = {key: value for key, value in ROPE.items() if key != field}
    with pytest.raises(ConfigError, match=rf"config\.json: field 'rope_scaling\.{field}' is missing"):
        ModelConfig.from_dict(changed(rope_scaling=rope))


def test_rope_scaling_may_be_null_and_its_type_spelt_rope_type() -> None:
    assert ModelConfig.from_dict(changed(rope_scaling=None)).rope_scaling is None
    rope = {("rope_type" if key == "type" else key): value for key, value in ROPE.items()}
    spelt = ModelConfig.from_dict(changed(rope_scaling=rope))
    assert spelt == ModelConfig.from_dict(VALUES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "model_type 'llama' with architectures",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "hybrid runs DeepseekV3ForCausalLM"),
        ({"architectures": "DeepseekV3ForCausalLM"}, "is not known"),
        ({"architectures": None}, "is not known"),
        ({"model_type": ["kimi_k2"]}, "is not known"),
        ({"hidden_size": "7168"}, "hidden_size is '7168', expected int"),
        ({"hidden_size": 7168.0}, "hidden_size is 7168.0, expected int"),
        ({"hidden_size": True}, "hidden_size is True, expected int"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"q_lora_rank": "x"}, "q_lora_rank is 'x', expected int or null"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected bool"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, expected float"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected float"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_theta": 0}, "rope_theta is 0.0; it must be above 1"),
        ({"rope_theta": 1}, "rope_theta is 1.0; it must be above 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be above 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is known"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"scoring_func": "softmax"}, "only 'sigmoid' is known"),
        ({"topk_method": "greedy"}, "only 'noaux_tc' is known"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, not even"),
        ({"n_group": 7}, "n_routed_experts is not a multiple of n_group"),
        ({"topk_group": 2}, "topk_group 2 exceeds n_group 1"),
        (
            {"n_group": 384, "topk_group": 384},
            "n_group 384 leaves fewer than 2 of 384 experts a group",
        ),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok 385 exceeds the experts that can be chosen"),
        ({"n_group": 8, "num_experts_per_tok": 49}, "num_experts_per_tok 49 exceeds"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace is out of range"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is out of range"),
        ({"num_hidden_layers": 10**9}, "experts in all layers; at most 1000000"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object or null"),
        ({"rope_scaling": {**ROPE, "type": "linear"}}, "rope_scaling.type is 'linear'"),
        ({"rope_scaling": {**ROPE, "beta_fast": None}}, "rope_scaling.beta_fast is None, expected float"),
        ({"rope_scaling": {**ROPE, "factor": 0.5}}, "rope_scaling.factor and its original length"),
        ({"rope_scaling": {**ROPE, "mscale": 0}}, "mscales must be above 0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'; only 'fp8' is known"),
        ({"quantization_config": "fp8"}, "quant_method is 'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt is 'e5m2'"),
        (
            {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}},
            "weight_block_size is [64, 64]; only [128, 128] is known",
        ),
    ],
)
def test_what_cannot_be_run_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(changed(**fields))
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*VALUES, *(f"rope_scaling.{key}" for key in ROPE)]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_value_is_read_or_refused(field: str, value: Any) -> None:
    outer, _, inner = field.partition(".")
    values = changed(**{outer: {**ROPE, inner: value} if inner else value})
    try:
        config = ModelConfig.from_dict(values)
    except ConfigError:
        return
    assert len(config.moe_layers) <= config.num_hidden_layers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[]", "holds a JSON list, expected an object"),
    ],
)
def test_a_file_without_an_object_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_an_absent_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_json(tmp_path)


def test_groups_of_two_experts_and_one_group_of_one_can_be_ranked() -> None:
    assert ModelConfig.from_dict(changed(n_group=192, topk_group=4)).n_group == 192
    one = ModelConfig.from_dict(changed(n_routed_experts=1, num_experts_per_tok=1))
    assert one.n_routed_experts == 1


@pytest.mark.parametrize(("ids", "read"), [(5, {5}), ([6, 7], {6, 7}), (99, {99})])
def test_eos_is_an_id_or_several(ids: Any, read: set[int]) -> None:
    assert eos_token_ids({"eos_token_id": ids}, Path("config.json"), 100) == read


@pytest.mark.parametrize("ids", [None, [], "2", [2, "3"], -1, [True], 2.0, 100, [2, 100]])
def test_eos_must_be_ids_of_the_vocabulary(ids: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        eos_token_ids({"eos_token_id": ids}, Path("dir/generation_config.json"), 100)
    assert str(caught.value) == (
        f"dir/generation_config.json: eos_token_id is {ids!r}, expected one or several token ids below 100. Use the "
        "generation_config.json published with the checkpoint."
    )
