"""converters/xlam.py: rows that become examples or are dropped by reason."""

import json

from raw_records import xlam_row

from data import Chat, mask_names, read_xlam
from reward import score


def test_xlam_rows_become_examples_or_are_dropped_by_reason(tmp_path):
    good = [{"name": "clock/now", "arguments": {}}]
    rows = [
        xlam_row(7, good),
        {**xlam_row(8, good), "tools": "[{"},
        xlam_row(9, [{"name": "f", "arguments": {}}]),
        xlam_row(10, [{"name": "clock/now"}]),
        xlam_row(11, []),
        xlam_row(12, good, query=None),
        xlam_row(13, [{"name": "clock/now", "arguments": {"a": float("nan")}}]),
        xlam_row(14, [{"name": "clock/now", "arguments": {"a": "\ud800"}}]),
    ]
    for name, text in (
        ("rows.json", json.dumps(rows)),
        ("rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
    ):
        (tmp_path / name).write_text(text)
        examples, report = read_xlam(tmp_path / name)
        assert [(e.id, e.source, e.answer) for e in examples] == [
            ("xlam/7", "xlam", good),
            ("xlam/11", "xlam", []),
        ]
        assert report["raw"] == 8 and report["kept"] == 2 and sum(report["dropped"].values()) == 6
        assert sorted(sum(report["dropped_ids"].values(), [])) == sorted(
            f"xlam/{n}" for n in (8, 9, 10, 12, 13, 14)
        )
        assert report["dropped"]["call of a tool that is not offered"] == 1


# ---- real data


def test_all_xlam_rows_are_kept_and_score_1_through_tokens(real_data):
    qwen = Chat(real_data / "qwen2.5")
    examples, report = read_xlam(real_data / "data" / "xlam" / "xlam_columns_from_rlla.json")
    assert (report["raw"], report["kept"], report["dropped"]) == (335, 335, {})
    for made in [*examples, *mask_names(examples, 1.0, 0)]:
        assert score(qwen.decode(qwen.encode_reply(made)), made.answer).reward == 1, made.id
