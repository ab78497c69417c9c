"""`CpuOps`: the device operations on a CPU, where weights are read from their own bytes at memory speed."""

import numpy as np
import torch
from torch import Tensor

from hybrid.kv_cache import LatentCache
from hybrid.layers.cpu_kernels import ATTEND, HEADS_AT_ONCE, attend_job, route_kernel
from hybrid.layers.ops import RoutingRule
from offload.fp8 import Weight
from offload.kernels.cpu import CpuKernels
from offload.pages import will_need


class CpuOps:
    """Implements DeviceOps over offload's kernels and worker threads."""

    device = torch.device("cpu")

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels
        self.linear = kernels.linear
        self.swiglu_mlp = kernels.swiglu_mlp
        self.absorb_query = kernels.absorb_query
        self.expand_value = kernels.expand_value
        self._route = route_kernel()
        self._attend = attend_job().address

    def place(self, weight: Weight) -> Weight:
        will_need(weight, self.kernels.workers.nodes)  # by every token
        return weight

    def route(self, logits: Tensor, bias: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
        topk_ids = torch.empty((len(logits), rule.top_k), dtype=torch.int64)
        topk_weights = torch.empty((len(logits), rule.top_k))
        self._route(
            logits.numpy(),
            bias.numpy(),
            rule.n_group,
            rule.topk_group,
            rule.norm_topk_prob,
            rule.routed_scaling_factor,
            topk_ids.numpy(),
            topk_weights.numpy(),
        )
        return topk_ids, topk_weights

    def attend(
        self, queries: Tensor, caches: list[LatentCache], layer: int, scale: float, value_dim: int
    ) -> Tensor:
        rows, heads, dim = queries.shape
        padded = -(-heads // HEADS_AT_ONCE) * HEADS_AT_ONCE
        if padded != heads:
            queries = torch.cat((queries, queries.new_zeros((rows, padded - heads, dim))), dim=1)
        queries = queries.contiguous()
        out = torch.empty((rows, padded, value_dim))
        latents = np.array([cache.layer(layer).data_ptr() for cache in caches])
        lengths = np.array([cache.length + 1 for cache in caches])
        sizes = (rows, padded, dim, value_dim)
        places = (queries.data_ptr(), out.data_ptr(), latents.ctypes.data, lengths.ctypes.data)
        args = np.array([(*sizes, *places, scale)], ATTEND)
        self.kernels.run(self._attend, args.ctypes.data)
        return out[:, :heads].contiguous()
