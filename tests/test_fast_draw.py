"""fast/draw.py: the tokens of its definition in double precision, and draws from the softmax.

Without a GPU the kernel runs in Triton's interpreter, which is slow: sizes are small and odd.
"""

import inspect

import pytest
import torch
from sampling import chi_square

import sample
from sample import fold

pytest.importorskip("triton")
from fast import draw  # noqa: E402
from fast.draw import sample_tokens  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def keys(count, seed=0):
    return fold(fold(0, seed), torch.arange(count)).to(DEVICE)


def gumbel_reference(logits_BV, temperature, key_B, vocab_size=None):
    """What the kernel draws, in double precision and plain PyTorch. Returns (ids_B, logp_B)."""
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
    ids, logp = sample_tokens(logits, temperature, keys(rows), vocab_size=vocab_size)
    wanted, wanted_logp = gumbel_reference(logits, temperature, keys(rows), vocab_size)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(logp.double(), wanted_logp, atol=2e-6, rtol=1e-6)


def test_many_rows_draw_the_tokens_of_the_definition():
    logits, key = random(60, 40, seed=1), keys(60, 1)
    assert torch.equal(sample_tokens(logits, 1.0, key)[0], gumbel_reference(logits, 1.0, key)[0])


def test_the_winner_among_many_is_distinguished_from_the_second():
    # Seeds whose two best of 40,000 equal tokens lie so close that 1 - x in fp32 takes one for the other
    key = fold(0, torch.tensor([153, 1207, 1788])).to(DEVICE)
    logits = torch.zeros(3, 40_000, device=DEVICE)
    wanted, _ = gumbel_reference(logits, 1.0, key)
    x_BV = ((fold(key[:, None], torch.arange(40_000, device=DEVICE)) >> 11) & (2**53 - 1)).float() * 2.0**-53
    assert not (torch.log(1 - x_BV).argmax(1) == wanted).any()
    assert torch.equal(sample_tokens(logits, 1.0, key)[0], wanted)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_gumbel_draws_follow_the_tempered_softmax(temperature, monkeypatch):
    logits = 2 * random(20)
    probabilities = torch.softmax(logits.double().cpu() / temperature, -1)
    ids, _ = gumbel_reference(logits.expand(30_000, -1), temperature, keys(30_000))
    statistic, bound = chi_square(torch.bincount(ids.cpu(), minlength=20), probabilities)
    assert statistic < bound
    # The kernel itself, in fewer draws where it is interpreted
    draws = 30_000 if DEVICE == "cuda" else 300
    if DEVICE == "cpu":
        monkeypatch.setattr(draw, "VOCAB_BLOCK", 32)
    ids, _ = sample_tokens(logits.expand(draws, -1), temperature, keys(draws, seed=2))
    counts = torch.bincount(ids.cpu(), minlength=20)
    statistic, bound = chi_square(counts, probabilities)
    assert statistic < bound
    statistic, bound = chi_square(counts, torch.softmax(logits.double().cpu() / (2.5 * temperature), -1))
    assert statistic > bound


def test_a_row_draws_the_same_token_whatever_shares_its_batch():
    logits, key = random(7, 300), keys(7)
    ids, logp = sample_tokens(logits, 0.7, key)
    for row in (0, 3, 6):
        alone, alone_logp = sample_tokens(logits[row:row + 1], 0.7, key[row:row + 1])
        assert alone[0] == ids[row] and alone_logp[0] == logp[row]


def test_ids_without_a_token_are_never_drawn_however_likely():
    logits = random(15, 50)
    logits[:, 45:] = 100.0
    ids, logp = sample_tokens(logits, 1.0, keys(15), vocab_size=45)
    assert ids.max() < 45 and logp.min() > -20
    assert sample_tokens(logits, 0, keys(15), vocab_size=45)[0].max() < 45


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((25, 9), -torch.inf, device=DEVICE)
    logits[:, 4], logits[:, 7] = 0.0, 0.0
    ids, logp = sample_tokens(logits, 1.0, keys(25))
    assert set(ids.tolist()) == {4, 7}
    torch.testing.assert_close(logp, torch.full_like(logp, 0.5).log())


def test_a_certain_token_has_log_prob_zero_and_never_more():
    logits = 60 * random(20, 30)
    assert sample_tokens(logits, 0.5, keys(20))[1].max() <= 0


def test_logits_that_are_not_finite_still_give_an_id():
    ids, _ = sample_tokens(torch.full((3, 33), torch.nan, device=DEVICE), 1.0, keys(3))
    assert 0 <= ids.min() and ids.max() < 33


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_tokens_of_the_whole_vocabulary_equal_the_definition(dtype):
    logits = (3 * random(64, 151_936)).to(dtype)
    ids, logp = sample_tokens(logits, 0.7, keys(64), vocab_size=151_665)
    wanted, wanted_logp = gumbel_reference(logits, 0.7, keys(64), 151_665)
    assert (ids == wanted).sum() >= 63  # a near tie may go the other way in fp32
    same = ids == wanted
    torch.testing.assert_close(logp.double()[same], wanted_logp[same], atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_on_a_gpu_draws_follow_the_softmax_of_the_whole_vocabulary():
    logits = 2 * random(151_936)
    ids, _ = sample_tokens(logits.expand(20_000, -1), 1.0, keys(20_000), vocab_size=151_665)
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


def test_it_takes_what_its_definition_takes_and_refuses_top_p():
    assert inspect.signature(sample_tokens) == inspect.signature(sample.sample_tokens)
    with pytest.raises(AssertionError, match="top_p is 0.9"):
        sample_tokens(random(2, 5), 1.0, keys(2), top_p=0.9)


def test_the_kernel_hashes_as_fold_does():
    assert draw.GOLDEN.value == sample.GOLDEN
    source = inspect.getsource(fold)
    assert str(draw.FIRST_FACTOR.value) in source and str(draw.SECOND_FACTOR.value) in source
