"""Held-out evaluation: categories, intervals, the table, the command line."""

import json
import shutil

import pytest
import torch

import eval as evaluation
from data import Chat, synthetic, write_jsonl
from model import load_hf
from reward import format_reply
from sample import Rollout


def reply(category, right, format_ok=True):
    return {"category": category, "right": right, "format_ok": format_ok, "names_ok": right, "finished": True}


def test_wilson_interval_equals_published_values_and_stays_within_bounds():
    # 8 of 10: Brown, Cai and DasGupta (2001) give 0.490 and 0.943.
    assert evaluation.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert evaluation.wilson(0, 10)[0] == 0 and evaluation.wilson(10, 10)[1] == 1
    assert evaluation.wilson(0, 0) == (0, 1)


def test_rows_are_one_a_category_and_one_for_all():
    replies = [reply("b", True), reply("a", False, False), reply("b", False), reply("b", True)]
    rows = evaluation.summarize(replies)
    assert [(r["category"], r["n"], r["right"]) for r in rows] == [("a", 1, 0), ("b", 3, 2), ("all", 4, 2)]
    assert rows[0]["format_ok"] == 0 and rows[-1]["format_ok"] == 0.75
    assert rows[1]["low"] < rows[1]["accuracy"] < rows[1]["high"]


def test_a_part_of_the_examples_is_taken_from_all_of_the_file():
    assert evaluation.spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evaluation.spread(list(range(7)), 3) == [0, 2, 4]
    assert evaluation.spread([1, 2], 5) == evaluation.spread([1, 2], None) == [1, 2]


def test_table_has_a_line_a_category_and_a_column_a_model():
    rows = evaluation.summarize([reply("one", True), reply("two", False)])
    lines = evaluation.table({"before": rows, "after": rows}).splitlines()
    assert len(lines) == 4 and "before" in lines[0] and "after" in lines[0]
    assert "100.0" in lines[1] and "50.0" in lines[3]


def test_accuracy_is_the_share_of_right_replies(monkeypatch):
    """With replies made from the answers themselves, every second one spoilt, accuracy is a half."""
    examples = synthetic(40, 0, "heldout")
    chat = Chat("assets/tiny")

    def write_answers(model, prompts, n, **settings):
        assert settings["temperature"] == 0 and n == 1
        texts = [format_reply(example.answer if i % 2 else [{"name": "wrong", "arguments": {}}])
                 for i, example in enumerate(examples)]
        return [Rollout(prompt, chat.encode(text + "<|im_end|>"), [], True)
                for prompt, text in zip(prompts, texts, strict=True)]

    monkeypatch.setattr(evaluation, "generate", write_answers)
    rows, replies = evaluation.evaluate(None, chat, examples, max_new_tokens=64)
    assert rows[-1]["accuracy"] == 0.5 and rows[-1]["format_ok"] == 1
    assert [line["right"] for line in replies] == [bool(i % 2) for i in range(40)]
    assert replies[0]["error"] and replies[1]["error"] is None


def test_evaluation_does_not_depend_on_the_batch_size():
    examples, chat, model = synthetic(12, 0, "heldout"), Chat("assets/tiny", "configs/demo_prompt.txt"), None
    model = load_hf("assets/tiny")
    texts = [[line["reply"] for line in evaluation.evaluate(
        model, chat, examples, max_new_tokens=96, batch_size=size)[1]] for size in (1, 5, 64)]
    assert texts[0] == texts[1] == texts[2]


def test_command_line_prints_a_table_and_writes_json(tmp_path, capsys):
    model = shutil.copytree("assets/tiny", tmp_path / "model")
    write_jsonl(tmp_path / "held.jsonl", synthetic(8, 0, "heldout"))
    evaluation.main([str(model), "--bench", "heldout", "--data", str(tmp_path / "held.jsonl"),
                     "--system_prompt", "configs/demo_prompt.txt"])
    printed = capsys.readouterr().out
    report = json.loads((model / "heldout/scores.json").read_text())
    assert report["rows"][-1]["n"] == 8 and len(report["replies"]) == 8
    assert f"{100 * report['rows'][-1]['accuracy']:.1f}" in printed


@pytest.mark.parametrize("change, told", [
    ("--data=missing.jsonl", "missing.jsonl"), ("--scheme=exact", "exact"),
    ("--system_prompt=none.txt", "none.txt"), ("--batch_size=0", "--batch_size"),
    ("--examples=-1", "--examples"), ("--out=README.md/x.json", "README.md")])
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, change, told):
    write_jsonl(tmp_path / "held.jsonl", synthetic(2, 0, "heldout"))
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["assets/tiny", "--bench=heldout", f"--data={tmp_path / 'held.jsonl'}",
                         f"--out={tmp_path / 'x.json'}", "--max_new_tokens=4", change])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and told in error and error.count("\n") == 1


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    evaluation.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        evaluation.write_json(tmp_path / "x.json", {"a": torch.zeros(1)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
