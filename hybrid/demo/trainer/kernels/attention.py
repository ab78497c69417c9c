"""Causal multi-head latent attention over whole documents, expanded (not absorbed) as training wants it.

A thread owns whole documents, so no two threads write the same row. Within one, each head's queries, keys and
values are gathered into small dense matrices, rotated, and worked through in blocks of BLOCK queries. The
backward pass recomputes the probabilities from the kept log-sum-exp (arXiv:2205.14135) rather than keep them.
"""

# ruff: noqa: ARG001 (Crew.run hands every kernel the number of its part)

import numpy as np

from hybrid.demo.trainer.kernels.gemm import (
    Array,
    clear,
    copy,
    exp_row,
    gemm,
    jit,
    max_row,
    transpose,
    whole_tiles,
)

BLOCK = 32


@jit
def _gather(
    start: int, head: int, q: Array, kv: Array, k_pe: Array, cos: Array, sin: Array, scale: float,
    qs: Array, ks: Array, vs: Array,
) -> None:  # fmt: skip
    """Head `head`'s rotated queries (times `scale`) and keys [L,D] and values [L,V] of one document."""
    rope = k_pe.shape[1]
    nope = qs.shape[1] - rope
    for i in range(qs.shape[0]):
        q_row, kv_row, pe_row = q[start + i, head], kv[start + i, head], k_pe[start + i]
        for j in range(nope):
            qs[i, j] = q_row[j] * scale
            ks[i, j] = kv_row[j]
        for j in range(vs.shape[1]):
            vs[i, j] = kv_row[nope + j]
        for j in range(rope // 2):
            c, s = cos[i, j], sin[i, j]
            even, odd = q_row[nope + 2 * j] * scale, q_row[nope + 2 * j + 1] * scale
            qs[i, nope + 2 * j], qs[i, nope + 2 * j + 1] = even * c - odd * s, odd * c + even * s
            even, odd = pe_row[2 * j], pe_row[2 * j + 1]
            ks[i, nope + 2 * j], ks[i, nope + 2 * j + 1] = even * c - odd * s, odd * c + even * s


@jit
def attention_forward(
    part: int, first: int, last: int, starts: Array, q: Array, kv: Array, k_pe: Array, cos: Array, sin: Array,
    scale: float, out: Array, lse: Array, peak: Array,
) -> None:  # fmt: skip
    """Documents first..last-1: out [T,H,V], lse [T,H]; peak[part, head] = the largest scaled logit seen.

    q [T,H,D], kv [T,H,nope+V], k_pe [T,rope], float32 and unrotated; cos, sin [>=L, rope/2] by position in the
    document; starts [documents+1].
    """
    heads, depth = q.shape[1], q.shape[2]
    value = out.shape[2]
    for doc in range(first, last):
        start, length = starts[doc], starts[doc + 1] - starts[doc]
        qs, ks = np.empty((length, depth), np.float32), np.empty((length, depth), np.float32)
        padded = whole_tiles(length)
        vs, kt = np.empty((length, value), np.float32), np.zeros((depth, padded), np.float32)
        scores, block_out = np.empty((BLOCK, padded), np.float32), np.empty((BLOCK, value), np.float32)
        for head in range(heads):
            _gather(start, head, q, kv, k_pe, cos, sin, scale, qs, ks, vs)
            transpose(ks, kt)
            for top in range(0, length, BLOCK):
                end = min(top + BLOCK, length)
                clear(scores)
                gemm(qs[top:end], kt, scores[: end - top], whole_tiles(end))
                for i in range(end - top):
                    row, seen = scores[i], top + i + 1
                    high = max_row(row, seen)
                    peak[part, head] = max(peak[part, head], high)
                    for j in range(seen):
                        row[j] -= high
                    exp_row(row, seen)
                    total = np.float32(0)
                    for j in range(seen):
                        total += row[j]
                    inverse = np.float32(1) / total
                    for j in range(seen):
                        row[j] *= inverse
                    for j in range(seen, end):
                        row[j] = 0
                    lse[start + top + i, head] = high + np.log(total)
                clear(block_out)
                gemm(scores[: end - top, :end], vs[:end], block_out[: end - top], value)
                copy(block_out[: end - top], out[start + top : start + end, head])


@jit
def attention_backward(
    part: int, first: int, last: int, starts: Array, q: Array, kv: Array, k_pe: Array, cos: Array, sin: Array,
    scale: float, out: Array, lse: Array, d_out: Array, dq: Array, dkv: Array, dk_pe: Array,
) -> None:  # fmt: skip
    """Gradients of `attention_forward`; dk_pe must come in as zeros."""
    heads, depth = q.shape[1], q.shape[2]
    value, rope = out.shape[2], k_pe.shape[1]
    nope = depth - rope
    for doc in range(first, last):
        start, length = starts[doc], starts[doc + 1] - starts[doc]
        qs, ks = np.empty((length, depth), np.float32), np.empty((length, depth), np.float32)
        padded = whole_tiles(length)
        vs, kt = np.empty((length, value), np.float32), np.zeros((depth, padded), np.float32)
        vt = np.zeros((value, padded), np.float32)
        probs, dprobs = np.empty((BLOCK, padded), np.float32), np.empty((BLOCK, padded), np.float32)
        do = np.empty((length, value), np.float32)
        dqs, dks = np.empty((length, depth), np.float32), np.empty((length, depth), np.float32)
        dvs = np.empty((length, value), np.float32)
        for head in range(heads):
            _gather(start, head, q, kv, k_pe, cos, sin, scale, qs, ks, vs)
            transpose(ks, kt)
            transpose(vs, vt)
            copy(d_out[start : start + length, head], do)
            clear(dqs)
            clear(dks)
            clear(dvs)
            for top in range(0, length, BLOCK):
                end = min(top + BLOCK, length)
                size = end - top
                clear(probs)
                clear(dprobs)
                gemm(qs[top:end], kt, probs[:size], whole_tiles(end))
                gemm(do[top:end], vt, dprobs[:size], whole_tiles(end))
                for i in range(size):
                    row, drow, seen = probs[i], dprobs[i], top + i + 1
                    shift, dot = lse[start + top + i, head], np.float32(0)
                    for j in range(seen):
                        row[j] -= shift
                    exp_row(row, seen)
                    for j in range(seen):
                        dot += row[j] * drow[j]
                    for j in range(seen):
                        drow[j] = row[j] * (drow[j] - dot)
                    for j in range(seen, end):
                        row[j] = drow[j] = 0
                gemm(dprobs[:size, :end], ks[:end], dqs[top:end], depth)
                gemm(dprobs[:size, :end].T, qs[top:end], dks[:end], depth)
                gemm(probs[:size, :end].T, do[top:end], dvs[:end], value)
            _scatter(start, head, dqs, dks, dvs, cos, sin, scale, dq, dkv, dk_pe, nope)


@jit
def _scatter(
    start: int, head: int, dqs: Array, dks: Array, dvs: Array, cos: Array, sin: Array, scale: float,
    dq: Array, dkv: Array, dk_pe: Array, nope: int,
) -> None:  # fmt: skip
    """The transpose of `_gather`: back through the rotation, into the caller's rows."""
    rope = dk_pe.shape[1]
    for i in range(dqs.shape[0]):
        q_row, kv_row, pe_row = dq[start + i, head], dkv[start + i, head], dk_pe[start + i]
        for j in range(nope):
            q_row[j] = dqs[i, j] * scale
            kv_row[j] = dks[i, j]
        for j in range(dvs.shape[1]):
            kv_row[nope + j] = dvs[i, j]
        for j in range(rope // 2):
            c, s = cos[i, j], sin[i, j]
            even, odd = dqs[i, nope + 2 * j] * scale, dqs[i, nope + 2 * j + 1] * scale
            q_row[nope + 2 * j], q_row[nope + 2 * j + 1] = even * c + odd * s, odd * c - even * s
            even, odd = dks[i, nope + 2 * j], dks[i, nope + 2 * j + 1]
            pe_row[2 * j] += even * c + odd * s
            pe_row[2 * j + 1] += odd * c - even * s
