"""MuonClip (Kimi K2's report, arXiv:2507.20534): Muon for matrices, AdamW for the rest, QK-Clip, and the
balancing of experts without an auxiliary loss (arXiv:2408.15664).

As in Muon's own code the gradient is added to the momentum before orthogonalisation (Nesterov), which the report's
algorithm does not show; embedding, head and norms have no weight decay.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.demo.trainer.kernels.gemm import Crew
from hybrid.demo.trainer.kernels.muon import muon_update
from hybrid.demo.trainer.model import DemoModel

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
_STACK_PART = 192
"""Matrices of a stack that one task of the native update takes."""


def orthogonalize(x: Tensor) -> Tensor:
    """Singular values of each matrix of x [B,n,m] brought near 1 (mostly 0.7 to 1.2; those that were next to nothing
    stay lower) by Newton-Schulz, as Muon does."""
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2).contiguous()
    for _ in range(ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def matrices(model: DemoModel) -> Iterator[tuple[str, nn.Parameter, tuple[int, int, int]]]:
    """Name, parameter and shape [B,n,m] of every stack of matrices that Muon updates: all but embedding and
    head. Fused gate and up count as two matrices."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name in ("embed_tokens", "lm_head"):
            continue
        rows, columns = parameter.shape[-2:]
        parts = 2 if name.endswith("gate_up") else 1
        stack = parameter.numel() // (rows * columns) * parts
        yield name, parameter, (stack, rows // parts, columns)


class Muon:
    """Momentum, orthogonalised, scaled by 0.2 sqrt(max(n, m)) to AdamW's update size, with weight decay.

    Args:
        threads: for the compiled update on the CPU; None: torch's operations (any device).
    """

    def __init__(
        self, model: DemoModel, *, beta: float = 0.95, weight_decay: float = 0.1, threads: int | None = None
    ) -> None:
        self._stacks = list(matrices(model))
        self.momentum = {name: torch.zeros_like(p) for name, p, _ in self._stacks}
        self.beta, self.weight_decay = beta, weight_decay
        self._crew = None if threads is None else Crew(threads)

    @torch.no_grad()
    def step(self, rate: float | Tensor) -> None:
        """`rate`: a tensor on the model's device only for torch's operations."""
        decay = 1 - rate * self.weight_decay
        if self._crew is None:
            self._step_torch(rate, decay)
            return
        tasks = []
        for name, parameter, shape in self._stacks:
            if parameter.grad is None:
                continue
            arrays = [
                t.view(shape).numpy() for t in (parameter.detach(), parameter.grad, self.momentum[name])
            ]
            step = rate * 0.2 * max(shape[1:]) ** 0.5
            for first in range(0, shape[0], _STACK_PART):
                last = min(first + _STACK_PART, shape[0])
                tasks.append((first, last, *arrays, self.beta, step, decay, *NEWTON_SCHULZ, ROUNDS))
        self._crew.each(muon_update, tasks)

    def _step_torch(self, rate: float | Tensor, decay: float | Tensor) -> None:
        moved = [
            (parameter, self.momentum[name], parameter.grad, shape)
            for name, parameter, shape in self._stacks
            if parameter.grad is not None
        ]
        if not moved:
            return
        parameters, momenta, grads, shapes = (list(each) for each in zip(*moved, strict=True))
        torch._foreach_mul_(momenta, self.beta)
        torch._foreach_add_(momenta, grads)
        updates = torch._foreach_add(grads, momenta, alpha=self.beta)
        torch._foreach_mul_(parameters, decay)
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for parameter, update, shape in zip(parameters, updates, shapes, strict=True):
            by_shape.setdefault(shape[1:], []).append((parameter.view(shape), update.view(shape)))
        for matrix, members in by_shape.items():
            weights = [weight for weight, _ in members]
            steps = orthogonalize(torch.cat([update for _, update in members]))
            steps *= rate * 0.2 * max(matrix) ** 0.5
            torch._foreach_sub_(weights, list(steps.split([len(weight) for weight in weights])))

    def state_dict(self) -> dict[str, Any]:
        return dict(self.momentum)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, momentum in self.momentum.items():
            momentum.copy_(state[name])


@torch.no_grad()
def qk_clip(model: DemoModel, peaks: Tensor, tau: float) -> Tensor:
    """Shrink the query and key weights of every head whose largest logit in `peaks` [layers, heads] exceeds
    tau: its nope parts by sqrt(tau / peak) each, its rope query by tau / peak; the shared rope key stays.
    Returns how many heads were clipped, int64 []."""
    heads, nope = model.config.num_attention_heads, model.config.qk_nope_head_dim
    gammas = tau / peaks.clamp_min(tau)
    for layer, gamma in zip(model.decoder_layers(), gammas[..., None, None], strict=True):
        query = layer.self_attn.q_b_proj.unflatten(0, (heads, -1))
        key = layer.self_attn.kv_b_proj.unflatten(0, (heads, -1))
        query[:, :nope] *= gamma.sqrt()
        query[:, nope:] *= gamma
        key[:, :nope] *= gamma.sqrt()
    return (gammas < 1).sum()


@torch.no_grad()
def balance(model: DemoModel, loads: Tensor, rate: float | Tensor) -> None:
    """Move each router's bias towards even loads [MoE layers, experts], in proportion to the relative error
    (at most 1). K2 moves it by a constant; so few tokens a step need the softer rule."""
    for moe, load in zip(model.moe_layers(), loads.float(), strict=True):
        error = 1 - load / load.mean()
        moe.bias += rate * error.clamp(-1, 1)
        moe.bias -= moe.bias.mean()
