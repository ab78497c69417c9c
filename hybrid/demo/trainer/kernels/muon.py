"""Muon's update of a stack of small matrices, all in cache: momentum, Newton-Schulz, decay, step."""

from typing import Any

import numpy as np

from hybrid.demo.trainer.kernels.gemm import Array, clear, copy, gemm, jit, transpose, whole_tiles


@jit
def muon_update(
    first: int, last: int, weight: Array, grad: Array, momentum: Array, beta: float, step: float, decay: float,
    a: float, b: float, c: float, rounds: int,
) -> None:  # fmt: skip
    """For matrices first..last-1 of weight, grad, momentum [B,n,m]:
    momentum = beta * momentum + grad;  weight = weight * decay - step * orthogonal(grad + beta * momentum).

    One round is X = a X + X (b A + c A A) with A = X^T X, for X with its short side as columns.
    """
    wide = weight.shape[2] > weight.shape[1]
    n, m = min(weight.shape[1:]), max(weight.shape[1:])
    n_pad = whole_tiles(n)
    x, y = np.zeros((m, n_pad), np.float32), np.zeros((m, n_pad), np.float32)
    gram, square = np.zeros((n, n_pad), np.float32), np.zeros((n, n_pad), np.float32)
    update: Any = np.empty(weight.shape[1:], np.float32)
    for e in range(first, last):
        total = np.float32(0)
        for i in range(update.shape[0]):
            g, mom, u = grad[e, i], momentum[e, i], update[i]
            for j in range(update.shape[1]):
                mom[j] = np.float32(beta) * mom[j] + g[j]
                u[j] = g[j] + np.float32(beta) * mom[j]
                total += u[j] * u[j]
        scale = np.float32(1) / (np.sqrt(total) + np.float32(1e-7))
        for i in range(update.shape[0]):
            for j in range(update.shape[1]):
                update[i, j] *= scale
        if wide:
            transpose(update, x)
        else:
            copy(update, x)
        for _ in range(rounds):
            clear(gram)
            clear(square)
            gemm(x[:, :n].T, x, gram, n_pad)
            gemm(gram[:, :n], gram, square, n_pad)
            for i in range(n):
                for j in range(n):
                    square[i, j] = np.float32(b) * gram[i, j] + np.float32(c) * square[i, j]
            for i in range(m):
                for j in range(n_pad):
                    y[i, j] = np.float32(a) * x[i, j]
            gemm(x[:, :n], square, y, n_pad)
            x, y = y, x
        if wide:
            transpose(x[:, :n], update)
        else:
            copy(x[:, :n], update)
        for i in range(update.shape[0]):
            w, u = weight[e, i], update[i]
            for j in range(update.shape[1]):
                w[j] = w[j] * np.float32(decay) - np.float32(step) * u[j]
