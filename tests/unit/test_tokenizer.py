"""The tokenizer against K2's published files, against tiktoken itself, and on damaged files."""

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.tokenizer import RESERVED, SPLIT_PATTERN, Tokenizer
from offload.errors import RequestError, TokenizerError

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what they've said; I'LL see you'd.",
    "Привет, мир! Ёлка, щука. Καλημέρα κόσμε. ÇÖĞÜŞ İstanbul. Ǆ ǅ ǆ ʰʲ",
    "你好，世界！混合text和中文123。鿿〇㐀𠀀𪛖 漢字とかな交じり文、カタカナ。한국어 문장입니다.",
    "مرحبا بالعالم ١٢٣ שלום עולם नमस्ते दुनिया สวัสดีชาวโลก Xin chào thế giới",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ❤️‍🔥 1️⃣ 🤷🏻‍♀️",
    "def f(x: int) -> str:\n\treturn f'{x:>08b}'  # TODO?\n\n\nclass A(B):\r\n    pass\r\n\r\n",
    '{"city": "Berlin", "n": [1, 22, 333, 4444, 55555], "nested": {"a": null}}',
    "e\u0301 o\u0308 Z̴̢͇͑a̸l̵g̷o̶ \u200b\u200d\ufeff\u00ad\u2028\u2029\x85 \x00\x01\x7f",
    "  leading\n   \n\n trailing   \t \n  ",
    "<|im_end|> <|im_user|>user<|im_middle|> [BOS][EOS][PAD] <|reserved_token_163589|>",
]


@pytest.fixture(scope="module")
def k2(k2_files: Path) -> Tokenizer:
    return Tokenizer.load(k2_files)


@pytest.fixture(scope="module")
def k2_oracle(k2_files: Path) -> tiktoken.Encoding:
    """tiktoken set up straight from the file, independently of hybrid's reader."""
    lines = (line.split() for line in (k2_files / "tiktoken.model").read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("oracle", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def small_files(directory: Path, *, merges: tuple[bytes, ...] = (b"he", b"ll", b"hell")) -> dict[str, Any]:
    """Writes a 259-rank tokenizer and returns its tokenizer_config.json as an object."""
    ranks = [*(bytes([b]) for b in range(256)), *merges]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)]
    (directory / "tiktoken.model").write_text("".join(lines))
    n = len(ranks)
    config: dict[str, Any] = {
        "added_tokens_decoder": {
            str(n): {"content": "[BOS]", "special": True},
            str(n + 2): {"content": "<|im_end|>", "special": True},
            str(n + 11): {"content": "<|tool_call_begin|>", "special": False},
            str(n + 255): {"content": "[PAD]", "special": True},
        }
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("small")
    small_files(directory)
    return Tokenizer.load(directory)


# K2's own files


def test_k2_ids_and_names(k2: Tokenizer) -> None:
    assert k2.vocab_size == 163840
    assert len(k2.special_ids) == RESERVED
    assert k2.special_ids["[BOS]"] == 163584
    assert k2.special_ids["<|im_end|>"] == 163586
    assert k2.special_ids["<|tool_call_argument_begin|>"] == 163598
    assert k2.special_ids["<|reserved_token_163589|>"] == 163589
    assert k2.special_ids["[PAD]"] == 163839


def test_k2_published_vector(k2: Tokenizer) -> None:
    text = (
        "Let me check that for you.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Berlin"}<|tool_call_end|><|tool_calls_section_end|>'
    )
    expected = [9413, 1019, 2598, 473, 395, 398, 13, 163595, 163597, 41937, 1150, 21055, 2800, 25, 15]
    expected += [163598, 8264, 37666, 1289, 414, 67347, 4797, 16934, 163599, 163596]
    ids: list[int] = []
    for part in re.split(r"(<\|[a-z_]+\|>)", text):
        ids += [k2.special_ids[part]] if part in k2.special_ids else k2.encode(part)
    assert ids == expected
    assert k2.decode(expected) == text


@pytest.mark.parametrize("text", CORPUS)
def test_k2_encodes_as_tiktoken_does_and_round_trips(
    k2: Tokenizer, k2_oracle: tiktoken.Encoding, text: str
) -> None:
    ids = k2.encode(text)
    assert ids == k2_oracle.encode_ordinary(text)
    assert k2.decode(ids) == text
    assert max(ids) < 163584


@pytest.mark.parametrize(
    "unit",
    [
        " ",
        "\n",
        "\r\n",
        " \n",
        "\u3000",
        "a",
        "A",
        "7",
        "漢",
        "あ",
        "д",
        "😀",
        "👩‍👩‍👧‍👦",
        "!",
        "e\u0301",
        "\0",
        "<",
    ],
)
def test_a_million_characters_of_one_class_take_seconds(k2: Tokenizer, unit: str) -> None:
    text = (unit * (1_000_000 // len(unit) + 1))[:1_000_000]
    start = time.perf_counter()
    ids = k2.encode(text)
    assert time.perf_counter() - start < 10  # 0.6 s at most on an idle core
    assert k2.decode(ids) == text


def test_long_text_without_long_runs_is_cut_only_where_k2_cuts_it(
    k2: Tokenizer, k2_oracle: tiktoken.Encoding
) -> None:
    text = "A short sentence, and 12345 more. " * 12_000  # 408,000 characters
    expected = k2_oracle.encode_ordinary(text[:400_000]) + k2_oracle.encode_ordinary(text[400_000:])
    assert k2.encode(text) == expected


def test_runs_are_cut_after_25000_characters(k2: Tokenizer, k2_oracle: tiktoken.Encoding) -> None:
    text = "word " + "x" * 25_003 + "  " + "y" * 25_000 + " end"
    expected = k2_oracle.encode_ordinary(text[:25_005]) + k2_oracle.encode_ordinary(text[25_005:])
    assert k2.encode(text) == expected


@given(st.text())
@settings(deadline=None)
def test_k2_any_text_round_trips(k2: Tokenizer, text: str) -> None:
    assert k2.decode(k2.encode(text)) == text


@given(st.lists(st.integers(0, 163839)))
@settings(deadline=None)
def test_k2_detokenizer_equals_full_decode(k2: Tokenizer, ids: list[int]) -> None:
    for skip_special in (True, False):
        stream = k2.detokenizer(skip_special=skip_special)
        text = "".join([stream.push(i) for i in ids]) + stream.finish()
        assert text == k2.decode(ids, skip_special=skip_special)


# Encoding and decoding in general


def test_split_pattern_agrees_with_the_regex_module() -> None:
    byte_level = tiktoken.Encoding(
        "bytes",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={},
    )
    pattern = regex.compile(SPLIT_PATTERN, regex.V1)
    for text in CORPUS:
        pieces = pattern.findall(text)
        assert "".join(pieces) == text
        assert byte_level.encode_ordinary(text) == list(text.encode())


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|tool_call_begin|>", "[BOS]", "<|im_", "end|>", "<", "hell"]))
)
def test_encode_never_yields_special_ids(small: Tokenizer, parts: list[str]) -> None:
    ids = small.encode("".join(parts))
    assert all(i < 259 for i in ids)
    assert small.decode(ids) == "".join(parts)


def test_lone_surrogates_become_replacement_characters(small: Tokenizer) -> None:
    text = json.loads('"a\\ud800b\\udfff"')
    assert small.decode(small.encode(text)) == "a\ufffdb\ufffd"


def test_special_tokens_are_dropped_and_markers_kept(small: Tokenizer) -> None:
    ids = [258, small.special_ids["<|im_end|>"], 111, small.special_ids["<|tool_call_begin|>"]]
    assert small.decode(ids) == "hello<|tool_call_begin|>"
    assert small.decode(ids, skip_special=False) == "hell<|im_end|>o<|tool_call_begin|>"


def test_unnamed_ids_are_reserved_tokens(small: Tokenizer) -> None:
    assert small.decode([260], skip_special=False) == "<|reserved_token_260|>"
    assert small.decode([260]) == ""
    assert small.special_ids["<|reserved_token_260|>"] == 260


@pytest.mark.parametrize("bad", [-1, 515, 10**12])
def test_ids_out_of_range_are_refused(small: Tokenizer, bad: int) -> None:
    assert small.vocab_size == 515
    with pytest.raises(RequestError, match=rf"token id {bad} is out of range.*0 to 514"):
        small.decode([104, bad])
    with pytest.raises(RequestError, match="out of range"):
        small.detokenizer().push(bad)


def test_detokenizer_holds_back_unfinished_characters(small: Tokenizer) -> None:
    stream = small.detokenizer()
    pieces = [stream.push(byte) for byte in "é👍".encode()]
    assert pieces == ["", "é", "", "", "", "👍"]
    assert stream.push(0xE6) == ""
    assert stream.push(104) == "\ufffdh"  # the character can no longer be completed
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@given(st.lists(st.one_of(st.integers(0x7E, 0xFF), st.integers(0, 514))))
def test_detokenizer_equals_full_decode_on_broken_bytes(small: Tokenizer, ids: list[int]) -> None:
    stream = small.detokenizer()
    assert "".join([stream.push(i) for i in ids]) + stream.finish() == small.decode(ids)


# Damaged files


def damage(directory: Path, line: int, text: str) -> None:
    path = directory / "tiktoken.model"
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = text
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (7, "!!!! 6\n", r"line 7: '!!!!' is not base64 .* Download the file again"),
        (7, "Bg== 7\n", "line 7: 'Bg== 7' should be a token and the rank 6"),
        (7, "Bg==\n", "line 7: 'Bg==' should be a token and the rank 6"),
        (7, "Bg== 6 6\n", "line 7: .* rank 6"),
        (7, "\n", "line 7: '' should be a token and the rank 6"),
        (7, "", "line 7: 'Bw== 7' should be a token and the rank 6"),
        (258, "aGU= 257\n", "token b'he' has two ranks"),
        (7, "YWI= 6\n", r"no rank for the single byte 0x06 \(259 ranks in all\)"),
        (259, "aGVsb", "line 259: 'aGVsb' is not base64"),
        (259, "", "beyond the 256 ids after tiktoken.model's 258 ranks. Is tiktoken.model truncated"),
        (259, "aGVsbA== 258\neHg= 259\n", "'\\[BOS\\]' has the id of an ordinary token"),
    ],
)
def test_damaged_ranks(tmp_path: Path, line: int, text: str, message: str) -> None:
    small_files(tmp_path)
    damage(tmp_path, line, text)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "t"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\x00" * 100])
def test_ranks_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    small_files(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tiktoken\.model: (line 1|no rank for the single byte 0x00)"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    small_files(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        TokenizerError, match=rf"{name}: no such file\. A checkpoint needs tiktoken\.model and"
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(TokenizerError, match=f"{name}: cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"added_tokens_decoder": "\ud800"}', "not valid JSON"),
        ("[]", "a JSON object was expected, not list"),
        ("{}", 'no "added_tokens_decoder"'),
        ('{"added_tokens_decoder": {}}', 'no "added_tokens_decoder"'),
        ('{"added_tokens_decoder": {"x": {}}}', r"added_tokens_decoder\['x'\] should be an object under"),
        ('{"added_tokens_decoder": {"259": "[BOS]"}}', r"\['259'\] should be an object"),
        ('{"added_tokens_decoder": {"259": {"content": "", "special": true}}}', 'needs a "content" string'),
        ('{"added_tokens_decoder": {"259": {"content": "[BOS]"}}}', 'and a "special" flag'),
        (
            '{"added_tokens_decoder": {"258": {"content": "[BOS]", "special": true}}}',
            "id of an ordinary token",
        ),
        ('{"added_tokens_decoder": {"515": {"content": "[X]", "special": true}}}', "lies beyond the 256 ids"),
        (
            '{"added_tokens_decoder": {"259": {"content": "[X]", "special": true},'
            ' "260": {"content": "[X]", "special": true}}}',
            r"names '\[X\]' twice",
        ),
    ],
)
def test_damaged_tokenizer_config(tmp_path: Path, text: str, message: str) -> None:
    small_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


def test_a_special_token_named_by_a_lone_surrogate_does_no_harm(tmp_path: Path) -> None:
    config = small_files(tmp_path)
    config["added_tokens_decoder"]["259"]["content"] = "\ud800"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).decode([259], skip_special=False) == "?"
