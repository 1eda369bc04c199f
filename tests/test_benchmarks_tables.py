"""eval.py on the public benchmarks: scoring existing outputs, generating, going on, refusing."""

import json
import shutil
import time

import pytest

import eval as evaluation
from benchmarks import acebench, api_bank, bfcl
from model import ModelConfig, Qwen2, save_hf

DATA = {"bfcl": "data/bfcl/v3_final", "api_bank": "data/api_bank", "acebench": "data/acebench"}


def run(*words):
    evaluation.main([str(word) for word in words])


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


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


def test_recorded_outputs_get_the_published_averages_in_seconds(real_data, tmp_path, capsys):
    outputs = real_data / "data/bfcl_results/Qwen3-8B-FC"
    began = time.perf_counter()
    run("--bench=bfcl", "--data", real_data / DATA["bfcl"], "--score", outputs / "decoded.jsonl",
        "--out", tmp_path)
    assert time.perf_counter() - began < 5
    report = json.loads((tmp_path / "scores.json").read_text())
    rows = {row["label"]: row for row in report["rows"]["official"]}
    published = {"Simple AST": 76.25, "multiple": 97.00, "parallel": 93.50, "parallel_multiple": 88.00,
                 "Non-Live AST": 88.69, "Live AST": 80.46, "Live, v3 leaderboard": 78.76}
    for label, percent in published.items():
        assert round(100 * rows[label]["accuracy"], 2) == percent, label
    printed = capsys.readouterr().out
    assert "Tool-N1-7B" in printed and "84.82" in printed and "78.76" in printed


@pytest.mark.parametrize("bench", DATA)
def test_gold_calls_through_the_command_line_score_as_through_the_module(real_data, tmp_path, bench):
    """Outputs made from the answers, every third one left out: what is missing counts as wrong."""
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


def test_part_of_a_category_is_told_in_the_table(real_data, tmp_path, capsys):
    line = {"id": "simple_0", "category": "simple", "calls": []}
    run("--bench=bfcl", "--data", real_data / DATA["bfcl"], "--out", tmp_path, "--score",
        write_lines(tmp_path / "outputs.jsonl", [line]))
    printed = capsys.readouterr().out
    assert "only 1 scored (0.2%); the rest counts as wrong" in printed
    assert "only 0 scored" in printed


@pytest.mark.parametrize("bench", DATA)
def test_generating_goes_on_where_it_was_stopped(real_data, toy, tmp_path, capsys, bench, monkeypatch):
    words = [toy, f"--bench={bench}", "--data", real_data / DATA[bench], "--examples=2", "--max_new_tokens=3",
             "--batch_size=4"]
    run(*words, "--out", tmp_path / "whole")
    replies = (tmp_path / "whole/replies.jsonl").read_text().splitlines()
    assert len(replies) == 2 * len({json.loads(line)["category"] for line in replies})

    # Killed while the sixth line was being written.
    half = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (half / "scores.json").unlink()
    (half / "replies.jsonl").write_text("\n".join(replies[:3]) + "\n" + replies[3][:20])
    asked = []
    generate = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda model, prompts, *a, **k: (
        asked.extend(prompts), generate(model, prompts, *a, **k))[1])
    run(*words, "--out", half)
    assert len(asked) == len(replies) - 3
    assert sorted((half / "replies.jsonl").read_text().splitlines()) == sorted(replies)
    whole, again = (json.loads((tmp_path / x / "scores.json").read_text()) for x in ("whole", "half"))
    assert whole == again
    assert "3 replies are there" in capsys.readouterr().out


def test_replies_of_unknown_origin_are_refused_and_kept(real_data, toy, tmp_path, capsys):
    words = [toy, "--bench=api_bank", "--data", real_data / DATA["api_bank"], "--examples=1",
             "--out", tmp_path]
    (tmp_path / "replies.jsonl").write_text("kept")
    assert "settings.json" in refusal(capsys, *words)
    assert (tmp_path / "replies.jsonl").read_text() == "kept"


def test_prompts_that_the_model_cannot_take_are_told_at_once(real_data, tmp_path, capsys):
    error = refusal(capsys, "assets/tiny", "--bench=acebench", "--data", real_data / DATA["acebench"],
                    "--examples=1", "--out", tmp_path, "--max_new_tokens=1500")
    assert "normal_atom_bool" in error and "have more than the 548 tokens" in error


def test_replies_of_other_settings_are_not_mixed(real_data, toy, tmp_path, capsys):
    words = [toy, "--bench=api_bank", "--data", real_data / DATA["api_bank"], "--examples=1",
             "--out", tmp_path]
    run(*words, "--max_new_tokens=2")
    assert "max_new_tokens" in refusal(capsys, *words, "--max_new_tokens=3")


def test_bad_outputs_are_one_line_that_names_file_line_and_id(real_data, tmp_path, capsys):
    words = ["--bench=bfcl", "--data", real_data / DATA["bfcl"], "--out", tmp_path, "--score"]
    good = {"id": "simple_0", "category": "simple", "calls": []}
    file = tmp_path / "outputs.jsonl"
    for lines, told in (([good, good], "outputs.jsonl:2: the id 'simple_0' stands twice"),
                        ([good, good | {"id": "simple_9999"}], "outputs.jsonl:2: unknown id 'simple_9999'"),
                        ([good | {"category": "java"}], "'simple_0' is of simple, not 'java'"),
                        ([{"id": "simple_0"}], 'outputs.jsonl:1: not an object with "id" and "calls"'),
                        ([[1]], "outputs.jsonl:1")):
        assert told in refusal(capsys, *words, write_lines(file, lines))
    file.write_text(json.dumps(good) + '\n{"id": "simple_1", "cal')
    assert "outputs.jsonl:2: not JSON" in refusal(capsys, *words, file)
    assert "missing.jsonl" in refusal(capsys, *words, tmp_path / "missing.jsonl")


def test_what_does_not_go_together_is_refused(tmp_path, capsys):
    assert "no BFCL files" in refusal(capsys, "--bench=bfcl", "--data", tmp_path, "--score=x")
    assert "leave out the model" in refusal(capsys, "m", "--bench=bfcl", "--data", tmp_path, "--score=x")
    assert "BFCL" in refusal(capsys, "--bench=acebench", "--data", tmp_path, "--export_official=y")
    assert "heldout" in refusal(capsys, "--bench=heldout", "--data", tmp_path, "--score=x")


def test_files_for_the_official_scorer_hold_every_call(real_data, tmp_path, capsys):
    outputs = real_data / "data/bfcl_results/Qwen3-8B-FC"
    run("--bench=bfcl", "--data", real_data / DATA["bfcl"], "--score", outputs / "decoded.jsonl",
        "--out", tmp_path / "scores", "--export_official", tmp_path / "official")
    files = sorted((tmp_path / "official").rglob("*_result.json"))
    assert len(files) == len(bfcl.V3)
    ours = {line["id"]: line["calls"] for line in map(json.loads, (outputs / "decoded.jsonl").open())}
    for file in files:
        for line in map(json.loads, file.open()):
            calls = ours[line["id"]] or []
            assert line["result"].count("<tool_call>") == len(calls)
