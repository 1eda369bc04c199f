"""Equals sample.sample_tokens: the same distribution, drawn by Gumbel noise in one pass over the logits.

    token = argmax(logits / temperature - log w),   w = -log(1 - x),   x in (0, 1) from fold(key, id)

w is exponentially distributed, so the argmax is a draw from the softmax (Gumbel-max, arXiv 1411.0030). The
definition needs the cumulative sum of a row; here the blocks of a row are independent. The two draw different
tokens from equal distributions.

Axes: B rows being decoded, V vocabulary rows, Z blocks of a row.
"""

import torch
import triton
import triton.language as tl

VOCAB_BLOCK = 4096  # logits of a row that a program reads at once
# The hash of sample.fold (SplitMix64).
GOLDEN = tl.constexpr(-7046029254386353131)
FIRST_FACTOR = tl.constexpr(-4658895280553007687)
SECOND_FACTOR = tl.constexpr(-7723592293110705685)


def sample_tokens(logits_BV, temperature, key_B, top_p=1.0, vocab_size=None):
    """Draw one token a row. Returns (ids_B, logp_B), ids int64 and log-probs in nats, at most 0.

    temperature: 0 is greedy; key_B: int64, keys of (prompt, sample, position); vocab_size: ids that have a
    token, others are never drawn. top_p must be 1: the definition sorts a row for less.
    """
    assert top_p == 1, f"top_p is {top_p}, but only 1 can be drawn in one pass"
    (B, V), sharpness = logits_BV.shape, 1 / (temperature or 1.0)
    vocab_size = vocab_size or V
    blocks = triton.cdiv(vocab_size, VOCAB_BLOCK)
    score_BZ, lse_BZ = torch.empty(2, B, blocks, device=logits_BV.device)
    ids_BZ = torch.empty(B, blocks, dtype=torch.int64, device=logits_BV.device)
    best_of_block[(B, blocks)](logits_BV, key_B, score_BZ, ids_BZ, lse_BZ, logits_BV.stride(0), V, vocab_size,
                               sharpness, temperature == 0, VOCAB_BLOCK, num_warps=8)
    # Logits that are not finite have no winner, but the id must be one that the model has.
    ids_B1 = ids_BZ.gather(1, score_BZ.argmax(1, keepdim=True)).clamp_(0, vocab_size - 1)
    logp_B1 = logits_BV.gather(1, ids_B1).float() * sharpness - lse_BZ.logsumexp(1, keepdim=True)
    return ids_B1[:, 0], logp_B1[:, 0].clamp_max_(0.0)


@triton.jit
def best_of_block(logits_ptr, key_ptr, score_ptr, ids_ptr, lse_ptr, row_stride, V, vocab_size,
                  SHARPNESS: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr):
    """The best id of one block of one row of logits, its score, and the log-sum-exp of the block."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * row_stride
    # V is a multiple of 16 where vocab_size is odd: with V as the bound, one load reads 8 logits.
    logits = tl.load(logits_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
    scaled = tl.where(columns < vocab_size, logits * SHARPNESS, -float("inf"))
    score = scaled
    if not GREEDY:
        h = tl.load(key_ptr + row) + (columns.to(tl.int64) + 1) * GOLDEN
        h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * FIRST_FACTOR
        h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * SECOND_FACTOR
        h = h ^ ((h >> 31) & 0x1FFFFFFFF)
        x = (((h >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float32) + 0.5) * 1.1102230246251565e-16  # 2^-53
        # The winner's x is tiny, and 1 - x has lost its digits; a series keeps them.
        series = x * (1 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4))))
        score = scaled - tl.log(tl.where(x < 0.015625, series, -tl.log(1 - x)))
    peak = tl.maximum(tl.max(scaled, 0), -1e30)  # not -inf, from which -inf cannot be subtracted
    out = row * tl.num_programs(1) + block
    tl.store(score_ptr + out, tl.max(score, 0))
    tl.store(ids_ptr + out, block * BLOCK + tl.argmax(score, 0))
    tl.store(lse_ptr + out, peak + tl.log(tl.sum(tl.exp(scaled - peak), 0)))
