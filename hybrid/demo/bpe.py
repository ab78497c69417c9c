"""A small, deterministic byte-pair-encoding trainer: text -> tokenizer files in K2's format.

The algorithm is Sennrich et al. 2016 (arXiv:1508.07909) on bytes.
"""

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]

from hybrid.tokenizer import CONFIG_FILE, RANKS_FILE, SPLIT_PATTERN

Pair = tuple[bytes, bytes]

# K2's special tokens: place after the ranks, spelling, "special" flag.
SPECIAL_TOKENS = [
    (0, "[BOS]", True),
    (1, "[EOS]", True),
    (2, "<|im_end|>", True),
    (3, "<|im_user|>", True),
    (4, "<|im_assistant|>", True),
    (6, "<|start_header_id|>", True),
    (7, "<|end_header_id|>", True),
    (9, "[EOT]", True),
    (10, "<|im_system|>", True),
    (11, "<|tool_calls_section_begin|>", False),
    (12, "<|tool_calls_section_end|>", False),
    (13, "<|tool_call_begin|>", False),
    (14, "<|tool_call_argument_begin|>", False),
    (15, "<|tool_call_end|>", False),
    (17, "<|im_middle|>", True),
    (254, "[UNK]", True),
    (255, "[PAD]", True),
]


def train_ranks(texts: Iterable[str], n_ranks: int) -> list[bytes]:
    """The 256 single bytes, then merges of `texts` in order of frequency, `n_ranks` tokens in all.

    Of equally frequent pairs the larger goes first, so the same texts always give the same ranks.

    Raises:
        ValueError: fewer than 256 ranks, or more than the texts have repeated pairs for.
    """
    if n_ranks < 256:
        raise ValueError(f"n_ranks is {n_ranks}; the single bytes alone are 256")
    pieces = _Pieces(texts)
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < n_ranks:
        pair = pieces.most_frequent()
        if pair is None:
            raise ValueError(f"the texts give only {len(ranks)} ranks, not {n_ranks}; train on more text")
        pieces.merge(pair)
        ranks.setdefault(pair[0] + pair[1], len(ranks))
    return list(ranks)


def write_tokenizer(directory: Path, ranks: list[bytes]) -> None:
    """Writes tiktoken.model and tokenizer_config.json with K2's special tokens right after `ranks`."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))
    (directory / RANKS_FILE).write_bytes(b"".join(lines))
    flags = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    config: dict[str, Any] = {
        "added_tokens_decoder": {
            str(len(ranks) + place): {"content": name, **flags, "special": special}
            for place, name, special in SPECIAL_TOKENS
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "TikTokenTokenizer",
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Pieces:
    """The distinct pieces of a text as lists of tokens, with how often each pair of tokens could merge."""

    def __init__(self, texts: Iterable[str]) -> None:
        split = regex.compile(SPLIT_PATTERN, regex.V1)
        found: Counter[str] = Counter()
        for text in texts:
            found.update(split.findall(text))
        self._tokens = [[bytes([byte]) for byte in piece.encode()] for piece in found]
        self._uses = list(found.values())
        self._counts: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, set[int]] = defaultdict(set)
        for place in range(len(self._tokens)):
            self._count(place, 1)

    def most_frequent(self) -> Pair | None:
        """The pair to merge next; None when none occurs twice."""
        if not self._counts:
            return None
        pair, count = max(self._counts.items(), key=lambda item: (item[1], item[0]))
        return pair if count > 1 else None

    def merge(self, pair: Pair) -> None:
        """Joins `pair` wherever it stands."""
        for place in self._places.pop(pair):
            self._count(place, -1)
            self._tokens[place] = joined(self._tokens[place], pair)
            self._count(place, 1)

    def _count(self, place: int, sign: int) -> None:
        """Adds (or takes away) the pairs of one piece."""
        tokens = self._tokens[place]
        for pair in pairwise(tokens):
            if not _may_merge(*pair):
                continue
            self._counts[pair] += sign * self._uses[place]
            if sign > 0:
                self._places[pair].add(place)
            elif not self._counts[pair]:
                del self._counts[pair]


def joined(tokens: list[bytes], pair: Pair) -> list[bytes]:
    """`tokens` with `pair` joined, from the left."""
    out: list[bytes] = []
    at = 0
    while at < len(tokens):
        width = 2 if tuple(tokens[at : at + 2]) == pair else 1
        out.append(b"".join(tokens[at : at + width]))
        at += width
    return out


def _may_merge(left: bytes, right: bytes) -> bool:
    """Keeps what a small model has to copy in the same tokens wherever it stands: digits stay single, and letters
    join letters only, so that ` rain`, `"rain` and `_rain` share their pieces."""
    joint = (left + right).decode("utf-8", "replace")
    return not any(char.isdigit() for char in joint) and len({char.isalpha() for char in joint}) == 1
