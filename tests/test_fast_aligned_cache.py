"""fast/aligned_cache.py: prompts apart from the replies and columns that grow give the same replies, in no
more memory. It is compared with the definition, sample.Cache."""

import random

import pytest
import sampling
import torch
from sampling import assert_same, draw, full_forward_logp, ragged_prompts, toy_model

import sample
from fast import aligned_cache
from sample import Prompt, Rollout, Row, prompt_seeds

sampled = sampling.sampled
SHARED, APART = 0, 2**62  # values of WORTH_SHARING: every prompt is shared, none is


@pytest.fixture(scope="module")
def defined(sampled):
    """(model, prompts, settings, rollouts by the definition)"""
    model, prompts, settings, _ = sampled
    return model, prompts, settings, draw(model, prompts, 5, **settings, kernel="reference")


@pytest.fixture(params=[SHARED, APART], ids=["shared", "apart"])
def worth(request, monkeypatch):
    monkeypatch.setattr(aligned_cache, "WORTH_SHARING", request.param)
    return request.param


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(aligned_cache, "WORTH_SHARING", SHARED)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_replies_are_those_of_the_definition(defined, worth, batch_size):
    model, prompts, settings, wanted = defined
    assert_same(draw(model, prompts, 5, **settings, batch_size=batch_size), wanted)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_prompts_changes_nothing(defined, worth, seed):
    model, prompts, settings, wanted = defined
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    moved = {**settings, "seeds_P": settings["seeds_P"][order]}
    rollouts = draw(model, [prompts[i] for i in order], 5, **moved, batch_size=20)
    assert_same(rollouts, [wanted[5 * i + j] for i in order for j in range(5)])


@pytest.mark.parametrize("seeds", [range(10), range(10, 20)], ids=str)
def test_the_schedule_changes_nothing(sampled, worth, monkeypatch, seeds):
    """Rows start, end and start again at all times; several steps between two looks take rows past their
    limit."""
    for seed in seeds:
        rng = random.Random(seed)
        P, n = rng.randint(1, 8), rng.randint(1, 5)
        deciding = {"max_new_tokens": rng.choice([1, 3, 20]), "seeds_P": prompt_seeds(seed, 0, 0, P),
                    "stop_ids": set(rng.sample(range(sampling.VOCAB), rng.choice([0, 2, 4])))}
        prompts = ragged_prompts(P, rng.choice([1, 5, 25]), seed)
        monkeypatch.setitem(sample.STEPS, "cpu", 1)
        wanted = draw(sampled[0], prompts, n, **deciding, kernel="reference")
        monkeypatch.setitem(sample.STEPS, "cpu", rng.choice([1, 2, 3, 8]))
        assert_same(draw(sampled[0], prompts, n, **deciding, batch_size=rng.choice([1, 2, 3, 7, 64])), wanted)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [1, 2, 90], [40, 40]], ids=str)
def test_prompts_of_one_token_and_of_very_different_lengths(shared, lengths):
    prompts = [[1 + i] * length for i, length in enumerate(lengths)]
    wanted = draw(toy_model(), prompts, 3, kernel="reference")
    assert_same(draw(toy_model(), prompts, 3), wanted)
    for rollout in wanted:
        torch.testing.assert_close(torch.tensor(rollout.logp), full_forward_logp(toy_model(), rollout),
                                   atol=1e-5, rtol=0)


def test_large_scores_are_merged_without_overflow(shared):
    """A prompt that a reply attends to with all its weight, or with none. Scores reach 208, whose exponential
    fp32 cannot hold; scores of 690 made fp32 itself, by the processor, 1e-4 to 4e-4 wrong."""
    model, prompts = toy_model(), ragged_prompts(5, 30)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
    wanted = draw(model, prompts, 4, kernel="reference")
    for rollout, other in zip(draw(model, prompts, 4), wanted, strict=True):
        assert rollout.ids == other.ids
        torch.testing.assert_close(torch.tensor(rollout.logp), torch.tensor(other.logp), atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", [(4, 1), (4, 4), (6, 2)], ids=str)
def test_query_heads_find_their_key_heads(shared, heads):
    H, K = heads
    model, prompts = toy_model(num_attention_heads=H, num_key_value_heads=K), ragged_prompts(4, 20)
    assert_same(draw(model, prompts, 3), draw(model, prompts, 3, kernel="reference"))


def test_bf16_stays_near_fp32(sampled, shared):
    model, prompts, settings, _ = sampled
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = draw(model, prompts, 5, **settings)
    for rollout in rollouts[::7]:
        assert (torch.tensor(rollout.logp) - full_forward_logp(model, rollout)).abs().mean() < 0.05


@pytest.mark.parametrize("room", [0, 1, 10])
def test_a_cache_that_has_to_grow_gives_the_same_replies(defined, worth, monkeypatch, room):
    model, prompts, settings, wanted = defined
    monkeypatch.setattr(aligned_cache, "FIRST_ROOM", room)
    assert_same(draw(model, prompts, 5, **settings), wanted)


def rows_of(prompts, n, most):
    """Rows as `generate` makes them, with replies of at most `most` tokens."""
    rows = []
    for ids in sorted(prompts, key=len):
        prompt = Prompt(ids, n)
        rows += [Row(0, Rollout(ids), prompt, 0, len(ids) + most - 1) for _ in range(n)]
    return rows


def make(prompts, n, most, slots):
    config, rows = toy_model().config, rows_of(prompts, n, most)
    return aligned_cache.Cache(config, torch.float32, torch.device("cpu"), slots, rows, rows[-1].limit, 1,
                               None, "cpu"), rows


@pytest.mark.parametrize("most, room", [(5, 5), (1000, aligned_cache.FIRST_ROOM)])
def test_it_has_room_for_the_prompts_and_the_first_tokens_of_a_reply(worth, most, room):
    cache, _ = make([[1] * 9, [1] * 20], 3, most, 6)
    assert (cache.shared is not None) == (worth == SHARED)
    columns = 1 + room if worth == SHARED else 20 + room
    assert cache.keys.shape == (2, 6, 2, 8, columns) and cache.values.shape == (2, 6, 2, columns, 8)
    if worth == SHARED:
        assert cache.shared.shape == (2, 2, 2, 20, 2, 8)


def test_a_prompt_is_shared_where_that_saves_enough():
    def is_shared(P, n, length, slots=64):
        return make([[1] * length] * P, n, 5, min(slots, P * n))[0].shared is not None

    tokens = aligned_cache.WORTH_SHARING // 16  # of a prompt's token the toy model has 2 heads of 8 numbers
    assert is_shared(8, 8, tokens * 8 // 7 + 1) and not is_shared(8, 8, tokens * 8 // 7 - 1)
    assert is_shared(8, 8, 2 * tokens, slots=2) and not is_shared(8, 8, 2 * tokens, slots=1)
    assert not is_shared(8, 1, 9 * tokens)


def test_a_prompt_has_a_place_while_one_of_its_rows_is_running(sampled, shared, monkeypatch):
    """Places are dense, and no more than the prompts of all slots."""
    held, reserve = [], aligned_cache.Cache.reserve

    def watching(cache, rows, steps):
        assert set(cache.prompts) == {row.prompt for row in rows} and len(cache.prompts) <= len(rows)
        held.append((len(cache.prompts), len(rows)))
        assert cache.shared.shape[2] == 7
        return reserve(cache, rows, steps)

    monkeypatch.setattr(aligned_cache.Cache, "reserve", watching)
    model, prompts, settings, _ = sampled
    draw(model, prompts, 5, **settings, batch_size=7)
    assert max(held)[0] > 3 and min(held)[0] == 1, "groups in part, and a group with one live row"


@pytest.mark.parametrize("prompts_share", [True, False])
def test_columns_that_no_row_needs_are_cut_off_as_it_grows(sampled, monkeypatch, prompts_share):
    """Memory follows the longest row, not all tokens that were ever decoded."""
    monkeypatch.setattr(aligned_cache, "FIRST_ROOM", 8)
    monkeypatch.setattr(aligned_cache, "WORTH_SHARING", SHARED if prompts_share else APART)
    widths, reserve = [], aligned_cache.Cache.reserve

    def watching(cache, rows, steps):
        row = reserve(cache, rows, steps)
        widths.append(cache.keys.shape[4])
        return row

    monkeypatch.setattr(aligned_cache.Cache, "reserve", watching)
    settings = {"max_new_tokens": 12, "batch_size": 8, "seeds_P": prompt_seeds(0, 0, 0, 40)}
    draw(sampled[0], ragged_prompts(40, 10), 2, **settings)
    # A row holds at most 10 + 12 - 1 tokens, 12 without its prompt, which has one column for all of it. To
    # grow adds half of the width and 1.
    most = 12 + 1 if prompts_share else 21
    assert len(widths) > 100 and max(widths) <= 2 * most + 2
