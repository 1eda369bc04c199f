"""eval.py: held-out accuracy, intervals, the table; public benchmarks scored, generated, resumed, refused."""

import dataclasses
import io
import json
import shutil
import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from benchmarks import acebench, api_bank, bfcl
from benchmarks.replies import DIGESTS
from benchmarks.tables import BENCHES
from data import Chat, read_jsonl, write_jsonl
from model import ModelConfig, Transformer, load_hf, save_hf
from reward import format_reply
from runtime.files import write_json
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


def test_every_stop_token_ends_a_right_reply(monkeypatch):
    """A reply that ends with a stop token of the config is judged like one that ends with <|im_end|>."""
    chat, examples = Chat("assets/tiny"), synthetic(4, 3, "heldout")
    ends = sorted(chat.stop_ids) * 4
    assert len(chat.stop_ids) > 1

    def write_answers(model, prompts, n, **settings):
        return [Rollout([], [*chat.encode(format_reply(example.answer)), ends[i]], [], True)
                for i, example in enumerate(examples) for _ in range(n)]

    monkeypatch.setattr(evaluation, "generate", write_answers)
    rows, _ = evaluation.evaluate(None, chat, examples, max_new_tokens=4)
    assert rows[-1]["right"] == 4
    assert evaluation.evaluate_samples(None, chat, examples, 3, 0.5, max_new_tokens=4) == [3] * 4


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


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """(file of five examples, calls of a stand-in for `generate`): every greedy reply is right, and of n
    samples the first 5, 3, 0, 0 and 1; the first three examples are of s/a, the last two of s/b."""
    right, calls, chat = [5, 3, 0, 0, 1], [], Chat("assets/tiny")
    examples = [replace(example, source="s/a" if i < 3 else "s/b")
                for i, example in enumerate(synthetic(5, 0, "heldout"))]

    def generate(model, prompts, n, **settings):
        calls.append((n, settings))
        wrong = [{"name": "none", "arguments": {}}]
        texts = [format_reply(example.answer if n == 1 or k < right[i] else wrong)
                 for i, example in enumerate(examples) for k in range(n)]
        return [Rollout([], chat.encode(text + "<|im_end|>"), [], True) for text in texts]

    monkeypatch.setattr(evaluation, "generate", generate)
    write_jsonl(tmp_path / "held.jsonl", examples)
    return tmp_path / "held.jsonl", calls


def test_sampled_replies_give_the_mean_the_pass_rate_and_the_mixed_share(drawn, tmp_path, capsys):
    file, calls = drawn
    run("assets/tiny", "--bench=heldout", "--data", file, "--out", tmp_path, "--samples=5",
        "--temperature=0.7", "--max_new_tokens=9", "--kernel=reference")
    head, table = capsys.readouterr().out.split("written")[0].strip("\n").split("\n", 1)
    assert head.split()[-5:] == ["mean", "of", "5", "pass@5", "mixed"]
    figures = {line.split()[0]: [float(x) for x in line.split()[-3:]] for line in table.split("\n")}
    assert figures == {"s": [36, 60, 40], "s/a": [53.3, 66.7, 33.3], "s/b": [10, 50, 50], "all": [36, 60, 40]}
    assert len({len(line) for line in table.split("\n")}) == 1
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["samples"] == 5 and scores["temperature"] == 0.7
    assert [reply["samples_right"] for reply in scores["replies"]] == [5, 3, 0, 0, 1]
    last = scores["rows"][-1]
    assert (last["mean"], last["pass"], last["mixed"], last["accuracy"]) == (9 / 25, 3 / 5, 2 / 5, 1)
    (_, greedy), (n, settings) = calls
    assert n == 5 and settings["temperature"] == 0.7 and greedy["temperature"] == 0
    assert settings["max_new_tokens"] == 9 and settings["kernel"] == "reference"


def test_samples_are_drawn_at_temperature_1_and_with_the_same_seeds_each_time():
    examples, chat = synthetic(6, 1, "heldout"), Chat("assets/tiny", "configs/demo_prompt.txt")
    model = load_hf("assets/tiny")
    counts = [evaluation.evaluate_samples(model, chat, examples, 4, 1.0, max_new_tokens=48, batch_size=size)
              for size in (256, 5)]
    assert counts[0] == counts[1] and 0 < sum(counts[0]) < 24


@pytest.mark.parametrize("words, named", [
    (["--samples=0"], "--samples is 0"), (["--temperature=1"], "give it with --samples"),
    (["--samples=2", "--temperature=nan"], "--temperature nan"),
    (["--samples=2", "--temperature=0"], "--temperature 0.0"),
    (["--samples=2", "--temperature=inf"], "--temperature inf"),
    (["--samples=2", "--bench=acebench"], "public benchmarks are greedy"),
    (["--categories=s/c,s"], "--categories: 's/c' unknown; choose from s, s/a, s/b"),
    (["--categories="], "--categories: '' unknown")])
def test_samples_and_categories_without_sense_are_refused_before_any_reply(drawn, capsys, words, named):
    file, calls = drawn
    assert named in refusal(capsys, "assets/tiny", "--bench=heldout", "--data", file, *words)
    assert calls == []


@pytest.mark.parametrize("chosen, ids", [("s/b", [3, 4]), ("s", [0, 1, 2, 3, 4]), (" s/b , s/a", range(5))])
def test_heldout_categories_are_sources_or_their_first_parts(drawn, chosen, ids):
    args = types.SimpleNamespace(data=drawn[0], categories=chosen, examples=None)
    examples = evaluation.heldout_examples(args, Chat("assets/tiny"))
    everyone = [example.id for example in read_jsonl(drawn[0])]
    assert [example.id for example in examples] == [everyone[i] for i in ids]


def test_replies_that_all_fail_for_one_reason_are_reported(tmp_path, capsys):
    """The base does not know this wording of the prompt: it never writes a call in four tokens."""
    write_jsonl(tmp_path / "held.jsonl", synthetic(12, 0, "heldout"))
    run("assets/tiny", "--bench=heldout", "--data", tmp_path / "held.jsonl", "--max_new_tokens=4", "--out",
        tmp_path)
    warning, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "12 of 12 are wrong for one reason" in warning


@pytest.mark.parametrize("out", ["held.jsonl", "held.jsonl/deeper", "/proc/1/none"])
def test_a_folder_that_cannot_take_the_scores_is_refused_before_any_reply(drawn, tmp_path, capsys, out):
    file, calls = drawn
    error = refusal(capsys, "assets/tiny", "--bench=heldout", "--data", file, "--out", tmp_path / out)
    assert out.split("/")[0] in error and calls == []


@pytest.mark.parametrize("key, value", [("source", None), ("source", 3), ("source", ["s"])])
def test_a_source_that_is_no_text_is_refused_before_any_reply(drawn, capsys, key, value):
    file, calls = drawn
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, [*lines[:3], lines[3] | {key: value}, lines[4]])
    error = refusal(capsys, "assets/tiny", "--bench=heldout", "--data", file)
    assert "held.jsonl:4" in error and key in error and calls == []


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
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": torch.zeros(1)})
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
    save_hf(Transformer(config).init_weights(0), folder)
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
    module = BENCHES[bench]
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


# ---- two small categories of BFCL, with made-up entries
SMALL = {"live_parallel": 16, "live_parallel_multiple": 24}


@pytest.fixture
def small(tmp_path):
    """A folder with the files of two categories only."""
    folder = tmp_path / "data"
    (folder / "possible_answer").mkdir(parents=True)
    for category, n in SMALL.items():
        ids = [f"{category}_{i}" for i in range(n)]
        tool = {"name": "beep", "description": "Beep.", "parameters": {
            "type": "dict", "properties": {"times": {"type": "integer"}}, "required": ["times"]}}
        name = f"BFCL_v3_{category}.json"
        write_lines(folder / name, [{"id": id, "function": [tool], "question": [
            [{"role": "user", "content": f"Beep as in {id}."}]]} for id in ids])
        write_lines(folder / "possible_answer" / name, [
            {"id": id, "ground_truth": [{"beep": {"times": [i]}}]} for i, id in enumerate(ids)])
    return folder


def right_lines(change=lambda call: call):
    return [{"id": f"{category}_{i}", "category": category,
             "calls": [change({"name": "beep", "arguments": {"times": i}})]}
            for category, n in SMALL.items() for i in range(n)]


@pytest.fixture
def answered(small, toy, tmp_path):
    """(words of a command that ran once, its folder of results with four replies, model, prompt)."""
    model, prompt = shutil.copytree(toy, tmp_path / "model"), tmp_path / "prompt.txt"
    prompt.write_text("Use {tools} well.")
    words = [model, "--bench=bfcl", "--data", small, "--categories", ",".join(SMALL), "--examples=2",
             "--max_new_tokens=2", "--system_prompt", prompt, "--out", tmp_path / "out"]
    run(*words)
    return words, tmp_path / "out", model, prompt


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def negate_weights(model):
    weights = load_file(model / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, model / "model.safetensors")


@pytest.mark.parametrize("change, named", [
    (lambda model, *_: negate_weights(model), "other bytes of weights;"),
    (lambda model, *_: edit(model / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
     "other bytes of config;"),
    (lambda model, *_: edit(model / "generation_config.json", "[", "[7, "), "other bytes of tokenizer;"),
    (lambda model, prompt, *_: edit(prompt, "well", "badly"), "other bytes of system_prompt_text;"),
    (lambda model, prompt, *_: [edit(prompt, "{tools} well", "well {tools}"), negate_weights(model)],
     "other bytes of weights, system_prompt_text;"),
    (lambda model, prompt, data, _: edit(data / "BFCL_v3_live_parallel.json", "Beep as", "Hoot as"),
     "2 of 4 replies, live_parallel_0 the first, are to other prompts"),
    (lambda model, prompt, data, _: edit(data / f"BFCL_v3_{[*SMALL][1]}.json", '"times"', '"often"'),
     "2 of 4 replies, live_parallel_multiple_12 the first, are to other prompts"),
    (lambda model, prompt, data, patch: patch.setattr(bfcl, "hinted", lambda tool, _: tool),
     "4 of 4 replies")])
def test_replies_of_other_bytes_are_refused_and_kept(answered, small, capsys, monkeypatch, change, named):
    """Every name stays the same: paths, ids, sizes. The last case is another wording in this code."""
    words, out, model, prompt = answered
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    change(model, prompt, small, monkeypatch)
    error = refusal(capsys, *words)
    assert str(out / "replies.jsonl") in error and named in error and "choose another --out" in error
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_replies_are_read_again_under_other_names_of_the_same_bytes(answered, small, tmp_path, capsys):
    words, out, model, prompt = answered
    moved = [shutil.move(model, tmp_path / "elsewhere"), shutil.move(prompt, tmp_path / "p"),
             shutil.move(small, tmp_path / "d")]
    names = dict(zip((model, prompt, small), moved, strict=True))
    run(*[names.get(word, word) for word in words])
    assert "4 replies are there, 0 to go" in capsys.readouterr().out


def test_more_categories_and_examples_can_follow_in_the_same_folder(answered, capsys):
    words, out, *_ = answered
    run(*words, "--categories=live_parallel", "--examples=3")
    assert "replies are there" in capsys.readouterr().out
    lines = (out / "replies.jsonl").read_text().splitlines()
    run(*words)
    assert "4 replies are there, 0 to go" in capsys.readouterr().out
    assert (out / "replies.jsonl").read_text().splitlines() == lines


def test_replies_of_an_earlier_version_without_digests_are_refused(answered, capsys):
    words, out, *_ = answered
    settings = json.loads((out / "settings.json").read_text())
    old = {key: settings[key] for key in settings if key not in DIGESTS}
    (out / "settings.json").write_text(json.dumps(old))
    error = refusal(capsys, *words)
    assert "earlier version" in error and "choose another --out" in error


def test_weights_are_hashed_once_an_evaluation(small, toy, tmp_path, monkeypatch):
    hashed, identity = [], evaluation.identity
    monkeypatch.setattr(evaluation, "identity", lambda folder: (hashed.append(folder), identity(folder))[1])
    run(toy, "--bench=bfcl", "--data", small, "--categories", ",".join(SMALL), "--examples=1",
        "--max_new_tokens=2", "--batch_size=1", "--out", tmp_path)
    assert hashed == [toy]


def test_only_the_files_of_chosen_categories_are_read_and_averages_name_the_others(small, tmp_path, capsys):
    outputs = write_lines(tmp_path / "o.jsonl", [*right_lines(), {"id": "java_0", "category": "java",
                                                                  "calls": []}])
    words = ["--bench=bfcl", "--data", small, "--score", outputs, "--out", tmp_path]
    assert "BFCL_v3_simple.json" in refusal(capsys, *words)
    run(*words, "--categories=live_parallel_multiple,live_parallel")
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    rows = {row["label"]: row for row in scores["rows"]["official"]}
    assert [*rows] == [*SMALL, "Live AST", "Live, v3 leaderboard", "Overall", "Overall, v3 leaderboard"]
    assert rows["live_parallel"]["accuracy"] == 1 and "missing" not in rows["live_parallel"]
    assert rows["Live AST"]["accuracy"] is None
    assert rows["Live AST"]["missing"] == ["live_simple", "live_multiple"]
    line = next(line for line in printed.splitlines() if line.startswith("Overall "))
    assert line.split()[2] == "-" and "needs also simple, java, javascript and 5 more" in line
    assert "the rest counts as wrong" not in printed and "warning" not in printed
    unknown = refusal(capsys, *words, "--categories=live_parallel,live_serial")
    assert "--categories: 'live_serial' unknown; choose from simple, java" in unknown


def test_official_files_are_written_for_the_chosen_categories(small, tmp_path):
    run("--bench=bfcl", "--data", small, "--score", write_lines(tmp_path / "o.jsonl", right_lines()), "--out",
        tmp_path, "--categories=live_parallel", "--export_official", tmp_path / "official")
    assert [file.name for file in (tmp_path / "official").rglob("*.json")] == [
        "BFCL_v3_live_parallel_result.json"]


@pytest.mark.parametrize("change, named", [
    (lambda call: call | {"arguments": json.dumps(call["arguments"])}, "the arguments of a call are a text"),
    (lambda call: {call["name"]: call["arguments"]}, "a call has the form {NAME: ARGUMENTS}"),
    (lambda call: json.dumps(call), "a call is a text"),
    (lambda call: {"type": "function", "function": call}, 'wrapped as {"function": {…}}'),
    (lambda call: {"name": call["name"], "parameters": call["arguments"]}, "the keys 'name', 'parameters'"),
    (lambda call: call | {"name": "my_" + call["name"]}, "are wrong for one reason, as live_parallel_0 is")])
def test_outputs_that_all_fail_in_one_way_are_named_after_the_table(small, tmp_path, capsys, change, named):
    run("--bench=bfcl", "--data", small, "--score", write_lines(tmp_path / "o.jsonl", right_lines(change)),
        "--out", tmp_path, "--categories", ",".join(SMALL))
    *_, blank, warning, another, last = capsys.readouterr().out.splitlines()
    assert blank == another == "" and last.startswith("written")
    assert warning.startswith("warning: ") and "40 of 40" in warning and named in warning


def test_what_stdout_cannot_show_does_not_end_an_evaluation(small, tmp_path, monkeypatch):
    outputs = write_lines(tmp_path / "Θ→.jsonl", right_lines(lambda call: call | {"name": "→"}))
    bytes_written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout := io.TextIOWrapper(bytes_written, encoding="ascii"))
        run("--bench=bfcl", "--data", small, "--score", outputs, "--out", tmp_path, "--categories",
            ",".join(SMALL))
        stdout.flush()
    assert b"\\u0398\\u2192.jsonl" in bytes_written.getvalue()
    assert (tmp_path / "scores.json").exists()


def test_calls_that_utf8_or_json_cannot_hold_do_not_end_an_evaluation(small, tmp_path):
    """A lone surrogate is kept as an escape; a value of hundreds of levels is replaced."""
    lines, deep = right_lines(), "[" * 900 + "]" * 900
    lines[0]["calls"][0]["arguments"]["times"] = "\udc9f"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "o.jsonl").write_text(text.replace('{"times": 7}', f'{{"times": {deep}}}'))
    run("--bench=bfcl", "--data", small, "--score", tmp_path / "o.jsonl", "--out", tmp_path, "--categories",
        ",".join(SMALL))
    verdicts = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["verdicts"]
    assert verdicts[0]["calls"] == lines[0]["calls"] and verdicts[7]["calls"] == "too large to repeat"
    assert [line["official"][0] for line in verdicts[:9]] == [i not in (0, 7) for i in range(9)]


def test_a_reply_with_a_lone_surrogate_is_scored(small, toy, tmp_path, monkeypatch):
    reply = '<tool_call>[{"name": "\\udc9f", "arguments": {}}]</tool_call>'
    monkeypatch.setattr(Chat, "decode", lambda self, ids: reply)
    run(toy, "--bench=bfcl", "--data", small, "--categories=live_parallel", "--max_new_tokens=2", "--out",
        tmp_path)
    verdicts = json.loads((tmp_path / "scores.json").read_text())["verdicts"]
    assert verdicts[0]["calls"] == [{"name": "\udc9f", "arguments": {}}]


def test_answers_that_the_tokenizer_changes_are_dropped_from_an_evaluation_and_counted(tmp_path, capsys):
    examples = synthetic(4, 0, "heldout")
    call = {"name": examples[0].tools[0]["name"], "arguments": {"street": "Ve\u0301lizy"}}
    examples[0] = dataclasses.replace(examples[0], answer=[call])
    write_jsonl(tmp_path / "held.jsonl", examples)
    args = types.SimpleNamespace(data=tmp_path / "held.jsonl", categories=None, examples=None)
    kept = evaluation.heldout_examples(args, Chat("assets/tiny"))
    assert [example.id for example in kept] == [example.id for example in examples[1:]]
    assert "dropped 1 held-out examples: answers that cannot score 1" in capsys.readouterr().out
    write_jsonl(tmp_path / "held.jsonl", examples[:1])
    with pytest.raises(ValueError, match="held.jsonl: no examples"):
        evaluation.heldout_examples(args, Chat("assets/tiny"))
