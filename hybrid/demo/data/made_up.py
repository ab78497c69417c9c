"""Tools made up on the spot: one looks something up, or does something to something."""

from functools import cache
from random import Random

from hybrid.demo.data.grammar import SPLITS, Pattern, all_wordings
from hybrid.demo.data.toolbox import Parameter, Tool
from hybrid.demo.data.vocabulary import split_of

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
(who knows|nobody knows) the NOUN of {key}(?|)
(would you mind|any chance of|how about you try|i suggest|what about) (checking|finding|getting|reading out|looking up) the NOUN (of|for) {key}(?|)
(i was hoping|i hoped|i wanted|i am trying|we tried|it'd be lovely|it would be good) to (get|learn|find|know|see|have) the NOUN (of|for) {key}
(let us|we should|one should|somebody should|you ought to|you had better|i'd better) (hear|see|check|get|find out) the NOUN (of|for) {key}
(which|what) NOUN (is listed|is known|do they give|was given|was found) for {key}?
(which|what) NOUN belongs to {key}?
(people|they|all|my friends) (ask|wonder|talk|argue) about the NOUN of {key}(.|,) (what is it|tell them|find out)(?|)
(no idea|not sure|i am not certain) what the NOUN of {key} (is|was|might be)
(got|found|seen|have you got) the NOUN (of|for) {key}(?|)
(before i go|for my list|for the report|for a friend|just so i know)(,|:) the NOUN (of|for) {key}
{key}(,|:) (its|the|which) NOUN(, please|?|)
{key} NOUN(?| pls| please|)
{key}: NOUN(?|)
{key} - NOUN (wanted|needed)
{key} ... the NOUN?
{key}, NOUN only (please|)
{key}? (just|only) the NOUN (please|)
{key}: i (need|want|am after) the NOUN
for {key}, (state|name|give) the NOUN
{key} - can you (tell|give) me the NOUN?
{key} is the one whose NOUN i (need|want|ask for)
for {key}, i (only|just) (need|want) the NOUN
{key}: it is the NOUN i (need|am after)
{key}: NOUN unknown, please (find out|check)
when it comes to {key}, (tell|give) me the NOUN
{key}'s NOUN, (pls|if possible|when you can)
{key}: what do we have down as the NOUN?
{key} - which NOUN, (please|if i may ask)?
{key}, NOUN = ?
i know of {key} but not the NOUN, (please tell me|so tell me|so help me out)
(need|want) NOUN(,|:) {key}
NOUN {key} (pls|please|)
NOUN? (for|i mean for) {key}
need {key} NOUN (now|today|asap)
NOUN (lookup|query|check): {key}
pls find NOUN, {key}
NOUN wanted(:| for) {key}
(just|only) the NOUN of {key}
quick (question|check): {key}'s NOUN(?|)
forgot NOUN for {key}, (pls remind me|remind me)
what (might|would|could) the NOUN of {key} be?
is it known (what|which) NOUN {key} has?
do we have {key}'s NOUN on (file|record)?
is there a way to (find out|know) the NOUN of {key}?
may i (know|find out) the NOUN of {key}?
can {key}'s NOUN be (looked up|found out)?
what do they (give|name|state) as the NOUN of {key}?
do you happen to know {key}'s NOUN?
nobody (told|has told) me the NOUN (of|for) {key}
i (forgot|can't remember|can't recall) the NOUN of {key}
we (will|are going to) need the NOUN (of|for) {key}
i can't (decide|go on|finish) before i know {key}'s NOUN
my (notes|papers|files) don't (mention|show) {key}'s NOUN
all (i still need|that's missing) for {key} is the NOUN
i keep forgetting {key}'s NOUN
let me know {key}'s NOUN (please|when you can|)
run a (check|query) for the NOUN of {key}
look {key} up and (give|tell) me the NOUN
remind me (what|which) NOUN {key} has
from (what|all) you have on {key}, pick out the NOUN
fill me in on {key}'s NOUN
the NOUN of {key} (should|must|ought to) be (looked up|found out)
it is time to (find|look up) the NOUN of {key}
(required|wanted|requested): the NOUN (of|for) {key}
my (boss|mother|friend) (wants|needs) to know the NOUN of {key}
(they|some people) asked me for {key}'s NOUN
a (customer|colleague) wants to be told {key}'s NOUN
would it be all right to (ask|ask you) for the NOUN of {key}?
if you don't mind, (tell me|look up|find) {key}'s NOUN
i was told you could (find|look up|tell me) the NOUN of {key}
be so (kind|good) as to (tell me|look up) {key}'s NOUN
what i (need|want) to know is the NOUN of {key}
the NOUN, please, (of|for) {key}
the one i need the NOUN (of|for) is {key}
the NOUN {key} has, (that's what i need|i'd like to know)
if you (know|can find) the NOUN of {key}, tell me
unknown to me: the NOUN of {key}
it's {key}'s NOUN (that|) i (want|need)""",
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
(who|somebody) (can|could|should) ACT (the|) OBJECT {key}(?|)
(i was hoping you could|they told me to|i am told to|someone has to|the boss wants me to|don't forget to) ACT (the|our|) OBJECT {key}
(you ought to|you had better|better|feel free to|no need to wait,|you are free to|nothing left but to) ACT (the|our|) OBJECT {key}
(it'd be|it would be) (nice|lovely|good|great) (to|if you could|if you would) ACT (the|our|) OBJECT {key}
(before|when|once|as soon as) (you can|you have time|you are ready|i leave)(,|) ACT (the|our|) OBJECT {key}
(what if you|why don't you|any way to|would it hurt to) ACT (the|our|) OBJECT {key}?
{key}: ACT (this|that|the) OBJECT (please|)
{key} is the OBJECT to ACT
{key} is the OBJECT i (want|need|would like) you to ACT
{key} - (could|can|would) you ACT that OBJECT?
{key}, that OBJECT: ACT (now|please|at once)
{key} OBJECT - ACT (please|)
{key}, OBJECT, ACT (pls|now)
{key} - ACT OBJECT
{key}: OBJECT to ACT (today|now|at once)
{key}? (please|yes,|just) ACT that OBJECT
{key} is next, (so|please) ACT that OBJECT
{key} it is: ACT (that|the) OBJECT
{key} - (if you don't mind|when you can|if possible), ACT that OBJECT
let {key} be the OBJECT you ACT (next|now|)
with {key}, do (this|one thing): ACT the OBJECT
as for {key}, (please|just|go and) ACT that OBJECT
OBJECT {key}: ACT (pls|please|now|)
to ACT: OBJECT {key}
ACT {key} OBJECT (pls|now|please)
need to ACT OBJECT {key} (now|today|asap)
ACT (this one|the following): OBJECT {key}
(now|next|then|first) ACT (the|) OBJECT {key}
ACT OBJECT {key} (for me|right away|at once)
OBJECT to ACT(:| -|,) {key}
(job for you|next job for you|your next step): ACT OBJECT {key}
is it possible (for you|) to ACT (the|our) OBJECT {key}?
are you able to ACT (the|our|) OBJECT {key}?
which OBJECT (to ACT|should you ACT)? {key}
may i ask you to ACT (the|) OBJECT {key}?
have you got (time|a moment|a minute) to ACT OBJECT {key}?
why not ACT OBJECT {key} (now|right away|today)?
i can't ACT OBJECT {key} myself, so (please do|you must)
nobody else will ACT OBJECT {key}, so you (must|should|have to)
someone forgot to ACT OBJECT {key}, (please do so|so please do)
(there is|there's) still OBJECT {key} to ACT
as i am (busy|away|in a hurry), you ACT (the|) OBJECT {key}
make sure (you|to) ACT (the|our) OBJECT {key}
do me a favour(,| and) ACT OBJECT {key}
let's ACT OBJECT {key}, (please|shall we?)
i (ask|order|urge) you to ACT OBJECT {key}
(try|be sure|take care) to ACT (the|) OBJECT {key}
see to it that you ACT (our|) OBJECT {key}
just ACT OBJECT {key}, (will you?|that's all|nothing more)
it is (necessary|important|required) to ACT OBJECT {key}
your (job|next step|order) is to ACT OBJECT {key}
it (is up|falls) to you to ACT OBJECT {key}
my (boss|sister|neighbour) (wants|asks) you to ACT OBJECT {key}
the others are waiting for you to ACT (the|) OBJECT {key}
a colleague asks whether you (can|could) ACT OBJECT {key}
ACT {key}, (i mean|that is,|meaning) the OBJECT
ACT just one OBJECT(:|,) {key}
ACT OBJECT {key} and no other
would it be (all right|okay) to ACT (the|our) OBJECT {key}?
if (you don't mind|it's no trouble|you would), ACT OBJECT {key}
i was told you (could|can) ACT OBJECT {key}
perhaps you (could|might) ACT OBJECT {key}(?|)
be so (kind|good) as to ACT OBJECT {key}
i (wonder|was wondering) whether you could ACT OBJECT {key}
i'd be (glad|grateful) if you would ACT OBJECT {key}
sorry to (bother|trouble) you, but please ACT OBJECT {key}
the one i want you to ACT is OBJECT {key}
the OBJECT (to ACT|you should ACT|i want you to ACT) is {key}
all you (need|have) to do is ACT OBJECT {key}
one OBJECT (is left|remains) to ACT: {key}
it's OBJECT {key} (that|) you (should|must) ACT""",
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
        wordings = _wordings(("NOUN", spoken))
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
        wordings = _wordings(("ACT", act), ("OBJECT", thing))
        keys, result, answer = [], "ok", f"Done: {act} {thing} {{key}}."
    own = _SUBJECTS.get(kind, ["name"])
    parameter = Parameter(["key"], kind, [f"The {own[0]}", f"Name of the {own[0]}", f"Which {own[0]}"], True)
    name = rng.choice(names)
    return Tool(
        [name], about, [_renamed(parameter, rng.choice(own))], keys, result, answer, wordings, novel_root=root
    )


def _renamed(parameter: Parameter, name: str) -> Parameter:
    return Parameter([parameter.label, name], parameter.kind, parameter.abouts, parameter.required)


@cache
def _wordings(*words: tuple[str, str]) -> dict[str, list[Pattern]]:
    """Wordings with capitals replaced by words; their identity for the splits stays that of the line."""
    lines = _FETCH_WORDINGS if words[0][0] == "NOUN" else _ACT_WORDINGS

    def inserted(line: str) -> str:
        for name, word in words:
            line = line.replace(name, word)
        return line

    block = {kind: [inserted(line) for line in text.splitlines()] for kind, text in lines.items()}
    patterns = all_wordings(block, of_tool=True)
    for split in SPLITS:
        for pattern, line in zip(patterns[split], lines[split].splitlines(), strict=False):
            pattern.line = line
    return patterns
