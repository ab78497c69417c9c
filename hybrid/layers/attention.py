"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), in both of its forms side by side.

Plain, for prefill: the cached latents are expanded to keys and values, a block of the context at a time.
Absorbed, for decode: the query is carried into latent space instead and the latents serve as keys and values
as they lie. Each is the other's oracle.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.kv_cache import LatentCache
from hybrid.layers.norm import RMSNorm
from hybrid.layers.ops import DeviceOps
from hybrid.layers.rotary import rotate, softmax_scale
from offload.fp8 import Weight

CONTEXT_BLOCK = 512
"""Context positions whose keys and values exist at a time in prefill; blocks start at position 0."""


class AttentionWeights(NamedTuple):
    """`q_a` and `q_a_norm` are None where q_lora_rank is null; `q_b` is then q_proj."""

    q_a: Weight | None
    q_a_norm: RMSNorm | None
    q_b: Weight
    kv_a: Weight
    kv_a_norm: RMSNorm
    kv_b: Weight
    o: Weight


class LatentAttention:
    """One layer's attention over latent caches."""

    def __init__(self, config: ModelConfig, layer: int, weights: AttentionWeights, ops: DeviceOps) -> None:
        self.layer = layer
        self.w = weights
        self.ops = ops
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_lora = config.kv_lora_rank
        self.scale = softmax_scale(config)

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache) -> Tensor:
        """x [T, hidden]: the T tokens that follow cache's; their latents are written. -> [T, hidden]."""
        start, n = cache.length, len(x)
        q_nope, q_pe, latents = self._project(x, cos, sin, decode=False)
        rows = cache.layer(self.layer)
        rows[start : start + n] = latents
        out = self._plain(q_nope, q_pe, rows[: start + n], start)
        return self.ops.linear(out.reshape(n, self.heads * self.v), self.w.o, decode=False)

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, caches: list[LatentCache]) -> Tensor:
        """x [T, hidden]: one new token for each of T sequences. -> [T, hidden]."""
        q_nope, q_pe, latents = self._project(x, cos, sin, decode=True)
        for row, cache in enumerate(caches):
            cache.layer(self.layer)[cache.length] = latents[row]
        q_latent = self.ops.absorb_query(q_nope.contiguous(), self.w.kv_b, self.v)
        queries = torch.cat((q_latent, q_pe), dim=-1)
        o_latent = self.ops.attend(queries, caches, self.layer, self.scale, self.kv_lora)
        out = self.ops.expand_value(o_latent, self.w.kv_b, self.nope)
        return self.ops.linear(out.view(len(x), self.heads * self.v), self.w.o, decode=True)

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor, *, decode: bool) -> tuple[Tensor, Tensor, Tensor]:
        """-> q_nope [T, heads, nope], roped q_pe [T, heads, rope], cache rows [T, kv_lora + rope]."""
        w, linear = self.w, self.ops.linear
        if w.q_a is not None and w.q_a_norm is not None:
            q = linear(w.q_a_norm(linear(x, w.q_a, decode=decode)), w.q_b, decode=decode)
        else:
            q = linear(x, w.q_b, decode=decode)
        q_nope, q_pe = q.view(len(x), self.heads, self.nope + self.rope).split((self.nope, self.rope), -1)
        latent, k_pe = linear(x, w.kv_a, decode=decode).split((self.kv_lora, self.rope), -1)
        rows = torch.cat((w.kv_a_norm(latent), rotate(k_pe, cos, sin)), dim=-1)
        return q_nope, rotate(q_pe, cos, sin), rows

    def _plain(self, q_nope: Tensor, q_pe: Tensor, rows: Tensor, start: int) -> Tensor:
        """Causal softmax attention over expanded keys and values, a context block at a time with a running
        maximum and sum (online softmax, arXiv:1805.02867). -> [T, heads, v]."""
        n, total = len(q_nope), len(rows)
        q_nope, q_pe = q_nope.transpose(0, 1) * self.scale, q_pe.transpose(0, 1) * self.scale  # [heads, T, .]
        last = torch.arange(start, start + n, device=rows.device)[
            :, None
        ]  # each query sees keys up to itself
        peak = rows.new_full((self.heads, n, 1), -torch.inf, dtype=torch.float32)
        mass = torch.zeros_like(peak)
        out = rows.new_zeros((self.heads, n, self.v), dtype=torch.float32)
        for begin in range(0, total, CONTEXT_BLOCK):
            block = rows[begin : begin + CONTEXT_BLOCK].float()
            kv = self.ops.linear(block[:, : self.kv_lora].contiguous(), self.w.kv_b, decode=False)
            keys, values = kv.view(len(block), self.heads, self.nope + self.v).split((self.nope, self.v), -1)
            scores = q_nope @ keys.permute(1, 2, 0)
            scores += q_pe @ block[:, self.kv_lora :].T
            if begin + len(block) > start + 1:
                future = torch.arange(begin, begin + len(block), device=rows.device) > last
                scores.masked_fill_(future, -torch.inf)
            new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
            weights = scores.sub_(new_peak).exp_()
            fade = (peak - new_peak).exp_()
            mass = mass * fade + weights.sum(-1, keepdim=True)
            out = out * fade + weights @ values.transpose(0, 1)
            peak = new_peak
        return (out / mass).transpose(0, 1)
