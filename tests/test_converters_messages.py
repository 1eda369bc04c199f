"""converters/messages.py: conversations of chat APIs and their data sets, each call turn one example."""

import copy
import json
import random

import pytest
from raw_records import CLOCK, WEATHER

from data import (
    main,
    make_irrelevant,
    mask_names,
    read_chat,
    read_jsonl,
    read_toolace,
    read_xlam,
    write_jsonl,
)
from reward import format_calls

ROUTE = {"name": "route", "description": "Finds a way", "parameters": {
    "type": "object", "properties": {"to": {"type": "string"}, "walk": {"type": "boolean"}},
    "required": ["to"]}}
FARE = {"name": "fare", "parameters": {"type": "object", "properties": {"zone": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": tool} for tool in (ROUTE, FARE)]
TO_ZOO = {"name": "route", "arguments": {"to": "zoo", "walk": False}}
ZONE = {"name": "fare", "arguments": {"zone": 3}}


def convert(folder, *records, **options):
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_chat(path, **options)


def openai(call, as_text):
    arguments = json.dumps(call["arguments"]) if as_text else call["arguments"]
    return {"id": "call_1", "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def hermes(*calls, write=json.dumps):
    return "\n".join(f"<tool_call>\n{write(call)}\n</tool_call>" for call in calls)


OPENAI, HUGGING_FACE = ({"tools": TOOLS, "messages": [
    {"role": "user", "content": "To the zoo?", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [openai(TO_ZOO, as_text), openai(ZONE, as_text)]},
    {"role": "tool", "tool_call_id": "call_1", "content": "tram 6"},
    {"role": "tool", "tool_call_id": "call_2", "content": "4 euros"},
    {"role": "assistant", "content": "Tram 6, 4 euros.", "tool_calls": []},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "zone 3?"}]},
    {"role": "assistant", "content": "", "tool_calls": [openai(ZONE, as_text)]},
]} for as_text in (True, False))
SHAREGPT = {"tools": json.dumps([ROUTE, FARE]), "conversations": [
    {"from": "human", "value": "To the zoo?"},
    {"from": "function_call", "value": json.dumps([TO_ZOO, ZONE])},
    {"from": "observation", "value": "tram 6"},
    {"from": "observation", "value": "4 euros"},
    {"from": "gpt", "value": "Tram 6, 4 euros."},
    {"from": "human", "value": "And zone 3?"},
    {"from": "function_call", "value": json.dumps(ZONE)},
]}
HERMES = {"conversations": [
    {"from": "system", "value": f"You call functions. <tools> {json.dumps(TOOLS)} </tools> One JSON a call."},
    {"from": "human", "value": "To the zoo?"},
    {"from": "gpt", "value": hermes(TO_ZOO, ZONE)},
    {"from": "tool", "value": "<tool_response>\ntram 6\n</tool_response>\n"
                              "<tool_response>\n4 euros\n</tool_response>"},
    {"from": "gpt", "value": "Tram 6, 4 euros."},
    {"from": "human", "value": "And zone 3?"},
    {"from": "gpt", "value": hermes(ZONE, write=repr)},
]}


@pytest.mark.parametrize("record", [OPENAI, HUGGING_FACE, SHAREGPT, HERMES])
def test_every_form_gives_the_same_examples_one_a_call_turn(tmp_path, record):
    (first, second), report = convert(tmp_path, record)
    assert (report["raw"], report["kept"], report["dropped"]) == (1, 2, {})
    assert report["contradictions"] == [] and report["text_left_out"] == 0
    assert first.tools == second.tools == [ROUTE, FARE]
    assert (first.source, first.answer) == ("chat_single", [TO_ZOO, ZONE])
    assert first.messages == [{"role": "user", "content": "To the zoo?"}]
    assert (second.source, second.answer) == ("chat_multi", [ZONE])
    assert second.messages == [
        *first.messages,
        {"role": "assistant", "content": format_calls([TO_ZOO, ZONE])},
        {"role": "tool", "content": "tram 6"},
        {"role": "tool", "content": "4 euros"},
        {"role": "assistant", "content": "Tram 6, 4 euros."},
        {"role": "user", "content": "And zone 3?"},
    ]
    assert first.id.rpartition("/")[0] == second.id.rpartition("/")[0] == "chat/0"


def test_the_form_is_recognised_record_by_record(tmp_path):
    examples, report = convert(tmp_path, OPENAI, SHAREGPT, HERMES, HUGGING_FACE)
    assert report["kept"] == 8 and {example.answer == [ZONE] for example in examples} == {True, False}


def test_a_system_text_stays_unless_it_lists_the_tools(tmp_path):
    policy = "Be brief. Do not use route or fare for other cities."
    listing = f"SYSTEM: your functions are\n{json.dumps(ROUTE)}\n{json.dumps(FARE)}"
    for system, kept in ((policy, True), (listing, False)):
        in_turns = {**OPENAI, "messages": [{"role": "system", "content": system}, *OPENAI["messages"]]}
        for record in (in_turns, {**SHAREGPT, "system": system}):
            (first, second), _ = convert(tmp_path, record)
            systems = [{"role": "system", "content": system}] if kept else []
            assert first.messages == [*systems, {"role": "user", "content": "To the zoo?"}]
            assert (first.source, second.source) == ("chat_single", "chat_multi")


def test_tools_are_also_found_in_the_system_text(tmp_path):
    turns = HERMES["conversations"][1:]
    for system in (
        f"<tools>\n{json.dumps(TOOLS[0])}\n{json.dumps(TOOLS[1])}\n</tools>",  # Qwen's template
        f"<tools>{[ROUTE, FARE]}</tools>",
        f"You may call: {json.dumps([ROUTE, FARE])}.",
    ):
        record = {"tools": "[]", "conversations": [{"from": "system", "value": system}, *turns]}
        examples, _ = convert(tmp_path, record)
        assert [example.tools for example in examples] == [[ROUTE, FARE]] * 2


def test_call_turns_in_a_row_are_one_turn(tmp_path):
    turns = [{"from": "human", "value": "q"}, *({"from": "function_call", "value": json.dumps(call)}
                                               for call in (TO_ZOO, ZONE))]
    (example,), _ = convert(tmp_path, {"tools": TOOLS, "conversations": turns})
    assert example.answer == [TO_ZOO, ZONE]


def test_text_beside_the_calls_is_left_out_and_counted(tmp_path, capsys):
    record = {"tools": TOOLS, "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [openai(ZONE, True)]},
        {"role": "tool", "content": {"price": 4}},
        {"role": "assistant", "content": f"<think>hm</think>\n{hermes(ZONE)}"},
    ]}
    examples, report = convert(tmp_path, record)
    assert [example.answer for example in examples] == [[ZONE], [ZONE]] and report["text_left_out"] == 2
    assert examples[1].messages[1:] == [{"role": "assistant", "content": format_calls([ZONE])},
                                        {"role": "tool", "content": '{"price": 4}'}]
    assert main(["convert", "chat", str(tmp_path / "chat.jsonl"), str(tmp_path / "out.jsonl")]) == 0
    assert "2 call turns with text, which is left out" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "out.jsonl") == examples


def test_arguments_of_a_call_without_any_are_empty(tmp_path):
    for arguments in (None, "", "{}", {}):
        call = {"function": {"name": "fare", "arguments": arguments}}
        record = {"tools": TOOLS, "messages": [{"role": "user", "content": "q"},
                                               {"role": "assistant", "content": None, "tool_calls": [call]}]}
        assert convert(tmp_path, record)[0][0].answer == [{"name": "fare", "arguments": {}}]


@pytest.mark.parametrize(
    "turn, reason",
    [
        ({"from": "function_call", "value": "fare(3)"}, "call does not parse: not JSON"),
        ({"from": "function_call", "value": "[" * 9999}, "call does not parse: not JSON"),
        ({"from": "gpt", "value": "<tool_call>{}</tool_call>"}, "call does not parse: not an object"),
        ({"from": "gpt", "value": f"{hermes(ZONE)}\n<tool_call>"}, "call does not parse: <tool_call> and"),
        ({"from": "function_call", "value": '{"name": "fare", "arguments": [3]}'},
         "call does not parse: the arguments are no object"),
        ({"from": "function_call", "value": '{"name": "fare", "arguments": {"a": 1, "a": 2}}'},
         "call does not parse: an object has a key twice"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": 3}}]},
         "call does not parse: not an object"),
        ({"role": "assistant", "tool_calls": "soon"}, "call does not parse: not JSON"),
        ({"from": "function_call", "value": '{"name": "taxi", "arguments": {}}'}, "call of a tool"),
        ({"from": "function_call", "value": '{"name": "fare", "arguments": {"a": NaN}}'}, "holds what"),
    ],
)
def test_a_bad_call_turn_is_dropped_by_its_reason_and_the_rest_is_kept(tmp_path, turn, reason):
    turns = [{"from": "human", "value": "q"}, turn, {"from": "human", "value": "again"},
             {"from": "function_call", "value": json.dumps(ZONE)}]
    (example,), report = convert(tmp_path, {"tools": TOOLS, "conversations": turns, "id": "trip"})
    assert example.answer == [ZONE] and len(example.messages) == 3
    ((found, ids),) = report["dropped_ids"].items()
    assert found.startswith(reason) and ids == ["chat/trip/1"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"conversations": None}, "no list of messages"),
        ({"conversations": "To the zoo?"}, "not JSON"),
        ({"conversations": [{"from": "ghost", "value": "boo"}]}, "a turn that is not text of a known role"),
        ({"conversations": [["human", "q"]]}, "a turn that is not text of a known role"),
        ({"conversations": [{"from": "human", "value": 7}]}, "a turn that is not text of a known role"),
        ({"tools": None}, "no tools, neither"),
        ({"tools": [{"name": None}]}, "tools are not a list of objects with a name"),
    ],
)
def test_a_record_that_cannot_be_read_is_dropped_by_its_reason(tmp_path, changes, reason):
    examples, report = convert(tmp_path, {**SHAREGPT, **changes})
    assert examples == [] and [found[: len(reason)] for found in report["dropped"]] == [reason]


def test_talk_without_calls_needs_no_tools_and_is_counted(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    examples, report = convert(tmp_path, {"messages": turns, "tools": None}, OPENAI)
    assert len(examples) == 2 and (report["without_calls"], report["dropped"]) == (1, {})


def test_a_file_of_something_else_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    assert main(["convert", "chat", str(tmp_path / "x.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "x.jsonl: no example in it can be used; is it a chat file?" in error


XLAM = {"id": 1, "query": "q", "tools": [WEATHER, CLOCK],
        "answers": [{"name": "Get Weather (v2)", "arguments": {"city": "Rome", "days": None}}]}
TOOLACE = {"system": f"Tools: {json.dumps([WEATHER, CLOCK])}", "conversations": [
    {"from": "user", "value": "q"}, {"from": "assistant", "value": '[Get Weather (v2)(city="Rome")]'},
    {"from": "tool", "value": "r"}, {"from": "assistant", "value": "[clock/now()]"}]}
ODD = [None, True, 0, -1.5, "", "x", "[", '{"a": 1}', [], {}, [None], [[]], ["a"], {"name": 1}, {"a": None},
       float("nan"), "\ud800", "<tool_call>", "[clock/now()]", ZONE, "é"]


def places(value):
    """(container, key) of every value inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("read, base", [(read_xlam, XLAM), (read_toolace, TOOLACE), (read_chat, OPENAI),
                                        (read_chat, SHAREGPT), (read_chat, HERMES)])
def test_no_record_ends_in_a_traceback_whatever_stands_in_it(tmp_path, read, base):
    rng, records = random.Random(0), []
    for _ in range(150):
        records.append(json.loads(json.dumps(base)))
        for _ in range(rng.randint(1, 3)):
            inside, key = rng.choice([place for place in places(records[-1]) if place[0] is not records[-1]])
            inside[key] = copy.deepcopy(rng.choice(ODD))
    (tmp_path / "records.json").write_text(json.dumps(records))
    examples, report = read(tmp_path / "records.json")
    assert report["kept"] == len(examples) > 0 and sum(report["dropped"].values()) > 0
    for made in mask_names(make_irrelevant(examples, 0.5, 0), 1.0, 0):
        write_jsonl(tmp_path / "one.jsonl", [made])
        assert read_jsonl(tmp_path / "one.jsonl") == [made]


# ---- real data


def test_every_call_turn_of_glaive_is_kept(real_data):
    examples, report = read_chat(real_data / "data" / "glaive" / "glaive_toolcall_en_demo.json")
    assert len(examples) == 182 and (report["raw"], report["dropped"]) == (252, {})
    assert all(len(example.answer) == 1 for example in examples)
