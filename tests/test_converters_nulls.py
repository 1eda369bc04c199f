"""converters/nulls.py: nulls that a columnar file leaves in every record are taken out, others stay."""

import json

import pytest

from converters.nulls import undo_nulls
from data import main, read_chat, read_jsonl, read_xlam
from reward import format_calls

PLAY = {"name": "play", "parameters": {"song": {"type": "str"}, "loud": {"type": "bool, optional"},
                                       "room": {"type": "Optional[str]"}}}
STOP = {"name": "stop", "parameters": {"after": {"type": "int", "default": 1}}}


def rows(*answers, tools=(PLAY, STOP)):
    return [{"query": "q", "tools": list(tools), "answers": [{"name": name, "arguments": arguments}]}
            for name, arguments in answers]


def convert(folder, records):
    path = folder / "rows.json"
    path.write_text(json.dumps(records))
    examples, report = read_xlam(path)
    return [example.answer[0]["arguments"] for example in examples], report, examples


def test_a_null_in_the_tool_itself_names_the_columns_of_its_record(tmp_path):
    columns = [{"name": "play", "parameters": {**PLAY["parameters"], "after": None}},
               {"name": "stop", "parameters": {**dict.fromkeys(PLAY["parameters"]), **STOP["parameters"]}}]
    filled = rows(("play", {"song": "la", "loud": None, "room": None, "after": None}), tools=columns)
    plain = rows(*[("stop", {"after": 2})] * 8, ("play", {"song": "la", "loud": None}))
    arguments, report, examples = convert(tmp_path, [*filled, *plain])
    assert arguments[0] == {"song": "la", "room": None}  # Optional[str] allows null
    assert examples[0].tools == [PLAY, STOP] and report["nulls"] == 2
    assert arguments[-1] == {"song": "la", "loud": None}  # another record: no column, but a contradiction
    assert [reasons.keys() for _, reasons in report["contradictions"]] == [{"wrong type"}]


def test_nulls_in_nearly_all_answers_are_those_of_columns(tmp_path, capsys):
    few = rows(("play", {"song": "la"}))
    records = rows(*[("stop", {"after": 3, "song": None, "loud": None, "room": None})] * 9) + few
    arguments, report, _ = convert(tmp_path, records)
    assert arguments == [{"after": 3}] * 9 + [{"song": "la"}]
    assert report["nulls"] == 27 and report["contradictions"] == []
    assert main(["convert", "xlam", str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")]) == 0
    assert "27 null arguments taken out: the empty columns" in capsys.readouterr().out
    assert [example.answer[0]["arguments"] for example in read_jsonl(tmp_path / "out.jsonl")] == arguments


def test_nulls_in_some_answers_stay_and_are_contradictions(tmp_path):
    records = rows(("stop", {"after": None}), *[("stop", {"after": 5})] * 3)
    arguments, report, _ = convert(tmp_path, records)
    assert arguments[0] == {"after": None} and report["nulls"] == 0
    assert [id for id, _ in report["contradictions"]] == ["xlam/0"]


@pytest.mark.parametrize("schema", [
    {"type": ["integer", "null"]}, {"type": "integer", "nullable": True}, {"type": "int | None"}, {},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"enum": [1, None]}])
def test_a_null_that_the_schema_allows_stays_in_every_file(tmp_path, schema):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"limit": schema, "gone": None}}}
    arguments, report, _ = convert(tmp_path, rows(("f", {"limit": None, "gone": None}), tools=[tool]))
    assert arguments == [{"limit": None}] and report["nulls"] == 1 and report["contradictions"] == []


def test_objects_inside_arguments_are_columns_too(tmp_path):
    inner = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": ["string", "null"]}}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {
        "x": inner, "y": {"type": "array", "items": inner}, "free": {"type": "object"}, "gone": None}}}
    filled = {"a": None, "b": None}
    call = ("f", {"x": filled, "y": [filled, {"a": 1, "b": "s"}], "free": {"k": None, "l": [None, 1]}})
    arguments, _, _ = convert(tmp_path, rows(call, tools=[tool]))
    assert arguments == [{"x": {"b": None}, "y": [{"b": None}, {"a": 1, "b": "s"}], "free": {"l": [None, 1]}}]


def test_earlier_calls_lose_the_nulls_of_columns_too(tmp_path):
    call = {"function": {"name": "stop", "arguments": {"after": 1, "song": None}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "ok"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (tmp_path / "chat.json").write_text(json.dumps([{"tools": [PLAY, STOP], "messages": turns}]))
    examples, _ = read_chat(tmp_path / "chat.json")
    right = [{"name": "stop", "arguments": {"after": 1}}]
    assert [example.answer for example in examples] == [right, right]
    assert examples[1].messages[1]["content"] == format_calls(right)


def test_no_examples_and_answers_without_calls_are_no_columns():
    assert undo_nulls([]) == ([], 0)
    empty = {"tools": [STOP], "messages": [{"role": "user", "content": "q"}], "answer": []}
    assert undo_nulls([empty]) == ([empty], 0)
