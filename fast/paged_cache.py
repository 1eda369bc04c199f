"""Equals sample.Cache: keys and values in pages, so that memory follows the tokens held; attention in Triton.

A row takes pages of PAGE tokens as it grows and gives them back when it ends, so any free page serves any row
and nothing is moved (PagedAttention, arXiv 2309.06180). The pages that a prompt fills are shared by all its
replies. Page 0 is scratch: it absorbs the writes of rows past their limit and of rows that only pad a batch.

Attention reads keys and values once: a program computes all query heads of a key/value head over one part of
a row. Parts are merged by their log-sum-exp (Flash-Decoding). On a CPU, plain PyTorch does the same.

Axes: B rows being decoded, H query heads, K key/value heads, Q query heads of one key/value head,
E head size, S positions in the pages of a row, M pages of a row, Z parts of a row.
"""

import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # some platforms have no wheels; pages work without it
    triton = None

PAGE = 32  # tokens: a row leaves half a page empty on average, 16 tokens of about 1,000
# Keys of a row that a program reads at once, warps, pipeline stages. With more keys in fp32, registers spill.
BF16_BLOCK, FP32_BLOCK = (64, 4, 3), (16, 4, 2)
MAX_PARTS, TWO_WAVES = 32, 264  # programs that a row is split over; 2 for each of 132 processors (H100, H200)


class Cache:
    """pool: [layer, 2, page, PAGE, K, E], keys and values; table_BM: the pages of each slot's row, else 0.

    host_BM: the same table on the host; shown: for each slot the pages that it shows, and how many of them.
    memory_gib: of the pool, None: enough for all rows; kernel: "gpu" attends in Triton, "cpu" in PyTorch.
    `users` counts the rows and prompts that hold a page; row_pages is ordered by start, the oldest row first.

    A row starts if its pages are free and one more for each running row. If a running row then finds no free
    page, the most recently started row is preempted. The oldest never is, so every reply finishes.
    """

    def __init__(self, config, dtype, device, slots, rows, limit, steps, memory_gib, kernel):
        self.slots, M = slots, -(-limit // PAGE)
        shape = (PAGE, config.num_key_value_heads, config.head_dim)
        page_gib = 2 * config.num_hidden_layers * math.prod(shape) * dtype.itemsize / 2**30
        pages = slots * M + 1 if memory_gib is None else min(slots * M + 1, int(memory_gib / page_gib))
        if pages < M + 1:
            raise ValueError(f"kv_memory_gib: {memory_gib:.4g} GiB do not hold one row of {limit} tokens; "
                             f"give it {math.ceil((M + 1) * page_gib * 1000) / 1000} or lower max_new_tokens")
        self.pool = torch.empty(config.num_hidden_layers, 2, pages, *shape, dtype=dtype, device=device)
        self.pool[:, :, 0] = 0.0
        self.free, self.users = list(range(1, pages)), Counter()
        self.row_pages, self.prompt_pages = {}, {}
        # A row may be decoded up to `steps` tokens past its limit.
        self.host_BM = np.zeros((slots, -(-(limit + steps) // PAGE)), np.int32)
        self.table_BM = torch.zeros(self.host_BM.shape, dtype=torch.int32, device=device)
        self.shown = [((), 0)] * slots
        self.attention = decode_attention if kernel == "gpu" else decode_attention_reference

    def allocate(self, count):
        pages = [self.free.pop() for _ in range(count)]
        self.users.update(pages)  # free pages have no users
        return pages

    def give_back(self, pages):
        self.users.subtract(pages)
        self.free += [page for page in pages if not self.users[page]]

    def admit(self, row, running):
        prompt, filled = row.prompt, (len(row.prompt.ids) - 1) // PAGE
        # If no row is running this always succeeds: the prompts still cached have shared the pool with a row
        # of this size before.
        if running and len(self.free) < (0 if prompt in self.prompt_pages else filled) + 1 + running:
            return False
        if prompt not in self.prompt_pages:
            self.prompt_pages[prompt] = self.allocate(filled)
        self.users.update(self.prompt_pages[prompt])
        self.row_pages[row] = self.prompt_pages[prompt] + self.allocate(1)
        return True

    def place(self, row, slot):
        # Pages that the row shares are written again with the same numbers.
        pages = self.row_pages[row][:-(-row.cached() // PAGE)]
        kv = F.pad(row.prompt.kv, (0, 0, 0, 0, 0, len(pages) * PAGE - row.cached()))
        self.pool[:, :, pages] = kv.unflatten(2, (len(pages), PAGE))

    def drop_prompts(self, prompts):
        for prompt in prompts:
            self.give_back(self.prompt_pages.pop(prompt))
            prompt.kv = None

    def reserve(self, rows, steps):
        for row, pages in self.row_pages.items():
            if row.cached() + steps <= len(pages) * PAGE:
                continue  # as for most rows; a GPU waits until this is done
            needed = -(-min(row.cached() + steps, row.limit) // PAGE) - len(pages)
            if needed > len(self.free) and len(self.row_pages) == 1:
                self.drop_prompts(list(self.prompt_pages))
            elif needed > len(self.free):
                return next(reversed(self.row_pages))
            pages += self.allocate(needed)
        self.show([(pages := self.row_pages[row], len(pages)) for row in rows])
        return None

    def show(self, shown):
        """Write (pages, their number) of slots 0, 1, … to the table: only what has changed, in one copy."""
        shown += [((), 0)] * (self.slots - len(shown))
        if shown == self.shown:
            return
        for slot, ((pages, end), (old_pages, start)) in enumerate(zip(shown, self.shown, strict=True)):
            if pages is not old_pages:  # another row has this slot
                self.host_BM[slot], start = 0, 0
            if start < end:
                self.host_BM[slot, start:end] = pages[start:]
        self.table_BM.copy_(torch.from_numpy(self.host_BM))
        self.shown = shown

    def attend(self, position_B):
        # A CUDA graph cannot depend on a value that the host reads, and takes the table in its full width.
        M = self.table_BM.shape[1] if position_B.is_cuda else int(position_B.max()) // PAGE + 1
        table_BM = self.table_BM[:len(position_B), :M]

        def attend(layer, q_BHE, k_BKE, v_BKE):
            return self.attention(q_BHE, k_BKE, v_BKE, *self.pool[layer], table_BM, position_B)

        return attend

    def release(self, row):
        self.give_back(self.row_pages.pop(row))

    def move(self, source, target):
        """Nothing: `reserve` writes the table for all slots."""

    def close(self):
        self.pool = self.table_BM = None


def decode_attention_reference(q_BHE, k_BKE, v_BKE, keys, values, table_BM, position_B):
    """Store k and v of the new tokens; return the attention of each to itself and to all before it, o_BHE.

    keys, values: [pages, PAGE, K, E]; table_BM: int32, the pages of each row in order; position_B: int64,
    tokens before the new one. Token s of row b is at keys[table_BM[b, s // PAGE], s % PAGE].
    """
    (B, H, E), K, S = q_BHE.shape, k_BKE.shape[1], table_BM.shape[1] * PAGE
    page_B, slot_B = table_BM.gather(1, position_B[:, None] // PAGE)[:, 0], position_B % PAGE
    keys[page_B, slot_B], values[page_B, slot_B] = k_BKE, v_BKE
    hidden_B1S = (torch.arange(S, device=position_B.device) > position_B[:, None])[:, None]
    k_BSKE, v_BSKE = (x[table_BM].view(B, S, K, E) for x in (keys, values))
    # Memory that was never written may be NaN, which a weight of zero does not remove.
    v_BSKE.masked_fill_(hidden_B1S.transpose(1, 2)[..., None], 0.0)
    scores_BKQS = torch.einsum("bkqe,bske->bkqs", q_BHE.reshape(B, K, H // K, E), k_BSKE) * E**-0.5
    weights_BKQS = scores_BKQS.float().masked_fill(hidden_B1S[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bkqs,bske->bkqe", weights_BKQS.to(v_BSKE.dtype), v_BSKE).reshape(B, H, E)


def decode_attention(q_BHE, k_BKE, v_BKE, keys, values, table_BM, position_B):
    """`decode_attention_reference` in Triton: a program for each row, key/value head and part.

    The Q = H/K query heads of a key/value head are rows of one product. If B·K is small, a row is split into
    parts. Their number depends on shapes alone, as a CUDA graph needs it; empty parts do no harm.
    """
    (B, H, E), K = q_BHE.shape, k_BKE.shape[1]
    parts = min(MAX_PARTS, triton.cdiv(TWO_WAVES, B * K))
    out_BHE = torch.empty_like(q_BHE, memory_format=torch.contiguous_format)
    part_BHZE = torch.empty(B, H, parts, E, device=q_BHE.device) if parts > 1 else out_BHE
    lse_BHZ = torch.empty(B, H, parts, device=q_BHE.device)
    is_bf16 = q_BHE.dtype == torch.bfloat16 and q_BHE.is_cuda  # Triton's interpreter cannot multiply bf16
    block, warps, stages = BF16_BLOCK if is_bf16 else FP32_BLOCK
    attend_to_pages[(B, K, parts)](
        q_BHE.contiguous(), k_BKE.contiguous(), v_BKE.contiguous(), keys, values, table_BM, position_B,
        part_BHZE, lse_BHZ, table_BM.stride(0), E**-0.5, H // K, max(16, triton.next_power_of_2(H // K)), E,
        PAGE, block, tl.bfloat16 if is_bf16 else tl.float32, num_warps=warps, num_stages=stages)
    if parts > 1:
        merge_parts[(B * H,)](part_BHZE, lse_BHZ, out_BHE, parts, triton.next_power_of_2(parts), E)
    return out_BHE


if triton is not None:

    @triton.jit
    def attend_to_pages(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, table_ptr, position_ptr, out_ptr, lse_ptr,
                        table_stride, SCALE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                        E: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
        """Attention of the GROUP query heads of one key/value head over one part of a row. ROWS: GROUP,
        rounded up to a size that tl.dot multiplies."""
        row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        K, parts = tl.num_programs(1), tl.num_programs(2)
        position = tl.load(position_ptr + row)
        table_ptr += row * table_stride
        g, e = tl.arange(0, ROWS), tl.arange(0, E)[None, :]
        heads = (row * K + head) * GROUP + g
        is_head = (g < GROUP)[:, None]
        q = tl.load(q_ptr + heads[:, None] * E + e, mask=is_head, other=0.0).to(DTYPE)
        peak, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS, E], tl.float32)
        if part == 0:  # starts with the new token, whose key and value it stores
            k = tl.load(k_ptr + (row * K + head) * E + e)
            v = tl.load(v_ptr + (row * K + head) * E + e)
            page = tl.load(table_ptr + position // PAGE).to(tl.int64)
            slot = ((page * PAGE + position % PAGE) * K + head) * E
            tl.store(keys_ptr + slot + e, k)
            tl.store(values_ptr + slot + e, v)
            peak = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * SCALE
            total += 1.0
            mean += v.to(tl.float32)
        size = tl.cdiv(tl.cdiv(position, BLOCK), parts) * BLOCK
        end = tl.minimum(position, (part + 1) * size)
        for start in range(part * size, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside_part = token < end
            page = tl.load(table_ptr + token // PAGE, mask=inside_part, other=0).to(tl.int64)
            slot = ((page * PAGE + token % PAGE) * K + head) * E
            k = tl.load(keys_ptr + slot[:, None] + e, mask=inside_part[:, None], other=0.0).to(DTYPE)
            v = tl.load(values_ptr + slot[:, None] + e, mask=inside_part[:, None], other=0.0).to(DTYPE)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
            scores = tl.where(inside_part[None, :], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp(peak - new_peak)
            weights = tl.exp(scores - new_peak[:, None])
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None] + tl.dot(weights.to(DTYPE), v, input_precision="ieee")
            peak = new_peak
        out = heads * parts + part
        total = tl.maximum(total, 1e-30)  # a part may have no tokens
        tl.store(out_ptr + out[:, None] * E + e, mean / total[:, None], mask=is_head)
        tl.store(lse_ptr + out, peak + tl.log(total), mask=g < GROUP)

    @triton.jit
    def merge_parts(part_ptr, lse_ptr, out_ptr, parts, PARTS: tl.constexpr, E: tl.constexpr):
        """One query head of one row: the mean of its parts, weighted by their sums of exponentials."""
        head = tl.program_id(0).to(tl.int64)
        n, e = head * parts + tl.arange(0, PARTS), tl.arange(0, E)
        inside = tl.arange(0, PARTS) < parts
        lse = tl.load(lse_ptr + n, mask=inside, other=-float("inf"))
        weights = tl.exp(lse - tl.max(lse, 0))
        part = tl.load(part_ptr + n[:, None] * E + e[None, :], mask=inside[:, None], other=0.0)
        tl.store(out_ptr + head * E + e, tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0))
