"""grpo.py against independent definitions: loops over the tokens of unpacked sequences, in fp64.

The toy model has two layers; 32 of its 37 vocabulary rows have a token.
"""

import math
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from data import Batches
from grpo import (
    choose_groups,
    group_advantages,
    grpo_loss,
    make_micro_batches,
    pack,
    pack_micro_batches,
    sft_loss,
    token_logprobs,
    token_logprobs_reference,
    token_weights,
)
from model import ModelConfig, Transformer, packed_attention, shared_prefix_attention
from runtime.metrics import merge_stats
from sample import Rollout

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 32
STOP = 31
TEMPERATURE = 0.7
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
# Uneven on purpose; the first two prompts are equal, and a prompt contains the stop id.
PROMPTS = [[3, 1, STOP, 5, 9], [3, 1, STOP, 5, 9], [7]]
REPLIES = [
    [[4, 4, STOP], [6, 8, 2, 10, STOP], [STOP]],
    [[12, STOP], [13, 14, 15, 16]],
    [[5, STOP], [STOP], [17, 18, 19, 20, 21, STOP], [22, 5, STOP]],
]
REWARDS = [[1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 1.0, 0.0, 0.2]]
FLAT_REPLIES = [reply for group in REPLIES for reply in group]
TOKENS = sum(map(len, FLAT_REPLIES))


def toy(seed=0, tied=False):
    config = ModelConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return Transformer(config).init_weights(seed).double()


def nearby(model, seed, scale):
    """A policy near `model`: every parameter moved by a little noise."""
    other = Transformer(model.config).double()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=scale)
    return other


def advantages_of_replies():
    return [a for group in REWARDS for a in group_advantages(torch.tensor([group]).double())[0].tolist()]


def logprobs_of_pack(model, part, temperature=TEMPERATURE):
    hidden_TD = model(part.tokens_T, part.positions_T, shared_prefix_attention(part.groups))
    return token_logprobs(
        hidden_TD[part.predictor_L], model.head_weight(), part.targets_L, temperature, VOCAB
    )[0]


def loss_of_packs(packs, models, kl_coef=0.05, advantages=None):
    """[(loss, stats)] of each pack; models: policy, old, reference."""
    adv_N = torch.tensor(advantages or advantages_of_replies(), dtype=torch.float64)
    parts = []
    for part in packs:
        logp_L, old_logp_L, ref_logp_L = (logprobs_of_pack(model, part) for model in models)
        parts.append(grpo_loss(logp_L, old_logp_L, ref_logp_L, adv_N[part.reply_L], **CLIP,
                               kl_coef=kl_coef, denominator=TOKENS))
    return parts


def gradient(loss, model):
    """The gradient of every parameter, as one flat vector."""
    model.zero_grad(set_to_none=False)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


def brute_force_logprobs(model, prompt, reply):
    """Log-probs of one reply, alone with its prompt, one token after the other."""
    ids = torch.tensor(prompt + reply)
    hidden_TD = model(ids, torch.arange(len(ids)), packed_attention([0, len(ids)]))
    logprobs = []
    for i, token in enumerate(reply):
        scores = model.head_weight()[:VOCAB] @ hidden_TD[len(prompt) + i - 1] / TEMPERATURE
        logprobs.append(scores[token] - scores.exp().sum().log())
    return logprobs


def brute_force_loss(models, kl_coef):
    """Equation 3, token by token, in Python."""
    total, kinds = 0.0, set()
    groups = [(prompt, reply) for prompt, group in zip(PROMPTS, REPLIES, strict=True) for reply in group]
    for (prompt, reply), advantage in zip(groups, advantages_of_replies(), strict=True):
        policy, old, reference = (brute_force_logprobs(model, prompt, reply) for model in models)
        for new, before, anchor in zip(policy, old, reference, strict=True):
            ratio = torch.exp(new - before.detach())
            kept = min(max(ratio.item(), 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
            if ratio.item() * advantage <= kept * advantage:
                total = total - ratio * advantage
                kinds.add("plain")
            else:
                total = total - kept * advantage
                kinds.add("clipped low" if kept < 1 else "clipped high")
            difference = anchor.detach() - new
            total = total + kl_coef * (torch.exp(difference) - difference - 1)
    return total / sum(len(reply) for group in REPLIES for reply in group), kinds


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def small_loss(logp, old, adv, ref=None, kl_coef=0.0, dtype=torch.float64):
    """(loss, stats, gradient of logp_L) of a few tokens, denominator 1."""
    old_logp_L, adv_L = torch.tensor(old, dtype=dtype), torch.tensor(adv, dtype=dtype)
    ref_logp_L = None if ref is None else torch.tensor(ref, dtype=dtype)
    logp_L = torch.tensor(logp, dtype=dtype, requires_grad=True)
    loss, stats = grpo_loss(logp_L, old_logp_L, ref_logp_L, adv_L, **CLIP, kl_coef=kl_coef, denominator=1)
    loss.backward()
    return loss.detach(), stats, logp_L.grad


# Advantages.


def test_advantages_of_a_worked_example():
    # Mean 1/5; the unbiased variance is (0.8² + 4 · 0.2²) / 4 = 1/5.
    adv_PG = group_advantages(torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64))
    std = math.sqrt(0.2) + 1e-6
    close(adv_PG, torch.tensor([[0.8 / std] + [-0.2 / std] * 4], dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_standard_deviation_is_unbiased_and_1e_6_is_added_to_it(scale):
    rewards = [[scale * x for x in row] for row in ([0.3, 0.1, 0.9], [1.0, 0.0, 0.0])]
    expected = [
        [(x - statistics.mean(row)) / (statistics.stdev(row) + 1e-6) for x in row] for row in rewards
    ]
    adv_PG = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    close(adv_PG, torch.tensor(expected, dtype=torch.float64), 1e-9)


def test_without_normalization_advantages_are_only_centred():
    adv_PG = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.2, 0.2, 1.0]]), normalize="none")
    close(adv_PG, torch.tensor([[0.5, -0.5, -0.5, 0.5], [-0.2, -0.2, -0.2, 0.6]]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["std", "none"])
@pytest.mark.parametrize("reward, size", [(0.2, 5), (0.1 + 0.2, 5), (0.7, 3), (1 / 3, 7), (1.0, 5), (0.0, 2)])
def test_equal_rewards_give_advantages_of_exactly_zero(reward, size, normalize, dtype):
    rewards_PG = torch.tensor([[reward] * size, [1.5] + [0.2] * (size - 1)], dtype=dtype)
    adv_PG = group_advantages(rewards_PG, normalize)
    assert adv_PG[0].tolist() == [0.0] * size
    assert adv_PG[1].all()
    assert adv_PG.dtype == dtype


@pytest.mark.parametrize("accident", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_silences_its_own_group_only(accident):
    rewards = [[1.0, 0.0, 0.0], [1.0, accident, 0.0], [accident] * 3, [0.0, 1.0, 1.0]]
    adv_PG = group_advantages(torch.tensor(rewards))
    assert adv_PG[1:3].tolist() == [[0.0] * 3] * 2
    close(adv_PG[[0, 3]], group_advantages(torch.tensor([rewards[0], rewards[3]])), 0)
    assert adv_PG[[0, 3]].all()


@pytest.mark.parametrize("shape", [(4, 1), (4, 0), (4,), (2, 2, 2)])
def test_a_group_of_one_is_refused(shape):
    with pytest.raises(ValueError, match="G >= 2"):
        group_advantages(torch.zeros(shape))


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="'std' or 'none'"):
        group_advantages(torch.zeros(1, 2), "mean")


def test_whole_numbers_are_rewards_too():
    close(group_advantages(torch.tensor([[1, 0, 0]])), group_advantages(torch.tensor([[1.0, 0.0, 0.0]])), 0)


def test_permuting_rollouts_and_groups_permutes_advantages():
    generator = torch.Generator().manual_seed(0)
    rewards_PG = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    rows, columns = torch.tensor([2, 5, 0, 1, 4, 3]), torch.tensor([3, 0, 4, 1, 2])
    permuted_PG = group_advantages(rewards_PG[rows][:, columns])
    close(permuted_PG, group_advantages(rewards_PG)[rows][:, columns])


def test_permuting_rollouts_with_their_rewards_changes_neither_loss_nor_gradient():
    models = toy(0), nearby(toy(0), 1, 0.03), nearby(toy(0), 2, 0.03)
    advantages = advantages_of_replies()
    by_group, rest = [], iter(advantages)
    for group in REPLIES:
        by_group.append([(reply, next(rest)) for reply in group])
    groups = list(zip(PROMPTS, by_group, strict=True))
    results = []
    for seed in (None, 1, 2):
        shuffled = [(prompt, list(pairs)) for prompt, pairs in groups]
        if seed is not None:
            order = random.Random(seed)
            order.shuffle(shuffled)
            for _, pairs in shuffled:
                order.shuffle(pairs)
        tree = pack([prompt for prompt, _ in shuffled], [[r for r, _ in pairs] for _, pairs in shuffled])
        permuted = [advantage for _, pairs in shuffled for _, advantage in pairs]
        assert (permuted == advantages) == (seed is None)
        (loss, _), = loss_of_packs([tree], models, advantages=permuted)
        results.append((loss.detach(), gradient(loss, models[0])))
    for loss, grad in results[1:]:
        close(loss, results[0][0])
        close(grad, results[0][1])


# Dynamic sampling.


def rewards_of(kinds):
    """Two rewards a group: "+" with spread, "0" and "1" equal, "?" not finite."""
    return torch.tensor([{"+": [1.0, 0.0], "0": [0.0, 0.0], "1": [1.0, 1.0], "?": [math.nan, 1.0]}[kind]
                         for kind in kinds])


@pytest.mark.parametrize("kinds, wanted, may_draw, expected", [
    ("+++", 3, True, [0, 1, 2]),
    ("0+1", 3, True, None),
    ("0+1", 3, False, [0, 1, 2]),             # no further batch: the step is as it was drawn
    ("0+1" "+0+", 3, True, [1, 3, 5]),
    ("0+1" "+++", 3, True, [1, 3, 4]),      # the first ones; the last is not needed
    ("0+1" "10+", 3, True, None),
    ("0+1" "10+", 3, False, [0, 1, 5]),       # the first group without spread has the place left, in order
    ("1?0" "0+1", 3, False, [0, 1, 4]),       # rewards that are not finite are no spread
    ("???" "000", 3, False, [0, 1, 2]),
])
def test_a_step_takes_the_first_groups_with_spread_in_the_order_drawn(kinds, wanted, may_draw, expected):
    assert choose_groups(rewards_of(kinds), wanted, may_draw) == expected


def test_fewer_groups_than_a_step_has_are_refused():
    with pytest.raises(AssertionError, match="fewer groups"):
        choose_groups(rewards_of("++"), 3, False)


def refilled_steps(batches, steps, most):
    """For each step the examples that are kept, and the cursor after it. An example is its own reward."""
    for _ in range(steps):
        drawn, kept = [], None
        while kept is None:
            drawn += next(batches)
            kept = choose_groups(rewards_of(drawn), batches.size, len(drawn) < most * batches.size)
        yield [(drawn[p], p) for p in kept], batches.cursor


def test_refilled_steps_resume_exactly_from_the_cursor_that_was_saved():
    examples = list("0+10+0+1100+1+0")
    undisturbed = list(refilled_steps(Batches(examples, 3, seed=5), 12, most=3))
    cursors = [cursor for _, cursor in undisturbed]
    assert {b - a for a, b in zip([0, *cursors], cursors, strict=False)} == {3, 6, 9}  # some steps draw more
    assert min(sum(kind == "+" for kind, _ in kept) for kept, _ in undisturbed) < 3  # some reach the maximum
    for done in range(1, 12):
        resumed = Batches(examples, 3, seed=5, cursor=cursors[done - 1])
        assert list(refilled_steps(resumed, 12 - done, most=3)) == undisturbed[done:]


# Packs.


def test_pack_of_a_worked_example():
    tree = pack([[1, 2, 3], [8]], [[[4, 5], [6]], [[9]]], first_reply=10)
    assert tree.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert tree.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert tree.groups == [(3, [2, 1]), (1, [1])]
    # The prompt's last position, index 2, predicts the first token of both replies.
    assert tree.predictor_L.tolist() == [2, 3, 2, 6]
    assert tree.targets_L.tolist() == [4, 5, 6, 9]
    assert tree.reply_L.tolist() == [10, 10, 11, 12]


def test_an_empty_prompt_or_reply_is_no_pack():
    with pytest.raises(AssertionError, match="empty"):
        pack([[]], [[[1]]])
    with pytest.raises(AssertionError, match="empty"):
        pack([[1]], [[[2], []]])


def test_groups_with_equal_prompts_stay_apart():
    together, = pack_micro_batches(PROMPTS, REPLIES, 1000)
    assert [len(replies) for _, replies in together.groups] == [3, 2, 4]
    assert torch.equal(together.reply_L, pack(PROMPTS, REPLIES).reply_L)


def test_a_pack_moves_to_a_device_with_all_its_tensors():
    moved = pack(PROMPTS, REPLIES).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(tensor.is_meta for tensor in tensors)
    assert moved.groups == pack(PROMPTS, REPLIES).groups


@pytest.mark.parametrize("max_tokens", [11, 12, 16, 17, 24, 30, 1000])
def test_micro_batches_hold_every_reply_once_in_order_with_its_prompt(max_tokens):
    packs = pack_micro_batches(PROMPTS, REPLIES, max_tokens)
    assert all(len(part.tokens_T) <= max_tokens for part in packs)
    prompts = [prompt for prompt, group in zip(PROMPTS, REPLIES, strict=True) for _ in group]
    seen = []
    for part in packs:
        tokens, start = part.tokens_T.tolist(), 0
        for prompt_length, reply_lengths in part.groups:
            prompt = tokens[start:start + prompt_length]
            start += prompt_length
            for length in reply_lengths:
                assert prompt == prompts[len(seen)]
                seen.append(tokens[start:start + length])
                start += length
        assert start == len(tokens)
    assert seen == FLAT_REPLIES
    assert torch.cat([part.targets_L for part in packs]).tolist() == sum(FLAT_REPLIES, [])
    owner = [i for i, reply in enumerate(FLAT_REPLIES) for _ in reply]
    assert torch.cat([part.reply_L for part in packs]).tolist() == owner


@pytest.mark.parametrize("max_tokens", [11, 12, 16, 17, 24, 30])
def test_no_reply_is_split_between_micro_batches(max_tokens):
    packs = pack_micro_batches(PROMPTS, REPLIES, max_tokens)
    assert len(packs) > 1
    lengths = [Counter(part.reply_L.tolist()) for part in packs]
    assert sum(map(len, lengths)) == len(FLAT_REPLIES)
    assert dict(sum(lengths, Counter())) == {i: len(reply) for i, reply in enumerate(FLAT_REPLIES)}


def test_a_group_is_cut_only_where_it_is_longer_than_a_micro_batch():
    prompts, replies = [[1] * 4] * 3, [[[2] * 3] * 2] * 3
    assert [part.groups for part in pack_micro_batches(prompts, replies, 25)] == [
        [(4, [3, 3])] * 2,
        [(4, [3, 3])],
    ]
    assert [part.groups for part in pack_micro_batches(prompts[:1], replies[:1], 9)] == [[(4, [3])]] * 2


def test_a_reply_too_long_for_a_micro_batch_is_an_error_that_names_the_remedy():
    pack_micro_batches([[1, 2]], [[[3, 4, 5]]], 5)
    with pytest.raises(ValueError, match="prompt of 2 and a reply of 3 .* 4 tokens .*micro_batch_tokens"):
        pack_micro_batches([[1, 2]], [[[3, 4, 5]]], 4)


# Loss and gradient against the definition.


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_equal_a_loop_over_the_tokens_of_unpacked_sequences(tied):
    model = toy(0, tied)
    models = model, nearby(model, 1, 0.05), nearby(model, 2, 0.05)
    expected, kinds = brute_force_loss(models, kl_coef=0.05)
    assert kinds == {"plain", "clipped low", "clipped high"}  # else the case would show little
    (loss, _), = loss_of_packs([pack(PROMPTS, REPLIES)], models)
    close(loss, expected)
    close(gradient(loss, model), gradient(expected, model))


def test_a_tree_equals_plain_sequences_in_loss_and_gradient():
    model = toy(0)
    prompts = [prompt for prompt, group in zip(PROMPTS, REPLIES, strict=True) for _ in group]
    tree, plain = pack(PROMPTS, REPLIES), pack(prompts, [[reply] for reply in FLAT_REPLIES])
    lengths = [len(prompt) + len(reply) for prompt, reply in zip(prompts, FLAT_REPLIES, strict=True)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    hidden_TD = model(plain.tokens_T, plain.positions_T, packed_attention(bounds))
    plain_logp_L, _ = token_logprobs(hidden_TD[plain.predictor_L], model.head_weight(), plain.targets_L,
                                     TEMPERATURE, VOCAB)
    adv_L = torch.tensor(advantages_of_replies(), dtype=torch.float64)[plain.reply_L]
    losses = []
    for logp_L in (logprobs_of_pack(model, tree), plain_logp_L):
        losses.append(grpo_loss(logp_L, plain_logp_L.detach() - 0.1, None, adv_L, **CLIP, kl_coef=0,
                                denominator=TOKENS)[0])
    close(losses[0], losses[1])
    close(gradient(losses[0], model), gradient(losses[1], model))


@pytest.mark.parametrize("max_tokens", [11, 12, 16, 17, 24, 30])
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(max_tokens):
    model = toy(0)
    models = model, nearby(model, 1, 0.05), nearby(model, 2, 0.05)
    (whole, whole_stats), = loss_of_packs([pack(PROMPTS, REPLIES)], models)
    packs = pack_micro_batches(PROMPTS, REPLIES, max_tokens)
    parts = loss_of_packs(packs, models)
    assert len(parts) > 1
    # The small sizes cut a group in parts that repeat its prompt.
    assert (sum(len(part.groups) for part in packs) > len(PROMPTS)) == (max_tokens < 16)
    close(sum(loss for loss, _ in parts), whole)
    close(gradient(sum(loss for loss, _ in parts), model), gradient(whole, model))
    merged = merge_stats([stats for _, stats in parts])
    assert merged.keys() == whole_stats.keys()
    for name in merged:
        close(merged[name], whole_stats[name])


def test_the_logged_loss_is_the_sum_that_was_differentiated():
    model = toy(0)
    models = model, nearby(model, 1, 0.05), nearby(model, 2, 0.05)
    parts = loss_of_packs(pack_micro_batches(PROMPTS, REPLIES, 12), models)
    logged = merge_stats([stats for _, stats in parts])["loss"]
    close(logged, sum(loss for loss, _ in parts).detach())
    close(logged, brute_force_loss(models, 0.05)[0].detach())
    assert abs(logged.item() - parts[-1][0].item()) > 1e-3


def test_changing_a_token_changes_only_its_own_log_prob_and_later_ones():
    model = toy(0)
    prompt, replies = PROMPTS[0], [[4, 4, 9, STOP], [6, 8, 2, 10, STOP], [1, 2]]
    with torch.no_grad():
        before_L = logprobs_of_pack(model, pack([prompt], [replies]))
        for i in range(5):
            changed = [replies[0], replies[1][:i] + [20] + replies[1][i + 1:], replies[2]]
            moved_L = (logprobs_of_pack(model, pack([prompt], [changed])) - before_L).abs() > 1e-9
            assert moved_L.tolist() == [False] * (4 + i) + [True] * (5 - i) + [False] * 2


def test_stop_token_receives_gradient():
    model = toy(0)
    tree = pack(PROMPTS, REPLIES)
    hidden_LD = model(tree.tokens_T, tree.positions_T, shared_prefix_attention(tree.groups))[tree.predictor_L]
    logp_L, _ = token_logprobs(hidden_LD, model.head_weight(), tree.targets_L, TEMPERATURE, VOCAB)
    adv_L = torch.tensor(advantages_of_replies(), dtype=torch.float64)[tree.reply_L]
    loss, _ = grpo_loss(logp_L, logp_L.detach(), None, adv_L, **CLIP, kl_coef=0, denominator=TOKENS)
    slope_LD, slope_L = torch.autograd.grad(loss, (hidden_LD, logp_L))
    stops = (tree.targets_L == STOP).nonzero()[:, 0].tolist()
    assert len(stops) == 8
    for i in stops:
        close(slope_L[i], -adv_L[i] / TOKENS)
        assert slope_LD[i].all()


# Ratio and clipping.


def test_after_an_update_the_ratio_moves_and_clips_on_both_sides():
    model = toy(0)
    tree = pack(PROMPTS, REPLIES)
    adv_L = torch.tensor(advantages_of_replies(), dtype=torch.float64)[tree.reply_L]
    with torch.no_grad():
        old_logp_L = logprobs_of_pack(model, tree)
    first, _ = grpo_loss(logprobs_of_pack(model, tree), old_logp_L, None, adv_L, **CLIP, kl_coef=0,
                         denominator=TOKENS)
    first.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=2.0)
    _, stats = grpo_loss(logprobs_of_pack(model, tree), old_logp_L, None, adv_L, **CLIP, kl_coef=0,
                         denominator=TOKENS)
    assert stats["ratio_max"] > 1.28 and stats["ratio_min"] < 0.8
    assert stats["clip_low_sum"] > 0 and stats["clip_high_sum"] > 0


@pytest.mark.parametrize("ratio, adv, objective, slope, low, high", [
    (1.0, 2.0, 2.0, 2.0, 0, 0),
    (1.2, 2.0, 2.4, 2.4, 0, 0),
    (1.5, 2.0, 2.56, 0.0, 0, 1),    # raised enough: no reason to raise it more
    (0.5, 2.0, 1.0, 1.0, 0, 0),     # fell by accident: raising it is never clipped
    (0.5, -2.0, -1.6, 0.0, 1, 0),   # lowered enough
    (1.5, -2.0, -3.0, -3.0, 0, 0),  # rose by accident: lowering it is never clipped
    (1.5, 0.0, 0.0, 0.0, 0, 0),
])
def test_the_clip_takes_the_lower_objective_and_stops_its_gradient(ratio, adv, objective, slope, low, high):
    loss, stats, grad_L = small_loss([-1 + math.log(ratio)], [-1.0], [adv])
    close(loss, torch.tensor(-objective).double(), 1e-7)
    close(grad_L, torch.tensor([-slope]).double(), 1e-7)
    assert (int(stats["clip_low_sum"]), int(stats["clip_high_sum"])) == (low, high)


def test_statistics_of_a_worked_example():
    logp, old = [-1.0, -1 + math.log(1.5), -1 + math.log(0.5), -3.0], [-1.0, -1.0, -1.0, -2.0]
    _, stats, _ = small_loss(logp, old, [1.0, 1.0, -1.0, 1.0], ref=[-1.0] * 4, kl_coef=0.1)
    expected = {
        "tokens": 4,
        "ratio_sum": 1 + 1.5 + 0.5 + math.exp(-1),
        "ratio_max": 1.5,
        "ratio_min": math.exp(-1),
        "clip_low_sum": 1,
        "clip_high_sum": 1,
        "log_ratio_abs_max": 1.0,
        "kl_sum": sum(math.exp(-1 - x) - (-1 - x) - 1 for x in logp),
    }
    expected["loss"] = -(1 + 1.28 - 0.8 + math.exp(-1)) + 0.1 * expected["kl_sum"]
    assert {name: float(value) for name, value in stats.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in stats.values())


def test_old_and_reference_log_probs_receive_no_gradient():
    old_L, ref_L = torch.full((2, 3), -1.0, requires_grad=True).unbind(0)
    logp_L = torch.full((3,), -1.1, requires_grad=True)
    loss, _ = grpo_loss(logp_L, old_L, ref_L, torch.ones(3), **CLIP, kl_coef=0.5, denominator=3)
    assert torch.autograd.grad(loss, (logp_L, old_L, ref_L), allow_unused=True)[1:] == (None, None)


@pytest.mark.parametrize("logp, old", [(0.0, -1000.0), (-1000.0, 0.0)])
@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_the_log_ratio_is_clamped_at_20_and_its_largest_size_logged(logp, old, adv):
    loss, stats, grad_L = small_loss([logp], [old], [adv], ref=[old], kl_coef=0.1, dtype=torch.float32)
    assert loss.isfinite() and grad_L.isfinite().all()
    assert float(stats["ratio_max"]) == pytest.approx(math.exp(math.copysign(20, logp - old)), rel=1e-5)
    assert float(stats["kl_sum"]) <= math.exp(20)
    assert float(stats["log_ratio_abs_max"]) == 1000.0


# KL.


def test_kl_is_exactly_zero_where_the_reference_is_the_policy():
    values = [-0.3, -1e-9, -17.0, 0.0, -1 / 3]
    loss, stats, grad_L = small_loss(values, values, [0.0] * 5, ref=values, kl_coef=1.0, dtype=torch.float32)
    assert float(loss) == float(stats["kl_sum"]) == 0.0
    assert grad_L.tolist() == [0.0] * 5


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_keeps_its_digits_near_zero(size, sign):
    d = float(torch.tensor(-sign * size, dtype=torch.float32))
    # exp(d) - d - 1 as its series, which cancels nothing.
    exact = math.fsum(d**n / math.factorial(n) for n in range(2, 20))
    logp, ref = (0.0, d) if d < 0 else (-d, 0.0)
    _, stats, _ = small_loss([logp], [0.0], [0.0], ref=[ref], kl_coef=1.0, dtype=torch.float32)
    assert float(stats["kl_sum"]) == pytest.approx(exact, rel=1e-6, abs=abs(d) * 2**-23)


def test_k3_is_never_negative():
    for size in torch.logspace(-12, 1.2, 200).tolist():
        for d in (size, -size):
            _, stats, _ = small_loss([0.0], [0.0], [0.0], ref=[d], kl_coef=1.0, dtype=torch.float32)
            assert float(stats["kl_sum"]) >= 0


def test_a_kl_penalty_without_a_reference_is_refused():
    with pytest.raises(AssertionError, match="reference"):
        small_loss([-1.0], [-1.0], [1.0], kl_coef=0.1)


def test_the_kl_is_logged_but_not_differentiated_at_coefficient_zero():
    _, stats, grad_L = small_loss([-1.0], [-1.0], [0.0], ref=[-2.0])
    assert float(stats["kl_sum"]) == pytest.approx(math.exp(-1))
    assert grad_L.tolist() == [0.0]


# Denominators and empty parts.


def test_the_denominator_is_the_given_one_whatever_the_part_holds():
    logp_L = torch.tensor([-1.0, -2.0])
    for denominator in (2, 7, 1000):
        loss, stats = grpo_loss(logp_L, logp_L, None, torch.tensor([1.0, 2.0]), **CLIP, kl_coef=0,
                                denominator=denominator)
        assert float(loss) == pytest.approx(-3 / denominator)
        assert float(stats["tokens"]) == 2


def test_log_probs_and_loss_live_on_the_same_tokens():
    tree = pack(PROMPTS, REPLIES)
    assert len(tree.predictor_L) == len(tree.targets_L) == len(tree.reply_L) == TOKENS
    model = toy(0)
    (_, stats), = loss_of_packs([tree], (model,) * 3)
    assert int(stats["tokens"]) == TOKENS


def test_a_part_without_tokens_is_a_finite_zero_with_a_graph():
    weight = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    hidden_LD = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    no_tokens = torch.zeros(0, dtype=torch.int64)
    logp_L, entropy_L = token_logprobs(hidden_LD[no_tokens], weight, no_tokens, TEMPERATURE)
    loss, stats = grpo_loss(logp_L, logp_L.detach(), logp_L.detach(), entropy_L, **CLIP, kl_coef=0.1,
                            denominator=5)
    for empty_loss in (loss, sft_loss(logp_L, 5)):
        assert float(empty_loss.detach()) == 0.0
        grads = torch.autograd.grad(empty_loss, (hidden_LD, weight), retain_graph=True)
        assert not grads[0].any() and not grads[1].any()
    assert float(stats["tokens"]) == 0.0
    assert all(value.isfinite() for value in stats.values())


def test_a_part_without_tokens_changes_no_statistic_of_the_others():
    for ratio in (0.9, 1.1):
        _, stats, _ = small_loss([-1 + math.log(ratio)], [-1.0], [1.0])
        _, empty, _ = small_loss([], [], [])
        for parts in ([stats, empty], [empty, stats]):
            assert {k: float(v) for k, v in merge_stats(parts).items()} == pytest.approx(
                {k: float(v) for k, v in stats.items()})


def test_advantages_of_zero_give_a_finite_zero_gradient():
    model = toy(0)
    parts = loss_of_packs([pack(PROMPTS, REPLIES)], (model,) * 3, kl_coef=0.0,
                          advantages=[0.0] * len(FLAT_REPLIES))
    assert float(parts[0][0].detach()) == 0.0
    assert not gradient(parts[0][0], model).any()


def test_an_update_without_tokens_and_numbers_for_replies_are_refused():
    zeros_L = torch.zeros(3)
    with pytest.raises(AssertionError, match="without reply tokens"):
        grpo_loss(zeros_L, zeros_L, None, zeros_L, **CLIP, kl_coef=0, denominator=0)
    with pytest.raises(AssertionError, match="each reply token"):
        grpo_loss(zeros_L, zeros_L, None, torch.zeros(1), **CLIP, kl_coef=0, denominator=3)


def test_merged_statistics_are_sums_and_extremes_and_keep_a_nan():
    parts = [{"loss": 1.0, "kl_sum": 2.0, "a_max": 3.0, "a_min": 3.0},
             {"loss": 0.5, "kl_sum": 4.0, "a_max": 7.0, "a_min": -1.0}]
    parts = [{name: torch.tensor(value) for name, value in part.items()} for part in parts]
    merged = {name: float(value) for name, value in merge_stats(parts).items()}
    assert merged == {"loss": 1.5, "kl_sum": 6.0, "a_max": 7.0, "a_min": -1.0}
    accident = {name: torch.tensor(math.nan) for name in parts[0]}
    for place in range(3):
        values = merge_stats(parts[:place] + [accident] + parts[place:]).values()
        assert all(value.isnan() for value in values)


# Other losses, each against the formula of its paper.

LENGTHS = [3, 5, 1, 4, 2, 6, 2, 1]
LIMIT = 7
RECIPES = {  # arguments of grpo_loss and the average
    "dapo": {"average": "token", "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0},
    "deepseekmath": {"average": "reply", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.04},
    "dr_grpo": {"average": "constant", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0},
    "gspo": {"ratio": "sequence", "average": "reply", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    "cispo": {"clip": "cispo", "average": "token", "clip_low": 0.3, "clip_high": 0.5, "kl_coef": 0.0},
    "cispo_without_a_lower_bound": {"clip": "cispo", "average": "reply", "clip_low": 1.0, "clip_high": 0.5,
                                    "kl_coef": 0.02},
}


def clipped_objective(ratio, advantage, low, high, kinds):
    """min(ρ A, clip(ρ) A) of one scalar tensor ρ."""
    kept = min(max(ratio.item(), 1 - low), 1 + high)
    clipped = kept * advantage < ratio.item() * advantage
    side = "within" if kept == ratio.item() else "low" if kept > ratio.item() else "high"
    kinds.add((side, advantage > 0))
    return kept * advantage if clipped else ratio * advantage


def k3(new, anchor):
    return torch.exp(anchor - new) - (anchor - new) - 1


def dapo(replies, low, high, beta, kinds):
    """arXiv 2503.14476: 1/Σ|o| Σ_i Σ_t min(ρ A, clip(ρ) A)."""
    total = 0.0
    for tokens, advantage in replies:
        for new, old, _ in tokens:
            total = total + clipped_objective(torch.exp(new - old), advantage, low, high, kinds)
    return total / sum(len(tokens) for tokens, _ in replies)


def deepseekmath(replies, low, high, beta, kinds):
    """arXiv 2402.03300, eq. 3: 1/N Σ_i 1/|o_i| Σ_t (min(ρ A, clip(ρ) A) - β KL)."""
    total = 0.0
    for tokens, advantage in replies:
        of_reply = 0.0
        for new, old, anchor in tokens:
            of_reply = of_reply + clipped_objective(torch.exp(new - old), advantage, low, high, kinds)
            of_reply = of_reply - beta * k3(new, anchor)
        total = total + of_reply / len(tokens)
    return total / len(replies)


def dr_grpo(replies, low, high, beta, kinds):
    """arXiv 2503.20783: 1/N Σ_i Σ_t min(ρ A, clip(ρ) A) / MAX_TOKENS."""
    total = 0.0
    for tokens, advantage in replies:
        for new, old, _ in tokens:
            total = total + clipped_objective(torch.exp(new - old), advantage, low, high, kinds) / LIMIT
    return total / len(replies)


def gspo(replies, low, high, beta, kinds):
    """arXiv 2507.18071, eq. 5 and 7: 1/N Σ_i min(s A, clip(s) A), s = (π(y) / π_old(y))^(1/|y|)."""
    total = 0.0
    for tokens, advantage in replies:
        likelihood, before = torch.ones(2, dtype=torch.float64)
        for new, old, _ in tokens:
            likelihood, before = likelihood * torch.exp(new), before * torch.exp(old)
        ratio = (likelihood / before) ** (1 / len(tokens))
        total = total + clipped_objective(ratio, advantage, low, high, kinds)
    return total / len(replies)


def cispo(replies, low, high, beta, kinds):
    """arXiv 2506.13585, eq. 4 and 5: 1/Σ|o| Σ_i Σ_t sg(clip(ρ)) A log π."""
    total = 0.0
    for tokens, advantage in replies:
        for new, old, _ in tokens:
            ratio = math.exp(new.item() - old.item())
            kept = min(max(ratio, 1 - low), 1 + high)
            kinds.add(("within" if kept == ratio else "low" if kept > ratio else "high", advantage > 0))
            total = total + kept * advantage * new
    return total / sum(len(tokens) for tokens, _ in replies)


def cispo_without_a_lower_bound(replies, low, high, beta, kinds):
    """The same, averaged over replies and with a KL penalty."""
    total = 0.0
    for tokens, advantage in replies:
        for new, old, anchor in tokens:
            ratio = math.exp(new.item() - old.item())
            kept = min(ratio, 1 + high)
            kinds.add(("within" if kept == ratio else "high", advantage > 0))
            total = total + (kept * advantage * new - beta * k3(new, anchor)) / len(tokens) / len(replies)
    return total


PAPERS = {function.__name__: function
          for function in (dapo, deepseekmath, dr_grpo, gspo, cispo, cispo_without_a_lower_bound)}


def tokens_of_replies(noise=0.4, seed=2):
    """(logp_L with gradient, old_logp_L, ref_logp_L, adv_N, reply_L) in fp64."""
    generator = torch.Generator().manual_seed(seed)
    reply_L = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    logp_L, old_L, ref_L = torch.randn(3, len(reply_L), generator=generator, dtype=torch.float64) * noise - 2
    # Two replies, one of each sign, whose ratio is within the clip of GSPO too.
    near = (reply_L == 1) | (reply_L == 4)
    old_L[near] = logp_L[near] + 2e-4 * torch.linspace(-1, 1, int(near.sum()), dtype=torch.float64)
    adv_N = torch.tensor([1.3, 0.7, -0.4, -1.1, -0.8, 0.9, -1.7, 0.6], dtype=torch.float64)
    return logp_L.requires_grad_(), old_L, ref_L, adv_N, reply_L


def recipe_loss(recipe, logp_L, old_L, ref_L, adv_N, reply_L, mask=slice(None), lengths=LENGTHS):
    """(loss, stats) of the tokens `mask` of an update of all replies."""
    settings = dict(RECIPES[recipe])
    weight_L, denominator = token_weights([[0] * n for n in lengths], settings.pop("average"), LIMIT)
    return grpo_loss(logp_L[mask], old_L[mask], ref_L[mask], adv_N[reply_L][mask], **settings,
                     denominator=denominator, reply_L=reply_L[mask], weight_L=weight_L[mask])


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_loss_and_its_gradient_equal_a_loop_written_from_its_paper(recipe):
    logp_L, old_L, ref_L, adv_N, reply_L = tokens_of_replies()
    loss, stats = recipe_loss(recipe, logp_L, old_L, ref_L, adv_N, reply_L)
    low, high, beta = (RECIPES[recipe][name] for name in ("clip_low", "clip_high", "kl_coef"))
    rows = list(zip(logp_L.unbind(), old_L.unbind(), ref_L.unbind(), reply_L.tolist(), strict=True))
    replies = [([row[:3] for row in rows if row[3] == i], a) for i, a in enumerate(adv_N.tolist())]
    kinds = set()
    expected = -PAPERS[recipe](replies, low, high, beta, kinds)
    sides = ("within", "high") if low == 1 else ("within", "low", "high")
    assert kinds == {(side, positive) for side in sides for positive in (True, False)}
    close(loss, expected, 1e-12)
    grads = [torch.autograd.grad(x, logp_L, retain_graph=True)[0] for x in (loss, expected)]
    close(grads[0], grads[1], 1e-12)
    close(stats["loss"], expected.detach(), 1e-12)


def test_the_gradient_of_the_sequence_ratio_is_that_of_the_paper():
    logp_L, old_L, ref_L, adv_N, reply_L = tokens_of_replies()
    loss, stats = recipe_loss("gspo", logp_L, old_L, ref_L, adv_N, reply_L)
    grad_L, = torch.autograd.grad(loss, logp_L)
    clipped = Counter()
    for i, (n, advantage) in enumerate(zip(LENGTHS, adv_N.tolist(), strict=True)):
        own = reply_L == i
        ratio = math.exp((logp_L - old_L)[own].sum().item() / n)
        low, high = advantage < 0 and ratio < 1 - 3e-4, advantage > 0 and ratio > 1 + 4e-4
        clipped += Counter(low=n * low, high=n * high)
        # Eq. 10: s A / |y| at every token of the reply, 0 where the reply is clipped.
        slope = 0.0 if low or high else -ratio * advantage / n / len(LENGTHS)
        close(grad_L[own], torch.full((n,), slope, dtype=torch.float64), 1e-12)
    assert clipped == {"low": int(stats["clip_low_sum"]), "high": int(stats["clip_high_sum"])}
    assert min(clipped.values()) > 0


def test_cispo_counts_the_tokens_whose_weight_is_clipped_whatever_their_advantage():
    ratios = [0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 2.0]
    logp_L = torch.tensor(ratios).log().requires_grad_()
    adv_L = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    loss, stats = grpo_loss(logp_L, torch.zeros(7), None, adv_L, **CLIP, kl_coef=0, denominator=1,
                            clip="cispo")
    assert (int(stats["clip_low_sum"]), int(stats["clip_high_sum"])) == (2, 3)
    grad_L, = torch.autograd.grad(loss, logp_L)
    close(grad_L, -adv_L * torch.tensor([0.8, 0.8, 1, 1, 1.28, 1.28, 1.28]), 1e-6)


@pytest.mark.parametrize("max_tokens", [11, 16, 24])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_loss_depends_on_the_split_into_micro_batches(recipe, max_tokens):
    model = toy(0)
    models = model, nearby(model, 1, 0.05), nearby(model, 2, 0.05)
    adv_N = torch.tensor(advantages_of_replies(), dtype=torch.float64)
    settings = dict(RECIPES[recipe])
    weight_L, denominator = token_weights(FLAT_REPLIES, settings.pop("average"), LIMIT)
    results = []
    for packs in ([pack(PROMPTS, REPLIES)], pack_micro_batches(PROMPTS, REPLIES, max_tokens)):
        weights = weight_L.split([len(part.targets_L) for part in packs])
        parts = [grpo_loss(*(logprobs_of_pack(model, part) for model in models), adv_N[part.reply_L],
                           **settings, denominator=denominator, reply_L=part.reply_L, weight_L=w_L)
                 for part, w_L in zip(packs, weights, strict=True)]
        loss = sum(loss for loss, _ in parts)
        results.append((len(packs), loss.detach(), gradient(loss, model),
                        merge_stats([stats for _, stats in parts])))
    (one, loss, grad, stats), (several, split_loss, split_grad, split_stats) = results
    assert one == 1 < several
    close(split_loss, loss)
    close(split_grad, grad)
    assert grad.any() and stats.keys() == split_stats.keys()
    for name in stats:
        close(split_stats[name], stats[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_loss_depends_on_the_ranks_and_groups_without_spread_count_in_the_denominator(recipe):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 7, (12,), generator=generator).tolist()
    rollouts_N = [Rollout([i // 3 + 1, 2], [int(x) for x in torch.randint(1, 30, (n,), generator=generator)],
                          [0.0] * n) for i, n in enumerate(lengths)]
    adv_PG = group_advantages(torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 1.0]]).double())
    settings = dict(RECIPES[recipe]) | {"kl_coef": 0.0}
    average = settings.pop("average")
    _, denominator = token_weights([rollout.ids for rollout in rollouts_N], average, LIMIT)
    assert denominator == {"token": sum(lengths), "reply": 12, "constant": 12 * LIMIT}[average]
    model, old = toy(0), nearby(toy(0), 1, 0.05)
    results = []
    # One rank with all groups, then two ranks that leave out the group without spread, in small packs.
    for shares, tokens in (([[0, 1, 2, 3]], 1000), ([[0], [2, 3]], 12)):
        parts = [part for trained_P in shares
                 for part in make_micro_batches(rollouts_N, adv_PG, trained_P, tokens, "cpu", average)]
        losses = [grpo_loss(logprobs_of_pack(model, part.pack), logprobs_of_pack(old, part.pack), None,
                            part.adv_L, **settings, denominator=denominator, reply_L=part.pack.reply_L,
                            weight_L=part.weight_L)[0] for part in parts]
        results.append((len(parts), sum(losses).detach(), gradient(sum(losses), model)))
    assert results[0][0] == 1 and results[1][0] > 2
    close(results[1][1], results[0][1])
    close(results[1][2], results[0][2])


def test_token_weights_of_a_worked_example():
    replies = [[5, 6], [7], [8, 9, 9, 9]]
    for average, weights, denominator in (("token", [1] * 7, 7), ("constant", [1] * 7, 30),
                                          ("reply", [0.5, 0.5, 1, 0.25, 0.25, 0.25, 0.25], 3)):
        weight_L, of_update = token_weights(replies, average, limit=10)
        assert (weight_L.tolist(), of_update, weight_L.dtype) == (weights, denominator, torch.float64)
        # The weights of a part are those of the whole, and its denominator a summand.
        parts = [token_weights(part, average, limit=10) for part in (replies[:1], replies[1:])]
        assert torch.cat([part_L for part_L, _ in parts]).tolist() == weights
        assert sum(part for _, part in parts) == denominator
    assert token_weights(replies, "constant")[1] is None  # no loss can be divided by it
    with pytest.raises(ValueError, match="'mean'; choose 'token', 'reply' or 'constant'"):
        token_weights(replies, "mean")


@pytest.mark.parametrize("ratio, clip", [("sequence", "cispo"), ("reply", "ppo"), ("token", "none")])
def test_losses_that_no_paper_has_are_refused(ratio, clip):
    zeros_L = torch.zeros(3)
    with pytest.raises(ValueError, match=f"'{ratio}' with the clip '{clip}'; choose") as error:
        grpo_loss(zeros_L, zeros_L, None, zeros_L, **CLIP, kl_coef=0, denominator=3, ratio=ratio, clip=clip,
                  reply_L=torch.zeros(3, dtype=torch.int64))
    assert "\n" not in str(error.value)
    with pytest.raises(AssertionError, match="needs reply_L"):
        grpo_loss(zeros_L, zeros_L, None, zeros_L, **CLIP, kl_coef=0, denominator=3, ratio="sequence")


def test_a_part_without_tokens_is_a_zero_in_every_loss():
    empty_L, no_reply_L = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for ratio, clip in (("token", "ppo"), ("sequence", "ppo"), ("token", "cispo")):
        loss, stats = grpo_loss(empty_L, empty_L, None, empty_L.detach(), **CLIP, kl_coef=0, denominator=3,
                                ratio=ratio, clip=clip, reply_L=no_reply_L)
        loss.backward()
        assert float(loss.detach()) == 0 and all(value.isfinite() for value in stats.values())


# Identities between the losses: the table of docs/losses.md.


def loss_and_gradient(logp_L, old_L, adv_L, average, lengths, **settings):
    logp_L = logp_L.detach().requires_grad_()
    weight_L, denominator = token_weights([[0] * n for n in lengths], average, LIMIT)
    reply_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    loss, _ = grpo_loss(logp_L, old_L, None, adv_L, **(CLIP | settings), kl_coef=0, denominator=denominator,
                        reply_L=reply_L, weight_L=weight_L)
    return loss.detach(), torch.autograd.grad(loss, logp_L)[0]


@pytest.mark.parametrize("average", ["token", "reply", "constant"])
def test_on_policy_all_ratios_and_clips_have_the_gradient_of_reinforce(average):
    logp_L, _, _, adv_N, reply_L = tokens_of_replies()
    adv_L, old_L = adv_N[reply_L], logp_L.detach()
    weight_L, denominator = token_weights([[0] * n for n in LENGTHS], average, LIMIT)
    plain, sequence, weighted = (loss_and_gradient(logp_L, old_L, adv_L, average, LENGTHS, **settings)
                                 for settings in ({}, {"ratio": "sequence"}, {"clip": "cispo"}))
    for _, grad_L in (plain, sequence, weighted):
        close(grad_L, -weight_L * adv_L / denominator, 1e-14)
    close(sequence[0], plain[0], 1e-14)
    close(plain[0], -(weight_L * adv_L).sum() / denominator, 1e-14)
    close(weighted[0], -(weight_L * adv_L * old_L).sum() / denominator, 1e-14)


def test_within_the_clip_cispo_has_the_gradient_of_ppo():
    logp_L, _, _, adv_N, reply_L = tokens_of_replies()
    old_L = logp_L.detach() - torch.linspace(math.log(0.81), math.log(1.27), len(logp_L), dtype=torch.float64)
    (_, ppo_L), (_, cispo_L) = (loss_and_gradient(logp_L, old_L, adv_N[reply_L], "token", LENGTHS, clip=clip)
                                for clip in ("ppo", "cispo"))
    close(cispo_L, ppo_L, 1e-14)


def test_beyond_the_clip_ppo_drops_tokens_that_cispo_keeps():
    logp_L, old_L, _, adv_N, reply_L = tokens_of_replies()
    (_, ppo_L), (_, cispo_L) = (loss_and_gradient(logp_L, old_L, adv_N[reply_L], "token", LENGTHS, clip=clip)
                                for clip in ("ppo", "cispo"))
    assert not ppo_L.all() and cispo_L.all()


def test_for_replies_of_one_token_the_sequence_ratio_is_the_ratio_of_the_token():
    logp_L, old_L, _, adv_N, reply_L = tokens_of_replies()
    lengths, adv_L = [1] * len(logp_L), adv_N[reply_L]
    token, sequence = (loss_and_gradient(logp_L, old_L, adv_L, "reply", lengths, ratio=ratio)
                       for ratio in ("token", "sequence"))
    for a, b in zip(token, sequence, strict=True):
        close(a, b, 0)


@pytest.mark.parametrize("ratio, clip", [("token", "ppo"), ("sequence", "ppo"), ("token", "cispo")])
def test_for_replies_of_one_length_the_averages_differ_by_length_over_limit(ratio, clip):
    logp_L, old_L, _, _, _ = tokens_of_replies()
    adv_L = torch.tensor([1.3, -0.4, 0.7, -0.9, 1.1, -0.6], dtype=torch.float64).repeat_interleave(4)
    token, reply, constant = (
        loss_and_gradient(logp_L, old_L, adv_L, average, [4] * 6, ratio=ratio, clip=clip)
        for average in ("token", "reply", "constant"))
    for a, b, c in zip(token, reply, constant, strict=True):
        close(b, a, 1e-14)
        close(c, a * 4 / LIMIT, 1e-14)


def test_weights_of_one_are_no_weights_bit_for_bit():
    logp_L, old_L, ref_L, adv_N, reply_L = tokens_of_replies()
    for dtype in (torch.float32, torch.float64):
        results = []
        for weight_L in (None, token_weights([[0] * n for n in LENGTHS], "token")[0]):
            new_L = logp_L.detach().to(dtype).requires_grad_()
            loss, _ = grpo_loss(new_L, old_L.to(dtype), ref_L.to(dtype), adv_N[reply_L].to(dtype), **CLIP,
                                kl_coef=0.05, denominator=24, weight_L=weight_L)
            results.append((loss.detach(), torch.autograd.grad(loss, new_L)[0]))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.dtype == dtype


def test_centred_advantages_are_the_normalized_ones_times_the_standard_deviation():
    rewards_PG = torch.tensor([[1.0, 0, 0, 1, 0], [0.2, 0.2, 1, 1, 1]], dtype=torch.float64)
    std_P = rewards_PG.std(1, keepdim=True) + 1e-6
    close(group_advantages(rewards_PG, "none"), group_advantages(rewards_PG) * std_P, 1e-14)


def test_every_identity_of_the_table_names_its_test():
    table = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8").partition("## Identities")[2]
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) >= 7 and named <= globals().keys()


# Token log-probs.


def random_head(L, D, V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_LD = torch.randn(L, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_LD, weight_VD, torch.randint(V, (L,), generator=generator)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_and_entropy_equal_their_definitions(temperature):
    hidden_LD, weight_VD, targets_L = random_head(6, 5, 9)
    logp_L, entropy_L = token_logprobs(hidden_LD, weight_VD, targets_L, temperature)
    for i, target in enumerate(targets_L.tolist()):
        scores = [(hidden_LD[i] @ row).item() / temperature for row in weight_VD]
        total = math.fsum(map(math.exp, scores))
        p = [math.exp(score) / total for score in scores]
        assert logp_L[i].item() == pytest.approx(math.log(p[target]), rel=1e-12)
        assert entropy_L[i].item() == pytest.approx(-math.fsum(x * math.log(x) for x in p), rel=1e-12)
    assert logp_L.requires_grad and not entropy_L.requires_grad


@pytest.mark.parametrize("L, V, rows", [(1, 7, 1), (7, 7, 1), (13, 11, 3), (12, 11, 4), (17, 5, 16)])
def test_chunks_of_tokens_change_neither_outputs_nor_gradients(monkeypatch, L, V, rows):
    results = []
    for chunk in (2**25, rows * V + V - 1, rows * V):
        monkeypatch.setattr(grpo, "CHUNK_LOGITS", chunk)
        hidden_LD, weight_VD, targets_L = random_head(L, 6, V + 2)
        targets_L = targets_L.clamp(max=V - 1)
        logp_L, entropy_L = token_logprobs_reference(hidden_LD, weight_VD, targets_L, TEMPERATURE, V)
        upstream_L = torch.linspace(-1, 2, L, dtype=torch.float64)
        grads = torch.autograd.grad((logp_L * upstream_L).sum(), (hidden_LD, weight_VD))
        results.append((logp_L, entropy_L, *grads))
        assert not entropy_L.requires_grad
    for chunked in results[1:]:
        for a, b in zip(chunked, results[0], strict=True):
            close(a, b)


def test_one_row_is_computed_where_even_that_exceeds_a_chunk(monkeypatch):
    hidden_LD, weight_VD, targets_L = random_head(3, 4, 9)
    expected_L, _ = token_logprobs(hidden_LD, weight_VD, targets_L, 1.0)
    monkeypatch.setattr(grpo, "CHUNK_LOGITS", 2)
    close(token_logprobs(hidden_LD, weight_VD, targets_L, 1.0)[0], expected_L)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    hidden_LD, weight_VD, targets_L = random_head(60, 4, 50)
    monkeypatch.setattr(grpo, "CHUNK_LOGITS", 7 * 50)
    with LargestTensor() as largest:
        logp_L, _ = token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE)
        logp_L.sum().backward()
    assert largest.numel == 7 * 50


def test_what_one_chunk_keeps_for_backward_is_recomputed(monkeypatch):
    hidden_LD, weight_VD, targets_L = random_head(60, 4, 50)
    monkeypatch.setattr(grpo, "CHUNK_LOGITS", 7 * 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE)
    assert sum(size for size in kept if size % 50 == 0 and size != weight_VD.numel()) == 0


def test_phantom_vocabulary_rows_change_nothing_and_get_no_gradient():
    results = []
    for boost in (0.0, 1e4):
        hidden_LD, weight_VD, targets_L = random_head(8, 5, 12)
        targets_L = targets_L.clamp(max=8)
        with torch.no_grad():
            weight_VD[9:] += boost
        logp_L, entropy_L = token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE, vocab_size=9)
        grads = torch.autograd.grad(logp_L.sum(), (hidden_LD, weight_VD))
        assert not grads[1][9:].any()
        assert grads[1][:9].any(1).all()
        results.append((logp_L, entropy_L, *grads))
    for a, b in zip(*results, strict=True):
        close(a, b, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e6])
def test_log_probs_are_never_positive(scale, dtype):
    hidden_LD, weight_VD, _ = random_head(400, 8, 33, dtype)
    for pick in (torch.argmax, torch.argmin):
        targets_L = pick(hidden_LD.float() @ weight_VD.float().T, -1)
        logp_L, entropy_L = token_logprobs(hidden_LD * scale, weight_VD, targets_L, TEMPERATURE)
        assert logp_L.dtype == entropy_L.dtype == torch.float32
        assert logp_L.max() <= 0 and logp_L.isfinite().all()
        assert entropy_L.isfinite().all() and entropy_L.min() >= 0


def test_an_unknown_kernel_is_refused():
    hidden_LD, weight_VD, targets_L = random_head(2, 3, 4)
    with pytest.raises(ValueError, match="kernel is 'fused'"):
        token_logprobs(hidden_LD, weight_VD, targets_L, 1.0, kernel="fused")
    with pytest.raises(AssertionError, match="greedy"):
        token_logprobs(hidden_LD, weight_VD, targets_L, 0.0)


def test_sft_loss_equals_cross_entropy_of_the_reply_tokens():
    model = toy(0)
    prompts = [prompt for prompt, group in zip(PROMPTS, REPLIES, strict=True) for _ in group]
    expected = 0.0
    for prompt, reply in zip(prompts, FLAT_REPLIES, strict=True):
        ids = torch.tensor(prompt + reply)
        hidden_TD = model(ids, torch.arange(len(ids)), packed_attention([0, len(ids)]))
        logits_LV = (hidden_TD @ model.head_weight().T)[len(prompt) - 1:-1, :VOCAB]
        expected = expected + F.cross_entropy(logits_LV, ids[len(prompt):], reduction="sum") / TOKENS
    packs = pack_micro_batches(prompts, [[reply] for reply in FLAT_REPLIES], 20)
    loss = sum(sft_loss(logprobs_of_pack(model, part, 1.0), TOKENS) for part in packs)
    assert len(packs) > 1
    close(loss, expected)
    close(gradient(loss, model), gradient(expected, model))


# The list of planted faults.


def test_every_planted_fault_fits_the_code():
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from mutants import MUTANTS, homes_of_tests
    finally:
        sys.path.pop(0)
    homes = homes_of_tests()
    for file, old, new, what, tests in MUTANTS:
        assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1, f"{file}: {what}"
        assert old != new and tests
        assert set(tests) <= homes.keys(), what
