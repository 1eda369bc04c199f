"""What tests of sampling share: toy models, ragged prompts, comparisons, statistics, checked pages.

A test file takes the fixtures by assignment: `sampled = sampling.sampled`.
"""

import copy

import pytest
import torch

from fast import paged_cache
from grpo import token_logprobs_reference
from model import ModelConfig, Transformer, packed_attention
from sample import generate, prompt_seeds

VOCAB = 48
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # of the toy model: layers, keys and values, heads, elements, fp32


def toy_model(seed=0, **changes):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
             "initializer_range": 0.25}
    return Transformer(ModelConfig(**sizes | changes)).init_weights(seed)


def ragged_prompts(count, longest, seed=0, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def draw(model, prompts, n=1, **changes):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": (), "seeds_P": range(len(prompts))}
    return generate(model, prompts, n, **settings | changes)


def ids_of(rollouts):
    return [rollout.ids for rollout in rollouts]


def assert_same(rollouts, wanted):
    """The same replies: equal ids, log-probs to 1e-5."""
    assert ids_of(rollouts) == ids_of(wanted)
    for rollout, other in zip(rollouts, wanted, strict=True):
        assert rollout.prompt_ids == other.prompt_ids and rollout.finished == other.finished
        torch.testing.assert_close(torch.tensor(rollout.logp), torch.tensor(other.logp), atol=1e-5, rtol=0)


def forward(model, ids):
    """hidden_TD of one sequence by the model's plain packed forward."""
    return model(torch.tensor(ids), torch.arange(len(ids)), packed_attention([0, len(ids)]))


def full_forward_logp(model, rollout, temperature=1.0, vocab_size=None):
    """Log-probs of a rollout's ids by a forward over prompt and reply, as training computes them."""
    with torch.no_grad():
        hidden = forward(model, rollout.prompt_ids + rollout.ids)[len(rollout.prompt_ids) - 1:-1]
        targets = torch.tensor(rollout.ids)
        return token_logprobs_reference(hidden, model.head_weight(), targets, temperature, vocab_size)[0]


def chi_square(counts, probabilities):
    """(statistic, bound): under the right probabilities the bound is passed once in about 10^7 draws. Bins
    that expect fewer than 5 are taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp_min(1e-9)
    freedom = len(counts) - 1
    # Wilson and Hilferty's normal approximation of the quantile
    bound = freedom * (1 - 2 / (9 * freedom) + 5.2 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum().item(), bound


def watch(monkeypatch, thing, name, before):
    """Call `before` with the arguments of each call of thing.name, which then runs as usual."""
    wrapped = getattr(thing, name)

    def watched(*arguments):
        before(*arguments)
        return wrapped(*arguments)

    monkeypatch.setattr(thing, name, watched)


@pytest.fixture(scope="module")
def sampled():
    """(model, prompts, settings, rollouts): 13 ragged prompts of 5 replies that end at different times."""
    model, prompts = toy_model(), ragged_prompts(13, 25)
    settings = {"max_new_tokens": 24, "stop_ids": {1, 2, 3}, "seeds_P": prompt_seeds(0, 0, 0, 13)}
    rollouts = draw(model, prompts, 5, **settings)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    return model, prompts, settings, rollouts


@pytest.fixture(scope="module")
def crowd(sampled):
    """(model, prompts, settings, rollouts): 6 prompts of 4 long replies that end at different times."""
    prompts = ragged_prompts(6, 14, seed=5)
    settings = {"max_new_tokens": 40, "stop_ids": {1, 2}, "seeds_P": prompt_seeds(1, 0, 0, 6)}
    rollouts = draw(sampled[0], prompts, 4, **settings)
    assert len({len(rollout.ids) for rollout in rollouts}) > 10
    return sampled[0], prompts, settings, rollouts


def gib(tokens):
    """Memory for so many tokens of the toy model, and the scratch page."""
    return (tokens + paged_cache.PAGE) * TOKEN_BYTES / 2**30 * (1 + 1e-9)


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(paged_cache, "PAGE", 4)


def check_pages(cache):
    """No page of a cache is lost, and none is given to a second owner."""
    used = {page for page, users in cache.users.items() if users}
    assert sorted([*cache.free, *used]) == list(range(1, cache.pool.shape[2]))
    users = [page for pages in (*cache.row_pages.values(), *cache.prompt_pages.values()) for page in pages]
    assert all(cache.users[page] == users.count(page) for page in used)


@pytest.fixture
def caches(monkeypatch):
    """Every paged cache that was made, with the rows `preempted`, and checked at each `reserve`."""
    made, make, reserve = [], paged_cache.Cache.__init__, paged_cache.Cache.reserve

    def checking_reserve(cache, rows, steps):
        assert set(cache.row_pages) == set(rows)
        row = reserve(cache, rows, steps)
        check_pages(cache)
        cache.preempted += [row] if row else []
        return row

    def keeping_init(cache, *arguments):
        make(cache, *arguments)
        cache.preempted = []
        made.append(cache)

    monkeypatch.setattr(paged_cache.Cache, "__init__", keeping_init)
    monkeypatch.setattr(paged_cache.Cache, "reserve", checking_reserve)
    monkeypatch.setattr(paged_cache.Cache, "close", lambda cache: None)
    return made


def replies_before_and_after_an_update(model, prompts, autocast, **settings):
    """Ids of two phases with an optimizer step between them, all under one autocast, and those of a model
    that never sampled before, with the updated weights."""
    device = model.embed_tokens.weight.device.type
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        before = draw(model, prompts, 3, **settings)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
        after = draw(model, prompts, 3, **settings)
    fresh = copy.deepcopy(model)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        return ids_of(before), ids_of(after), ids_of(draw(fresh, prompts, 3, **settings))
