"""tools/demo.py: the bars of its judge, the lazy teacher, a short run that must gain."""

import json
import random

import pytest

import train
from data import write_jsonl
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
    """Measured gains in points on values, paraphrases, tools and all: 43, 20, 45 and 36 with seed 0, which is
    used here; at least 36, 10, 38 and 28 with seeds 0 to 3. No right reply has more than 80 tokens."""
    write_jsonl(tmp_path / "train.jsonl", synthetic(400, 0, "train"))
    write_jsonl(tmp_path / "heldout.jsonl", synthetic(180, 0, "heldout"))
    train.main(["configs/demo.yaml", f"--out={tmp_path / 'run'}", f"--data.train={tmp_path / 'train.jsonl'}",
                f"--data.heldout={tmp_path / 'heldout.jsonl'}", "--train.steps=6", "--eval.every=6",
                "--train.prompts_per_step=12", "--rollout.max_new_tokens=80", "--eval.max_new_tokens=80"])
    before, after = demo.evaluations(tmp_path / "run")
    gains = {"values": 15, "paraphrases": 10, "tools": 15}
    for asked, found, passes in demo.judge(before, after, gains, 0)[:3]:
        assert passes, f"{asked}: {found}"
    assert after["all"] - before["all"] >= 15
