"""The rollout engine: how rows start, share pages, wait, give way and end changes no reply, and memory
follows the tokens held."""

import copy
import random

import pytest
import torch
from test_sample import VOCAB, assert_same, draw, full_forward_logp, ids_of, ragged_prompts, toy_model

import sample
from sample import generate, prompt_seeds

PAGE_BYTES = 2 * 2 * 2 * 8 * 4  # of a token of the toy model: layers, keys and values, heads, elements, fp32


def gib(tokens):
    """Memory for so many tokens of the toy model, and the page of nobody."""
    return (tokens + sample.PAGE) * PAGE_BYTES / 2**30 * (1 + 1e-9)


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(sample, "PAGE", 4)


@pytest.fixture
def caches(monkeypatch):
    """Every PagedCache that was made, with `gave_way`, and checked at each `reserve`: no page is lost, none
    is given twice."""
    made, make, reserve = [], sample.PagedCache.__init__, sample.PagedCache.reserve

    def checking_reserve(cache, rows, steps):
        gone = reserve(cache, rows, steps)
        cache.gave_way += len(gone)
        used = {page for page, users in cache.users.items() if users}
        assert sorted([*cache.free, *used]) == list(range(1, cache.pool.shape[2]))
        users = [page for row in cache.rows for page in row.pages]
        users += [page for prompt in cache.prompts for page in prompt.pages]
        assert all(cache.users[page] == users.count(page) for page in used)
        assert set(cache.rows) == set(rows) - set(gone)
        return gone

    def keeping_init(cache, *arguments):
        make(cache, *arguments)
        cache.gave_way = 0
        made.append(cache)

    monkeypatch.setattr(sample.PagedCache, "__init__", keeping_init)
    monkeypatch.setattr(sample.PagedCache, "reserve", checking_reserve)
    # generate empties its cache at the end; what the tests look at must stay.
    monkeypatch.setattr(sample, "vars", lambda thing: dict(vars(thing)), raising=False)
    return made


def test_a_pass_of_prefill_is_placed_before_the_next_one(model, monkeypatch):
    held, prefill = [], sample.prefill

    def watching(model, prompts):
        held.append([prompt for prompt in prompts if prompt.kv is not None])
        seen.update(prompts)
        assert not [prompt for prompt in seen if prompt.kv is not None and not prompt.waiting]
        prefill(model, prompts)

    seen = set()
    monkeypatch.setattr(sample, "prefill", watching)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 8)
    seeds_P = prompt_seeds(0, 0, 0, 6)
    draw(model, ragged_prompts(6, 13, 0), 2, max_new_tokens=2, stop_ids=set(), seeds_P=seeds_P)
    assert len(held) > 2 and not any(held)


# The same replies, whatever the schedule.


def random_schedule(seed):
    """(prompts, n, what decides on the replies, what must not, tokens between two looks)"""
    rng = random.Random(seed)
    P, n = rng.randint(1, 8), rng.randint(1, 5)
    prompts = ragged_prompts(P, rng.choice([1, 5, 13, 25]), seed)
    most = rng.choice([1, 3, 24])
    deciding = {"max_new_tokens": most, "stop_ids": set(rng.sample(range(VOCAB), rng.choice([0, 2, 4]))),
                "seeds_P": prompt_seeds(seed, 0, 0, P), "temperature": rng.choice([0.7, 1.0])}
    whole = -(-(max(map(len, prompts)) + most - 1) // sample.PAGE) * sample.PAGE
    memory = rng.choice([None, *(whole + pages * sample.PAGE for pages in (0, 0, 1, 3, 10, 30))])
    return prompts, n, deciding, {"batch_size": rng.choice([1, 2, 3, 7, 64]),
                                  "kv_memory_gib": memory and gib(memory)}, rng.choice([1, 1, 2, 3, 8])


@pytest.mark.parametrize("seeds", [range(0, 20), range(20, 40), range(40, 60)], ids=str)
def test_replies_do_not_depend_on_the_schedule(model, small_pages, monkeypatch, caches, seeds):
    for seed in seeds:
        prompts, n, deciding, schedule, steps = random_schedule(seed)
        monkeypatch.setitem(sample.STEPS, "cpu", 1)
        wanted = draw(model, prompts, n, **deciding)
        monkeypatch.setitem(sample.STEPS, "cpu", steps)
        told = [[] for _ in wanted]
        rollouts = draw(model, prompts, n, **deciding, **schedule,
                        on_token=lambda i, token, told=told: told[i].append(token))
        assert ids_of(rollouts) == told == ids_of(wanted), seed
        for rollout, other in zip(rollouts, wanted, strict=True):
            assert rollout.finished == other.finished
            logp, wanted_logp = torch.tensor(rollout.logp), torch.tensor(other.logp)
            torch.testing.assert_close(logp, wanted_logp, atol=3e-5, rtol=0)
    assert sum(cache.gave_way for cache in caches) > 0


@pytest.fixture(scope="module")
def crowd(model):
    """(prompts, settings, rollouts): 6 prompts of 4 long replies that end at different times."""
    prompts = ragged_prompts(6, 14, seed=5)
    settings = {"max_new_tokens": 40, "stop_ids": {1, 2}, "seeds_P": prompt_seeds(1, 0, 0, 6)}
    rollouts = draw(model, prompts, 4, **settings)
    assert len({len(rollout.ids) for rollout in rollouts}) > 10
    return prompts, settings, rollouts


def test_rows_that_gave_way_are_drawn_again_as_they_were(model, small_pages, caches, crowd):
    prompts, settings, wanted = crowd
    assert_same(draw(model, prompts, 4, **settings, kv_memory_gib=gib(90)), wanted)
    assert caches[0].gave_way > 5


def test_the_youngest_gives_way_and_the_oldest_never(model, small_pages, caches, crowd, monkeypatch):
    prompts, settings, _ = crowd
    gone_before = []
    reserve = sample.PagedCache.reserve

    def watching(cache, rows, steps):
        before = list(cache.rows)
        gone = reserve(cache, rows, steps)
        assert gone == before[len(before) - len(gone):][::-1] and before[0] not in gone
        gone_before.extend(gone)
        return gone

    monkeypatch.setattr(sample.PagedCache, "reserve", watching)
    draw(model, prompts, 4, **settings, kv_memory_gib=gib(90))
    assert gone_before


def test_memory_for_one_reply_is_enough(model, small_pages, caches, crowd):
    prompts, settings, wanted = crowd
    longest = -(-(max(map(len, prompts)) + 39) // 4) * 4
    assert_same(draw(model, prompts, 4, **settings, kv_memory_gib=gib(longest)), wanted)
    assert caches[0].pool.shape[2] * 4 == longest + 4


def test_memory_below_one_reply_is_refused_and_the_number_it_names_is_enough(model, crowd):
    prompts, settings, wanted = crowd
    message = "kv_memory_gib: 1e-06 GiB .* of 52 tokens; give it 0.001"
    with pytest.raises(ValueError, match=message) as caught:
        draw(model, prompts, 4, **settings, kv_memory_gib=1e-6)
    assert "\n" not in str(caught.value)
    assert_same(draw(model, prompts, 4, **settings, kv_memory_gib=0.001), wanted)


# Memory.


def test_the_pages_that_a_prompt_fills_are_shared_and_counted_once(model, small_pages, monkeypatch):
    prompt = ragged_prompts(1, 1)[0] * 30
    seen, prepare = [], sample.PagedCache.prepare

    def watching(cache, rows, steps):
        seen.append((len(rows), sum(users > 0 for users in cache.users.values())))
        prepare(cache, rows, steps)

    monkeypatch.setattr(sample.PagedCache, "prepare", watching)
    draw(model, [prompt], 8, max_new_tokens=2, kv_memory_gib=gib(1000))
    # 29 tokens fill 7 pages; each of the 8 replies has one of its own.
    assert seen[0] == (8, 7 + 8)


def test_memory_follows_the_tokens_held(model, monkeypatch):
    # Prompts, replies and pages an eighth as long as usual ones: 900 and 120 tokens, pages of 32
    monkeypatch.setattr(sample, "PAGE", 4)
    prompts = [ragged_prompts(1, 1, seed)[0] * (100 + seed) for seed in range(12)]
    shares, prepare = [], sample.PagedCache.prepare

    def measuring(cache, rows, steps):
        tokens = sum(len(ids) for ids in {tuple(row.prompt.ids) for row in rows})
        tokens += sum(len(row.rollout.ids) for row in rows)
        shares.append(sum(users > 0 for users in cache.users.values()) * sample.PAGE / tokens)
        prepare(cache, rows, steps)

    monkeypatch.setattr(sample.PagedCache, "prepare", measuring)
    draw(model, prompts, 8, max_new_tokens=100, stop_ids={1, 2, 3}, batch_size=32, kv_memory_gib=gib(10**5))
    assert len(shares) > 50 and sum(shares) / len(shares) < 1.25


def test_the_table_names_the_pages_of_its_rows_and_else_page_0(model, small_pages, monkeypatch, crowd):
    prompts, settings, _ = crowd
    prepare = sample.PagedCache.prepare

    def checking(cache, rows, steps):
        prepare(cache, rows, steps)
        wanted = torch.zeros_like(cache.table_BM)
        for slot, row in enumerate(rows):
            wanted[slot, :len(row.pages)] = torch.tensor(row.pages)
        assert torch.equal(cache.table_BM, wanted) and 0 not in sum((row.pages for row in rows), [])

    monkeypatch.setattr(sample.PagedCache, "prepare", checking)
    draw(model, prompts, 4, **settings, kv_memory_gib=gib(120))


def test_no_page_is_kept_when_all_replies_have_ended(model, small_pages, caches, crowd):
    prompts, settings, _ = crowd
    draw(model, prompts, 4, **settings, batch_size=5, kv_memory_gib=gib(200))
    cache, = caches
    assert len(cache.free) == cache.pool.shape[2] - 1 and not cache.rows and not cache.prompts


@pytest.mark.parametrize("memory", [None, 0.01], ids=["side by side", "in pages"])
def test_an_interruption_leaves_no_keys_and_values(model, monkeypatch, memory):
    kept = []
    decode_all = sample.decode_all

    def keeping(decoder, *arguments):
        kept.extend((decoder, decoder.cache))
        decode_all(decoder, *arguments)

    def interrupt(number, token):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "decode_all", keeping)
    with pytest.raises(KeyboardInterrupt):
        draw(model, [[1, 2, 3]], 4, kv_memory_gib=memory, on_token=interrupt)
    assert len(kept) == 2 and not any(map(vars, kept))


def test_bf16_autocast_reaches_the_pages(model, caches):
    prompts = ragged_prompts(5, 20)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = draw(model, prompts, 3, kv_memory_gib=0.01)
        side_by_side = draw(model, prompts, 3)
    assert caches[0].pool.dtype == torch.bfloat16
    assert sum(a.ids[:3] == b.ids[:3] for a, b in zip(rollouts, side_by_side, strict=True)) > 8


# The life cycle of a rollout phase.


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


@pytest.mark.parametrize("memory", [None, 0.01], ids=["side by side", "in pages"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_second_phase_samples_from_the_updated_weights(memory, autocast):
    before, after, wanted = replies_before_and_after_an_update(
        toy_model(), ragged_prompts(4, 12), autocast, kv_memory_gib=memory)
    assert after == wanted != before


# On a GPU: the same engine with Triton kernels and CUDA graphs.


def on_gpu(**changes):
    return toy_model(head_dim=16, **changes).cuda()


@pytest.mark.gpu
def test_on_a_gpu_replies_do_not_depend_on_the_schedule():
    model, prompts = on_gpu(), ragged_prompts(13, 60)
    settings = {"max_new_tokens": 70, "stop_ids": {1, 2}, "seeds_P": prompt_seeds(0, 0, 0, 13)}
    wanted = draw(model, prompts, 5, **settings)
    page = 2 * 2 * 32 * 2 * 16 * 4 / 2**30
    for changes in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 20, "kv_memory_gib": 12 * page},
                    {"batch_size": 65, "kv_memory_gib": 40 * page}):
        assert ids_of(draw(model, prompts, 5, **settings, **changes)) == ids_of(wanted), changes


@pytest.mark.gpu
def test_on_a_gpu_greedy_replies_equal_the_cpus():
    model, prompts = toy_model(head_dim=16), ragged_prompts(13, 60)
    wanted = draw(model, prompts, 2, temperature=0.0, max_new_tokens=40)
    rollouts = draw(model.cuda(), prompts, 2, temperature=0.0, max_new_tokens=40)
    assert_same(rollouts, wanted)
    assert_same(draw(model, prompts, 2, temperature=0.0, max_new_tokens=40, kernel="reference"), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_on_a_gpu_a_second_phase_samples_from_the_updated_weights(autocast):
    before, after, wanted = replies_before_and_after_an_update(on_gpu(), ragged_prompts(9, 40), autocast)
    assert after == wanted != before


@pytest.mark.gpu
def test_on_a_gpu_a_phase_leaves_no_memory_behind():
    model, prompts = on_gpu(), ragged_prompts(9, 40)
    draw(model, prompts, 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    draw(model, prompts, 3, seeds_P=range(9, 18))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_on_a_gpu_sampled_log_probs_equal_a_full_forward(top_p):
    model, prompts = on_gpu(), ragged_prompts(9, 40)
    rollouts = generate(model, prompts, 3, max_new_tokens=20, temperature=0.7, stop_ids=(), top_p=top_p,
                        seeds_P=range(9))
    model.cpu()
    for rollout in rollouts:
        wanted = full_forward_logp(model, rollout, 0.7)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-3, rtol=0)
