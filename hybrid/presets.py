"""What `hybrid synth` can be asked for: K2's shape, the presets, and fields set on top.

Writing the checkpoint is hybrid/synth.py's concern.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from hybrid.config import ModelConfig, RopeScaling, read_json
from hybrid.tokenizer import Tokenizer
from offload.errors import UsageError

K2_SHAPE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {  # every matrix has ragged blocks
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 288,
        "moe_intermediate_size": 48,
        "q_lora_rank": 72,
        "kv_lora_rank": 56,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
    },
    "slice": {"num_hidden_layers": 3, "n_routed_experts": 48},
}


def config_values(
    preset: str, overrides: dict[str, Any], like: Path | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    """config.json's fields for a checkpoint of `preset`.

    Args:
        overrides: fields on top of the preset's, `rope_scaling.factor` and its like included.
        like: directory whose config.json is taken instead of K2's shape.
        tokenizer: what `vocab_size` has to cover.

    Raises:
        UsageError: an unknown preset or field, or a vocabulary too small for the tokenizer.
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}; use {' or '.join(PRESETS)}")
    values = dict(K2_SHAPE) if like is None else read_json(like / "config.json")
    values.pop("auto_map", None)  # names code that does not come along
    values.update(PRESETS[preset])
    if like is None:
        named = {"bos_token_id": "[BOS]", "eos_token_id": "[EOS]"}
        values.update({key: tokenizer.special_ids[name] for key, name in named.items()})
        values["vocab_size"] = tokenizer.vocab_size
    values["num_nextn_predict_layers"] = 0  # such layers are not written
    values["quantization_config"] = K2_SHAPE["quantization_config"]  # what is written, whatever `like` has
    known = {f.name for f in fields(ModelConfig)} - {"weight_block_size"}
    for key, value in overrides.items():
        outer, _, inner = key.partition(".")
        if inner and outer == "rope_scaling" and inner in {f.name for f in fields(RopeScaling)}:
            if not isinstance(values.get("rope_scaling"), dict):
                raise UsageError(
                    f"--set {key}: rope_scaling is {values.get('rope_scaling')!r}, not an object"
                )
            values["rope_scaling"] = {**values["rope_scaling"], inner: value}
        elif key in known:
            values[key] = value
        else:
            raise UsageError(f"--set {key}: config.json has no such field that matters to the model")
    values["num_key_value_heads"] = values.get("num_attention_heads")
    vocab = values.get("vocab_size")
    if type(vocab) is int and vocab < tokenizer.vocab_size:
        raise UsageError(f"vocab_size is {vocab}, but the tokenizer has {tokenizer.vocab_size} ids")
    return values
