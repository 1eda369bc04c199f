"""fast/paged_cache.py: pages are shared, counted, given back and never lost; memory follows the tokens held;
attention in Triton equals the plain one.

Without a GPU the kernels run in Triton's interpreter, which is slow: sizes are small and odd.
"""

import pytest
import sampling
import torch
from conftest import calls_of
from sampling import assert_same, draw, full_forward_logp, gib, ids_of, ragged_prompts, toy_model
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from fast import paged_cache
from fast.paged_cache import decode_attention, decode_attention_reference

sampled, crowd, small_pages, caches = sampling.sampled, sampling.crowd, sampling.small_pages, sampling.caches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def why_no_kernel():
    """Why attention in Triton cannot run here, or ""."""
    if paged_cache.triton is None:
        return "Triton is not installed"
    versions = [tuple(map(int, x.__version__.split(".")[:2])) for x in (paged_cache.triton, paged_cache.np)]
    if DEVICE == "cpu" and versions[0] == (3, 6) and versions[1] >= (2, 4):
        return "the interpreter of Triton 3.6 cannot loop to a bound loaded from a tensor under numpy >= 2.4"
    return ""


needs_triton = pytest.mark.skipif(bool(why_no_kernel()), reason=why_no_kernel())


def test_the_most_recently_started_row_is_preempted_and_the_oldest_never(small_pages, crowd, monkeypatch):
    model, prompts, settings, _ = crowd
    preempted = []
    reserve = paged_cache.Cache.reserve

    def watching(cache, rows, steps):
        order = list(cache.row_pages)
        row = reserve(cache, rows, steps)
        assert row is None or (row is order[-1] and len(order) > 1)
        preempted.extend([row] if row else [])
        return row

    monkeypatch.setattr(paged_cache.Cache, "reserve", watching)
    draw(model, prompts, 4, **settings, kv_memory_gib=gib(90))
    assert preempted


def test_memory_for_one_reply_is_enough(small_pages, caches, crowd):
    model, prompts, settings, wanted = crowd
    prompts, wanted = prompts[:3], wanted[:12]
    settings = settings | {"seeds_P": settings["seeds_P"][:3]}
    longest = -(-(max(map(len, prompts)) + 39) // 4) * 4
    assert_same(draw(model, prompts, 4, **settings, kv_memory_gib=gib(longest)), wanted)
    assert caches[0].pool.shape[2] * 4 == longest + 4


def test_the_pages_that_a_prompt_fills_are_shared_and_counted_once(sampled, small_pages, monkeypatch):
    prompt = ragged_prompts(1, 1)[0] * 30
    seen, reserve = [], paged_cache.Cache.reserve

    def watching(cache, rows, steps):
        row = reserve(cache, rows, steps)
        seen.append((len(rows), sum(users > 0 for users in cache.users.values())))
        return row

    monkeypatch.setattr(paged_cache.Cache, "reserve", watching)
    draw(sampled[0], [prompt], 8, max_new_tokens=2, kv_memory_gib=gib(1000))
    # 29 tokens fill 7 pages; each of the 8 replies has one more that it does not share.
    assert seen[0] == (8, 7 + 8)


def test_memory_follows_the_tokens_held(sampled, small_pages, monkeypatch):
    # Prompts, replies and pages an eighth as long as usual ones: 900 and 120 tokens, pages of 32
    prompts = [ragged_prompts(1, 1, seed)[0] * (100 + seed) for seed in range(12)]
    shares, reserve = [], paged_cache.Cache.reserve

    def measuring(cache, rows, steps):
        row = reserve(cache, rows, steps)
        tokens = sum(len(ids) for ids in {tuple(row.prompt.ids) for row in rows})
        tokens += sum(len(row.rollout.ids) for row in rows)
        shares.append(sum(users > 0 for users in cache.users.values()) * paged_cache.PAGE / tokens)
        return row

    monkeypatch.setattr(paged_cache.Cache, "reserve", measuring)
    settings = {"max_new_tokens": 100, "stop_ids": {1, 2, 3}, "batch_size": 32}
    draw(sampled[0], prompts, 8, **settings, kv_memory_gib=gib(10**5))
    assert len(shares) > 50 and sum(shares) / len(shares) < 1.25


def test_the_table_names_the_pages_of_its_rows_and_else_page_0(small_pages, monkeypatch, crowd):
    model, prompts, settings, _ = crowd
    reserve, checked = paged_cache.Cache.reserve, []

    def checking(cache, rows, steps):
        if row := reserve(cache, rows, steps):
            return row
        wanted = torch.zeros_like(cache.table_BM)
        for slot, pages in enumerate(cache.row_pages[row] for row in rows):
            wanted[slot, :len(pages)] = torch.tensor(pages)
            assert 0 not in pages
        assert torch.equal(cache.table_BM, wanted)
        checked.append(len(rows))

    monkeypatch.setattr(paged_cache.Cache, "reserve", checking)
    draw(model, prompts, 4, **settings, kv_memory_gib=gib(120))
    assert len(checked) > 20


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def running_rows(count, prompt, reply):
    """A paged cache on the CPU with so many running rows of `reply` tokens, eight to a prompt."""
    rows = []
    for i in range(count):
        owner = rows[-1].prompt if i % 8 else sample.Prompt([1] * prompt, 8)
        rows.append(sample.Row(i, sample.Rollout(owner.ids, [2] * reply), owner, i, prompt + 2000))
    cache = paged_cache.Cache(toy_model().config, torch.float32, torch.device("cpu"), count, prompt,
                              prompt + 2000, 8, 0.1, "cpu")
    for row in rows:
        assert cache.admit(row, 0)
    return cache, rows


@pytest.mark.parametrize("reply", [1, 1000])
def test_a_row_that_needs_no_page_costs_reserve_a_few_calls_at_any_length_of_its_reply(reply):
    cache, rows = running_rows(64, 33, reply)
    assert cache.reserve(rows, 8) is None
    with Operations() as operations:
        # Its tokens, counted by three functions, and its pages, once to grow them and once for the table
        assert calls_of(lambda: cache.reserve(rows, 8)) <= 5 * len(rows) + 30
    assert operations.names == []


def test_reserve_writes_the_table_in_one_copy_and_only_where_it_changed():
    cache, rows = running_rows(64, 33, 1)
    cache.reserve(rows, 8)
    cache.host_BM[:] -= 10**6  # what is written again shows
    # A row grows by two pages, a row ends and the last one takes its slot.
    rows[5].rollout.ids += [2] * 60
    cache.release(rows[9])
    rows[9] = rows.pop()
    with Operations() as operations:
        cache.reserve(rows, 8)
    assert operations.names.count("copy_") == 1 and len(operations.names) <= 3, operations.names
    kept = cache.host_BM < 0
    assert kept.all(1).tolist() == [slot not in (5, 9, 63) for slot in range(64)]
    assert not cache.host_BM[63].any() and not kept[9].any()
    pages = len(cache.row_pages[rows[5]])
    assert pages == 4 and cache.host_BM[5, 2:4].tolist() == cache.row_pages[rows[5]][2:]
    assert torch.equal(cache.table_BM, torch.from_numpy(cache.host_BM))


def test_a_row_that_starts_again_in_its_slot_shows_its_new_pages():
    cache, rows = running_rows(2, 33, 1)
    cache.reserve(rows, 8)
    taken = cache.allocate(1)  # so that the row gets other pages, as many as before
    cache.release(rows[1])
    cache.free.reverse()
    cache.admit(rows[1], 1)
    cache.reserve(rows, 8)
    wanted = cache.row_pages[rows[1]]
    assert taken[0] not in wanted and cache.table_BM[1, :len(wanted)].tolist() == wanted
    assert not cache.table_BM[1, len(wanted):].any()


def test_no_page_is_kept_when_all_replies_have_ended(small_pages, caches, crowd):
    model, prompts, settings, _ = crowd
    draw(model, prompts, 4, **settings, batch_size=5, kv_memory_gib=gib(200))
    cache, = caches
    assert len(cache.free) == cache.pool.shape[2] - 1 and not cache.row_pages and not cache.prompt_pages


def test_bf16_autocast_reaches_the_pages(sampled, caches):
    model, prompts = sampled[0], ragged_prompts(5, 20)
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = draw(model, prompts, 3, kv_memory_gib=0.01)
        aligned = draw(model, prompts, 3)
    assert caches[0].pool.dtype == torch.bfloat16
    assert sum(a.ids[:3] == b.ids[:3] for a, b in zip(rollouts, aligned, strict=True)) > 8


# Decode attention.


def paged(lengths, H, K, E, dtype=torch.float32, seed=0):
    """Arguments of decode_attention: rows with so many tokens before the new one, in shuffled pages; whatever
    was never written is NaN."""
    generator = torch.Generator().manual_seed(seed)
    B, sizes = len(lengths), [length // paged_cache.PAGE + 1 for length in lengths]
    order = (torch.randperm(sum(sizes) + 2, generator=generator) + 1).tolist()
    table = torch.zeros(B, max(sizes) + 1, dtype=torch.int32)
    pages = torch.full((2, sum(sizes) + 3, paged_cache.PAGE, K, E), torch.nan)
    for b, length in enumerate(lengths):
        own = [order.pop() for _ in range(sizes[b])]
        table[b, :sizes[b]] = torch.tensor(own)
        tokens = torch.randn(2, len(own) * paged_cache.PAGE, K, E, generator=generator)
        tokens[:, length:] = torch.nan
        pages[:, own] = tokens.unflatten(1, (len(own), paged_cache.PAGE))
    q, k, v = (torch.randn(B, heads, E, generator=generator).to(DEVICE, dtype) for heads in (H, K, K))
    keys_and_values = pages.to(DEVICE, dtype)
    return q, k, v, *keys_and_values, table.to(DEVICE), torch.tensor(lengths, device=DEVICE)


def both(arguments):
    """((output, pages) of the reference, (output, pages) of the kernel)"""
    results = []
    for function in (decode_attention_reference, decode_attention):
        pages = [pages.clone() for pages in arguments[3:5]]
        out = function(*arguments[:3], *pages, *arguments[5:])
        results.append((out, torch.stack(pages)))
    return results


@pytest.fixture
def few_parts(monkeypatch):
    """Interpreted, every program costs milliseconds."""
    if DEVICE == "cpu":
        monkeypatch.setattr(paged_cache, "TWO_WAVES", 12)


@needs_triton
@pytest.mark.parametrize(("H", "K", "E"), [(6, 2, 16), (14, 2, 64), (3, 3, 16), (5, 1, 32)])
@pytest.mark.parametrize("lengths", [[0], [1, 31, 0], [32, 63, 64, 65], [200, 3]], ids=str)
def test_attention_equals_the_reference(lengths, H, K, E, few_parts):
    (wanted, wanted_pages), (out, pages) = both(paged(lengths, H, K, E))
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)
    # Only the slots of the new tokens were written.
    torch.testing.assert_close(pages, wanted_pages, atol=0, rtol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_number_of_parts_changes_nothing(parts, monkeypatch):
    arguments = paged([300, 0, 65], 4, 2, 16)
    monkeypatch.setattr(paged_cache, "TWO_WAVES", parts * 6)
    (wanted, _), (out, _) = both(arguments)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


@needs_triton
def test_attention_over_twelve_thousand_tokens(monkeypatch):
    if DEVICE == "cpu":  # interpreted, every block costs milliseconds
        monkeypatch.setattr(paged_cache, "FP32_BLOCK", (128, 8, 2))
    (wanted, _), (out, _) = both(paged([12_287], 2, 1, 16))
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


@needs_triton
def test_attention_in_bf16():
    (wanted, _), (out, _) = both(paged([70, 5], 6, 2, 16, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)


@needs_triton
def test_large_scores_do_not_overflow():
    q, *others = paged([130], 2, 1, 16)
    (wanted, _), (out, _) = both((100 * q, *others))
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


# In generate, with fast/draw.py.


def toy():
    return toy_model(head_dim=16, num_hidden_layers=1).to(DEVICE)


@needs_triton
def test_greedy_replies_with_kernels_equal_those_without(few_parts):
    model, prompts = toy(), ragged_prompts(3, 40)
    settings = {"temperature": 0.0, "max_new_tokens": 4}
    assert_same(draw(model, prompts, **settings, kernel="fast"),
                draw(model, prompts, **settings, kernel="reference"))


@needs_triton
def test_replies_with_kernels_do_not_depend_on_the_schedule_and_are_scored_right(few_parts):
    model, prompts = toy(), ragged_prompts(2, 40, seed=2)
    settings = {"max_new_tokens": 3, "temperature": 0.7, "kernel": "fast", "vocab_size": 47}
    together = draw(model, prompts, 2, **settings)
    alone = draw(model, prompts, 2, **settings, batch_size=1)
    assert ids_of(together) == ids_of(alone)
    model.cpu()
    for rollout in together:
        wanted = full_forward_logp(model, rollout, 0.7, 47)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "K", "E"), [(14, 2, 64), (12, 2, 128), (28, 4, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_on_a_gpu_attention_equals_the_reference_up_to_12k_tokens(rows, dtype, H, K, E):
    lengths = torch.randint(0, 2000, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[0] = 12_287
    arguments = paged(lengths, H, K, E, dtype)
    # bf16 has a reference in fp32 on the same inputs: one in bf16 has most of the tolerance as its error.
    exact = [x.float() if x.is_floating_point() else x for x in arguments]
    wanted, out = decode_attention_reference(*exact), decode_attention(*arguments)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.float(), wanted, atol=tolerance, rtol=tolerance)
