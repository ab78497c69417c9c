"""The feed-forward half of a decoder layer: dense SwiGLU, or router + routed experts + shared expert."""

from typing import NamedTuple, Protocol

from torch import Tensor

from hybrid.layers.ops import DeviceOps, RoutingRule
from hybrid.timing import Stopwatch
from offload.fp8 import Weight


class RoutedExperts(Protocol):
    """offload's ExpertExecutor: sum over k of topk_weights[t, k] * expert[topk_ids[t, k]](x[t])."""

    def run(
        self, layer: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, decode: bool
    ) -> Tensor: ...


class SwigluWeights(NamedTuple):
    gate: Weight
    up: Weight
    down: Weight


class DenseMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: SwigluWeights, ops: DeviceOps, watch: Stopwatch) -> None:
        self.w = weights
        self.ops = ops
        self.watch = watch

    def __call__(self, x: Tensor, *, decode: bool) -> Tensor:
        out = self.ops.swiglu_mlp(x, *self.w, decode=decode)
        self.watch.lap("dense")
        return out


class MoE:
    """Routed experts, wherever they live, plus the shared expert (several are one wide one)."""

    def __init__(
        self,
        layer: int,
        gate: Weight,
        bias: Tensor,
        rule: RoutingRule,
        experts: RoutedExperts,
        shared: DenseMLP | None,
        ops: DeviceOps,
        watch: Stopwatch,
    ) -> None:
        self.layer = layer
        self.gate = gate
        self.bias = bias
        self.rule = rule
        self.experts = experts
        self.shared = shared
        self.ops = ops
        self.watch = watch

    def __call__(self, x: Tensor, *, decode: bool) -> Tensor:
        logits = self.ops.linear(x, self.gate, decode=decode)
        topk_ids, topk_weights = self.ops.route(logits, self.bias, self.rule)
        self.watch.lap("router")
        # Queued on a GPU before the CPU starts on the routed experts, so that the two overlap.
        shared = None if self.shared is None else self.shared(x, decode=decode)
        routed = self.experts.run(self.layer, x.cpu(), topk_ids.cpu(), topk_weights.cpu(), decode=decode)
        routed = routed.to(x.device)
        self.watch.lap("experts")
        return routed if shared is None else routed + shared
