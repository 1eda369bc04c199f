"""sample.py: what is drawn and from which distribution; that nothing else in the batch matters, with each
cache and schedule; what a rollout phase leaves behind."""

import copy
import importlib.util
import inspect
import math
import random
import sys

import pytest
import sampling
import torch
from sampling import (
    TOKEN_BYTES,
    VOCAB,
    assert_same,
    chi_square,
    draw,
    forward,
    full_forward_logp,
    gib,
    ids_of,
    ragged_prompts,
    replies_before_and_after_an_update,
    toy_model,
    watch,
)
from transformers import AutoModelForCausalLM

import sample
from fast import aligned_cache, paged_cache
from model import RopeScaling, save_hf
from runtime.kernel import choose_kernel
from sample import fold, prompt_seeds, sample_tokens, uniform

sampled, crowd, small_pages, caches = sampling.sampled, sampling.crowd, sampling.small_pages, sampling.caches
CACHES = {"plain": {"kernel": "reference"}, "aligned": {}, "paged": {"kv_memory_gib": 1.0}}


def next_probabilities(model, ids, temperature):
    with torch.no_grad():
        return torch.softmax(forward(model, ids)[-1] @ model.head_weight().T / temperature, -1).double()


def is_drawn_from(counts, probabilities):
    statistic, bound = chi_square(counts, probabilities)
    return statistic < bound


def key_of(u_B):
    """The keys whose `uniform` is u_B, float64 in [0, 1)."""
    return (u_B * 2**53).long() << 11


# Noise.


@pytest.mark.parametrize("axis", ["seed", "sample", "position"])
def test_noise_is_uniform_and_uncorrelated_along_each_axis(axis):
    numbers = dict.fromkeys(("seed", "sample", "position"), torch.zeros(40_000, dtype=torch.int64))
    numbers[axis] = torch.arange(40_000)
    u = uniform(fold(fold(numbers["seed"], numbers["sample"]), numbers["position"]))
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    assert is_drawn_from(torch.bincount((u * 32).long(), minlength=32), torch.full((32,), 1 / 32))
    # Low bits as well: the distribution within a bin
    assert is_drawn_from(torch.bincount((u * 2**24).long() % 32, minlength=32), torch.full((32,), 1 / 32))
    for lag in (1, 2, 16):
        correlation = torch.corrcoef(torch.stack((u[lag:], u[:-lag])))[0, 1]
        assert abs(correlation) < 5 / len(u) ** 0.5


def test_noise_is_the_published_hash():
    # SplitMix64 started at 0: its first three outputs
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(fold(0, i)) % 2**64 for i in range(3)] == outputs


def test_noise_differs_for_every_seed_sample_and_position():
    seeds, samples, positions = torch.arange(-20, 20), torch.arange(16), torch.arange(64)
    u = uniform(fold(fold(seeds[:, None, None], samples[:, None]), positions))
    assert u.shape == (40, 16, 64) and u.unique().numel() == u.numel()


def test_u_takes_the_upper_53_bits_of_a_key():
    u = torch.tensor([0.0, 2**-53, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert torch.equal(uniform(key_of(u)), u) and torch.equal(uniform(key_of(u) + 2**11 - 1), u)


def test_prompt_seeds_are_a_pure_function_and_distinct():
    seeds = [prompt_seeds(seed, step, 0, 64) for seed in range(4) for step in range(40)]
    assert torch.cat(seeds).unique().numel() == 4 * 40 * 64
    torch.manual_seed(1)
    assert torch.equal(prompt_seeds(3, 7, 0, 64), seeds[3 * 40 + 7])
    # Ranks that share a batch ask for their part of it.
    assert torch.equal(prompt_seeds(3, 7, 20, 10), seeds[3 * 40 + 7][20:30])


# Drawing one token.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_follow_the_tempered_softmax(temperature):
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    ids, logp = sample_tokens(logits.expand(30_000, -1), temperature, fold(5, torch.arange(30_000)))
    counts = torch.bincount(ids, minlength=20)
    probabilities = torch.softmax(logits.double() / temperature, -1)
    assert is_drawn_from(counts, probabilities)
    assert not is_drawn_from(counts, torch.softmax(logits.double() / (1.1 * temperature), -1))
    torch.testing.assert_close(logp.double(), probabilities.log()[ids], atol=1e-5, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -torch.inf, 0.0, -torch.inf]])
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    ids, logp = sample_tokens(logits.expand(4, -1), 1.0, key_of(u))
    assert ids.tolist() == [1, 1, 4, 4]
    torch.testing.assert_close(logp, torch.full((4,), 0.5).log())


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    ids, logp = sample_tokens(logits, 0, fold(0, torch.arange(6)))
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1).max(-1).values)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999])
def test_top_p_draws_from_the_smallest_set_that_reaches_the_mass(top_p):
    logits = 2 * torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    grid = torch.arange(0, 1, 2**-14, dtype=torch.float64)
    for row in logits:
        ids, logp = sample_tokens(row.expand(len(grid), -1), 1.0, key_of(grid), top_p)
        probabilities = torch.softmax(row.double(), -1)
        wanted, mass = set(), 0.0
        for token in probabilities.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            wanted.add(token)
            mass += probabilities[token].item()
        # A token so rare that the grid steps over it may be missing; none may be there that should not.
        drawn = set(ids.tolist())
        assert drawn <= wanted and all(probabilities[token] < 2**-13 for token in wanted - drawn)
        # Log-probs stay those of the whole softmax.
        torch.testing.assert_close(logp.double(), probabilities.log()[ids], atol=1e-5, rtol=0)


def test_top_p_takes_no_more_than_it_needs_among_equals():
    key = key_of(torch.linspace(0, 0.99, 64, dtype=torch.float64))
    ids, _ = sample_tokens(torch.zeros(64, 4), 1.0, key, 0.5)
    assert set(ids.tolist()) == {0, 1}


def test_top_p_keeps_the_proportions_of_what_it_keeps():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    ids, _ = sample_tokens(logits.expand(20_000, -1), 1.0, fold(1, torch.arange(20_000)), 0.9)
    kept = torch.tensor([0.5, 0.3, 0.15, 0.0], dtype=torch.float64) / 0.95
    assert is_drawn_from(torch.bincount(ids, minlength=4), kept)


def test_ids_without_a_token_are_neither_drawn_nor_counted():
    logits, key = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)), fold(0, torch.arange(50))
    phantoms = torch.cat((logits, torch.full((50, 3), 100.0)), 1)
    for wanted, drawn in zip(sample_tokens(logits, 1.0, key),
                             sample_tokens(phantoms, 1.0, key, vocab_size=20), strict=True):
        assert torch.equal(wanted, drawn)


# generate: the distribution, with each cache.


@pytest.fixture(params=CACHES)
def cache(request):
    """Settings of `generate` that choose one of the three caches."""
    return CACHES[request.param]


def test_each_setting_chooses_its_cache(monkeypatch):
    made = []
    for module in (sample, aligned_cache, paged_cache):
        watch(monkeypatch, module.Cache, "admit", lambda cache, *_: made.append(type(cache)))
    for settings in CACHES.values():
        draw(toy_model(), [[1, 2]], **settings)
    assert made == [sample.Cache, aligned_cache.Cache, paged_cache.Cache]


def test_all_caches_have_the_same_methods():
    def methods(cache):
        return {name: str(inspect.signature(value)) for name, value in vars(cache).items()
                if inspect.isfunction(value) and (name == "__init__" or name in sample.Cache.__doc__)}

    wanted = methods(sample.Cache)
    assert len(wanted) == 9 and methods(aligned_cache.Cache) == methods(paged_cache.Cache) == wanted


def test_the_reference_kernel_needs_nothing_of_fast(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("fast", "triton")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        draw(toy_model(), [[1, 2]])
    for memory in (None, 0.01):
        assert draw(toy_model(), [[1, 2]], 2, kernel="reference", kv_memory_gib=memory)


def test_replies_follow_the_model_at_the_temperature_asked_for():
    model = toy_model(vocab_size=12)
    prompt, temperature = [3, 1, 4], 1.3
    rollouts = draw(model, [prompt], 6000, temperature=temperature, max_new_tokens=2, batch_size=3000)
    first = torch.tensor([rollout.ids[0] for rollout in rollouts])
    counts = torch.bincount(first, minlength=12)
    assert is_drawn_from(counts, next_probabilities(model, prompt, temperature))
    assert not is_drawn_from(counts, next_probabilities(model, prompt, 1.0))
    for token in counts.topk(2).indices.tolist():
        second = torch.tensor([rollout.ids[1] for rollout in rollouts if rollout.ids[0] == token])
        wanted = next_probabilities(model, [*prompt, token], temperature)
        assert is_drawn_from(torch.bincount(second, minlength=12), wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_a_full_forward(temperature, cache):
    model, prompts = toy_model(), ragged_prompts(9, 30)
    settings = {"temperature": temperature, "max_new_tokens": 20, "stop_ids": {1, 2, 3}}
    rollouts = draw(model, prompts, 3, **settings, **cache)
    assert len({len(rollout.ids) for rollout in rollouts}) > 3
    for rollout in rollouts:
        wanted = full_forward_logp(model, rollout, temperature)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


def test_a_row_without_a_token_is_never_sampled_and_does_not_count():
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB - 2:] = 40 * model.lm_head.weight[:2]
    prompts = ragged_prompts(6, 10, vocab=VOCAB - 2)
    assert any(max(ids) >= VOCAB - 2 for ids in ids_of(draw(model, prompts, 4)))
    with_phantoms = draw(model, prompts, 4, vocab_size=VOCAB - 2)
    with torch.no_grad():
        model.lm_head.weight[VOCAB - 2:] = -40.0 * model.lm_head.weight[:2]
    other_phantoms = draw(model, prompts, 4, vocab_size=VOCAB - 2)
    assert all(max(ids) < VOCAB - 2 for ids in ids_of(with_phantoms))
    assert with_phantoms == other_phantoms
    for rollout in with_phantoms[:3]:
        wanted = full_forward_logp(model, rollout, vocab_size=VOCAB - 2)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


def test_top_p_reaches_generate():
    model, prompts = toy_model(), ragged_prompts(5, 10)
    assert ids_of(draw(model, prompts, 2, top_p=1e-6)) == ids_of(draw(model, prompts, 2, temperature=0))
    assert ids_of(draw(model, prompts, 2, top_p=0.5)) != ids_of(draw(model, prompts, 2))


# generate: what shares the batch does not matter.


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_replies_do_not_depend_on_the_batch_size(sampled, batch_size, cache):
    model, prompts, settings, wanted = sampled
    if batch_size == 1:
        prompts, settings, wanted = prompts[:3], settings | {"seeds_P": settings["seeds_P"][:3]}, wanted[:15]
    assert_same(draw(model, prompts, 5, **settings, **cache, batch_size=batch_size), wanted)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replies_do_not_depend_on_the_order_of_the_prompts(sampled, seed):
    model, prompts, settings, wanted = sampled
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    moved = {**settings, "seeds_P": settings["seeds_P"][order]}
    rollouts = draw(model, [prompts[i] for i in order], 5, **moved, batch_size=20)
    assert_same(rollouts, [wanted[5 * i + j] for i in order for j in range(5)])


def test_more_replies_leave_the_first_ones_as_they_are(sampled):
    model, prompts, settings, wanted = sampled
    fewer = draw(model, prompts, 2, **settings)
    assert_same(fewer, [wanted[5 * i + j] for i in range(13) for j in range(2)])


def test_padding_changes_nothing(cache):
    model = toy_model()
    short, long = [5, 6], ragged_prompts(1, 1)[0] * 90
    together = draw(model, [long, short, long], 1, seeds_P=[1, 2, 3], **cache)
    assert_same([together[1]], draw(model, [short], 1, seeds_P=[2], **cache))


@pytest.mark.parametrize("cache_class, settings", [
    (sample.Cache, CACHES["plain"]), (aligned_cache.Cache, CACHES["aligned"])], ids=["plain", "aligned"])
def test_a_row_that_moves_to_a_free_slot_stays_right(sampled, monkeypatch, cache_class, settings):
    model, prompts, deciding, wanted = sampled
    moves = []
    watch(monkeypatch, cache_class, "move", lambda cache, source, target: moves.append((source, target)))
    assert_same(draw(model, prompts, 5, **deciding, **settings), wanted)
    assert len(moves) > 10 and all(source > target for source, target in moves)


@pytest.fixture
def forward_sizes(sampled):
    """How many tokens each forward of the model takes."""
    sizes = []
    hook = sampled[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    hook.remove()


def test_each_prompt_is_computed_once_for_its_replies(sampled, forward_sizes, cache):
    model, prompts, settings, _ = sampled
    draw(model, prompts, 5, **settings, **cache)
    # All but its last token, which is the first input of each of them
    assert forward_sizes[0] == sum(len(prompt) - 1 for prompt in prompts) and forward_sizes[1] == 65


def test_replies_that_start_later_find_their_prompt_computed(sampled, forward_sizes, cache):
    model, prompts, settings, wanted = sampled
    assert_same(draw(model, prompts, 5, **settings, batch_size=4, **cache), wanted)
    # Every other forward is a step: a token in for each token of a reply.
    assert sum(forward_sizes) == sum(len(prompt) - 1 for prompt in prompts) + sum(map(len, ids_of(wanted)))


def test_prompts_computed_in_parts_give_the_same_replies(sampled, forward_sizes, monkeypatch, cache):
    model, prompts, settings, wanted = sampled
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 60)
    assert_same(draw(model, prompts, 5, **settings, **cache), wanted)
    prefilled = sum(len(prompt) - 1 for prompt in prompts)
    parts = [sum(forward_sizes[:i]) for i in range(len(forward_sizes))].index(prefilled)
    assert parts >= 3 and max(forward_sizes[:parts]) <= 60


# generate: greedy decoding, ends, the order of the rollouts.


@pytest.mark.parametrize("stops", [False, True], ids=["to the limit", "with stop ids"])
@pytest.mark.parametrize("family", [
    {}, {"model_type": "llama", "attention_bias": True, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)},
    {"model_type": "qwen3"}], ids=["qwen2", "llama", "qwen3"])
def test_greedy_decoding_is_token_identical_to_transformers(tmp_path, family, stops, cache):
    model, prompts = toy_model(num_key_value_heads=1, **family), ragged_prompts(16, 40)
    save_hf(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stop_ids = [7, 8, 11] if stops else []
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = peer.generate(padded, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0,
                        eos_token_id=stop_ids or None)
    wanted = []
    for reply in out[:, longest:].tolist():
        ends = [i + 1 for i, token in enumerate(reply) if token in stop_ids]
        wanted.append(reply[:ends[0]] if ends else reply)
    rollouts = draw(model, prompts, max_new_tokens=64, temperature=0.0, stop_ids=stop_ids, **cache)
    assert ids_of(rollouts) == wanted
    lengths = {len(rollout.ids) for rollout in rollouts}
    assert len(lengths) > 4 if stops else lengths == {64}
    assert len(set(sum(wanted, []))) > 20


def test_a_stop_id_ends_a_reply_and_belongs_to_it(sampled):
    _, _, settings, rollouts = sampled
    for rollout in rollouts:
        stops = [i for i, token in enumerate(rollout.ids) if token in settings["stop_ids"]]
        assert stops == ([len(rollout.ids) - 1] if rollout.finished else [])
        assert len(rollout.ids) == len(rollout.logp) <= 24
        assert rollout.finished or len(rollout.ids) == 24
        assert max(rollout.logp) <= 0


def test_a_stop_id_at_the_last_position_counts_as_finished():
    model, prompt = toy_model(), [3, 1, 4]
    rollout, = draw(model, [prompt], max_new_tokens=5)
    last = rollout.ids[-1]
    cut = rollout.ids.index(last) + 1
    again, = draw(model, [prompt], max_new_tokens=cut, stop_ids={last})
    assert again.finished and again.ids == rollout.ids[:cut]
    other, = draw(model, [prompt], max_new_tokens=1)
    assert not other.finished and other.ids == rollout.ids[:1]


def test_rollouts_come_prompt_by_prompt_in_the_order_given():
    model, prompts = toy_model(), ragged_prompts(6, 12, seed=3)
    rollouts = draw(model, prompts, 3)
    assert [rollout.prompt_ids for rollout in rollouts] == [prompt for prompt in prompts for _ in range(3)]
    assert all(len({tuple(ids) for ids in ids_of(rollouts[3 * i:3 * i + 3])}) == 3 for i in range(6))
    assert draw(model, [], 3) == []


def test_equal_prompts_with_equal_seeds_draw_equal_replies_and_with_others_others():
    model, prompt = toy_model(), [3, 1, 4]
    a, b, c = draw(model, [prompt] * 3, seeds_P=[9, 9, 8])
    assert a.ids == b.ids != c.ids


def test_on_token_sees_exactly_the_ids(sampled):
    model, prompts, settings, wanted = sampled
    seen = [[] for _ in wanted]
    draw(model, prompts, 5, **settings, batch_size=30, on_token=lambda i, token: seen[i].append(token))
    assert seen == ids_of(wanted)


def test_sampling_under_bf16_autocast_stays_near_fp32(sampled, cache):
    model, prompts, settings, _ = sampled
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = draw(model, prompts, 5, **settings, **cache)
    for rollout in rollouts[::7]:
        assert (torch.tensor(rollout.logp) - full_forward_logp(model, rollout)).abs().mean() < 0.05


@pytest.mark.parametrize(("prompts", "changes", "message"), [
    ([[1], [2] * 21], {}, "prompt 1 has 21 tokens; .* max_new_tokens 12 .* 32 positions .* 1 to 20"),
    ([[1], []], {}, "prompt 1 has 0 tokens"),
    ([[1, VOCAB]], {}, r"prompt 0 holds id 48, but the model's last is 47"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
    ([[1]], {"temperature": -0.1}, "temperature -0.1"),
    ([[1]], {"temperature": math.nan}, "temperature nan"),
    ([[1]], {"temperature": math.inf}, "temperature inf"),
    ([[1]], {"top_p": math.nan}, "top_p nan"),
    ([[1]], {"top_p": 0.0}, "top_p 0.0"),
    ([[1]], {"top_p": 1.5}, "top_p 1.5"),
])
def test_what_cannot_be_sampled_is_one_clear_line(prompts, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(toy_model(max_position_embeddings=32), prompts, **changes)
    assert "\n" not in str(caught.value)


def test_the_longest_prompt_that_leaves_room_is_taken():
    rollout, = draw(toy_model(max_position_embeddings=32), [[2] * 20])
    assert len(rollout.ids) == 12


def test_an_unknown_kernel_is_refused_in_one_line():
    with pytest.raises(ValueError, match="kernel is 'cuda'") as caught:
        draw(toy_model(), [[1]], kernel="cuda")
    assert "\n" not in str(caught.value)


def test_a_kernel_that_cannot_run_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choose_kernel.cache_clear()
    with pytest.raises(ValueError, match="'triton': sampling on a cuda .*the triton package") as caught:
        choose_kernel("triton", "cuda", "sampling")
    assert "\n" not in str(caught.value)
    assert draw(toy_model(), [[1]], kernel="auto")
    choose_kernel.cache_clear()


def test_auto_says_once_what_it_chose(capsys):
    choose_kernel.cache_clear()
    draw(toy_model(), [[1]])
    draw(toy_model(), [[1]])
    assert capsys.readouterr().err.count("kernel of sampling on cpu: fast") == 1


# The scheduler: the same replies, whatever the schedule.


def test_a_pass_of_prefill_is_placed_before_the_next_one(sampled, monkeypatch, cache):
    held, seen = [], set()

    def watching(model, prompts, kernel):
        held.append([prompt for prompt in prompts if prompt.kv is not None])
        seen.update(prompts)
        assert not [prompt for prompt in seen if prompt.kv is not None and not prompt.unstarted]

    watch(monkeypatch, sample, "prefill", watching)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 8)
    draw(sampled[0], ragged_prompts(6, 13, 0), 2, max_new_tokens=2, seeds_P=prompt_seeds(0, 0, 0, 6), **cache)
    assert len(held) > 2 and not any(held)


def random_schedule(seed):
    """(prompts, n, settings that decide the replies, settings that must not, steps between two looks)"""
    rng = random.Random(seed)
    P, n = rng.randint(1, 8), rng.randint(1, 5)
    prompts = ragged_prompts(P, rng.choice([1, 5, 13, 25]), seed)
    most = rng.choice([1, 3, 20])
    deciding = {"max_new_tokens": most, "stop_ids": set(rng.sample(range(VOCAB), rng.choice([0, 2, 4]))),
                "seeds_P": prompt_seeds(seed, 0, 0, P), "temperature": rng.choice([0.7, 1.0])}
    longest = -(-(max(map(len, prompts)) + most + 7) // paged_cache.PAGE) * paged_cache.PAGE
    memory = rng.choice([None, *(longest + pages * paged_cache.PAGE for pages in (0, 0, 1, 3, 10, 30))])
    schedule = {"batch_size": rng.choice([1, 2, 3, 7, 64]), "kv_memory_gib": memory and gib(memory),
                "kernel": rng.choice(["reference", "auto", "auto"])}
    return prompts, n, deciding, schedule, rng.choice([1, 1, 2, 3, 8])


@pytest.mark.parametrize("seeds", [range(0, 15), range(15, 30), range(30, 45)], ids=str)
def test_replies_do_not_depend_on_the_schedule(sampled, small_pages, monkeypatch, caches, seeds):
    for seed in seeds:
        prompts, n, deciding, schedule, steps = random_schedule(seed)
        monkeypatch.setitem(sample.STEPS, "cpu", 1)
        wanted = draw(sampled[0], prompts, n, **deciding)
        monkeypatch.setitem(sample.STEPS, "cpu", steps)
        seen = [[] for _ in wanted]
        rollouts = draw(sampled[0], prompts, n, **deciding, **schedule,
                        on_token=lambda i, token, seen=seen: seen[i].append(token))
        assert ids_of(rollouts) == seen == ids_of(wanted), seed
        for rollout, other in zip(rollouts, wanted, strict=True):
            assert rollout.finished == other.finished
            logp, wanted_logp = torch.tensor(rollout.logp), torch.tensor(other.logp)
            torch.testing.assert_close(logp, wanted_logp, atol=3e-5, rtol=0)
    assert any(cache.preempted for cache in caches)


def test_preempted_rows_draw_the_same_tokens_again(small_pages, caches, crowd):
    model, prompts, settings, wanted = crowd
    assert_same(draw(model, prompts, 4, **settings, kv_memory_gib=gib(90)), wanted)
    assert len(caches[0].preempted) > 5


@pytest.mark.parametrize("cache", [CACHES["plain"], {}], ids=["plain", "paged"])
def test_memory_below_one_reply_is_refused_and_the_number_it_names_is_enough(crowd, cache):
    model, prompts, settings, wanted = crowd
    message = "kv_memory_gib: 1e-06 GiB .* of 52 tokens; give it 0.001"
    with pytest.raises(ValueError, match=message) as caught:
        draw(model, prompts, 4, **settings, **cache, kv_memory_gib=1e-6)
    assert "\n" not in str(caught.value)
    assert_same(draw(model, prompts, 4, **settings, **cache, kv_memory_gib=0.001), wanted)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_plain_cache_bounds_its_memory_by_fewer_slots(crowd, forward_sizes, monkeypatch, rows):
    model, prompts, settings, _ = crowd
    model = copy.deepcopy(model).double()  # in fp32 rounding is 1e-5, on some processors more, on others less
    wanted = draw(model, prompts, 4, **settings)
    forward_sizes.clear()
    made, close = [], sample.Cache.close
    monkeypatch.setattr(sample.Cache, "close", lambda cache: (made.append(cache.kv.nbytes), close(cache)))
    bound = rows * 52 * 2 * TOKEN_BYTES  # twice those of fp32
    rollouts = draw(model, prompts, 4, **settings, **CACHES["plain"], kv_memory_gib=(bound + 1000) / 2**30)
    assert_same(rollouts, wanted)
    assert made == [bound] and max(forward_sizes[1:]) <= max(rows, max(map(len, prompts)) * rows)


# What a rollout phase leaves behind.


def bytes_of(thing):
    """Bytes of the tensors among the attributes of an object."""
    return sum(value.nbytes for value in vars(thing).values() if isinstance(value, torch.Tensor))


def test_an_interruption_leaves_no_keys_and_values(sampled, monkeypatch, cache):
    kept = []
    watch(monkeypatch, sample, "decode_all", lambda decoder, *_: kept.extend((decoder, decoder.cache)))

    def interrupt(number, token):
        assert bytes_of(kept[1]) > 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(sampled[0], [[1, 2, 3]], 4, on_token=interrupt, **cache)
    decoder, cache = kept
    assert bytes_of(cache) == 0 and decoder.head_DV is None and decoder.graphs is None


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_second_phase_samples_from_the_updated_weights(autocast, cache):
    before, after, wanted = replies_before_and_after_an_update(
        toy_model(), ragged_prompts(4, 12), autocast, **cache)
    assert after == wanted != before
