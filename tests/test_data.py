"""Readers, the parser of ToolACE's calls, the synthetic set, augmentations, chat format, order."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data
from data import (
    Batches,
    Chat,
    Example,
    parse_calls,
    read_jsonl,
    read_toolace,
    read_xlam,
    synthetic,
    write_jsonl,
)
from reward import format_calls, format_reply, score

ROOT = Path(data.__file__).parent
WEATHER = {
    "name": "Get Weather (v2)",
    "description": "d",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "string", "default": "Oslo"}, "days": {"type": "int"}},
        "required": ["city"],
    },
    "required": None,
}
CLOCK = {"name": "clock/now", "description": "d", "parameters": {"type": "dict", "properties": {}}}


def toolace_file(folder, *turns, system=None):
    """A ToolACE file of one conversation; turns are "role: text"."""
    if system is None:
        system = (
            "You compose calls. Here is a list:\n"
            + json.dumps([WEATHER, CLOCK])
            + ". \nShould you [f(a=1)] do."
        )
    conversation = [dict(zip(("from", "value"), turn.split(": ", 1), strict=True)) for turn in turns]
    path = folder / "toolace.json"
    path.write_text(json.dumps([{"system": system, "conversations": conversation}]))
    return path


def example(number=0, **changes):
    made = Example(
        f"x/{number}",
        "xlam",
        [WEATHER, CLOCK],
        [{"role": "user", "content": f"query {number}"}],
        [{"name": "Get Weather (v2)", "arguments": {"city": "Rome", "days": number}}],
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy tokenizer folder, byte level, with the markers as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([json.dumps(vars(e)) for e in synthetic(50, 0, "train")], trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text('{"eos_token_id": 0}')
    return path


# ---- the parser of calls


@pytest.mark.parametrize(
    "text, calls",
    [
        ("[f()]", [("f", {})]),
        ("  [ f ( a = 1 ) , g() ]\n", [("f", {"a": 1}), ("g", {})]),
        ("[User Feed (Video Posts) V2(username='x')]", [("User Feed (Video Posts) V2", {"username": "x"})]),
        ("[/email/v1.2-x(e=1.0)]", [("/email/v1.2-x", {"e": 1.0})]),
        ("[Get Agent's, [all] Listings(z=-3)]", [("Get Agent's, [all] Listings", {"z": -3})]),
        ("[Now()(a=1)]", [("Now()", {"a": 1})]),
        ('[f(a="x, y=(z) [w] }", b=\'it\\\'s "q"\')]', [("f", {"a": "x, y=(z) [w] }", "b": 'it\'s "q"'})]),
        (
            "[f(a=[1, [2.5, 'b'], {}], b={'k': (True, None), \"l\": false})]",
            [("f", {"a": [1, [2.5, "b"], {}], "b": {"k": [True, None], "l": False}})],
        ),
        (
            "[f(include-lxx=true, filter[x]=null, from=1e3)]",
            [("f", {"include-lxx": True, "filter[x]": None, "from": 1000.0})],
        ),
        (
            r'[f(a="tab\t nl\n \u00e9 \ud83d\ude00 \x41 \d+ c:\\x \/")]',
            [("f", {"a": "tab\t nl\n é 😀 A \\d+ c:\\x /"})],
        ),
        ('[f(a="two\nlines")]', [("f", {"a": "two\nlines"})]),
        ('[f(a="), g(b=1)")]', [("f", {"a": "), g(b=1)"})]),
    ],
)
def test_calls_are_read_as_python_would(text, calls):
    assert parse_calls(text) == [{"name": name, "arguments": arguments} for name, arguments in calls]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "f(a=1)",
        "[f(a=1)",
        "[f(a=1)] and more",
        "[f(a=1)][g()]",
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=1 b=2)]",
        "[f(a=1, a=2)]",
        "[f(a={'k': 1, 'k': 2})]",
        "[f(a={1: 2})]",
        "[f(a='open)]",
        "[f(a=[1)]",
        "[f(a=)]",
        "[f(a=1,, b=2)]",
        "[f(a=007)]",
        "[f(a=g(1))]",
        "[f(a=1)]]",
        "[1, 2]",
        '[{"name": "f", "arguments": {}}]',
        "[f(a=1), ]",
        "[f]",
        "[f(a=" + "[" * 100_000 + ")]",
        '[f(a="\\u12")]',
        "[f(a=set())]",
    ],
)
def test_what_is_not_a_list_of_calls_is_refused(text):
    with pytest.raises(ValueError):
        parse_calls(text)


names = (
    st.text("abcXYZ 09./-_'()[],", min_size=1)
    .map(str.strip)
    .filter(lambda name: name and not re.search(r"\(\s*\)\s*[],]?|^\W|\($", name))
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"'\\"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(names, st.dictionaries(st.text("abc-.$_", min_size=1), values, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from((repr, json.dumps)),
)
def test_calls_written_in_python_or_json_literals_come_back(calls, write):
    text = ", ".join(
        f"{name}({', '.join(f'{key}={write(value)}' for key, value in arguments.items())})"
        for name, arguments in calls
    )
    assert parse_calls(f"[{text}]") == [{"name": name, "arguments": arguments} for name, arguments in calls]


# ---- ToolACE


def test_each_call_turn_is_an_example_with_everything_before_it_as_context(tmp_path):
    path = toolace_file(
        tmp_path,
        "user: weather in Rome?",
        'assistant: [Get Weather (v2)(city="Rome")]',
        "tool: 21",
        "assistant: 21 degrees.",
        "user: and the time?",
        "assistant: [clock/now(), clock/now()]",
    )
    (first, second), report = read_toolace(path)
    assert (report["raw"], report["kept"], report["dropped"], report["without_calls"]) == (1, 2, {}, 0)
    assert (first.id, first.source, first.tools) == ("toolace/0/1", "toolace_single", [WEATHER, CLOCK])
    assert first.messages == [{"role": "user", "content": "weather in Rome?"}]
    assert first.answer == [{"name": "Get Weather (v2)", "arguments": {"city": "Rome"}}]
    assert second.source == "toolace_multi"
    assert second.messages == [
        *first.messages,
        {"role": "assistant", "content": format_calls(first.answer)},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "21 degrees."},
        {"role": "user", "content": "and the time?"},
    ]
    assert second.messages[1]["content"] == (
        '<tool_call>[{"name": "Get Weather (v2)", "arguments": {"city": "Rome"}}]</tool_call>'
    )
    assert [call["name"] for call in second.answer] == ["clock/now"] * 2


def test_roles_of_other_releases_are_mapped(tmp_path):
    path = toolace_file(
        tmp_path, "human: time?", "gpt: [clock/now()]", "observation: 7", "gpt: [clock/now()]"
    )
    examples, _ = read_toolace(path)
    assert [message["role"] for message in examples[1].messages] == ["user", "assistant", "tool"]


def test_a_context_of_two_turns_is_multi_turn(tmp_path):
    (single,), _ = read_toolace(toolace_file(tmp_path, "user: q", "assistant: [clock/now()]"))
    (multi,), _ = read_toolace(toolace_file(tmp_path, "user: q", "user: now", "assistant: [clock/now()]"))
    assert (single.source, multi.source) == ("toolace_single", "toolace_multi")


@pytest.mark.parametrize(
    "turn, reason",
    [
        ("[Get Weather (v2)(city=Rome)]", "call does not parse"),
        ("[Get Weather (v2)(city='Rome'", "call does not parse"),
        ("[other(a=[)]", "call does not parse"),
        ("[other(a=1)]", "call of a tool that is not offered"),
        ("[clock/now(a='</tool_call>')]", "answer cannot score 1"),
        ("[clock/now(a=1" + "0" * 50 + ")]", "answer cannot score 1"),
        ("[clock/now(a='\\ud800')]", "call does not parse"),
    ],
)
def test_a_bad_call_turn_is_dropped_by_its_reason_and_the_rest_is_kept(tmp_path, turn, reason):
    path = toolace_file(
        tmp_path, "user: q", f"assistant: {turn}", "tool: r", "user: again", "assistant: [clock/now()]"
    )
    examples, report = read_toolace(path)
    assert [example.id for example in examples] == ["toolace/0/4"]
    assert len(examples[0].messages) == 4
    ((found, ids),) = report["dropped_ids"].items()
    assert found.startswith(reason) and ids == ["toolace/0/1"] and report["dropped"] == {found: 1}


@pytest.mark.parametrize(
    "turn",
    [
        "[Note] nothing fits (see above).",
        "[1] is a source",
        "[link](http://x?a=b)",
        "[]",
        "[Note: see (1)]",
        "[Insert date (day=1)] Dear all",
    ],
)
def test_text_that_begins_with_a_bracket_is_no_call_turn(tmp_path, turn):
    examples, report = read_toolace(toolace_file(tmp_path, "user: q", f"assistant: {turn}"))
    assert examples == [] and report["dropped"] == {} and report["without_calls"] == 1


@pytest.mark.parametrize(
    "system, reason",
    [
        ("no tools here", "no tool list in the system text"),
        ('list: [{"name": "f", "parameters": {]', "the tool list in the system text is not JSON"),
        ('list: [{"title": "f"}]', "no tool list in the system text"),
    ],
)
def test_a_record_without_readable_tools_is_dropped_as_a_whole(tmp_path, system, reason):
    path = toolace_file(tmp_path, "user: q", "assistant: [f()]", system=system)
    assert read_toolace(path)[1]["dropped_ids"] == {reason: ["toolace/0"]}


def test_tools_are_found_whatever_stands_around_them(tmp_path):
    for before, after in (
        ("", ""),
        ("Tools [see below]: ", " [{odd"),
        ('Reply like [{"a": 1}]. Tools:\n\n', "]]"),
    ):
        system = before + json.dumps([CLOCK], indent=2) + after
        examples, _ = read_toolace(
            toolace_file(tmp_path, "user: q", "assistant: [clock/now()]", system=system)
        )
        assert examples[0].tools == [CLOCK]


def test_a_call_turn_before_any_message_and_an_unknown_role_are_dropped(tmp_path):
    _, report = read_toolace(toolace_file(tmp_path, "assistant: [clock/now()]"))
    assert list(report["dropped"]) == [
        "messages are not a list of {role, content} with known roles and text, at least one"
    ]
    _, report = read_toolace(toolace_file(tmp_path, "user: q", "robot: [clock/now()]"))
    assert list(report["dropped"]) == ["a turn that is not text of a known role, but of 'robot'"]


def test_blanks_around_a_tool_name_do_not_lose_the_call(tmp_path):
    system = json.dumps([{**CLOCK, "name": "clock "}])
    examples, _ = read_toolace(toolace_file(tmp_path, "user: q", "assistant: [clock(a=1)]", system=system))
    assert examples[0].answer == [{"name": "clock ", "arguments": {"a": 1}}]


# ---- xLAM and our own files


def xlam_row(id, answers, tools=(WEATHER, CLOCK), query="q"):
    return {"id": id, "query": query, "tools": json.dumps(tools), "answers": json.dumps(answers)}


def test_xlam_rows_become_examples_or_are_dropped_by_reason(tmp_path):
    good = [{"name": "clock/now", "arguments": {}}]
    rows = [
        xlam_row(7, good),
        {**xlam_row(8, good), "tools": "[{"},
        xlam_row(9, [{"name": "f", "arguments": {}}]),
        xlam_row(10, [{"name": "clock/now"}]),
        xlam_row(11, []),
        xlam_row(12, good, query=None),
        xlam_row(13, [{"name": "clock/now", "arguments": {"a": float("nan")}}]),
        xlam_row(14, [{"name": "clock/now", "arguments": {"a": "\ud800"}}]),
    ]
    for name, text in (
        ("rows.json", json.dumps(rows)),
        ("rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
    ):
        (tmp_path / name).write_text(text)
        examples, report = read_xlam(tmp_path / name)
        assert [(e.id, e.source, e.answer) for e in examples] == [
            ("xlam/7", "xlam", good),
            ("xlam/11", "xlam", []),
        ]
        assert report["raw"] == 8 and report["kept"] == 2 and sum(report["dropped"].values()) == 6
        assert sorted(sum(report["dropped_ids"].values(), [])) == sorted(
            f"xlam/{n}" for n in (8, 9, 10, 12, 13, 14)
        )
        assert report["dropped"]["call of a tool that is not offered"] == 1


def test_jsonl_round_trip_keeps_every_field_and_odd_characters(tmp_path):
    examples = [example(0, reasoning="r\u2028\n é 😀"), example(1, answer=[], source="none")]
    write_jsonl(tmp_path / "x.jsonl", examples)
    assert read_jsonl(tmp_path / "x.jsonl") == examples
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [example()])
    with pytest.raises(TypeError):
        write_jsonl(path, [example(1), example(2, tools=[{"name": object()}])])
    assert read_jsonl(path) == [example()] and os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ("[1]", "object is expected"),
        (json.dumps({**vars(example()), "anwser": []}), "anwser"),
        (json.dumps({k: v for k, v in vars(example()).items() if k != "answer"}), "answer"),
        (json.dumps({**vars(example()), "messages": []}), "messages"),
        (json.dumps({**vars(example()), "messages": [{"role": "robot", "content": ""}]}), "messages"),
        (json.dumps({**vars(example()), "tools": [{}]}), "tools"),
        (json.dumps({**vars(example()), "answer": {"name": "f"}}), "list of calls"),
        (json.dumps({**vars(example()), "answer": [{"name": "f", "arguments": {}}]}), "not offered"),
        (json.dumps({**vars(example()), "reasoning": "</think>"}), "cannot score 1"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(vars(example())) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ")) as caught:
        read_jsonl(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_and_missing_columns_are_errors_that_name_them(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\xfe{")
    (tmp_path / "cut.json").write_text('[{"id": 1},')
    (tmp_path / "other.jsonl").write_text('{"id": 1}\n')
    for name, words in (
        ("none", "cannot be read"),
        ("latin", "UTF-8"),
        ("cut.json", "not JSON"),
        ("other.jsonl", "no query, tools, answers"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            read_xlam(tmp_path / name)
        assert name in str(caught.value)


# ---- synthetic tool calling

WORLD = json.loads((ROOT / "assets" / "synthetic.json").read_text())
WORDS = set(re.findall(r"[a-z]+", json.dumps(WORLD).lower()))
TRAIN = synthetic(3000, 0, "train")
SPLITS = {split: synthetic(1000, 1, split) for split in ("values", "paraphrases", "tools")}
HELDOUT = sum(SPLITS.values(), [])


def query_of(example):
    return example.messages[-1]["content"]


def open_values(example):
    """Made-up words, times and numbers of a query, read from its text alone."""
    words = re.findall(r"\d+(?:[.:]\d+)?|[A-Za-z]+", query_of(example))
    return {word for word in words if word[0].isdigit() or word.lower() not in WORDS}


def wordings(which, *lists):
    """Regular expressions of the wordings of `lists`: "train": all but the last of each, "new": the last."""
    chosen = [
        wording for choices in lists for wording in (choices[:-1] if which == "train" else choices[-1:])
    ]
    flat = [text for wording in chosen for text in ([wording] if isinstance(wording, str) else wording)]
    return [re.sub(r"\\{\w*\\}", "(.+)", re.escape(text)) for text in flat]


def test_train_and_heldout_share_no_value_and_so_no_query():
    train, heldout = (set().union(*map(open_values, examples)) for examples in (TRAIN, HELDOUT))
    assert len(train) > 1000 and len(heldout) > 1000 and not train & heldout
    assert all(open_values(example) for example in TRAIN + HELDOUT)
    assert not {query_of(e) for e in TRAIN} & {query_of(e) for e in HELDOUT}


def test_no_wording_holds_an_open_value():
    assert not re.search(r"\d", json.dumps(WORLD))
    for call in (call for made in TRAIN + HELDOUT for call in made.answer):
        for key, value in call["arguments"].items():
            is_closed = WORLD["parameters"][key]["schema"].keys() != {"type"} or isinstance(value, bool)
            assert is_closed or str(value).lower() not in WORDS


def test_a_frame_of_the_paraphrases_is_in_no_other_split_and_theirs_are_never_in_it():
    frames = {which: wordings(which, WORLD["one"], WORLD["two"]) for which in ("train", "new")}
    for split, examples in (("train", TRAIN), *SPLITS.items()):
        for made in examples:
            said = [
                any(re.fullmatch(frame, query_of(made), re.I) for frame in frames[which])
                for which in ("train", "new")
            ]
            # A new frame may look like an old one with a longer request in it, but not the other way round.
            assert said[1] == (split == "paraphrases") and (said[0] or split == "paraphrases"), query_of(made)


def test_every_phrase_of_the_paraphrases_is_new_and_no_other_split_has_one():
    for split, examples in (("train", TRAIN), *SPLITS.items()):
        for made in examples:
            for call in made.answer:
                for key, value in call["arguments"].items():
                    said = WORLD["parameters"][key]["said"]
                    texts = [s[not value] if isinstance(value, bool) else s.format(value) for s in said]
                    query = query_of(made)
                    found = [text in query or text[0].upper() + text[1:] in query for text in texts]
                    assert found[-1] if split == "paraphrases" else any(found[:-1]), (query_of(made), texts)
                    if split != "paraphrases" and not any(texts[-1] in text for text in texts[:-1]):
                        assert not re.search(rf"\b{re.escape(texts[-1])}\b", query_of(made)), query_of(made)


def test_paraphrases_say_nothing_in_words_that_training_never_used():
    spoken = " ".join(query_of(made) + " ".join(map(json.dumps, made.tools)) for made in TRAIN).lower()
    known = set(re.findall(r"[a-z]+", spoken))
    for made in SPLITS["paraphrases"]:
        words = set(re.findall(r"[a-z]+", query_of(made).lower()))
        assert words - {value.lower() for value in open_values(made)} <= known, words - known


def test_no_tool_of_the_tools_split_is_ever_offered_in_another():
    names = {
        split: {tool["name"] for made in examples for tool in made.tools}
        for split, examples in (("train", TRAIN), *SPLITS.items())
    }
    assert len(names["tools"]) >= 12 and len(names["train"]) >= 100
    assert not names["tools"] & (names["train"] | names["values"] | names["paraphrases"])
    # Their words are known, each by itself: what is new is the pair.
    parts = {part for name in names["train"] for part in name.split("_")}
    assert {part for name in names["tools"] for part in name.split("_")} <= parts


def test_a_heldout_set_holds_the_three_splits_in_equal_parts():
    sources = Counter(made.source.split("/")[0] for made in synthetic(900, 0, "heldout"))
    assert sources == {"values": 300, "paraphrases": 300, "tools": 300}
    third = Counter(made.source.split("/")[0] for made in synthetic(900, 0, "heldout")[::3])
    assert third == {"values": 100, "paraphrases": 100, "tools": 100}


def test_parameters_have_all_types_and_at_least_three_wordings():
    types = Counter()
    for entry in WORLD["parameters"].values():
        schema, said = entry["schema"], entry["said"]
        types["enum" if "enum" in schema else schema["type"]] += 1
        assert len({json.dumps(wording) for wording in said}) == len(said) >= 3
        assert all(len(s) == 2 if schema["type"] == "boolean" else s.count("{}") == 1 for s in said)
    assert set(types) == {"string", "integer", "number", "boolean", "enum"}
    used = {name for noun in WORLD["nouns"].values() for name in noun["parameters"]}
    assert used == set(WORLD["parameters"])
    assert {verb for noun in WORLD["nouns"].values() for verb in noun["verbs"]} == set(WORLD["verbs"])


def test_synthetic_answers_score_1_and_fit_the_offered_schemas():
    python = {"string": str, "integer": int, "number": float, "boolean": bool}
    for made in TRAIN[:1000]:
        schemas = {tool["name"]: tool["parameters"] for tool in made.tools}
        assert len(schemas) == len(made.tools) and 2 <= len(schemas) <= 4
        for call in made.answer:
            assert list(call["arguments"]) == schemas[call["name"]]["required"]
            for key, value in call["arguments"].items():
                schema = schemas[call["name"]]["properties"][key]
                assert type(value) is python[schema["type"]] and value in schema.get("enum", [value])
                assert isinstance(value, bool) or str(value) in query_of(made)
        assert score(format_reply(made.answer, made.reasoning), made.answer).reward == 1
        assert data._problem(made) is None


def test_synthetic_mixture_holds_all_three_kinds_and_tools_that_are_alike():
    share = {kind: n / len(TRAIN) for kind, n in Counter(example.source for example in TRAIN).items()}
    assert share == {
        "train/single": pytest.approx(0.50, abs=0.03),
        "train/no_tool": pytest.approx(0.30, abs=0.03),
        "train/two_calls": pytest.approx(0.20, abs=0.03),
    }
    for made in TRAIN:
        assert len(made.answer) == {"train/single": 1, "train/two_calls": 2, "train/no_tool": 0}[made.source]
    assert len({query_of(example) for example in TRAIN}) > 0.99 * len(TRAIN)
    alike = [
        len(set().union(*(tool["name"].split("_") for tool in made.tools))) < 2 * len(made.tools)
        for made in TRAIN
    ]
    assert 0.4 * len(TRAIN) < sum(alike) < 0.9 * len(TRAIN)


def test_a_query_that_no_tool_fits_names_no_thing_that_an_offered_tool_is_about():
    for made in (made for made in TRAIN + HELDOUT if made.answer == []):
        for tool in made.tools:
            noun = tool["name"].split("_")[1]
            assert not any(
                re.search(rf"\b{text}\b(?! room| message)", query_of(made), re.I)
                for text in WORLD["nouns"][noun]["said"]
            ), (query_of(made), tool["name"])


def test_phrases_say_their_values_and_are_those_of_training():
    made = list(data.synthetic_phrases(500, 3, 1, 4))
    assert made == list(data.synthetic_phrases(500, 3, 1, 4)) != list(data.synthetic_phrases(500, 4, 1, 4))
    for values, phrases in made:
        assert 1 <= len(values) == len(phrases) <= 4
        texts = []
        for name, value in values.items():
            said = WORLD["parameters"][name]["said"][:-1]
            texts.append({s[not value] if isinstance(value, bool) else s.format(value) for s in said})
        assert sum(len(text & set(phrases)) for text in texts) >= len(phrases)


def test_synthetic_examples_depend_on_seed_split_and_number_only():
    assert synthetic(20, 0, "train") == TRAIN[:20] != synthetic(20, 1, "train")
    code = "import data; print(data.Batches(data.synthetic(50, 3, 'heldout'), 1, 0).fingerprint)"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert prints == {Batches(synthetic(50, 3, "heldout"), 1, 0).fingerprint + "\n"}


def test_an_unknown_split_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="train, values, paraphrases, tools, heldout"):
        synthetic(1, 0, "test")


def test_reasoning_follows_the_calls():
    calls = [{"name": "f", "arguments": {"a": 1, "b": 2}}, {"name": "g", "arguments": {"c": 3}}]
    assert data.synthetic_reasoning(calls) == "f with a, b; g with c."
    assert data.synthetic_reasoning([]) == "No tool fits."
    assert all(made.reasoning == data.synthetic_reasoning(made.answer) for made in TRAIN)


# ---- augmenting


def test_irrelevance_removes_the_right_tools_of_the_asked_share():
    examples = [example(n) for n in range(40)]
    made = data.make_irrelevant(examples, 0.15, seed=1)
    changed = [(old, new) for old, new in zip(examples, made, strict=True) if old != new]
    assert len(changed) == 6 and made == data.make_irrelevant(examples, 0.15, 1) != data.make_irrelevant(
        examples, 0.15, 2
    )
    for old, new in changed:
        assert new.answer == [] and new.tools == [CLOCK] and new.source == "xlam_irrelevant"
        assert new.messages == old.messages and data._problem(new) is None


def test_irrelevance_leaves_examples_with_no_other_tool():
    alone = [example(n, tools=[WEATHER]) for n in range(5)]
    assert data.make_irrelevant(alone, 1.0, 0) == alone


def test_masking_renames_tools_answers_earlier_calls_and_results_alike():
    call = [{"name": "Get Weather (v2)", "arguments": {"city": "Rome"}}]
    messages = [
        {"role": "user", "content": "Get Weather (v2)?"},
        {"role": "assistant", "content": format_calls(call)},
        {"role": "tool", "content": '[{"name": "Get Weather (v2)", "results": 1}]'},
    ]
    old = example(3, messages=messages)
    (new,) = data.mask_names([old], 1.0, seed=0)
    weather, clock = new.tools
    city, days = weather["parameters"]["properties"]
    assert (
        weather["name"] != "Get Weather (v2)"
        and clock["name"] != "clock/now"
        and {city, days}.isdisjoint({"city", "days"})
    )
    assert weather["parameters"]["required"] == [city] and weather["description"] == "d"
    assert new.answer == [{"name": weather["name"], "arguments": {city: "Rome", days: 3}}]
    assert new.messages == [
        messages[0],
        {
            "role": "assistant",
            "content": format_calls([{"name": weather["name"], "arguments": {city: "Rome"}}]),
        },
        {"role": "tool", "content": f'[{{"name": "{weather["name"]}", "results": 1}}]'},
    ]
    assert weather["parameters"]["properties"][city]["default"] == "Oslo"  # the calls hold a city
    assert data._problem(new) is None and old.tools[0] is WEATHER and WEATHER["name"] == "Get Weather (v2)"


def test_masking_changes_flat_schemas_and_unused_text_defaults():
    flat = {
        "name": "f",
        "description": "d",
        "parameters": {
            "a": {"type": "str", "default": "x"},
            "b": {"type": "str, optional", "default": "json"},
            "c": {"default": 3},
        },
    }
    old = example(tools=[flat], answer=[{"name": "f", "arguments": {"a": "x"}}])
    (new,) = data.mask_names([old], 1.0, seed=0)
    a, b, c = new.tools[0]["parameters"].items()
    assert {a[0], b[0], c[0]}.isdisjoint("abc") and a[1]["default"] == "x" and c[1]["default"] == 3
    assert b[1]["default"] != "json" and b[1]["type"] == "str, optional"
    assert new.answer == [{"name": new.tools[0]["name"], "arguments": {a[0]: "x"}}]


def test_masking_draws_the_asked_share_by_seed():
    examples = [example(n) for n in range(100)]
    made = data.mask_names(examples, 0.67, 5)
    assert sum(old != new for old, new in zip(examples, made, strict=True)) == 67
    assert made == data.mask_names(examples, 0.67, 5)


# ---- chat format


def test_messages_render_as_qwen_chat(folder):
    chat = Chat(folder)
    tool, user = {"role": "tool", "content": " r "}, {"role": "user", "content": "hi"}
    default = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    )
    assert chat.render([user], True) == default + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render([{"role": "system", "content": ""}, tool, tool, user], False) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user"
        + 2 * "\n<tool_response>\n r \n</tool_response>"
        + "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_the_prompt_lists_the_tools_one_json_line_each_and_ends_where_the_reply_begins(folder):
    chat = Chat(folder)
    text = chat.decode(chat.encode_prompt(example()))
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line) for line in listed] == [
        {"type": "function", "function": t} for t in (WEATHER, CLOCK)
    ]
    assert text.startswith("<|im_start|>system\n") and text.count("<|im_start|>") == 3
    assert text.endswith("<|im_start|>user\nquery 0<|im_end|>\n<|im_start|>assistant\n")
    assert "You are Qwen" not in text
    accents = example(tools=[{"name": "f", "description": "Zürich 😀"}], answer=[])
    assert "Zürich 😀" in chat.decode(chat.encode_prompt(accents))


def test_a_system_prompt_file_replaces_ours_and_the_examples_system_text_follows_it(folder, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text('Tools {"a": {tools}} end')
    made = example(tools=[{"name": "f"}], messages=[{"role": "system", "content": "S"}, *example().messages])
    chat = Chat(folder, path)
    text = chat.decode(chat.encode_prompt(made))
    assert text.startswith(
        '<|im_start|>system\nTools {"a": {"type": "function", "function": {"name": "f"}}} end\n\nS<|im_end|>'
    )
    for wrong in ("none", "{tools} and {tools}"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="prompt.txt.*{tools}"):
            Chat(folder, path)


def test_our_system_prompts_own_example_is_a_reply_that_scores_1():
    text = (ROOT / "assets" / "system_prompt.txt").read_text()
    reply = re.search(r"Example: (<think>.*</tool_call>)", text, re.DOTALL)[1]
    calls = json.loads(reply[reply.index("<tool_call>") + 11 : -12])
    assert reply == format_reply(calls, "Two cities, so two forecasts.") and score(reply, calls).reward == 1


def test_the_reply_is_the_format_and_one_stop_token(folder):
    chat, made = Chat(folder), example(reasoning="why")
    ids = chat.encode_reply(made)
    assert chat.decode(ids) == format_reply(made.answer, "why") + "<|im_end|>"
    assert ids[-1] in chat.stop_ids and not set(ids[:-1]) & chat.stop_ids
    assert score(chat.decode(ids), made.answer).reward == 1


def test_stop_ids_are_the_union_of_config_generation_config_and_tokenizer(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    token = Chat(folder).tokenizer.token_to_id
    assert Chat(tmp_path).stop_ids == {token("<|im_end|>")}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert Chat(tmp_path).stop_ids == {token("<|im_end|>"), token("</s>")}
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert Chat(tmp_path).stop_ids == {0, 7, 8, token("<|im_end|>"), token("</s>")}


def test_vocab_size_counts_ids_and_encoding_neither_adds_nor_cuts(folder):
    chat = Chat(folder)
    assert chat.vocab_size == chat.tokenizer.get_vocab_size() == 600
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20_000)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = Chat(folder).encode("naïve 😀 " * 600)
    assert ids == chat.encode("naïve 😀 " * 600) and chat.decode(ids) == "naïve 😀 " * 600


def test_folders_without_tokenizer_or_end_of_sequence_are_errors(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        Chat(tmp_path)
    bare = json.loads((folder / "tokenizer.json").read_text())
    bare["added_tokens"] = []
    bare["model"]["vocab"]["plain"] = bare["model"]["vocab"].pop("<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="eos_token"):
        Chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not JSON"):
        Chat(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="neither a folder"):
        Chat("not a/hub/name")


# ---- order


def test_split_is_seeded_disjoint_and_complete():
    examples = [example(n) for n in range(50)]
    train, heldout = data.split_examples(examples, 0.1, seed=0)
    assert len(heldout) == 5 and sorted(train + heldout, key=examples.index) == examples
    assert (train, heldout) == data.split_examples(examples, 0.1, 0) != data.split_examples(examples, 0.1, 1)


def test_long_prompts_are_dropped_and_counted_never_cut(folder):
    chat = Chat(folder)
    examples = [example(n) for n in range(9)]
    long = example(9, messages=[{"role": "user", "content": "long " * 2000}])
    limit = max(len(chat.encode_prompt(e)) for e in examples)
    assert data.filter_by_prompt_tokens([long, *examples], chat, limit, 0.1) == (examples, 1)
    with pytest.raises(ValueError, match=r"1 of 10 prompts \(10.0%\).*raise"):
        data.filter_by_prompt_tokens([*examples, long], chat, limit, 0.05)
    assert data.filter_by_prompt_tokens([], chat, limit, 0.0) == ([], 0)


def test_every_epoch_deals_every_example_once_in_a_new_order():
    examples = [example(n) for n in range(10)]
    batches = Batches(examples, 4, seed=0)
    dealt = [made for _ in range(5) for made in next(batches)]
    first, second = dealt[:10], dealt[10:]
    assert sorted(first, key=examples.index) == sorted(second, key=examples.index) == examples
    assert first != second != examples and batches.cursor == 20 and batches.epoch == 2.0


@pytest.mark.parametrize("cursor", [0, 3, 8, 12, 23])
def test_example_k_depends_on_seed_and_k_only(cursor):
    examples = [example(n) for n in range(7)]
    one_by_one = [next(Batches(examples, 1, 5, cursor=k))[0] for k in range(40)]
    resumed = Batches(examples, 3, 5, cursor=cursor)
    assert [made for _ in range(4) for made in next(resumed)] == one_by_one[cursor : cursor + 12]
    assert resumed.cursor == cursor + 12
    other = Batches(examples, 7, 6)
    assert next(other) != one_by_one[:7]


def test_fingerprint_changes_with_content_and_order_only():
    examples = [example(n) for n in range(5)]
    same = Batches(list(examples), 2, seed=9, cursor=3).fingerprint
    assert same == Batches(examples, 1, seed=0).fingerprint
    others = (examples[::-1], examples[:4], [*examples[:4], example(4, reasoning="new")])
    assert same not in {Batches(other, 1, 0).fingerprint for other in others}


@pytest.mark.parametrize("size", [0, 4])
def test_a_batch_larger_than_the_data_is_refused(size):
    with pytest.raises(ValueError, match=f"batches of {size} from 3 examples"):
        Batches([example(n) for n in range(3)], size, 0)


# ---- command line


def test_convert_prints_the_counts_and_writes_the_examples(tmp_path, capsys):
    path = toolace_file(tmp_path, "user: q", "assistant: [other()]", "user: q", "assistant: [clock/now()]")
    assert data.main(["convert", "toolace", str(path), str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"1 raw records", printed) and re.search(r"1 toolace_multi", printed)
    assert "1 dropped: call of a tool that is not offered: toolace/0/1" in printed
    assert [e.id for e in read_jsonl(tmp_path / "out.jsonl")] == ["toolace/0/3"]


def test_convert_augments_as_asked(tmp_path):
    rows = [xlam_row(n, [{"name": "clock/now", "arguments": {}}]) for n in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ["convert", "xlam", str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")]
    assert data.main([*arguments, "--irrelevant", "0.15", "--mask", "0.65", "--seed", "2"]) == 0
    made = read_jsonl(tmp_path / "out.jsonl")
    assert (
        sum(e.source == "xlam_irrelevant" for e in made) == 3 and sum("/masked" in e.id for e in made) == 13
    )


def test_synthetic_command_writes_what_the_function_makes(tmp_path):
    assert data.main(["synthetic", "5", str(tmp_path / "s.jsonl"), "--split", "heldout", "--seed", "4"]) == 0
    assert read_jsonl(tmp_path / "s.jsonl") == synthetic(5, 4, "heldout")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["convert", "xlam", "missing.json", "out.jsonl"], "missing.json"),
        (["convert", "xlam", "empty.json", "out.jsonl"], "empty.json"),
        (["convert", "xlam", "empty.json", "out.jsonl", "--mask", "67"], "67"),
        (["synthetic", "5", "no/such/folder/out.jsonl"], "no/such/folder"),
    ],
)
def test_command_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("[]")
    assert data.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not Path("out.jsonl").exists()


# ---- real data


@pytest.fixture(scope="module")
def qwen(real_data):
    return Chat(real_data / "qwen2.5")


def test_golden_chats_and_encodings(qwen, real_data):
    cases = json.loads((real_data / "qwen2.5" / "golden_chat.json").read_text())
    plain = [
        case for case in cases if "tools" not in case and "tool_calls" not in json.dumps(case["messages"])
    ]
    assert len(plain) == 20
    for case in plain:
        text = qwen.render(case["messages"], case["add_generation_prompt"])
        assert text == case["rendered"], case["name"]
        assert qwen.encode(text) == case["token_ids"], case["name"]
    golden = json.loads((real_data / "qwen2.5" / "golden_tokens.json").read_text())
    assert len(golden) == 16 and all(qwen.encode(case["text"]) == case["ids"] for case in golden)
    assert qwen.stop_ids == {151643, 151645} and qwen.vocab_size == 151665
    assert qwen.decode([151935, 151645]) == "<|im_end|>"


def test_every_call_turn_of_toolace_is_kept(real_data):
    path = real_data / "data" / "toolace" / "toolace_upstream_repaired.json"
    turns = [
        turn["value"]
        for record in json.loads(path.read_text())
        for turn in record["conversations"]
        if turn["from"] == "assistant" and turn["value"].startswith("[")
    ]
    examples, report = read_toolace(path)
    assert len(turns) == report["kept"] == 100 and report["dropped"] == {} and report["raw"] == 58
    assert [example.answer for example in examples] == [parse_calls(turn) for turn in turns]
    # Written again by an independent hand, every turn is what stood in the file (1.0 apart from 1).
    for turn, calls in zip(turns, (example.answer for example in examples), strict=True):
        text = ", ".join(
            f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"
            for call in calls
        )
        assert f"[{text}]".replace("'", '"') == turn.replace("'", '"')


def test_all_system_texts_of_toolace_yield_tools(real_data):
    records = json.loads((real_data / "data" / "toolace" / "toolace_first100_sharegpt.json").read_text())
    assert all(data._find_tools(record["system"])[0] for record in records)
    _, report = read_toolace(real_data / "data" / "toolace" / "toolace_first100_sharegpt.json")
    assert report["dropped"] == {"a turn that is not text of a known role, but of 'function_call'": 78}


def test_all_xlam_rows_are_kept_and_score_1_through_tokens(qwen, real_data):
    examples, report = read_xlam(real_data / "data" / "xlam" / "xlam_columns_from_rlla.json")
    assert (report["raw"], report["kept"], report["dropped"]) == (335, 335, {})
    for made in [*examples, *data.mask_names(examples, 1.0, 0)]:
        assert score(qwen.decode(qwen.encode_reply(made)), made.answer).reward == 1, made.id


def test_answers_of_rlla_score_1_in_our_format(real_data):
    lines = (real_data / "data" / "rlla_4k" / "normalized.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answers"] for line in lines]
    assert len(answers) == 392 and all(score(format_reply(a, "r"), a).reward == 1 for a in answers)
