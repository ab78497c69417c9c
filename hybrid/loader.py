"""From a directory to a checked model: every tensor that the config implies, and no other, as it must be.

`expected_tensors` is the one list of the DeepSeek-V3 family's tensor names. Reading safetensors is
offload/checkpoint.py's concern; building layers from the tensors is hybrid/model.py's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from hybrid.chat import ChatTemplate
from hybrid.config import ModelConfig, eos_token_ids, read_json
from hybrid.tokenizer import CONFIG_FILE, Tokenizer, read_tokenizer_config
from offload.checkpoint import INDEX_NAME, SCALE_SUFFIX, Checkpoint
from offload.errors import CheckpointError, ConfigError, TokenizerError
from offload.fp8 import scale_shape
from offload.shard import AGAIN

Kind = Literal["embedding", "head", "norm", "attention", "dense", "shared", "routed", "router", "router_bias"]

FP8 = "F8_E4M3"
DTYPES_OF: dict[str, tuple[str, ...]] = {
    "embedding": ("BF16", "F32"),
    "head": (FP8, "BF16", "F32"),
    "norm": ("BF16", "F32"),
    "attention": (FP8, "BF16", "F32"),
    "dense": (FP8, "BF16", "F32"),
    "shared": (FP8, "BF16", "F32"),
    "routed": (FP8,),
    "router": ("BF16", "F32"),
    "router_bias": ("F32",),
}
PUBLISHED = "Use the config.json and the safetensors files published together."
END_OF_TURN = "<|im_end|>"
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")


class Expected(NamedTuple):
    """What a tensor must be; `kind` decides its dtype (DTYPES_OF)."""

    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A directory that holds a model, checked."""

    directory: Path
    config: ModelConfig
    eos_token_ids: frozenset[int]
    max_new_tokens: int | None
    """What generation_config.json allows a reply where the request says nothing."""
    checkpoint: Checkpoint


def expected_tensors(config: ModelConfig) -> dict[str, Expected]:
    """Every tensor of the model but the fp8 scales (see `scale_name`), in the order of computation."""
    hidden, vocab = config.hidden_size, config.vocab_size
    tensors = {"model.embed_tokens.weight": Expected((vocab, hidden), "embedding")}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = Expected((hidden,), "norm")
        tensors.update(_attention(config, f"{prefix}.self_attn"))
        tensors[f"{prefix}.post_attention_layernorm.weight"] = Expected((hidden,), "norm")
        if config.is_moe(layer):
            tensors.update(_moe(config, f"{prefix}.mlp"))
        else:
            tensors.update(_swiglu(f"{prefix}.mlp", hidden, config.intermediate_size, "dense"))
    tensors["model.norm.weight"] = Expected((hidden,), "norm")
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = Expected((vocab, hidden), "head")
    return tensors


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_rank, q_rows = config.q_lora_rank, heads * config.qk_head_dim
    if q_rank is None:
        yield f"{prefix}.q_proj.weight", Expected((q_rows, hidden), "attention")
    else:
        yield f"{prefix}.q_a_proj.weight", Expected((q_rank, hidden), "attention")
        yield f"{prefix}.q_a_layernorm.weight", Expected((q_rank,), "norm")
        yield f"{prefix}.q_b_proj.weight", Expected((q_rows, q_rank), "attention")
    kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", Expected((config.latent_dim, hidden), "attention")
    yield f"{prefix}.kv_a_layernorm.weight", Expected((latent,), "norm")
    yield f"{prefix}.kv_b_proj.weight", Expected((kv_rows, latent), "attention")
    yield f"{prefix}.o_proj.weight", Expected((hidden, heads * config.v_head_dim), "attention")


def _moe(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield f"{prefix}.gate.weight", Expected((experts, hidden), "router")
    yield f"{prefix}.gate.e_score_correction_bias", Expected((experts,), "router_bias")
    for expert in range(experts):
        yield from _swiglu(f"{prefix}.experts.{expert}", hidden, width, "routed")
    if config.n_shared_experts:
        yield from _swiglu(f"{prefix}.shared_experts", hidden, config.n_shared_experts * width, "shared")


def _swiglu(prefix: str, hidden: int, width: int, kind: Kind) -> Iterator[tuple[str, Expected]]:
    yield f"{prefix}.gate_proj.weight", Expected((width, hidden), kind)
    yield f"{prefix}.up_proj.weight", Expected((width, hidden), kind)
    yield f"{prefix}.down_proj.weight", Expected((hidden, width), kind)


def open_model(directory: Path) -> ModelFiles:
    """Open a model directory and check config, index, headers, shapes, dtypes and scales.

    Weights' codes are not read (a terabyte): kernels check an expert's when it is first used, and
    `hybrid inspect --full` checks all.

    Raises:
        CheckpointError: the directory is not a model, or its tensors are damaged or not what the config says.
        ConfigError: config.json or generation_config.json is unusable.
        TokenizerError: no generation_config.json says what ends a reply, and tokenizer_config.json is unusable.
    """
    require_model_directory(directory)
    values = read_json(directory / "config.json")
    config = ModelConfig.from_dict(values)
    generation_file = directory / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    if "eos_token_id" in generation:
        eos = eos_token_ids(generation, generation_file, config.vocab_size)
    else:
        # config.json's ends a document; what ends K2's turns stands in generation_config.json alone.
        eos = eos_token_ids(values, directory / "config.json", config.vocab_size)
        eos |= _end_of_turn(directory / CONFIG_FILE, config.vocab_size)
    limit = generation.get("max_new_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigError(
            f"{generation_file}: max_new_tokens is {limit!r}, expected a number above 0 or none"
        )
    checkpoint = Checkpoint.open(directory)
    check_tensors(checkpoint, config, ignored_layers(values, config))
    checkpoint.check_scales()
    return ModelFiles(directory, config, eos, limit, checkpoint)


def _end_of_turn(tokenizer_config: Path, vocab_size: int) -> set[int]:
    """The id of K2's <|im_end|>, if the tokenizer has such a token."""
    added = read_tokenizer_config(tokenizer_config).get("added_tokens_decoder")
    if not isinstance(added, dict):
        return set()
    ids = {
        key for key, token in added.items() if isinstance(token, dict) and token.get("content") == END_OF_TURN
    }
    return {int(key) for key in ids if re.fullmatch("[0-9]{1,9}", key) and int(key) < vocab_size}


def open_text(directory: Path, config: ModelConfig) -> tuple[Tokenizer, ChatTemplate | None]:
    """The directory's tokenizer, and its chat template if it has one.

    Raises:
        TokenizerError: the tokenizer's files are damaged, or of another model.
        TemplateError: the template is unusable.
    """
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids and config.json's vocab_size is "
            f"{config.vocab_size}; they are of different models"
        )
    return tokenizer, ChatTemplate.load(directory, tokenizer)


def require_model_directory(path: Path) -> None:
    """Raises CheckpointError, saying what `path` is instead, unless it is a directory with a config.json."""
    try:
        problem = _not_a_model(path)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        remedy = f"Give the directory that holds config.json, {INDEX_NAME} and the safetensors files."
        raise CheckpointError(problem, file=path, remedy=remedy)


def _not_a_model(path: Path) -> str | None:
    if (path / "config.json").is_file():
        return None
    if not path.exists():
        return "no such directory"
    if path.is_file():
        return f"this is a {'GGUF file' if path.suffix == '.gguf' else 'file'}, not a model's directory"
    if not any(path.iterdir()):
        return "the directory is empty"
    if any(path.glob("*.gguf")):
        return "the directory holds GGUF files, not a safetensors checkpoint"
    return "the directory holds no config.json"


def ignored_layers(values: dict[str, Any], config: ModelConfig) -> range:
    """Layers that the checkpoint may hold and hybrid does not run: DeepSeek-V3's multi-token prediction."""
    count = values.get("num_nextn_predict_layers", 0)
    if type(count) is not int or count < 0:
        raise ConfigError(f"config.json: num_nextn_predict_layers is {count!r}, expected a number of layers")
    return range(config.num_hidden_layers, config.num_hidden_layers + count)


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, ignored: range) -> None:
    """Compare the checkpoint's tensors with the config.

    Args:
        ignored: layers beyond the model whose tensors may be present.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has the wrong shape or dtype; or a router's
            correction bias is not finite.
    """
    expected = expected_tensors(config)
    absent = [name for name in expected if name not in checkpoint]
    if absent:
        problem = f"the tensor is missing ({len(absent)} of {len(expected)} are); config.json implies it"
        raise CheckpointError(problem, file=checkpoint.directory, tensor=absent[0], remedy=PUBLISHED)
    for name, tensor in expected.items():
        _check_tensor(checkpoint, config, name, tensor)
    scales = {scale_name(name) for name in expected if checkpoint.info(name).dtype == FP8}
    for name in checkpoint.names:
        if name not in expected and name not in scales and not _is_ignored(name, ignored):
            problem = "the model that config.json describes has no such tensor"
            raise CheckpointError(problem, file=checkpoint.info(name).file, tensor=name, remedy=PUBLISHED)


def scale_name(name: str) -> str:
    """The tensor of block scales that belongs to the fp8 tensor `name`."""
    return name + SCALE_SUFFIX


def _is_ignored(name: str, layers: range) -> bool:
    match = LAYER_NAME.match(name)
    return (match is not None and int(match[1]) in layers) or name.endswith(".rotary_emb.inv_freq")


def _check_tensor(checkpoint: Checkpoint, config: ModelConfig, name: str, expected: Expected) -> None:
    info = checkpoint.info(name)

    def bad(problem: str, tensor: str = name) -> CheckpointError:
        file = checkpoint.info(tensor).file if tensor in checkpoint else info.file
        return CheckpointError(problem, file=file, tensor=tensor, remedy=PUBLISHED)

    if info.shape != expected.shape:
        raise bad(f"shape is {list(info.shape)}, but config.json implies {list(expected.shape)}")
    if info.dtype not in DTYPES_OF[expected.kind]:
        allowed = " or ".join(DTYPES_OF[expected.kind])
        raise bad(f"dtype is {info.dtype}; a tensor of kind {expected.kind} must be {allowed}")
    if info.dtype == FP8:
        scale, shape = scale_name(name), scale_shape(*expected.shape)
        if config.weight_block_size is None:
            raise bad(f"dtype is {FP8}, but config.json has no quantization_config")
        if scale not in checkpoint:
            raise bad("the block scales of this fp8 tensor are missing", scale)
        found = checkpoint.info(scale)
        if (found.dtype, found.shape) != ("F32", shape):
            raise bad(f"scales are {found.dtype} {list(found.shape)}, expected F32 {list(shape)}", scale)
    if expected.kind == "router_bias" and not torch.isfinite(checkpoint.tensor(name)).all():
        raise CheckpointError("holds NaN or infinite values", file=info.file, tensor=name, remedy=AGAIN)
