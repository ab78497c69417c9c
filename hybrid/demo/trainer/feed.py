"""Batches of documents, written and encoded ahead by other processes.

Document i of a seed is the same whoever writes it, so a run goes on exactly where it stopped from one number.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrid.demo.data.encode import Encoded, Encoder
from hybrid.demo.data.generator import conversation
from offload.errors import UsageError

CHUNK = 64
"""Documents that one task writes."""
FEWEST = 1024
"""Tokens of a batch: declarations alone, which nobody has to produce, take up to some 400."""
LONGEST = 2560
"""Tokens of a document at most; hardly one in a million has more, and is cut."""

_encoder: Encoder | None = None  # one in each worker process


class Batch(NamedTuple):
    """Documents in a row. `tokens` int64 [T]; `targets` int64 [T]: the next token where the assistant produces
    it, else -1; `lengths` int64 [documents]; `next_document`: the first that is not in it."""

    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    next_document: int


def document(encoder: Encoder, split: str, seed: int, index: int) -> Encoded:
    """Document `index` of a seed's stream."""
    return encoder.encode(conversation(split, Random(f"{split} {seed} {index}")))


def collate(documents: list[Encoded], next_document: int) -> Batch:
    """Documents one after the other."""
    tokens = np.concatenate([d.tokens for d in documents]).astype(np.int64)
    targets = np.full(len(tokens), -1, np.int64)
    produced = np.concatenate([d.produced for d in documents])
    targets[:-1][produced[1:]] = tokens[1:][produced[1:]]  # a document's first token is never produced
    lengths = torch.tensor([len(d.tokens) for d in documents])
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), lengths, next_document)


def _start_worker(directory: Path) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the group; the trainer ends its workers
    _encoder = Encoder(directory)


def _write_chunk(split: str, seed: int, first: int) -> list[Encoded]:
    assert _encoder is not None
    return [document(_encoder, split, seed, i) for i in range(first, first + CHUNK)]


class Feed:
    """Training batches of exactly `batch_tokens` tokens, from document `start` on; the last document of each is cut
    where it is full, and one that is very long at LONGEST tokens; what is cut off is never seen.

    Args:
        directory: tokenizer files and chat template.
        workers: processes that write ahead; each writes about 100,000 tokens a second.

    Raises:
        UsageError: `batch_tokens` is less than FEWEST.
    """

    def __init__(self, directory: Path, seed: int, batch_tokens: int, start: int, workers: int) -> None:
        if batch_tokens < FEWEST:
            raise UsageError(
                f"{batch_tokens} tokens a step: {FEWEST} at least, so that each has some to learn"
            )
        self._seed, self._batch_tokens, self._start = seed, batch_tokens, start
        self._ahead = 2 * workers + 2
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(directory,))

    def documents(self) -> Iterator[Encoded]:
        """Every document from the start on, in order."""
        waiting: deque[Future[list[Encoded]]] = deque()
        first = self._start - self._start % CHUNK
        skip = self._start - first
        while True:
            while len(waiting) < self._ahead:
                waiting.append(self._pool.submit(_write_chunk, "train", self._seed, first))
                first += CHUNK
            yield from waiting.popleft().result()[skip:]
            skip = 0

    def batches(self) -> Iterator[Batch]:
        """Endless batches."""
        held: list[Encoded] = []
        size = 0
        following = self._start
        for tokens, produced in self.documents():
            kept = min(len(tokens), LONGEST, self._batch_tokens - size)
            held.append(Encoded(tokens[:kept], produced[:kept]))
            size += kept
            following += 1
            if size == self._batch_tokens:
                yield collate(held, following)
                held, size = [], 0

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
