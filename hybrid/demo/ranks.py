"""The tokenizer of our own models: byte pairs of what the training split says, in K2's files.

    python -m hybrid.demo.ranks DIRECTORY

wrote hybrid/assets' tiktoken.model and tokenizer_config.json. Values of any words are drawn from the tokens of the
tokenizer before (`lexicon.pieces`), so that it is made from those that are carried, and another run makes another.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from hybrid.demo.bpe import train_ranks, write_tokenizer
from hybrid.demo.data.encode import Encoder
from hybrid.demo.trainer.feed import document
from hybrid.synth import ASSETS

RANKS = 1_000
"""More would make documents shorter, but a model copies only pieces that it often produces: of 800, 1,200 and 1,900
ranks 2, 4 and 13 % of held-out turns have one that training hardly does."""

DOCUMENTS = 3_000


def texts(encoder: Encoder, documents: int) -> Iterator[str]:
    """What stands between the special tokens of training documents."""
    special = set(encoder.tokenizer.special_ids.values())
    for i in range(documents):
        text: list[int] = []
        for token in document(encoder, "train", 0, i).tokens.tolist():
            if token in special:
                yield encoder.tokenizer.decode(text)
                text = []
            else:
                text.append(token)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hybrid.demo.ranks", description="Make the tokenizer.")
    parser.add_argument(
        "directory", type=Path, help="where its files go; the model is to be trained anew then"
    )
    directory = parser.parse_args().directory
    try:
        write_tokenizer(directory, train_ranks(texts(Encoder(ASSETS), DOCUMENTS), RANKS))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
