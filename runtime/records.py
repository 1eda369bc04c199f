"""Records of a data file: .json with one list or one object, or .jsonl, either of them plain or gzipped.

In:  the path of a file. Out: [(place, object)…]; the place, file and line or number, is what errors name.
What became of the records is printed as a report.
"""

import contextlib
import gzip
import json
import zlib
from pathlib import Path

from runtime.files import parse_json

PARQUET = ("a parquet file; make it jsonl first: python -c \"import pandas as p; p.read_parquet('{path}')"
           ".to_json('{path}.jsonl', orient='records', lines=True)\"")


def read_records(path):
    """[(place, dict)…]. ValueError, which names the place, for a file or a record that is something else."""
    text, records = _read_text(path), None
    if text.lstrip().startswith("["):
        records = [(f"{path}: record {k}", record) for k, record in enumerate(parse_json(text, path))]
    elif "\n" in text.strip():
        with contextlib.suppress(ValueError, RecursionError):  # lines of JSON; a broken one is named below
            records = [(f"{path}: record 0", json.loads(text))]
    if records is None:
        # splitlines() would also split at characters that JSON strings may contain, such as U+2028.
        lines = [(f"{path}:{k}", line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = [(place, parse_json(line, place)) for place, line in lines]
    for place, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{place}: a {type(record).__name__} where an object is expected")
    return records


def convert_records(path, form, converter, problem):
    """([fields of an example, its id among them…], report) of a file. `converter.convert(id, record)` yields
    pairs: an id, and fields or the reason of a drop; converter.COLUMNS: keys that every record has; form: its
    name, with which ids begin; `problem(fields)`: why fields cannot be used, or None. ValueError if the file
    cannot be read or a record lacks a column."""
    made, dropped, without_calls, left_out, records = [], {}, 0, 0, read_records(path)
    for number, (place, record) in enumerate(records):
        missing = [column for column in converter.COLUMNS if column not in record]
        if missing:
            raise ValueError(f"{place}: no {', '.join(missing)}, only {', '.join(record)}; another format?")
        outcomes = list(converter.convert(f"{form}/{record.get('id', number)}", record))
        without_calls += not outcomes
        for id, outcome in outcomes:
            fields = {"id": id, **outcome} if isinstance(outcome, dict) else {}
            left_out += fields.pop("text_left_out", False)
            reason = problem(fields) if fields else outcome
            if reason:
                dropped.setdefault(reason, []).append(id)
            else:
                made.append(fields)
    return made, {"raw": len(records), "without_calls": without_calls, "dropped_ids": dropped,
                  "text_left_out": left_out}


def print_report(report):
    """Print what was dropped, with all ids, and what is kept but worth a look, with the first few."""
    print(f"{report['raw']:8d} raw records, {report['without_calls']} of them without a call")
    for reason, ids in report["dropped_ids"].items():
        print(f"{len(ids):8d} dropped: {reason}: {' '.join(ids)}")
    places = {}
    for id, reasons in report["contradictions"]:
        for reason, detail in reasons.items():
            places.setdefault(reason, []).append(f"{id} ({detail})")
    if places:
        print(f"{len(report['contradictions']):8d} answers contradict the schema of their tool; "
              "--strict_schema drops them")
    for reason, found in places.items():
        print(f"{len(found):8d}   {reason}: {', '.join(found[:3])}{' …' if len(found) > 3 else ''}")
    if report["nulls"]:
        print(f"{report['nulls']:8d} null arguments taken out: the empty columns of a columnar file")
    if report["text_left_out"]:
        print(f"{report['text_left_out']:8d} call turns with text, which is left out")


def print_shortfall(share, examples, mark, why):
    """Print how many examples fewer than the share that was asked for bear a mark, the end of their id."""
    missing = round(share * len(examples)) - sum(example.id.endswith(f"/{mark}") for example in examples)
    if missing > 0:
        print(f"{missing:8d} fewer {mark} than asked: {why}")


def _read_text(path):
    """The text of a UTF-8 file, gzipped or not, without a byte order mark."""
    try:
        content = Path(path).read_bytes()
        # Known by their first bytes: a name may say anything.
        if content.startswith(b"PAR1"):
            raise ValueError(f"{path}: {PARQUET.format(path=path)}")
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}); is the name right?") from None
