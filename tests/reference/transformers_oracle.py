"""transformers' DeepseekV3 as an independent implementation: float32, eager, on the dequantised weights of a
checkpoint directory. Reads the files with the safetensors library, not with ours.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP


def read_dequantised(directory: Path) -> dict[str, Tensor]:
    """Every tensor in float32, block-fp8 ones multiplied by their block's scale, element by element."""
    raw: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as f:
            raw.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
    out = {}
    for name, tensor in raw.items():
        if name.endswith("_scale_inv"):
            continue
        value = tensor.to(torch.float32)
        scale = raw.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = value.shape
            value = value * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        out[name] = value
    return out


def load(directory: Path) -> DeepseekV3ForCausalLM:
    """The directory's model in transformers, with our config fields translated to the ones it knows."""
    values: dict[str, Any] = json.loads((directory / "config.json").read_text())
    freq = values["moe_layer_freq"]
    ours_alone = (
        "quantization_config",
        "auto_map",
        "architectures",
        "model_type",
        "torch_dtype",
        "moe_layer_freq",
    )
    for key in (*ours_alone, "num_nextn_predict_layers"):
        values.pop(key, None)
    values["num_key_value_heads"] = values["num_attention_heads"]  # MLA has no grouped queries
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = DeepseekV3Config(**values, num_nextn_predict_layers=0, **eager)
    model = DeepseekV3ForCausalLM(config).eval().to(torch.float32)
    for i, layer in enumerate(model.model.layers):
        if i >= config.first_k_dense_replace and i % freq:  # transformers knows no moe_layer_freq
            layer.mlp = DeepseekV3MLP(config, intermediate_size=config.intermediate_size)
    state = _fuse_experts(read_dequantised(directory), config.n_routed_experts)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(missing) <= tied, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def _fuse_experts(state: dict[str, Tensor], n_experts: int) -> dict[str, Tensor]:
    """Per-expert matrices -> the stacked ones transformers keeps in memory (gate first, then up)."""
    fused = {name: t for name, t in state.items() if ".mlp.experts." not in name}
    prefixes = {name.split(".experts.")[0] for name in state if ".mlp.experts." in name}
    for prefix in prefixes:
        each = [f"{prefix}.experts.{e}" for e in range(n_experts)]
        fused[f"{prefix}.experts.gate_up_proj"] = torch.stack(
            [torch.cat((state[f"{e}.gate_proj.weight"], state[f"{e}.up_proj.weight"])) for e in each]
        )
        fused[f"{prefix}.experts.down_proj"] = torch.stack([state[f"{e}.down_proj.weight"] for e in each])
    return fused


@torch.no_grad()
def logits(model: DeepseekV3ForCausalLM, token_ids: list[int]) -> Tensor:
    """float32 [len(token_ids), vocab_size]."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(model: DeepseekV3ForCausalLM, token_ids: list[int], n: int) -> list[int]:
    """The n most likely next tokens, one after another, by whole passes."""
    ids = list(token_ids)
    for _ in range(n):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[len(token_ids) :]
