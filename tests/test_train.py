"""train.py on a two-layer toy model: the optimizer updates of one step.

Plain SGD without momentum stands in for AdamW where the weights after a step shall show the gradient.
"""

import contextlib
import math

import pytest
import torch

from grpo import grpo_loss, pack
from model import ModelConfig, Qwen2, packed_attention
from sample import Rollout, generate
from train import grpo_updates, logprobs_of_pack, make_micro_batches, sft_updates

VOCAB = 32
STOP = 31
TEMPERATURE = 0.7
PROMPTS = [[3, 1, 4], [3, 1, 4], [1, 5, 9, 2, 6], [5]]
# Whatever was sampled: a group without spread (the second) among groups with it.
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
    return Qwen2(config).init_weights(seed)


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
    # Twice the same prompts and replies, so that the second update goes on where the first one went.
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
