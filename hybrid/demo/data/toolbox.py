"""Tools: those of tools.txt and made-up ones, and their declarations in OpenAI's format.

Names, descriptions, parameter names and the order of everything vary from declaration to declaration; what a
request's slots mean is kept by the parameter's first name, its label.
"""

from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from hybrid.demo.data.grammar import SPLITS, Pattern, all_wordings, blocks
from hybrid.demo.data.vocabulary import SCHEMAS, split_of


@dataclass(frozen=True)
class Parameter:
    names: list[str]
    kind: str
    abouts: list[str]
    required: bool

    @property
    def label(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Tool:
    """What a tool may be called, takes, returns, and how people ask for it.

    `result`: keys its result may have, kind of the value, and the answer; keys empty: an action that only
    succeeds or fails.
    """

    names: list[str]
    abouts: list[str]
    parameters: list[Parameter]
    result_keys: list[str]
    result_kind: str
    answer: str
    wordings: dict[str, list[Pattern]]
    missing: list[Pattern] = field(default_factory=list)
    novel_root: str = ""

    @property
    def key(self) -> str:
        return self.names[0]

    @property
    def novel(self) -> bool:
        """Whether it was made up on the spot."""
        return bool(self.novel_root)

    @property
    def root(self) -> str:
        """What it is about: two tools of one root answer to the same requests."""
        return self.novel_root or self.key

    @property
    def open_ended(self) -> frozenset[str]:
        """Labels of the parameters that are free text."""
        return _open_ended(self.parameters)

    @property
    def required(self) -> list[Parameter]:
        return [p for p in self.parameters if p.required]


@dataclass(frozen=True)
class Declared:
    """A tool as one conversation declares it: `names` maps labels to the parameters' declared names."""

    tool: Tool
    name: str
    names: dict[str, str]
    declaration: dict[str, Any]

    def arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """Labels' values as arguments, in the order of the declaration."""
        return {self.names[label]: values[label] for label in self.names if label in values}


_OPEN_ENDED = {"message", "task", "topic", "event", "title", "dish", "item", "snippet"}
"""Kinds of free text, which nothing but quotes would set apart from the words around it."""


def _open_ended(parameters: list[Parameter]) -> frozenset[str]:
    return frozenset(p.label for p in parameters if p.kind in _OPEN_ENDED)


@cache
def written_tools() -> list[Tool]:
    """The tools of tools.txt."""
    return [_read(block) for block in blocks("tools.txt") if "tool" in block]


def _read(block: dict[str, list[str]]) -> Tool:
    parameters = []
    for heading in ("arg", "opt"):
        for line in block.get(heading, []):
            names, kind, abouts = line.split(" : ", 2)
            parameters.append(Parameter(names.split("/"), kind, abouts.split(" / "), heading == "arg"))
    keys, kind, answer = "", "", ""
    parts = block["result"][0].split(" : ")
    if len(parts) == 3:
        keys, kind, answer = parts
    else:
        kind, answer = parts[0], parts[-1]
    missing = [Pattern(part) for line in block.get("missing", []) for part in line.split(" / ")]
    return Tool(
        block["tool"][0].split("/"), block["about"][0].split(" / "), parameters,
        [k for k in keys.split("/") if k], kind, answer, all_wordings(block, of_tool=True, open_ended=_open_ended(parameters)), missing,
    )  # fmt: skip


_NOUNS = """age color shape texture taste smell material origin username password_hint signature motto password_age
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
_FETCH_WORDINGS = {
    "do": """(get|look up|fetch|read|check|query|view|show me|tell me|give me) the NOUN (of|for) {key}
(tell me|say|check|see) (what|which) NOUN {key} (has|got)
(tell me|see|check|say) what the NOUN of {key} is
(tell|show|give) me {key}'s NOUN
(go and|) (dig up|pull up|bring up|look into|inspect) (the|) NOUN (of|for) {key}""",
    "thing": """the NOUN (of|for) {key}
{key}'s NOUN
the (exact|current|right|known) NOUN (of|for) {key}
what the NOUN of {key} is
which NOUN {key} has
(the|) NOUN (as to|regarding|concerning|belonging to|listed for|known for|on) {key}
(the|a) NOUN that {key} has
(as for|regarding|concerning|about) {key}, (the|its|their) NOUN""",
    "train": """(what's|what is|whats) the NOUN of {key}?
(tell|give|show) me the NOUN (of|for) {key} (please|)
(check|get|look up|find|fetch) the NOUN (of|for) {key} (please|)
(can|could) you (check|get|look up|find|tell me) the NOUN (of|for) {key}?
(i need|i want|i'd like) (to know|) the NOUN of {key}
NOUN of {key} (please|)
(do you know|can you say) the NOUN of {key}?
(the|) NOUN for {key}?
(i wonder|i want to know) what the NOUN of {key} is
(use the tool|use your tools) (and|to) (find|get|tell me) the NOUN of {key}
does {key} have (a|any|some) NOUN?
(i am|i'm) (thinking of|asking about|talking about) {key}. (what's|what is|tell me) (the|its) NOUN(?|)
(take|consider|look at) {key}(:|,|.) (what|which) is (its|the) NOUN?
(and|now|then|so) the NOUN of {key}?
(any|some) NOUN (known|there|listed) for {key}?
(who knows|nobody knows) the NOUN of {key}(?|)""",
    "dev": """{key} has which NOUN?
please read me the NOUN of {key}
what about the NOUN of {key}?""",
    "sealed": """what NOUN does {key} have?
please find out the NOUN of {key}
how about the NOUN of {key}?
let me see the NOUN for {key}""",
}
_ACTS = """delete archive close lock unlock approve cancel restart stop pause invite block follow ban print rename copy move
hide show start resume accept reject mute pin share export import clean repair test check count sort""".split()
_OBJECTS = """file ticket project user account door job server folder window group channel page table camera printer
playlist document invoice branch build task machine robot gate device sensor room report backup member image video""".split()
_ACT_NAMES = ["{}_{}", "{}_{}", "do_{}_{}", "{}_the_{}", "{}_{}_by_name", "{}_{}_now"]
_ACT_WORDINGS = {
    "do": """ACT (the|our|my|a|) OBJECT {key}
ACT (the|our|my) OBJECT (named|called) {key}
ACT {key}, (the|our|my) OBJECT
(have|get) (the|our|my) OBJECT {key} and ACT it
(take|find|open|look for|go to|pick) (the|our|my) OBJECT {key}(,| and|, then|, please) ACT it
ACT (the|our|my) OBJECT(:|,|, it is|, namely) {key}
(start|begin) to ACT (the|our|) OBJECT {key}""",
    "train": """(please|) ACT (the|) OBJECT {key} (please|)
(can|could|would) you (please|) ACT (the|) OBJECT {key}?
(i want|i need|i'd like) (you|) to ACT (the|) OBJECT {key}
ACT (the|) OBJECT (named|called|with the name) {key}
(we|you) (must|should|have to) ACT (the|) OBJECT {key} (now|)
(use the tool|use your tools) to ACT (the|) OBJECT {key}
(there is|there's|you see|i have|we have) (a|the|this|one) OBJECT {key}(.|,|:) (please|) ACT it
(i am|i'm|we are) (done|finished|through) with OBJECT {key}, (please|so) ACT it
(it is about|this is about) (the|) OBJECT {key}(.|:) ACT it
(the|our|my|that) OBJECT {key}(, please|) (is what|is something|has|needs someone|needs you) to ACT
(shall|should|could) we ACT (the|) OBJECT {key}?
(who|somebody) (can|could|should) ACT (the|) OBJECT {key}(?|)""",
    "dev": """OBJECT {key}: ACT it
the OBJECT {key} is one to ACT""",
    "sealed": """it is time to ACT OBJECT {key}
go ahead and ACT the OBJECT {key}
would you kindly ACT the OBJECT {key}?""",
}


def novel_tool(split: str, rng: Random) -> Tool:
    """A tool made up on the spot; its noun, or its verb and object together, belong to the split."""
    if rng.random() < 0.65:
        root = noun = rng.choice([n for n in _NOUNS if split_of(n) == split])
        spoken, kind = noun.replace("_", " "), rng.choice(list(_SUBJECTS))
        names = [form.format(noun) for form in _FETCH_NAMES]
        about = [
            f"Get the {spoken}.",
            f"Returns the {spoken} of a {_SUBJECTS[kind][0]}.",
            f"Look up the {spoken}",
            f"{spoken} lookup",
        ]
        wordings = _insert(_FETCH_WORDINGS, NOUN=spoken)
        keys, result, answer = (
            [noun, "result", "value"],
            rng.choice(["number", "word", "money", "person"]),
            f"The {spoken} of {{key}}: {{result}}.",
        )
    else:
        while True:
            act, thing = rng.choice(_ACTS), rng.choice(_OBJECTS)
            if split_of(f"{act} {thing}") == split:
                break
        a = "an" if thing[0] in "aeiou" and thing != "user" else "a"
        root, kind = f"{act} {thing}", rng.choice(["word", "code", "person", "company", "title"])
        names = [form.format(act, thing) for form in _ACT_NAMES]
        about = [f"{act.capitalize()} {a} {thing}.", f"Used to {act} {a} {thing}", f"{act} {thing}"]
        wordings = _insert(_ACT_WORDINGS, ACT=act, OBJECT=thing)
        keys, result, answer = [], "ok", f"Done: {act} {thing} {{key}}."
    own = _SUBJECTS.get(kind, ["name"])
    parameter = Parameter(["key"], kind, [f"The {own[0]}", f"Name of the {own[0]}", f"Which {own[0]}"], True)
    name = rng.choice(names)
    return Tool(
        [name], about, [_renamed(parameter, rng.choice(own))], keys, result, answer, wordings, novel_root=root
    )


def _renamed(parameter: Parameter, name: str) -> Parameter:
    return Parameter([parameter.label, name], parameter.kind, parameter.abouts, parameter.required)


def _insert(lines: dict[str, str], **words: str) -> dict[str, list[Pattern]]:
    """Wordings with capitals replaced; their identity for the splits stays that of the line."""

    def inserted(line: str) -> str:
        for name, word in words.items():
            line = line.replace(name, word)
        return line

    block = {kind: [inserted(line) for line in text.splitlines()] for kind, text in lines.items()}
    patterns = all_wordings(block, of_tool=True)
    for split in SPLITS:
        for pattern, line in zip(patterns[split], lines[split].splitlines(), strict=False):
            pattern.line = line
    return patterns


_NAME_HEADS = (
    "my do run the use call api home user new fast auto smart quick our x all ask go a tool main app".split()
)
_NAME_TAILS = "tool api now v2 service function info data helper action for_user 2 by_name plus fn cmd job here main".split()


def _renamed_freely(name: str, rng: Random) -> str:
    """A name that no list has, from the words of one that a list has: it can only be read in the declaration."""
    words = name.split("_")
    if len(words) > 1 and rng.random() < 0.4:
        words = rng.choice([words[::-1], words[1:], words[:1] + words[2:] + words[1:2]])
    if rng.random() < 0.6:
        words = [rng.choice(_NAME_HEADS), *words]
    if rng.random() < 0.6:
        words = [*words, rng.choice(_NAME_TAILS)]
    return "_".join(words)


def declare(tool: Tool, rng: Random, *, freely: float = 0.0) -> Declared:
    """A declaration of the tool as some client might write it; `freely`: how often under a name of no list."""
    taken = [p for p in tool.parameters if p.required or rng.random() < 0.5]
    names: dict[str, str] = {}
    for p in taken:
        free = [n for n in p.names if n not in names.values() and n != "key"]
        names[p.label] = free[0] if rng.random() < 0.4 else rng.choice(free)
    described = rng.random() < 0.8
    properties = {}
    for p in taken:
        schema = dict(SCHEMAS.get(p.kind, {"type": "string"}))
        if described:
            about = {"description": rng.choice(p.abouts)}
            schema = schema | about if rng.random() < 0.8 else about | schema
        properties[names[p.label]] = schema
    fields: dict[str, Any] = {"properties": properties}
    required = [names[p.label] for p in taken if p.required]
    fields = {"required": required, **fields} if rng.random() < 0.3 else {**fields, "required": required}
    parameters: dict[str, Any] = {"type": "object", **fields}
    if rng.random() < 0.1:
        parameters["additionalProperties"] = False
    name = tool.names[0] if rng.random() < 0.3 else rng.choice(tool.names)
    if rng.random() < freely:
        name = _renamed_freely(name, rng)
    if rng.random() < 0.08:
        first, *rest = name.split("_")
        name = first + "".join(word.capitalize() for word in rest)
    function: dict[str, Any] = {"name": name, "parameters": parameters}
    if rng.random() < 0.92:
        function = {"name": name, "description": rng.choice(tool.abouts), "parameters": parameters}
    if rng.random() < 0.04:
        function["strict"] = True
    return Declared(tool, name, names, {"type": "function", "function": function})
