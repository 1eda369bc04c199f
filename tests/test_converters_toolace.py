"""converters/toolace.py: the parser of call text, and conversations that become examples or are dropped."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_records import CLOCK, WEATHER, toolace_file

from converters import toolace
from converters.toolace import parse_calls
from data import read_toolace
from reward import format_calls

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


@settings(max_examples=100, deadline=None, derandomize=True)
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


# ---- conversations


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
    "turn, reason",
    [
        ('Of course: [Get Weather (v2)(city="Rome")]', "text around the call"),
        ('[Get Weather (v2)(city="Rome")]\nI hope that helps.', "text around the call"),
        ("One moment [ clock/now() ], and [clock/now()]", "text around the call"),
        ("Now [clock/now(", "text around the call"),
        ("[clock/now(", "call does not parse: not a list of name(parameter=value, …)"),
        ("[clock/now()] [clock/now()]", "call does not parse: a value is no literal, a key stands twice or a "
                                        "bracket is open"),
    ],
)
def test_a_call_with_text_around_it_is_dropped_and_counted(tmp_path, turn, reason):
    path = toolace_file(tmp_path, "user: q", f"assistant: {turn}", "user: so?", "assistant: [clock/now()]")
    (example,), report = read_toolace(path)
    assert report["dropped_ids"] == {reason: ["toolace/0/1"]}
    assert example.messages[1] == {"role": "assistant", "content": turn}


def test_a_record_whose_turns_are_none_is_dropped(tmp_path):
    path = toolace_file(tmp_path, "user: q")
    for turns in (None, 5, "turns", [["user", "q"]], [{"from": ["user"], "value": "q"}]):
        record = {"system": json.dumps([CLOCK]), "conversations": turns}
        path.write_text(json.dumps([record]))
        ((reason, ids),) = read_toolace(path)[1]["dropped_ids"].items()
        assert reason.startswith("a turn that is not text of a known role") and ids == ["toolace/0"]


@pytest.mark.parametrize(
    "system, reason",
    [
        ("no tools here", "no tool list in the system text"),
        ('list: [{"name": "f", "parameters": {]', "the tool list in the system text is not JSON"),
        ('list: [{"title": "f"}]', "no tool list in the system text"),
    ],
)
def test_a_record_without_readable_tools_is_dropped(tmp_path, system, reason):
    path = toolace_file(tmp_path, "user: q", "assistant: [f()]", system=system)
    assert read_toolace(path)[1]["dropped_ids"] == {reason: ["toolace/0"]}


def test_tools_are_found_regardless_of_the_text_around_them(tmp_path):
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


# ---- real data


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
    # Calls that are written by other code than the reader are equal to the turns in the file.
    for turn, calls in zip(turns, (example.answer for example in examples), strict=True):
        text = ", ".join(
            f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"
            for call in calls
        )
        assert f"[{text}]".replace("'", '"') == turn.replace("'", '"')


def test_all_system_texts_of_toolace_yield_tools(real_data):
    records = json.loads((real_data / "data" / "toolace" / "toolace_first100_sharegpt.json").read_text())
    assert all(toolace.find_tools(record["system"])[0] for record in records)
    _, report = read_toolace(real_data / "data" / "toolace" / "toolace_first100_sharegpt.json")
    assert report["dropped"] == {"a turn that is not text of a known role, but of 'function_call'": 78}
