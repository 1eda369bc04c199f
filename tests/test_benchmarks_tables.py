"""What the public benchmarks share: the reader of JSON lines, outputs, verdicts, and the two tables."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import acebench, api_bank, bfcl, json_lines
from benchmarks.tables import BENCHES, bench_table, paper_table, read_outputs, score_calls

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


def rows_of(bench, n):
    """Rows of a benchmark with n right answers in every category, no others scored."""
    categories = bfcl.V3 if bench is bfcl else bench.CATEGORIES
    results = {category: {str(i): (True, "") for i in range(min(n, expected))}
               for category, expected in categories.items()}
    return {metric: bench.summarize(results) for metric in bench.METRICS}


def test_the_table_has_a_line_a_row_and_says_what_is_missing():
    first, total, other = bench_table(rows_of(api_bank, 100)).splitlines()
    assert first.split() == ["n", "exact", "lenient"]
    assert total.split()[:5] == ["All", "entries", "399", "27.57", "27.57"]
    assert total.endswith("   only 110 scored (27.6%); the rest counts as wrong")
    assert other.endswith("   only 100 scored (25.7%); the rest counts as wrong")
    assert "only" not in bench_table(rows_of(api_bank, 389))


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
