"""A trained model as files: K2's tensor names, block-fp8, shards with an index, and the sidecar files; and back."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hybrid.chat import TEMPLATE_FILE
from hybrid.config import ModelConfig
from hybrid.demo.trainer.model import Attention, DemoModel, Mlp, Moe
from hybrid.loader import LAYER_NAME, expected_tensors, open_model
from hybrid.tokenizer import CONFIG_FILE, RANKS_FILE, Tokenizer
from offload.checkpoint import INDEX_NAME, SCALE_SUFFIX
from offload.fp8 import quantize

LAYERS_A_SHARD = 3
_QUANTIZED = ("attention", "dense", "shared", "routed")


def published(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """Views of the model's parameters under their published names and in their published shapes."""
    yield "model.embed_tokens.weight", model.embed_tokens
    for i, layer in enumerate(model.decoder_layers()):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", layer.input_layernorm
        yield f"{prefix}.post_attention_layernorm.weight", layer.post_attention_layernorm
        yield from _attention(f"{prefix}.self_attn", layer.self_attn)
        yield from (
            _moe(f"{prefix}.mlp", layer.mlp)
            if isinstance(layer.mlp, Moe)
            else _mlp(f"{prefix}.mlp", layer.mlp)
        )
    yield "model.norm.weight", model.norm
    yield "lm_head.weight", model.lm_head


def _attention(prefix: str, attention: Attention) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in attention.named_parameters():
        yield f"{prefix}.{name}.weight", parameter


def _mlp(prefix: str, mlp: Mlp) -> Iterator[tuple[str, Tensor]]:
    gate, up = mlp.gate_up.chunk(2)
    yield f"{prefix}.gate_proj.weight", gate
    yield f"{prefix}.up_proj.weight", up
    yield f"{prefix}.down_proj.weight", mlp.down_proj


def _moe(prefix: str, moe: Moe) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.gate.weight", moe.gate
    yield f"{prefix}.gate.e_score_correction_bias", moe.bias
    yield from _mlp(f"{prefix}.shared_experts", moe.shared)
    for e in range(len(moe.gate)):
        gate, up = moe.gate_up[e].chunk(2)
        yield f"{prefix}.experts.{e}.gate_proj.weight", gate
        yield f"{prefix}.experts.{e}.up_proj.weight", up
        yield f"{prefix}.experts.{e}.down_proj.weight", moe.down_t[e].T


@torch.no_grad()
def export(model: DemoModel, config: dict[str, Any], source: Path, out: Path) -> Path:
    """Write the model to the directory `out`; what an earlier export left there goes, once all is written. -> `out`.

    Args:
        config: config.json's fields.
        source: where the tokenizer files and the chat template are taken from.

    Raises:
        OSError: the disk is full or refuses; `out` is as it was.
    """
    kinds = expected_tensors(model.config)
    tensors: dict[str, Tensor] = {}
    for name, parameter in published(model):
        tensor = parameter.detach().float().cpu().contiguous()
        kind = kinds[name].kind
        if kind in _QUANTIZED and tensor.dim() == 2:
            tensors[name], tensors[name + SCALE_SUFFIX] = quantize(tensor)
        else:
            tensors[name] = tensor if kind == "router_bias" else tensor.to(torch.bfloat16)
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        _write_weights(tensors, model.config.num_hidden_layers, draft)
        _write_rest(config, source, draft)
        out.mkdir(exist_ok=True)
        for old in out.glob("model*.safetensors*"):
            old.unlink()
        for file in draft.iterdir():
            file.replace(out / file.name)
    except SafetensorError as error:
        raise OSError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _write_rest(config: dict[str, Any], source: Path, out: Path) -> None:
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    end = Tokenizer.load(source).special_ids["<|im_end|>"]
    generation = {"max_length": config["max_position_embeddings"], "eos_token_id": end, "temperature": 0.6}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for name in (RANKS_FILE, CONFIG_FILE, TEMPLATE_FILE):
        shutil.copyfile(source / name, out / name)


def _write_weights(tensors: dict[str, Tensor], layers: int, out: Path) -> None:
    shards = -(-layers // LAYERS_A_SHARD)
    held: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        layer = LAYER_NAME.match(name)
        at = int(layer[1]) // LAYERS_A_SHARD if layer else 0 if "embed_tokens" in name else shards - 1
        held[at][name] = tensor.clone()
    weight_map = {}
    for number, shard in enumerate(held, 1):
        file = f"model-{number}-of-{shards}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        weight_map.update(dict.fromkeys(shard, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX_NAME).write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")


@torch.no_grad()
def read_back(directory: Path, model: DemoModel) -> None:
    """Fill `model` with an exported directory's dequantised weights."""
    checkpoint = open_model(directory).checkpoint
    for name, parameter in published(model):
        if name.endswith("e_score_correction_bias"):
            parameter.copy_(checkpoint.tensor(name))
        elif parameter.dim() == 2:
            parameter.copy_(checkpoint.weight(name.removesuffix(".weight")).dequantize())
        else:
            parameter.copy_(checkpoint.tensor(name).float())


def config_of(directory: Path) -> ModelConfig:
    return ModelConfig.from_file(directory / "config.json")
