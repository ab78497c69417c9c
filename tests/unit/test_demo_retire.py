"""Tokens that training hardly met are taken out, and nothing else changes."""

import shutil
from pathlib import Path

from hybrid.demo.data.encode import Encoder
from hybrid.demo.retire import retire, rewrite, seldom_met
from hybrid.synth import ASSETS
from hybrid.tokenizer import Tokenizer


def test_words_of_seldom_tokens_are_spelt_in_others(tmp_path: Path) -> None:
    before = Tokenizer.load(ASSETS)
    (seldom,) = before.encode("Sydney")
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, tmp_path)
    assert rewrite(tmp_path, {seldom}) == 1
    after = Tokenizer.load(tmp_path)
    spelt = after.encode("Sydney")
    assert len(spelt) > 1
    assert seldom not in spelt
    assert after.decode(spelt) == "Sydney"
    for text in ("What is the weather in Berlin?", 'get_weather {"city": "Oslo"}', " Sid", "天气"):
        assert after.encode(text) == before.encode(text)
    assert after.vocab_size == before.vocab_size


def test_what_other_tokens_are_merged_from_stays() -> None:
    ranks = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b"abcd", b"xy"]
    assert retire(ranks, {256, 257, 259}) == [*ranks[:259], ranks[259][:0] + retire(ranks, {259})[259]]
    assert retire(ranks, {256, 257, 258})[256:259] != ranks[256:259]
    assert len(set(retire(ranks, set(range(256, 260))))) == len(ranks)


def test_held_out_cities_are_among_them() -> None:
    encoder = Encoder(ASSETS)
    seldom = seldom_met(encoder, seed=0, documents=500)
    assert encoder.tokenizer.encode("Sydney")[0] in seldom
    assert encoder.tokenizer.encode("weather")[0] not in seldom
