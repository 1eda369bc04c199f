"""BFCL: every rule of the official checker, its published verdicts, the checker itself as an oracle."""

import copy
import json
import os
import random
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import calls_of

from benchmarks import bfcl
from benchmarks.bfcl_languages import LISTS, TYPES, language_of
from reward import format_reply

PUBLISHED = {"Simple AST": "76.25", "multiple": "97.00", "parallel": "93.50", "parallel_multiple": "88.00",
             "Non-Live AST": "88.69", "Live AST": "80.46", "Live, v3 leaderboard": "78.76"}
MUTATIONS = 5_000


# ---- a tool, a call, a verdict
def tool(name="f", required=(), **properties):
    """A tool; properties: {name: type, or (list type, element type)}."""
    schemas = {key: {"type": kind, "description": f"The {key}."} if isinstance(kind, str) else
               {"type": kind[0], "items": {"type": kind[1]}, "description": f"The {key}."}
               for key, kind in properties.items()}
    return {"name": name, "description": "Does it.",
            "parameters": {"type": "dict", "properties": schemas, "required": list(required)}}


def call(name="f", **arguments):
    return {"name": name, "arguments": arguments}


def verdict(kind, value, accepted, language="python"):
    """"right", or the official error type, for one argument of a declared type and its accepted values."""
    gold = [{"f": {"x": accepted}}]
    valid, reason = bfcl.check_bfcl([tool(x=kind)], [call(x=value)], gold, language, "simple")
    assert valid == (reason == "")
    return "right" if valid else reason.split(": ")[0]


def right(kind, value, accepted, language="python"):
    return verdict(kind, value, accepted, language) == "right"


# ---- one call
def test_types_are_exact():
    assert right("integer", 1, [1]) and right("boolean", True, [True]) and right("float", 1.5, [1.5])
    for kind, value, accepted in (
            ("integer", True, [1]), ("integer", 1.0, [1]), ("integer", "1", [1]), ("boolean", 1, [True]),
            ("boolean", "true", [True]), ("string", 1, ["1"]), ("float", "1.5", [1.5]), ("float", True, [1]),
            ("array", 1, [[1]]), ("dict", [], [{}]), ("integer", None, [1])):
        kind = (kind, "integer") if kind == "array" else kind
        assert verdict(kind, value, accepted) == "type_error:simple"


def test_an_integer_is_a_float_at_the_top_level_only():
    assert right("float", 2, [2.0])
    assert verdict("float", 3, [2.0]) == "value_error:others"
    assert verdict(("array", "float"), [1, 2], [[1.0, 2.0]]) == "type_error:nested"
    assert right(("array", "float"), [1, 2], [[1, 2]]), "the type of the first accepted element counts too"


def test_an_accepted_empty_string_switches_the_types_of_elements_off():
    assert right(("array", "float"), [1, 2], [[1.0, 2.0], ""])


def test_an_accepted_empty_string_is_an_empty_list_and_an_empty_string():
    assert right(("array", "string"), [], [["a"], ""]) and not right(("array", "string"), [], [["a"]])
    assert right("string", "", ["a", ""]) and right("string", " -", ["a", ""])
    assert verdict("dict", {}, ["", {"a": [1]}]) == "value_error:dict_key"
    assert verdict("dict", {}, [""]) == "dict_checker:unclear"


def test_required_overrides_an_accepted_empty_string():
    gold = [{"f": {"a": [1], "b": [2, ""]}}]
    for required, expected in ((("a",), ""), (("a", "b"), "simple_function_checker:missing_required")):
        functions = [tool(required=required, a="integer", b="integer")]
        _, reason = bfcl.check_bfcl(functions, [call(a=1)], gold, "python", "simple")
        assert reason.split(": ")[0] == expected


def test_a_gold_parameter_may_be_missing_only_with_an_accepted_empty_string():
    functions = [tool(a="integer", b="integer")]
    assert bfcl.check_bfcl(functions, [call(a=1)], [{"f": {"a": [1], "b": [2, ""]}}], "python", "simple")[0]
    _, reason = bfcl.check_bfcl(functions, [call(a=1)], [{"f": {"a": [1], "b": [2]}}], "python", "simple")
    assert reason == "simple_function_checker:missing_optional: 'b'"


def test_a_parameter_of_the_tool_that_the_answer_does_not_list_is_an_error():
    functions = [tool(a="integer", b="integer")]
    gold = [{"f": {"a": [1], "c": [2]}}]
    for arguments in ({"a": 1, "b": 2}, {"a": 1, "c": 2}):
        _, reason = bfcl.check_bfcl(functions, [call(**arguments)], gold, "python", "simple")
        assert reason.startswith("simple_function_checker:unexpected_param")


def test_function_names_keep_dots_and_case():
    functions, gold = [tool("math.f", x="integer")], [{"math.f": {"x": [1]}}]
    assert bfcl.check_bfcl(functions, [call("math.f", x=1)], gold, "python", "simple")[0]
    for name in ("math_f", "Math.f", "f", "", None, 5):
        _, reason = bfcl.check_bfcl(functions, [call(name, x=1)], gold, "python", "simple")
        assert reason.startswith("simple_function_checker:wrong_func_name")


def test_strings_are_compared_without_blanks_case_and_some_marks():
    for value in ("New York", "new york", "NEW-YORK", "n.e,w/y_o*r^k", "NewYork"):
        assert right("string", value, ["Boston", "New York"])
    for value in ("New York!", "New\nYork", "New Yorks", "(New York)"):
        assert verdict("string", value, ["New York"]) == "value_error:string"
    assert right("string", "it's", ['it"s'])


def test_a_value_of_the_first_accepted_type_must_be_equal_case_and_all():
    assert right("integer", "userId", ["userId"])
    assert verdict("integer", "userid", ["userId"]) == "value_error:others"
    assert verdict("integer", "userId", [1, "userId"]) == "type_error:simple", "the second does not count"
    assert right("string", 3, [3]) and right("any", 3, [3])
    assert verdict("any", "3", [3]) == "value_error:others"
    assert right("integer", None, ["", None]), "null where the answer says so"
    assert right("string", True, [True, 1]) and right("string", True, [False, 1]), "Python's 1 == True"


def test_elements_of_lists_are_normalised_at_the_top_level_and_their_order_counts():
    assert right(("array", "string"), ["a B", "c"], [["ab", "C"]])
    assert verdict(("array", "string"), ["c", "ab"], [["ab", "c"]]) == "value_error:list/tuple"
    assert verdict(("array", "string"), ["ab"], [["ab", "c"]]) == "value_error:list/tuple"
    assert verdict(("array", "array"), [["a B"]], [[["ab"]]]) == "value_error:list/tuple", "not deeper"
    assert right(("tuple", "float"), [1.0, 2.0], [[1.0, 2.0]])


def test_a_text_that_is_accepted_for_a_list_is_the_list_of_its_characters():
    assert right(("array", "string"), ["a", "b"], [["x"], "ab"])


def test_objects_list_accepted_values_under_each_key():
    accepted = [{"city": ["New York", "NYC"], "days": [3, ""], "deep": [{"a": "b c"}, ""]}]
    assert right("dict", {"city": "nyc", "days": 3}, accepted)
    assert right("dict", {"city": "new york"}, accepted)
    assert right("dict", {"city": "NYC", "deep": {"a": "b c"}}, accepted)
    deep = {"city": "NYC", "deep": {"a": "bc"}}
    assert verdict("dict", deep, accepted) == "value_error:dict_value", "not deeper"
    assert verdict("dict", {"city": "Rome"}, accepted) == "value_error:dict_value"
    assert verdict("dict", {"days": 3}, accepted) == "value_error:dict_key"
    assert verdict("dict", {"city": "NYC", "more": 1}, accepted) == "value_error:dict_key"
    assert right("dict", {"days": True}, [{"days": [1]}]), "types in objects are not checked"
    assert right("dict", {"b": 1}, ["", {"a": [1]}, {"b": [1]}]), "any alternative"


def test_lists_of_objects_go_position_by_position():
    accepted = [[{"a": [1]}, {"a": [2]}], [{"a": ["x y"]}]]
    assert right(("array", "dict"), [{"a": 1}, {"a": 2}], accepted)
    assert right(("array", "dict"), [{"a": "XY"}], accepted)
    assert verdict(("array", "dict"), [{"a": 2}, {"a": 1}], accepted) == "value_error:list_dict_count"
    assert verdict(("array", "dict"), [{"a": 2}, {"a": 1}], accepted[:1]) == "value_error:dict_value"
    assert right(("array", "dict"), [], ["", [{"a": [1]}]])
    assert not right(("array", "dict"), ["a"], ["", [{"a": [1]}]]), "where the official checker crashes"


# ---- several calls
def several(calls, gold, category, functions=None):
    functions = functions or [tool("f", x="integer"), tool("g", x="integer")]
    return bfcl.check_bfcl(functions, calls, gold, "python", category)


def test_the_number_of_calls_must_be_equal():
    gold = [{"f": {"x": [1]}}, {"g": {"x": [2]}}]
    f, g = call("f", x=1), call("g", x=2)
    for calls in ([], [f], [f, g, g]):
        reason = several(calls, gold, "parallel_multiple")[1]
        assert reason.startswith("parallel_function_checker_no_order:wrong_count")
    assert several([f, f], gold[:1], "simple")[1].startswith("simple_function_checker:wrong_count")
    assert several([f, f], gold[:1], "live_multiple")[1].startswith("multiple_function_checker:wrong_count")


def test_multiple_looks_the_tool_up_by_the_name_of_the_answer():
    gold = [{"g": {"x": [2]}}]
    assert several([call("g", x=2)], gold, "multiple") == (True, "")
    twice = [tool("f"), tool("g", x="integer"), tool("g", y="integer")]
    assert several([call("g", x=2)], gold, "multiple", twice) == (True, ""), "the first tool of that name"
    reason = several([call("f", x=2)], gold, "multiple")[1]
    assert reason.startswith("simple_function_checker:wrong_func_name")


def test_parallel_calls_match_in_any_order_but_greedily():
    gold = [{"f": {"x": [1]}}, {"g": {"x": [2]}}]
    assert several([call("g", x=2), call("f", x=1)], gold, "live_parallel_multiple")[0]
    assert not several([call("f", x=1), call("f", x=1)], gold, "parallel")[0]
    # The first gold call takes the 1 that the second would need, and does not give it back.
    gold = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    assert several([call("f", x=2), call("f", x=1)], gold, "parallel")[0]
    assert not several([call("f", x=1), call("f", x=2)], gold, "parallel")[0]


# ---- no calls
def test_what_cannot_be_decoded_is_right_for_irrelevance_and_wrong_elsewhere():
    for calls in (None, 5, "text", {"name": "f", "arguments": {}}, [5], [{}], [{"name": "f"}], [[]],
                  [{"name": ["f"], "arguments": {}}], [call(x=1), 5]):
        for category, expected in (("irrelevance", ""), ("live_irrelevance", ""),
                                   ("live_relevance", "relevance_error:decoder_failed"),
                                   ("simple", "ast_decoder:decoder_failed"),
                                   ("parallel", "ast_decoder:decoder_failed")):
            valid, reason = several(calls, [{"f": {"x": [1]}}], category)
            assert (valid, reason.split(": ")[0]) == (not expected, expected)


def test_no_call_is_right_for_irrelevance_and_any_call_for_relevance():
    for calls, is_call in (([], False), ([{"name": "f", "arguments": 5}], False), ([call("nonsense")], True)):
        assert several(calls, None, "irrelevance")[0] == (not is_call)
        assert several(calls, None, "live_irrelevance")[0] == (not is_call)
        assert several(calls, None, "live_relevance")[0] == is_call
    wrong = several([{"name": "f", "arguments": 5}], [{"f": {"x": [1]}}], "simple")[1]
    assert wrong.startswith("ast_decoder:decoder_wrong_output_format")


# ---- Java and JavaScript
def test_java_and_javascript_values_must_be_strings():
    assert verdict("integer", 5, [5], "java") == "type_error:java"
    assert verdict("integer", 5, [5], "javascript") == "type_error:js"
    assert right("integer", "5", [5], "java") and right("integer", "5", [5], "javascript")
    assert verdict("long", "5", [5], "java") == "type_error:simple" and right("long", "5L", [5], "java")
    assert right(("Array", "String"), "new String[]{a}", [["a"]], "java")
    assert not right(("Array", "String"), 'new String[]{"a"}', [["a"]], "java")


# ---- prompts and replies
def test_hints_go_into_the_prompt_and_not_into_the_tools_that_are_scored():
    schema = {"type": "dict", "description": "Options.", "properties": {"a": {"type": "integer"}}}
    functions = [tool("f", x="integer", y="any", z=("ArrayList", "String")), tool("g")]
    functions[1]["parameters"]["properties"]["o"] = schema
    before = copy.deepcopy(functions)
    java, python, javascript = (
        bfcl.prompt(bfcl.Entry("a", category, functions, [], []))[0]
        for category in ("simple_java", "live_simple", "javascript"))
    assert functions == before
    assert java[0]["description"] == "Does it. Note that the provided function is in Java 8 SDK syntax."
    assert java[0]["parameters"]["properties"] == {
        "x": {"type": "string", "description":
              "The x. This is Java integer type parameter in string representation."},
        "y": {"type": "string", "description":
              "The y. This parameter can be of any type of Java object in string representation."},
        "z": {"type": "string", "description":
              "The z. This is Java ArrayList type parameter in string representation. The list elements are "
              "of type String; they are not in string representation."}}
    assert javascript[1]["parameters"]["properties"]["o"] == {
        "type": "string", "description":
        "Options. This is JavaScript dict type parameter in string representation. The dictionary entries "
        'have the following schema; they are not in string representation. {"a": {"type": "integer"}}'}
    assert python[0]["description"] == "Does it. Note that the provided function is in Python 3 syntax."
    assert python[0]["parameters"] == functions[0]["parameters"]


def test_the_entrys_own_system_message_is_dropped_for_the_papers_prompt_only():
    messages = [{"role": role, "content": "Hi."} for role in ("system", "user", "assistant", "user")]
    entry = bfcl.Entry("a", "live_simple", [], messages, [])
    assert bfcl.prompt(entry)[1] == messages
    assert bfcl.prompt(entry, paper_prompt=True)[1] == messages[1:]


def test_a_reply_is_decoded_from_its_first_call_block():
    calls = [call("math.f", x=[1, {"y": None}]), call(z="</think>")]
    assert bfcl.decode(format_reply(calls, "Hm.")) == calls
    assert bfcl.decode("no thought <tool_call> [] </tool_call> more <tool_call>x</tool_call>") == []
    assert bfcl.decode(f"<tool_call>\n{json.dumps(calls)}\n</tool_call></tool_call>") == calls
    extra = [{"name": "f", "arguments": {}, "id": 7}]
    assert bfcl.decode(f"<tool_call>{json.dumps(extra)}</tool_call>") == extra


def test_a_reply_without_readable_calls_is_decoded_to_none():
    for payload in ("", "x", "5", "{}", json.dumps(call(x=1)), '[{"name": "f"}]', '[{"arguments": {}}]',
                    "[5]", '"[]"', "[" * 100_000, "[" * 2000 + "]" * 2000, f"[{'9' * 5000}]", "[] []", "[{"):
        assert bfcl.decode(f"<think></think><tool_call>{payload}</tool_call>") is None
    for reply in ("", "<tool_call>[]", "</tool_call>[]<tool_call>", "[]"):
        assert bfcl.decode(reply) is None


def test_verdicts_never_raise_for_any_json_value():
    deep = 1
    for _ in range(100_000):
        deep = [deep]
    deep_dict = {}
    for _ in range(100_000):
        deep_dict = {"a": deep_dict}
    odd = [None, True, 0, -1, 10**400, 10**5000, 1.5, float("nan"), float("inf"), "", "\ud800", "x" * 10**6,
           [], {}, [[]], [{}], [None], {"": None}, deep, deep_dict, [deep], ["", deep_dict], {"a": deep},
           [10**5000]]
    kinds = {"python": [*TYPES["python"], ("array", "dict"), ("array", "float"), ("tuple", "array")],
             "java": [*TYPES["java"], ("Array", "String")],
             "javascript": [*TYPES["javascript"], ("array", "float")]}
    accepted = ([1], ["a", ""], [1.0], [[1.0]], ["", [{"a": [1]}]], [{"a": ["x", ""]}], [None], [[["a"]]], [])
    for language, some in kinds.items():
        for kind in some:
            if kind in LISTS[language]:
                kind = (kind, "string" if language == "python" else "String")
            for value in odd:
                for values in accepted:
                    valid, reason = bfcl.check_bfcl(
                        [tool(x=kind)], [call(x=value)], [{"f": {"x": values}}], language, "simple")
                    assert valid == (not reason) and isinstance(reason.encode(), bytes)
    for category in ("simple", "multiple", "parallel", "irrelevance", "live_relevance"):
        for value in odd:
            for calls in (value, [value], [value, call(x=1)], [{"name": value, "arguments": {}}],
                          [{"name": "f", "arguments": value}],
                          [call(x=1), {"name": "f", "arguments": value}]):
                several(calls, [{"f": {"x": [1]}}], category)
    while deep != 1:
        deep = deep[0]
    while deep_dict:
        deep_dict = deep_dict["a"]


# ---- the table
def results(version, missing=()):
    """Nothing is right but the first of every category; `missing` categories have no result at all."""
    return {category: {i: (i == 0, "" if i == 0 else "wrong") for i in range(n)}
            for category, n in bfcl.COUNTS[version].items() if category not in missing}


def test_averages_are_those_of_the_leaderboard_and_of_the_paper():
    rows = {row["label"]: row for row in bfcl.summarize(results("v3"))}
    simple = (1 / 400 + 1 / 100 + 1 / 50) / 3
    non_live = (simple + 3 / 200) / 4
    expected = {"simple": 1 / 400, "Simple AST": simple, "Non-Live AST": non_live, "Live AST": 4 / 1351,
                "Live, v3 leaderboard": 6 / 2251, "Irrelevance": (1 / 240 + 1 / 882) / 2, "Relevance": 1 / 18,
                "Overall": (non_live + 4 / 1351) / 2, "Overall, v3 leaderboard": (non_live + 6 / 2251) / 2}
    assert {label: rows[label]["accuracy"] for label in expected} == pytest.approx(expected, rel=1e-12)
    assert rows["Live, v3 leaderboard"]["expected"] == 2251 and rows["Live AST"]["right"] == 4
    rows = {row["label"]: row for row in bfcl.summarize(results("v4"))}
    assert rows["simple_java"]["expected"] == 100 and rows["Simple AST"]["accuracy"] == pytest.approx(simple)
    assert rows["Live, v3 leaderboard"]["expected"] == 1351 + 884 + 16


def test_what_has_no_result_counts_as_wrong_and_shows():
    part = results("v3", missing=("java",))
    for i in range(1, 400):
        del part["simple"][i]
    rows = {row["label"]: row for row in bfcl.summarize(part)}
    assert rows["java"] == {"label": "java", "n": 0, "expected": 100, "right": 0, "accuracy": 0}
    assert rows["simple"] == {"label": "simple", "n": 1, "expected": 400, "right": 1, "accuracy": 1 / 400}
    assert rows["Simple AST"]["n"] == 51 and rows["Simple AST"]["expected"] == 550
    assert rows["Simple AST"]["accuracy"] == pytest.approx((1 / 400 + 1 / 50) / 3)


def test_rows_of_chosen_categories_are_complete_or_have_no_accuracy():
    chosen = ["live_irrelevance", "live_relevance", "irrelevance", "simple_java"]
    empty = {category: {} for category in bfcl.V4}
    rows = {row["label"]: row for row in bfcl.summarize(
        empty | {name: found for name, found in results("v4").items() if name in chosen}, chosen)}
    assert rows["live_irrelevance"]["expected"] == 884 and rows["Relevance"]["accuracy"] == 1 / 16
    assert rows["Irrelevance"]["accuracy"] == pytest.approx((1 / 240 + 1 / 884) / 2)
    assert rows["Simple AST"]["accuracy"] is None
    assert rows["Simple AST"]["missing"] == ["simple_python", "simple_javascript"]
    assert "Live AST" not in rows and "multiple" not in rows
    everything = bfcl.summarize(results("v3"), [*bfcl.V3])
    assert everything == bfcl.summarize(results("v3")) and all("missing" not in row for row in everything)


def test_results_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="exec_simple: 1 verdicts, expected no such category"):
        bfcl.summarize({"exec_simple": {"a": (True, "")}})
    with pytest.raises(ValueError, match="java: 101 verdicts, expected 100"):
        bfcl.summarize({"java": {i: (True, "") for i in range(101)}})


def test_the_papers_rows_follow_from_its_cells():
    for model, row in bfcl.PAPER.items():
        assert len(row) == 11
        assert sum(row[:4]) / 4 == pytest.approx(row[8], abs=0.011)
        live = [round(share * n / 100) for share, n in zip(row[4:8], (258, 1053, 16, 24), strict=True)]
        is_ast = abs(100 * sum(live) / 1351 - row[9]) < 0.01
        assert is_ast == (model in bfcl.PAPER_LIVE_IS_AST_ONLY)


# ---- files
def write_data(folder, version="v3"):
    (folder / "possible_answer").mkdir(parents=True)
    for category, n in bfcl.COUNTS[version].items():
        name = f"BFCL_{version}_{category}.json"
        questions = [{"id": f"{category}_{i}", "question": [[{"role": "user", "content": "?"}]],
                      "function": [tool(x="integer")]} for i in range(n)]
        write_lines(folder / name, questions)
        if "relevance" not in category:
            answers = [{"id": "other", "ground_truth": [{"f": {"x": [i]}}]} for i in range(n)]
            write_lines(folder / "possible_answer" / name, answers)
    return folder


def write_lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_questions_and_answers_are_paired_by_line(tmp_path, version):
    entries = bfcl.load(write_data(tmp_path / "data", version))
    assert len(entries) == 3641
    assert entries[7].answer == [{"f": {"x": [7]}}] and entries[7].category == entries[7].id[:-2]
    assert [entry.answer for entry in entries if "relevance" in entry.category] == [None] * 1140


def test_data_that_is_not_whole_is_refused_in_one_line(tmp_path):
    folder = write_data(tmp_path / "data")
    java, answers = folder / "BFCL_v3_java.json", folder / "possible_answer" / "BFCL_v3_java.json"
    good = {path: path.read_text() for path in (java, answers)}
    lines = good[java].splitlines()
    for path, text, message in (
            (java, None, "BFCL_v3_java.json: cannot be read"),
            (answers, None, "possible_answer.*cannot be read"),
            (java, good[java][:-20], "BFCL_v3_java.json:100: not JSON"),
            (java, lines[0], "1 entries, expected 100"),
            (answers, good[answers] + '{"id": 1, "ground_truth": []}', "101 entries, expected 100"),
            (java, good[java].replace("java_41", "java_40"), "java.json:42: the id 'java_40' stands twice"),
            (java, "[" * 100_000 + "\n" + good[java], "BFCL_v3_java.json:1: not JSON"),
            (java, b"\xff" + good[java].encode(), "BFCL_v3_java.json: cannot be read .not UTF-8 text.; BFCL"),
            (java, good[java].replace('"function"', '"tools"', 1), "java.json:1: not an object with id"),
            (java, "[]\n" + good[java], "java.json:1: not an object with id, question, function")):
        path.unlink()
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message) as error:
            bfcl.load(folder)
        assert "\n" not in str(error.value)
        path.write_text(good[path])
    assert len(bfcl.load(folder)) == 3641


def test_a_folder_without_data_or_with_both_versions_is_refused(tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match="no BFCL files"):
            bfcl.load(folder)
    write_data(tmp_path / "data", "v3")
    (tmp_path / "data" / "BFCL_v4_multiple.json").write_text("")
    with pytest.raises(ValueError, match="v3 and v4 BFCL files"):
        bfcl.load(tmp_path / "data")


# ---- real data
def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def final(real_data):
    return {entry.id: entry for entry in bfcl.load(real_data / "data/bfcl/v3_final")}


@pytest.fixture(scope="module")
def recorded(real_data):
    outputs = read_lines(real_data / "data/bfcl_results/Qwen3-8B-FC/decoded.jsonl")
    return {line["id"]: line["calls"] for line in outputs}


def test_all_published_verdicts_and_averages_are_reproduced(real_data, final, recorded):
    verdicts = defaultdict(dict)
    for entry in final.values():
        verdicts[entry.category][entry.id] = bfcl.check(entry, recorded[entry.id])
    rows = {row["label"]: row for row in bfcl.summarize(verdicts)}

    labels = read_lines(real_data / "data/bfcl_results/Qwen3-8B-FC/labels.jsonl")
    assert len(labels) == 3641
    for label in labels:
        valid, reason = verdicts[label["category"]][label["id"]]
        assert (valid, reason.split(": ")[0] or None) == (label["valid"], label["error_type"])
    assert {label: f"{100 * rows[label]['accuracy']:.2f}" for label in PUBLISHED} == PUBLISHED
    official = json.loads((real_data / "data/bfcl_results/Qwen3-8B-FC/official_scores.json").read_text())
    for category, score in official["categories"].items():
        assert rows[category]["right"] == score["correct_count"]
        assert rows[category]["expected"] == score["total_count"]


def test_the_work_of_loading_and_scoring_grows_with_the_entries_and_not_with_their_square(
        real_data, final, recorded):
    loading = calls_of(lambda: bfcl.load(real_data / "data/bfcl/v3_final"))
    scoring = calls_of(lambda: [bfcl.check(entry, recorded[id]) for id, entry in final.items()])
    assert len(final) > 3000 and loading < 200 * len(final) and scoring < 400 * len(final), (loading, scoring)


def test_all_labelled_mutations_are_judged_as_labelled(real_data, final):
    mutations = read_lines(real_data / "data/bfcl_results/mutations_dev.jsonl")
    assert len(mutations) == 645
    for mutation in mutations:
        valid, reason = bfcl.check(final[mutation["id"]], mutation["calls"])
        assert (valid, reason.split(": ")[0] or None) == (mutation["valid"], mutation["error_type"])


def test_every_version_of_the_data_loads_and_the_duplicate_id_of_april_is_renamed(real_data, final):
    april = {entry.id: entry for entry in bfcl.load(real_data / "data/bfcl/v3_2025-04-13")}
    newest = bfcl.load(real_data / "data/bfcl/v4_2026-03-23")
    assert len(april) == len(final) == len({entry.id for entry in newest}) == 3641
    assert april["live_relevance_17-17-0"].messages == final["live_relevance_17-17-0"].messages
    assert april.keys() ^ final.keys() == {"live_multiple_1052-79-0", "live_multiple_1052-279-0"}
    assert sum(message["role"] == "system" for entry in newest for message in entry.messages) == 92


# ---- the official checker as an oracle
@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """official(entry, calls) -> (valid, error type), None where it crashes."""
    pytest.importorskip("bfcl_eval", reason="needs the official checker: pip install --no-deps bfcl-eval")
    pytest.importorskip("filelock", reason="bfcl-eval needs filelock")
    # Its table of models imports the client of every vendor; only this setting of ours is needed.
    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = {"x": types.SimpleNamespace(underscore_to_dot=False)}
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, table.__name__, table)
    # Else it makes folders where it is installed.
    patch.setenv("BFCL_PROJECT_ROOT", str(tmp_path_factory.mktemp("bfcl")))
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    from bfcl_eval.utils import is_empty_output, is_function_calling_format_output

    def judge(entry, calls):
        try:
            decoded = [{call["name"]: call["arguments"]} for call in calls]
        except (TypeError, KeyError):
            decoded = None
        if "relevance" in entry.category:
            called = decoded is not None and not is_empty_output(decoded)
            if "irrelevance" in entry.category:
                return not called, "irrelevance_error:decoder_success" if called else None
            return called, None if called else "relevance_error:decoder_failed"
        if decoded is None:
            return False, "ast_decoder:decoder_failed"
        if not is_function_calling_format_output(decoded):
            return False, "ast_decoder:decoder_wrong_output_format"
        language = Language(language_of(entry.category))
        try:
            verdict = ast_checker(entry.functions, decoded, entry.answer, language, entry.category, "x")
        except (AttributeError, OverflowError, TypeError, KeyError, IndexError):
            return None
        return verdict["valid"], None if verdict["valid"] else verdict["error_type"]

    yield judge
    patch.undo()


@pytest.fixture(scope="module")
def packaged(official):
    """The entries of the data in the official package."""
    import bfcl_eval

    return bfcl.load(Path(bfcl_eval.__file__).parent / "data")


def literal(value, rng, language):
    """A value of the answer as a model would write it in Java or JavaScript, one of the ways."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value}{rng.choice(['', '', 'L', 'f', 'n'])}"
    if isinstance(value, list):
        parts = ", ".join(item if isinstance(item, str) and rng.random() < 0.5 else json.dumps(item)
                          for item in value)
        adds = "".join(f"add({json.dumps(item)}); " for item in value)
        return rng.choice({"java": [f"new String[]{{{parts}}}", f"new ArrayList<>(Arrays.asList({parts}))",
                                    f"new ArrayList<Integer>() {{{{ {adds}}}}}", f"new int[] {{ {parts} }}"],
                           "javascript": [f"[{parts}]", f"new Array({parts})", f" [ {parts}]",
                                          f"[[{parts}], [1]]", f"[[{parts}],[2],[3]"]}[language])
    if isinstance(value, dict):
        puts = "".join(f'put("{key}", {json.dumps(item)}); ' for key, item in value.items())
        pairs = ", ".join(f"{key}: {json.dumps(item)}" for key, item in value.items())
        return rng.choice({"java": [f"new HashMap<String, Object>() {{{{ {puts}}}}}",
                                    f"new HashMap<>(){{{puts}}}"],
                           "javascript": [f"{{{pairs}}}", f"{{ {pairs} }}", json.dumps(value)]}[language])
    return rng.choice([value, value, f'"{value}"', f"'{value}'"]) if isinstance(value, str) else value


def gold_value(accepted, rng):
    """One of the accepted values, objects filled in; "" where it is to be left out."""
    value = rng.choice(accepted) if accepted else ""
    fill = lambda part: ({key: chosen for key, choices in part.items()  # noqa: E731
                          if (chosen := rng.choice(choices)) != ""} if isinstance(part, dict) else part)
    return [fill(item) for item in value] if isinstance(value, list) else fill(value)


def gold_calls(entry, rng):
    calls = []
    for gold in entry.answer or rng.choice([[], [{"f": {"x": [1]}}]]):
        (name, parameters), = gold.items()
        arguments = {key: gold_value(accepted, rng) for key, accepted in parameters.items()}
        language = language_of(entry.category)
        if language != "python":
            arguments = {key: literal(value, rng, language) for key, value in arguments.items()}
        arguments = {key: value for key, value in arguments.items() if value != ""}
        calls.append({"name": name, "arguments": arguments})
    return calls


ODD = [None, True, False, 0, 1, -3, 2.0, 0.5, "", "a", "1", "true", [], {}, [1], ["a"], [[1]], [{}], {"a": 1},
       10**400, [None], "new HashMap<>()", "[1, 2]", "{a: 1}", "new int[]{1}", [""], {"": ""}, "x" * 300]


def changed(value, rng):
    """A value like `value`, or an odd one."""
    if rng.random() < 0.15:
        return copy.deepcopy(rng.choice(ODD))
    if isinstance(value, bool):
        return rng.choice([not value, int(value), str(value)])
    if isinstance(value, int):
        as_float = float(value) if abs(value) < 10**9 else 2
        return rng.choice([value + 1, str(value), -value, value == 1, as_float])
    if isinstance(value, float):
        return rng.choice([value + 1, str(value), value * 2, int(value) if abs(value) < 10**9 else 2])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        longer = value[:at] + rng.choice(" ,./-_*^!'\"\n(){}[]:L1") + value[at:]
        return rng.choice([value.upper(), value.lower(), longer, value[:at], value[at:], [value],
                           value.replace(" ", ""), value.replace("'", '"'), value.replace('"', ""),
                           value.replace("{", "{ "), value + value, f" {value} "])
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return rng.choice([value[::-1], value[:at], value + [value[at]], [value], value[at], tuple(value),
                           value[:at] + [changed(value[at], rng)] + value[at + 1:],
                           value[:at] + [changed(value[at], rng)] + value[at + 1:]])
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        rest = {other: item for other, item in value.items() if other != key}
        return rng.choice([rest, {**value, key: changed(value[key], rng)}, {**value, "extra": 1}, [value],
                           {**rest, key.upper(): value[key]}, {**value, key: changed(value[key], rng)}])
    return copy.deepcopy(rng.choice(ODD))


def mutated(calls, entry, rng):
    """Calls with up to three random changes."""
    calls = copy.deepcopy(calls)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        if not isinstance(calls, list) or not calls or not isinstance(calls[-1], dict):
            return calls
        one = rng.choice(calls)
        if not isinstance(one, dict) or not isinstance(one.get("arguments"), dict):
            return calls
        arguments, kind = one["arguments"], rng.random()
        if kind < 0.62 and arguments:
            key = rng.choice(list(arguments))
            arguments[key] = changed(arguments[key], rng)
        elif kind < 0.7 and arguments:
            del arguments[rng.choice(list(arguments))]
        elif kind < 0.78:
            known = [key for function in entry.functions for key in function["parameters"]["properties"]]
            arguments[rng.choice([*known, "unknown"])] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.83:
            names = [function["name"] for function in entry.functions]
            name = str(one.get("name"))
            one["name"] = rng.choice([*names, name.replace(".", "_"), name.upper(), None, 5])
        elif kind < 0.88:
            rng.shuffle(calls)
        elif kind < 0.92:
            calls.append(copy.deepcopy(rng.choice(calls)))
        elif kind < 0.95:
            calls.remove(one)
        elif kind < 0.97:
            one["arguments"] = rng.choice([None, [], "x", [arguments]])
        elif kind < 0.98:
            one.pop(rng.choice(["name", "arguments"]), None)
        else:
            return rng.choice([None, [], [{}], [None], [calls], calls[:1] + [5], [call()]])
    return json.loads(json.dumps(calls))


def agree(official, entries, base, n, seed):
    """Compare n mutations of base(entry, rng); returns how many were right."""
    rng, count_right, crashes = random.Random(seed), 0, 0
    for _ in range(n):
        entry = rng.choice(entries)
        calls = mutated(base(entry, rng), entry, rng)
        theirs = official(entry, copy.deepcopy(calls))
        valid, reason = bfcl.check(entry, calls)
        ours = (valid, reason.split(": ")[0] or None)
        crashes += theirs is None
        assert not valid if theirs is None else ours == theirs, (entry.id, calls, entry.answer, ours, theirs)
        count_right += valid
    assert crashes < 0.02 * n
    return count_right


def balanced(entries):
    """A list in which each category is as often."""
    by_category = defaultdict(list)
    for entry in entries:
        by_category[entry.category].append(entry)
    return [entry for some in by_category.values() for entry in (some * (1000 // len(some) + 1))[:1000]]


def test_the_official_checker_agrees_on_mutations_of_gold_answers(official, packaged):
    count_right = agree(official, balanced(packaged), gold_calls, MUTATIONS, seed=1)
    assert 0.2 * MUTATIONS < count_right < 0.8 * MUTATIONS, "both verdicts are tried"


def test_the_official_checker_agrees_on_mutations_of_recorded_outputs(official, final, recorded):
    entries = balanced(final.values())
    count_right = agree(official, entries, lambda entry, rng: recorded[entry.id], MUTATIONS, seed=2)
    assert 0.2 * MUTATIONS < count_right < 0.8 * MUTATIONS, "both verdicts are tried"


def test_the_tools_in_prompts_are_the_official_ones(official, packaged):
    from bfcl_eval.utils import load_dataset_entry

    for category, entries in by_category(packaged).items():
        theirs = load_dataset_entry(category)
        assert [json.dumps(bfcl.prompt(entry)[0]) for entry in entries] == [
            json.dumps(entry["function"]) for entry in theirs]


def by_category(entries):
    grouped = defaultdict(list)
    for entry in entries:
        grouped[entry.category].append(entry)
    return grouped


# Runs the official command line. Packages that it imports and that are not installed become stand-ins.
OFFICIAL_MAIN = """
import importlib.abc, importlib.machinery, importlib.util, sys, types
class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})
    def __call__(cls, *args, **kwargs):
        if cls.__bases__ != (object,):
            return super().__call__(*args, **kwargs)
        return args[0] if args and isinstance(args[0], types.FunctionType) else cls
class StandIn(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith("bfcl_eval"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return StandIn(spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.append(Finder())
# If pandas is installed, it would import stand-ins for its optional packages, so it is replaced too.
sys.modules["pandas"] = StandIn("pandas")
from bfcl_eval.eval_checker.eval_runner import main
main([sys.argv[1]], ["single_turn"], sys.argv[2], sys.argv[3])
"""


def test_exported_files_are_scored_by_the_official_command_line_as_by_us(official, packaged, tmp_path):
    rng = random.Random(3)
    outputs = {category: {entry.id: mutated(gold_calls(entry, rng), entry, rng) for entry in entries}
               for category, entries in by_category(packaged).items()}
    verdicts = defaultdict(dict)
    for entry in packaged:
        if official(entry, outputs[entry.category][entry.id]) is None:
            outputs[entry.category][entry.id] = None  # where it crashes, its command line stops
        verdicts[entry.category][entry.id] = bfcl.check(entry, outputs[entry.category][entry.id])
    rows = {row["label"]: row for row in bfcl.summarize(verdicts)}

    paths = bfcl.export_official(outputs, tmp_path / "result")
    assert len(paths) == 13
    folders = [str(tmp_path / "result"), str(tmp_path / "score")]
    done = subprocess.run(
        [sys.executable, "-c", OFFICIAL_MAIN, bfcl.OFFICIAL_MODEL, *folders],
        env={**os.environ, "BFCL_PROJECT_ROOT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    scores = {path.stem: read_lines(path) for path in (tmp_path / "score").rglob("BFCL_v4_*_score.json")}
    assert len(scores) == 13
    for category, of_entries in verdicts.items():
        header, *wrong = scores[f"BFCL_v4_{category}_score"]
        assert header["correct_count"] == rows[category]["right"]
        assert header["total_count"] == rows[category]["expected"]
        assert {line["id"] for line in wrong} == {id for id, (valid, _) in of_entries.items() if not valid}


def test_result_files_have_the_official_names_and_fields(tmp_path):
    calls = [call("a.b", x="ü\n"), call("c")]
    outputs = {"java": {"java_0": calls, "java_1": None}, "live_simple": {"live_simple_0-0-0": 5}}
    paths = bfcl.export_official(outputs, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "Qwen_Qwen3-8B-FC/BFCL_v3_java_result.json", "Qwen_Qwen3-8B-FC/BFCL_v3_live_simple_result.json"]
    first, second = read_lines(paths[0])
    assert first["id"] == "java_0" and second == {"id": "java_1", "result": ""}
    assert [json.loads(line) for line in first["result"].split("\n") if "tool_call" not in line] == calls
    assert [line for line in first["result"].split("\n") if "tool_call" in line] == [
        "<tool_call>", "</tool_call>"] * 2
    paths = bfcl.export_official({"simple_java": {}, "live_simple": {}}, tmp_path)
    assert [path.parent.name for path in paths] == ["non_live", "live"]
    with pytest.raises(ValueError, match="exec_simple: no such category in BFCL v3"):
        bfcl.export_official({"exec_simple": {}}, tmp_path)
