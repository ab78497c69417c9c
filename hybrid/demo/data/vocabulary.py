"""Open words: names, numbers, times and phrases, each belonging to one split by a hash of its spelling."""

import re
from random import Random
from typing import Any

from hybrid.demo.data.grammar import SLOT
from hybrid.demo.data.lexicon import (
    DAYS,
    LITTLE,
    MONTHS,
    barred,
    common_words,
    jumbled,
    lists,
    pieces,
    said,
    split_of,
)


def _as_title(text: str) -> str:
    """As titles are written: "Lost in Time"."""
    return " ".join(word if word in LITTLE else word.capitalize() for word in text.split())


_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl r s sh st t th tr v w z".split()
_VOWELS = "a e i o u a e i o a e ai ea ia oo ou".split()
_CODAS = ["", "", "", *"l m n r s t d k nd rn st ld ck".split()]
_ACCENTED = {"a": "áàâäãåā", "e": "éèêëęē", "i": "íîïı", "o": "óôöõøō", "u": "úûüůū", "c": "çčć", "n": "ñńň", "s": "šşś",
             "z": "žżź", "l": "ł", "g": "ğ", "r": "ř", "d": "ð"}  # fmt: skip
_CITY_ENDS = "burg ville ton stad ford field dorf ingen polis grad ham port".split()
LANGUAGES = (
    "English German French Spanish Italian Portuguese Dutch Swedish Polish Russian Turkish Greek Arabic Hindi "
    "Chinese Japanese Korean Finnish Danish Czech Latin"
).split()
CURRENCIES = "USD EUR GBP JPY CHF SEK CNY INR dollars euros pounds yen francs kronor rupees yuan".split()
ROOMS = (
    "kitchen bathroom bedroom hall cellar garage office attic library nursery living+room dining+room guest+room "
    "hallway balcony"
).replace("+", "_")
TRANSPORTS = "car train bus bike boat plane taxi ferry tram".split()
ANIMALS = """cat dog mouse bear fox horse owl rabbit frog duck wolf lion hedgehog turtle bird fish goat donkey squirrel elephant
dragon unicorn tiger monkey snake bee cow sheep pig penguin whale giraffe crocodile robot wizard knight ghost princess king
spider snail parrot camel zebra panda kangaroo octopus dolphin shark eagle raven swan beaver badger deer hamster pony
dinosaur giant witch pirate teddy caterpillar butterfly ladybird lizard koala seal crab raccoon""".split()
_CLOSED_BELOW = 13
"""Numbers below this are in every split."""


class Vocabulary:
    """Draws the words of one split."""

    def __init__(self, split: str, rng: Random) -> None:
        self.split, self.rng = split, rng

    def text(self, kind: str) -> str:
        """A string of a kind: a city, person, dish, time, message..."""
        share, low, high = _JUMBLED.get(kind, (0.0, 0, 0))
        if self.split == "train" and self.rng.random() < share:
            jumble = self._jumble(low, high)
            return self._cased(_as_title(jumble)) if kind in _NAMES else jumble
        made = getattr(self, f"_{kind}", None)
        if made is not None:
            return str(made())
        return self.expand(self.rng.choice(lists()[_LISTED[kind]][self.split]))

    def expand(self, text: str) -> str:
        """`text` with every slot filled by its kind, each time anew."""
        return SLOT.sub(lambda found: self.text(found[1]), text)

    def number(self, low: int, high: int) -> int:
        """A whole number of this split in [low, high]; the small ones belong to all."""
        while True:
            n = self.rng.randint(low, high)
            if n < _CLOSED_BELOW or split_of(str(n)) == self.split:
                return n

    def _own(self, make: Any) -> str:
        """What `make` gives, until it is of this split."""
        while True:
            text: str = make()
            if split_of(text) == self.split:
                return text

    def _syllables(self, low: int, high: int) -> str:
        pick = self.rng.choice
        count = self.rng.randint(low, high)
        return "".join(pick(_ONSETS) + pick(_VOWELS) for _ in range(count)) + pick(_CODAS)

    def _invented(self, low: int, high: int) -> str:
        """A word that no list has: syllables, or the head of one word and the tail of another, so that whatever
        pieces words are made of have to be copied; training's also tokens in a row, and in foreign spellings."""
        if self.split == "train":
            return self._foreign_spelling(self._strange(low, high))
        return self._syllables(low, high) if self.rng.random() < 0.65 else self._blend(low, high)

    def _blend(self, low: int, high: int) -> str:
        head, tail = (self.rng.choice(said()) for _ in range(2))
        return head[: self.rng.randint(1, 3 * low)] + tail[-self.rng.randint(1, 3 * high) :]

    def _strange(self, low: int, high: int) -> str:
        """Training's invented words, some of which begin with a vowel, as syllables never do."""
        while True:
            roll = self.rng.random()
            if roll < 0.4:
                word = "".join(self.rng.choice(pieces()) for _ in range(self.rng.randint(low, high)))
            else:
                word = self._syllables(low, high) if roll < 0.7 else self._blend(low, high)
            if self.rng.random() < 0.2:
                word = re.sub("^[^aeiou]+(?=[aeiou].)", "", word)
            if word not in barred():
                return word

    def _foreign_spelling(self, word: str) -> str:
        """Now and then with accents, a hyphen or an apostrophe, which a reader has to copy byte by byte."""
        roll = self.rng.random()
        if roll < 0.1:
            share = self.rng.choice([0.3, 0.6])
            return "".join(
                self.rng.choice(_ACCENTED[c]) if c in _ACCENTED and self.rng.random() < share else c
                for c in word
            )
        if roll < 0.13:
            return f"{word}-{self._syllables(1, 2)}"
        if roll < 0.15:
            return f"{self.rng.choice('odl')}'{word}"
        return word

    def _jumble(self, low: int, high: int) -> str:
        """Words in a row that mean nothing together. What training asks for must be copied for where it stands,
        not known by how such things begin and go on."""

        def make() -> str:
            words = [self.any_word() for _ in range(self.rng.randint(low, high))]
            for i in range(1, len(words) - 1):  # where nobody could take them for what follows the value
                roll = self.rng.random()
                if roll < 0.25:
                    words[i] = self.rng.choice(LITTLE)
                elif roll < 0.4:  # what was said twice is copied by where it stands, not by the word before
                    words[i] = self.rng.choice(words[:i])
            return " ".join(words)

        return self._own(make)

    def any_word(self) -> str:
        """A word that means nothing where it stands; training's alone."""
        roll = self.rng.random()
        if roll < 0.25:
            return self._invented(1, 2)
        return self.rng.choice(pieces() if roll < 0.6 else common_words() if roll < 0.75 else jumbled())

    def _name(self, low: int = 1, high: int = 3) -> str:
        return self._own(lambda: self._invented(low, high).capitalize())

    def _cased(self, text: str) -> str:
        """Now and then as hasty people type it."""
        return text.lower() if self.rng.random() < 0.15 else text

    def _city(self) -> str:
        rng, roll = self.rng, self.rng.random()
        if roll < 0.45:
            city = rng.choice(lists()["cities"][self.split])
        elif roll < 0.7:
            city = self._name()
        elif roll < 0.85:
            city = self._own(lambda: (self._syllables(1, 1) + rng.choice(_CITY_ENDS)).capitalize())
        else:
            form = rng.choice(
                "New {}|Port {}|San {}|Saint {}|Old {}|Upper {}|Lake {}|{} City|{} Falls|{} Hills|{} Springs|{} Bay".split(
                    "|"
                )
            )
            city = form.format(self._name(1, 2))
        return self._cased(city)

    def _person(self) -> str:
        roll = self.rng.random()
        if roll < 0.45:
            return self._cased(self.rng.choice(lists()["persons"][self.split]))
        if roll < 0.85:
            return self._cased(self._name(1, 2))
        return f"{self._name(1, 2)} {self._name(1, 2)}"

    def _contact(self) -> str:
        return self.text("relation" if self.rng.random() < 0.15 else "person")

    def _company(self) -> str:
        roll = self.rng.random()
        if roll < 0.4:
            return self._cased(self.rng.choice(lists()["companies"][self.split]))
        if roll < 0.75:
            return self._cased(self._name(1, 2))
        form = self.rng.choice(
            "{} Labs|{} Systems|{} Motors|{} Bank|{} Foods|The {}|Cafe {}|Chez {}".split("|")
        )
        return form.format(self._name(1, 2))

    def _word(self) -> str:
        if self.rng.random() < 0.6:
            return self.rng.choice(lists()["words"][self.split])
        return self._own(lambda: self._invented(1, 3))

    def _dish(self) -> str:
        if self.rng.random() < 0.5 and (known := lists()["dishes"][self.split]):
            return self.rng.choice(known)
        form = self.rng.choice(
            "{word} soup|{item} pie|{city} cake|{item} with {item}|{word} bread|{person} salad".split("|")
        )
        return self.expand(form)

    def _topic(self) -> str:
        roll = self.rng.random()
        if roll < 0.5:
            return self.rng.choice(lists()["topics"][self.split])
        form = self.rng.choice(
            "{word} and {word}|the history of {city}|{city}|{dish}|the {word} of {city}|{person}|old {word} shops|cheap {item}|{word}".split(
                "|"
            )
        )
        return self.expand(form)

    def _title(self) -> str:
        if self.rng.random() < 0.5:
            return self._cased(self.rng.choice(lists()["titles"][self.split]))
        form = self.rng.choice(
            "{word} {word}|the {word}|{word} of {city}|my {word}|{person} and the {word}".split("|")
        )
        text = self.expand(form)
        return text if self.rng.random() < 0.3 else " ".join(w[:1].upper() + w[1:] for w in text.split())

    def _time(self) -> str:
        rng = self.rng
        if rng.random() < 0.3:
            return rng.choice(
                [f"{rng.randint(1, 12)} {rng.choice(['am', 'pm'])}", f"{rng.randint(1, 12)} o'clock", "noon"]
            )
        return self._own(lambda: f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}")

    def _date(self) -> str:
        rng = self.rng
        if rng.random() < 0.4:
            return rng.choice(["today", "tomorrow", *DAYS, *(f"next {day}" for day in DAYS)])
        return self._own(
            lambda: rng.choice(
                [
                    f"{rng.choice(MONTHS)} {rng.randint(1, 28)}",
                    f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
                    f"20{rng.randint(24, 39)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
                ]
            )
        )

    def _clock(self) -> str:
        return self._own(lambda: f"{self.rng.randint(0, 23):02d}:{self.rng.randint(0, 59):02d}")

    def _number(self) -> str:
        return str(self.number(1, self.rng.choice([12, 99, 999])))

    def _email(self) -> str:
        ends = self.rng.choice(["com", "org", "net", "de", "io"])
        return self._own(lambda: f"{self._syllables(1, 2)}@{self._syllables(1, 2)}.{ends}")

    def _code(self) -> str:
        rng = self.rng
        letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(0, 3)))
        return self._own(
            lambda: letters + "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6)))
        )

    def _flight(self) -> str:
        rng = self.rng
        return self._own(
            lambda: "".join(rng.choice("ABDEFKLMRSTUX") for _ in range(2)) + str(rng.randint(10, 9999))
        )

    def _phone(self) -> str:
        rng = self.rng
        return self._own(lambda: f"{rng.choice(['555-', '0', '+49 30 '])}{rng.randint(1000, 999999)}")

    def _money(self) -> str:
        return self._own(
            lambda: self.rng.choice(
                [str(self.rng.randint(1, 9999)), f"{self.rng.randint(0, 999)}.{self.rng.randint(1, 99):02d}"]
            )
        )

    def _outcome(self) -> str:
        """What a calculation may give."""
        roll, number = self.rng.random(), self._number()
        if roll < 0.6:
            return number
        if roll < 0.75:
            return f"-{number}"
        return f"{number}.{self.rng.randint(1, 9)}" if roll < 0.9 else f"{number}{self.rng.randint(10, 99)}"

    def _distance(self) -> str:
        return f"{self.number(2, 999)} {self.rng.choice(['km', 'miles', 'kilometers'])}"

    def _foreign(self) -> str:
        return " ".join(self._own(lambda: self._invented(1, 2)) for _ in range(self.rng.randint(1, 3)))

    def _expression(self) -> str:
        rng = self.rng
        n = [str(self.number(1, rng.choice([99, 99, 999]))) for _ in range(4)]
        if rng.random() < 0.15:
            n[0] = f"{n[0]}.{rng.randint(1, 9)}"
        form = rng.choice(
            [
                *("{} @ {}", "{} @ {}", "{} @ {}", "{}@{}", "({} @ {}) @ {}", "{} @ ({} @ {})"),
                *("{} @ {} @ {}", "({} @ {}) @ ({} @ {})"),
            ]
        )
        return re.sub("@", lambda _: rng.choice("+-*/"), form).format(*n)

    def _room(self) -> str:
        return self.rng.choice(ROOMS.split()).replace("_", " ")

    def _language(self) -> str:
        return self.rng.choice(LANGUAGES)

    def _currency(self) -> str:
        return self.rng.choice(CURRENCIES)

    def _transport(self) -> str:
        return self.rng.choice(TRANSPORTS)

    def _animal(self) -> str:
        return self.rng.choice(ANIMALS)


_LISTED = {
    "item": "items", "relation": "relations", "event": "events", "message": "messages", "task": "tasks",
    "topping": "toppings", "snippet": "snippets", "status": "statuses", "error": "errors",
}  # fmt: skip


_JUMBLED = {
    "item": (0.5, 1, 2), "event": (0.5, 1, 3), "message": (0.55, 1, 6), "task": (0.5, 2, 5), "topping": (0.25, 1, 1),
    "dish": (0.4, 1, 3), "topic": (0.4, 1, 4), "snippet": (0.35, 2, 6), "status": (0.35, 1, 4), "error": (0.35, 2, 4),
    "city": (0.25, 1, 2), "company": (0.35, 1, 3), "title": (0.45, 1, 4), "animal": (0.2, 1, 1), "word": (0.4, 1, 1),
    "person": (0.2, 1, 2),
}  # fmt: skip
"""Kinds that training also makes up of any words: how often, and of how many."""
_NAMES = {"city", "company", "person", "title"}
