"""train.py: the optimizer updates of one step, the schedules, whole runs, and what is refused.

Plain SGD without momentum replaces AdamW where the change of the weights is to show the gradient.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import short_run
import torch
import yaml
from short_run import limit_time, make_setting, pay_odd_lengths, refusal, shared_files

import model as model_module
import reward
import train
from configs.schema import Config
from data import Example, write_jsonl
from grpo import grpo_loss, make_micro_batches, pack
from model import ModelConfig, Transformer, load_hf, packed_attention
from sample import Rollout, generate
from tools.synthetic import synthetic
from train import grpo_updates, logprobs_of_pack, sft_updates

VOCAB = 32
STOP = 31
TEMPERATURE = 0.7
PROMPTS = [[3, 1, 4], [3, 1, 4], [1, 5, 9, 2, 6], [5]]
# For any rollouts: the second group has no spread, the others have.
ADVANTAGES = [[1.5, -0.5, -1.0], [0.0, 0.0, 0.0], [-0.7, 0.2, 0.5], [0.4, 0.6, -1.0]]


# GRPO updates.


def toy(seed=0):
    config = ModelConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.25,
    )
    return Transformer(config).init_weights(seed)


def sampled_rollouts(model):
    return generate(model, PROMPTS, 3, max_new_tokens=12, temperature=TEMPERATURE, stop_ids={STOP, 30, 29},
                    seeds_P=range(len(PROMPTS)), vocab_size=VOCAB)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def update(model, rollouts_N, adv_PG, lr=1.0, **changes):
    """(metrics, change of all weights) of `grpo_updates` with plain SGD and no clipping of the gradient."""
    settings = {
        "temperature": TEMPERATURE,
        "vocab_size": VOCAB,
        "updates": 1,
        "kl_coef": 0.0,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "grad_clip": 1e9,
        "micro_batch_tokens": 1000,
        "autocast": contextlib.nullcontext(),
        "reference": None,
        "optimizer": torch.optim.SGD(model.parameters(), lr),
    } | changes
    before = flat(model)
    reference, optimizer = settings.pop("reference"), settings.pop("optimizer")
    metrics = grpo_updates(model, reference, optimizer, rollouts_N, adv_PG, **settings)
    return metrics, flat(model) - before


def loss_of_plain_sequences(model, rollouts_N, adv_N):
    """The on-policy loss whose gradient is that of equation 3, reply by reply, over all reply tokens."""
    total = 0.0
    for rollout, advantage in zip(rollouts_N, adv_N, strict=True):
        ids = torch.tensor(rollout.prompt_ids + rollout.ids)
        hidden_TD = model(ids, torch.arange(len(ids)), packed_attention([0, len(ids)]))
        logits_LV = (hidden_TD @ model.head_weight().T)[len(rollout.prompt_ids) - 1:-1, :VOCAB]
        logp_LV = (logits_LV / TEMPERATURE).log_softmax(-1)
        total = total - advantage * logp_LV.gather(1, ids[len(rollout.prompt_ids):, None]).sum()
    return total / sum(len(rollout.ids) for rollout in rollouts_N)


def test_the_update_is_the_gradient_of_a_loop_over_plain_sequences():
    rollouts_N = sampled_rollouts(toy())
    model, adv_PG = toy().double(), torch.tensor(ADVANTAGES, dtype=torch.float64)
    loss_of_plain_sequences(model, rollouts_N, adv_PG.flatten().tolist()).backward()
    expected = -torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    metrics, change = update(model, rollouts_N, adv_PG)
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-9)


def test_the_first_mini_batch_is_on_policy():
    model = toy()
    metrics, _ = update(model, sampled_rollouts(model), torch.tensor(ADVANTAGES), updates=2, lr=0.5)
    assert metrics["ratio/dev_first"] == 0
    assert metrics["ratio/mean"] != 1.0  # the second one is not


def test_sampled_log_probs_equal_those_of_the_trainer():
    model = toy()
    metrics, _ = update(model, sampled_rollouts(model), torch.tensor(ADVANTAGES))
    assert 0 <= metrics["sampling/logp_diff_mean"] <= metrics["sampling/logp_diff_max"] < 1e-4


def test_on_policy_ratio_is_exactly_1_and_kl_0_at_temperature_0_7():
    # With nothing learned between the two updates all ratios stay 1, and a reference equal to the policy
    # is at no distance, exactly.
    model = toy()
    metrics, _ = update(model, sampled_rollouts(model), torch.tensor(ADVANTAGES), lr=0.0, updates=2,
                        kl_coef=0.1, reference=toy())
    assert metrics["ratio/max"] == metrics["ratio/min"] == 1.0
    assert metrics["ratio/log_abs_max"] == 0.0
    assert metrics["kl"] == 0.0


def test_the_second_mini_batch_moves_and_clips():
    model = toy()
    rollouts_N = sampled_rollouts(model)
    both = torch.tensor(ADVANTAGES)
    # The same prompts and replies twice, so that the second update moves further along the first one.
    metrics, _ = update(model, rollouts_N + rollouts_N, torch.cat([both, both]), updates=2, lr=3.0)
    assert metrics["updates"] == 2
    assert metrics["ratio/max"] > 1.28 and metrics["ratio/min"] < 0.8
    assert metrics["ratio/clip_low"] > 0 and metrics["ratio/clip_high"] > 0


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batches_change_neither_weights_nor_metrics(updates, kl_coef):
    results = []
    for micro_batch_tokens in (1000, 60, 33, 18):
        model = toy().double()
        reference = toy(1).double() if kl_coef else None
        results.append(update(model, sampled_rollouts(toy()), torch.tensor(ADVANTAGES, dtype=torch.float64),
                              updates=updates, kl_coef=kl_coef, reference=reference,
                              micro_batch_tokens=micro_batch_tokens))
    metrics, change = results[0]
    assert change.abs().max() > 1e-3
    for other_metrics, other_change in results[1:]:
        torch.testing.assert_close(other_change, change, rtol=1e-12, atol=1e-12)
        assert other_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-9)


def test_the_reference_is_gathered_once_a_step_and_dropped_before_the_first_gradient(monkeypatch):
    order, rollouts_N = [], sampled_rollouts(toy())
    reference, whole = toy(1), toy(1)
    unsharded, apply_update = train.sharding.unsharded, train.apply_update

    @contextlib.contextmanager
    def gathered(model, merged):
        assert model is reference and not merged
        order.append("gather")
        yield whole
        order.append("drop")

    def passes(model, *arguments):
        order.append("reference" if model is whole else "policy")

    monkeypatch.setattr(train.sharding, "unsharded", gathered)
    monkeypatch.setattr(train, "apply_update", lambda *arguments: order.append("update") or
                        apply_update(*arguments))
    whole.register_forward_pre_hook(passes)
    reference.register_forward_pre_hook(lambda *_: pytest.fail("the shards computed"))
    model = toy()
    model.register_forward_pre_hook(passes)
    settings = {"updates": 2, "kl_coef": 0.1, "reference": reference, "micro_batch_tokens": 40}
    found = update(model, rollouts_N, torch.tensor(ADVANTAGES), **settings)
    between = order[1:order.index("drop")]
    assert order[0] == "gather" and order.count("gather") == 1 and set(order[order.index("drop") + 1:]) == {
        "policy", "update"}
    assert between.count("reference") > between.count("policy") > 0, "old log-probs of the second update"
    monkeypatch.setattr(train.sharding, "unsharded", unsharded)
    expected = update(toy(), rollouts_N, torch.tensor(ADVANTAGES), **settings | {"reference": toy(1)})
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_groups_without_spread_are_left_out_but_stay_in_the_denominator():
    rollouts_N = sampled_rollouts(toy())
    adv_PG = torch.tensor(ADVANTAGES, dtype=torch.float64)
    part, = make_micro_batches(rollouts_N, adv_PG, [0, 2, 3], 1000, "cpu")
    assert part.pack.groups[1][0] == len(PROMPTS[2])

    _, change = update(toy().double(), rollouts_N, adv_PG)
    # All groups, the one without spread among them, in one pass.
    model = toy().double()
    tree = pack(PROMPTS, [[rollout.ids for rollout in rollouts_N[p:p + 3]] for p in range(0, 12, 3)])
    logp_L, _ = logprobs_of_pack(model, tree, TEMPERATURE, VOCAB, contextlib.nullcontext())
    loss, _ = grpo_loss(logp_L, logp_L.detach(), None, adv_PG.flatten()[tree.reply_L], clip_low=0.2,
                        clip_high=0.28, kl_coef=0.0, denominator=sum(len(r.ids) for r in rollouts_N))
    loss.backward()
    expected = -torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)


def test_with_a_kl_penalty_groups_without_spread_are_trained_on():
    adv_PG = torch.zeros(4, 3)
    _, change = update(toy(), sampled_rollouts(toy()), adv_PG, kl_coef=0.1, reference=toy(1))
    assert change.abs().max() > 0


def test_without_any_spread_nothing_moves_and_nothing_breaks():
    metrics, change = update(toy(), sampled_rollouts(toy()), torch.zeros(4, 3), updates=2)
    assert not change.any()
    assert metrics["loss"] == metrics["grad_norm"] == metrics["updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_each_rollout_meets_its_own_advantage_and_sampled_log_probs():
    rollouts_N = []
    for p in range(3):
        for i in range(4):
            length = 1 + (p + i) % 3
            rollouts_N.append(Rollout([p], [p + 1, i, STOP][:length], [float(p), float(i), 0.5][:length]))
    adv_PG = torch.arange(12.0).view(3, 4)
    for tokens in (4, 7, 100):
        parts = make_micro_batches(rollouts_N, adv_PG, [0, 2], tokens, "cpu")
        kept = [0, 1, 2, 3, 8, 9, 10, 11]
        together = [torch.cat(pieces).tolist() for pieces in zip(
            *[(part.pack.targets_L, part.adv_L, part.sampled_logp_L) for part in parts], strict=True)]
        assert together[0] == [token for i in kept for token in rollouts_N[i].ids]
        assert together[1] == [float(i) for i in kept for _ in rollouts_N[i].ids]
        assert together[2] == [logp for i in kept for logp in rollouts_N[i].logp]


@pytest.mark.parametrize("updates", [1, 2])
def test_the_logged_loss_is_that_of_the_whole_batch(updates):
    # On policy every ratio is 1: what is left is minus the mean advantage of a token.
    rollouts_N = sampled_rollouts(toy())
    adv_PG = torch.tensor(ADVANTAGES, dtype=torch.float64)
    metrics, _ = update(toy().double(), rollouts_N, adv_PG, lr=0.0, updates=updates, micro_batch_tokens=18)
    lengths_N = torch.tensor([len(rollout.ids) for rollout in rollouts_N])
    weighted_U = (adv_PG.flatten() * lengths_N).view(updates, -1).sum(1)
    expected = -(weighted_U / lengths_N.view(updates, -1).sum(1)).mean()
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-9)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    model = toy()
    rollouts_N = sampled_rollouts(model)
    adv_PG = torch.tensor(ADVANTAGES)
    accident_PG = adv_PG.clone()
    accident_PG[0, 1] = math.nan
    metrics, change = update(model, rollouts_N, accident_PG)
    assert (metrics["updates"], metrics["skipped_updates"]) == (1, 1)
    assert not change.any()
    # Nothing of it is left for the next update.
    assert all(parameter.grad is None for parameter in model.parameters())
    metrics, change = update(model, rollouts_N, adv_PG)
    assert metrics["skipped_updates"] == 0
    assert torch.equal(change, update(toy(), rollouts_N, adv_PG)[1])


def test_only_the_update_whose_gradient_is_not_finite_is_skipped():
    rollouts_N = sampled_rollouts(toy())
    accident_PG = torch.tensor(ADVANTAGES)
    accident_PG[0, 1] = math.inf
    metrics, change = update(toy(), rollouts_N, accident_PG, updates=2)
    assert (metrics["updates"], metrics["skipped_updates"]) == (2, 1)
    assert change.isfinite().all() and change.any()


def test_the_gradient_is_clipped_to_its_norm():
    rollouts_N = sampled_rollouts(toy())
    metrics, change = update(toy().double(), rollouts_N, torch.tensor(ADVANTAGES).double(), grad_clip=1e-3)
    assert metrics["grad_norm"] > 1e-3
    assert float(change.norm()) == pytest.approx(1e-3, rel=1e-4)


# Supervised updates.


def test_micro_batches_do_not_change_a_supervised_update():
    replies_P = [[4, 4, STOP], [6, 8, 2, 10, 12, STOP], [STOP], [7, 7, STOP]]
    results = []
    for micro_batch_tokens in (1000, 15, 11):
        model = toy().double()
        before = flat(model)
        metrics = sft_updates(model, torch.optim.SGD(model.parameters(), 1.0), PROMPTS, replies_P,
                              vocab_size=VOCAB, updates=2, grad_clip=1e9,
                              micro_batch_tokens=micro_batch_tokens, autocast=contextlib.nullcontext())
        results.append((metrics, flat(model) - before))
    for metrics, change in results[1:]:
        torch.testing.assert_close(change, results[0][1], rtol=1e-12, atol=1e-12)
        assert metrics == pytest.approx(results[0][0], rel=1e-12)


def test_a_gradient_or_a_loss_that_is_not_finite_leaves_weights_and_moments_alone():
    for gradient, loss in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf), (1.0, 1.0)):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], 0.1)
        weight.grad = torch.full((3,), gradient)
        _, skipped = train.apply_update(optimizer, 1.0, loss)
        moves = math.isfinite(gradient) and math.isfinite(loss)
        assert skipped == (not moves) and weight.grad is None
        assert torch.equal(weight, torch.ones(3)) == (not moves) and bool(optimizer.state) == moves


# Schedules.


@pytest.mark.parametrize("schedule, warmup, expected", [
    ("constant", 0.0, [1.0] * 10), ("constant", 0.2, [0.5] + [1.0] * 9)])
def test_constant_schedule_warms_up_and_stays(schedule, warmup, expected):
    rates = [train.learning_rate(step, 10, 1.0, schedule, warmup) for step in range(10)]
    assert rates == expected


def test_cosine_schedule_falls_from_the_peak_towards_a_tenth():
    rates = [train.learning_rate(step, 100, 2.0, "cosine", 0.1) for step in range(100)]
    assert rates[10] == 2.0 and 0.2 < rates[99] < 0.21
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_cosine_by_time_follows_the_steps_or_the_minutes_whichever_end_first():
    by_steps = [train.learning_rate(step, 100, 2.0, "cosine", 0.1) for step in range(101)]
    for step, time_share, same_as in ((10, 0, 10), (40, 0.2, 40), (20, 0.75, 75), (1, 0.05, 5), (9, 1, 100)):
        assert train.learning_rate(step, 100, 2.0, "cosine_time", 0.1, time_share) == by_steps[same_as]
    assert by_steps[100] == pytest.approx(0.2)


# Runs.

SCORE = reward.score
EXAMPLE = Example("1", "test", [{"name": "f"}], [{"role": "user", "content": "q"}], [])

limit = pytest.fixture(autouse=True)(limit_time)
setting = pytest.fixture(autouse=True)(make_setting)
files = pytest.fixture(scope="module")(shared_files)


def arguments(files, out, *more):
    """A short run of two updates a step: four steps, an evaluation and a checkpoint every second one."""
    return short_run.arguments(files, out, "--train.steps=4", "--eval.every=2", "--rollout.n=2",
                               "--log.rollouts_every=2", *more)


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "time" not in key and key != "tokens_per_s"}
            for line in lines]


@pytest.fixture(scope="module")
def whole_run(files, tmp_path_factory):
    """A run folder; what the run printed is in the file `printed` next to it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patches, contextlib.redirect_stdout(io.StringIO()) as printed:
        make_setting(patches)
        train.main(arguments(files, out))
    out.with_name("printed").write_text(printed.getvalue())
    return out


def test_run_folder_holds_what_the_readme_says(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert names == {"config.yaml", "git_revision.txt", "hardware.txt", "metrics.jsonl", "rollouts", "evals",
                     "checkpoints", "lock"}
    assert sorted(x.name for x in (whole_run / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    evaluations = sorted(x.name for x in (whole_run / "evals").iterdir())
    assert evaluations == [f"step_00000{i}.json" for i in (0, 2, 4)]
    rollouts = (whole_run / "rollouts/step_000002.jsonl").read_text().splitlines()
    assert len(rollouts) == 8 and {"query", "reply", "reward", "advantage"} <= json.loads(rollouts[0]).keys()


def test_every_logged_metric_is_explained_in_the_docs(whole_run):
    table = open("docs/metrics.md", encoding="utf-8").read()
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    explained = set()
    for line in lines:
        names = [name.strip(" `") for name in line.split("|")[1].split(",")]
        prefix = names[0].rpartition("/")[0]
        explained |= {name if "/" in name or not prefix else f"{prefix}/{name}" for name in names}
        if names[0].startswith("sampling/"):
            explained.add("sampling/logp_diff_max")
    logged = {key for line in metrics_of(whole_run) for key in line if not key.startswith("eval/")} - {"step"}
    assert logged <= explained, f"not in docs/metrics.md: {sorted(logged - explained)}"


def test_console_has_one_line_a_step_that_leads_with_reward_and_two_replies_an_evaluation(
        whole_run):
    lines = whole_run.with_name("printed").read_text().splitlines()
    steps = [line for line in lines if line.startswith("step ") and "tok/s" in line]
    assert len(steps) == 4 and all("  reward " in line and "left" in line for line in steps)
    assert steps[0].index("reward") < steps[0].index("length") < steps[0].index("kl 0.")
    assert sum(line.startswith("held-out accuracy at step") for line in lines) == 3
    assert sum(line.startswith("  asked") for line in lines) == 6


def test_activation_checkpointing_reaches_the_model_and_changes_no_metric(
        files, whole_run, tmp_path, monkeypatch):
    recomputed = []
    checkpoint = model_module.checkpoint
    monkeypatch.setattr(model_module, "checkpoint",
                        lambda *a, **k: recomputed.append(a) or checkpoint(*a, **k))
    train.main(arguments(files, tmp_path / "run", "--train.activation_checkpointing=true"))
    assert recomputed
    assert metrics_of(tmp_path / "run") == metrics_of(whole_run)


def test_training_moves_weights_only_where_replies_earned_differently(
        files, whole_run, tmp_path, monkeypatch, capsys):
    """With a reward that nothing earns, every group is flat and the policy must not move."""
    monkeypatch.setattr(reward, "score", SCORE)
    write_jsonl(tmp_path / "never.jsonl", [
        dataclasses.replace(example, answer=[{"name": example.tools[0]["name"], "arguments": {"never": 1}}])
        for example in synthetic(8, 0, "train")])
    out = tmp_path / "flat"
    train.main(arguments(files, out, f"--data.train={tmp_path / 'never.jsonl'}", "--train.steps=2",
                         "--grpo.kl_coef=0"))
    assert capsys.readouterr().out.count("  kl off  ") == 2
    before, after, moved = (load_hf(folder).state_dict() for folder in (
        files / "base", out / "checkpoints/step_000002", whole_run / "checkpoints/step_000002"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(before[name], moved[name]) for name in before)
    steps = [line for line in metrics_of(out) if "loss" in line]
    assert all(line["loss"] == 0 and line["updates"] == 0 and line["reward/all_zero"] == 1 for line in steps)


def test_sft_lowers_the_loss_and_keeps_only_so_many_checkpoints(files, tmp_path):
    out, data = tmp_path / "sft", tmp_path / "eight.jsonl"
    write_jsonl(data, synthetic(8, 0, "train"))  # the same batch in every step
    train.main(arguments(files, out, "--stage=sft", "--checkpoint.every=1", "--checkpoint.keep=2",
                         "--train.prompts_per_step=8", "--eval.every=100", f"--data.train={data}"))
    losses = [line["loss"] for line in metrics_of(out) if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [x.name for x in sorted((out / "checkpoints").iterdir())] == ["step_000003", "step_000004"]


def test_accuracy_is_measured_with_the_reward_of_training(files, tmp_path, monkeypatch):
    schemes = []

    def note_scheme(*arguments, scheme, **settings):
        schemes.append(scheme)
        return evaluate(*arguments, scheme=scheme, **settings)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", note_scheme)
    train.main(arguments(files, tmp_path / "run", "--train.steps=1", "--grpo.reward=partial_format"))
    assert schemes == ["partial_format"] * 2


def test_random_weights_need_a_config_and_a_tokenizer_only(files, tmp_path):
    shutil.copytree(files / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    words = arguments(files, tmp_path / "run", f"--model.path={tmp_path / 'base'}", "--model.init=random",
                      "--train.steps=2", "--train.updates_per_step=1", "--checkpoint.every=1")
    train.main(words)
    lines = metrics_of(tmp_path / "run")
    first = next(line for line in lines if "kl" in line)
    assert first["kl"] == 0, "policy and reference are the same draw"
    assert first["entropy"] > 6, "of 1,230 tokens, ln 1,230 = 7.1"
    shutil.rmtree(tmp_path / "run/checkpoints/step_000002")
    train.main(words)
    assert metrics_of(tmp_path / "run") == lines, "it resumes from what it had learned"
    again = load_hf(files / "base", seed=0).state_dict()
    fresh = Transformer(load_hf(files / "base").config).init_weights(0).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in fresh.items())


def test_a_run_that_its_minutes_end_anneals_by_time(files, tmp_path, monkeypatch):
    def log_step(self, step, *more):
        inside(self, step, *more)
        self.trained_s = 15.0 * step  # a clock

    inside = train.RunFolder.log_step
    monkeypatch.setattr(train.RunFolder, "log_step", log_step)
    train.main(arguments(files, tmp_path / "run", "--train.schedule=cosine_time", "--train.max_minutes=1",
                         "--train.steps=40", "--stage=sft"))
    rates = [line["lr"] for line in metrics_of(tmp_path / "run") if "lr" in line]
    assert rates == [train.learning_rate(step, 40, 0.01, "cosine", 0) for step in (0, 10, 20, 30)]


@pytest.mark.parametrize("every, ends, steps", [
    ("null", "false", []), ("null", "true", [0, 4]), ("3", "false", [3]), ("2", "false", [2]),
    ("2", "true", [0, 2, 4])])
def test_evaluations_in_between_and_at_the_ends_are_chosen_apart(files, tmp_path, capsys, every, ends, steps):
    train.main(arguments(files, tmp_path / "run", f"--eval.every={every}", f"--eval.ends={ends}",
                         "--stage=sft"))
    printed = capsys.readouterr().out
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "eval/all" in line] == steps
    assert ("held-out accuracy in percent" in printed) == bool(steps)
    assert f"run folder: {tmp_path / 'run'}" in printed


def test_a_run_sets_its_threads_and_prints_them_first(files, tmp_path, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for number in ("3", "null"):  # conftest.py sets OMP_NUM_THREADS, which null follows
        train.main(arguments(files, tmp_path / "run", f"--train.threads={number}", "--stage=sft"))
        assert capsys.readouterr().out.startswith("CPU: threads 1, usable cores ")
    assert chosen == [3]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_stdout_cannot_show_is_printed_as_an_escape(files, tmp_path, monkeypatch, encoding):
    examples = synthetic(6, 0, "heldout")
    for example in examples:
        example.messages[-1]["content"] += " \u2713 \U0001f600"
    write_jsonl(tmp_path / "odd.jsonl", examples)
    outs = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", outs[0])
    monkeypatch.setattr(sys, "stderr", outs[1])
    train.main(arguments(files, tmp_path / "run", f"--data.heldout={tmp_path / 'odd.jsonl'}", "--stage=sft"))
    with pytest.raises(SystemExit):
        train.main(arguments(files, tmp_path / "run", "--data.train=\u2713.jsonl"))
    printed, errors = (out.buffer.getvalue().decode(encoding) for out in outs)
    assert r" \u2713 \U0001f600" in printed and r"\u2713.jsonl" in errors
    assert (tmp_path / "run/checkpoints/step_000004").exists()


def test_help_prints_every_key_with_its_default(capsys):
    train.main(["--help"])
    printed = yaml.safe_load(capsys.readouterr().out.split(" Defaults:")[1])
    assert printed == dataclasses.asdict(Config())


# A reward that raises.


@pytest.mark.parametrize("paid", [math.nan, math.inf, "1", None])
def test_a_reward_that_is_no_finite_number_counts_as_a_reward_that_raised(monkeypatch, paid):
    monkeypatch.setattr(reward, "score", lambda *_: pay_odd_lengths("x", [], "")._replace(reward=paid))
    verdict = reward.judge(EXAMPLE, "x", "binary")
    assert verdict.reward == 0 and verdict.error.startswith("the reward raised ") and not verdict.format_ok


def test_a_reward_that_raises_costs_its_reply_the_reward_and_is_counted_and_saved(
        files, tmp_path, monkeypatch, capsys):
    class Odd(Exception):
        pass

    def raising(reply, answer, scheme):
        if len(reply) % 3 == 0:
            raise Odd("no\nsuch key")
        if len(reply) % 3 == 1:
            return None
        return pay_odd_lengths(reply, answer, scheme)

    monkeypatch.setattr(reward, "score", raising)
    out = tmp_path / "run"
    train.main(arguments(files, out, "--train.steps=3", "--rollout.n=8", "--log.rollouts_every=100"))
    printed = capsys.readouterr().out
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "loss" not in line:
            continue
        replies = [json.loads(text) for text in
                   (out / f"rollouts/step_{line['step']:06d}.jsonl").read_text().splitlines()]
        raised = [reply for reply in replies if (reply["error"] or "").startswith("the reward raised ")]
        assert len(raised) == line["reward/raised"] > 0 and all(reply["reward"] == 0 for reply in raised)
        errors = {reply["error"] for reply in raised}
        assert any("Odd: no such key" in error for error in errors)
        assert any("AttributeError" in error for error in errors), "what is no verdict raises too"
        assert f"warning: the reward raised on {len(raised)} replies" in printed
    assert len(list((out / "rollouts").iterdir())) == 3
    assert list((out / "evals").iterdir()), "an evaluation does not end either"


def test_an_interrupt_inside_the_reward_is_no_error_of_the_reward(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reward.judge(EXAMPLE, "", "binary")


# What is refused.


@pytest.mark.parametrize("change, words", [
    ("--data.train=missing.jsonl", "missing.jsonl"), ("--model.path=missing_folder/x", "missing_folder/x"),
    ("--train.prompts_per_step=100", "100"), ("--data.max_prompt_tokens=20", "prompts"),
    ("--data.system_prompt=none.txt", "none.txt"), ("--train.lrr=1", "train.lr"),
    ("--train.prompts_per_step=100", "train.prompts_per_step"), ("--out=README.md", "--out"),
    ("--out=README.md/run", "README.md"), ("--eval.max_new_tokens=2000", "eval.max_new_tokens")])
def test_bad_input_is_one_line_and_status_2(files, tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, tmp_path / "run", change))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_yaml_makes_no_objects(files, tmp_path, capsys):
    mark = tmp_path / "harmed"
    harm = f"!!python/object/apply:os.system ['touch {mark}']"
    (tmp_path / "c.yaml").write_text(f"seed: {harm}\n")
    for words in ([str(tmp_path / "c.yaml")], arguments(files, tmp_path / "run", f"--train.steps={harm}")):
        error, status = refusal(words, capsys)
        assert status == 2 and "not valid YAML" in error and not mark.exists()


def test_the_code_loads_no_pickle_and_no_unsafe_yaml():
    rooms = (".", "benchmarks", "configs", "converters", "fast", "runtime", "tools")
    for file in (file for room in rooms for file in Path(room).glob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load|\bpickle\b|full_load|unsafe|FullLoader|\byaml\.Loader", text), file
        assert set(re.findall(r"yaml\.load\((.*)\)", text)) <= {"text, StrictLoader"}, file


def test_an_index_that_leads_out_of_its_folder_is_refused(files, tmp_path, capsys):
    base = shutil.copytree(files / "base", tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../base/model.safetensors"}}))
    error, status = refusal(arguments(files, tmp_path / "run", f"--model.path={base}"), capsys)
    assert status == 2 and "'../base/model.safetensors', not a file of this folder" in error


def test_an_adapter_is_named_as_such_though_it_has_neither_config_nor_tokenizer(files, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    words = arguments(files, tmp_path / "run", f"--model.path={tmp_path / 'adapter'}")
    error, status = refusal(words, capsys)
    assert status == 2 and "adapter_config.json: a LoRA adapter without its model; merge" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, 7, 100, 10_000])
def test_truncated_weights_are_one_line(files, tmp_path, capsys, size):
    base = shutil.copytree(files / "base", tmp_path / "base")
    os.truncate(base / "model.safetensors", size)
    error, status = refusal(arguments(files, tmp_path / "run", f"--model.path={base}"), capsys)
    assert status == 2 and str(base / "model.safetensors") in error
    assert not (tmp_path / "run").exists()


# Dynamic sampling.


REFILL = ("--rollout.refill=3", "--rollout.n=2", "--train.prompts_per_step=2", "--train.updates_per_step=1",
          "--train.steps=5", "--checkpoint.every=1", "--grpo.kl_coef=0.1")


def cursors(out):
    """{step: examples drawn by then} of the checkpoints of a run."""
    return {int(folder.name[5:]): json.loads((folder / "training.json").read_text())["cursor"]
            for folder in (out / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def refilled(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("refilled") / "run"
    with pytest.MonkeyPatch.context() as patches:
        make_setting(patches)
        train.main(short_run.arguments(files, out, *REFILL))
    return out


def test_a_refilled_step_trains_on_groups_with_spread_and_draws_at_most_so_many_batches(refilled):
    drawn = cursors(refilled)
    batches = [(drawn[step] - drawn.get(step - 1, 0)) / 2 for step in sorted(drawn)]
    assert set(batches) <= {1, 2, 3, 4} and len(set(batches)) > 1
    for step in sorted(drawn):
        lines = [json.loads(line) for line in (
            refilled / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]
        rewards = [[line["reward"] for line in lines[i:i + 2]] for i in (0, 2)]
        assert len(lines) == 4
        assert all(len(set(group)) == 2 for group in rewards) or batches[step - 1] == 4
    steps = [line for line in metrics_of(refilled) if "loss" in line]
    # The shares are of all groups that were drawn.
    assert min(line["reward/live"] for line in steps) < 1 and steps[-1]["epoch"] == max(drawn.values()) / 8


def test_a_refilled_run_resumes_where_it_was_in_the_data(files, refilled, tmp_path):
    out = short_run.back_to(refilled, 2, tmp_path / "run")
    train.main(short_run.arguments(files, out, *REFILL))
    assert cursors(out) == cursors(refilled)
    assert metrics_of(out) == metrics_of(refilled)
    assert short_run.equal_weights(out / "checkpoints/step_000005",
                                   load_hf(refilled / "checkpoints/step_000005"))


def test_two_ranks_refill_with_the_same_prompts_as_one_and_sample_half_of_every_batch(
        files, refilled, tmp_path):
    def action(rank):
        generate = train.generate

        def noted(policy, prompts_P, **settings):
            with open(tmp_path / f"sampled{rank}", "a") as file:
                print(len(prompts_P), file=file)
            return generate(policy, prompts_P, **settings)

        train.generate = noted
        train.main(short_run.arguments(files, tmp_path / "run", *REFILL))

    statuses, texts = short_run.in_ranks(2, action, tmp_path / "log")
    assert statuses == [0, 0], texts
    batches = max(cursors(refilled).values()) // 2
    assert [(tmp_path / f"sampled{rank}").read_text() for rank in (0, 1)] == ["1\n" * batches] * 2
    assert cursors(tmp_path / "run") == cursors(refilled)
    ours, alone = (load_hf(out / "checkpoints/step_000005").state_dict()
                   for out in (tmp_path / "run", refilled))
    assert all(torch.allclose(ours[name], alone[name], atol=1e-4) for name in alone)
