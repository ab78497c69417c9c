"""The latent KV cache: per token and layer one row of kv_lora_rank + qk_rope_head_dim numbers, never expanded
keys and values. `LatentCache` is one sequence's; `CachePool` keeps those of recent sequences for reuse.
"""

from copy import copy as copy_shallow

import torch
from torch import Tensor

from hybrid.config import ModelConfig

GROWTH = 1024
"""Tokens by which a cache grows at least."""


class LatentCache:
    """One sequence's latents, [num_hidden_layers, capacity, latent_dim], and the token ids they stand for.

    A row holds the normed latent, then the roped key. `length` rows of every layer are valid; a forward
    pass writes rows length..length+n of each layer in turn and then calls `advance`.

    Args:
        context: tokens that the sequence may come to; None: the model's maximum.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        context: int | None = None,
    ) -> None:
        self.token_ids: list[int] = []
        self._context = config.max_position_embeddings if context is None else context
        self._rows = torch.empty((config.num_hidden_layers, 0, config.latent_dim), dtype=dtype, device=device)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def capacity(self) -> int:
        """Tokens that memory is held for, valid or not."""
        return self._rows.shape[1]

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def reserve(self, n: int) -> None:
        """Make room for `n` more tokens, and for some that may follow, but for no more than the context."""
        layers, capacity, dim = self._rows.shape
        needed = self.length + n
        if needed <= capacity:
            return
        grown = max(capacity + capacity // 2, needed)
        grown = max(needed, min(-(-grown // GROWTH) * GROWTH, self._context))
        rows = torch.empty((layers, grown, dim), dtype=self._rows.dtype, device=self._rows.device)
        rows[:, : self.length] = self._rows[:, : self.length]
        self._rows = rows

    def layer(self, index: int) -> Tensor:
        """All rows of one layer, valid or not: [capacity, latent_dim]."""
        return self._rows[index]

    def advance(self, token_ids: list[int]) -> None:
        """Declare the rows of `token_ids` written in every layer."""
        self.token_ids.extend(token_ids)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.token_ids[length:]

    def fork(self, length: int) -> "LatentCache":
        """A copy of the first `length` tokens."""
        copy = copy_shallow(self)
        copy.token_ids = self.token_ids[:length]
        copy._rows = self._rows[:, :length].clone()
        return copy


class CachePool:
    """Caches of recent sequences, so that the next prompt recomputes only what is new in it.

    At most `max_sequences`, together with memory for at most `max_tokens`; the least recently used goes first.
    """

    def __init__(self, max_sequences: int, max_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self._kept: list[LatentCache] = []  # least recently used first

    def take(self, token_ids: list[int]) -> LatentCache | None:
        """The longest prefix of `token_ids` that is kept, as a cache that the caller owns; None if there is none.

        At least one token is left to compute, because its logits are wanted. A cache that goes on for longer
        than what it shares stays for its own conversation and is copied; another is cut.
        """
        best, shared = None, 0
        for cache in self._kept:
            n = _common_prefix(cache.token_ids, token_ids[:-1])
            if n > shared:
                best, shared = cache, n
        if best is None:
            return None
        if shared < best.length - shared:
            return best.fork(shared)
        self._kept.remove(best)
        best.truncate(shared)
        return best

    def keep(self, cache: LatentCache) -> None:
        """Hand a cache back for later reuse. One that holds nothing (a prefill was cancelled) is let go."""
        if cache.length == 0:
            return
        self._kept.append(cache)
        while len(self._kept) > self.max_sequences or (
            len(self._kept) > 1 and sum(c.capacity for c in self._kept) > self.max_tokens
        ):
            self._kept.pop(0)

    @property
    def tokens(self) -> int:
        """Tokens that need not be computed again."""
        return sum(c.length for c in self._kept)


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
