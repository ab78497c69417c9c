"""The embedded model's shape: K2's config.json with smaller sizes. Every ratio that makes K2 K2 stays: 384
experts, top-8, one shared expert, one dense layer first, low-rank queries, a shared rope key, YaRN."""

from typing import Any

from hybrid.presets import config_values
from hybrid.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "moe_intermediate_size": 32,
    "q_lora_rank": 96,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_scaling.factor": 4.0,
    "rope_scaling.original_max_position_embeddings": 1024,
}


def config_fields(tokenizer: Tokenizer, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of the embedded model for a tokenizer; `sizes` on top of its own."""
    return config_values("tiny", SIZES | (sizes or {}), None, tokenizer)
