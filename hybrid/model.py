"""The model: token ids -> embedding -> decoder layers -> norm -> head -> logits, in one readable forward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.kv_cache import LatentCache
from hybrid.layers.attention import AttentionWeights, LatentAttention
from hybrid.layers.moe import DenseMLP, MoE, RoutedExperts, SwigluWeights
from hybrid.layers.norm import RMSNorm
from hybrid.layers.ops import DeviceOps, RoutingRule
from hybrid.layers.rotary import RotaryEmbedding
from hybrid.timing import Stopwatch
from offload.checkpoint import Checkpoint
from offload.fp8 import Weight

LATENT_NORM_EPS = 1e-6
"""The norms inside attention use this whatever rms_norm_eps says, as the published model's code does."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Pre-norm attention, then pre-norm feed-forward, each added to the residual stream."""

    attention_norm: RMSNorm
    attention: LatentAttention
    mlp_norm: RMSNorm
    mlp: DenseMLP | MoE


class Model:
    """A DeepSeek-V3-shaped model on one device, its routed experts elsewhere.

    Args:
        checkpoint: checked against `config` already (hybrid/loader.py).
        ops: what the device can do.
        experts: runs one layer's routed experts.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, ops: DeviceOps, experts: RoutedExperts
    ) -> None:
        self.config = config
        self.ops = ops
        parts = _Parts(config, checkpoint, ops)
        self.rotary = RotaryEmbedding(config, ops.device)
        self.embedding = checkpoint.tensor(
            "model.embed_tokens.weight"
        )  # stays on the host; rows are looked up
        self.layers = [parts.layer(i, experts) for i in range(config.num_hidden_layers)]
        self.norm = parts.norm("model.norm", config.rms_norm_eps)
        self.head = parts.weight("model.embed_tokens" if config.tie_word_embeddings else "lm_head")
        self.watch = parts.watch
        self.resident = parts.placed
        """Every weight that each token is multiplied with: all but the embedding and the routed experts."""

    def new_cache(self, context: int | None = None) -> LatentCache:
        """An empty cache for up to `context` tokens; None: for as many as the model was made for."""
        return LatentCache(self.config, self.ops.device, context=context)

    def prefill(
        self, token_ids: list[int], cache: LatentCache, *, between_layers: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Compute the tokens that follow `cache`'s and add them to it.

        Args:
            between_layers: called before each layer; may raise to abandon the pass, which leaves `cache` as it was.

        Returns:
            float32 [len(token_ids), hidden]: the last layer's output, for `logits`.
        """
        cache.reserve(len(token_ids))
        cos, sin = self.rotary.at(
            torch.arange(cache.length, cache.length + len(token_ids)).to(self.ops.device)
        )
        self.watch.lap("other")
        hidden = self._embed(token_ids)
        for layer in self.layers:
            between_layers()
            hidden = hidden + layer.attention.prefill(layer.attention_norm(hidden), cos, sin, cache)
            self.watch.lap("attention")
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden), decode=False)
        cache.advance(token_ids)
        return hidden

    def decode(
        self,
        token_ids: list[int],
        caches: list[LatentCache],
        *,
        between_layers: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """One next token for each of several sequences: token_ids[t] follows caches[t]'s tokens.

        On a CPU each row's bits are the same whatever other rows there are.

        Args:
            between_layers: as for `prefill`; a token whose experts come from disk takes many seconds.

        Returns:
            float32 [T, hidden]: the last layer's output, for `logits`.
        """
        for cache in caches:
            cache.reserve(1)
        cos, sin = self.rotary.at(torch.tensor([cache.length for cache in caches], device=self.ops.device))
        self.watch.lap("other")
        hidden = self._embed(token_ids)
        for layer in self.layers:
            between_layers()
            hidden = hidden + layer.attention.decode(layer.attention_norm(hidden), cos, sin, caches)
            self.watch.lap("attention")
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden), decode=True)
        for token_id, cache in zip(token_ids, caches, strict=True):
            cache.advance([token_id])
        return hidden

    def logits(self, hidden: Tensor, *, decode: bool) -> Tensor:
        """float32 [T, hidden] -> [T, vocab_size] on the CPU."""
        self.watch.lap("other")
        logits = self.ops.linear(self.norm(hidden), self.head, decode=decode).cpu()
        self.watch.lap("head")
        return logits

    def _embed(self, token_ids: list[int]) -> Tensor:
        return self.embedding[torch.tensor(token_ids)].float().to(self.ops.device)


class _Parts:
    """Builds layers from a checkpoint's names."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, ops: DeviceOps) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.ops = ops
        self.watch = Stopwatch()
        self.placed: list[Weight] = []
        self.rule = RoutingRule(
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )

    def weight(self, name: str) -> Weight:
        weight = self.ops.place(self.checkpoint.weight(name))
        self.placed.append(weight)
        return weight

    def norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self.checkpoint.tensor(f"{name}.weight").float().to(self.ops.device), eps)

    def layer(self, index: int, experts: RoutedExperts) -> DecoderLayer:
        prefix, eps = f"model.layers.{index}", self.config.rms_norm_eps
        return DecoderLayer(
            self.norm(f"{prefix}.input_layernorm", eps),
            LatentAttention(self.config, index, self._attention(f"{prefix}.self_attn"), self.ops),
            self.norm(f"{prefix}.post_attention_layernorm", eps),
            self._moe(index, f"{prefix}.mlp", experts)
            if self.config.is_moe(index)
            else self._mlp(f"{prefix}.mlp"),
        )

    def _attention(self, prefix: str) -> AttentionWeights:
        lora = self.config.q_lora_rank is not None
        return AttentionWeights(
            q_a=self.weight(f"{prefix}.q_a_proj") if lora else None,
            q_a_norm=self.norm(f"{prefix}.q_a_layernorm", LATENT_NORM_EPS) if lora else None,
            q_b=self.weight(f"{prefix}.q_b_proj" if lora else f"{prefix}.q_proj"),
            kv_a=self.weight(f"{prefix}.kv_a_proj_with_mqa"),
            kv_a_norm=self.norm(f"{prefix}.kv_a_layernorm", LATENT_NORM_EPS),
            kv_b=self.weight(f"{prefix}.kv_b_proj"),
            o=self.weight(f"{prefix}.o_proj"),
        )

    def _mlp(self, prefix: str) -> DenseMLP:
        weights = SwigluWeights(*(self.weight(f"{prefix}.{part}_proj") for part in ("gate", "up", "down")))
        return DenseMLP(weights, self.ops, self.watch)

    def _moe(self, index: int, prefix: str, experts: RoutedExperts) -> MoE:
        bias = self.checkpoint.tensor(f"{prefix}.gate.e_score_correction_bias").float().to(self.ops.device)
        shared = self._mlp(f"{prefix}.shared_experts") if self.config.n_shared_experts else None
        return MoE(
            index, self.weight(f"{prefix}.gate"), bias, self.rule, experts, shared, self.ops, self.watch
        )
