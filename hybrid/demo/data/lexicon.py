"""What the data files say: names by split, and the words and pieces that values of any words are made of."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path

from hybrid.demo.data.grammar import SLOT, SPLITS, blocks
from hybrid.tokenizer import RANKS_FILE, read_ranks

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
LITTLE = "in to of my is it you with not very the the are was".split()
MARKS = frozenset(
    """please pls plz thx asap again now today tomorrow tonight soon later noon quickly thanks thank ok okay then also and
    but before until via small medium large on off for from into""".split()
) | {word.lower() for word in [*DAYS, *MONTHS, *NUMBER_WORDS, *LITTLE]}
"""What a request may go on with after a value: no value of any words has them, but for the little ones, within it."""


def split_of(text: str) -> str:
    """The split that a name or number belongs to, wherever and however it is written: train 80 %, others 10 %."""
    bucket = zlib.crc32(text.lower().encode()) % 10
    return SPLITS[1] if bucket == 1 else SPLITS[2] if bucket == 0 else SPLITS[0]


@cache
def lists() -> dict[str, dict[str, list[str]]]:
    """The names of words.txt: list -> split -> names."""
    found = {}
    pairs = ",".join(line for block in blocks("facts.txt") for line in block.get("pairs", []))
    told = {name.strip().lower() for pair in pairs.split(",") for name in pair.split("=")}
    for name, lines in blocks("words.txt")[-1].items():
        items = [item.strip() for item in ",".join(lines).split(",")]
        found[name] = {
            split: [i for i in items if split_of(i) == split and (split == "train" or i.lower() not in told)]
            for split in SPLITS
        }  # facts are told in every split: what they name is in none but the first
    return found


def _lines() -> Iterator[tuple[str, str]]:
    """Every line that the data files have for training, without its slots' names, each with its file's name."""
    files = (file.name for file in (resources.files(__package__) / "text").iterdir())
    for name in sorted(name for name in files if name.endswith(".txt")):
        for block in blocks(name):
            for heading, lines in block.items():
                if heading not in SPLITS[1:]:
                    yield from ((name, SLOT.sub("", line)) for line in lines)


def _words(line: str) -> list[str]:
    """The lower-case words of a line, none of them half of an "isn't"."""
    return re.findall(r"(?<!['\w])[a-z]{3,}(?!['\w])", line)


@cache
def said() -> list[str]:
    """Every lower-case word that the data files have for training."""
    return sorted({word for _, line in _lines() for word in _words(line)})


@cache
def barred() -> frozenset[str]:
    """What no word of a made-up value is: the other splits' names, and what a request goes on with after one."""
    held_out = {item.lower() for named in lists().values() for split in SPLITS[1:] for item in named[split]}
    return MARKS | held_out


@cache
def common_words() -> list[str]:
    """Words that lines have again and again, whatever split a name of that spelling would be of."""
    count = Counter(word for name, line in _lines() if name != "words.txt" for word in _words(line))
    return sorted(word for word, n in count.items() if n >= 10 and word not in barred())


@cache
def pieces() -> list[str]:
    """Words and parts of words that the carried tokenizer has one token for. What training says has some again and
    again that values hardly ever have ("table", "cel"), and a token is copied only if it is asked for often enough."""
    # Not hybrid.synth's ASSETS: that would load torch in each process that writes data.
    assets = Path(__file__).parents[2] / "assets"
    tokens = [token.decode("latin-1") for token in read_ranks(assets / RANKS_FILE)]
    return [token for token in tokens if re.fullmatch("[a-z]{2,}", token) and token not in barred()]


@cache
def jumbled() -> list[str]:
    """Words for jumbles that are none of the other splits' own."""
    return [word for word in said() if split_of(word) == "train" and word not in MARKS]
