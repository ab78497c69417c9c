"""The routed experts of one layer, forward and backward, without padding.

Token-expert pairs come sorted by expert. A thread owns whole experts and adds into its own copy of the layer's
output, which the caller sums: no locks, and the same order of additions every run.
"""

import numpy as np

from hybrid.demo.trainer.kernels.gemm import Array, clear, exp_row, gemm, jit, transpose


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
def _sigmoid(gate: Array, width: int, sig: Array) -> None:
    """sig [width] = sigmoid(gate[:width])."""
    for j in range(width):
        sig[j] = -gate[j]
    exp_row(sig, width)
    for j in range(width):
        sig[j] = np.float32(1) / (np.float32(1) + sig[j])


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
    w_t = np.empty((size, 2 * width), np.float32)
    sig = np.empty(width, np.float32)
    for e in range(first, last):
        low, high = starts[e], starts[e + 1]
        if low == high:
            continue
        pairs, pre = order[low:high], hidden[low:high]
        xs, act = np.empty((high - low, size), np.float32), np.empty((high - low, width), np.float32)
        _gather(x, pairs, top_k, xs)
        transpose(gate_up[e], w_t)
        clear(pre)
        gemm(xs, w_t, pre, 2 * width)
        for i in range(high - low):
            weight, row = weights[pairs[i]], pre[i]
            _sigmoid(row, width, sig)
            for j in range(width):
                act[i, j] = row[j] * sig[j] * row[width + j] * weight
        clear(xs)
        gemm(act, down_t[e], xs, size)
        _scatter_add(xs, pairs, top_k, out[part])


@jit
def experts_backward(
    part: int, first: int, last: int, starts: Array, order: Array, x: Array, weights: Array,
    gate_up: Array, down_t: Array, hidden: Array, d_out: Array,
    dx: Array, d_weights: Array, d_gate_up: Array, d_down_t: Array,
) -> None:  # fmt: skip
    """Gradients of `experts_forward`: dx [parts,T,H] is added to; d_weights [T*k] and the experts' are set."""
    width, size = down_t.shape[1], x.shape[1]
    top_k = order.size // x.shape[0]
    down = np.empty((size, width), np.float32)
    sig = np.empty(width, np.float32)
    one = np.float32(1)
    for e in range(first, last):
        low, high = starts[e], starts[e + 1]
        clear(d_gate_up[e])
        clear(d_down_t[e])
        if low == high:
            continue
        count, pairs = high - low, order[low:high]
        xs, dys = np.empty((count, size), np.float32), np.empty((count, size), np.float32)
        act, d_act = np.empty((count, width), np.float32), np.zeros((count, width), np.float32)
        d_pre = np.empty((count, 2 * width), np.float32)
        _gather(x, pairs, top_k, xs)
        _gather(d_out, pairs, top_k, dys)
        transpose(down_t[e], down)
        gemm(dys, down, d_act, width)
        for i in range(count):
            weight, row = weights[pairs[i]], hidden[low + i]
            _sigmoid(row, width, sig)
            dot = np.float32(0)
            for j in range(width):
                silu, up = row[j] * sig[j], row[width + j]
                dot += d_act[i, j] * silu * up
                grad = d_act[i, j] * weight
                act[i, j] = silu * up * weight
                d_pre[i, j] = grad * up * sig[j] * (one + row[j] * (one - sig[j]))
                d_pre[i, width + j] = grad * silu
            d_weights[pairs[i]] = dot
        gemm(act.T, dys, d_down_t[e], size)
        gemm(d_pre.T, xs, d_gate_up[e], size)
        clear(dys)
        gemm(d_pre, gate_up[e], dys, size)
        _scatter_add(dys, pairs, top_k, dx[part])
