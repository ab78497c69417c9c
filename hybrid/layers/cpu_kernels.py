"""Numba kernels of the decoder layer's small CPU work: routing and decode attention.

Each row (token, or sequence and head) is computed alone in one fixed order, so that its bits depend on
nothing else in the batch. The large matrix products are offload's.
"""

import functools
import math
from typing import Any

import numba
import numpy as np
from numba import carray, types

from offload.kernels.intrinsics import as_pointer
from offload.kernels.jit import DONE, OPTIONS, compile_job, compile_python, jit
from offload.workers import claim

KEY_BLOCK = 32
"""Latent rows scored before the running softmax is brought up to date: 74 KB of K2's latents, within L2."""

# Lets sums be reordered into vector lanes and fused; NaN and infinity keep their meaning. The compiled order is fixed.
FAST = numba.njit(**OPTIONS, fastmath={"reassoc", "contract", "nsz"})

HEADS_AT_ONCE = 4
ATTEND = np.dtype(
    [
        (name, "i8")
        for name in ("rows", "heads", "latent_dim", "value_dim", "queries", "out", "latents", "lengths")
    ]
    + [("scale", "f8")]
)
"""Arguments of `attend_job`: sizes, then addresses. `latents` and `lengths` are int64 [rows]."""


def _route(
    logits: np.ndarray,
    bias: np.ndarray,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
) -> None:
    """DeepSeek-V3's noaux_tc routing, row by row; ties go to the lower index.

    logits float32 [T, experts], bias float32 [experts] -> topk_ids int64 [T, k], topk_weights float32 [T, k].
    """
    rows, experts = logits.shape
    top_k = topk_ids.shape[1]
    size = experts // n_group
    scores = np.empty(experts, np.float32)
    choice = np.empty(experts, np.float32)
    group_scores = np.empty(n_group, np.float32)
    kept = np.empty(n_group, np.bool_)
    for t in range(rows):
        for e in range(experts):
            scores[e] = np.float32(1) / (np.float32(1) + np.float32(math.exp(-logits[t, e])))
            choice[e] = scores[e] + bias[e]
        if n_group > 1:
            for g in range(n_group):
                best, second = np.float32(-np.inf), np.float32(-np.inf)
                for e in range(g * size, (g + 1) * size):
                    if choice[e] > best:
                        best, second = choice[e], best
                    elif choice[e] > second:
                        second = choice[e]
                group_scores[g] = best + second
            kept[:] = False
            for _ in range(topk_group):
                top = -1
                for g in range(n_group):
                    if not kept[g] and (top < 0 or group_scores[g] > group_scores[top]):
                        top = g
                kept[top] = True
            for e in range(experts):
                if not kept[e // size]:
                    choice[e] = -np.inf
        total = np.float32(0)
        for k in range(top_k):
            top = 0
            for e in range(1, experts):
                if choice[e] > choice[top]:
                    top = e
            topk_ids[t, k] = top
            topk_weights[t, k] = scores[top]
            total += scores[top]
            choice[top] = -np.inf
        factor = np.float32(scaling)
        for k in range(top_k):
            if normalise:
                topk_weights[t, k] = topk_weights[t, k] / (total + np.float32(1e-20)) * factor
            else:
                topk_weights[t, k] = topk_weights[t, k] * factor


@functools.cache
def route_kernel() -> Any:
    """`_route`, compiled or loaded from the cache."""
    matrix, ids = types.float32[:, ::1], types.int64[:, ::1]
    return compile_python(
        _route,
        types.void(
            matrix, types.float32[::1], types.int64, types.int64, types.boolean, types.float64, ids, matrix
        ),
    )


@FAST
def _scores(query, latents, begin, end, out):  # type: ignore[no-untyped-def]
    """out[i, k - begin] = query[i] . latents[k] for four heads at once: a latent is loaded for all four."""
    for k in range(begin, end):
        a = b = c = d = np.float32(0)
        for j in range(latents.shape[1]):
            x = latents[k, j]
            a += query[0, j] * x
            b += query[1, j] * x
            c += query[2, j] * x
            d += query[3, j] * x
        out[0, k - begin], out[1, k - begin], out[2, k - begin], out[3, k - begin] = a, b, c, d


@FAST
def _accumulate(weights, latents, begin, end, out):  # type: ignore[no-untyped-def]
    """out[i] += sum over k of weights[i, k - begin] * latents[k] for four heads, four latents at a time."""
    width = out.shape[1]
    k = begin
    while k + 4 <= end:
        for i in range(4):
            p, q = weights[i, k - begin], weights[i, k - begin + 1]
            r, s = weights[i, k - begin + 2], weights[i, k - begin + 3]
            for j in range(width):
                out[i, j] += (
                    p * latents[k, j] + q * latents[k + 1, j] + r * latents[k + 2, j] + s * latents[k + 3, j]
                )
        k += 4
    while k < end:
        for i in range(4):
            p = weights[i, k - begin]
            for j in range(width):
                out[i, j] += p * latents[k, j]
        k += 1


@jit
def _attend(query, latents, scale, out):  # type: ignore[no-untyped-def]
    """Absorbed attention of four heads of one token over one sequence's latents (online softmax).

    query float32 [4, latent_dim], latents float32 [context, latent_dim] -> out float32 [4, value_dim].
    """
    context, width = len(latents), out.shape[1]
    weights = np.empty((HEADS_AT_ONCE, KEY_BLOCK), np.float32)
    peak = np.full(HEADS_AT_ONCE, -np.inf, np.float32)
    mass = np.zeros(HEADS_AT_ONCE, np.float32)
    out[:] = 0
    for begin in range(0, context, KEY_BLOCK):
        end = min(begin + KEY_BLOCK, context)
        _scores(query, latents, begin, end, weights)
        for i in range(HEADS_AT_ONCE):
            top = peak[i]
            for k in range(end - begin):
                weights[i, k] *= np.float32(scale)
                top = max(top, weights[i, k])
            fade = np.float32(math.exp(peak[i] - top))
            total = np.float32(0)
            for k in range(end - begin):
                weights[i, k] = np.float32(math.exp(weights[i, k] - top))
                total += weights[i, k]
            if fade != np.float32(1):
                for j in range(width):
                    out[i, j] *= fade
            mass[i] = mass[i] * fade + total
            peak[i] = top
        _accumulate(weights, latents, begin, end, out)
    for i in range(HEADS_AT_ONCE):
        for j in range(width):
            out[i, j] /= mass[i]


_ATTEND = numba.from_dtype(ATTEND)


@functools.cache
def attend_job() -> Any:
    """The job that attends for every row (a token and its own sequence), shared out by four heads."""

    def attend(args: int, lane: int, lanes: int, control: int) -> int:  # noqa: ARG001 (a job's signature)
        job = carray(as_pointer(args, _ATTEND), 1)[0]
        groups = job.heads // HEADS_AT_ONCE
        addresses = carray(as_pointer(job.latents, numba.int64), job.rows)
        lengths = carray(as_pointer(job.lengths, numba.int64), job.rows)
        while True:
            number = claim(control, 0)
            if number >= job.rows * groups:
                return DONE
            row = number // groups
            query = job.queries + number * HEADS_AT_ONCE * job.latent_dim * 4
            out = job.out + number * HEADS_AT_ONCE * job.value_dim * 4
            _attend(
                carray(as_pointer(query, numba.float32), (HEADS_AT_ONCE, job.latent_dim)),
                carray(as_pointer(addresses[row], numba.float32), (lengths[row], job.latent_dim)),
                job.scale,
                carray(as_pointer(out, numba.float32), (HEADS_AT_ONCE, job.value_dim)),
            )

    return compile_job(attend)
