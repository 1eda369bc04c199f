"""tools/demo.py: the bars of its judge, its arms and intervals, the teacher, a short run that must gain."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

import train
from data import read_jsonl, write_jsonl
from reward import format_reply, score
from tools import demo, make_base
from tools.synthetic import synthetic

BEFORE = {
    "values": 40.0, "paraphrases": 30.0, "tools": 30.0, "values/single": 50.0, "values/two_calls": 10.0,
    "values/no_tool": 60.0, "tools/no_tool": 50.0,
}
AFTER = {
    "values": 92.0, "paraphrases": 70.0, "tools": 71.0, "values/single": 95.0, "values/two_calls": 85.0,
    "values/no_tool": 93.0, "tools/no_tool": 50.0,
}


def missed(after):
    found = demo.judge(BEFORE, after, {"values": 25, "paraphrases": 15, "tools": 15}, 75)
    return [asked for asked, _, passes in found if not passes]


def test_judge_passes_a_run_that_reaches_every_bar():
    assert missed(AFTER) == []


@pytest.mark.parametrize(
    ("category", "accuracy", "reason"),
    [
        ("values", 64.9, "25 points or more on new values"),
        ("paraphrases", 44.9, "15 points or more on new paraphrases"),
        ("tools", 44.9, "15 points or more on new tools"),
        ("values/two_calls", 74.9, "every kind of query reaches 75 %"),
        ("tools/no_tool", 49.9, "no kind of query is worse"),
    ],
)
def test_judge_misses_a_bar_that_is_missed_by_a_tenth(category, accuracy, reason):
    (only,) = missed({**AFTER, category: accuracy})
    assert reason in only


def test_judge_on_the_command_line_exits_1_where_a_bar_is_missed_and_0_where_none_is(tmp_path, capsys):
    (tmp_path / "evals").mkdir()
    for last, status in ((AFTER, 0), (BEFORE, 1)):
        for step, accuracies in ((0, BEFORE), (60, last)):
            rows = [{"category": name, "accuracy": x / 100} for name, x in accuracies.items()]
            file = tmp_path / "evals" / f"step_{step:06d}.json"
            file.write_text(json.dumps({"step": step, "rows": rows}))
        with pytest.raises(SystemExit) as stopped:
            demo.main(["judge", str(tmp_path)])
        assert stopped.value.code == status
        assert ("MISSED" in capsys.readouterr().out) == bool(status)


def test_judge_refuses_a_run_that_was_not_evaluated_twice(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["judge", str(tmp_path)])
    assert stopped.value.code == 2 and "0 evaluations" in capsys.readouterr().err


# ---- intervals, arms, tables


def test_student_s_t_is_that_of_the_tables():
    known = {1: 12.706, 2: 4.303, 8: 2.306, 9: 2.262, 13: 2.160, 20: 2.086, 60: 2.000}
    for degrees, t in known.items():
        assert demo.t_95(degrees) == pytest.approx(t, abs=1e-3), degrees


def write_run(folder, rights, steps=60, seconds=3.0):
    """A run folder with a first and a last evaluation; rights: [(frame, whether the reply is right)]."""
    (folder / "evals").mkdir(parents=True)
    for step, known in ((0, [(frame, False) for frame, _ in rights]), (steps, rights)):
        replies = [{"id": f"synthetic/heldout/0/{i}/{frame}", "category": f"{split}/single", "right": right}
                   for i, ((frame, right), split) in enumerate(
                       (each, split) for split in demo.GAINS for each in known)]
        share = sum(right for _, right in known) / len(known)
        names = [*demo.GAINS, *(f"{split}/single" for split in demo.GAINS), "all"]
        rows = [{"category": name, "accuracy": share} for name in names]
        (folder / "evals" / f"step_{step:06d}.json").write_text(
            json.dumps({"step": step, "rows": rows, "replies": replies}))
    (folder / "metrics.jsonl").write_text(json.dumps({"time/step_s": seconds * steps}) + "\n")


def test_interval_by_frame_takes_a_frame_for_one_observation():
    """Where all queries of a frame are answered alike, n queries of F frames say as much as F queries."""
    frames = [frame for frame in range(10) for _ in range(30)]
    spread = statistics.stdev(frame % 2 for frame in range(10))
    expected = demo.t_95(9) * spread / math.sqrt(10)
    assert demo.by_frame(frames, [frame % 2 == 0 for frame in frames]) == pytest.approx(expected)

    rng = random.Random(0)
    alone = 1.96 * math.sqrt(0.25 / 300)  # of 300 independent queries
    assert 0.5 * alone < demo.by_frame(frames, [rng.random() < 0.5 for _ in frames]) < 2 * alone < expected


def test_table_of_arms_has_the_paired_difference_between_grpo_and_right_replies():
    seeds = {"base": 50.0, **{arm: [60.0, 61.0, 62.0] for arm in demo.ARMS}, "grpo": [63.0, 65.0, 67.0]}
    rows = {split: {**seeds, "right": [60.0, 62.0, 64.0]} for split in (*demo.GAINS, "all")}
    *_, grpo, difference = demo.arms_table(rows).splitlines()
    assert grpo.split(" | ")[1] == "65.0 ± 5.0"
    assert difference.split(" | ")[1] == "+3.0 ± 0.0"  # the seeds scatter together


def test_replies_of_each_arm_are_those_that_it_names(tmp_path):
    examples = synthetic(200, 0, "train")
    write_jsonl(tmp_path / "train.jsonl", examples)
    shown = {arm: read_jsonl(demo.write_replies(tmp_path / "train.jsonl", arm))
             for arm in {kind for kind, *_ in demo.ARMS.values()}}
    assert shown["right"] == examples
    assert [e.answer for e in shown["calls"]] == [e.answer for e in examples]
    assert all(e.reasoning is None for e in shown["calls"])
    assert 0.3 < sum(a.answer == b.answer for a, b in zip(shown["lazy"], examples, strict=True)) / 200 < 0.7
    for each in shown.values():
        assert [e.messages for e in each] == [e.messages for e in examples]


def test_arms_train_from_the_base_of_the_run_for_its_minutes_or_its_queries(tmp_path, monkeypatch, capsys):
    run, started = tmp_path / "run", []
    write_run(run, [("one-1", True)], steps=60, seconds=2.0)
    write_jsonl(tmp_path / "train.jsonl", synthetic(40, 0, "train"))
    (run / "config.yaml").write_text(json.dumps({
        "seed": 5, "model": {"path": "assets/tiny"}, "train": {"steps": 60},
        "data": {"train": f"{tmp_path}/train.jsonl", "heldout": "runs/data/demo_heldout.jsonl"}}))

    def train_nothing(config):
        started.append(config)
        write_run(Path(config.out), [("one-1", False)])
        (Path(config.out) / "checkpoints" / "step_000060").mkdir(parents=True)

    monkeypatch.setattr(train, "train", train_nothing)
    demo.main(["control", str(run), "--arms", *demo.ARMS, "--eval.examples=30"])
    for c in started:
        assert c.seed == 5 and c.eval.examples == 30
    first, second = started[-2:]
    assert [c.stage for c in started] == ["sft"] * (len(started) - 1) + ["grpo"]
    assert [c.model.path for c in started[:-1]] == ["assets/tiny"] * (len(started) - 1)
    assert second.model.path == f"{first.out}/checkpoints/step_000060"
    assert first.train.max_minutes == second.train.max_minutes == pytest.approx(1.0)
    for (shown, amount, _), c in zip(demo.ARMS.values(), started, strict=False):
        assert c.data.train.endswith(f"train_{shown}.jsonl")
        assert c.train.max_minutes == {"minutes": 2.0, "queries": None, "half": 1.0}[amount]
        assert amount != "queries" or c.train.steps == 60
    assert "right_once" in capsys.readouterr().out

    demo.main(["control", str(run), "--eval.examples=30"])
    assert len(started) == len(demo.ARMS) + 1, "a finished arm was trained again"


def test_controls_see_the_queries_of_the_demo_step_for_step():
    demo_config, control = (train.load_config([f"configs/{name}.yaml"]) for name in ("demo", "demo_control"))
    assert control.train.prompts_per_step == demo_config.train.prompts_per_step
    assert control.model == demo_config.model and control.eval == demo_config.eval


# ---- the lazy teacher


def test_lazy_teacher_errs_as_often_as_it_says_and_never_writes_a_false_format():
    rng, examples = random.Random(0), synthetic(2500, 5, "train")
    taught = [make_base.lazy(example, rng) for example in examples]
    pairs = list(zip(examples, taught, strict=True))
    invented = [bool(new.answer) for old, new in pairs if not old.answer]
    dropped = [len(new.answer) == 1 for old, new in pairs if len(old.answer) == 2]
    assert sum(invented) / len(invented) == pytest.approx(make_base.INVENTS_CALL, abs=0.05)
    assert sum(dropped) / len(dropped) == pytest.approx(make_base.DROPS_CALL, abs=0.05)
    for size, rate in make_base.DROPS_ARGUMENT.items():
        short = [new.answer[0]["arguments"].keys() < old.answer[0]["arguments"].keys()
                 for old, new in pairs if old.answer and len(old.answer[0]["arguments"]) == size]
        assert sum(short) / len(short) == pytest.approx(rate, abs=0.05), size
    for old, new in pairs[:500]:
        verdict = score(format_reply(new.answer, new.reasoning), old.answer)
        assert verdict.format_ok and (verdict.reward == 1) == (new.answer == old.answer)


# ---- a run


def test_six_steps_of_grpo_gain_on_all_three_heldout_splits(tmp_path):
    """Measured gains in points on values, paraphrases, tools and all: 32, 20, 28 and 27 with seed 0, which is
    used here; at least 30, 18, 27 and 26 with seeds 0 to 3. No right reply has more than 82 tokens."""
    write_jsonl(tmp_path / "train.jsonl", synthetic(400, 0, "train"))
    write_jsonl(tmp_path / "heldout.jsonl", synthetic(180, 0, "heldout"))
    train.main(["configs/demo.yaml", f"--out={tmp_path / 'run'}", f"--data.train={tmp_path / 'train.jsonl'}",
                f"--data.heldout={tmp_path / 'heldout.jsonl'}", "--train.steps=6", "--eval.every=6",
                "--train.prompts_per_step=12", "--rollout.max_new_tokens=82", "--eval.max_new_tokens=82"])
    before, after = demo.evaluations(tmp_path / "run")
    gains = {"values": 15, "paraphrases": 10, "tools": 15}
    for asked, found, passes in demo.judge(before, after, gains, 0)[:3]:
        assert passes, f"{asked}: {found}"
    assert after["all"] - before["all"] >= 15
