"""eval.py: held-out accuracy, intervals, the table; public benchmarks scored, generated, resumed, refused."""

import json
import shutil
import types

import pytest
import torch

import eval as evaluation
from benchmarks import acebench, api_bank, bfcl
from data import Chat, write_jsonl
from model import ModelConfig, Qwen2, load_hf, save_hf
from reward import format_reply
from sample import Rollout
from tools.synthetic import synthetic

DATA = {"bfcl": "data/bfcl/v3_final", "api_bank": "data/api_bank", "acebench": "data/acebench"}


def run(*words):
    evaluation.main([str(word) for word in words])


def refusal(capsys, *words):
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


# ---- held-out examples
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
    assert evaluation.evenly_spaced(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evaluation.evenly_spaced(list(range(7)), 3) == [0, 2, 4]
    assert evaluation.evenly_spaced([1, 2], 5) == evaluation.evenly_spaced([1, 2], None) == [1, 2]


def test_table_has_a_line_a_category_and_a_column_a_model():
    rows = evaluation.summarize([reply("one", True), reply("two", False)])
    lines = evaluation.accuracy_table({"before": rows, "after": rows}).splitlines()
    assert len(lines) == 4 and "before" in lines[0] and "after" in lines[0]
    assert "100.0" in lines[1] and "50.0" in lines[3]


def test_an_evaluation_is_printed_as_one_line_and_three_a_reply(capsys):
    replies = [reply("one/a", True) | {"query": "Where\n is it?", "reply": "x" * 2000, "error": None},
               reply("two", False) | {"query": "Why?", "reply": "y", "error": "no calls"}]
    evaluation.print_evaluation(7, evaluation.summarize(replies), replies)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "held-out accuracy at step 7: 50.0% of 2  (one 100.0%  two 0.0%)"
    assert lines[1:4] == ["  asked   Where is it?", f"  wrote   {'x' * 1000}", "  right"]
    assert lines[4:] == ["  asked   Why?", "  wrote   y", "  wrong: no calls"]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_accuracy_is_the_share_of_right_replies(monkeypatch, kernel):
    """With replies made from the answers themselves, every second one spoilt, accuracy is a half."""
    examples = synthetic(40, 0, "heldout")
    chat = Chat("assets/tiny")

    def write_answers(model, prompts, n, **settings):
        assert settings["temperature"] == 0 and n == 1 and settings["kernel"] == kernel
        texts = [format_reply(example.answer if i % 2 else [{"name": "wrong", "arguments": {}}])
                 for i, example in enumerate(examples)]
        return [Rollout(prompt, chat.encode(text + "<|im_end|>"), [], True)
                for prompt, text in zip(prompts, texts, strict=True)]

    monkeypatch.setattr(evaluation, "generate", write_answers)
    settings = {} if kernel == "auto" else {"kernel": kernel}
    rows, replies = evaluation.evaluate(None, chat, examples, max_new_tokens=64, **settings)
    assert rows[-1]["accuracy"] == 0.5 and rows[-1]["format_ok"] == 1
    assert [line["right"] for line in replies] == [bool(i % 2) for i in range(40)]
    assert replies[0]["error"] and replies[1]["error"] is None
    assert list(replies[0]) == ["id", "category", "query", "answer", "reply", "right", "format_ok",
                                "names_ok", "finished", "error"]


def test_a_reward_that_raises_makes_a_reply_wrong_and_not_the_evaluation(monkeypatch):
    def write_nothing(model, prompts, n, **settings):
        return [Rollout(prompt, [], [], True) for prompt in prompts]

    def raising(*_):
        raise ZeroDivisionError("in the reward")

    monkeypatch.setattr(evaluation, "generate", write_nothing)
    monkeypatch.setattr("reward.score", raising)
    examples = synthetic(3, 0, "heldout")
    rows, replies = evaluation.evaluate(None, Chat("assets/tiny"), examples, max_new_tokens=4)
    assert rows[-1]["right"] == 0 and rows[-1]["n"] == 3
    assert {line["error"] for line in replies} == {"the reward raised ZeroDivisionError: in the reward"}


def test_evaluation_does_not_depend_on_the_batch_size():
    examples, chat = synthetic(5, 0, "heldout"), Chat("assets/tiny", "configs/demo_prompt.txt")
    model = load_hf("assets/tiny")
    texts = [[line["reply"] for line in evaluation.evaluate(
        model, chat, examples, max_new_tokens=32, batch_size=size)[1]] for size in (1, 3, 64)]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_command_line_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch, kernel):
    model = shutil.copytree("assets/tiny", tmp_path / "model")
    write_jsonl(tmp_path / "held.jsonl", synthetic(4, 0, "heldout"))
    seen, generate = [], evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *arguments, **settings: (
        seen.append(settings["kernel"]), generate(*arguments, **settings))[1])
    words = [] if kernel == "auto" else ["--kernel", kernel]
    run(model, "--bench", "heldout", "--data", tmp_path / "held.jsonl", "--system_prompt",
        "configs/demo_prompt.txt", "--max_new_tokens", 64, *words)
    printed = capsys.readouterr().out
    report = json.loads((model / "heldout/scores.json").read_text())
    assert report["rows"][-1]["n"] == 4 and len(report["replies"]) == 4
    assert f"{100 * report['rows'][-1]['accuracy']:.1f}" in printed
    assert seen == [kernel]


@pytest.mark.parametrize("change, named", [
    ("--data=missing.jsonl", "missing.jsonl"), ("--scheme=exact", "exact"),
    ("--system_prompt=none.txt", "none.txt"), ("--batch_size=0", "--batch_size"),
    ("--examples=-1", "--examples"), ("--out=README.md/x.json", "README.md")])
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, change, named):
    write_jsonl(tmp_path / "held.jsonl", synthetic(2, 0, "heldout"))
    assert named in refusal(capsys, "assets/tiny", "--bench=heldout", f"--data={tmp_path / 'held.jsonl'}",
                            f"--out={tmp_path / 'x.json'}", "--max_new_tokens=4", change)


def test_interrupted_write_leaves_the_old_file(tmp_path):
    evaluation.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        evaluation.write_json(tmp_path / "x.json", {"a": torch.zeros(1)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


# ---- the public benchmarks
def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model of one narrow layer with the demo's tokenizer, and room for long prompts."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    config = ModelConfig(vocab_size=2048, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    save_hf(Qwen2(config).init_weights(0), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(f"assets/tiny/{name}", folder / name)
    return folder


@pytest.fixture(scope="module")
def recorded(real_data, tmp_path_factory):
    """(folder of scores.json, folder of the official files, printed text) of the recorded BFCL outputs."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda text="", **_: printed.append(text))
        run("--bench=bfcl", "--data", real_data / DATA["bfcl"], "--out", folder / "scores",
            "--score", real_data / "data/bfcl_results/Qwen3-8B-FC/decoded.jsonl",
            "--export_official", folder / "official")
    return folder / "scores", folder / "official", "\n".join(printed)


def test_recorded_outputs_get_the_published_averages(recorded):
    scores, _, printed = recorded
    report = json.loads((scores / "scores.json").read_text())
    rows = {row["label"]: row for row in report["rows"]["official"]}
    published = {"Simple AST": 76.25, "multiple": 97.00, "parallel": 93.50, "parallel_multiple": 88.00,
                 "Non-Live AST": 88.69, "Live AST": 80.46, "Live, v3 leaderboard": 78.76}
    for label, percent in published.items():
        assert round(100 * rows[label]["accuracy"], 2) == percent, label
    assert "Tool-N1-7B" in printed and "84.82" in printed and "78.76" in printed


def test_files_for_the_official_scorer_hold_every_call(recorded, real_data):
    files = sorted(recorded[1].rglob("*_result.json"))
    assert len(files) == len(bfcl.V3)
    outputs = real_data / "data/bfcl_results/Qwen3-8B-FC/decoded.jsonl"
    ours = {line["id"]: line["calls"] for line in map(json.loads, outputs.open())}
    for file in files:
        for line in map(json.loads, file.open()):
            calls = ours[line["id"]] or []
            assert line["result"].count("<tool_call>") == len(calls)


@pytest.mark.parametrize("bench", DATA)
def test_gold_calls_through_the_command_line_score_as_through_the_module(real_data, tmp_path, bench):
    """Outputs made from the answers, every third one left out: missing ones count as wrong."""
    module = evaluation.BENCHES[bench]
    entries = module.load(real_data / DATA[bench])
    kept = [entry for i, entry in enumerate(entries) if i % 3]
    lines = [{"id": entry.id, "category": entry.category, "calls": gold(module, entry)} for entry in kept]
    run(f"--bench={bench}", "--data", real_data / DATA[bench], "--score",
        write_lines(tmp_path / "outputs.jsonl", lines), "--out", tmp_path)
    report = json.loads((tmp_path / "scores.json").read_text())
    for rows in report["rows"].values():
        assert all(0 < row["n"] < row["expected"] for row in rows)
        assert all(row["accuracy"] < 0.8 for row in rows), "nothing is left out of a denominator"
    assert len(report["verdicts"]) == len(kept)


def gold(module, entry):
    if module is api_bank:
        return [entry.answer]
    answer = entry.answer[0] if isinstance(entry.answer, list) else entry.answer
    if module is acebench:
        return [{"name": name, "arguments": arguments} for name, arguments in answer.items()]
    return [{"name": name, "arguments": {key: values[0] for key, values in arguments.items() if values}}
            for call in entry.answer or [] for name, arguments in call.items()]


def test_a_category_that_is_scored_in_part_shows_in_the_table(real_data, tmp_path, capsys):
    line = {"id": "simple_0", "category": "simple", "calls": []}
    run("--bench=bfcl", "--data", real_data / DATA["bfcl"], "--out", tmp_path, "--score",
        write_lines(tmp_path / "outputs.jsonl", [line]))
    printed = capsys.readouterr().out
    assert "only 1 scored (0.2%); the rest counts as wrong" in printed
    assert "only 0 scored" in printed


@pytest.mark.parametrize("bench", DATA)
def test_an_interrupted_evaluation_resumes(real_data, toy, tmp_path, capsys, bench, monkeypatch):
    words = [toy, f"--bench={bench}", "--data", real_data / DATA[bench], "--examples=2", "--max_new_tokens=3",
             "--batch_size=4"]
    run(*words, "--out", tmp_path / "complete")
    replies = (tmp_path / "complete/replies.jsonl").read_text().splitlines()
    assert len(replies) == 2 * len({json.loads(line)["category"] for line in replies})

    # Killed while the fourth line was being written.
    half = shutil.copytree(tmp_path / "complete", tmp_path / "half")
    (half / "scores.json").unlink()
    (half / "replies.jsonl").write_text("\n".join(replies[:3]) + "\n" + replies[3][:20])
    asked = []
    generate = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda model, prompts, *a, **k: (
        asked.extend(prompts), generate(model, prompts, *a, **k))[1])
    run(*words, "--out", half)
    assert len(asked) == len(replies) - 3
    assert sorted((half / "replies.jsonl").read_text().splitlines()) == sorted(replies)
    complete, again = (json.loads((tmp_path / x / "scores.json").read_text()) for x in ("complete", "half"))
    assert complete == again
    assert "3 replies are there" in capsys.readouterr().out


def test_replies_of_unknown_origin_are_refused_and_kept(real_data, toy, tmp_path, capsys):
    words = [toy, "--bench=api_bank", "--data", real_data / DATA["api_bank"], "--examples=1",
             "--out", tmp_path]
    (tmp_path / "replies.jsonl").write_text("kept")
    assert "settings.json" in refusal(capsys, *words)
    (tmp_path / "settings.json").write_text("{")
    assert "settings.json: not a readable JSON file" in refusal(capsys, *words)
    assert (tmp_path / "replies.jsonl").read_text() == "kept"


def test_prompts_that_the_model_cannot_take_are_refused_at_once(real_data, tmp_path, capsys):
    error = refusal(capsys, "assets/tiny", "--bench=acebench", "--data", real_data / DATA["acebench"],
                    "--examples=1", "--out", tmp_path, "--max_new_tokens=1500")
    assert "normal_atom_bool" in error and "have more than the 548 tokens" in error


def test_replies_of_other_settings_are_not_mixed(real_data, toy, tmp_path, capsys):
    words = [toy, "--bench=api_bank", "--data", real_data / DATA["api_bank"], "--examples=1",
             "--out", tmp_path]
    run(*words, "--max_new_tokens=2")
    assert "max_new_tokens" in refusal(capsys, *words, "--max_new_tokens=3")


def test_bad_outputs_are_one_line_that_names_file_and_line(real_data, tmp_path, capsys):
    words = ["--bench=api_bank", "--data", real_data / DATA["api_bank"], "--out", tmp_path, "--score"]
    line = {"id": "api_bank_l1_0", "calls": []}
    file = write_lines(tmp_path / "outputs.jsonl", [line, line])
    assert "outputs.jsonl:2: the id 'api_bank_l1_0' stands twice" in refusal(capsys, *words, file)
    assert "missing.jsonl" in refusal(capsys, *words, tmp_path / "missing.jsonl")


def test_what_does_not_go_together_is_refused(tmp_path, capsys):
    assert "no BFCL files" in refusal(capsys, "--bench=bfcl", "--data", tmp_path, "--score=x")
    assert "leave out the model" in refusal(capsys, "m", "--bench=bfcl", "--data", tmp_path, "--score=x")
    assert "BFCL" in refusal(capsys, "--bench=acebench", "--data", tmp_path, "--export_official=y")
    assert "heldout" in refusal(capsys, "--bench=heldout", "--data", tmp_path, "--score=x")


def test_the_checkers_can_be_imported_from_eval():
    assert evaluation.check_bfcl is bfcl.check_bfcl
    assert evaluation.check_acebench is acebench.check_acebench
    assert evaluation.check_api_bank is api_bank.check_api_bank


def test_a_reply_that_was_cut_inside_a_character_is_generated_again(tmp_path):
    entries = [types.SimpleNamespace(id=id, category="c") for id in "ab"]
    file, settings = tmp_path / "replies.jsonl", {"model": "m"}
    assert evaluation.read_replies(file, entries, settings) == {}
    lines = [json.dumps({"id": id, "category": "c", "reply": "Malmö"}, ensure_ascii=False) for id in "ab"]
    content = "\n".join(lines).encode()
    cut = content.rindex("ö".encode()) + 1
    file.write_bytes(content[:cut])
    assert evaluation.read_replies(file, entries, settings) == {"a": "Malmö"}
    assert file.read_text(encoding="utf-8") == lines[0] + "\n"
