"""The routed experts of one layer, forward and backward, without padding.

Token-expert pairs come sorted by expert. A thread owns whole experts and adds into its own copy of the layer's
output, which the caller sums: no locks, and the same order of additions every run.
"""

from functools import cache
from typing import Any

import numpy as np

from hybrid.demo.trainer.kernels.gemm import Array, clear, copy, exp_row, jit, rounded_up
from hybrid.demo.trainer.kernels.products import Products


@jit
def sort_pairs(ids: Array, starts: Array, order: Array) -> None:
    """Counting sort of the pairs (token, slot) by expert. ids [T,k]; starts [E+1]; order [T*k] indexes flat ids."""
    flat = ids.reshape(-1)
    for e in range(starts.size):
        starts[e] = 0
    for i in range(flat.size):
        starts[flat[i] + 1] += 1
    for e in range(starts.size - 1):
        starts[e + 1] += starts[e]
    cursor = starts[:-1].copy()
    for i in range(flat.size):
        order[cursor[flat[i]]] = i
        cursor[flat[i]] += 1


@jit
def _most(starts: Array, first: int, last: int) -> int:
    """The most pairs that one of the experts first..last-1 has."""
    most = 0
    for e in range(first, last):
        most = max(most, starts[e + 1] - starts[e])
    return most


@jit
def _gather(source: Array, pairs: Array, top_k: int, target: Array) -> None:
    for i in range(pairs.size):
        row, to = source[pairs[i] // top_k], target[i]
        for j in range(row.size):
            to[j] = row[j]


@jit
def _scatter_add(source: Array, pairs: Array, top_k: int, target: Array) -> None:
    for i in range(pairs.size):
        row, to = source[i], target[pairs[i] // top_k]
        for j in range(row.size):
            to[j] += row[j]


@jit
def _sigmoid(gate: Array, sig: Array) -> None:
    """sig [N,I], whole rows of memory, = sigmoid(gate[:N,:I])."""
    count, width = sig.shape
    for i in range(count):
        for j in range(width):
            sig[i, j] = -gate[i, j]
    exp_row(sig.reshape(-1), count * width)
    for i in range(count):
        for j in range(width):
            sig[i, j] = np.float32(1) / (np.float32(1) + sig[i, j])


@cache
def forward(products: Products) -> Any:
    """The kernel of the forward pass, compiled with a way to multiply."""
    step, begin, finish, left, right, _, right_turned, _, _, multiply = products

    @jit
    def experts_forward(
        part: int, first: int, last: int, starts: Array, order: Array, x: Array, weights: Array,
        gate_up: Array, down_t: Array, hidden: Array, out: Array,
    ) -> None:  # fmt: skip
        """Experts first..last-1 add weight * down(silu(gate x) * up x) into out[part].

        x [T,H], weights [T*k], gate_up [E,2I,H], down_t [E,I,H], out [parts,T,H]. Keeps gate x and up x of each
        pair in hidden [T*k,2I], by sorted pair, for the backward pass.
        """
        width, size = down_t.shape[1], x.shape[1]
        top_k = order.size // x.shape[0]
        most = rounded_up(_most(starts, first, last), step)
        xs, pre = np.zeros((most, size), np.float32), np.empty((most, 2 * width), np.float32)
        act, sigs = np.zeros((most, width), np.float32), np.empty((most, width), np.float32)
        begin()
        for e in range(first, last):
            low, high = starts[e], starts[e + 1]
            if low == high:
                continue
            count, pairs = high - low, order[low:high]
            padded = rounded_up(count, step)
            _gather(x, pairs, top_k, xs)
            multiply(left(xs[:padded]), right_turned(gate_up[e]), pre[:padded], False)
            copy(pre[:count], hidden[low:high])
            _sigmoid(pre, sigs[:count])
            for i in range(count):
                weight, row, sig = weights[pairs[i]], pre[i], sigs[i]
                for j in range(width):
                    act[i, j] = row[j] * sig[j] * row[width + j] * weight
            multiply(left(act[:padded]), right(down_t[e]), xs[:padded], False)
            _scatter_add(xs, pairs, top_k, out[part])
        finish()

    return experts_forward


@cache
def backward(products: Products) -> Any:
    """The kernel of the backward pass, compiled with a way to multiply."""
    step, begin, finish, left, right, left_turned, right_turned, _, _, multiply = products

    @jit
    def experts_backward(
        part: int, first: int, last: int, starts: Array, order: Array, x: Array, weights: Array,
        gate_up: Array, down_t: Array, hidden: Array, d_out: Array,
        dx: Array, d_weights: Array, d_gate_up: Array, d_down_t: Array,
    ) -> None:  # fmt: skip
        """Gradients of `experts_forward`: dx [parts,T,H] is added to; d_weights [T*k] and the experts' are set."""
        width, size = down_t.shape[1], x.shape[1]
        top_k = order.size // x.shape[0]
        most = rounded_up(_most(starts, first, last), step)
        xs, dys = np.empty((most, size), np.float32), np.empty((most, size), np.float32)
        act, d_act = np.empty((most, width), np.float32), np.empty((most, width), np.float32)
        d_pre, sigs = np.empty((most, 2 * width), np.float32), np.empty((most, width), np.float32)
        one = np.float32(1)
        begin()
        for e in range(first, last):
            low, high = starts[e], starts[e + 1]
            if low == high:
                clear(d_gate_up[e])
                clear(d_down_t[e])
                continue
            count, pairs = high - low, order[low:high]
            padded = rounded_up(count, step)
            _gather(x, pairs, top_k, xs)
            _gather(d_out, pairs, top_k, dys)
            for rest in (xs[count:padded], dys[count:padded]):
                clear(rest)
            multiply(left(dys[:padded]), right_turned(down_t[e]), d_act[:padded], False)
            _sigmoid(hidden[low:high], sigs[:count])
            for i in range(count):
                weight, row, sig = weights[pairs[i]], hidden[low + i], sigs[i]
                dot = np.float32(0)
                for j in range(width):
                    silu, up = row[j] * sig[j], row[width + j]
                    dot += d_act[i, j] * silu * up
                    grad = d_act[i, j] * weight
                    act[i, j] = silu * up * weight
                    d_pre[i, j] = grad * up * sig[j] * (one + row[j] * (one - sig[j]))
                    d_pre[i, width + j] = grad * silu
                d_weights[pairs[i]] = dot
            clear(act[count:padded])
            clear(d_pre[count:padded])
            multiply(left_turned(act[:padded]), right(dys[:padded]), d_down_t[e], False)
            multiply(left_turned(d_pre[:padded]), right(xs[:padded]), d_gate_up[e], False)
            multiply(left(d_pre[:padded]), right(gate_up[e]), dys[:padded], False)
            _scatter_add(dys, pairs, top_k, dx[part])
        finish()

    return experts_backward
