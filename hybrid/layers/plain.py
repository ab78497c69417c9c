"""`PlainOps`: every device operation in plain torch, from weights kept in their own dtype.

This is the GPU side on a GPU; it runs on any device, and is the oracle of the CPU kernels in the tests.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid.kv_cache import LatentCache
from hybrid.layers.ops import RoutingRule
from offload.fp8 import Weight


class PlainOps:
    """Implements DeviceOps. Weights are widened to float32 for the one product they are used in."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, weight: Weight) -> Weight:
        scale = None if weight.scale is None else weight.scale.to(self.device)
        return Weight(weight.data.to(self.device), scale)

    def linear(self, x: Tensor, weight: Weight, *, decode: bool) -> Tensor:  # noqa: ARG002 (one product serves both)
        return F.linear(x, weight.dequantize())

    def swiglu_mlp(self, x: Tensor, gate: Weight, up: Weight, down: Weight, *, decode: bool) -> Tensor:
        inner = F.silu(self.linear(x, gate, decode=decode)) * self.linear(x, up, decode=decode)
        return self.linear(inner, down, decode=decode)

    def route(self, logits: Tensor, bias: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        choice = scores + bias  # the bias only selects
        if rule.n_group > 1:
            grouped = choice.view(len(choice), rule.n_group, -1)
            group_scores = grouped.topk(2, dim=-1).values.sum(-1)
            chosen = group_scores.topk(rule.topk_group, dim=-1).indices
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
            choice = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
        topk_ids = choice.topk(rule.top_k, dim=-1).indices
        weights = scores.gather(1, topk_ids)
        if rule.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return topk_ids, weights * rule.routed_scaling_factor

    def absorb_query(self, q_nope: Tensor, kv_b: Weight, v_head_dim: int) -> Tensor:
        heads, nope = q_nope.shape[1:]
        w_uk = kv_b.dequantize().view(heads, nope + v_head_dim, -1)[:, :nope]
        return torch.einsum("thd,hdl->thl", q_nope, w_uk)

    def expand_value(self, o_latent: Tensor, kv_b: Weight, qk_nope_head_dim: int) -> Tensor:
        heads, kv_lora = o_latent.shape[1:]
        w_uv = kv_b.dequantize().view(heads, -1, kv_lora)[:, qk_nope_head_dim:]
        return torch.einsum("thl,hvl->thv", o_latent, w_uv)

    def attend(
        self, queries: Tensor, caches: list[LatentCache], layer: int, scale: float, value_dim: int
    ) -> Tensor:
        out = []
        for query, cache in zip(queries, caches, strict=True):
            latents = cache.layer(layer)[: cache.length + 1].float()
            weights = torch.softmax(query @ latents.T * scale, dim=-1)
            out.append(weights @ latents[:, :value_dim])
        return torch.stack(out)
