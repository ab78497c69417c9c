"""Taking tokens out of the vocabulary that training hardly met.

The tokenizer knows more words than training produces: cities that are kept for the other splits, say. A model cannot
copy a token that it never produced. Without that token the word is spelt in smaller ones, which it can.
"""

from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np

from hybrid.demo.bpe import joined, write_ranks
from hybrid.demo.data.encode import Encoder
from hybrid.demo.data.generator import conversation
from hybrid.tokenizer import RANKS_FILE, read_ranks

DOCUMENTS = 10_000  # that tokens are counted in
SEEN, PRODUCED = 30, 10  # a token met less often than both in these is taken out


def seldom_met(encoder: Encoder, seed: int, documents: int = DOCUMENTS) -> set[int]:
    """Ids of tokens that training documents hardly hold."""
    vocabulary = encoder.tokenizer.vocab_size
    seen, produced = np.zeros(vocabulary, np.int64), np.zeros(vocabulary, np.int64)
    for i in range(documents):
        encoded = encoder.encode(conversation("train", Random(f"count {seed} {i}")))
        np.add.at(seen, encoded.tokens, 1)
        np.add.at(produced, encoded.tokens[encoded.produced], 1)
    return {int(i) for i in np.flatnonzero((seen < SEEN) & (produced < PRODUCED))}


def retire(ranks: list[bytes], seldom: set[int]) -> list[bytes]:
    """The ranks with those of `seldom` that no other token is merged from replaced by bytes that no text holds."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    needed: set[bytes] = set()
    for rank, token in enumerate(ranks):
        if rank not in seldom:
            needed.update(_merges(token, rank_of))
    return [
        _unused(rank) if len(token) > 1 and rank in seldom and token not in needed else token
        for rank, token in enumerate(ranks)
    ]


def rewrite(directory: Path, seldom: set[int]) -> int:
    """Retire tokens in a checkpoint's ranks; -> how many."""
    ranks = read_ranks(directory / RANKS_FILE)
    kept = retire(ranks, seldom)
    write_ranks(directory, kept)
    return sum(a != b for a, b in zip(ranks, kept, strict=True))


def _merges(token: bytes, rank_of: dict[bytes, int]) -> list[bytes]:
    """Every token that byte-pair encoding makes on its way to `token`."""
    parts, made = [token[i : i + 1] for i in range(len(token))], []
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda pair: rank_of.get(b"".join(pair), len(rank_of)))
        if b"".join(pair) not in rank_of:
            break
        parts = joined(parts, pair)
        made.append(b"".join(pair))
    return made


def _unused(rank: int) -> bytes:
    """Four bytes of its own for a rank, which UTF-8 never has in a row."""
    return bytes([0xFF, 0xF0 | rank >> 12, 0xC0 | rank >> 6 & 0x3F, 0xC0 | rank & 0x3F])
