"""The embedded model as a torch module for training: K2's architecture, float32, whole documents at a time.

Parameters are laid out as training wants them (experts fused, down_proj transposed); `hybrid.demo.export`
gives them their published names and shapes. Inference is `hybrid.model`'s.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybrid.config import ModelConfig
from hybrid.demo.trainer.ops import Documents, Ops, Rope, tokens_per_expert
from hybrid.layers.rotary import RotaryEmbedding, softmax_scale
from offload.errors import UsageError

LATENT_NORM_EPS = 1e-6
"""DeepSeek-V3's latent norms keep this epsilon whatever rms_norm_eps says."""


class Observed(NamedTuple):
    """What a forward pass saw besides its output: largest attention logits [layers, heads] for QK-Clip, and
    tokens per expert [MoE layers, experts] for balancing."""

    peaks: Tensor
    loads: Tensor


def _matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
    """Normal weights of standard deviation gain / sqrt(inputs)."""
    return nn.Parameter(torch.randn(*shape) * gain * shape[-1] ** -0.5)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.q_lora_rank is None:
            raise UsageError("the trainer's model has a q_lora_rank, as K2 does; this config.json has none")
        self.heads, self.rope = config.num_attention_heads, config.qk_rope_head_dim
        self.kv_lora, hidden = config.kv_lora_rank, config.hidden_size
        self.q_a_proj = _matrix(config.q_lora_rank, hidden)
        self.q_a_layernorm = nn.Parameter(torch.ones(config.q_lora_rank))
        self.q_b_proj = _matrix(self.heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = _matrix(self.kv_lora + self.rope, hidden)
        self.kv_a_layernorm = nn.Parameter(torch.ones(self.kv_lora))
        self.kv_b_proj = _matrix(self.heads * (config.qk_nope_head_dim + config.v_head_dim), self.kv_lora)
        depth = (2 * config.num_hidden_layers) ** -0.5
        self.o_proj = _matrix(hidden, self.heads * config.v_head_dim, gain=depth)

    def forward(self, x: Tensor, docs: Documents, rope: Rope, ops: Ops) -> tuple[Tensor, Tensor]:
        """x [T,H] -> [T,H] and the largest logit of each head."""
        tokens = len(x)
        q = ops.rms_norm(F.linear(x, self.q_a_proj), self.q_a_layernorm, LATENT_NORM_EPS)
        q = F.linear(q, self.q_b_proj).view(tokens, self.heads, -1)
        latent, k_pe = F.linear(x, self.kv_a_proj_with_mqa).split((self.kv_lora, self.rope), -1)
        latent = ops.rms_norm(latent, self.kv_a_layernorm, LATENT_NORM_EPS)
        kv = F.linear(latent, self.kv_b_proj).view(tokens, self.heads, -1)
        out, peak = ops.attention(q, kv, k_pe, docs, rope)
        return F.linear(out.flatten(1), self.o_proj), peak


class Mlp(nn.Module):
    """SwiGLU; gate_proj and up_proj are one matrix."""

    def __init__(self, hidden: int, width: int, gain: float) -> None:
        super().__init__()
        self.gate_up = _matrix(2 * width, hidden)
        self.down_proj = _matrix(hidden, width, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj)


class Moe(nn.Module):
    bias: Tensor

    def __init__(self, config: ModelConfig, gain: float) -> None:
        super().__init__()
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.top_k, self.factor = config.num_experts_per_tok, config.routed_scaling_factor
        self.gate = _matrix(experts, config.hidden_size)
        self.register_buffer("bias", torch.zeros(experts))
        self.gate_up = _matrix(experts, 2 * width, config.hidden_size)
        self.down_t = nn.Parameter(torch.randn(experts, width, config.hidden_size) * gain * width**-0.5)
        self.shared = Mlp(config.hidden_size, width * config.n_shared_experts, gain)

    def forward(self, x: Tensor, ops: Ops, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T,H] -> [T,H], or what is at `rows` (int64 [R]) of it, and the tokens of each expert [E], at all rows."""
        ids, weights = ops.route(F.linear(x, self.gate), self.bias, self.top_k, self.factor)
        load = tokens_per_expert(ids, len(self.gate))
        if rows is not None:
            x, ids, weights = (each.index_select(0, rows) for each in (x, ids, weights))
        return ops.experts(x, ids, weights, self.gate_up, self.down_t) + self.shared(x), load


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        gain = (2 * config.num_hidden_layers) ** -0.5
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp: Moe | Mlp = (
            Moe(config, gain)
            if config.is_moe(index)
            else Mlp(config.hidden_size, config.intermediate_size, gain)
        )


class DemoModel(nn.Module):
    """Embedding, decoder layers, head. Weights are drawn from torch's generator.

    Raises:
        UsageError: a config without q_lora_rank.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.5)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        # A head that begins as the embedding has every token copied the same way from the start.
        self.lm_head = nn.Parameter(self.embed_tokens.detach() * 0.2)
        self._rope: Rope | None = None

    def rope(self, positions: int) -> Rope:
        """Tables of at least `positions` rows, on the model's device; a captured step needs them to stay."""
        if self._rope is None or len(self._rope.cos) < positions:
            device = self.embed_tokens.device
            table = torch.arange(max(positions, self.config.max_position_embeddings), device=device)
            cos, sin = RotaryEmbedding(self.config, device).at(table)
            self._rope = Rope(cos.contiguous(), sin.contiguous(), softmax_scale(self.config))
        return self._rope

    def decoder_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def moe_layers(self) -> list[Moe]:
        return [layer.mlp for layer in self.decoder_layers() if isinstance(layer.mlp, Moe)]

    def hidden_states(
        self, token_ids: Tensor, docs: Documents, rows: Tensor | None = None
    ) -> tuple[Tensor, Observed]:
        """token_ids int64 [T] of whole documents -> normed hidden states [T,H], or [R,H] at `rows` (int64 [R])
        alone, which spares the last layer the others' experts."""
        rope, ops = self.rope(docs.longest), self.ops
        x = self.embed_tokens.index_select(0, token_ids)
        peaks, loads = [], []
        *_, last = layers = self.decoder_layers()
        for layer in layers:
            attended, peak = layer.self_attn(
                ops.rms_norm(x, layer.input_layernorm, layer.eps), docs, rope, ops
            )
            x = x + attended
            normed = ops.rms_norm(x, layer.post_attention_layernorm, layer.eps)
            peaks.append(peak)
            wanted = rows if layer is last else None  # which has experts: the dense layers are the first
            if isinstance(layer.mlp, Moe):
                out, load = layer.mlp(normed, ops, wanted)
                loads.append(load)
            else:
                out = layer.mlp(normed)
            x = (x if wanted is None else x.index_select(0, wanted)) + out
        seen = Observed(torch.stack(peaks), torch.stack(loads))
        return ops.rms_norm(x, self.norm, self.config.rms_norm_eps), seen

    def logits(self, token_ids: Tensor, docs: Documents) -> tuple[Tensor, Observed]:
        """token_ids int64 [T] of whole documents -> next-token logits float32 [T, vocab], and what was observed."""
        hidden, seen = self.hidden_states(token_ids, docs)
        return F.linear(hidden, self.lm_head), seen

    def loss(self, token_ids: Tensor, targets: Tensor, docs: Documents) -> tuple[Tensor, Observed]:
        """Mean cross entropy over the positions whose `targets` [T] are not negative, one at least."""
        if targets.is_cuda:  # which would have to be waited for, to know how many they are
            logits, seen = self.logits(token_ids, docs)
            return F.cross_entropy(logits, targets, ignore_index=-1), seen
        scored = (targets >= 0).nonzero().squeeze(1)
        hidden, seen = self.hidden_states(token_ids, docs, scored)
        return F.cross_entropy(F.linear(hidden, self.lm_head), targets[scored]), seen
