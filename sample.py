"""Sampling replies: key/value caches, decode attention, token sampling, `generate`; CLI to try a model.

In:  a model, prompts as token ids, one seed a prompt. Out: n rollouts a prompt, with the sampled ids and
the log-prob of each under the distribution it was drawn from. Ids go on to training as they are.

    key    = hash(seed of the prompt, number of the sample, position in the reply)
    token  ~ softmax(logits / temperature), which is
             on a CPU  the first id whose cumulative sum exceeds u = hash(key) / 2^53
             on a GPU  argmax(logits / temperature - log w), w of id v exponential, from hash(key, v)

The noise is a pure function of those numbers: a reply depends neither on its batch mates nor on their order,
and one that has to start again is drawn as it was. Where a reply ends, a waiting one takes its slot in the
batch. Each prompt is computed once for its n replies, all but its last token, which is their first input.

A rollout phase takes the weights as they are, allocates keys and values, captures CUDA graphs, decodes, and
drops graphs, keys and values: nothing is left that points to memory which training moves.

Axes: P prompts, T packed tokens, B rows being decoded, D width, H query heads, K key/value heads, E head
size, S cache slots, M pages of a row, N parts of a row, V vocabulary rows.
"""

import argparse
import functools
import json
import math
import os
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import load_hf, packed_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # some platforms have no wheels; there plain PyTorch does the work
    triton = None

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number: 2^64 / golden ratio
PREFILL_TOKENS = 2**14  # prompt tokens computed at once: their MLP activations would fill the memory
REFILL_SHARE = 1 / 8  # of the slots are free before waiting rows start, so that prompts share a pass
STEPS = {"cpu": 1, "cuda": 8}  # tokens a row takes between two looks at them, for which a GPU has to wait
FIRST_ROOM = 256  # tokens of a reply that `Cache` holds before it has to grow
PAGE = 32  # tokens: on average a row leaves half a page empty, 16 beside about 1,000 held
MARGIN_GIB = 8  # GPU memory for prefill, sampling and graphs that pages leave alone
VOCAB_BLOCK, KEY_BLOCK = 4096, 64  # logits, and keys, of a row that a program reads at once
MAX_PARTS, TWO_WAVES = 32, 264  # programs that a row is split over; 2 for each of 132 processors (H100, H200)


@dataclass
class Rollout:
    """One sampled reply: `ids`, with the stop id where it `finished`, and each one's log-prob in nats."""

    prompt_ids: list
    ids: list = field(default_factory=list)
    logp: list = field(default_factory=list)
    finished: bool = False


def fold(key, number):
    """The key that `number` leads to from `key`, int64 tensors or numbers: SplitMix64 (Steele, 2014)."""
    x = key + GOLDEN * (torch.as_tensor(number) + 1)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def prompt_seeds(seed, step, first, count):
    """Seeds of prompts first … first + count - 1 of the global batch of one step: int64 [count]."""
    return fold(fold(fold(0, seed), step), torch.arange(first, first + count))


def uniform(key_B, position):
    """u in [0, 1), float64 [B], for one position of the reply of each row."""
    return ((fold(key_B, position) >> 11) & (2**53 - 1)).double() / 2**53


def sample_tokens(logits_BV, temperature, u_B, top_p=1.0):
    """Draw one token a row by inverse CDF. Returns (ids_B, logp_B).

    temperature 0 takes the most likely token. logp_B is the token's log-prob under the whole tempered
    softmax (at temperature 0: the plain one), in nats. 0 < top_p < 1 draws from the smallest set of tokens
    that holds that much probability (arXiv 1904.09751); its log-probs are not those of the truncated
    distribution: for inference only.
    """
    logp_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), -1)
    if temperature == 0:
        ids_B1 = logp_BV.argmax(-1, keepdim=True)
    else:
        p_BV = logp_BV.exp()
        if top_p < 1:
            sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            p_BV = torch.zeros_like(p_BV).scatter(1, order_BV, sorted_BV.where(before_BV < top_p, 0.0))
        cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
        # right=True steps over tokens of probability zero, whose cdf equals their neighbour's.
        ids_B1 = torch.searchsorted(cdf_BV, u_B[:, None] * cdf_BV[:, -1:], right=True)
        ids_B1 = ids_B1.clamp_(max=logits_BV.shape[1] - 1)
    return ids_B1[:, 0], logp_BV.gather(1, ids_B1)[:, 0]


def gumbel_tokens(logits_BV, temperature, key_B, vocab_size=None):
    """Draw one token a row in one pass over the logits; a program reads a block of a row. (ids_B, logp_B)

    As `sample_tokens`, by Gumbel noise: argmax(logits / temperature - log w), w = -log(1 - x), x in (0, 1) a
    hash of the row's key_B, int64, and the id. vocab_size: ids that have a token.
    """
    (B, V), sharpness = logits_BV.shape, 1 / (temperature or 1.0)
    parts = triton.cdiv(vocab_size := vocab_size or V, VOCAB_BLOCK)
    score_BN, lse_BN = torch.empty(2, B, parts, device=logits_BV.device)
    ids_BN = torch.empty(B, parts, dtype=torch.int64, device=logits_BV.device)
    best_of_block[(B, parts)](logits_BV, key_B, score_BN, ids_BN, lse_BN, logits_BV.stride(0), vocab_size,
                              sharpness, temperature == 0, VOCAB_BLOCK, num_warps=8)
    # Logits that are not finite have no winner, but an id must come out that the model has.
    ids_B1 = ids_BN.gather(1, score_BN.argmax(1, keepdim=True)).clamp_(0, vocab_size - 1)
    logp_B1 = logits_BV.gather(1, ids_B1).float() * sharpness - lse_BN.logsumexp(1, keepdim=True)
    return ids_B1[:, 0], logp_B1[:, 0].clamp_max_(0.0)


def decode_attention_reference(q_BHE, k_BKE, v_BKE, keys, values, table_BM, position_B):
    """Store the new tokens' keys and values; attention of each to itself and to all before it: o_BHE.

    keys, values: [pages, PAGE, K, E]; position_B: int64, how many tokens come before the new one; table_BM:
    int32, the pages of each row in order. Token s of row b is at keys[table_BM[b, s // PAGE], s % PAGE].
    """
    (B, H, E), K, S = q_BHE.shape, k_BKE.shape[1], table_BM.shape[1] * PAGE
    page_B, slot_B = table_BM.gather(1, position_B[:, None] // PAGE)[:, 0], position_B % PAGE
    keys[page_B, slot_B], values[page_B, slot_B] = k_BKE, v_BKE
    unseen_B1S = (torch.arange(S, device=position_B.device) > position_B[:, None])[:, None]
    k_BSKE, v_BSKE = (x[table_BM].view(B, S, K, E) for x in (keys, values))
    # What was never written may be NaN, which a weight of zero does not remove.
    v_BSKE.masked_fill_(unseen_B1S.transpose(1, 2)[..., None], 0.0)
    scores_BKGS = torch.einsum("bkge,bske->bkgs", q_BHE.reshape(B, K, H // K, E), k_BSKE) * E**-0.5
    weights_BKGS = scores_BKGS.float().masked_fill(unseen_B1S[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgs,bske->bkge", weights_BKGS.to(v_BSKE.dtype), v_BSKE).reshape(B, H, E)


def decode_attention(q_BHE, k_BKE, v_BKE, keys, values, table_BM, position_B):
    """`decode_attention_reference` that reads keys and values once: a program for a row, KV head and part.

    The H/K query heads of a key/value head are rows of one product. Where B·K is small, a row's tokens are
    split into parts; how many depends on shapes alone, as a CUDA graph needs it, and empty parts do no harm.
    """
    (B, H, E), K = q_BHE.shape, k_BKE.shape[1]
    parts = min(MAX_PARTS, triton.cdiv(TWO_WAVES, B * K))
    out_BHE = torch.empty_like(q_BHE, memory_format=torch.contiguous_format)
    part_BHNE = torch.empty(B, H, parts, E, device=q_BHE.device) if parts > 1 else out_BHE
    lse_BHN = torch.empty(B, H, parts, device=q_BHE.device)
    is_bf16 = q_BHE.dtype == torch.bfloat16 and q_BHE.is_cuda  # Triton's interpreter cannot multiply bf16
    attend_to_pages[(B, K, parts)](
        q_BHE.contiguous(), k_BKE.contiguous(), v_BKE.contiguous(), keys, values, table_BM, position_B,
        part_BHNE, lse_BHN, table_BM.stride(0), E**-0.5, H // K, max(16, triton.next_power_of_2(H // K)), E,
        PAGE, KEY_BLOCK, tl.bfloat16 if is_bf16 else tl.float32, num_stages=3 if is_bf16 else 2)
    if parts > 1:
        merge_parts[(B * H,)](part_BHNE, lse_BHN, out_BHE, parts, triton.next_power_of_2(parts), E)
    return out_BHE


if triton is not None:

    @triton.jit
    def best_of_block(logits_ptr, key_ptr, score_ptr, ids_ptr, lse_ptr, row_stride, vocab_size,
                      SHARPNESS: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr):
        """The best id of a block of a row of logits, its score, and the log-sum-exp of the block."""
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        columns = part * BLOCK + tl.arange(0, BLOCK)
        logits_ptr += row * row_stride
        logits = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=-float("inf"))
        scaled = logits.to(tl.float32) * SHARPNESS
        score = scaled
        if not GREEDY:
            h = tl.load(key_ptr + row) + (columns.to(tl.int64) + 1) * -7046029254386353131
            h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
            h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
            h = h ^ ((h >> 31) & 0x1FFFFFFFF)
            x = (((h >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float32) + 0.5) * 1.1102230246251565e-16  # 2^-53
            # The winner's x is tiny, and 1 - x has lost its digits: there, a series.
            series = x * (1 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4))))
            score = scaled - tl.log(tl.where(x < 0.015625, series, -tl.log(1 - x)))
        peak = tl.maximum(tl.max(scaled, 0), -1e30)  # not -inf, from which -inf cannot be subtracted
        out = row * tl.num_programs(1) + part
        tl.store(score_ptr + out, tl.max(score, 0))
        tl.store(ids_ptr + out, part * BLOCK + tl.argmax(score, 0))
        tl.store(lse_ptr + out, peak + tl.log(tl.sum(tl.exp(scaled - peak), 0)))

    @triton.jit
    def attend_to_pages(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, table_ptr, position_ptr, out_ptr, lse_ptr,
                        table_stride, SCALE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                        E: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
        """The GROUP query heads of a KV head over a part of a row. ROWS: GROUP, rounded up for tl.dot."""
        row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        K, parts = tl.num_programs(1), tl.num_programs(2)
        position = tl.load(position_ptr + row)
        table_ptr += row * table_stride
        g, e = tl.arange(0, ROWS), tl.arange(0, E)[None, :]
        heads = (row * K + head) * GROUP + g
        inside = (g < GROUP)[:, None]
        q = tl.load(q_ptr + heads[:, None] * E + e, mask=inside, other=0.0).to(DTYPE)
        peak, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS, E], tl.float32)
        if part == 0:  # it begins with the new token, and stores its key and value
            k = tl.load(k_ptr + (row * K + head) * E + e)
            v = tl.load(v_ptr + (row * K + head) * E + e)
            page = tl.load(table_ptr + position // PAGE).to(tl.int64)
            slot = ((page * PAGE + position % PAGE) * K + head) * E
            tl.store(keys_ptr + slot + e, k)
            tl.store(values_ptr + slot + e, v)
            peak = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * SCALE
            total += 1.0
            mean += v.to(tl.float32)
        share = tl.cdiv(tl.cdiv(position, BLOCK), parts) * BLOCK
        end = tl.minimum(position, (part + 1) * share)
        for start in range(part * share, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            seen = token < end
            page = tl.load(table_ptr + token // PAGE, mask=seen, other=0).to(tl.int64)
            slot = ((page * PAGE + token % PAGE) * K + head) * E
            k = tl.load(keys_ptr + slot[:, None] + e, mask=seen[:, None], other=0.0).to(DTYPE)
            v = tl.load(values_ptr + slot[:, None] + e, mask=seen[:, None], other=0.0).to(DTYPE)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp(peak - new_peak)
            weights = tl.exp(scores - new_peak[:, None])
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None] + tl.dot(weights.to(DTYPE), v, input_precision="ieee")
            peak = new_peak
        out = heads * parts + part
        total = tl.maximum(total, 1e-30)  # of a part without tokens
        tl.store(out_ptr + out[:, None] * E + e, mean / total[:, None], mask=inside)
        tl.store(lse_ptr + out, peak + tl.log(total), mask=g < GROUP)

    @triton.jit
    def merge_parts(part_ptr, lse_ptr, out_ptr, parts, PARTS: tl.constexpr, E: tl.constexpr):
        """One head of one row: the mean of its parts, weighted by their sums of exponentials."""
        head = tl.program_id(0).to(tl.int64)
        n, e = head * parts + tl.arange(0, PARTS), tl.arange(0, E)
        inside = tl.arange(0, PARTS) < parts
        lse = tl.load(lse_ptr + n, mask=inside, other=-float("inf"))
        weights = tl.exp(lse - tl.max(lse, 0))
        part = tl.load(part_ptr + n[:, None] * E + e[None, :], mask=inside[:, None], other=0.0)
        tl.store(out_ptr + head * E + e, tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0))


# Two caches, driven alike by the scheduler: `open` asks before a row starts, `place` writes its prompt; every
# few tokens `reserve` and `prepare`, and `attend` in each step; when a row ends `release`, and `move` to the
# slot it leaves, so that B rows are in slots 0 … B - 1; `forget` when all replies of a prompt have started.


@dataclass(eq=False)
class Prompt:
    """A prompt, and for as long as any of its n replies have yet to start, what was computed of it."""

    ids: list
    waiting: int
    kv: torch.Tensor | None = None  # keys and values of all but its last token: [layers, 2, T, K, E]
    pages: list | None = None  # those it fills


@dataclass(eq=False)
class Row:
    """A reply in the making, with all tokens of it and its prompt but the last, the next input, `cached`."""

    number: int
    rollout: Rollout
    prompt: Prompt
    key: int
    limit: int  # the most tokens it can have in the cache
    told: int = 0  # tokens that on_token was told: a row that starts again repeats them
    pages: list = field(default_factory=list)

    def cached(self):
        return len(self.prompt.ids) - 1 + len(self.rollout.ids)


class Cache:
    """Keys and values of all slots side by side: the tokens of a row end at `end`, a mask hides the rest.

    keys: [layers, slots, K, E, S], values: [layers, slots, K, S, E]: a batched product reads any run of
    tokens as it is, and a step writes the same S for all rows.
    """

    open = release = prepare = staticmethod(lambda *_: True)  # a slot is all that a row needs

    def __init__(self, config, dtype, slots, longest_prompt, room):
        L, K, E = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.end = self.longest_prompt = longest_prompt
        self.keys = torch.zeros(L, slots, K, E, self.end + room, dtype=dtype)
        self.values = torch.zeros(L, slots, K, self.end + room, E, dtype=dtype)

    def place(self, row, slot):
        seen = slice(self.end - row.cached(), self.end)
        self.keys[:, slot, :, :, seen] = row.prompt.kv[:, 0].permute(0, 2, 3, 1)
        self.values[:, slot, :, seen] = row.prompt.kv[:, 1].transpose(1, 2)

    def forget(self, prompts):
        for prompt in prompts:
            prompt.kv = None

    def move(self, source, target):
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def reserve(self, rows, steps):
        """The rows that must give way for `steps` more tokens of the others: none."""
        if self.end + steps > self.keys.shape[4]:
            # What lies left of the longest row goes, unless the longest prompt may need it.
            left = self.end - max(self.longest_prompt, *(row.cached() for row in rows))
            more, self.end = self.keys.shape[4] // 2 + steps, self.end - left
            self.keys = F.pad(self.keys, (-left, more))
            self.values = F.pad(self.values, (0, 0, -left, more))
        return []

    def attend(self, layer, q_BHE, k_BKE, v_BKE):
        """attend for one new token a row, at `position_B`."""
        (B, H, E), K = q_BHE.shape, k_BKE.shape[1]
        if layer == 0:
            start_B = self.end - self.position_B[:B]
            self.end += 1
            self.seen = slice(int(start_B.min()), self.end)
            mask_BS = (torch.arange(self.seen.start, self.end) < start_B[:, None]) * torch.tensor(-1e30)
            self.mask_B1S = mask_BS.to(self.keys.dtype).repeat_interleave(K, 0)[:, None]
        keys, values = self.keys[layer, :B], self.values[layer, :B]
        keys[..., self.end - 1], values[:, :, self.end - 1] = k_BKE, v_BKE
        # The H/K query heads of a key/value head are rows of one product: keys and values are read once.
        q, keys, values = q_BHE.reshape(B * K, H // K, E), keys.flatten(0, 1), values.flatten(0, 1)
        scores = torch.baddbmm(self.mask_B1S, q, keys[..., self.seen], alpha=E**-0.5)
        return torch.bmm(scores.softmax(-1).to(values.dtype), values[:, self.seen]).view(B, H, E)


class PagedCache:
    """Keys and values in pages of PAGE tokens, handed out as rows grow and taken back as they end.

    So memory follows the tokens held, whatever the limits: any free page serves any row; nothing is moved.
    The pages that a prompt fills are shared by all its replies; `users` counts. Page 0 is nobody's: there
    goes what is decoded past a row's limit, or to fill a batch up. A row starts where its pages are free and
    one more for each row that runs. Where a running row needs a page and none is free, the youngest gives way
    and starts again later; the oldest always goes on, so every reply comes to its end.
    """

    move = staticmethod(lambda *_: None)  # `prepare` writes the whole table

    def __init__(self, config, dtype, device, slots, limit, memory_gib, kernel):
        M = -(-limit // PAGE)
        shape = (PAGE, config.num_key_value_heads, config.head_dim)
        page_gib = 2 * config.num_hidden_layers * math.prod(shape) * dtype.itemsize / 2**30
        if memory_gib is None and device.type == "cuda":
            torch.cuda.empty_cache()
            memory_gib = torch.cuda.mem_get_info(device)[0] / 2**30 - MARGIN_GIB
        pages = slots * M + 1 if memory_gib is None else min(slots * M + 1, int(memory_gib / page_gib))
        if pages < M + 1:
            raise ValueError(f"kv_memory_gib: {memory_gib:.4g} GiB do not hold one row of {limit} tokens; "
                             f"give it {math.ceil((M + 1) * page_gib * 1000) / 1000} or lower max_new_tokens")
        self.pool = torch.empty(config.num_hidden_layers, 2, pages, *shape, dtype=dtype, device=device)
        self.pool[:, :, 0] = 0.0
        self.free, self.users = list(range(1, pages)), Counter()
        self.prompts, self.rows = set(), []  # that hold pages; rows: the oldest first
        width = -(-(limit + STEPS[device.type]) // PAGE)  # a row may be decoded a few tokens past its limit
        self.table_BM = torch.zeros(slots, width, dtype=torch.int32, device=device)
        self.function = decode_attention if kernel == "triton" else decode_attention_reference

    def take(self, number):
        pages = [self.free.pop() for _ in range(number)]
        self.users.update(pages)
        return pages

    def give_back(self, pages):
        self.users.subtract(pages)
        self.free += [page for page in pages if not self.users[page]]

    def forget(self, prompts):
        """Take back what is kept of prompts for replies that wait; it can be computed again."""
        for prompt in list(prompts):
            self.give_back(prompt.pages)
            self.prompts.remove(prompt)
            prompt.kv = prompt.pages = None

    def open(self, row, running):
        """Give a row its first pages if there are enough beside `running` others. Returns whether."""
        prompt, filled = row.prompt, (len(row.prompt.ids) - 1) // PAGE
        # Where none runs, there are: what is kept for others was once held beside what this row needs.
        if running and len(self.free) < (filled if prompt.pages is None else 0) + 1 + running:
            return False
        if prompt.pages is None:
            prompt.pages = self.take(filled)
            self.prompts.add(prompt)
        self.users.update(prompt.pages)
        row.pages = prompt.pages + self.take(1)
        self.rows.append(row)
        return True

    def place(self, row, slot):
        """Write the prompt to the row's pages; those it shares are given the same numbers again."""
        pages = row.pages[:-(-row.cached() // PAGE)]
        kv = F.pad(row.prompt.kv, (0, 0, 0, 0, 0, len(pages) * PAGE - row.cached()))
        self.pool[:, :, pages] = kv.unflatten(2, (len(pages), PAGE))

    def release(self, row):
        self.give_back(row.pages)
        self.rows.remove(row)

    def reserve(self, rows, steps):
        """Pages for `steps` more tokens of each row, the oldest first. Returns those that had to give way."""
        gone, served = [], 0
        while served < len(self.rows):
            row = self.rows[served]
            needed = -(-min(row.cached() + steps, row.limit) // PAGE) - len(row.pages)
            if needed <= len(self.free):
                row.pages += self.take(max(0, needed))
                served += 1
            elif len(self.rows) > 1:
                gone.append(self.rows[-1])
                self.release(gone[-1])
            else:
                self.forget(self.prompts)
        return gone

    def prepare(self, rows, steps):
        """Write the pages of these rows to the table, in the order of their slots."""
        table_MB = torch.tensor(list(zip_longest(*(row.pages for row in rows), fillvalue=0)))
        self.table_BM.zero_()
        self.table_BM[:len(rows), :len(table_MB)] = table_MB.T

    def attend(self, layer, q_BHE, k_BKE, v_BKE):
        """attend for one new token a row, at `position_B`."""
        position_B = self.position_B[:len(q_BHE)]
        # A CUDA graph cannot look at numbers, and takes the table in its full width.
        M = self.table_BM.shape[1] if q_BHE.is_cuda else int(position_B.max()) // PAGE + 1
        table_BM = self.table_BM[:len(q_BHE), :M]
        return self.function(q_BHE, k_BKE, v_BKE, *self.pool[layer], table_BM, position_B)


def prefill(model, prompts):
    """Fill in `kv` of the first prompts, as many as PREFILL_TOKENS allow."""
    ends = list(accumulate(len(prompt.ids) - 1 for prompt in prompts))
    fit = max(1, sum(end <= PREFILL_TOKENS for end in ends))
    prompts, device = prompts[:fit], model.embed_tokens.weight.device
    lengths = [len(prompt.ids) - 1 for prompt in prompts]
    attend_packed, layers = packed_attention([0, *ends[:fit]]), []

    def attend(layer, q_THE, k_TKE, v_TKE):
        layers.append(torch.stack((k_TKE, v_TKE)))
        return attend_packed(layer, q_THE, k_TKE, v_TKE)

    tokens_T = torch.tensor([token for prompt in prompts for token in prompt.ids[:-1]], device=device).long()
    model(tokens_T, torch.cat([torch.arange(length, device=device) for length in lengths]), attend)
    for prompt, kv in zip(prompts, torch.stack(layers).split(lengths, 2), strict=True):
        prompt.kv = kv


class Decoder:
    """Steps of a batch, each from the rows' last tokens to their next ones.

    Its inputs and outputs stay where they are, so that a GPU can replay a step as a CUDA graph instead of
    being told kernel by kernel; there is one for each of a few batch sizes, captured when first needed.
    """

    def __init__(self, model, cache, draw, slots, dtype):
        self.model, self.cache, self.draw = model, cache, draw
        self.head_DV = model.head_weight().to(dtype).T
        self.state_4B = self.head_DV.new_zeros(4, slots, dtype=torch.int64)
        self.token_B, self.key_B, self.number_B, cache.position_B = self.state_4B
        self.logp_B = self.head_DV.new_zeros(slots, dtype=torch.float32)
        self.graphs, self.memory = {}, None

    def step(self, B):
        logits_BV = self.model(self.token_B[:B], self.cache.position_B[:B], self.cache.attend) @ self.head_DV
        self.token_B[:B], self.logp_B[:B] = self.draw(logits_BV, self.key_B[:B], self.number_B[:B])
        self.state_4B[2:, :B] += 1  # number and position

    def graph(self, B):
        """A graph of the step for B rows or a few more: a power of two, or a multiple of 64."""
        size = min(2 ** (B - 1).bit_length() if B <= 64 else -(-B // 64) * 64, len(self.token_B))
        if size not in self.graphs:
            # A first run compiles kernels and casts weights; without pages it writes to page 0 alone.
            self.cache.table_BM.zero_()
            self.state_4B.zero_()
            self.step(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.memory):
                self.step(size)
            self.graphs[size], self.memory = graph, graph.pool()
        return self.graphs[size]

    def run(self, rows, steps):
        """The next `steps` tokens of each row and their log-probs, as two lists of lists."""
        B, position_B = len(rows), self.cache.position_B
        step = self.graph(B).replay if position_B.is_cuda else functools.partial(self.step, B)
        self.cache.prepare(rows, steps)
        state = torch.tensor([((row.rollout.ids or row.prompt.ids)[-1], row.key, len(row.rollout.ids),
                               row.cached()) for row in rows])
        position_B.zero_()
        self.state_4B[:, :B] = state.T
        drawn = []
        for _ in range(steps):
            step()
            drawn.append((self.token_B[:B].clone(), self.logp_B[:B].clone()))
        return [torch.stack(each, 1).tolist() for each in zip(*drawn, strict=True)]


@torch.no_grad()
def generate(model, prompts, n, *, max_new_tokens, temperature, stop_ids, seeds_P, top_p=1.0, vocab_size=None,
             batch_size=256, kv_memory_gib=None, kernel="auto", progress=None, on_token=None,
             should_stop=lambda: False):
    """Sample n replies to each prompt: len(prompts)·n rollouts, prompt-major.

    prompts: lists of ids; max_new_tokens: tokens a reply, the stop id included; temperature: 0 is greedy;
    stop_ids: ids that end a reply; seeds_P: one integer a prompt; top_p: for inference only (see
    `sample_tokens`); vocab_size: ids that have a token, others are never drawn; batch_size: rows decoded at
    once; kv_memory_gib: of keys and values, None: what a GPU has free, on a CPU what the rows need; kernel:
    "reference", plain PyTorch; "triton"; "auto": Triton on a GPU, told once; progress: the name of a progress
    bar, shown on a terminal; on_token(i, id): called for every token of rollout i; should_stop(): asked at
    every step; where it says so, replies stay as far as they are. ValueError where a setting is out of range,
    kv_memory_gib too little for one reply, or a prompt empty, without room for one or with an unknown id.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}: they "
                         "must be at least 1, at least 0, and above 0 but at most 1")
    limit, ids = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} the "
                             f"model's {limit} positions leave room for 1 to {limit - max_new_tokens}")
        if max(prompt) >= ids:
            raise ValueError(f"prompt {i} holds id {max(prompt)}, but the model's last is {ids - 1}; is this "
                             "the model's own tokenizer?")
    assert len(seeds_P) == len(prompts), f"{len(seeds_P)} seeds for {len(prompts)} prompts"
    if not (rollouts := [Rollout(prompt) for prompt in prompts for _ in range(n)]):
        return []
    key_PG = fold(torch.as_tensor(seeds_P, dtype=torch.int64)[:, None], torch.arange(n)).tolist()
    rows = []
    for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p])):  # `Cache` masks what is shorter
        prompt, limit = Prompt(prompts[p], n), len(prompts[p]) + max_new_tokens - 1
        rows += [Row(p * n + g, rollouts[p * n + g], prompt, key_PG[p][g], limit) for g in range(n)]

    torch.clear_autocast_cache()  # its copies may be older than the weights
    weight = model.head_weight()[:1]
    device, dtype = weight.device, (weight @ weight.T).dtype  # that of products, under autocast too
    kernel, slots = choose_kernel(kernel, device.type), min(batch_size, len(rows))

    def draw(logits_BV, key_B, number_B):
        if kernel == "triton" and top_p == 1:
            return gumbel_tokens(logits_BV, temperature, fold(key_B, number_B), vocab_size)
        return sample_tokens(logits_BV[:, :vocab_size], temperature, uniform(key_B, number_B), top_p)

    if device.type == "cpu" and kernel == "reference" and kv_memory_gib is None:
        cache = Cache(model.config, dtype, slots, len(rows[-1].prompt.ids), min(max_new_tokens, FIRST_ROOM))
    else:
        cache = PagedCache(model.config, dtype, device, slots, rows[-1].limit, kv_memory_gib, kernel)
    decoder = Decoder(model, cache, draw, slots, dtype)
    disable = None if progress else True  # None: shown on a terminal only
    try:
        with tqdm(total=len(rows), desc=progress, disable=disable, leave=False, unit="reply") as bar:
            decode_all(decoder, rows, max_new_tokens, frozenset(stop_ids), bar, on_token, should_stop)
    finally:
        # What a traceback still holds after an interruption must hold no memory.
        vars(decoder).clear()
        vars(cache).clear()
    return rollouts


@functools.cache
def choose_kernel(kernel, device):
    """`kernel`, or what "auto" stands for on a type of device, which is told on stderr once."""
    runs = triton is not None and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if kernel == "auto":
        kernel = "triton" if device == "cuda" and runs else "reference"
        if os.environ.get("RANK", "0") == "0":  # the others say nothing
            print(f"sampling on {device}: kernel {kernel!r}", file=sys.stderr)
    if kernel != "reference" and not (kernel == "triton" and runs):
        raise ValueError(f"kernel is {kernel!r}; 'triton' needs Triton and a CUDA GPU; else take 'auto'")
    return kernel


def decode_all(decoder, rows, max_new_tokens, stop_ids, bar, on_token, should_stop):
    """Decode all rows to their ends: the scheduler. Rows wait until there are slots and memory for them."""
    cache, slots, steps = decoder.cache, len(decoder.token_B), STEPS[decoder.token_B.device.type]
    waiting, running = deque(rows), []  # running: the row in each slot
    while (waiting or running) and not should_stop():
        if waiting and len(running) <= slots * (1 - REFILL_SHARE):
            start_rows(decoder.model, cache, waiting, running, slots)
        for row in cache.reserve(running, steps):
            vacate(cache, running, row)
            row.rollout.ids.clear()
            row.rollout.logp.clear()
            row.prompt.waiting += 1
            waiting.appendleft(row)
        # From the last slot on, so that none moves that has ended itself
        for row, ids, logps in reversed([*zip(running, *decoder.run(running, steps), strict=True)]):
            if record(row, ids, logps, max_new_tokens, stop_ids, on_token):
                cache.release(row)
                vacate(cache, running, row)
                bar.update()


def start_rows(model, cache, waiting, running, slots):
    """Start as many waiting rows as there are slots and memory for, and compute the prompts they need."""
    first = len(running)
    while waiting and len(running) < slots and cache.open(waiting[0], len(running)):
        running.append(waiting.popleft())
        running[-1].prompt.waiting -= 1
    new = list(enumerate(running[first:], first))
    while new:  # each pass is placed before the next one, so that no more than one is held
        if todo := dict.fromkeys(row.prompt for _, row in new if row.prompt.kv is None):
            prefill(model, list(todo))
        ready = [pair for pair in new if pair[1].prompt.kv is not None]
        new = [pair for pair in new if pair[1].prompt.kv is None]
        for slot, row in ready:
            cache.place(row, slot)
        cache.forget(dict.fromkeys(row.prompt for _, row in ready if not row.prompt.waiting))


def vacate(cache, running, row):
    """Take a row out of its slot; the one in the last slot moves there."""
    slot, last = running.index(row), running.pop()
    if last is not row:
        running[slot] = last
        cache.move(len(running), slot)


def record(row, ids, logps, max_new_tokens, stop_ids, on_token):
    """Add drawn tokens to a reply until it ends. Returns whether it has."""
    rollout = row.rollout
    for token, logp in zip(ids, logps, strict=True):
        rollout.ids.append(token)
        rollout.logp.append(logp)
        rollout.finished = token in stop_ids
        if on_token and len(rollout.ids) > row.told:
            on_token(row.number, token)
            row.told += 1
        if rollout.finished or len(rollout.ids) == max_new_tokens:
            return True
    return False


def main(argv=None):
    from data import Chat, Example
    from reward import parse_reply

    parser = argparse.ArgumentParser(description="Ask a model: streams its reply, prints the tool calls.")
    parser.add_argument("model", help="folder in the Hugging Face layout, or a hub name")
    parser.add_argument("query", help="what the user says")
    parser.add_argument("--tools", required=True, help="JSON file: a list of tool schemas")
    parser.add_argument("--system_prompt", help="text file with {tools}; default: the project's own wording")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        tools = read_tools(args.tools)
        chat = Chat(args.model, args.system_prompt)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_hf(args.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
        example = Example("query", "query", tools, [{"role": "user", "content": args.query}], [])
        shown, ids = "", []

        def show(row, token):
            nonlocal shown
            ids.append(token)
            text = chat.decode([i for i in ids if i not in chat.stop_ids])
            # Half a character decodes to U+FFFD: wait for the rest of it.
            if not text.endswith("\ufffd"):
                print(text[len(shown):], end="", flush=True)
                shown = text

        rollout, = generate(model, [chat.encode_prompt(example)], 1, max_new_tokens=args.max_new_tokens,
                            temperature=args.temperature, stop_ids=chat.stop_ids, top_p=args.top_p,
                            vocab_size=chat.vocab_size, seeds_P=prompt_seeds(args.seed, 0, 0, 1),
                            on_token=show)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("" if rollout.finished else f"\n(cut off after {args.max_new_tokens} tokens)")
    calls, error = parse_reply(chat.decode(rollout.ids))
    if calls is None:
        print(f"no calls: {error}")
    for call in calls or []:
        print(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})")


def read_tools(path):
    """The list of tool schemas in a JSON file; ValueError where it is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            tools = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable JSON ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and "name" in tool for tool in tools):
        raise ValueError(f'{path}: expected a JSON list of tool schemas, each an object with a "name"')
    return tools


if __name__ == "__main__":
    main()
