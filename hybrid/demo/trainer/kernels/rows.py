"""Kernels that treat each token's row alone: RMSNorm and the router's choice of experts."""

# ruff: noqa: ARG001 (Crew.run hands every kernel the number of its part)

import numpy as np

from hybrid.demo.trainer.kernels.gemm import Array, exp_row, jit


@jit
def norm_forward(part: int, first: int, last: int, x: Array, weight: Array, eps: float, y: Array) -> None:
    """y = x / sqrt(mean(x^2) + eps) * weight, by rows of [T,H]."""
    width = x.shape[1]
    for i in range(first, last):
        row, out, total = x[i], y[i], np.float32(0)
        for j in range(width):
            total += row[j] * row[j]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for j in range(width):
            out[j] = row[j] * scale * weight[j]


@jit
def norm_backward(
    part: int, first: int, last: int, x: Array, weight: Array, eps: float, dy: Array, dx: Array, dw: Array
) -> None:
    """Gradients of `norm_forward`; dw [parts,H] is added to."""
    width, sums = x.shape[1], dw[part]
    for i in range(first, last):
        row, grad, out = x[i], dy[i], dx[i]
        total, dot = np.float32(0), np.float32(0)
        for j in range(width):
            total += row[j] * row[j]
            dot += row[j] * grad[j] * weight[j]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
        pull = dot * scale * scale / np.float32(width)
        for j in range(width):
            out[j] = scale * (grad[j] * weight[j] - row[j] * pull)
            sums[j] += grad[j] * row[j] * scale


@jit
def route_forward(
    part: int, first: int, last: int, logits: Array, bias: Array, factor: float, ids: Array, picked: Array,
    weights: Array,
) -> None:  # fmt: skip
    """The top-k of sigmoid(logits) + bias for each row [E]: ids, their sigmoids, normalised weights * factor."""
    experts, top_k = logits.shape[1], ids.shape[1]
    scores = np.empty(experts, np.float32)
    best = np.empty(top_k, np.float32)
    for i in range(first, last):
        row, chosen = logits[i], ids[i]
        for e in range(experts):
            scores[e] = -row[e]
        exp_row(scores, experts)
        for e in range(experts):
            scores[e] = np.float32(1) / (np.float32(1) + scores[e])
        for j in range(top_k):
            best[j] = -np.float32(np.inf)
        for e in range(experts):
            choice = scores[e] + bias[e]
            if choice > best[top_k - 1]:
                j = top_k - 1
                while j > 0 and best[j - 1] < choice:
                    best[j], chosen[j] = best[j - 1], chosen[j - 1]
                    j -= 1
                best[j], chosen[j] = choice, e
        total = np.float32(1e-20)
        for j in range(top_k):
            picked[i, j] = scores[chosen[j]]
            total += picked[i, j]
        for j in range(top_k):
            weights[i, j] = picked[i, j] / total * np.float32(factor)


@jit
def route_backward(
    part: int,
    first: int,
    last: int,
    ids: Array,
    picked: Array,
    factor: float,
    d_weights: Array,
    d_logits: Array,
) -> None:
    """Gradient of the weights with respect to the logits; d_logits [T,E] must come in as zeros."""
    for i in range(first, last):
        total, dot = np.float32(1e-20), np.float32(0)
        for j in range(ids.shape[1]):
            total += picked[i, j]
            dot += d_weights[i, j] * picked[i, j]
        for j in range(ids.shape[1]):
            s = picked[i, j]
            grad = np.float32(factor) * (d_weights[i, j] - dot / total) / total
            d_logits[i, ids[i, j]] = grad * s * (np.float32(1) - s)
