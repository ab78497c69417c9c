"""The operations a training step is made of, in plain torch: the reference, and what runs on a GPU.

`Ops` is the face of both implementations; `hybrid.demo.trainer.native` has the one compiled for CPUs.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Documents:
    """Several documents one after the other in one row of tokens; none attends to another.

    `starts` int64 [documents + 1] on the CPU; `row`, `position` int64 [tokens] on the model's device: the
    document and the place in it of every token; `longest`: tokens of the longest.
    """

    starts: Tensor
    row: Tensor
    position: Tensor
    longest: int

    @property
    def slot(self) -> Tensor:
        """int64 [tokens]: the place of every token where each document takes `longest` places."""
        return self.row * self.longest + self.position

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> "Documents":
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=starts[1:])
        row = torch.repeat_interleave(lengths)
        position = torch.arange(int(starts[-1])) - starts[row]
        return cls(starts, row.to(device), position.to(device), int(lengths.max()))


@dataclass(frozen=True, slots=True)
class Rope:
    """cos and sin [positions, rope/2] and the softmax scale."""

    cos: Tensor
    sin: Tensor
    scale: float


class Ops(Protocol):
    """Differentiable operations on rows of tokens, float32."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T,H] / rms * weight [H]."""

    def attention(
        self, q: Tensor, kv: Tensor, k_pe: Tensor, docs: Documents, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """q [T,heads,nope+rope], kv [T,heads,nope+V], k_pe [T,rope], not yet rotated -> [T,heads,V], and the
        largest scaled logit of each head [heads], without gradient."""

    def route(self, logits: Tensor, bias: Tensor, top_k: int, factor: float) -> tuple[Tensor, Tensor]:
        """logits [T,E], bias [E] (which only selects) -> ids int64 [T,k], weights [T,k]."""

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down_t: Tensor) -> Tensor:
        """sum_k weight_k * down(silu(gate x) * up x): x [T,H], gate_up [E,2I,H], down_t [E,I,H] -> [T,H]."""


class TorchOps:
    """Ops on any device, from torch's own operations.

    Rows are gathered by index_select, whose gradient is a plain index_add; that of indexing sorts first.
    """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def attention(
        self, q: Tensor, kv: Tensor, k_pe: Tensor, docs: Documents, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        # Padding lies behind each document, where a causal mask never looks.
        q_pad, k_pad, v_pad = (_pad(x, docs) for x in rotated(q, kv, k_pe, docs, rope))
        out = F.scaled_dot_product_attention(q_pad, k_pad, v_pad, is_causal=True, scale=rope.scale)
        with torch.no_grad():
            peak = _peak_logits(q_pad, k_pad, docs) * rope.scale
        return out.transpose(1, 2).flatten(0, 1).index_select(0, docs.slot), peak

    def route(self, logits: Tensor, bias: Tensor, top_k: int, factor: float) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        ids = (scores.detach() + bias).topk(top_k, dim=-1).indices
        picked = scores.gather(1, ids)
        return ids, picked / (picked.sum(-1, keepdim=True) + 1e-20) * factor

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down_t: Tensor) -> Tensor:
        experts = len(gate_up)
        pairs = pair_slots(ids, experts)
        capacity = int(pairs.counts.max())
        slot = pairs.expert * capacity + pairs.rank
        return experts_in_blocks(x, weights, pairs, slot, capacity, gate_up, down_t)


def experts_in_blocks(
    x: Tensor, weights: Tensor, pairs: "Pairs", slot: Tensor, size: int, gate_up: Tensor, down_t: Tensor
) -> Tensor:
    """`Ops.experts` with the pairs laid out in blocks of `size` rows, each with matrices of its own.

    `slot` int64 [T*k]: each pair's row; gate_up [blocks,2I,H], down_t [blocks,I,H].
    """
    blocks, hidden = len(gate_up), x.shape[1]
    rows = x.new_zeros(blocks * size, hidden).index_copy_(0, slot, x.index_select(0, pairs.token))
    gate, up = torch.bmm(rows.view(blocks, size, hidden), gate_up.transpose(1, 2)).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, down_t).flatten(0, 1)
    share = weights.flatten().index_select(0, pairs.order)
    return torch.zeros_like(x).index_add_(0, pairs.token, out.index_select(0, slot) * share[:, None])


def rotated(
    q: Tensor, kv: Tensor, k_pe: Tensor, docs: Documents, rope: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's inputs (`Ops.attention`) -> query, key [T,heads,nope+rope] in their places, value [T,heads,V]."""
    nope = q.shape[-1] - k_pe.shape[-1]
    cos, sin = (table.index_select(0, docs.position)[:, None] for table in (rope.cos, rope.sin))
    query = torch.cat((q[..., :nope], _rotate(q[..., nope:], cos, sin)), -1)
    shared = _rotate(k_pe[:, None], cos, sin).expand(-1, q.shape[1], -1)
    return query, torch.cat((kv[..., :nope], shared), -1), kv[..., nope:]


class Pairs(NamedTuple):
    """The pairs of a token and an expert it goes to, by expert: the `expert` [T*k] of each, its `token`, its `rank`
    among those of the expert, its place in the flattened ids (`order`), and each expert's `counts` [E]."""

    expert: Tensor
    token: Tensor
    rank: Tensor
    order: Tensor
    counts: Tensor


def pair_slots(ids: Tensor, experts: int) -> Pairs:
    """ids int64 [T,k] -> its pairs, all int64."""
    expert, order = ids.flatten().sort(stable=True)
    counts = tokens_per_expert(ids, experts)
    rank = torch.arange(len(expert), device=ids.device) - (counts.cumsum(0) - counts).index_select(0, expert)
    return Pairs(expert, order // ids.shape[1], rank, order, counts)


def tokens_per_expert(ids: Tensor, experts: int) -> Tensor:
    """ids int64 [T,k] -> int64 [E]. As bincount, for which a GPU would have to be waited for."""
    flat = ids.flatten()
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [T,heads,d] by cos, sin [T,1,d/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def _pad(x: Tensor, docs: Documents) -> Tensor:
    """[T,heads,d] -> [documents,heads,longest,d]."""
    out = x.new_zeros((len(docs.starts) - 1) * docs.longest, *x.shape[1:]).index_copy_(0, docs.slot, x)
    return out.unflatten(0, (-1, docs.longest)).transpose(1, 2)


def _peak_logits(q: Tensor, k: Tensor, docs: Documents) -> Tensor:
    """The largest unscaled causal q.k of each head over all documents, from padded q, k: [heads]."""
    size = docs.longest
    hidden = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)
    padding = torch.arange(size, device=q.device) >= docs.starts.diff().to(q.device)[:, None]
    peaks = []
    step = max(1, 2**26 // (q.shape[1] * size * size))
    for i in range(0, len(q), step):
        scores = (q[i : i + step] @ k[i : i + step].transpose(-1, -2)).masked_fill_(hidden, -torch.inf)
        scores.masked_fill_(padding[i : i + step, None, :, None], -torch.inf)
        peaks.append(scores.amax((0, 2, 3)))
    return torch.stack(peaks).amax(0)
