"""runtime/metrics.py: statistics, shares of replies, diagnosis, console, trackers.

Merged statistics of losses: test_grpo.py too.
"""

import math
import sys
import types

import pytest
import torch
from short_run import HEALTHY

from reward import Verdict
from runtime import metrics
from runtime.metrics import (
    console_line,
    diagnose,
    merge_over_ranks,
    merge_stats,
    rollout_lines,
    rollout_metrics,
    sampler_stats,
    seconds_left,
)
from sample import Rollout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reward/commonest": 0.96}, "the policy has collapsed"),
        ({"reward/live": 0.0, "reward/all_one": 1.0, "reward/all_zero": 0.0}, "nothing is left to learn"),
        ({"reward/live": 0.0, "reward/all_one": 0.0, "reward/all_zero": 1.0}, "stage: sft"),
        ({"reward/live": 0.0, "reward/all_one": 0.2, "reward/all_zero": 0.8}, "nothing to reinforce"),
    ],
)
def test_the_reason_why_a_step_teaches_nothing_is_named_with_advice(changed, words):
    assert words in diagnose({**HEALTHY, **changed})


def test_a_healthy_step_and_a_step_of_supervised_learning_get_no_diagnosis():
    assert diagnose(HEALTHY) is None
    assert diagnose({"loss": 1.0}) is None


def test_a_wandb_run_is_resumed_by_the_id_in_its_folder_and_a_start_from_step_0_is_another_run(
        tmp_path, monkeypatch):
    begun = []
    run = types.SimpleNamespace(log=lambda metrics, step: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **settings: begun.append((settings["id"], settings["resume"])) or run))
    for step in (0, 40, 0, 10, 20):
        metrics.open_tracker("wandb", tmp_path, {}, step)
    ids = [name for name, _ in begun]
    assert ids[0] == ids[1] != ids[2] == ids[3] == ids[4] and {how for _, how in begun} == {"allow"}


def test_a_tracker_gets_every_metric_and_a_missing_package_is_one_line(tmp_path, monkeypatch):
    sent = []
    run = types.SimpleNamespace(log=lambda metrics, step: sent.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: run))
    metrics.open_tracker("wandb", tmp_path, {})(3, {"loss": 1.0})
    assert sent == [(3, {"loss": 1.0})]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="not installed; pip install wandb"):
        metrics.open_tracker("wandb", tmp_path, {})
    metrics.open_tracker("none", tmp_path, {})(3, {"loss": 1.0})


def test_statistics_are_merged_by_the_ends_of_their_names():
    parts = [{"loss": torch.tensor(x), "ratio_max": torch.tensor(x), "ratio_min": torch.tensor(x)}
             for x in (1.0, 3.0, 2.0)]
    merged = {"loss": 6.0, "ratio_max": 3.0, "ratio_min": 1.0}
    assert {name: float(x) for name, x in merge_stats(parts).items()} == merged
    assert merge_over_ranks(parts) == merged, "without other ranks"
    for place in range(4):
        spoiled = parts[:place] + [{name: torch.tensor(math.nan) for name in merged}] + parts[place:]
        assert all(math.isnan(x) for x in merge_over_ranks(spoiled).values())


def test_the_sampler_and_the_trainer_are_compared_and_a_part_without_tokens_adds_nothing():
    stats = sampler_stats(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.75]))
    stats = {name: float(x) for name, x in stats.items()}
    assert stats == {"entropy_sum": 3, "diff_sum": 0.75, "diff_max": 0.5}
    assert not any(sampler_stats(*[torch.empty(0)] * 3).values())


# Two prompts with two replies; the second group has no spread.
ROLLOUTS = [Rollout([1], [5, 6, 7], [-1.0] * 3, True), Rollout([1], [5], [-0.5], True),
            Rollout([2], [8, 9], [-2.0] * 2, False), Rollout([2], [8, 9], [-2.0] * 2, True)]
VERDICTS = [Verdict(1.0, True, True, True, [], None), Verdict(0.0, True, False, False, [{}], "names"),
            Verdict(0.0, False, False, False, None, "cut"),
            Verdict(0.0, False, False, False, None, "the reward raised X", raised=True)]
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 0.0]])


def test_shares_of_replies_and_of_groups_of_a_worked_example():
    assert rollout_metrics(ROLLOUTS, VERDICTS, REWARDS) == {
        "reward/mean": 0.25, "reward/live": 0.5, "reward/all_zero": 0.5, "reward/all_one": 0.0,
        "reward/format_ok": 0.5, "reward/names_ok": 0.25, "reward/no_calls": 0.25, "reward/raised": 1,
        "reward/commonest": 0.5, "length/mean": 2.0, "length/min": 1, "length/max": 3, "length/cut": 0.25}


def test_a_line_of_rollouts_holds_what_was_asked_written_and_earned():
    chat = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    examples = [types.SimpleNamespace(id=name, messages=[{"content": f"query {name}"}], answer=[])
                for name in "ab"]
    lines = list(rollout_lines(chat, examples, ROLLOUTS, VERDICTS, torch.tensor([[0.5, -0.5], [0.0, 0.25]])))
    assert [line["id"] for line in lines] == ["a", "a", "b", "b"]
    assert lines[3] == {
        "id": "b", "query": "query b", "answer": [], "reply": "8 9", "reward": 0.0,
        "error": "the reward raised X", "advantage": 0.25, "tokens": 2, "logp": -4.0, "finished": True}


def test_the_console_line_leads_with_the_reward_or_with_the_loss_of_supervised_learning():
    step = {"reward/mean": 0.25, "reward/all_zero": 0.5, "reward/all_one": 0.0, "length/mean": 2.0,
            "tokens_per_s": 1500.0, "loss": 0.5}
    assert console_line(7, 100, step, 61) == (
        "step   7/100  reward 0.250  all-0  50%  all-1   0%  length   2.0  kl off  1.5k tok/s  1:01 left")
    assert "  kl 0.0100  " in console_line(7, 100, {**step, "kl": 0.01}, 61)
    for rate, shown in ((37.2, "37"), (3.25, "3.2"), (0.0412, "0.041"), (712.0, "712"), (12_345.0, "12.3k")):
        assert f"  {shown} tok/s  " in console_line(7, 100, {**step, "tokens_per_s": rate}, 61)
    del step["reward/mean"]
    assert console_line(7, 8, step, 5) == "step 7/8  loss 0.5000  length   2.0  1.5k tok/s  0:05 left"


def test_the_time_left_is_that_of_the_steps_or_of_the_minutes_whichever_end_first():
    assert seconds_left([2.0, 4.0], 50, math.inf) == 150
    assert seconds_left([2.0, 4.0], 50, 20.9) == 20
    assert seconds_left([2.0, 4.0], 3, 20.9) == 9
    assert seconds_left([2.0, 4.0], 50, -0.5) == 0, "the last step took longer than was left"
