"""The training step on an NVIDIA GPU: operations that never wait for it, so that the whole step can be captured as
one CUDA graph. A step is two thousand kernels of some ten microseconds; launched one by one they take several times as
long as they run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid.demo.trainer.feed import LONGEST, Batch
from hybrid.demo.trainer.ops import Documents, Rope, TorchOps, experts_in_blocks, pair_slots, rotated
from offload.errors import UsageError

BLOCK = 128
"""Queries whose logits are examined at once."""
TILE = 64
"""Rows that a product with one expert's weights takes; each expert's last tile is filled up with zeros."""
_WARM_UP = 3
"""Steps before the capture, which let libraries do what they do once."""
_ROOM = 128
"""There is room for a document per so many tokens of a batch, and for 31 more; documents have 640 on average.
Attention's kernels start blocks for all there might be, so room costs time."""


def require_support(device: torch.device) -> None:
    """Raises:
    UsageError: the GPU, or torch, is too old for a captured step.
    """
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if torch.cuda.get_device_capability(device) < (8, 0) or release < (2, 11):
        raise UsageError(
            f"training on a GPU takes one of compute capability 8.0 (Ampere) or newer and torch 2.11 or newer; "
            f"here are {torch.cuda.get_device_name(device)} and torch {torch.__version__}. Use --device cpu"
        )


@dataclass(frozen=True, slots=True)
class Packed(Documents):
    """Documents in shapes that only the number of tokens decides. Unlike other Documents' their `starts` is int32, on
    the model's device, and repeats its last entry; `longest` is LONGEST whatever they are.

    `barred` bfloat16 [blocks, BLOCK, LONGEST + BLOCK]: -inf where a query must not see a key, else 0.
    """

    barred: Tensor

    @classmethod
    def over(cls, starts: Tensor, row: Tensor, position: Tensor) -> "Packed":
        """starts int32 [documents + 1 at most], row, position int64 [tokens] (of Documents), on one device."""
        query = F.pad(row, (0, -len(row) % BLOCK), value=-1).view(-1, BLOCK, 1)
        key = _windows(F.pad(row, (LONGEST, -len(row) % BLOCK), value=-2)[:, None], LONGEST)
        ahead = torch.ones(BLOCK, LONGEST + BLOCK, dtype=torch.bool, device=row.device).triu(LONGEST + 1)
        seen = (query == key.transpose(1, 2)) & ~ahead
        barred = torch.where(seen, 0.0, -torch.inf).to(torch.bfloat16)
        return cls(starts, row, position, LONGEST, barred)


def _windows(x: Tensor, before: int) -> Tensor:
    """x [before + blocks * BLOCK, d] -> [blocks, before + BLOCK, d], overlapping views."""
    blocks = (len(x) - before) // BLOCK
    step, across = x.stride()
    return x.as_strided((blocks, before + BLOCK, x.shape[1]), (BLOCK * step, step, across))


class CudaOps(TorchOps):
    """Ops whose shapes are known before the work is done. Attention takes and gives bfloat16, on Packed documents; the
    factors of other products are rounded to TF32, if torch is so set."""

    def attention(
        self, q: Tensor, kv: Tensor, k_pe: Tensor, docs: Documents, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(docs, Packed):
            return super().attention(q, kv, k_pe, docs, rope)
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (x.bfloat16() for x in rotated(q, kv, k_pe, docs, rope))
        out = varlen_attn(
            query, key, value.contiguous(), docs.starts, docs.starts, LONGEST, LONGEST, scale=rope.scale,
            window_size=(-1, 0),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        with torch.no_grad():
            peak = peak_logits(query, key, docs.barred).float() * rope.scale
        return out.float(), peak

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down_t: Tensor) -> Tensor:
        experts, (tokens, top_k) = len(gate_up), ids.shape
        pairs = pair_slots(ids, experts)
        tiles = (pairs.counts + TILE - 1) // TILE
        ends = tiles.cumsum(0)
        slot = (ends - tiles)[pairs.expert] * TILE + pairs.rank
        count = tokens * top_k // TILE + experts  # at most
        owner = torch.searchsorted(ends, torch.arange(count, device=x.device), right=True).clamp_max_(
            experts - 1
        )
        own = (matrices.index_select(0, owner) for matrices in (gate_up, down_t))
        return experts_in_blocks(x, weights, pairs, slot, TILE, *own)


def peak_logits(q: Tensor, k: Tensor, barred: Tensor) -> Tensor:
    """The largest unscaled q.k of each head that `barred` (of Packed) lets through: q, k bfloat16 [T,heads,d] ->
    bfloat16 [heads]."""
    tokens, heads, _ = q.shape
    fill = -tokens % BLOCK
    q, k = F.pad(q, (0, 0, 0, 0, 0, fill)), F.pad(k, (0, 0, 0, 0, LONGEST, fill))
    return torch.stack([
        torch.baddbmm(barred, q[:, h].unflatten(0, (-1, BLOCK)), _windows(k[:, h], LONGEST).transpose(1, 2)).amax()
        for h in range(heads)
    ])  # fmt: skip


Update = Callable[[Tensor, Tensor, Documents, Tensor], Tensor]
"""tokens, targets int64 [T], their documents, a factor [] on the rates -> what was observed, a tensor."""


class CapturedStep:
    """A step on batches of a fixed number of tokens, as a CUDA graph.

    Args:
        update: the step; it must do the same to the same memory every time, without waiting for the GPU.
    """

    def __init__(self, update: Update, batch_tokens: int, device: torch.device) -> None:
        self._update, self._tokens = update, batch_tokens
        self._rows = torch.zeros(
            4, batch_tokens, dtype=torch.int64, device=device
        )  # tokens, targets, row, position
        self._starts = torch.zeros(batch_tokens // _ROOM + 32, dtype=torch.int32, device=device)
        self._factor = torch.zeros((), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._observed = torch.zeros(0)
        self._taken = 0
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch, factor: float) -> Tensor:
        """Take the step. -> what `update` observed, on the GPU; it is overwritten by the next.

        Raises:
            UsageError: the batch has more or fewer tokens, or too many documents.
        """
        self._stage(batch, factor)
        if self._graph is not None:
            self._graph.replay()
        elif self._taken < _WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._observed = self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._observed = self._step()
            self._graph = graph
            graph.replay()
        self._taken += 1
        return self._observed

    def _step(self) -> Tensor:
        tokens, targets, row, position = self._rows
        return self._update(tokens, targets, Packed.over(self._starts, row, position), self._factor)

    def _stage(self, batch: Batch, factor: float) -> None:
        cpu = torch.device("cpu")
        docs = Documents.of(batch.lengths, cpu)
        room = len(self._starts) - len(docs.starts)
        if len(batch.tokens) != self._tokens or room < 0 or docs.longest > LONGEST:
            raise UsageError(
                f"a batch of {len(batch.tokens)} tokens in {len(batch.lengths)} documents, the longest of "
                f"{docs.longest}; this step was made for {self._tokens} tokens in {len(self._starts) - 1} documents "
                f"of {LONGEST} at most"
            )
        rows = torch.stack([batch.tokens, batch.targets, docs.row, docs.position])
        self._rows.copy_(rows.pin_memory(), non_blocking=True)
        starts = F.pad(docs.starts.int(), (0, room), value=self._tokens)
        self._starts.copy_(starts.pin_memory(), non_blocking=True)
        self._factor.fill_(factor)
