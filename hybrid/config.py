"""`ModelConfig`: config.json's own names, read strictly; `RuntimeConfig`: how to run it.

Nothing architectural has a default: a field that a checkpoint leaves out is an error, because a silent
default is how a model comes out almost right.
"""

import dataclasses
import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from offload.errors import ConfigError

ARCHITECTURES = ("DeepseekV3ForCausalLM",)
MODEL_TYPES = ("kimi_k2", "deepseek_v3")
MAX_EXPERTS = 1_000_000  # K2 has 23,424; a bound on what a hostile config.json makes us enumerate


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` (int, float, bool, str, or one of these or None), or a ConfigError."""
    options = get_args(hint) if get_origin(hint) is not None else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and type(value) in (int, float) and abs(value) < 1e300:
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
    wanted = " or ".join("null" if o is type(None) else o.__name__ for o in options)
    raise ConfigError(f"config.json: {name} is {_brief(value)}, expected {wanted}")


def _brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_fields(
    cls: type, values: dict[str, Any], *, prefix: str = "", but: Container[str] = ()
) -> dict[str, Any]:
    """The dataclass `cls`'s scalar fields (all `but` some) out of `values`, each present and of its type."""
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.name in but:
            continue
        if f.name not in values:
            raise ConfigError(
                f"config.json: field {prefix + f.name!r} is missing. Use the config.json published with the "
                "checkpoint; no value is assumed."
            )
        out[f.name] = _typed(prefix + f.name, values[f.name], hints[f.name])
    return out


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN (arXiv:2309.00071) as DeepSeek-V3 uses it."""

    type: str
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @classmethod
    def from_dict(cls, values: Any) -> "RopeScaling":
        if not isinstance(values, dict):
            raise ConfigError(f"config.json: rope_scaling is {values!r}, expected an object or null")
        if "type" not in values and "rope_type" in values:
            values = {**values, "type": values["rope_type"]}
        rope = cls(**_read_fields(cls, values, prefix="rope_scaling."))
        if rope.type != "yarn":
            raise ConfigError(
                f"config.json: rope_scaling.type is {rope.type!r}; only 'yarn' (or null) is known"
            )
        if not rope.factor >= 1 or rope.original_max_position_embeddings < 1:
            raise ConfigError("config.json: rope_scaling.factor and its original length must be at least 1")
        if not (rope.beta_fast > 0 and rope.beta_slow > 0 and rope.mscale > 0 and rope.mscale_all_dim > 0):
            raise ConfigError("config.json: rope_scaling's beta_fast, beta_slow and mscales must be above 0")
        return rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A DeepSeek-V3-shaped model. Names and meaning are config.json's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    intermediate_size: int
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    # multi-head latent attention
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    # mixture of experts
    first_k_dense_replace: int
    moe_layer_freq: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    n_group: int
    topk_group: int
    topk_method: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    # read separately
    rope_scaling: RopeScaling | None
    weight_block_size: tuple[int, int] | None
    """Block of `weight_scale_inv` (rows, columns); None: no tensor is fp8."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read config.json's dict.

        Raises:
            ConfigError: unknown architecture, a missing or mistyped field, or fields that contradict
                each other. Unknown extra fields are ignored.
        """
        model_type, architectures = values.get("model_type"), values.get("architectures")
        listed = architectures if isinstance(architectures, list) else []
        if model_type not in MODEL_TYPES or not any(name in ARCHITECTURES for name in listed):
            raise ConfigError(
                f"config.json: model_type {_brief(model_type)} with architectures {_brief(architectures)} is not "
                f"known; hybrid runs {', '.join(ARCHITECTURES)} with model_type {' or '.join(MODEL_TYPES)}"
            )
        if "rope_scaling" not in values:
            raise ConfigError("config.json: field 'rope_scaling' is missing. No value is assumed.")
        rope = values["rope_scaling"]
        separate: dict[str, Any] = {
            "rope_scaling": None if rope is None else RopeScaling.from_dict(rope),
            "weight_block_size": _weight_block_size(values.get("quantization_config")),
        }
        config = cls(**_read_fields(cls, values, but=separate), **separate)
        config._check()
        return config

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read `path` (a config.json). Raises ConfigError, naming the file, on anything unusable."""
        return cls.from_dict(read_json(path))

    def _check(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(f"config.json: {message}")

        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name != "first_k_dense_replace" and type(value) is int:
                need(value >= (0 if f.name == "n_shared_experts" else 1), f"{f.name} is {value}")
        need(self.hidden_act == "silu", f"hidden_act is {self.hidden_act!r}; only 'silu' is known")
        need(not self.attention_bias, "attention_bias is true; only bias-free attention is known")
        need(
            self.scoring_func == "sigmoid", f"scoring_func is {self.scoring_func!r}; only 'sigmoid' is known"
        )
        need(self.topk_method == "noaux_tc", f"topk_method is {self.topk_method!r}; only 'noaux_tc' is known")
        need(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {self.qk_rope_head_dim}, not even")
        need(self.rms_norm_eps > 0, f"rms_norm_eps is {self.rms_norm_eps}; it must be above 0")
        need(self.rope_theta > 1, f"rope_theta is {self.rope_theta}; it must be above 1")
        need(self.n_routed_experts % self.n_group == 0, "n_routed_experts is not a multiple of n_group")
        need(
            self.n_group == 1 or self.n_routed_experts >= 2 * self.n_group,
            f"n_group {self.n_group} leaves fewer than 2 of {self.n_routed_experts} experts a group, which is "
            "ranked by its two best",
        )
        need(self.topk_group <= self.n_group, f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        need(
            self.num_experts_per_tok <= self.topk_group * (self.n_routed_experts // self.n_group),
            f"num_experts_per_tok {self.num_experts_per_tok} exceeds the experts that can be chosen",
        )
        need(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers, "first_k_dense_replace is out of range"
        )
        experts = self.num_hidden_layers * self.n_routed_experts
        need(experts <= MAX_EXPERTS, f"{experts} experts in all layers; at most {MAX_EXPERTS} are allowed")

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        return [i for i in range(self.num_hidden_layers) if self.is_moe(i)]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Floats per token and layer in the KV cache: the latent, then the roped key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def _weight_block_size(quantization: Any) -> tuple[int, int] | None:
    if quantization is None:
        return None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(f"config.json: quantization_config.quant_method is {method!r}; only 'fp8' is known")
    if quantization.get("fmt") != "e4m3":
        raise ConfigError(
            f"config.json: quantization_config.fmt is {quantization.get('fmt')!r}; only 'e4m3' is known"
        )
    block = quantization.get("weight_block_size")
    if block != [128, 128]:
        raise ConfigError(
            f"config.json: quantization_config.weight_block_size is {block!r}; only [128, 128] is known"
        )
    return (128, 128)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError naming the file if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model directory holds config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}). Download the file again.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a JSON {type(values).__name__}, expected an object")
    return values


def eos_token_ids(values: dict[str, Any], file: Path, vocab_size: int) -> frozenset[int]:
    """The field eos_token_id of a config.json or generation_config.json. Raises ConfigError, naming `file`."""
    ids = values.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    if not listed or not all(type(i) is int and 0 <= i < vocab_size for i in listed):
        raise ConfigError(
            f"{file}: eos_token_id is {_brief(ids)}, expected one or several token ids below {vocab_size}. Use the "
            f"{file.name} published with the checkpoint."
        )
    return frozenset(listed)


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How a model is run on this machine. Sizes are bytes; None lets hybrid choose."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    experts: Literal["auto", "mmap"] = "auto"
    ram: int | None = None
    vram: int | None = None
    threads: int | None = None
    context: int | None = None
    level: str | None = None
