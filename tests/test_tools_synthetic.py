"""tools/synthetic.py: held-out splits share nothing with training, answers are right, files never change."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import data
from data import Batches, read_jsonl
from reward import format_reply, score
from tools.synthetic import main, synthetic, synthetic_groups, synthetic_phrases, synthetic_reasoning

ROOT = Path(data.__file__).parent
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
    """Regular expressions of the wordings "train" or "new" of `lists`."""
    flat = [text for choices in lists for wording in choices[which]
            for text in ([wording] if isinstance(wording, str) else wording)]
    return [re.sub(r"\\{\w*\\}", "(.+)", re.escape(text)) for text in flat]


def test_train_and_heldout_share_no_value_and_so_no_query():
    train, heldout = (set().union(*map(open_values, examples)) for examples in (TRAIN, HELDOUT))
    assert len(train) > 1000 and len(heldout) > 500 and not train & heldout
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
            # A new frame may match an old one that holds a longer request; no old frame matches a new one.
            assert said[1] == (split == "paraphrases") and (said[0] or split == "paraphrases"), query_of(made)


def test_every_phrase_of_the_paraphrases_is_new_and_no_other_split_has_one():
    def texts(which, key, value):
        said = WORLD["parameters"][key]["said"][which]
        return [s[not value] if isinstance(value, bool) else s.format(value) for s in said]

    for split, examples in (("train", TRAIN), *SPLITS.items()):
        used = "new" if split == "paraphrases" else "train"
        for made in examples:
            query = query_of(made)
            for key, value in ((k, v) for call in made.answer for k, v in call["arguments"].items()):
                said = texts(used, key, value)
                assert any(text in query or text[0].upper() + text[1:] in query for text in said), query
                if split != "paraphrases":
                    for new in texts("new", key, value):
                        assert not re.search(rf"\b{re.escape(new)}\b", query), (query, new)


def test_the_id_of_an_example_ends_with_its_frame_and_every_split_has_many():
    frames = {size: WORLD[size]["train"] + WORLD[size]["new"] for size in ("one", "two")}
    for examples in (TRAIN, *SPLITS.values()):
        counts = Counter(made.id.rsplit("/", 1)[1] for made in examples)
        for size in frames:
            assert sum(name.startswith(size) for name in counts) >= 6
        for made in examples:
            size, number = made.id.rsplit("/", 1)[1].split("-")
            assert (size == "two") == (len(made.answer) == 2)
            frame = re.sub(r"\\{\w\\}", "(.+)", re.escape(frames[size][int(number)]))
            assert re.fullmatch(frame, query_of(made), re.I), (made.id, query_of(made))


def test_paraphrases_say_nothing_in_words_that_training_never_used():
    said = [entry["said"]["train"] for entry in WORLD["parameters"].values()]  # a restaurant is rare in TRAIN
    spoken = " ".join(query_of(made) + " ".join(map(json.dumps, made.tools)) for made in TRAIN).lower()
    spoken += json.dumps(said).lower()
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
        assert len(said["train"]) >= 5 and len(said["new"]) >= 2
        said = said["train"] + said["new"]
        assert len({json.dumps(wording) for wording in said}) == len(said)
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


def test_synthetic_mixture_holds_all_three_kinds_and_tools_that_share_words():
    share = {kind: n / len(TRAIN) for kind, n in Counter(example.source for example in TRAIN).items()}
    assert share == {
        "train/single": pytest.approx(0.50, abs=0.03),
        "train/no_tool": pytest.approx(0.30, abs=0.03),
        "train/two_calls": pytest.approx(0.20, abs=0.03),
    }
    for made in TRAIN:
        assert len(made.answer) == {"train/single": 1, "train/two_calls": 2, "train/no_tool": 0}[made.source]
    assert len({query_of(example) for example in TRAIN}) > 0.99 * len(TRAIN)
    sharing = [
        len(set().union(*(tool["name"].split("_") for tool in made.tools))) < 2 * len(made.tools)
        for made in TRAIN
    ]
    assert 0.4 * len(TRAIN) < sum(sharing) < 0.9 * len(TRAIN)


def test_a_query_that_no_tool_fits_names_no_thing_that_an_offered_tool_is_about():
    for made in (made for made in TRAIN + HELDOUT if made.answer == []):
        for tool in made.tools:
            noun = tool["name"].split("_")[1]
            assert not any(
                re.search(rf"\b{text}\b(?! room| message)", query_of(made), re.I)
                for text in WORLD["nouns"][noun]["said"]
            ), (query_of(made), tool["name"])


def test_queries_of_a_group_share_their_tools_and_ask_as_often_as_their_mix_says():
    mixes = [(50, 20, 30), (0, 100, 0), (0, 0, 100)]
    groups = list(synthetic_groups(200, 3, mixes))
    assert groups == list(synthetic_groups(200, 3, mixes)) != list(synthetic_groups(200, 4, mixes))
    for group in groups:
        assert all(made.tools == group[0].tools for made in group) and len(group) == 3
        assert len(group[1].answer) == 2 and group[2].answer == []
        for made in group:
            assert score(format_reply(made.answer, made.reasoning), made.answer).reward == 1
    share = sum(len(group[0].answer) == 1 for group in groups) / len(groups)
    assert share == pytest.approx(0.5, abs=0.12)
    heldout = set().union(*map(open_values, HELDOUT))
    assert not heldout & set().union(*(open_values(made) for group in groups for made in group))


def test_phrases_say_their_values_and_are_those_of_training():
    made = list(synthetic_phrases(500, 3, 1, 4))
    assert made == list(synthetic_phrases(500, 3, 1, 4)) != list(synthetic_phrases(500, 4, 1, 4))
    for values, phrases in made:
        assert 1 <= len(values) == len(phrases) <= 4
        texts = []
        for name, value in values.items():
            said = WORLD["parameters"][name]["said"]["train"]
            texts.append({s[not value] if isinstance(value, bool) else s.format(value) for s in said})
        assert sum(len(text & set(phrases)) for text in texts) >= len(phrases)


def test_synthetic_examples_depend_on_seed_split_and_number_only():
    assert synthetic(20, 0, "train") == TRAIN[:20] != synthetic(20, 1, "train")
    code = (
        "from data import Batches; from tools.synthetic import synthetic; "
        "print(Batches(synthetic(50, 3, 'heldout'), 1, 0).fingerprint)"
    )
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
    assert synthetic_reasoning(calls) == "f with a, b; g with c."
    assert synthetic_reasoning([]) == "No tool fits."
    assert all(made.reasoning == synthetic_reasoning(made.answer) for made in TRAIN)


# ---- command line


def test_synthetic_command_writes_what_the_function_makes(tmp_path):
    assert main(["5", str(tmp_path / "s.jsonl"), "--split", "heldout", "--seed", "4"]) == 0
    assert read_jsonl(tmp_path / "s.jsonl") == synthetic(5, 4, "heldout")


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "01017fa36786fe5f532fdeeb133b0c370a1c9193b1ddea0e329cce20b06e6b08"),
        ("heldout", "5fbe072882769e6ecb364d3c4568796c47788b43ba95fd166b4e0ce1d77f340e"),
    ],
)
def test_a_file_has_the_same_bytes_as_ever(tmp_path, split, digest):
    assert main(["60", str(tmp_path / "s.jsonl"), "--split", split, "--seed", "0"]) == 0
    assert hashlib.sha256((tmp_path / "s.jsonl").read_bytes()).hexdigest() == digest


def test_a_missing_folder_is_an_error_of_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["5", "no/such/folder/out.jsonl"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "no/such/folder" in error
    assert not Path("out.jsonl").exists() and not Path("no").exists()
