"""The BPE trainer: against its definition, and against the tokenizer files that hybrid carries."""

import base64
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid
from hybrid.demo.bpe import train_ranks, write_tokenizer
from hybrid.demo.data.encode import Encoder
from hybrid.demo.ranks import DOCUMENTS, RANKS, texts
from hybrid.demo.trainer.feed import document
from hybrid.tokenizer import RESERVED, Tokenizer

ASSETS = Path(hybrid.__file__).parent / "assets"


def carried_ranks() -> list[bytes]:
    lines = (ASSETS / "tiktoken.model").read_text().splitlines()
    return [base64.b64decode(line.split()[0]) for line in lines]


def by_definition(words: list[str], n_merges: int) -> list[bytes]:
    """Merges of lower-case words, recounting everything before each one."""
    pieces = [[bytes([b]) for b in word.encode()] for word in words]
    merges: list[bytes] = []
    while len(merges) < n_merges:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        repeated = [(count, pair) for pair, count in counts.items() if count > 1]
        if not repeated:
            break
        _, (left, right) = max(repeated)
        for piece in pieces:
            at = 0
            while at + 1 < len(piece):
                if (piece[at], piece[at + 1]) == (left, right):
                    piece[at : at + 2] = [left + right]
                at += 1
        if left + right not in merges:
            merges.append(left + right)
    return merges


def test_the_carried_tokenizer_says_training_documents_in_few_pieces() -> None:
    """It was trained on them: a word of theirs is a piece or two."""
    said = list(texts(Encoder(ASSETS), 40))
    words = re.findall(r"[A-Za-z]+", " ".join(said))
    tokenizer = Tokenizer.load(ASSETS)
    assert sum(len(tokenizer.encode(word)) for word in words) / len(words) < 1.6


def test_the_same_documents_give_the_same_ranks_in_any_process() -> None:
    code = (
        "from hybrid.demo.bpe import train_ranks; from hybrid.demo.data.encode import Encoder;"
        "from hybrid.demo.ranks import texts; from hybrid.synth import ASSETS;"
        "print(train_ranks(texts(Encoder(ASSETS), 40), 400))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] != ""


def test_the_carried_files_are_written_from_their_ranks(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, carried_ranks())
    for name in ("tiktoken.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


@pytest.mark.slow
def test_the_carried_ranks_serve_todays_data(tmp_path: Path) -> None:
    """They stay while a model is trained on; ranks made afresh would make documents hardly shorter.

    If not: `python -m hybrid.demo.ranks hybrid/assets`, and a model trained anew.
    """
    write_tokenizer(tmp_path, train_ranks(texts(Encoder(ASSETS), DOCUMENTS), RANKS))
    (tmp_path / "chat_template.jinja").write_bytes((ASSETS / "chat_template.jinja").read_bytes())
    fresh, carried = (
        sum(len(document(encoder, "train", 1, i).tokens) for i in range(300))
        for encoder in (Encoder(tmp_path), Encoder(ASSETS))
    )
    assert carried == pytest.approx(fresh, rel=0.02)


def test_the_carried_tokenizer_loads_and_round_trips() -> None:
    tokenizer = Tokenizer.load(ASSETS)
    assert tokenizer.vocab_size == len(carried_ranks()) + RESERVED
    for text in ["What's the weather in São Paulo? 👩‍👩‍👧‍👦", '{"city":"東京"}\n\n\tdef f(): pass', "\0\x7f"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_the_same_tokens_wherever_they_stand() -> None:
    """A model copies what it is told: from a sentence, an argument or a tool's name into another of them."""
    tokenizer = Tokenizer.load(ASSETS)
    for word in ["Berlin", "Xanthippe", "McDonald", "New", "coffee", "weather", "übung"]:
        alone = tokenizer.encode(word)
        for before in [" ", '"', "(", "'", ' "', "_", ".", "/"]:
            assert tokenizer.encode(before + word)[-len(alone) :] == alone
    assert len(tokenizer.encode("2026")) == 4
    for token in carried_ranks()[256:]:
        text = token.decode("utf-8", "replace")
        assert not any(char.isdigit() for char in text)
        assert text.isalpha() or not any(char.isalpha() for char in text)


def test_the_carried_special_tokens_have_k2s_spellings_flags_and_order(k2_files: Path) -> None:
    ours = json.loads((ASSETS / "tokenizer_config.json").read_text())
    theirs = json.loads((k2_files / "tokenizer_config.json").read_text())
    shift = 163584 - len(carried_ranks())
    shifted = {str(int(i) + shift): entry for i, entry in ours["added_tokens_decoder"].items()}
    assert shifted == theirs["added_tokens_decoder"]
    for key in ("bos_token", "eos_token", "pad_token", "unk_token", "tokenizer_class"):
        assert ours[key] == theirs[key]


@given(st.lists(st.text("abcd", min_size=1, max_size=12), min_size=1, max_size=20), st.integers(0, 20))
@settings(deadline=None)
def test_merges_are_those_of_the_definition(words: list[str], n_merges: int) -> None:
    expected = by_definition(words, n_merges)
    assert train_ranks(words, 256 + len(expected))[256:] == expected
    if len(expected) < n_merges:
        with pytest.raises(ValueError, match=f"the texts give only {256 + len(expected)} ranks, not"):
            train_ranks(words, 256 + n_merges)


def test_single_bytes_come_first() -> None:
    assert train_ranks([], 256) == [bytes([byte]) for byte in range(256)]
    with pytest.raises(ValueError, match="n_ranks is 255; the single bytes alone are 256"):
        train_ranks([], 255)
