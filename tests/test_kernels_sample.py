"""The Triton kernels of sample.py: the same attention as the plain definition, and draws from the softmax.

Without a GPU they run in Triton's interpreter, which is slow: sizes are small and odd.
"""

import pytest
import torch
from test_sample import assert_same, chi_square, draw, full_forward_logp, ids_of, ragged_prompts, toy_model

import sample
from sample import decode_attention, decode_attention_reference, fold, generate, gumbel_tokens

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Token sampling.


def keys(count, seed=0):
    return fold(fold(0, seed), torch.arange(count)).to(DEVICE)


def gumbel_reference(logits_BV, temperature, key_B, vocab_size=None):
    """What `gumbel_tokens` draws, by its definition, in double precision. Returns (ids_B, logp_B)."""
    scaled_BV = logits_BV[:, :vocab_size].double() / (temperature or 1.0)
    score_BV = scaled_BV
    if temperature > 0:
        hash_BV = fold(key_B[:, None], torch.arange(scaled_BV.shape[1], device=key_B.device))
        x_BV = (((hash_BV >> 11) & (2**53 - 1)).double() + 0.5) / 2**53
        score_BV = scaled_BV - (-torch.log1p(-x_BV)).log()
    ids_B = score_BV.argmax(-1)
    return ids_B, scaled_BV.log_softmax(-1).gather(1, ids_B[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.7])
@pytest.mark.parametrize(("rows", "columns", "vocab_size"),
                         [(5, 9001, 8999), (3, 4096, None), (2, 17, 13), (1, 1, 1)])
def test_tokens_and_log_probs_equal_the_definitions(rows, columns, vocab_size, temperature):
    logits = 3 * random(rows, columns)
    if vocab_size:
        logits[:, vocab_size:] = torch.nan
    ids, logp = gumbel_tokens(logits, temperature, keys(rows), vocab_size)
    wanted, wanted_logp = gumbel_reference(logits, temperature, keys(rows), vocab_size)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(logp.double(), wanted_logp, atol=2e-6, rtol=1e-6)


def test_many_rows_draw_the_tokens_of_the_definition():
    logits, key = random(60, 40, seed=1), keys(60, 1)
    assert torch.equal(gumbel_tokens(logits, 1.0, key)[0], gumbel_reference(logits, 1.0, key)[0])


def test_the_winner_among_many_is_told_from_the_second():
    # Seeds whose two best of 40,000 equal tokens lie so close that 1 - x in fp32 takes one for the other
    key = fold(0, torch.tensor([153, 1207, 1788])).to(DEVICE)
    logits = torch.zeros(3, 40_000, device=DEVICE)
    wanted, _ = gumbel_reference(logits, 1.0, key)
    x_BV = ((fold(key[:, None], torch.arange(40_000, device=DEVICE)) >> 11) & (2**53 - 1)).float() * 2.0**-53
    assert not (torch.log(1 - x_BV).argmax(1) == wanted).any()
    assert torch.equal(gumbel_tokens(logits, 1.0, key)[0], wanted)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_gumbel_draws_follow_the_tempered_softmax(temperature):
    logits = 2 * random(20)
    probabilities = torch.softmax(logits.double().cpu() / temperature, -1)
    ids, _ = gumbel_reference(logits.expand(30_000, -1), temperature, keys(30_000))
    statistic, bound = chi_square(torch.bincount(ids.cpu(), minlength=20), probabilities)
    assert statistic < bound
    # The kernel itself, in fewer draws where it is interpreted
    draws = 30_000 if DEVICE == "cuda" else 300
    ids, _ = gumbel_tokens(logits.expand(draws, -1), temperature, keys(draws, seed=2))
    counts = torch.bincount(ids.cpu(), minlength=20)
    statistic, bound = chi_square(counts, probabilities)
    assert statistic < bound
    statistic, bound = chi_square(counts, torch.softmax(logits.double().cpu() / (2.5 * temperature), -1))
    assert statistic > bound


def test_a_row_is_drawn_alike_whatever_shares_its_batch():
    logits, key = random(7, 300), keys(7)
    ids, logp = gumbel_tokens(logits, 0.7, key)
    for row in (0, 3, 6):
        alone, alone_logp = gumbel_tokens(logits[row:row + 1], 0.7, key[row:row + 1])
        assert alone[0] == ids[row] and alone_logp[0] == logp[row]


def test_ids_without_a_token_are_never_drawn_however_likely():
    logits = random(15, 50)
    logits[:, 45:] = 100.0
    ids, logp = gumbel_tokens(logits, 1.0, keys(15), vocab_size=45)
    assert ids.max() < 45 and logp.min() > -20
    assert gumbel_tokens(logits, 0, keys(15), vocab_size=45)[0].max() < 45


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((25, 9), -torch.inf, device=DEVICE)
    logits[:, 4], logits[:, 7] = 0.0, 0.0
    ids, logp = gumbel_tokens(logits, 1.0, keys(25))
    assert set(ids.tolist()) == {4, 7}
    torch.testing.assert_close(logp, torch.full_like(logp, 0.5).log())


def test_a_certain_token_has_log_prob_zero_and_never_more():
    logits = 60 * random(20, 30)
    assert gumbel_tokens(logits, 0.5, keys(20))[1].max() <= 0


def test_logits_that_are_not_finite_still_give_an_id():
    ids, _ = gumbel_tokens(torch.full((3, 33), torch.nan, device=DEVICE), 1.0, keys(3))
    assert 0 <= ids.min() and ids.max() < 33


# Decode attention.


def paged(lengths, H, K, E, dtype=torch.float32, seed=0):
    """Arguments of decode_attention: rows with so many tokens before the new one, in shuffled pages; whatever
    was never written is NaN."""
    generator = torch.Generator().manual_seed(seed)
    B, sizes = len(lengths), [length // sample.PAGE + 1 for length in lengths]
    order = (torch.randperm(sum(sizes) + 2, generator=generator) + 1).tolist()
    table = torch.zeros(B, max(sizes) + 1, dtype=torch.int32)
    pages = torch.full((2, sum(sizes) + 3, sample.PAGE, K, E), torch.nan)
    for b, length in enumerate(lengths):
        own = [order.pop() for _ in range(sizes[b])]
        table[b, :sizes[b]] = torch.tensor(own)
        tokens = torch.randn(2, len(own) * sample.PAGE, K, E, generator=generator)
        tokens[:, length:] = torch.nan
        pages[:, own] = tokens.unflatten(1, (len(own), sample.PAGE))
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


@pytest.mark.parametrize(("H", "K", "E"), [(6, 2, 16), (14, 2, 64), (3, 3, 16), (5, 1, 32)])
@pytest.mark.parametrize("lengths", [[0], [1, 31, 0], [32, 63, 64, 65], [200, 3]], ids=str)
def test_attention_equals_the_reference(lengths, H, K, E):
    (wanted, wanted_pages), (out, pages) = both(paged(lengths, H, K, E))
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)
    # Only the slots of the new tokens were written.
    torch.testing.assert_close(pages, wanted_pages, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_number_of_parts_changes_nothing(parts, monkeypatch):
    arguments = paged([300, 0, 65], 4, 2, 16)
    monkeypatch.setattr(sample, "TWO_WAVES", parts * 6)
    (wanted, _), (out, _) = both(arguments)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


def test_attention_over_twelve_thousand_tokens():
    (wanted, _), (out, _) = both(paged([12_287], 2, 1, 16))
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


def test_attention_in_bf16():
    (wanted, _), (out, _) = both(paged([70, 5], 6, 2, 16, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)


def test_large_scores_do_not_overflow():
    q, *others = paged([130], 2, 1, 16)
    (wanted, _), (out, _) = both((100 * q, *others))
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


# Both in generate.


def toy():
    return toy_model(head_dim=16, num_hidden_layers=1).to(DEVICE)


@pytest.fixture
def few_parts(monkeypatch):
    """Interpreted, every program costs milliseconds."""
    if DEVICE == "cpu":
        monkeypatch.setattr(sample, "TWO_WAVES", 8)


def test_greedy_replies_with_kernels_equal_those_without(few_parts):
    model, prompts = toy(), ragged_prompts(3, 40)
    settings = {"temperature": 0.0, "max_new_tokens": 4}
    assert_same(draw(model, prompts, **settings, kernel="triton"),
                draw(model, prompts, **settings, kernel="reference"))


def test_replies_with_kernels_do_not_depend_on_the_schedule_and_are_scored_right(few_parts):
    model, prompts = toy(), ragged_prompts(2, 40, seed=2)
    settings = {"max_new_tokens": 4, "temperature": 0.7, "kernel": "triton", "vocab_size": 47}
    together = draw(model, prompts, 2, **settings)
    alone = draw(model, prompts, 2, **settings, batch_size=1)
    assert ids_of(together) == ids_of(alone)
    model.cpu()
    for rollout in together:
        wanted = full_forward_logp(model, rollout, 0.7, 47)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


def test_a_kernel_that_cannot_run_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sample, "triton", None)
    sample.choose_kernel.cache_clear()
    with pytest.raises(ValueError, match="kernel is 'triton'; .* CUDA GPU") as caught:
        draw(toy_model(), [[1]], kernel="triton")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="kernel is 'cuda'"):
        draw(toy_model(), [[1]], kernel="cuda")
    assert draw(toy_model(), [[1]], kernel="auto")
    sample.choose_kernel.cache_clear()


def test_auto_says_once_what_it_chose(capsys):
    sample.choose_kernel.cache_clear()
    draw(toy_model().to(DEVICE), [[1]])
    draw(toy_model().to(DEVICE), [[1]])
    assert capsys.readouterr().err.count(f"sampling on {DEVICE}: kernel") == 1


# At full sizes.


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "K", "E"), [(14, 2, 64), (12, 2, 128), (28, 4, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_on_a_gpu_attention_equals_the_reference_up_to_12k_tokens(rows, dtype, H, K, E):
    lengths = torch.randint(0, 2000, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[0] = 12_287
    (wanted, _), (out, _) = both(paged(lengths, H, K, E, dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_tokens_of_the_whole_vocabulary_equal_the_definition(dtype):
    logits = (3 * random(64, 151_936)).to(dtype)
    ids, logp = gumbel_tokens(logits, 0.7, keys(64), 151_665)
    wanted, wanted_logp = gumbel_reference(logits, 0.7, keys(64), 151_665)
    assert (ids == wanted).sum() >= 63  # a near tie may go the other way in fp32
    same = ids == wanted
    torch.testing.assert_close(logp.double()[same], wanted_logp[same], atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_on_a_gpu_draws_follow_the_softmax_of_the_whole_vocabulary():
    logits = 2 * random(151_936)
    ids, _ = gumbel_tokens(logits.expand(20_000, -1), 1.0, keys(20_000), 151_665)
    probabilities = torch.softmax(logits[:151_665].double().cpu(), -1)
    order = probabilities.argsort(descending=True)
    binned = torch.zeros(200, dtype=torch.float64)
    counts = torch.zeros(200, dtype=torch.int64)
    bins = torch.empty(151_665, dtype=torch.int64)
    bins[order] = torch.arange(151_665) * 200 // 151_665
    binned.index_add_(0, bins, probabilities)
    counts.index_add_(0, bins[ids.cpu()], torch.ones(20_000, dtype=torch.int64))
    statistic, bound = chi_square(counts, binned)
    assert statistic < bound


@pytest.mark.gpu
def test_on_a_gpu_generate_takes_the_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(sample, "gumbel_tokens", lambda *x: calls.append(1) or gumbel_tokens(*x))
    generate(toy(), [[1, 2]], 2, max_new_tokens=3, temperature=1.0, stop_ids=(), seeds_P=[0])
    assert calls
