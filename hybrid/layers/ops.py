"""`DeviceOps`: the heavy operations a decoder layer asks of the device it runs on.

On a CPU they are offload's fp8 kernels plus our decode attention (layers/cpu.py); on a GPU plain torch
(layers/plain.py), which runs anywhere and is each kernel's oracle in the tests. Every `decode=True` result
has, row by row, the same bits whatever other rows are in the batch (CPU).
"""

from typing import Protocol

import torch
from torch import Tensor

from hybrid.kv_cache import LatentCache
from offload.fp8 import Weight


class DeviceOps(Protocol):
    """Tensors are float32, contiguous and on `device`; T is the number of token rows."""

    device: torch.device

    def place(self, weight: Weight) -> Weight:
        """The weight where this device can use it, in its own dtype."""
        ...

    def linear(self, x: Tensor, weight: Weight, *, decode: bool) -> Tensor:
        """[T, in] -> [T, out]."""
        ...

    def swiglu_mlp(self, x: Tensor, gate: Weight, up: Weight, down: Weight, *, decode: bool) -> Tensor:
        """down(silu(gate(x)) * up(x)): [T, hidden] -> [T, hidden]."""
        ...

    def route(self, logits: Tensor, bias: Tensor, rule: "RoutingRule") -> tuple[Tensor, Tensor]:
        """[T, experts] -> topk_ids int64 [T, k], topk_weights [T, k]."""
        ...

    def absorb_query(self, q_nope: Tensor, kv_b: Weight, v_head_dim: int) -> Tensor:
        """q_nope . W_UK per head: [T, heads, nope] -> [T, heads, kv_lora]."""
        ...

    def expand_value(self, o_latent: Tensor, kv_b: Weight, qk_nope_head_dim: int) -> Tensor:
        """W_UV . o_latent per head: [T, heads, kv_lora] -> [T, heads, v]."""
        ...

    def attend(
        self, queries: Tensor, caches: list[LatentCache], layer: int, scale: float, value_dim: int
    ) -> Tensor:
        """Absorbed attention of row t's queries over all of caches[t]'s latents of `layer`.

        queries [T, heads, latent_dim], T = len(caches) -> [T, heads, value_dim]: the softmax-weighted sum of
        each latent's first `value_dim` numbers.
        """
        ...


class RoutingRule:
    """How router logits become experts and weights (DeepSeek-V3's noaux_tc; arXiv:2412.19437, 2.1.2)."""

    __slots__ = ("n_group", "norm_topk_prob", "routed_scaling_factor", "top_k", "topk_group")

    def __init__(
        self, top_k: int, n_group: int, topk_group: int, norm_topk_prob: bool, routed_scaling_factor: float
    ) -> None:
        self.top_k = top_k
        self.n_group = n_group
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
