"""runtime/records.py: the records of a data file, whatever holds them, or one line that says why not."""

import gzip
import json

import pytest
from raw_records import xlam_row

from data import main, read_jsonl, read_xlam
from runtime.records import read_records

ROWS = [{"k": "é\u2028 1"}, {"k": [None]}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("text", [
    json.dumps(ROWS), json.dumps(ROWS, indent=2), LINES, LINES + "\r\n\n", LINES.replace("\n", "\r\n\r\n")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lists_and_lines_are_read_plain_or_gzipped_with_or_without_a_byte_order_mark(
        tmp_path, text, mark, pack):
    (tmp_path / "rows").write_bytes(pack((mark + text).encode()))
    assert [record for _, record in read_records(tmp_path / "rows")] == ROWS


def test_one_object_over_several_lines_is_one_record(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(xlam_row(3, []), indent=1))
    examples, report = read_xlam(tmp_path / "x.json")
    assert [example.id for example in examples] == ["xlam/3"] and report["raw"] == 1
    (tmp_path / "x.json").write_text(json.dumps({"data": [xlam_row(3, [])]}, indent=1))
    with pytest.raises(ValueError, match="x.json: record 0: no query, tools, answers, only data; another"):
        read_xlam(tmp_path / "x.json")


PACKED = gzip.compress(LINES.encode())


@pytest.mark.parametrize("content, words", [
    (b"PAR1\x15\x04", "a parquet file; make it jsonl first: python -c"),
    (PACKED[:-9], "cannot be read"),
    (PACKED[:20] + b"\xff\xff\xff" + PACKED[23:], "cannot be read"),
    (b"\x1f\x8b", "cannot be read"),
    (gzip.compress(b"\xff\xfe"), "UTF-8"),
    (b'{"k": 1}\n{"k":\n', ":2: not JSON"),
    (b'{"k": ' + b"[" * 70_000 + b"\n}", ":1: not JSON"),
    (b'[{"k": ' + b'{"k":' * 70_000, "not JSON"),
    (b'{"k": 1}\nnull', ":2: a NoneType where an object is expected"),
    (b'"text"', ":1: a str where an object is expected"),
])
def test_a_file_of_something_else_is_one_line_that_names_it(tmp_path, content, words, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for read in (read_records, read_jsonl):
        with pytest.raises(ValueError) as caught:
            read(path)
        assert str(path) in str(caught.value) and words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert main(["convert", "xlam", str(path), str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()


def test_half_a_character_in_a_key_or_an_id_is_printed_as_an_escape(tmp_path, capsys):
    good = xlam_row("\udc00", [{"name": "f", "arguments": {}}])
    for text, status, words in ((json.dumps([{"\ud83d": 1}]), 2, "only \\ud83d"),
                                (json.dumps([good, xlam_row(1, [])]), 0, "xlam/\\udc00")):
        (tmp_path / "rows.json").write_text(text)
        assert main(["convert", "xlam", str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")]) == status
        printed = capsys.readouterr()
        assert words in printed.out + printed.err
