"""Tools made up on the spot: one looks something up, or does something to something."""

import re
from functools import cache
from random import Random

from hybrid.demo.data.grammar import Pattern, all_wordings, blocks, with_articles
from hybrid.demo.data.lexicon import split_of
from hybrid.demo.data.toolbox import Parameter, Tool, written_tools
from hybrid.demo.data.vocabulary import Vocabulary

_NOUNS = """shape texture taste smell material username password_hint signature motto password_age
engine_size fuel_type top_speed average_speed daily_limit weekly_plan monthly_cost yearly_income net_worth market_share job_title
office_number desk_number floor_plan room_count bed_count star_rating price_range dress_code house_rules checkin_time checkout_time
wifi_code gate_code entry_fee service_fee delivery_cost shipping_date arrival_day departure_day waiting_time cooking_time
half_life boiling_point melting_point density mass charge wavelength frequency amplitude phase angle radius circumference surface
volume_level sound_quality image_size file_size download_link upload_speed ping uptime error_rate success_rate exit_code log_level
first_name last_name maiden_name middle_name home_address work_address next_of_kin emergency_contact marital_status citizenship
grade class_size teacher lesson_plan homework exam_date reading_list library_card fine due_books bus_line train_line exit stop_name
crop harvest_date soil_type moon_phase season daylight
altitude population area postcode elevation founder height salary balance birthday rating
score weight calories author publisher width duration capacity speed schedule menu members owner manager sales revenue budget sunrise sunset tide traffic pollen parking opening_hours air_quality
nickname hobby profession country region district river_level water_temperature ticket_price rent tax deadline
headquarters website logo slogan director producer editor artist genre volume_number page_count edition version license
battery memory storage mileage fuel engine license_plate insurance blood_type shoe_size allergy diet favorite_team coach
captain ranking medals record_time stadium league visa_rules holidays anthem flag dialing_code voltage plug_type water_depth
crew cargo gate platform seat delay boarding_time baggage_limit""".split()
_SUBJECTS = {
    "city": ["city", "place", "town"], "person": ["person", "name", "user"],
    "company": ["company", "name", "firm"], "dish": ["dish", "food"], "code": ["id", "number"],
    "title": ["title", "name", "film"], "word": ["name", "item", "object"],
}  # fmt: skip
_FETCH_NAMES = (
    "get_{}/find_{}/{}_lookup/fetch_{}/lookup_{}/{}_of/{}/query_{}/show_{}/read_{}/get_{}_info".split("/")
)
_ACTS = """delete archive close lock unlock approve cancel restart stop pause invite block follow ban print rename copy move
hide start resume accept reject mute pin share export import clean repair test count sort""".split()
_OBJECTS = """file ticket project user account door job server folder window group channel page table camera printer
playlist document invoice branch build task machine robot gate device sensor room report backup member image video""".split()
_ACT_NAMES = ["{}_{}", "{}_{}", "do_{}_{}", "{}_the_{}", "{}_{}_by_name", "{}_{}_now"]
_ALIKE = [
    {"approve", "accept"}, {"stop", "pause", "cancel", "end", "halt"}, {"start", "resume", "restart", "begin", "launch"},
    {"block", "ban"}, {"copy", "export", "duplicate"}, {"delete", "remove", "erase", "drop"}, {"close", "shut"},
    {"open", "unlock"}, {"hide", "cover"}, {"print", "type"}, {"rename", "name"}, {"share", "send"}, {"count", "number"},
    {"test", "check", "try"},
    {"job", "task"}, {"gate", "door"}, {"picture", "image"}, {"machine", "device", "robot"}, {"user", "account"},
    {"file", "document"}, {"clean", "repair", "fix", "wash"},
]  # fmt: skip
"""Verbs and objects that many would take for each other."""
_FREELY = 0.4
"""How often training's nouns, verbs and objects are any words: what is asked for is then told by its sameness alone."""


def novel_tool(split: str, rng: Random) -> Tool:
    """A tool made up on the spot; its noun, or its verb and object together, belong to the split."""
    if rng.random() < 0.65:
        return _fetcher(_noun(split, rng), rng)
    return _doer(*_act(split, rng), rng)


def neighbour(tool: Tool, split: str, rng: Random) -> Tool | None:
    """One that does something else to the same, or the same to something else, as `tool` does, in other words at
    least; None for a tool that looks something up."""
    act, _, thing = tool.novel_root.partition(" ")
    if not thing:
        return None
    while True:
        other, another = _act(split, rng)
        pair = (act, another) if rng.random() < 0.4 else (other, thing)
        if split_of(" ".join(pair)) == split:
            return _doer(*pair, rng)


def alike(one: str, other: str) -> bool:
    """Whether two made-up tools of these roots would be taken for each other."""
    pairs = list(zip(one.split(), other.split(), strict=False))
    return one == other or (
        len(pairs) == 2 and all(a == b or any({a, b} <= same for same in _ALIKE) for a, b in pairs)
    )


def _fetcher(noun: str, rng: Random) -> Tool:
    """Looks `noun` up."""
    spoken, kind = noun.replace("_", " "), rng.choice(list(_SUBJECTS))
    names = [form.format(noun) for form in _FETCH_NAMES]
    about = [
        f"Get the {spoken}.",
        with_articles(f"Returns the {spoken} of a {_SUBJECTS[kind][0]}."),
        f"Look up the {spoken}",
        f"{spoken} lookup",
    ]
    result = rng.choice(["number", "word", "money", "person"])
    return Tool(
        [rng.choice(names)], about, [_subject(kind, rng)], [noun, "result", "value"], result,
        f"The {spoken} of {{key}}: {{result}}.", _wordings("fetch", NOUN=spoken), novel_root=noun,
    )  # fmt: skip


def _doer(act: str, thing: str, rng: Random) -> Tool:
    """Does `act` to a `thing`."""
    kind = rng.choice(["word", "code", "person", "company", "title"])
    names = [form.format(act, thing) for form in _ACT_NAMES]
    a_thing = with_articles(f"a {thing}")
    about = [f"{act.capitalize()} {a_thing}.", f"Used to {act} {a_thing}", f"{act} {thing}"]
    return Tool(
        [rng.choice(names)], about, [_subject(kind, rng)], [], "ok", f"Done: {act} {thing} {{key}}.",
        _wordings("act", ACT=act, OBJECT=thing), novel_root=f"{act} {thing}",
    )  # fmt: skip


def _subject(kind: str, rng: Random) -> Parameter:
    """What a made-up tool is given."""
    own = _SUBJECTS[kind]
    abouts = [f"The {own[0]}", f"Name of the {own[0]}", f"Which {own[0]}"]
    return Parameter(["key", rng.choice(own)], kind, abouts, True)


def _noun(split: str, rng: Random) -> str:
    """What is looked up."""
    nouns = _nouns(split)
    if split != "train" or rng.random() >= _FREELY:
        return rng.choice(nouns)
    words = Vocabulary(split, rng)
    mixed = rng.random() < 0.3  # so that "volume" may be the head of anything
    while True:
        if mixed:
            noun = "_".join(rng.sample(_noun_parts(split), 2))
        else:
            noun = "_".join(_free(words) for _ in range(rng.choice([1, 1, 2])))
        if split_of(noun) == split and not any(set(noun.split("_")) <= said for said in _written()):
            return noun


@cache
def _nouns(split: str) -> list[str]:
    return [noun for noun in _NOUNS if split_of(noun) == split]


@cache
def _noun_parts(split: str) -> list[str]:
    return sorted({part for noun in _nouns(split) for part in noun.split("_")} - {"of"})


@cache
def _written() -> list[set[str]]:
    """The words that each written tool is known by: what these alone are asked for is that tool's."""
    return [
        set(re.findall("[a-z]+", " ".join([*tool.names, *tool.abouts]).lower())) for tool in written_tools()
    ]


@cache
def _own_words() -> frozenset[str]:
    """The words of the wordings themselves, which another in its place would be lost among."""
    lines = [line for block in blocks("made_up.txt") for part in block.values() for line in part]
    return frozenset(re.findall("[a-z]+", " ".join(lines)))


def _free(words: Vocabulary) -> str:
    while True:
        word = words.any_word() if words.rng.random() < 0.6 else words.text("word")
        if word not in _own_words() and re.fullmatch("[a-z]+", word):  # names of tools are made of it
            return word


def _act(split: str, rng: Random) -> tuple[str, str]:
    """What is done, and to what."""
    words = Vocabulary(split, rng)
    freely = split == "train" and rng.random() < _FREELY
    while True:
        act = _free(words) if freely and rng.random() < 0.7 else rng.choice(_ACTS)
        thing = _free(words) if freely and rng.random() < 0.7 else rng.choice(_OBJECTS)
        if split_of(f"{act} {thing}") == split:
            return act, thing


def _wordings(made: str, **words: str) -> dict[str, list[Pattern]]:
    return {split: [p.saying(words) for p in patterns] for split, patterns in _patterns(made).items()}


@cache
def _patterns(made: str) -> dict[str, list[Pattern]]:
    return next(
        all_wordings(block, of_tool=True) for block in blocks("made_up.txt") if block.get("made") == [made]
    )
