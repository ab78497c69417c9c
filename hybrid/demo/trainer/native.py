"""`NativeOps`: the training operations as compiled kernels, for CPUs. Equal to `TorchOps` within rounding: that of
float32, or of bfloat16 where products run on AMX tiles."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid.demo.trainer.kernels import attention, experts
from hybrid.demo.trainer.kernels.amx import STEP
from hybrid.demo.trainer.kernels.gemm import Array, Crew
from hybrid.demo.trainer.kernels.products import TILES, VECTORS, Products
from hybrid.demo.trainer.kernels.rows import norm_backward, norm_forward, route_backward, route_forward
from hybrid.demo.trainer.ops import Documents, Rope
from offload.kernels.levels import choose_level


def _np(x: Tensor) -> Array:
    return x.detach().contiguous().numpy()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, crew: Crew) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        ctx.rows, ctx.eps, ctx.crew = crew.split(np.ones(len(x))), eps, crew
        crew.run(norm_forward, ctx.rows, _np(x), _np(weight), eps, y.numpy())
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dw = torch.zeros(ctx.crew.size, len(weight))
        ctx.crew.run(norm_backward, ctx.rows, _np(x), _np(weight), ctx.eps, _np(dy), dx.numpy(), dw.numpy())
        return dx, dw.sum(0), None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_pe: Tensor,
        docs: Documents,
        rope: Rope,
        crew: Crew,
        products: Products,
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, depth = q.shape
        out = q.new_empty(tokens, heads, kv.shape[2] + k_pe.shape[1] - depth)
        lse = q.new_empty(tokens, heads)
        peak = q.new_full((crew.size, heads), -torch.inf)
        lengths = np.diff(docs.starts.numpy()).astype(np.float64)
        ctx.parts = crew.split(lengths * (lengths + 64))
        ctx.inputs = docs.starts.numpy(), _np(q), _np(kv), _np(k_pe), _np(rope.cos), _np(rope.sin), rope.scale
        crew.run(attention.forward(products), ctx.parts, *ctx.inputs, out.numpy(), lse.numpy(), peak.numpy())
        ctx.crew, ctx.products, ctx.outputs = crew, products, (_np(out), lse.numpy())
        peak = peak.amax(0)
        ctx.mark_non_differentiable(peak)
        return out, peak

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _, q, kv, k_pe, *_ = ctx.inputs
        dq, dkv, dk_pe = torch.empty(q.shape), torch.empty(kv.shape), torch.zeros(k_pe.shape)
        grads = dq.numpy(), dkv.numpy(), dk_pe.numpy()
        kernel = attention.backward(ctx.products)
        ctx.crew.run(kernel, ctx.parts, *ctx.inputs, *ctx.outputs, _np(d_out), *grads)
        return dq, dkv, dk_pe, None, None, None, None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor, top_k: int, factor: float, crew: Crew
    ) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(logits), top_k, dtype=torch.int64)
        picked, weights = logits.new_empty(ids.shape), logits.new_empty(ids.shape)
        rows = crew.split(np.ones(len(logits)))
        outputs = ids.numpy(), picked.numpy(), weights.numpy()
        crew.run(route_forward, rows, _np(logits), _np(bias), factor, *outputs)
        ctx.kept = crew, rows, ids, picked, factor, logits.shape
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, _: Tensor, d_weights: Tensor) -> tuple[Tensor | None, ...]:
        crew, rows, ids, picked, factor, shape = ctx.kept
        d_logits = torch.zeros(shape)
        crew.run(route_backward, rows, ids.numpy(), picked.numpy(), factor, _np(d_weights), d_logits.numpy())
        return d_logits, None, None, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down_t: Tensor, crew: Crew,
        products: Products,
    ) -> Tensor:  # fmt: skip
        starts = np.empty(len(gate_up) + 1, np.int64)
        order = np.empty(ids.numel(), np.int64)
        experts.sort_pairs(_np(ids), starts, order)
        hidden = x.new_empty(ids.numel(), gate_up.shape[1])
        out = x.new_zeros(crew.size, *x.shape)
        parts = crew.split(np.diff(starts) + 4.0)
        ctx.save_for_backward(x, weights, gate_up, down_t, hidden)
        ctx.kept = crew, products, parts, starts, order
        crew.run(
            experts.forward(products), parts, starts, order, _np(x), _np(weights).reshape(-1), _np(gate_up),
            _np(down_t), hidden.numpy(), out.numpy(),
        )  # fmt: skip
        return out.sum(0)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down_t, hidden = ctx.saved_tensors
        crew, products, parts, starts, order = ctx.kept
        dx, d_weights = torch.zeros(crew.size, *x.shape), torch.empty(weights.shape)
        d_gate_up, d_down_t = torch.empty(gate_up.shape), torch.empty(down_t.shape)
        crew.run(
            experts.backward(products), parts, starts, order, _np(x), _np(weights).reshape(-1), _np(gate_up),
            _np(down_t), hidden.numpy(), _np(d_out), dx.numpy(), d_weights.view(-1).numpy(),
            d_gate_up.numpy(), d_down_t.numpy(),
        )  # fmt: skip
        return dx.sum(0), None, d_weights, d_gate_up, d_down_t, None, None


class NativeOps:
    """Implements Ops on float32 CPU tensors with `threads` threads.

    `exact`: in float32 throughout, even where the CPU has AMX tiles, which round factors to bfloat16.
    """

    def __init__(self, threads: int, *, exact: bool = False) -> None:
        self._crew = Crew(threads)
        self._tiles = not exact and choose_level().tiles

    def _products(self, *sizes: int) -> Products:
        return TILES if self._tiles and all(size % STEP == 0 for size in sizes) else VECTORS

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _apply(_Norm, x, weight, eps, self._crew)

    def attention(
        self, q: Tensor, kv: Tensor, k_pe: Tensor, docs: Documents, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        depth = q.shape[2]
        products = self._products(depth, kv.shape[2] + k_pe.shape[1] - depth)
        return _apply(_Attention, q, kv, k_pe, docs, rope, self._crew, products)

    def route(self, logits: Tensor, bias: Tensor, top_k: int, factor: float) -> tuple[Tensor, Tensor]:
        return _apply(_Route, logits, bias, top_k, factor, self._crew)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down_t: Tensor) -> Tensor:
        products = self._products(*down_t.shape[1:])
        return _apply(_Experts, x, ids, weights, gate_up, down_t, self._crew, products)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]
