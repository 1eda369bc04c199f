"""ACEBench: the official rule with its quirks, the strict metric, the files, the table."""

import copy
import json
import random

import pytest
from conftest import calls_of

from benchmarks import acebench
from benchmarks.acebench import check_acebench, check_acebench_strict
from reward import format_reply

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "limit": {"type": "number"},
    "share": {"type": "float"},
    "hourly": {"type": "boolean"},
    "units": {"type": "array", "items": {"type": "string"}},
    "stops": {"type": "array", "items": {"type": "object"}},
    "window": {"type": "object", "properties": {}},
}
TOOLS = [{"name": "ping", "description": "", "parameters": {}},
         {"name": "other", "description": "", "arguments": {"type": "object", "properties": {}}},
         {"name": "forecast", "description": "",
          "parameters": {"type": "object", "properties": PROPERTIES, "required": ["city"]}}]


def call(name="forecast", **arguments):
    return {"name": name, "arguments": arguments}


def passes(calls, gold):
    """The official verdict on a list of calls, or on the arguments of one call beside a city."""
    if isinstance(calls, dict):
        calls, gold = [call(city="Rome", **calls)], {"forecast": {"city": "Rome", **gold}}
    return check_acebench(TOOLS, calls, gold)[0]


def reason(calls, gold):
    return check_acebench(TOOLS, calls, gold)[1].partition(":")[0]


def strict(calls, gold):
    if isinstance(calls, dict):
        calls, gold = [call(**calls)], {"forecast": gold}
    return check_acebench_strict(calls, gold)[0]


# ---- official: calls and names
def test_the_number_of_calls_and_their_names_must_be_those_of_the_answer():
    two = {"forecast_1": {"city": "Rome"}, "forecast_2": {"city": "Oslo"}}
    assert passes([call(city="Oslo"), call(city="Rome")], two)
    assert reason([call(city="Rome")], two) == "wrong functions number"
    assert reason([], two) == "wrong functions number"
    assert reason([call(city="Rome"), call("ping")], two) == "function_mismatch"
    assert reason([call("Forecast", city="Rome")], {"forecast": {"city": "Rome"}}) == "function_mismatch"


def test_one_call_may_serve_several_answers_officially_but_not_strictly():
    two = {"forecast_1": {"city": "Rome"}, "forecast_2": {"city": "Rome"}}
    odd = [call(city="Rome"), call(city="Paris")]
    assert passes(odd, two) and not strict(odd, two)
    same = [call(city="Rome"), call(city="Rome")]
    assert passes(same, two) and strict(same, two)


def test_one_alternative_that_passes_is_enough_and_the_first_gives_the_reason():
    either = [{"forecast": {"city": "Rome"}}, {"forecast": {"city": "Oslo"}, "ping": {}}]
    for check in (passes, strict):
        assert check([call(city="Rome")], either)
        assert check([call("ping"), call(city="Oslo")], either)
        assert not check([call(city="Oslo")], either)
    assert reason([call(city="Oslo")], either) == "value_error"


def test_no_arguments_pass_only_where_the_schema_is_empty():
    assert passes([call("ping")], {"ping": {}})
    assert reason([call("ping", city="Rome")], {"ping": {}}) == "wrong_param"
    assert reason([call()], {"forecast": {}}) == "wrong_param"
    assert reason([call(city="Rome")], {"forecast": {}}) == "wrong_param"


def test_required_missing_and_additional_arguments_are_errors_but_optional_ones_may_be_left_out():
    gold = {"forecast": {"city": "Rome", "days": 2}}
    assert passes([call(city="Rome")], gold) and not strict([call(city="Rome")], gold)
    assert reason([call(days=2)], gold) == "lack_args"
    assert reason([call(city="Rome", days=2, hourly=True)], gold) == "addition_args"
    assert reason([call(city="Rome", wind=1)], {"forecast": {"city": "Rome", "wind": 1}}) == "addition_args"


def test_a_tool_is_found_by_its_name_inside_the_key_of_the_answer():
    tools = [{"name": "cast", "parameters": TOOLS[2]["parameters"]}, *TOOLS]
    valid, why = check_acebench(tools, [call(city="Rome")], {"forecast": {"city": "Rome"}})
    assert not valid and why.startswith("wrong_function_name")


# ---- official: types
def test_top_level_numbers_and_booleans_are_never_compared():
    assert passes({"days": 9}, {"days": 1}) and not strict({"days": 9}, {"days": 1})
    assert passes({"hourly": False}, {"hourly": True}) and not strict({"hourly": False}, {"hourly": True})
    assert passes({"limit": 9.5}, {"limit": 1.5}) and not strict({"limit": 9.5}, {"limit": 1.5})
    assert passes({"share": 9}, {"share": 1.5})


def test_types_are_exact():
    assert not passes({"days": True}, {"days": 2})
    assert not passes({"days": "1"}, {"days": 1})
    assert not passes({"days": 2.0}, {"days": 1})
    assert not passes({"hourly": 1}, {"hourly": False})
    assert not passes({"days": None}, {"days": 1})
    assert not passes({"units": "mm"}, {"units": ["mm"]})


def test_a_value_equal_to_the_answer_passes_whatever_its_type():
    for value in (1.0, True):
        assert passes({"days": value}, {"days": 1}) and not strict({"days": value}, {"days": 1})


def test_number_means_int_and_an_answer_of_another_type_opens_that_type():
    assert passes({"limit": 3}, {"limit": 2.5}) and passes({"limit": 2.25}, {"limit": 2.5})
    assert not passes({"limit": 2.5}, {"limit": 3})
    assert passes({"units": {"a": 1}}, {"units": {"b": 2}}), "the answer is no list, so nothing is compared"
    assert passes({"units": ["x"]}, {"units": {"b": 2}})


def test_true_and_false_as_texts_are_booleans_and_never_strings():
    assert passes({"hourly": "true"}, {"hourly": False})
    assert not passes({"hourly": "True"}, {"hourly": True})
    assert not passes([call(city="true")], {"forecast": {"city": "true"}})


def test_an_empty_list_or_object_as_answer_is_passed_by_no_list_or_object():
    for calls in ([], ["mm"]):
        assert not passes({"units": calls}, {"units": []})
    assert not passes({"window": {}}, {"window": {}})
    assert strict({"units": [], "window": {}}, {"units": [], "window": {}})


# ---- official: values
@pytest.mark.parametrize("value, gold, right", [
    ("New York City", "New York", True), ("New York", "New York City", False), ("new-york", "New York", True),
    ("it's", 'it"s', True), ("a,b./c_d*e^f", "ABCDEF", True), ("a!", "a", True), ("a", "a!", False),
    ("a\nb", "ab", False), ("anything", "", True),
])
def test_a_string_passes_where_the_normalised_answer_is_part_of_it(value, gold, right):
    assert passes([call(city=value)], {"forecast": {"city": gold}}) == right


def test_lists_are_equal_in_order_with_normalised_strings():
    assert passes({"units": ["M M", "c-m"]}, {"units": ["mm", "cm"]})
    assert not passes({"units": ["cm", "mm"]}, {"units": ["mm", "cm"]})
    assert not passes({"units": ["mm"]}, {"units": ["mm", "cm"]})
    assert not passes({"units": ["mmm"]}, {"units": ["mm"]})


def test_lists_of_objects_are_compared_pairwise():
    rome, oslo = {"at": "Rome "}, {"at": "Oslo"}
    gold = {"stops": [{"at": "rome"}, {"at": "oslo"}]}
    assert passes({"stops": [rome, oslo]}, gold)
    assert not passes({"stops": [oslo, rome]}, gold) and not passes({"stops": [rome]}, gold)
    assert not passes({"stops": ["Rome"]}, {"stops": [{"at": "Rome"}]})


@pytest.mark.parametrize("value, gold, right", [
    ({"a": 12}, {"a": 1}, True), ({"a": 1}, {"a": 12}, False), ({"a": "1"}, {"a": 1}, True),
    ({"a": 1, "b": 2}, {"a": 1}, False), ({"b": 1}, {"a": 1}, False), ({"a": "x"}, {"a": {"b": "x"}}, False),
    ({"a": {"b": "Rome!"}}, {"a": {"b": "rome"}}, True), ({"a": {"b": 1, "c": 1}}, {"a": {"b": 1}}, False),
    ({"a": "true"}, {"a": True}, True), ({"a": True}, {"a": "true"}, False),
    ({"a": ["x", "y"]}, {"a": ["x", "y"]}, True), ({"a": ["y", "x"]}, {"a": ["x", "y"]}, False),
    ({"a": ["X"]}, {"a": ["x"]}, False), ({"a": {}}, {"a": {}}, True), ({"a": [1, [2]]}, {"a": [2]}, True),
])
def test_objects_have_equal_keys_and_values_whose_text_contains_the_answer(value, gold, right):
    assert passes({"window": value}, {"window": gold}) == right


# ---- strict
@pytest.mark.parametrize("value, gold, right", [
    ("new-york", "New York", True), ("New York City", "New York", False), (2, 2, True), (2, 2.0, True),
    (2.0, 2, False), (True, 1, False), (1, True, False), (None, None, True), ("2", 2, False),
    ([1, "A b"], [1, "ab"], True), ([1, 2], [2, 1], False), ([1], [1, 1], False),
    ({"a": {"b": ["X "]}}, {"a": {"b": ["x"]}}, True), ({"a": 12}, {"a": 1}, False),
    ({"a": 1}, {"a": 1, "b": 2}, False),
])
def test_strict_compares_values_at_any_depth_with_their_types(value, gold, right):
    assert strict({"v": value}, {"v": gold}) == right


def test_strict_wants_every_argument_of_the_answer_and_no_other():
    assert strict({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not strict({"a": 1}, {"a": 1, "b": 2}) and not strict({"a": 1, "b": 2}, {"a": 1})
    assert not strict([call(a=1), call(a=1)], {"forecast": {"a": 1}})
    assert not strict([], {"forecast": {"a": 1}})


def test_strict_takes_away_the_very_call_that_matched_not_one_python_thinks_equal():
    gold = {"forecast_1": {"a": 1}, "forecast_2": {"a": True}}
    assert strict([call(a=True), call(a=1)], gold)


# ---- any value is judged
def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ODD = [None, True, 0, 1.5, "", "forecast", {}, [], [None], [[]], [{}], [1], ["forecast"],
       {"name": "forecast"}, [{"name": "forecast"}], [{"arguments": {}}], [{"name": None, "arguments": {}}],
       [{"name": ["forecast"], "arguments": {}}], [{"name": "forecast", "arguments": []}],
       [{"name": "forecast", "arguments": None}], [{"name": "forecast", "arguments": "{}"}],
       call(city="Rome"),
       nested(5000), [call(city=nested(5000))], [call(window={"a": nested(5000)})], [call(city=10 ** 20000)],
       [call(city="Rome", days=10 ** 20000)], [call(city="Rome", window={"a": float("nan")})],
       [call(city="\ud800", **{"\udfff" * 1000: 1})], [call(city=float("inf"))]]


@pytest.mark.parametrize("i", range(len(ODD)))
def test_odd_outputs_are_wrong_and_never_raise(i):
    gold = {"forecast": {"city": "Rome", "days": 1, "window": {"a": 1}}}
    for valid, why in (check_acebench(TOOLS, ODD[i], gold), check_acebench_strict(ODD[i], gold)):
        assert valid is False and why
        why.encode()


def test_depth_up_to_the_limit_is_read_and_beyond_it_is_refused():
    inside, beyond = nested(acebench.MAX_DEPTH - 4), nested(acebench.MAX_DEPTH)
    assert strict({"a": inside}, {"a": inside}) and not strict({"a": beyond}, {"a": beyond})


def random_value(rng, depth=4):
    kind = rng.randrange(10 if depth else 7)
    if kind > 7:
        return {rng.choice("ab"): random_value(rng, depth - 1) for _ in range(rng.randrange(3))}
    if kind == 7:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return rng.choice([None, True, "true", rng.randrange(-2, 3), 10 ** rng.randrange(400), 1e308 * 10, -0.5,
                       "", "Rome", "\u2028'", "1"])


def spoil(rng, value):
    """A copy with one part, at any depth, replaced by a random value."""
    if rng.random() < 0.3 or not value or not isinstance(value, (list, dict)):
        return random_value(rng)
    copied = copy.copy(value)
    key = rng.choice(list(copied) if isinstance(copied, dict) else range(len(copied)))
    copied[key] = spoil(rng, copied[key])
    return copied


def test_random_values_for_every_type_of_parameter_get_a_verdict():
    rng = random.Random(0)
    seen = set()
    for _ in range(5000):
        parameter = rng.choice(list(PROPERTIES))
        gold = {"forecast": {"city": "Rome", parameter: random_value(rng)}}
        calls = [call(**{"city": "Rome", parameter: random_value(rng)})]
        calls = calls if rng.random() < 0.8 else spoil(rng, calls)
        valid, why = check_acebench(TOOLS, calls, gold)
        assert type(valid) is bool and valid == (why == "")
        assert type(check_acebench_strict(calls, gold)[0]) is bool
        seen.add(why.partition(":")[0])
    assert {"", "type_error", "value_error", "lack_args", "wrong_output_format"} <= seen


# ---- files, prompts, table
@pytest.fixture
def folder(tmp_path):
    """The benchmark in miniature: as many entries as it has, all asking for the same."""
    (tmp_path / "possible_answer").mkdir()
    for category, n in acebench.CATEGORIES.items():
        questions = [{"id": f"{category}_{i}", "question": "user: Rome?\n", "function": TOOLS,
                      "time": "It is noon." if i else ""} for i in range(n)]
        answers = [{"id": q["id"], "ground_truth": {"forecast": {"city": "Rome"}}} for q in questions]
        for path, records in ((tmp_path, questions), (tmp_path / "possible_answer", answers)):
            (path / f"data_{category}.json").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def test_load_returns_the_500_entries_in_order(folder):
    entries = acebench.load(folder)
    assert len(entries) == 500 and len({entry.id for entry in entries}) == 500
    categories = [category for category, n in acebench.CATEGORIES.items() for _ in range(n)]
    assert [entry.category for entry in entries] == categories
    assert entries[0].tools == TOOLS and entries[0].answer == {"forecast": {"city": "Rome"}}


def edit(path, change):
    lines = path.read_text().split("\n")
    path.write_text("\n".join(change(lines)))


@pytest.mark.parametrize("name, change, words", [
    ("data_normal_atom_bool.json", None, "No such file"),
    ("possible_answer/data_normal_atom_enum.json", None, "No such file"),
    ("data_normal_atom_bool.json", lambda lines: [*lines[:-1], lines[-1][:40]], "line 50: not JSON"),
    ("data_normal_atom_list.json", lambda lines: lines[:-1], "49 entries, expected 50"),
    ("possible_answer/data_normal_atom_list.json", lambda lines: lines[1:], "49 entries, expected 50"),
    ("data_normal_atom_list.json", lambda lines: [lines[1], *lines[1:]],
     "line 2: duplicate id normal_atom_list_1, first on line 1"),
    ("possible_answer/data_normal_atom_list.json",
     lambda lines: [lines[0].replace("list_0", "list_x"), *lines[1:]],
     "line 1: unknown id normal_atom_list_x"),
    ("data_normal_atom_bool.json", lambda lines: ["[]", *lines[1:]], "line 1: id is missing"),
    ("data_normal_atom_bool.json", lambda lines: [lines[0].replace('"name"', '"nom"'), *lines[1:]],
     "line 1: normal_atom_bool_0 has a function without a name"),
    ("possible_answer/data_normal_atom_bool.json",
     lambda lines: ['{"id": "normal_atom_bool_0", "ground_truth": []}', *lines[1:]],
     "line 1: normal_atom_bool_0 has no calls"),
])
def test_a_bad_file_is_one_line_that_names_it(folder, name, change, words):
    path = folder / name
    if change:
        edit(path, change)
    else:
        path.unlink()
    with pytest.raises(ValueError) as error:
        acebench.load(folder)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_blank_lines_do_not_count(folder):
    edit(folder / "data_normal_atom_bool.json", lambda lines: [*lines, "", " "])
    assert len(acebench.load(folder)) == 500


def test_the_prompt_is_the_dialogue_as_one_message_after_instruction_and_time(folder):
    first, second = acebench.load(folder)[:2]
    tools, (system, user) = acebench.prompt(second)
    assert tools is second.tools and system["role"] == "system" and user["role"] == "user"
    assert system["content"] == f"{acebench.INSTRUCTION}\nIt is noon."
    assert user["content"].endswith("user: Rome?\n")
    time_only = {"role": "system", "content": "It is noon."}
    assert acebench.prompt(second, paper_prompt=True)[1] == [time_only, user]
    assert acebench.prompt(first, paper_prompt=True)[1] == [user]


def test_a_reply_in_our_format_is_decoded_and_checked(folder):
    entry = acebench.load(folder)[0]
    reply = format_reply([call(city="Rome")], "Rome it is.")
    for metric in acebench.METRICS:
        assert acebench.check(entry, acebench.decode(reply), metric) == (True, "")
        assert not acebench.check(entry, acebench.decode("no call"), metric)[0]
    for text in ("<tool_call>[", "<tool_call>[</tool_call>", f"<tool_call>{'[' * 100000}</tool_call>"):
        assert acebench.decode(text) is None
    with pytest.raises(ValueError, match="unknown metric 'lax'"):
        acebench.check(entry, [], "lax")


def test_the_table_has_the_categories_the_two_means_and_the_pooled_accuracy():
    right = {category: i for i, category in enumerate(acebench.CATEGORIES, start=1)}
    results = {category: {str(i): (i < right[category], "") for i in range(n)}
               for category, n in acebench.CATEGORIES.items()}
    rows = {row["label"]: row for row in acebench.summarize(results)}
    assert [*rows] == [*acebench.CATEGORIES, "Atom mean", "Single-turn mean", "Pooled"]
    assert rows["normal_atom_bool"] == {"label": "normal_atom_bool", "n": 50, "expected": 50, "right": 1,
                                        "accuracy": 1 / 50}
    assert rows["Atom mean"]["accuracy"] == pytest.approx(21 / 300) and rows["Atom mean"]["expected"] == 300
    assert rows["Single-turn mean"]["accuracy"] == pytest.approx(15 / 200)
    assert rows["Pooled"]["accuracy"] == 36 / 500 and rows["Pooled"]["n"] == 500


def test_what_is_missing_counts_as_wrong_and_shows_in_the_table():
    rows = {row["label"]: row for row in acebench.summarize({"normal_atom_bool": {"x": (True, "")}})}
    assert (rows["normal_atom_bool"]["n"], rows["normal_atom_bool"]["accuracy"]) == (1, 1 / 50)
    assert rows["Atom mean"]["accuracy"] == pytest.approx(1 / 300) and rows["Pooled"]["n"] == 1
    with pytest.raises(ValueError, match="normal_atom: 1 verdicts, expected no such category"):
        acebench.summarize({"normal_atom": {"x": (True, "")}})
    with pytest.raises(ValueError, match="normal_atom_bool: 51 verdicts, expected 50"):
        acebench.summarize({"normal_atom_bool": {i: (True, "") for i in range(51)}})


# ---- the real benchmark
@pytest.fixture(scope="module")
def entries(real_data):
    return {entry.id: entry for entry in acebench.load(real_data / "data/acebench")}


@pytest.fixture(scope="module")
def mutations(real_data):
    lines = (real_data / "data/acebench/mutations_dev.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def gold_calls(entry, alternative=0):
    gold = entry.answer[alternative] if isinstance(entry.answer, list) else entry.answer
    return [{"name": key if key in {tool["name"] for tool in entry.tools} else key.rpartition("_")[0],
             "arguments": arguments} for key, arguments in gold.items()]


def test_all_417_mutations_get_the_official_verdict_and_error_type(entries, mutations):
    assert len(mutations) == 417 and sum(mutation["valid"] for mutation in mutations) == 194
    for mutation in mutations:
        valid, why = acebench.check(entries[mutation["id"]], mutation["calls"])
        assert valid == mutation["valid"], mutation["id"]
        assert why.startswith(mutation["error_type"] or ""), mutation["id"]


def test_gold_answers_pass_499_of_500_officially_and_all_strictly(entries):
    assert len(entries) == 500
    for metric, expected in (("official", ["normal_single_turn_parallel_function_42"]), ("strict", [])):
        wrong = [entry.id for entry in entries.values()
                 if not acebench.check(entry, gold_calls(entry), metric)[0]]
        assert wrong == expected


def test_both_alternatives_of_the_two_entries_that_have_them_pass(entries):
    several = [entry for entry in entries.values() if isinstance(entry.answer, list)]
    assert [entry.id for entry in several] == ["normal_atom_bool_11", "normal_atom_object_short_42"]
    for entry in several:
        for alternative in (0, 1):
            for metric in acebench.METRICS:
                assert acebench.check(entry, gold_calls(entry, alternative), metric)[0]


def test_spoilt_calls_never_raise_and_the_work_of_scoring_grows_with_the_entries_only(entries, mutations):
    rng = random.Random(1)

    def score_all():
        for mutation in mutations * 5:
            calls = spoil(rng, mutation["calls"])
            for metric in acebench.METRICS:
                valid, why = acebench.check(entries[mutation["id"]], calls, metric)
                assert type(valid) is bool and valid == (why == "")

    work = calls_of(score_all)
    assert work < 1000 * len(mutations) * 5, work


def test_scoring_changes_nothing(entries, mutations):
    before = copy.deepcopy((entries, mutations))
    for mutation in mutations:
        for metric in acebench.METRICS:
            acebench.check(entries[mutation["id"]], mutation["calls"], metric)
    assert (entries, mutations) == before
