"""The generator of training data: splits that share nothing, calls that fit their declarations, no chance."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hybrid.demo.data import small_talk, tool_scenes
from hybrid.demo.data.arguments import SCHEMAS, argument
from hybrid.demo.data.encode import Encoder
from hybrid.demo.data.generator import conversation
from hybrid.demo.data.grammar import (
    SPLITS,
    Pattern,
    all_wordings,
    blocks,
    by_split,
    move_slot,
    plainly,
    reword,
    tidy,
    with_articles,
)
from hybrid.demo.data.lexicon import split_of
from hybrid.demo.data.made_up import alike, neighbour, novel_tool
from hybrid.demo.data.results import result
from hybrid.demo.data.talk import Conversation, Talk, spoken, worded
from hybrid.demo.data.tool_scenes import REFUSAL
from hybrid.demo.data.toolbox import Tool, declare, written_tools
from hybrid.demo.data.vocabulary import Vocabulary
from hybrid.synth import ASSETS
from tests.reference.turns import prompt_of, reply_of

FILES = ["chat.txt", "facts.txt", "numbers.txt", "tools.txt", "made_up.txt", "around.txt"]


def conversations(split: str, seed: int, count: int) -> list[Conversation]:
    return [conversation(split, Random(f"{split} {seed} {i}")) for i in range(count)]


@pytest.fixture(scope="module")
def some() -> list[Conversation]:
    return conversations("train", 5, 400)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(ASSETS)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is what a parameter's JSON schema allows."""
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    right = isinstance(value, types[schema["type"]]) and (
        schema["type"] == "boolean" or not isinstance(value, bool)
    )
    return right and value in schema.get("enum", [value])


def test_pattern_chooses_among_all_alternatives() -> None:
    pattern = Pattern("(a|b (c|d)|) {x} (e|)?")
    seen = {pattern.sample(Random(i)) for i in range(300)}
    assert seen == {f"{a}{{x}}{e}?" for a in ("a ", "b c ", "b d ", "") for e in (" e", "")}
    assert pattern.count() == 8
    assert pattern.slots == {"x"}


def test_unbalanced_pattern_is_an_error() -> None:
    with pytest.raises(ValueError, match="unbalanced"):
        Pattern("(a|b")
    with pytest.raises(ValueError, match="unbalanced"):
        Pattern("a)b")


@pytest.mark.parametrize("file", FILES)
def test_wordings_of_the_splits_are_disjoint(file: str) -> None:
    """No wording that can come out of one split's patterns can come out of another's."""
    for block in blocks(file):
        wordings = by_split(block)
        if not any(wordings.values()):
            continue
        assert all(wordings.values()), block
        outcomes = {
            split: {p.sample(Random(i)).lower().strip("?!. ") for p in patterns for i in range(200)}
            for split, patterns in wordings.items()
        }
        for one, other in (("train", "dev"), ("train", "sealed"), ("dev", "sealed")):
            assert not outcomes[one] & outcomes[other], block


def test_framed_wordings_keep_to_their_split() -> None:
    """Training's composed sentences are not those that the other splits ask in, made-up tools' neither."""
    for tool in [*written_tools(), *(novel_tool("train", Random(i)) for i in range(12))]:
        said: dict[str, set[str]] = {}
        for split in SPLITS:
            talk = Talk(split, Random(split))
            asked = {
                spoken(talk, p, {slot: f"{{{slot}}}" for slot in p.slots})
                for p in tool.wordings[split]
                for _ in range(min(p.count(), 600))
            }
            said[split] = {plainly(text) for text in asked}
        assert said["train"]
        assert said["train"].isdisjoint(said["dev"] | said["sealed"]), tool.key


@pytest.mark.parametrize("split", ["dev", "sealed"])
def test_a_held_out_wording_that_training_comes_upon_is_not_said(split: str) -> None:
    talk = Talk("train", Random(0))
    for tool in written_tools():
        for pattern in tool.wordings[split]:
            either = Pattern(f"({pattern.sample(Random(0))}|another)")
            assert {plainly(worded(talk, either)) for _ in range(10)} == {"another"}


def test_a_phrase_is_said_within_every_frame() -> None:
    phrase = Pattern("(see|hear) {x}")
    within = phrase.within(Pattern("(please|) {} now|can you {}?|{}"))
    for pattern, verbs in ((within, ("see", "hear")), (within.saying({"see": "smell"}), ("smell", "hear"))):
        phrases = [f"{verb} {{x}}" for verb in verbs]
        wanted = {said for p in phrases for said in (f"please {p} now", f"{p} now", f"can you {p}?", p)}
        assert {pattern.sample(Random(i)) for i in range(400)} == wanted
        assert pattern.count() == 8
        assert pattern.slots == {"x"}
        assert pattern.line == phrase.line


def test_phrases_are_no_sentences_of_their_own() -> None:
    """What frames.txt puts into a sentence ("I'd like to ask ...") is no question or statement itself."""
    sentence = re.compile(r"\(?(i|we|you|he|she|they|there|nobody|is|are|does|did)\b")
    for file in FILES:
        for block in blocks(file):
            for kind in ("do", "thing", "want", "do_tool", "thing_tool", "want_tool"):
                for line in block.get(kind, []):
                    assert not line.endswith("?"), line
                    assert not sentence.match(line), line


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("a owl and a unicorn", "an owl and a unicorn"),
        ("A id of a user", "An id of a user"),
        ("a umbrella", "an umbrella"),
        ("a cat, extra eggs", "a cat, extra eggs"),
    ],
)
def test_articles(said: str, wanted: str) -> None:
    assert with_articles(said) == wanted


def test_what_a_tools_result_is_told_with_stands_before() -> None:
    """Every number of an answer, digit by digit: "0818" is not 818."""
    numbers = re.compile(r"\d+(?:\.\d+)?")
    told = 0
    for split in SPLITS:
        for talk in conversations(split, 8, 500):
            for probe in talk.probes:
                if probe.kind == "result":
                    before = " ".join(json.dumps(m) for m in talk.messages[: probe.index])
                    found = numbers.findall(talk.messages[probe.index]["content"])
                    assert set(found) <= set(numbers.findall(before)), talk.messages[: probe.index + 1]
                    told += len(found)
    assert told > 1000


def test_degrees_are_of_what_their_key_says() -> None:
    declared = declare(written_tools()[0], Random(0))
    for i in range(2000):
        content, _ = result(Talk("train", Random(i), declared=[declared]), declared, {"city": "Rome"})
        assert not ("°F" in content and ("_c" in content or "celsius" in content)), content


def test_sentences_around_a_request_draw_each_name_anew() -> None:
    names = []
    for i in range(12000):
        talk = Talk("train", Random(i))
        talk.user("hello", around=1.0)
        text = talk.messages[0]["content"]
        names += re.findall(r"^(\S+) and (\S+) (?:send|say|told)", text)
    assert len(names) > 20
    assert all(one.lower() != other.lower() for one, other in names)


def test_larger_sums_and_differences_have_one_split() -> None:
    pairs = {split: set[frozenset[int]]() for split in SPLITS}
    for split in SPLITS:
        for i in range(3000):
            pair = frozenset(small_talk._pair(Talk(split, Random(i)), 50))
            if max(pair) > 10:
                pairs[split].add(pair)
    assert all(len(found) > 50 for found in pairs.values())
    assert not pairs["train"] & pairs["dev"]
    assert not pairs["train"] & pairs["sealed"]
    assert not pairs["dev"] & pairs["sealed"]


def test_every_frame_has_one_place_for_a_phrase() -> None:
    lines = [line for block in blocks("frames.txt") for frames in block.values() for line in frames]
    assert len(lines) > 200
    for line in lines:
        assert len(re.findall(r"\{(do|thing)\}", line)) == 1, line
        assert re.search(r"\{(do|thing)\}", re.sub(r"\([^()]*\)", "", line)), line  # outside of alternatives


def test_temperatures_are_told_with_one_decimal_at_most() -> None:
    numbers = Counter[int]()
    for i in range(3000):
        talk = Talk("train", Random(i), declared=[declare(written_tools()[0], Random(i))])
        tool_scenes.single(talk, talk.declared[0], answered=True)
        for decimals in re.findall(r"-?\d+\.(\d+)", str(talk.messages[2:4])):
            numbers[len(decimals)] += 1
    assert set(numbers) == {1}, numbers


@pytest.mark.parametrize("tool", written_tools(), ids=lambda tool: tool.key)
def test_every_tool_has_thousands_of_wordings(tool: Tool) -> None:
    assert sum(p.count() for p in tool.wordings["train"]) > 10_000
    assert all({p.label for p in tool.required} <= p.slots for p in tool.wordings["train"])


def test_weather_has_hundreds_of_wordings() -> None:
    weather = written_tools()[0].wordings
    assert sum(p.count() for p in weather["train"]) > 500
    assert len(weather["sealed"]) >= 20


def test_names_and_numbers_of_the_splits_are_disjoint() -> None:
    drawn: dict[str, dict[str, set[str]]] = {}
    for split in SPLITS:
        words = Vocabulary(split, Random(1))
        for kind in ("city", "person", "company", "title", "code", "email", "flight", "word"):
            drawn.setdefault(kind, {})[split] = {words.text(kind).lower() for _ in range(2000)}
        drawn.setdefault("number", {})[split] = {str(words.number(13, 999)) for _ in range(2000)}
    for kind, of in drawn.items():
        assert not of["train"] & of["sealed"], kind
        assert not of["train"] & of["dev"], kind
        assert not of["dev"] & of["sealed"], kind
    assert len(drawn["city"]["train"]) > 1200


def test_a_name_has_one_split_however_it_is_written() -> None:
    assert split_of("Berlin") == split_of("berlin") == split_of("BERLIN")
    shares = Counter(split_of(str(n)) for n in range(10_000))
    assert 0.75 < shares["train"] / 10_000 < 0.85
    assert min(shares["dev"], shares["sealed"]) > 800


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_of_word_exists_in_every_split(split: str) -> None:
    words = Vocabulary(split, Random(0))
    kinds = {p.kind for tool in written_tools() for p in tool.parameters} | {
        "snippet",
        "status",
        "error",
        "animal",
    }
    for kind in sorted(kinds):
        value = argument(words, kind)
        assert value.text
        assert fits(value.json, SCHEMAS.get(kind, {"type": "string"}))


def test_same_seed_same_conversations() -> None:
    assert conversations("train", 3, 20) == conversations("train", 3, 20)
    assert conversations("train", 3, 5) != conversations("train", 4, 5)


def test_a_document_does_not_depend_on_the_process() -> None:
    """Python's order of sets of strings differs from process to process, and so does what was written before."""
    program = (
        "from random import Random; from hybrid.demo.data import generator, small_talk, talk;"
        "order = range(60)[::{step}];"
        "some = dict((i, generator.conversation('train', Random(i))) for i in order);"
        "print([some[i] for i in range(60)]);"
        "some = [talk.Talk('train', Random(i)) for i in range(20)];"
        "print([small_talk.chat(t, 'storyname') or t.messages for t in some])"
    )
    written = [
        subprocess.run(
            [sys.executable, "-c", program.format(step=step)],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed, step in (("1", 1), ("3", -1))
    ]
    assert written[0] == written[1] != b""


@pytest.mark.parametrize("split", SPLITS)
def test_calls_fit_their_declarations(split: str) -> None:
    calls = 0
    for talk in conversations(split, 1, 300):
        declared = {t["function"]["name"]: t["function"]["parameters"] for t in talk.tools or []}
        assert len(declared) == len(talk.tools or [])
        for message in talk.messages:
            for call in message.get("tool_calls", []):
                assert call["id"] == f"functions.{call['function']['name']}:{call['id'].rpartition(':')[2]}"
                schema = declared[call["function"]["name"]]
                arguments = json.loads(call["function"]["arguments"])
                assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
                assert all(fits(v, schema["properties"][k]) for k, v in arguments.items())
                calls += 1
    assert calls > 300


def test_call_ids_count_over_the_conversation(some: list[Conversation]) -> None:
    for talk in some:
        numbers = [int(c["id"].rpartition(":")[2]) for m in talk.messages for c in m.get("tool_calls", [])]
        assert numbers == list(range(len(numbers)))


def test_arguments_are_copied_from_the_request(some: list[Conversation]) -> None:
    """Every string argument, enumerations apart, stands in the messages before the call."""
    for talk in some:
        enums = {
            v
            for t in talk.tools or []
            for p in t["function"]["parameters"]["properties"].values()
            for v in p.get("enum", [])
        }
        for i, message in enumerate(talk.messages):
            said = " ".join(m["content"] for m in talk.messages[:i])
            for call in message.get("tool_calls", []):
                for value in json.loads(call["function"]["arguments"]).values():
                    assert not isinstance(value, str) or value in enums or value.lower() in said.lower(), (
                        value,
                        said,
                    )


def test_every_assistant_message_is_probed(some: list[Conversation]) -> None:
    for talk in some:
        assistant = [i for i, m in enumerate(talk.messages) if m["role"] == "assistant"]
        assert [p.index for p in talk.probes] == assistant
        assert talk.messages[-1]["role"] == "assistant"


def test_undeclared_tools_are_refused(some: list[Conversation]) -> None:
    refusals = [t.messages[p.index] for t in some for p in t.probes if p.kind == "undeclared"]
    assert len(refusals) > 30
    assert all(m["content"] == REFUSAL and "tool_calls" not in m for m in refusals)


def test_near_misses_are_refused_and_no_tools_work(some: list[Conversation]) -> None:
    """They share nothing with the other splits' nor with what any written tool, or small talk, is asked."""
    refused = [t.messages[p.index] for t in some for p in t.probes if p.kind == "near miss"]
    assert len(refused) > 5
    assert all(m["content"] == REFUSAL and "tool_calls" not in m for m in refused)
    asked: dict[str, str] = {}
    for file in ("tools.txt", "chat.txt", "facts.txt", "numbers.txt"):
        for block in blocks(file):
            name = " ".join(block.get("tool", block.get("intent", ["other"])))
            for split in ("dev", "sealed"):
                for line in block.get(split, []):
                    asked.update((text, name) for text in every(line))
            asked.update((text, name) for text in said_to(block, of_tool="tool" in block))
    near: dict[str, set[str]] = {split: set() for split in SPLITS}
    for tool in written_tools():
        assert tool.near["train"], tool.key
        for split in SPLITS:
            said = set().union(*(every(pattern.line) for pattern in tool.near[split]))
            assert not said & set(asked), (tool.key, {text: asked[text] for text in said & set(asked)})
            near[split] |= said
    assert near["train"].isdisjoint(near["dev"] | near["sealed"]), near["train"] & (
        near["dev"] | near["sealed"]
    )


def test_near_misses_in_sentences_keep_to_their_split() -> None:
    held = {
        text
        for tool in written_tools()
        for split in ("dev", "sealed")
        for pattern in tool.near[split]
        for text in every(pattern.line)
    }
    said = {
        plainly(re.sub(r"\{[a-z_.]+\}", "<x>", pattern.sample(Random(i))))
        for tool in written_tools()
        for pattern in tool.near["train"]
        for i in range(8)
    }
    assert len(said) > 5_000
    assert not said & held


@pytest.mark.parametrize("split", SPLITS)
def test_neighbours_are_other_tools(split: str) -> None:
    """One word of the two is the same, the pair is the split's own; tools that only look something up have none."""
    doers = 0
    for i in range(300):
        tool = novel_tool(split, Random(i))
        other = neighbour(tool, split, Random(-i))
        if other is None:
            assert " " not in tool.novel_root
            continue
        doers += 1
        assert split_of(other.novel_root) == split
        assert set(tool.novel_root.split()) & set(other.novel_root.split())
    assert doers > 50


def test_alike_tools_are_never_declared_together() -> None:
    assert alike("stop job", "pause task")
    assert alike("population", "population")
    assert not alike("stop job", "stop door")
    assert not alike("area", "population")
    for i in range(400):
        talk = Talk("train", Random(i))
        tool_scenes.declare_some(talk, 4)
        roots = [d.tool.root for d in talk.declared]
        assert not any(alike(one, other) for one, other in combinations(roots, 2)), roots


def test_two_requests_in_one_hold_what_both_calls_need() -> None:
    joined = 0
    for i in range(400):
        talk = Talk("train", Random(i))
        tool_scenes.declare_some(talk, 2)
        one, two = (talk.declared * 2)[:2]
        text, calls, _ = tool_scenes._joined(talk, one, two)
        assert [target for target, _ in calls] == [one, two]
        names = [value for _, values in calls for value in values.values() if isinstance(value, str)]
        joined += sum(value.lower() in text.lower() for value in names) == len(names) > 1
    assert joined > 150  # the others have units, dates and switches, which are said in other words


def test_plain_wordings_are_trainings_alone() -> None:
    """They ask for what their tool needs, and never only in another split's words."""
    said = {plainly(w) for t in written_tools() for split in ("dev", "sealed") for p in t.wordings[split]
            for w in [p.sample(Random(i)) for i in range(min(p.count(), 50))]}  # fmt: skip
    for tool in written_tools():
        assert len(tool.plain) >= 15, tool.key
        required = {p.label for p in tool.required}
        known = {p.label for p in tool.parameters}
        for pattern in tool.plain:
            assert required <= pattern.slots <= known, (tool.key, pattern.line)
            wordings = {plainly(pattern.sample(Random(i))) for i in range(pattern.count() * 3)}
            assert wordings - said, (tool.key, pattern.line)
    for split in ("dev", "sealed"):
        assert not any(
            p.wording.split(": ")[-1] in {w.line for t in written_tools() for w in t.plain}
            for talk in conversations(split, 3, 100)
            for p in talk.probes
            if p.kind == "call"
        )


def test_several_values_at_once_are_told_apart() -> None:
    """A request for several values of one argument makes a call of each, with the same other arguments."""
    shapes = Counter()
    for i in range(300):
        talk = Talk(
            "train", Random(i), declared=[declare(tool := Random(i).choice(written_tools()), Random(i))]
        )
        tool_scenes.parallel(talk, answered=False)
        calls = [json.loads(c["function"]["arguments"]) for c in talk.messages[1]["tool_calls"]]
        if len(calls) == 1:
            assert "parallel" not in {p.kind for p in talk.probes}
            continue
        differing = {key for one in calls for key in one if len({json.dumps(c.get(key)) for c in calls}) > 1}
        shapes[len(differing) == 1, len(tool.required) > 1] += 1
        assert len({json.dumps(c) for c in calls}) == len(calls)
    assert shapes[True, True] > 3
    assert shapes[True, False] > 10


def test_all_kinds_occur_in_all_splits() -> None:
    kinds = [{p.kind for t in conversations(split, 2, 500) for p in t.probes} for split in SPLITS]
    assert kinds[0] == kinds[1] == kinds[2]
    assert {"weather", "call", "novel call", "parallel", "undeclared", "result", "sum", "story"} <= kinds[0]


def test_sums_are_right_and_all_small_ones_occur() -> None:
    found = set()
    for i in range(20_000):
        talk = Talk("train", Random(i))
        small_talk.numbers(talk)
        if talk.probes[0].wording.startswith("add: "):
            a, _, b, _, c = talk.messages[1]["content"].split()
            assert int(a) + int(b) == int(c)
            found.add((int(a), int(b)))
    assert {(a, b) for a in range(11) for b in range(11)} <= found


def test_a_fact_that_no_table_has_is_not_known() -> None:
    told = {pair.partition("=")[0].strip().lower() for pair in blocks("facts.txt")[0]["pairs"][0].split(",")}
    assert "france" in told
    asked = 0
    for i in range(3000):
        talk = Talk("train", Random(i))
        small_talk.fact(talk, heard=i % 2 == 0)
        request = talk.messages[0]["content"].lower()
        if talk.probes[0].kind == "unknown":
            assert i % 2
            assert talk.messages[1]["content"] == small_talk.unknown()
            if talk.probes[0].wording.startswith("capital"):
                asked += 1
                assert not [name for name in told if re.search(rf"\b{name}\b", request)], request
        elif talk.probes[0].wording.startswith("capital"):
            assert [name for name in told if re.search(rf"\b{name}\b", request)], request
    assert asked > 20


def test_stories_are_recognised_and_other_texts_are_not() -> None:
    for i in range(200):
        text = small_talk.story(Random(i), "fox", "Tom")
        assert small_talk.is_story(text, "Tom fox"), text
        assert not small_talk.is_story(text, "Tom Anna"), text
        assert not small_talk.is_story(text[: len(text) // 2], ""), text


def test_a_told_name_is_asked_for_and_answered() -> None:
    """Also one that was told beside a request; and nobody is told a name that was not."""
    asked = Counter[bool]()
    for talk in conversations("train", 9, 600):
        for probe in talk.probes:
            if probe.kind in ("memory", "not told") and probe.wording.startswith("askname"):
                said = " ".join(
                    m["content"] for m in talk.messages[: probe.index] if m["role"] == "user"
                ).lower()
                answer = talk.messages[probe.index]["content"]
                asked[told := answer != "You have not told me your name."] += 1
                assert not told or answer.removeprefix("Your name is ").rstrip(".").lower() in said
    assert min(asked.values()) > 5


def test_a_question_of_the_models_gets_an_answer_that_fits() -> None:
    found = set()
    for i in range(200):
        talk = Talk("train", Random(i))
        small_talk.chat(talk, "iamsad")
        replies = [m["content"] for m in talk.messages[1::2]]
        assert replies[0].endswith("Would you like a story?")
        if len(replies) > 1:
            found.add("story" if small_talk.is_story(replies[1], "") else replies[1])
    assert found == {"story", "All right. Tell me when you need something."}


def test_results_that_are_easily_right_are() -> None:
    tools = {t.key: t for t in written_tools()}
    for key, right in (
        ("add_numbers", lambda v: v["a"] + v["b"]),
        ("count_letters", lambda v: len(v["word"])),
    ):
        for i in range(60):
            talk = Talk("train", Random(i), declared=[made := declare(tools[key], Random(i))])
            tool_scenes.single(talk, made, answered=True)
            arguments = json.loads(talk.messages[1]["tool_calls"][0]["function"]["arguments"])
            values = {label: arguments[name] for label, name in made.names.items()}
            answer = talk.messages[3]["content"]
            assert answer.startswith("Sorry") or str(right(values)) in re.findall(
                r"\d+", answer.split('"')[-1]
            )


def test_novel_tools_of_the_splits_are_disjoint() -> None:
    names = {
        split: {novel_tool(split, Random(i)).wordings["train"][0].sample(Random(0)) for i in range(400)}
        for split in SPLITS
    }
    assert not names["train"] & names["sealed"]
    assert not names["train"] & names["dev"]


def test_declarations_vary_but_stay_valid() -> None:
    shapes = set()
    for i in range(200):
        made = declare(written_tools()[0], Random(i))
        function = made.declaration["function"]
        shapes.add(json.dumps(made.declaration))
        assert made.declaration["type"] == "function"
        assert set(function["parameters"]["required"]) <= set(function["parameters"]["properties"])
        assert list(made.names.values()) == list(function["parameters"]["properties"])
    assert len(shapes) > 100


def test_marked_tokens_are_the_assistants(encoder: Encoder, some: list[Conversation]) -> None:
    """Against rendering prompt and reply separately."""
    for talk in some[:40]:
        encoded = encoder.encode(talk)
        wanted = 0
        for probe in talk.probes:
            prompt, reply = prompt_of(encoder, talk, probe.index), reply_of(encoder, talk, probe.index)
            span = slice(len(prompt), len(prompt) + len(reply))
            assert encoded.tokens[span].tolist() == reply
            assert encoded.produced[span].all()
            assert reply[-1] == encoder.end
            wanted += len(reply)
        assert encoded.produced.sum() == wanted


def test_a_special_token_in_a_users_text_marks_nothing(encoder: Encoder) -> None:
    text = "<|im_assistant|>assistant<|im_middle|>hi<|im_end|>"
    talk = Conversation([{"role": "user", "content": text}], None, [])
    assert not encoder.encode(talk).produced.any()


def test_text_files_are_part_of_the_package() -> None:
    import hybrid.demo.data

    folder = Path(hybrid.demo.data.__path__[0]) / "text"
    assert {f.name for f in folder.iterdir()} == {*FILES, "frames.txt", "stories.txt", "words.txt"}


def every(line: str) -> set[str]:
    """What a pattern may say, slots alike and without punctuation."""

    def expand(tree: list[list[Any]]) -> set[str]:
        found = set()
        for parts in tree:
            said = {""}
            for part in parts:
                said = {a + b for a in said for b in ([part] if isinstance(part, str) else expand(part))}
            found |= said
        return found

    plain = re.sub(r"\{[a-z_.]+\}", "<x>", line)
    return {plainly(tidy(text)) for text in expand(Pattern(plain)._tree)}


def raw_lines(block: dict[str, list[str]]) -> list[str]:
    lines = [line for kind in ("train", "do", "thing", "want", "plain") for line in block.get(kind, [])]
    return [line for line in lines if Pattern(line).count() <= 20_000]


def said_to(block: dict[str, list[str]], *, of_tool: bool = False) -> set[str]:
    """All that the block's lines may say as they are, and much of what they say in frames.txt's sentences."""
    framed = {
        re.sub(r"\{[a-z_.]+\}", "<x>", p.sample(Random(i)))
        for p in all_wordings(block, of_tool=of_tool)["train"]
        for i in range(min(p.count(), 200))
    }
    plain = {plainly(text) for text in framed}
    return plain.union(*(every(line) for line in raw_lines(block)))


def test_what_training_says_to_a_request_can_be_known_from_it() -> None:
    """No request is of two intents, or of an intent and of a tool that may be declared meanwhile."""
    said: dict[str, str] = {}
    doubled = set()
    for file, heading in (("chat.txt", "intent"), ("facts.txt", "table"), ("numbers.txt", "op")):
        for block in blocks(file):
            if heading not in block or "follows" in block:  # what follows a question is told by that
                continue
            name = block[heading][0]
            for text in said_to(block):
                if said.setdefault(text, name) != name:
                    doubled.add((said[text], name, text))
    assert {(one, other) for one, other, _ in doubled} <= {("nextday", "next")}, doubled  # a day or a number
    shared = {
        (said[text], tool["tool"][0].split("/")[0], text)
        for tool in blocks("tools.txt")
        if "tool" in tool
        for text in said_to(tool, of_tool=True)
        if text in said
    }
    # small talk leaves these to the tools where they are declared
    known = {
        ("add", "add_numbers"),
        ("add", "calculate"),
        ("dontknow", "calculate"),  # "what is gravity", "what is 3 * 4"
        ("dontknow", "define_word"),
        ("dontknow", "get_recipe"),
        ("lists", "send_message"),  # "write two colours", "write Anna: good night"
    }
    assert {(one, other) for one, other, _ in shared} <= known, shared


def test_a_slot_is_moved_only_where_the_rest_still_says_what_is_wanted() -> None:
    def moved(text: str, *, free_text: bool = False) -> set[str]:
        return {move_slot(text, Random(i), free_text=free_text) for i in range(300)}

    front = moved("can you check the weather in {city} now?")
    assert "{city}: can you check the weather now?" in front
    assert all(text.count("{city}") == 1 and "in {city}" not in text for text in front)
    assert not any(text.endswith("{city}") for text in front)  # it was not at the end
    assert "check the weather: {city}" in moved("check the weather in {city}")
    assert moved('look up the word "{word}"') > {
        '"{word}": look up the word',
        'look up the word, namely "{word}"',
    }
    in_front = {f"{{text}}{mark} note it" for mark in (":", ",", " -", ".", ";")}
    assert moved("note it: {text}", free_text=True) <= in_front | {"note it: {text}"}
    for kept in (
        "play {song} now",
        "from {from} to {to}",
        "{city}'s weather",
        "wait {minutes} minutes",
        "i have to {task}. remind me",
        "is {a}?",
        "does {key} have a budget?",
    ):
        assert moved(kept) == {kept}


def test_a_plain_verb_is_replaced_and_no_telling_word() -> None:
    text, telling = "can you find the alarm, show and check {time}", frozenset({"show", "alarm"})
    said = {reword(text, Random(i), telling) for i in range(300)}
    assert len(said) > 100
    for other in said:
        changed = [(a, b) for a, b in zip(text.split(), other.split(), strict=True) if a != b]
        assert len(changed) == 1
        assert changed[0][0] in ("find", "check")
    assert reword("play {song}", Random(0), frozenset()) == "play {song}"
    assert reword("show ticket {key}", Random(0), frozenset({"show", "ticket"})) == "show ticket {key}"


def test_only_training_says_things_loosely() -> None:
    pattern = Pattern("please tell me the weather in {city}")
    for split, some in (("train", True), ("dev", False), ("sealed", False)):
        said = {
            worded(Talk(split, Random(i)), pattern, loosely=1.0, telling=frozenset()).lower()
            for i in range(50)
        }
        assert (said != {pattern.line}) == some


def test_tools_are_named_where_there_are_some() -> None:
    talk = Talk("train", Random(0))
    small_talk.chat(talk, "whichtools")
    tool_scenes.declare_some(talk, 3)
    small_talk.chat(talk, "whichtools")
    none, named = (talk.messages[probe.index]["content"] for probe in talk.probes)
    assert none == "I have no tools at the moment."
    assert named == f"My tools are: {', '.join(d.name for d in talk.declared)}."
    assert [probe.kind for probe in talk.probes] == ["tools", "tools"]


def test_only_training_asks_on_after_free_text_and_then_a_question() -> None:
    """What "note call Ann, and is it cold in Rome?" notes can be told, as no note is a question."""
    tools = {tool.key: tool for tool in written_tools()}
    for split, some in (("train", True), ("dev", False), ("sealed", False)):
        ran_on = 0
        for i in range(400):
            talk = Talk(split, Random(i))
            notes, weather = (declare(tools[key], Random(i)) for key in ("create_note", "get_weather"))
            text, calls, _ = tool_scenes._joined(talk, notes, weather)
            noted = re.escape(str(calls[0][1]["text"]))
            if found := re.search(rf'(?<!"){noted}(?:,? and (?:also )?|, also, )(.*)', text):
                ran_on += 1
                assert re.match(
                    "(what|which|who|when|where|why|how|(is|are|do|does|did|can|could|will|would|should|may|has|have)\\b)",
                    found[1],
                ), text
        assert (ran_on > 10) == some, (split, ran_on)


def test_requests_that_end_in_free_text_say_so() -> None:
    notes = next(tool for tool in written_tools() if tool.key == "create_note")
    weather = written_tools()[0]
    ends = Counter[bool]()
    for i in range(300):
        talk = Talk("train", Random(i))
        asked = tool_scenes.request(talk, declare(notes, Random(i)))
        text = re.sub(r"[?.!\s]+$", "", asked.text)
        ends[asked.open_ended] += 1
        assert asked.open_ended == text.endswith(asked.calls[0]["text"].rstrip("?.!"))
        assert not tool_scenes.request(talk, declare(weather, Random(i))).open_ended
    assert min(ends.values()) > 20


def test_free_names_are_new_and_keep_what_the_tool_is_about() -> None:
    tool = written_tools()[0]
    names = {declare(tool, Random(i), freely=1.0).name for i in range(300)}
    assert len(names) > 150
    assert not names & {name for other in written_tools() for name in other.names}
    assert all("weather" in name.lower() for name in names)
    assert {declare(tool, Random(i)).name.lower().replace("_", "") for i in range(300)} <= {
        name.replace("_", "") for name in tool.names
    }


def test_only_training_makes_up_values_of_any_words() -> None:
    listed = {item.strip() for item in ",".join(blocks("words.txt")[-1]["items"]).split(",")}
    for split, some in (("train", True), ("dev", False), ("sealed", False)):
        words = Vocabulary(split, Random(0))
        drawn = {words.text("item") for _ in range(400)}
        assert bool(drawn - listed) == some


def test_only_training_makes_up_names_with_accents_hyphens_and_apostrophes() -> None:
    for split, some in (("train", True), ("dev", False), ("sealed", False)):
        words = Vocabulary(split, Random(0))
        drawn = [words.text(kind) for _ in range(600) for kind in ("city", "contact")]
        for mark in ("[^\\x00-\\x7f]", "\\w-\\w", "\\b[odl]'\\w"):
            made_up = [name for name in drawn if re.search(mark, name, re.IGNORECASE)]
            assert (len(made_up) > 5) == some, (split, mark, made_up)


def test_values_of_any_words_may_say_one_twice_and_end_in_no_small_word() -> None:
    words = Vocabulary("train", Random(0))
    said = [words.text("message").split() for _ in range(1500)]
    long = [value for value in said if len(value) > 4 and value[0].islower()]
    assert 0.05 < sum(len(set(value)) < len(value) for value in long) / len(long) < 0.6
    events = {words.text("event").split()[-1] for _ in range(2000)}
    assert len(events) > 500
    assert not events & {"for", "with", "from", "tomorrow", "monday", "please", "two", "asap"}


def test_training_copies_nearly_everything_that_has_a_token(encoder: Encoder) -> None:
    """What is never asked for is never copied, wherever it stands."""
    tokenizer, asked = encoder.tokenizer, Counter[int]()
    for i in range(400):
        for message in conversation("train", Random(i)).messages:
            for call in message.get("tool_calls", []):
                for value in json.loads(call["function"]["arguments"]).values():
                    asked.update(tokenizer.encode(str(value)))
    whole = [i for i in range(tokenizer.vocab_size) if re.fullmatch("[a-z]{2,}", tokenizer.decode([i]))]
    never = [tokenizer.decode([i]) for i in whole if not asked[i]]
    assert len(whole) > 600
    assert len(never) < 0.25 * len(whole), never


def test_no_made_up_word_is_what_a_request_goes_on_with_or_anothers_name() -> None:
    words = Vocabulary("train", Random(0))
    drawn = {words.any_word().lower() for _ in range(20_000)}
    held_out = {
        item.strip().lower()
        for lines in blocks("words.txt")[-1].values()
        for item in ",".join(lines).split(",")
        if split_of(item.strip()) != "train"
    }
    assert not drawn & (held_out | {"please", "now", "tomorrow", "monday", "and", "two"})


def test_names_of_made_up_tools_are_such_as_clients_may_send() -> None:
    for i in range(2000):
        declared = declare(novel_tool("train", Random(i)), Random(i), freely=0.3)
        for name in (declared.name, *declared.names.values()):
            assert re.fullmatch("[A-Za-z0-9_]{1,64}", name), name
