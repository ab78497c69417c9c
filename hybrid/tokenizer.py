"""K2's tokenizer: text to token ids and back, from the checkpoint's own data files.

`tiktoken.model` gives the ranks, `added_tokens_decoder` in `tokenizer_config.json` the special tokens; no
code of the checkpoint runs. Here text is only text: which special ids a prompt gets is decided by the chat
template (hybrid.chat).
"""

import binascii
import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import tiktoken

from offload.errors import RequestError, TokenizerError

# K2's split pattern: Han alone, words with contractions, up to three digits, punctuation, white space.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
RESERVED = 256  # ids after the ranks: named by added_tokens_decoder, else <|reserved_token_ID|>
RANKS_FILE, CONFIG_FILE = "tiktoken.model", "tokenizer_config.json"

# K2's own encoder cuts text here, so that no run of characters makes the splitter or the merges crawl.
_MAX_CHARS, _MAX_RUN = 400_000, 25_000
_RUNS = re.compile(r"\s+|\S+")
_REMEDY = "Download the file again from where the checkpoint was published"


class Detokenizer:
    """Turns a stream of token ids into text; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: "Tokenizer", *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token: whole characters, U+FFFD for invalid bytes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def finish(self) -> str:
        """What was still held back, as U+FFFD; the detokenizer is then ready for another text."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """Byte-pair encoding over tiktoken ranks, with K2's special tokens.

    Args:
        ranks: token bytes in order of rank; the rank is the token id.
        named: names and "special" flags of ids from `len(ranks)` to `len(ranks) + RESERVED - 1`.

    Attributes:
        vocab_size: ids below this decode.
        special_ids: every id after the ranks, by its name. Encoding text never yields one of them.
    """

    def __init__(self, ranks: list[bytes], named: dict[int, tuple[str, bool]]) -> None:
        self.vocab_size = len(ranks) + RESERVED
        names = {i: f"<|reserved_token_{i}|>" for i in range(len(ranks), self.vocab_size)}
        names.update((i, name) for i, (name, _) in named.items())
        self.special_ids = {name: i for i, name in names.items()}
        self._skipped = frozenset(i for i in names if i not in named or named[i][1])  # reserved ones too
        self._bytes = [*ranks, *(name.encode("utf-8", "replace") for name in names.values())]
        self._bpe = tiktoken.Encoding(
            "kimi_k2",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={},  # none: no text can become a special token
        )

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Reads `tiktoken.model` and `tokenizer_config.json` of a checkpoint.

        Raises:
            TokenizerError: a file is missing or damaged, or the two do not belong together.
        """
        ranks = read_ranks(Path(directory) / RANKS_FILE)
        return cls(ranks, _read_special_tokens(Path(directory) / CONFIG_FILE, len(ranks)))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` taken literally: never a special id. Lone surrogates become U+FFFD."""
        ids: list[int] = []
        for piece in _bounded_pieces(text):
            ids += self._bpe.encode_ordinary(piece)
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `token_ids`; invalid UTF-8 becomes U+FFFD.

        Args:
            token_ids: ids below `vocab_size`.
            skip_special: drop tokens flagged special. K2's tool and thinking markers are not flagged.

        Raises:
            RequestError: an id is out of range.
        """
        parts = [self.token_bytes(i, skip_special=skip_special) for i in token_ids]
        return b"".join(parts).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """An incremental decoder whose pieces add up to `decode` of all ids."""
        return Detokenizer(self, skip_special=skip_special)

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The bytes one token stands for (maybe part of a character). RequestError: id out of range."""
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"token id {token_id} is out of range: this tokenizer has ids 0 to {self.vocab_size - 1}"
            )
        return b"" if skip_special and token_id in self._skipped else self._bytes[token_id]


def _bounded_pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most _MAX_CHARS with no run of (non-)space characters above _MAX_RUN."""
    for start in range(0, len(text), _MAX_CHARS):
        part = text[start : start + _MAX_CHARS]
        cut = 0
        if len(part) > _MAX_RUN:
            for run in _RUNS.finditer(part):
                for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                    yield part[cut:end]
                    cut = end
        yield part[cut:]


def read_ranks(path: Path) -> list[bytes]:
    """Token bytes in order of rank from lines of `base64 rank`."""
    ranks: list[bytes] = []
    for number, line in enumerate(_read_file(path).splitlines()):
        token, _, rank = line.partition(b" ")
        try:
            ranks.append(binascii.a2b_base64(token, strict_mode=True))
        except binascii.Error as error:
            _damaged(path, f"line {number + 1}: {_shown(token)} is not base64 ({error})")
        if rank != b"%d" % number or not ranks[-1]:
            _damaged(path, f"line {number + 1}: {_shown(line)} should be a token and the rank {number}")
    counts = Counter(ranks)
    if len(counts) != len(ranks):
        _damaged(path, f"token {counts.most_common(1)[0][0]!r} has two ranks")
    missing = [byte for byte in range(256) if bytes([byte]) not in counts]
    if missing:
        _damaged(path, f"no rank for the single byte 0x{missing[0]:02X} ({len(ranks)} ranks in all)")
    return ranks


def _read_special_tokens(path: Path, n_ranks: int) -> dict[int, tuple[str, bool]]:
    """Name and "special" flag by id, from added_tokens_decoder."""
    entries = read_tokenizer_config(path).get("added_tokens_decoder")
    if not isinstance(entries, dict) or not entries:
        _damaged(path, 'no "added_tokens_decoder" with the special tokens')
    named: dict[int, tuple[str, bool]] = {}
    for key, entry in entries.items():
        where = f"added_tokens_decoder[{key!r}]"
        if not re.fullmatch("[0-9]{1,9}", key) or not isinstance(entry, dict):
            _damaged(path, f"{where} should be an object under a token id")
        name, special = entry.get("content"), entry.get("special")
        if not isinstance(name, str) or not name or not isinstance(special, bool):
            _damaged(path, f'{where} needs a "content" string and a "special" flag')
        if int(key) < n_ranks:
            _damaged(path, f"{where}: {name!r} has the id of an ordinary token ({RANKS_FILE} has {n_ranks})")
        if int(key) >= n_ranks + RESERVED:
            problem = f"{where}: {name!r} lies beyond the {RESERVED} ids after {RANKS_FILE}'s {n_ranks} ranks"
            raise TokenizerError(f"{path}: {problem}. Is {RANKS_FILE} truncated? {_REMEDY}.")
        named[int(key)] = (name, special)
    name, uses = Counter(name for name, _ in named.values()).most_common(1)[0]
    if uses > 1:
        _damaged(path, f"added_tokens_decoder names {name!r} twice")
    return named


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json as an object. TokenizerError: missing, or not a JSON object."""
    try:
        config = json.loads(_read_file(path).decode())
    except (ValueError, RecursionError) as error:
        _damaged(path, f"not valid JSON ({error})")
    if not isinstance(config, dict):
        _damaged(path, f"a JSON object was expected, not {type(config).__name__}")
    return config


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(
            f"{path}: no such file. A checkpoint needs {RANKS_FILE} and {CONFIG_FILE} beside its weights."
        ) from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}).") from error


def _shown(line: bytes) -> str:
    return repr(line[:40].decode("ascii", "replace"))


def _damaged(path: Path, problem: str) -> NoReturn:
    raise TokenizerError(f"{path}: {problem}. {_REMEDY}.")
