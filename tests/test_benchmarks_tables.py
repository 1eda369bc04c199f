"""What the public benchmarks share: the reader of JSON lines, outputs, verdicts, and the two tables."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import acebench, api_bank, bfcl, json_lines
from benchmarks.tables import (
    BENCHES,
    bench_table,
    common_fault,
    form_fault,
    paper_table,
    read_outputs,
    score_calls,
)

ENTRIES = [SimpleNamespace(id=f"simple_{i}", category="simple") for i in range(3)]
ENTRIES += [SimpleNamespace(id="java_0", category="java")]
GOOD = {"id": "simple_0", "category": "simple", "calls": []}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_lines_of_json_are_numbered_and_blank_ones_skipped():
    assert list(json_lines("f", '\n{"a": 1}\n \t\n[2]\n')) == [(2, {"a": 1}), (4, [2])]
    assert list(json_lines("f", "")) == []


def test_lines_before_a_bad_one_are_read_and_the_bad_one_is_named():
    lines = json_lines("f", '1\n{"a')
    assert next(lines) == (1, 1)
    with pytest.raises(ValueError, match=r"^f:2: not JSON \(Unterminated.*\); is the line cut off\?$"):
        next(lines)
    with pytest.raises(ValueError, match=r"^f:1: not JSON \(.*recursion"):
        next(json_lines("f", "[" * 100_000))
    with pytest.raises(ValueError, match="^bad line 1 of {f}$"):
        next(json_lines("{f}", "}", "bad line {number} of {path}"))


def test_outputs_are_read_by_id(tmp_path):
    other = {"id": "java_0", "calls": None, "more": 1}
    file = write_lines(tmp_path / "outputs.jsonl", [GOOD, other])
    assert read_outputs(file, ENTRIES, "calls") == {"simple_0": GOOD, "java_0": other}


@pytest.mark.parametrize("lines, error", [
    ([GOOD, GOOD], ":2: the id 'simple_0' stands twice"),
    ([GOOD, GOOD | {"id": "simple_9999"}],
     ":2: unknown id 'simple_9999'; is it of this benchmark and version?"),
    ([GOOD | {"category": "java"}], ":1: 'simple_0' is of simple, not 'java'"),
    ([{"id": "simple_0"}], ':1: not an object with "id" and "calls"'),
    ([{"id": 0, "calls": []}], ':1: not an object with "id" and "calls"'),
    ([[1]], ':1: not an object with "id" and "calls"')])
def test_bad_outputs_are_one_line_that_names_file_line_and_id(tmp_path, lines, error):
    file = write_lines(tmp_path / "outputs.jsonl", lines)
    with pytest.raises(ValueError) as caught:
        read_outputs(file, ENTRIES, "calls")
    assert str(caught.value) == f"{file}{error}"


def test_lines_of_skipped_categories_are_passed_over(tmp_path):
    lines = [{"id": "live_simple_0", "category": "live_simple", "calls": []}, GOOD]
    file = write_lines(tmp_path / "outputs.jsonl", lines)
    assert [*read_outputs(file, ENTRIES, "calls", ["live_simple"])] == ["simple_0"]
    with pytest.raises(ValueError, match=":1: unknown id 'live_simple_0'"):
        read_outputs(file, ENTRIES, "calls", ["live_multiple"])
    with pytest.raises(ValueError, match=":1: 'java_0' is of java, not 'live_simple'"):
        read_outputs(write_lines(file, [lines[0] | {"id": "java_0"}]), ENTRIES, "calls", ["live_simple"])


def test_outputs_that_cannot_be_read_are_one_line(tmp_path):
    file = tmp_path / "outputs.jsonl"
    for content, error in ((json.dumps(GOOD).encode() + b'\n{"id": "simple_1", "cal', ":2: not JSON (Unterm"),
                           (b"\xff", ": cannot be read as UTF-8 text ('utf-8' codec"),
                           (None, ": cannot be read as UTF-8 text ([Errno 2] No such file")):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            read_outputs(file, ENTRIES, "calls")
        assert str(caught.value).startswith(f"{file}{error}") and "\n" not in str(caught.value)


def test_every_metric_gets_a_verdict_for_each_entry_that_has_calls():
    answer = {"name": "AddAlarm", "arguments": {"time": "1"}}
    entries = [api_bank.Entry(f"e{i}", category, [], [], answer)
               for i, category in enumerate(("level1", "level1", "level1_repeated"))]
    verdicts = score_calls(api_bank, entries, {"e0": [answer], "e1": None})
    for metric in api_bank.METRICS:
        assert verdicts[metric]["level1"]["e0"] == (True, "")
        assert not verdicts[metric]["level1"]["e1"][0]
        assert verdicts[metric]["level1_repeated"] == {}


def test_entries_of_a_group_are_scored_in_it_too():
    answer, result = {"name": "Stop", "arguments": {}}, {"role": "tool", "content": ""}
    entries = [api_bank.Entry(f"e{i}", "level1", [], messages, answer)
               for i, messages in enumerate(([], [result], [{"role": "user", "content": ""}]))]
    verdicts = score_calls(api_bank, entries, {entry.id: [answer] for entry in entries},
                           api_bank.CATEGORIES)["exact"]
    assert {name: [*verdicts[name]] for name in verdicts} == {
        "level1": ["e0", "e1", "e2"], "level1_repeated": [], "first_step": ["e0", "e2"]}


def test_a_row_that_lacks_categories_has_no_accuracy_and_names_them():
    rows = {metric: acebench.summarize({}, ["normal_atom_bool", "normal_atom_list"])
            for metric in acebench.METRICS}
    _, first, second, atom, pooled = bench_table(rows).splitlines()
    assert first.split()[0] == "normal_atom_bool" and second.endswith("the rest counts as wrong")
    assert atom.split()[3:5] == ["-", "-"]
    assert atom.endswith(
        "   needs also normal_atom_enum, normal_atom_number, normal_atom_object_deep and 1 more")
    assert pooled.endswith("and 3 more")
    assert paper_table("acebench", rows, "ours").splitlines()[-2].split()[-1] == "-"
    rows = {metric: api_bank.summarize({}, ["level1"]) for metric in api_bank.METRICS}
    assert bench_table(rows).splitlines()[1].endswith("   needs also level1_repeated")
    assert paper_table("api_bank", rows, "ours").splitlines()[-2].split()[-2:] == ["-", "0.00"]


def test_the_papers_figures_of_api_bank_stand_beside_our_first_step_calls():
    results = {"level1": {str(i): (i < 160, "") for i in range(389)}, "level1_repeated": {},
               "first_step": {str(i): (i < 159, "") for i in range(212)}}
    lines = paper_table("api_bank", {"exact": api_bank.summarize(results)}, "ours").splitlines()
    assert lines[0].split() == ["all", "first-step"]
    assert lines[1].split()[-2:] == ["-", "60.41"] and lines[-2].split()[-2:] == ["40.10", "75.00"]
    assert "first-step calls only" in lines[-1]


RIGHT = [{"name": "f", "arguments": {}}]


@pytest.mark.parametrize("calls, fault", [
    (RIGHT, None), ([], None), ([*RIGHT, *RIGHT], None), (None, "no call could be read"),
    (json.dumps(RIGHT), '"calls" is a text'), (RIGHT[0], '"calls" is one object'),
    (5, '"calls" is a single value'), ([[]], "a call is not an object"), (["f()"], "a call is a text"),
    ([{"function": {"name": "f", "arguments": "{}"}, "id": "1"}], 'wrapped as {"function"'),
    ([{"f": {}}], "{NAME: ARGUMENTS}"), ([{"f": "{}"}], "{NAME: ARGUMENTS}"),
    ([{"name": "f", "input": {}}], "the keys 'input', 'name'"), ([{}], "has the keys"),
    ([{"name": 1, "arguments": {}}], "the name of a call is not a text"),
    ([*RIGHT, {"name": "f", "arguments": "{}"}], "the arguments of a call are a text"),
    ([{"name": "f", "arguments": None}], "the arguments of a call are not an object")])
def test_what_is_wrong_with_the_form_of_a_line_is_named(calls, fault):
    found = form_fault(calls)
    assert found is fault if fault is None else fault in found and len(found) < 220


def common(calls, right=()):
    calls = dict(enumerate(calls))
    verdicts = {i: (True, "") if i in right else (False, "checker:type: details") for i in calls}
    return common_fault(calls, verdicts)


def test_a_form_that_nearly_all_lines_have_is_reported_and_fewer_are_not():
    text = [{"name": "f", "arguments": "{}"}]
    warning = common([text] * 9 + [RIGHT], right=range(10))
    assert warning.startswith("warning: in 9 of 10 lines the arguments of a call are a text; the right form")
    assert common([text] * 8 + [RIGHT] * 2, right=range(10)) is None
    assert common([text] + [[]] * 20, right=range(21)).startswith("warning: in 1 of 21 lines")


def test_null_is_a_fault_only_where_it_is_wrong():
    assert common([None] * 20, right=range(20)) is None
    assert common([None] * 20, right=range(9)).startswith("warning: in 11 of 20 lines no call could be read")


def test_one_reason_of_nearly_all_lines_is_reported_unless_they_are_few():
    assert common([RIGHT] * 20, right=[3, 7]) == (
        "warning: 18 of 20 are wrong for one reason, as 0 is: checker:type: details")
    assert common([[]] * 20).startswith("warning: 20 of 20")
    assert common([RIGHT] * 20, right=[3, 7, 8]) is None
    assert common([RIGHT] * 9) is None and common([]) is None


def rows_of(bench, n):
    """Rows of a benchmark with n right answers in every category, no others scored."""
    categories = bfcl.V3 if bench is bfcl else bench.CATEGORIES
    categories = categories | ({"first_step": n and 212} if bench is api_bank and n > 399 else {})
    results = {category: {str(i): (True, "") for i in range(min(n, expected))}
               for category, expected in categories.items()}
    return {metric: bench.summarize(results) for metric in bench.METRICS}


def test_the_table_has_a_line_a_row_and_says_what_is_missing():
    first, total, other, steps = bench_table(rows_of(api_bank, 100)).splitlines()
    assert first.split() == ["n", "exact", "lenient"]
    assert total.split()[:5] == ["All", "entries", "399", "27.57", "27.57"]
    assert total.endswith("   only 110 scored (27.6%); the rest counts as wrong")
    assert other.endswith("   only 100 scored (25.7%); the rest counts as wrong")
    assert steps.split()[:6] == ["First-step", "calls", "212", "0.00", "0.00", "only"]
    assert "only 100" not in bench_table(rows_of(api_bank, 389))


@pytest.mark.parametrize("name", BENCHES)
def test_the_papers_table_has_its_figures_and_a_row_a_metric_of_the_model(name):
    bench = BENCHES[name]
    lines = paper_table(name, rows_of(bench, 2000), "ours").splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]][:len(bench.PAPER)] == [
        label + ("" if bench is not bfcl or label in bfcl.PAPER_LIVE_IS_AST_ONLY else " *")
        for label in bench.PAPER]
    assert len(lines) == 2 + len(bench.PAPER) + 2, "heads, the paper, two rows of the model, a note"
    own = [line for line in lines if line.startswith("ours")]
    assert len(own) == 2 and all(line.split()[-1] == "100.00" for line in own)
    assert len({len(line) for line in lines[:-1]}) == 1, "the columns are aligned"


def test_the_benchmarks_are_scored_without_torch():
    code = "import sys, benchmarks.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert list(BENCHES.values()) == [bfcl, api_bank, acebench]
