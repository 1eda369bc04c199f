"""API-Bank: both comparisons, tool by tool, the files in both forms, the table."""

import copy
import json
import random

import pytest
from conftest import calls_of

from benchmarks import api_bank
from benchmarks.api_bank import check_api_bank
from reward import format_calls, format_reply


def call(tool, **arguments):
    return {"name": tool, "arguments": arguments}


def verdict(tool, value, right):
    """(exact, lenient) of a call against the answer, each given by its arguments."""
    calls, answer = [call(tool, **value)], call(tool, **right)
    return check_api_bank(calls, answer, "exact"), check_api_bank(calls, answer, "lenient")


def both(right):
    return right, right


# ---- exact
def test_exactly_one_call_with_the_name_and_the_argument_names_is_due():
    right = call("AddAlarm", token="t", time="2023-03-25 08:30:00")
    for mode in api_bank.METRICS:
        assert check_api_bank([right], right, mode)
        assert check_api_bank([call("GetToday")], call("GetToday"), mode)
        assert not check_api_bank([], right, mode) and not check_api_bank([right, right], right, mode)
        assert not check_api_bank([call("addAlarm", **right["arguments"])], right, mode)
        assert not check_api_bank([call("AddAlarm", token="t")], right, mode)
        assert not check_api_bank([call("AddAlarm", **right["arguments"], on="1")], right, mode)
    with pytest.raises(ValueError, match="unknown mode 'soft'"):
        check_api_bank([right], right, "soft")


@pytest.mark.parametrize("value, right, expected", [
    (" 2 ", "2", True), (2, "2", True), (2.0, "2", False), ("02", "2", False), (True, "True", True),
    ("true", "True", False), (None, "None", True), ("A", "a", False), ("", "", True),
    (["John", "Jane"], "['John', 'Jane']", True), (["Jane", "John"], "['John', 'Jane']", False),
])
def test_exact_compares_texts_without_blanks_around(value, right, expected):
    assert check_api_bank([call("BookHotel", a=value)], call("BookHotel", a=right), "exact") == expected


# ---- lenient
def test_what_no_tool_forgives_is_compared_as_text():
    for tool, parameter in (("GetUserToken", "username"), ("BookHotel", "hotel_name"), ("AddAlarm", "token"),
                            ("AppointmentRegistration", "patient_name"), ("DocumentQA", "question"),
                            ("AddAgenda", "location"), ("Translate", "tgt_lang")):
        assert verdict(tool, {parameter: "John"}, {parameter: "john"}) == both(False)
        assert verdict(tool, {parameter: " john"}, {parameter: "john"}) == both(True)
    for tool in ("AddAlarm", "AddReminder", "AddAgenda"):
        assert verdict(tool, {"time": "2023-3-5 08:00:00"}, {"time": "2023-03-05 08:00:00"}) == both(False)


@pytest.mark.parametrize("tool, parameter, value, right", [
    ("QueryScene", "name", "morning", "Morning"), ("DeleteScene", "name", "BEDTIME", "Bedtime"),
    ("TimedSwitch", "name", "Lamp", "lamp"), ("CancelTimedSwitch", "name", "Lamp", "lamp"),
    ("QueryStock", "stock_code", "aapl", "AAPL"), ("QueryHealthData", "user_id", "j46801", "J46801"),
    ("RecordHealthData", "user_id", "a1", "A1"), ("SymptomSearch", "symptom", "Fatigue", "fatigue"),
    ("SendEmail", "receiver", "John@example.com", "john@example.com"), ("Wiki", "keyword", "AI", "ai"),
    ("Dictionary", "keyword", "Plethora", "plethora"), ("SearchEngine", "keyword", "Goals", "goals"),
    ("PlayMusic", "music_name", "shape of you", "Shape of You"),
    ("Calculator", "formula", "(5 + 6) * 3", "(5+6)*3"),
    ("QueryStock", "date", "2022-3-5", "2022-03-05"), ("QueryRegistration", "date", "2023-5-1", "2023-05-01"),
    ("AppointmentRegistration", "date", "2023-5-01", "2023-05-01"),
    ("ModifyRegistration", "new_appointment_date", "2023-4-1", "2023-04-01"),
    ("QueryHealthData", "start_time", "2023-3-5 0:0:0", "2023-03-05 00:00:00"),
    ("RecordHealthData", "time", "2023-3-5 9:30:00", "2023-03-05 09:30:00"),
    ("TimedSwitch", "time", "2023-3-19 9:30:00", "2023-03-19 09:30:00"),
    ("QueryHistoryToday", "date", "2023-04-21", "04-21"), ("QueryHistoryToday", "date", "4-21", "04-21"),
    ("QueryHistoryToday", "date", "2-29", "02-29"),
])
def test_lenient_compares_as_the_tool_does(tool, parameter, value, right):
    assert verdict(tool, {parameter: value}, {parameter: right}) == (False, True)
    assert verdict(tool, {parameter: value + "1"}, {parameter: right}) == both(False)


def test_a_value_that_is_no_date_is_compared_as_text():
    assert verdict("QueryStock", {"date": "soon"}, {"date": "soon"}) == both(True)
    assert verdict("QueryStock", {"date": "soon"}, {"date": "2022-01-01"}) == both(False)
    assert verdict("QueryStock", {"date": "2022-02-30"}, {"date": "2022-03-02"}) == both(False)
    assert verdict("QueryHistoryToday", {"date": 421}, {"date": "04-21"}) == both(False)


def test_contents_and_topics_need_more_than_half_of_their_words_in_common():
    for tool, parameter in (("AddAgenda", "content"), ("ModifyMeeting", "meeting_topic"),
                            ("QueryReminder", "content")):
        right = {parameter: "Lunch with John"}
        assert verdict(tool, {parameter: "Lunch with John"}, right) == both(True)
        assert verdict(tool, {parameter: "John with Lunch"}, right) == (False, True)
        assert verdict(tool, {parameter: "Lunch with John today"}, right) == (False, True)
        assert verdict(tool, {parameter: "Lunch with"}, right) == (False, True)
        # 2 of 4 is not more than half.
        assert verdict(tool, {parameter: "with John today"}, right) == both(False)
        assert verdict(tool, {parameter: ""}, right) == both(False)
    assert verdict("AddReminder", {"content": "CALL MOM"}, {"content": "Call mom"}) == (False, True)
    assert verdict("AddAgenda", {"content": "CALL MOM"}, {"content": "Call mom"}) == both(False)


def test_what_is_deleted_is_named_by_token_and_time():
    right = {"token": "t", "content": "Gym workout", "time": "2023-03-16 10:00:00", "location": "Gym"}
    assert verdict("DeleteAgenda", {**right, "content": "Gym", "location": "?"}, right) == (False, True)
    assert verdict("ModifyAgenda", {**right, "location": "?"}, right) == both(False)
    for name, value in (("token", "u"), ("time", "2023-03-16 11:00:00")):
        assert verdict("DeleteAgenda", {**right, name: value}, right) == both(False)
    reminder = {"token": "t", "content": "Call dentist", "time": "2023-03-16 16:30:00"}
    assert verdict("DeleteReminder", {**reminder, "content": "?"}, reminder) == (False, True)
    meeting = {"token": "t", "meeting_topic": "A", "start_time": "1", "end_time": "2", "location": "B",
               "attendees": "['C']"}
    other = {**meeting, "meeting_topic": "Z", "end_time": "9", "location": "Z", "attendees": "Z"}
    assert verdict("DeleteMeeting", other, meeting) == (False, True)
    assert verdict("DeleteMeeting", {**other, "start_time": "9"}, meeting) == both(False)


def test_lists_and_objects_are_compared_by_their_parts():
    right = {"attendees": "['John', 'Jane']"}
    assert verdict("AddMeeting", {"attendees": '["John","Jane"]'}, right) == (False, True)
    assert verdict("AddMeeting", {"attendees": ["John ", "Jane"]}, right) == (False, True)
    for value in (["Jane", "John"], ["John"], "John, Jane", {"John": "Jane"}, ["John", "Jane", "Jim"]):
        assert verdict("AddMeeting", {"attendees": value}, right) == both(False)

    right = {"health_data": "[{'name': 'pressure', 'value': '120/80'}, {'name': 'rate', 'value': '80'}]"}
    pressure, rate = {"value": "120/80", "name": "pressure"}, {"name": "rate", "value": 80}
    for value, expected in (
            ([pressure, rate], True), (json.dumps([rate, pressure]), True), ([pressure], False),
            ([pressure, {**rate, "value": 81}], False), ({"pressure": "120/80"}, False)):
        assert verdict("RecordHealthData", {"health_data": value}, right) == (False, expected)


# ---- any value is judged
def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ODD = [None, True, 0, 1.5, "", {}, [], [None], [[]], [{}], [1], ["AddMeeting"], {"name": "AddMeeting"},
       [{"name": "AddMeeting"}], [{"name": None, "arguments": {}}], [{"name": ["x"], "arguments": {}}],
       [{"name": "AddMeeting", "arguments": []}], [{"name": "AddMeeting", "arguments": None}],
       call("AddMeeting"), nested(5000), [call("AddMeeting", attendees=nested(5000))],
       [call("AddMeeting", attendees=10 ** 20000)],
       [call("AddMeeting", attendees="[" * 100000)], [call("AddMeeting", attendees="[" * 500 + "]" * 500)],
       [call("AddMeeting", attendees="[" + "9" * 100000 + "]")], [call("AddMeeting", attendees="\ud800")],
       [call("AddMeeting", **{"\udfff" * 1000: 1})], [call("\ud800" * 1000)],
       [call("AddMeeting", attendees=float("nan"))]]


@pytest.mark.parametrize("i", range(len(ODD)))
def test_odd_outputs_are_wrong_and_never_raise(i):
    entry = api_bank.Entry("x", "level1", [], [], call("AddMeeting", attendees="['John']"))
    for mode in api_bank.METRICS:
        valid, why = api_bank.check(entry, ODD[i], mode)
        assert valid is False and why
        why.encode()


def random_value(rng, depth=3):
    kind = rng.randrange(9 if depth else 7)
    if kind > 7:
        return {rng.choice("ab"): random_value(rng, depth - 1) for _ in range(rng.randrange(3))}
    if kind == 7:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return rng.choice([None, True, rng.randrange(-2, 3), 10 ** rng.randrange(400), 1e308 * 10, "", "[",
                       "{'a': 1}", "[1, '2']", "2023-2-29", "\ud800 a", "a B c",
                       "-".join("0" * rng.randrange(9) for _ in range(3))])


def spoil(rng, value):
    """A copy with one part, at any depth, replaced by a random value."""
    if rng.random() < 0.2 or not value or not isinstance(value, (list, dict)):
        return random_value(rng)
    copied = copy.copy(value)
    key = rng.choice(list(copied) if isinstance(copied, dict) else range(len(copied)))
    copied[key] = spoil(rng, copied[key])
    return copied


def test_random_values_for_every_rule_get_a_verdict_and_what_is_exact_is_lenient():
    rng = random.Random(0)
    rules = [(tool, parameter) for tool, rule in api_bank._NORMAL.items() for parameter in rule]
    rules += [*api_bank._WORDS.items(), ("AddMeeting", "attendees"), ("RecordHealthData", "health_data")]
    counts = {both(True): 0, (False, True): 0, both(False): 0}
    for _ in range(5000):
        tool, parameter = rng.choice(rules)
        value = random_value(rng)
        texts = str(value), str(value).swapcase(), json.dumps(value), str(random_value(rng))
        right = rng.choice(texts)
        counts[verdict(tool, {parameter: value}, {parameter: right})] += 1
    assert min(counts.values()) > 50


# ---- files, prompts, table
TOOL = {"name": "AddAlarm", "description": "", "output_parameters": {},
        "input_parameters": {"token": {"type": "str", "description": ""}}}
HEALTH = "[{'name': 'heart_rate', 'value': '80'}]"


def sample(i):
    """Sample i as a line of level1_call.jsonl; the last ten are the repeated ones."""
    shown = f"[RecordHealthData(user_id='1', health_data='{HEALTH}')]->{{'status': 'success'}}"
    turns = [{"role": "user", "content": "Record it.\nThen an alarm."}, {"role": "api", "content": shown},
             {"role": "assistant", "content": "Recorded."}, {"role": "user", "content": f"Token {i}."}]
    return {"id": f"api_bank_l1_{i}", "file": f"{i}.jsonl", "sample_id": int(i >= 389), "tools": [TOOL],
            "turns": turns[:3] if i % 2 else turns, "answer": call("AddAlarm", token=f"t-{i}")}


def official(sample):
    heads = {"user": "User: ", "assistant": "AI: ", "api": "API-Request: "}
    history = "".join(f"{heads[turn['role']]}{turn['content']}\n" for turn in sample["turns"])
    tools = "\n".join(json.dumps(tool) for tool in sample["tools"])
    return {"file": sample["file"], "id": sample["sample_id"], "input": f"{history}Generate API Request:\n",
            "instruction": f"Generate an API request.\n\nAPI descriptions:\n{tools}",
            "expected_output": f"API-Request: [AddAlarm(token='{sample['answer']['arguments']['token']}')]"}


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps(sample(i)) for i in range(399)]
    (tmp_path / "level1_call.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def official_folder(tmp_path):
    (tmp_path / "level-1-api.json").write_text(json.dumps([official(sample(i)) for i in range(399)]))
    return tmp_path


def test_both_forms_of_the_file_hold_the_same_entries(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("official")
    (other / "level-1-api.json").write_text(json.dumps([official(sample(i)) for i in range(399)]))
    entries = api_bank.load(folder)
    assert entries == api_bank.load(other) and len(entries) == 399
    assert [entry.category for entry in entries] == ["level1"] * 389 + ["level1_repeated"] * 10
    assert entries[7].answer == call("AddAlarm", token="t-7") and entries[7].tools == [TOOL]


def test_the_prompt_is_the_dialogue_with_earlier_calls_in_our_format(folder):
    even, odd = api_bank.load(folder)[:2]
    tools, (system, asked, called, result, said, last) = api_bank.prompt(even)
    assert tools is even.tools and system["content"] == f"{api_bank.YEAR} {api_bank.INSTRUCTION}"
    assert asked == {"role": "user", "content": "Record it.\nThen an alarm."}
    earlier = call("RecordHealthData", user_id="1", health_data=HEALTH)
    assert called == {"role": "assistant", "content": format_calls([earlier])}
    assert result == {"role": "tool", "content": "{'status': 'success'}"}
    assert said == {"role": "assistant", "content": "Recorded."}
    assert last == {"role": "user", "content": f"Token 0.\n\n{api_bank.REQUEST}"}
    assert api_bank.prompt(odd)[1] == [system, asked, called, result, said,
                                       {"role": "user", "content": api_bank.REQUEST}]
    assert api_bank.prompt(even, paper_prompt=True)[1][0] == {"role": "system", "content": api_bank.YEAR}


def test_a_reply_in_our_format_is_decoded_and_checked(folder):
    entry = api_bank.load(folder)[0]
    for metric in api_bank.METRICS:
        assert api_bank.check(entry, api_bank.decode(format_reply([entry.answer])), metric) == (True, "")
        assert not api_bank.check(entry, api_bank.decode("no call"), metric)[0]


@pytest.mark.parametrize("change, words", [
    (lambda lines: [*lines[:-1], lines[-1][:60]], "line 399: not JSON"),
    (lambda lines: lines[:-1], "9 entries of level1_repeated, expected 10"),
    (lambda lines: lines[1:], "388 entries of level1, expected 389"),
    (lambda lines: [*lines, lines[5]], "line 400: duplicate id api_bank_l1_5, first on line 6"),
    (lambda lines: ["null", *lines[1:]], "line 1: id is missing"),
    (lambda lines: [lines[0].replace('"t-0"', "0"), *lines[1:]], "line 1: api_bank_l1_0 has no turns"),
    (lambda lines: [lines[0].replace('"content"', '"text"'), *lines[1:]], "line 1: api_bank_l1_0 has no"),
    (lambda lines: [lines[0].replace("[RecordHealthData(", "("), *lines[1:]], "line 1: api_bank_l1_0 has no"),
])
def test_a_bad_line_is_one_clear_error(folder, change, words):
    path = folder / "level1_call.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ValueError) as error:
        api_bank.load(folder)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (lambda text: text[:-30], "not JSON; is the file cut off?"),
    (lambda text: "{}", "sample 0: not a sample"),
    (lambda text: json.dumps(json.loads(text)[1:]), "388 entries of level1, expected 389"),
    (lambda text: json.dumps([*json.loads(text), json.loads(text)[3]]), "sample 399: duplicate of 3.jsonl"),
    (lambda text: text.replace("[AddAlarm(", "AddAlarm(", 1), "sample 0: not a sample"),
])
def test_a_bad_official_file_is_one_clear_error(official_folder, change, words):
    path = official_folder / "level-1-api.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError) as error:
        api_bank.load(official_folder)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_either_file_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="level-1-api.json: No such file.*level1_call.jsonl"):
        api_bank.load(tmp_path)


def test_the_table_has_both_denominators_and_what_is_missing_counts_as_wrong():
    results = {"level1": {str(i): (i < 300, "") for i in range(380)},
               "level1_repeated": {str(i): (True, "") for i in range(10)}}
    assert api_bank.summarize(results) == [
        {"label": "All entries", "n": 390, "expected": 399, "right": 310, "accuracy": 310 / 399},
        {"label": "Without repeated calls", "n": 380, "expected": 389, "right": 300, "accuracy": 300 / 389},
        {"label": "First-step calls", "n": 0, "expected": 212, "right": 0, "accuracy": 0}]
    results["first_step"] = {str(i): (i < 106, "") for i in range(200)}
    assert api_bank.summarize(results)[2] == {
        "label": "First-step calls", "n": 200, "expected": 212, "right": 106, "accuracy": 0.5}
    assert [row["n"] for row in api_bank.summarize({})] == [0, 0, 0]
    with pytest.raises(ValueError, match="level2: 1 verdicts, expected no such category"):
        api_bank.summarize({"level2": {"x": (True, "")}})
    with pytest.raises(ValueError, match="level1_repeated: 11 verdicts, expected 10"):
        api_bank.summarize({"level1_repeated": {i: (True, "") for i in range(11)}})


def test_a_call_is_a_first_step_if_no_call_comes_before_it(folder):
    entries = api_bank.load(folder)
    assert not any(map(api_bank.is_first_step, entries)), "every sample shows a call of RecordHealthData"
    first = entries[0]._replace(messages=[entries[0].messages[0], {"role": "assistant", "content": "Which?"}])
    assert api_bank.is_first_step(first)


@pytest.mark.parametrize("chosen, n", [(["level1"], 389), (["level1_repeated"], 10), (None, 399), ([], 0)])
def test_entries_of_chosen_categories_are_loaded(folder, chosen, n):
    assert len(api_bank.load(folder, chosen)) == n
    assert [*api_bank.categories(folder)] == ["level1", "level1_repeated"]


# ---- the real benchmark
@pytest.fixture(scope="module")
def entries(real_data):
    return api_bank.load(real_data / "data/api_bank")


def test_all_399_answers_are_right_by_both_metrics_as_texts_and_as_typed_values(entries):
    def typed(entry):
        tool = next(tool for tool in entry.tools if tool["name"] == entry.answer["name"])
        types = {name: schema["type"] for name, schema in tool["input_parameters"].items()}
        read = {"int": int, "bool": lambda text: text == "True",
                "list": lambda text: json.loads(text.replace("'", '"')),
                "list(str)": lambda text: json.loads(text.replace("'", '"'))}
        return {"name": tool["name"], "arguments": {
            name: read.get(types.get(name), str)(text) for name, text in entry.answer["arguments"].items()}}

    for metric in api_bank.METRICS:
        results = {category: {} for category in api_bank.CATEGORIES}
        for entry in entries:
            results[entry.category][entry.id] = api_bank.check(entry, [entry.answer], metric)
            assert check_api_bank([typed(entry)], entry.answer, metric)
        assert [(row["right"], row["expected"]) for row in api_bank.summarize(results)[:2]] == [
            (399, 399), (389, 389)]


def test_answers_of_other_entries_are_right_where_they_are_equal_and_leniently_little_more(entries):
    pairs = [(a.answer, b.answer) for a in entries for b in entries if a.answer["name"] == b.answer["name"]]
    exact = [check_api_bank([a], b, "exact") for a, b in pairs]
    lenient = [check_api_bank([a], b, "lenient") for a, b in pairs]
    assert exact == [a == b for a, b in pairs]
    assert sum(exact) < sum(lenient) < 1.05 * sum(exact)


def test_first_steps_are_212_of_the_entries_and_none_is_a_repetition(entries):
    steps = [entry for entry in entries if api_bank.is_first_step(entry)]
    assert len(steps) == 212 and {entry.category for entry in steps} == {"level1"}
    shares = [figure for figure in api_bank.PAPER.values()
              if any(round(100 * right / 212, 2) == figure for right in range(213))]
    assert shares == [], "as the docstring says, no figure of the paper is a fraction of 212"


def test_the_official_file_gives_the_same_entries(entries, real_data, tmp_path):
    (tmp_path / "level-1-api.json").symlink_to(real_data / "data/api_bank/level-1-api.json")
    assert api_bank.load(tmp_path) == entries


def test_eight_answers_name_an_argument_that_the_tool_does_not_have(entries):
    schemas = [(entry, next(tool for tool in entry.tools if tool["name"] == entry.answer["name"]))
               for entry in entries]
    lost = [entry.answer["name"] for entry, tool in schemas
            if entry.answer["arguments"].keys() - tool["input_parameters"].keys()]
    assert sorted(lost) == ["CancelTimedSwitch"] * 5 + ["TimedSwitch"] * 3


def test_spoilt_answers_never_raise_and_the_work_of_scoring_grows_with_the_entries_only(entries):
    rng = random.Random(1)

    def score_all():
        for entry in entries * 5:
            calls = spoil(rng, [entry.answer])
            for metric in api_bank.METRICS:
                valid, why = api_bank.check(entry, calls, metric)
                assert type(valid) is bool and valid == (why == "")

    work = calls_of(score_all)
    assert work < 1000 * len(entries) * 5, work
