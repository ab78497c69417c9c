"""Causal multi-head latent attention over whole documents, expanded (not absorbed) as training wants it.

A thread owns whole documents, so no two threads write the same row. Within one, each head's queries, keys and
values are gathered into small dense matrices, rotated, and worked through in blocks of BLOCK queries. The
backward pass recomputes the probabilities from the kept log-sum-exp (arXiv:2205.14135) rather than keep them.
"""

# ruff: noqa: ARG001 (Crew.run hands every kernel the number of its part)

from functools import cache
from typing import Any

import numpy as np

from hybrid.demo.trainer.kernels.amx import STEP
from hybrid.demo.trainer.kernels.gemm import Array, clear, copy, exp_row, jit, max_row, rounded_up, transpose
from hybrid.demo.trainer.kernels.products import Products

BLOCK = 64


@jit
def _rows_of(count: int, width: int) -> Array:
    return np.zeros((count, width), np.float32)


@jit
def _gather(
    start: int, length: int, head: int, q: Array, kv: Array, k_pe: Array, cos: Array, sin: Array, scale: float,
    qs: Array, ks: Array, vs: Array,
) -> None:  # fmt: skip
    """Head `head`'s rotated queries (times `scale`) and keys [>=L,D] and values [>=L,V] of one document."""
    rope = k_pe.shape[1]
    nope = qs.shape[1] - rope
    for i in range(length):
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


@cache
def forward(products: Products) -> Any:
    """The kernel of the forward pass, compiled with a way to multiply."""
    _, begin, finish, left, right, _, right_turned, _, rows, multiply = products

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
        begin()
        for doc in range(first, last):
            start, length = starts[doc], starts[doc + 1] - starts[doc]
            padded = rounded_up(length, STEP)
            qs, ks, vs = _rows_of(padded, depth), _rows_of(padded, depth), _rows_of(padded, value)
            block, block_out = np.empty((BLOCK, padded), np.float32), np.empty((BLOCK, value), np.float32)
            for head in range(heads):
                _gather(start, length, head, q, kv, k_pe, cos, sin, scale, qs, ks, vs)
                q_left, k_right, v_right = left(qs), right_turned(ks), right(vs)
                for top in range(0, length, BLOCK):
                    end = min(top + BLOCK, padded)
                    size, scores = min(BLOCK, length - top), block[: end - top, :end]
                    multiply(q_left[top:end], k_right[:, :end], scores, False)
                    for i in range(size):
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
                    clear(scores[size:])
                    multiply(left(scores), rows(v_right, 0, end), block_out[: end - top], False)
                    copy(block_out[:size], out[start + top : start + top + size, head])
        finish()

    return attention_forward


@cache
def backward(products: Products) -> Any:
    """The kernel of the backward pass, compiled with a way to multiply."""
    _, begin, finish, left, right, left_turned, right_turned, columns, rows, multiply = products

    @jit
    def attention_backward(
        part: int, first: int, last: int, starts: Array, q: Array, kv: Array, k_pe: Array, cos: Array, sin: Array,
        scale: float, out: Array, lse: Array, d_out: Array, dq: Array, dkv: Array, dk_pe: Array,
    ) -> None:  # fmt: skip
        """Gradients of `attention_forward`; dk_pe must come in as zeros."""
        heads, depth = q.shape[1], q.shape[2]
        value = out.shape[2]
        begin()
        for doc in range(first, last):
            start, length = starts[doc], starts[doc + 1] - starts[doc]
            padded = rounded_up(length, STEP)
            qs, ks, vs = _rows_of(padded, depth), _rows_of(padded, depth), _rows_of(padded, value)
            do, dqs = _rows_of(padded, value), np.empty((padded, depth), np.float32)
            dkt, dvt = np.empty((depth, padded), np.float32), np.empty((value, padded), np.float32)
            block, d_block = np.empty((BLOCK, padded), np.float32), np.empty((BLOCK, padded), np.float32)
            for head in range(heads):
                _gather(start, length, head, q, kv, k_pe, cos, sin, scale, qs, ks, vs)
                copy(d_out[start : start + length, head], do)
                q_left, do_left, q_turned, do_turned = left(qs), left(do), left_turned(qs), left_turned(do)
                k_right, k_turned, v_turned = right(ks), right_turned(ks), right_turned(vs)
                clear(dkt)
                clear(dvt)
                for top in range(0, length, BLOCK):
                    end = min(top + BLOCK, padded)
                    size = min(BLOCK, length - top)
                    probs, d_probs = block[: end - top, :end], d_block[: end - top, :end]
                    multiply(q_left[top:end], k_turned[:, :end], probs, False)
                    multiply(do_left[top:end], v_turned[:, :end], d_probs, False)
                    for i in range(size):
                        row, d_row, seen = probs[i], d_probs[i], top + i + 1
                        shift, pull = lse[start + top + i, head], np.float32(0)
                        for j in range(seen):
                            row[j] -= shift
                        exp_row(row, seen)
                        for j in range(seen):
                            pull += row[j] * d_row[j]
                        for j in range(seen):
                            d_row[j] = row[j] * (d_row[j] - pull)
                        for j in range(seen, end):
                            row[j] = d_row[j] = 0
                    clear(probs[size:])
                    clear(d_probs[size:])
                    multiply(left(d_probs), rows(k_right, 0, end), dqs[top:end], False)
                    multiply(columns(q_turned, top, end), right(d_probs), dkt[:, :end], True)
                    multiply(columns(do_turned, top, end), right(probs), dvt[:, :end], True)
                transpose(dkt, ks)
                transpose(dvt, vs)
                _scatter(start, length, head, dqs, ks, vs, cos, sin, scale, dq, dkv, dk_pe)
        finish()

    return attention_backward


@jit
def _scatter(
    start: int, length: int, head: int, dqs: Array, dks: Array, dvs: Array, cos: Array, sin: Array, scale: float,
    dq: Array, dkv: Array, dk_pe: Array,
) -> None:  # fmt: skip
    """The transpose of `_gather`: back through the rotation, into the caller's rows."""
    rope = dk_pe.shape[1]
    nope = dqs.shape[1] - rope
    for i in range(length):
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
