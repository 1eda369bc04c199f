"""tools/study.py: its arms as configs/study.yaml fixes them, a killed study, intervals, and docs/study.md."""

import json
import math
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import short_run
import yaml

import train
from data import Chat, read_jsonl
from reward import format_reply
from runtime.files import read_json
from runtime.ranks import RankError
from runtime.run_folder import RunFolder, Stuck
from tools import jobs, study
from tools.study import collect, difference, page, read_spec, words
from tools.synthetic import synthetic_reasoning

SPEC = read_spec()
TOY = {"about": ["Text.", "In short.", "What ± means.", "History."], "steps": 4, "examples": 16, "heldout": 6,
       "settings": {"train.threads": 1, "train.prompts_per_step": 4, "train.lr": 0.01, "rollout.n": 3,
                    "rollout.max_new_tokens": 9, "eval.max_new_tokens": 9, "checkpoint.every": 1,
                    "checkpoint.keep": 1, "log.rollouts_every": 2},
       "arms": {"rl": {"says": "RL", "stage": "grpo", "data": "right"},
                "right": {"says": "SFT", "stage": "sft", "data": "right_first"},
                "then": {"says": "both", "stage": "grpo", "data": "right_second", "from": "right"}},
       "quick": {"tables": ["recipes"], "seeds": 1, "steps": 2, "examples": 8, "heldout": 3},
       "tables": {"recipes": {"title": "Recipes", "seeds": 2, "arms": ["rl", "right", "then"],
                              "paper": {"rl": 83.24}, "findings": [["rl", "right", "RL is above SFT"]]},
                  "sampled": {"title": "Sampled", "seeds": 2, "arms": ["rl", "then"], "samples": "Percent",
                              "paper": {}, "findings": [["rl", "then", "RL is above both"]],
                              "notes": ["What was different."]}}}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A study of three arms whose replies earn something. Its results lie beside its runs."""
    short_run.make_setting(monkeypatch)
    settings = TOY["settings"] | {"model.path": str(short_run.make_base(tmp_path / "base"))}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(TOY | {"settings": settings}))
    for name, file in (("SPEC", "study.yaml"), ("RESULTS", "results.json"), ("PAGE", "page.md")):
        monkeypatch.setattr(study, name, tmp_path / file)
    monkeypatch.setattr(jobs, "WATCH_S", 0.02)
    return tmp_path


def without_minutes(file):
    found = read_json(file)
    for run in found["runs"].values():
        assert run.pop("minutes") >= 0
    return found


def die_after(mark):
    """Kill the study when it has noted that a job is done."""
    write_text = jobs.write_text

    def patched(path, text):
        write_text(path, text)
        if path.name == mark:
            short_run.die()

    jobs.write_text = patched


def die_inside():
    """Kill the study and a run of GRPO in its second step, after a checkpoint."""
    def die():
        os.kill(os.getppid(), signal.SIGKILL)
        short_run.die()

    short_run.at_call(train, "roll_out", 2, die)


def is_unlocked(folder):
    try:
        jobs.lock(folder).close()
        return True
    except ValueError:
        return False


def test_a_study_killed_between_and_inside_runs_ends_with_the_results_of_an_undisturbed_one(toy, capsys):
    study.main([str(toy / "undisturbed")])
    undisturbed, text = without_minutes(toy / "results.json"), (toy / "page.md").read_text()
    assert "6 jobs left: " in capsys.readouterr().out
    runs = toy / "killed"
    for patch in (lambda: die_after("right-0"), die_inside):
        def start(patch=patch):
            patch()
            study.main([str(runs)])

        pid, deadline = short_run.start_child(start, toy / "log"), time.monotonic() + 60
        assert short_run.wait_for(pid) == -signal.SIGKILL
        while not is_unlocked(runs):
            assert time.monotonic() < deadline, "a job outlived the killed study"
            time.sleep(0.01)
    assert (runs / "done/right-0").exists()
    begun = {folder.parent.name for folder in runs.glob("*/checkpoints/step_000001")}
    assert begun - {file.name for file in (runs / "done").iterdir()}, "none was killed inside"
    study.main([str(runs)])
    assert without_minutes(toy / "results.json") == undisturbed == without_minutes(runs / "study.json")
    changing = ("6 runs, ", "code ")
    ours, theirs = ([re.sub(r" \d+\.\d+ \|$", "", line) for line in it.split("\n")  # less the minutes
                     if not line.startswith(changing)] for it in ((toy / "page.md").read_text(), text))
    assert ours == theirs
    assert (runs / "recipes.html").exists() and len(undisturbed["runs"]) == 6
    assert (runs / "then-1/config.yaml").read_text().count("killed/right-1/checkpoints/step_000002") == 1


def test_a_run_that_stops_by_itself_ends_with_the_evaluation_of_its_newest_checkpoint(
        toy, monkeypatch, capsys):
    log_step = RunFolder.log_step

    def stop_early(run, step, *rest):
        log_step(run, step, *rest)
        if run.folder.name == "rl-0" and step == 3:
            raise Stuck("stopped at step 3: all replies are the same")

    monkeypatch.setattr(RunFolder, "log_step", stop_early)
    study.main([str(toy / "runs")])
    found = read_json(toy / "results.json")["runs"]
    assert {name: run["steps"] for name, run in found.items()} == {
        "rl-0": 2, "rl-1": 4, "right-0": 2, "right-1": 2, "then-0": 2, "then-1": 2}
    assert found["rl-0"]["sampled"].keys() < found["rl-1"]["sampled"].keys()
    assert "| RL (stopped at step 2) |" in capsys.readouterr().out


def test_a_run_that_cannot_be_saved_fails_and_is_no_result(toy, monkeypatch, capsys):
    save = RunFolder.save_checkpoint

    def fail_late(run):
        if run.folder.name == "rl-0" and run.step == 3:
            raise RankError("no space left")
        save(run)

    monkeypatch.setattr(RunFolder, "save_checkpoint", fail_late)
    with pytest.raises(SystemExit) as stopped:
        study.main([str(toy / "runs")])
    assert stopped.value.code == 1 and "failed: rl-0" in capsys.readouterr().err
    assert not (toy / "runs/done/rl-0").exists() and not (toy / "results.json").exists()


def test_a_quick_study_leaves_the_results_of_the_whole_one(toy, capsys):
    study.main([str(toy / "runs"), "--quick"])
    assert not (toy / "results.json").exists() and not (toy / "page.md").exists()
    found = read_json(toy / "runs/quick/study.json")
    assert set(found["runs"]) == {"rl-0", "right-0", "then-0"} and len(found["queries"]) == 3
    assert "RL is above SFT: **no difference seen**" in capsys.readouterr().out


# ---- the arms


def test_arms_see_the_same_examples_and_halves_are_apart(tmp_path):
    study.write_data(SPEC | {"examples": 40, "heldout": 9}, tmp_path)
    files = {file.stem: read_jsonl(file) for file in tmp_path.glob("*.jsonl")}
    assert {arm["data"] for arm in SPEC["arms"].values()} <= files.keys()
    ids = {name: [example.id for example in examples] for name, examples in files.items()}
    assert {len(each) for each in ids.values()} == {40, 20, 9}
    assert ids["right"] == ids["calls"] == ids["lazy"] == ids["right_first"] + ids["right_second"]
    assert all(e.reasoning for e in files["right"]) and not any(e.reasoning for e in files["calls"])
    assert [e.answer for e in files["calls"]] == [e.answer for e in files["right"]]
    assert [e.answer for e in files["lazy"]] != [e.answer for e in files["right"]]
    assert {e.source for name in ("single", "single_masked") for e in files[name]} == {"train/single"}
    assert {e.source for e in files["single_none"]} == {"train/single", "train/no_tool"}
    assert sum(id.endswith("/masked") for id in ids["single_masked"]) == 27
    assert SPEC["steps"] * 24 == SPEC["examples"], "an epoch of the demo's batches"


@pytest.mark.parametrize("arm", SPEC["arms"])
def test_every_arm_is_a_command_of_train_py(arm):
    c = train.load_config(words(SPEC, arm, 3, "runs"))
    assert c.seed == 3 and c.train.threads == 1 and c.out == f"runs/{arm}-3"
    if c.stage == "grpo":
        assert c.rollout.n * c.train.prompts_per_step == 192, "as many replies a step in every arm"
    start = SPEC["arms"][arm].get("from")
    steps = start and train.load_config(words(SPEC, start, 3, "runs")).train.steps
    assert c.model.path == (f"runs/{start}-3/checkpoints/step_{steps:06d}" if start else "assets/tiny")


@pytest.mark.parametrize("arm", ["rl", "single_masked"])
def test_no_example_is_dropped_and_no_right_reply_is_cut(arm, tmp_path):
    study.write_data(SPEC, tmp_path)
    c, chat = train.load_config(words(SPEC, arm, 0, "runs")), Chat("assets/tiny", "configs/demo_prompt.txt")
    examples = [replace(e, reasoning=synthetic_reasoning(e.answer))  # masked ones have none
                for e in read_jsonl(tmp_path / f"{SPEC['arms'][arm]['data']}.jsonl")]
    assert max(len(chat.encode_prompt(e)) for e in examples) <= c.data.max_prompt_tokens
    assert max(len(chat.encode_reply(e)) for e in examples) <= c.rollout.max_new_tokens


def test_findings_are_of_arms_of_their_table_and_the_first_arm_of_a_chain_has_its_seeds():
    assert 100 <= len(SPEC["runs"]) <= 120
    assert SPEC["arms"].keys() == {arm for arm, _ in SPEC["runs"].values()}
    for table in SPEC["tables"].values():
        arms = set(table["arms"])
        assert {arm for finding in table["findings"] for arm in finding[:2]} <= arms
        assert table["paper"].keys() <= arms
    for arm, seed in SPEC["runs"].values():
        assert "from" not in SPEC["arms"][arm] or f"{SPEC['arms'][arm]['from']}-{seed}" in SPEC["runs"]


def test_a_job_waits_for_the_run_that_it_starts_from_and_takes_its_share_of_time():
    pace = {"grpo": {"time/step_s": 10, "time/eval_s": 30}, "sft": {"time/step_s": 1, "time/eval_s": 30}}
    made = study.jobs_of(SPEC, Path("runs"), pace)
    assert made["right_then_rl-2"].needs == {"right_first-2"} and not made["rl-0"].needs
    assert made["rl-0"].minutes == made["group_16-0"].minutes == 7 and made["calls_first-4"].minutes == 1.3
    assert list(made)[0] == "rl-0" and list(made)[-1].endswith("-4"), "seed by seed"


# ---- results


def test_a_reply_is_judged_by_the_binary_reward_and_by_its_calls_alone():
    calls = [{"name": "f", "arguments": {"a": 1}}]
    right = format_reply(calls, "plan")
    assert study.verdict({"reply": right, "answer": calls}) == study.RIGHT
    alone = right[right.index("<tool_call>"):]
    assert study.verdict({"reply": alone, "answer": calls}) == study.CALLS_RIGHT
    assert study.verdict({"reply": right, "answer": []}) == study.WRONG


def test_the_interval_of_a_difference_has_seeds_and_frames():
    found = {"queries": ["values/single a", "values/single a", "tools/single b", "tools/no_tool b"]}
    # Means of the queries: 1, 0.5, 0, 0; of the seeds 0.5 and 0.25.
    d, half = difference(found, ["2211", "2000"], ["0000", "1000"])
    over_seeds = 12.706 * (math.sqrt(2) / 8) / math.sqrt(2)
    over_queries = 12.706 * math.sqrt(2 / 1 * 2 * 0.75 ** 2) / 4
    assert d == 37.5 and half == pytest.approx(100 * math.hypot(over_seeds, over_queries), rel=1e-3)
    assert difference(found, ["2200"], ["2200"]) == (0, 0)


def made_up(ours, theirs):
    """Results of the toy study in which rl and right have these verdicts in both seeds."""
    queries = [f"{split}/{'no_tool' if frame == 'h' else 'single'} {frame}" for split in study.HELDOUT
               for frame in "abcdefgh"]
    run = {"minutes": 30.0, "steps": 4, "examples": 16, "spread": 50.5, "clipped": None,
           "sampled": {"000001": [50, 40.0, 45], "000004": [90.0, 40.0, 60.0]}}
    return {"queries": queries, "base": "0" * 24, "spec": read_spec()["digest"], "hardware": ["a machine"],
            "git_revision": ["12345", "67890"],
            "runs": {f"{arm}-{seed}": run | {"right": marks} for seed in range(2)
                     for arm, marks in (("rl", ours), ("right", theirs), ("then", theirs))}}


def test_the_folder_of_the_runs_is_absolute_whatever_its_spelling(toy, monkeypatch):
    used = []
    monkeypatch.setattr(study, "work", lambda runs, jobs: used.append(runs) or 1)
    monkeypatch.chdir(toy)
    for spelling in ("runs", "./sub/../runs", str(toy / "runs")):
        with pytest.raises(SystemExit):
            study.main([spelling])
    assert used == [toy / "runs"] * 3


@pytest.mark.parametrize(("ours", "theirs", "said"), [
    ("2" * 24, "0" * 24, "**seen**, +100.0 ± 0.0 points."),
    ("0" * 24, "1" * 23 + "2",
     "**no difference seen**, -4.2 ± 9.9 points; by calls **the opposite is seen**, -100.0 ± 0.0 points."),
    ("0" * 24, "2" * 24, "**the opposite is seen**, -100.0 ± 0.0 points."),
    ("1" * 24, "0" * 24,
     "**no difference seen**, +0.0 ± 0.0 points; by calls **seen**, +100.0 ± 0.0 points."),
])
def test_the_sentence_on_a_finding_follows_from_its_interval(toy, ours, theirs, said):
    sentence, = [line for line in page(read_spec(), made_up(ours, theirs)).split("\n")
                 if line.startswith("- RL is above SFT: ")]
    assert sentence == f"- RL is above SFT: {said}", "by calls where that differs"


def test_a_page_has_paper_arms_parts_seeds_and_what_only_raised_the_format(toy):
    found = made_up("2" * 8 + "1" * 8 + "0" * 8, "0" * 24)
    found["runs"]["rl-0"]["clipped"] = 0.5
    found["runs"]["rl-1"] |= {"right": "2" * 24, "spread": 60.5, "clipped": 1.0}
    text = page(read_spec(), found)
    assert "| | paper | values | paraphrases | tools | no tool | single | all | all, by calls | less" in text
    assert "6 runs, 3.0 hours of one thread; a machine; code 12345, 67890. " in text
    assert "| RL | 33.3, 100.0 | 16 | 56 | 0.8 | 30.0 |" in text
    assert "| SFT | 0.0, 0.0 | 16 | 50 |  | 30.0 |" in text
    marks = [[found["runs"][f"{arm}-{seed}"]["right"] for seed in range(2)] for arm in ("rl", "right")]
    halves = [difference(found, *marks, least)[1] for least in (study.RIGHT, study.CALLS_RIGHT)]
    assert f" is its ±: {min(halves):.1f} to {max(halves):.1f} points.\n" in text
    found["runs"]["rl-1"]["right"] = found["runs"]["rl-0"]["right"]
    assert "| RL | 83.24 | 100.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 | 33.3 ± 0.0 | 33.3 ± 0.0 | 33.3 ± 0.0 | " \
           "66.7 ± 0.0 |  |" in page(read_spec(), found)
    assert "- RL: format 50, 90; right calls 45, 60; both 40, 40; **only the format rose**" in text
    parts = ["\nText.\n", "\n## What is seen\n", "\n- RL is above SFT: ", "\n## Recipes\n", "\n## Sampled\n",
             "\n- What was different.\n", "\n## How it was made\n\nHistory.\n"]
    assert sorted(map(text.index, parts)) == list(map(text.index, parts))
    assert "python train.py configs/demo.yaml --out=RUNS/then-SEED --seed=SEED" in text


@pytest.mark.parametrize(("ends", "said"), [
    ([(50, 40), (52, 40)], True), ([(50, 40), (21, 41)], False),  # the second: the format's interval has 0
    ([(50, 60), (52, 62)], False), ([(50, 40), (52, 90)], False),  # the third: the interval of right is wide
    ([(50, 40)], False)])
def test_the_format_alone_rose_where_intervals_over_seeds_say_so(ends, said):
    assert study.only_format_rose([{1: [20, 40], 36: list(end)} for end in ends]) is said


def test_the_page_says_when_arms_but_not_when_notes_were_changed_after_the_first_run(toy, capsys):
    fixed, text = "seeds were fixed before the first run", study.SPEC.read_text()
    study.main([str(toy / "runs")])
    assert fixed in study.PAGE.read_text()
    for old, new, still in (("Text.", "More.", True), ("What was", "All", True), ("RL is", "R is", False)):
        study.SPEC.write_text(text.replace(old, new))
        assert study.SPEC.read_text() != text
        study.main([])
        assert (fixed in study.PAGE.read_text()) is still
        assert ("seeds were **changed after** the first run" in study.PAGE.read_text()) is not still
    study.main([str(toy / "runs")])  # collected again: the runs began with the earlier file
    assert "seeds were **changed after** the first run" in study.PAGE.read_text()


def test_the_page_is_computed_from_the_results():
    assert study.PAGE.read_text(encoding="utf-8") == page(SPEC, read_json(study.RESULTS))


def test_numbers_in_the_prose_of_the_page_are_those_of_the_results():
    found, prose = read_json(study.RESULTS), " ".join(study.PAGE.read_text(encoding="utf-8").split())
    runs = {arm: [run for name, run in found["runs"].items() if name.rpartition("-")[0] == arm]
            for arm in SPEC["arms"]}
    seeds = {arm: [run["right"] for run in each] for arm, each in runs.items()}

    def mean_of(arm, part):
        return mean(study.percent(found, marks, part) for marks in seeds[arm])

    others = [arm for arm, it in SPEC["arms"].items() if it["stage"] == "grpo" and arm != "no_reasoning"
              and not it["data"].startswith("single")]
    assert len(others) == 21
    ends = [study.percent(found, marks, "all") for arm in others for marks in seeds[arm]]
    assert f"end at {math.floor(min(ends))} to {math.ceil(max(ends))} % in every seed" in prose
    for part, said in (("no_tool", "no tool"), ("single", "single calls"), ("two_calls", "two calls")):
        means = [mean_of(arm, part) for arm in others]
        assert f"{said} {min(means):.0f} to {max(means):.0f} %" in prose
    rl_less_sft = "({:+.1f} ± {:.1f} points)".format(*difference(found, seeds["rl"], seeds["right"]))
    assert f"between RL and SFT on reasoning and right calls {rl_less_sft}" in prose
    assert f"RL on single calls only at {mean_of('single', 'single'):.0f} % of single calls" in prose
    demo = read_json("tools/results/demo.json")["rows"]["all"]["grpo"]
    assert f"the demo's 60 steps end at {mean(demo):.0f} % of similar queries" in prose
    each = (f"{study.percent(found, marks, 'all'):.1f}" for marks in seeds["no_reasoning"])
    by_calls = (f"{study.percent(found, marks, 'all', study.CALLS_RIGHT):.1f}"
                for marks in seeds["no_reasoning"])
    assert f"the seeds differ ({', '.join(each)} %; by calls {', '.join(by_calls)} %)" in prose
    broken = [sum(mark == study.CALLS_RIGHT and "/no_tool" in query for mark, query in zip(
        seeds["no_reasoning"][seed], found["queries"], strict=True)) for seed in (0, 3, 4)]
    assert "{}, {} and {} replies of seeds 0, 3 and 4".format(*broken) in prose
    early, late = ([mean(run["sampled"][step][2] for run in runs[arm])
                    for arm in ("format", "format_names", "binary")] for step in ("000006", "000036"))
    assert "(step 6: {:.0f} and {:.0f} %, binary {:.0f} %)".format(*early) in prose
    assert "{:.0f} and {:.0f} % at the end (binary {:.0f} %)".format(*late) in prose


def test_runs_on_other_queries_are_not_compared(toy):
    spec = read_spec()
    (toy / "data").mkdir()
    (toy / "data/study.yaml").write_text(study.SPEC.read_text())
    for run, count in zip(spec["runs"], (2, 3), strict=False):
        (toy / run / "evals").mkdir(parents=True)
        for step in (0, 4):
            replies = [{"category": "values/single", "id": f"{i}/one", "reply": "", "answer": []}
                       for i in range(count)]
            (toy / run / f"evals/step_{step:06d}.json").write_text(
                json.dumps({"step": step, "replies": replies}))
        (toy / run / "metrics.jsonl").write_text('{"time/step_s": 60, "epoch": 1}\n')
        for name in ("hardware", "git_revision"):
            (toy / run / f"{name}.txt").write_text("text")
    with pytest.raises(ValueError, match="evaluated on other queries"):
        collect(spec, toy)
