"""Sampling replies: the noise, token sampling, a key/value cache, the decode loop, `generate`.

In:  a model, prompts as token ids, one seed a prompt. Out: n rollouts a prompt, with the sampled ids and the
log-prob of each under the distribution that it was drawn from. Training takes these ids as they are.

    key    = fold(fold(seed of the prompt, number of the sample), position in the reply)
    token  ~ softmax(logits / temperature): the first id whose cumulative probability exceeds u = uniform(key)

So a reply does not depend on its batch, and a row that restarts after being preempted draws the same tokens.
Each prompt is computed once for its n replies, except its last token, their first input. A waiting row takes
the slot of a reply that ends. `generate` ends by freeing all that points to weights, because training moves
them. These are the definitions; unless the kernel is "reference", twins in fast/ are used.

Axes: P prompts, G rollouts a prompt, T packed tokens, B rows being decoded, D width, H query heads,
K key/value heads, E head size, S positions of a cache slot, V vocabulary rows.
"""

import functools
import math
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import packed_attention
from runtime.kernel import choose_kernel

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number: 2^64 / golden ratio
PREFILL_TOKENS = 2**14  # prompt tokens computed at once, which bounds the memory of MLP activations
FREE_SHARE = 1 / 8  # of the slots must be free before waiting rows start, so that prompts share a pass
STEPS = {"cpu": 1, "cuda": 8}  # steps before the host reads the drawn tokens, for which a GPU has to wait
MARGIN_GIB = 8  # GPU memory that keys and values leave to prefill, sampling and graphs


@dataclass
class Rollout:
    """One sampled reply: `ids`, with the stop id if it `finished`, and the log-prob of each in nats."""

    prompt_ids: list
    ids: list = field(default_factory=list)
    logp: list = field(default_factory=list)
    finished: bool = False


def fold(key, number):
    """A new key from a key and a number, int64 tensors or integers: SplitMix64 (Steele et al., 2014)."""
    x = key + GOLDEN * (torch.as_tensor(number) + 1)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def prompt_seeds(seed, step, first, count):
    """Seeds of prompts first … first + count - 1 of the global batch of one step: int64 [count]."""
    return fold(fold(fold(0, seed), step), torch.arange(first, first + count))


def uniform(key_B):
    """u in [0, 1) of each key: the upper 53 bits of an int64, float64 [B]."""
    return ((key_B >> 11) & (2**53 - 1)).double() / 2**53


def sample_tokens(logits_BV, temperature, key_B, top_p=1.0, vocab_size=None):
    """Draw one token a row by inverse CDF. Returns (ids_B, logp_B): int64 ids and fp32 log-probs in nats.

    temperature: 0 is greedy; key_B: int64, keys of (prompt, sample, position); vocab_size: ids that have a
    token, others are never drawn; top_p < 1: draw from the smallest set of tokens with that much probability
    (arXiv 1904.09751). logp_B is that of the whole tempered softmax (at temperature 0: the plain one), not of
    this set, so top_p is for inference only.
    """
    logp_BV = torch.log_softmax(logits_BV[:, :vocab_size].float() / (temperature or 1.0), -1)
    if temperature == 0:
        ids_B1 = logp_BV.argmax(-1, keepdim=True)
    else:
        p_BV = logp_BV.exp()
        if top_p < 1:
            sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            p_BV = torch.zeros_like(p_BV).scatter(1, order_BV, sorted_BV.where(before_BV < top_p, 0.0))
        cdf_BV = p_BV.double().cumsum(-1)  # a cumsum that also casts is slower on a CPU
        # right=True steps over tokens of probability zero, whose cdf equals their neighbour's.
        ids_B1 = torch.searchsorted(cdf_BV, uniform(key_B)[:, None] * cdf_BV[:, -1:], right=True)
        ids_B1 = ids_B1.clamp_(max=p_BV.shape[1] - 1)
    return ids_B1[:, 0], logp_BV.gather(1, ids_B1)[:, 0]


@dataclass(eq=False)
class Prompt:
    ids: list
    unstarted: int  # of its n rows; `kv` is kept for them
    kv: torch.Tensor | None = None  # keys and values of all tokens but the last: [layers, 2, T, K, E]


@dataclass(eq=False)
class Row:
    """One reply being decoded."""
    number: int  # of the rollout
    rollout: Rollout
    prompt: Prompt
    key: int  # of (prompt, sample)
    limit: int  # the most tokens that it can have in the cache
    reported: int = 0  # tokens passed to on_token: a row that restarts draws them again

    def cached(self):
        """Tokens in the cache: prompt plus reply less the last token, which is the next input."""
        return len(self.prompt.ids) - 1 + len(self.rollout.ids)


class Cache:
    """Keys and values of the rows in slots 0 … B - 1, in the plainest form: kv is [layer, 2, slot, S, K, E].

    The protocol of all caches, in the order of the calls:
    admit(row, running)     Before a row starts. False: no memory beside `running` others, ask again later.
    place(row, slot)        Write `row.prompt.kv` to its slot.
    drop_prompts(prompts)   All rows of these prompts have started: free what is kept of them.
    reserve(rows, steps)    Before every few steps, rows[i] in slot i: make room for their new tokens. Returns
                            None, or the last row to start, to preempt it and ask again (only paged_cache.py).
    attend(position_B)      At each step; int64, tokens before each row's new one. Returns the model's attend,
                            which stores k and v of the new tokens and attends to all tokens so far.
    release(row)            A row has ended or is preempted: free its memory.
    move(source, target)    The row in the last slot takes the free one.
    close()                 Free all memory, even if a traceback still refers to the cache.

    rows: all, the longest prompt last; limit: most tokens of one; steps: as in `reserve`; memory_gib: bounds
    keys and values, here by fewer slots, None: no bound; kernel: as chosen. ValueError if not one row fits.
    """

    def __init__(self, config, dtype, device, slots, rows, limit, steps, memory_gib, kernel):
        S = limit + steps - 1  # a row may be decoded past its limit
        layers, shape = config.num_hidden_layers, (S, config.num_key_value_heads, config.head_dim)
        row_gib = 2 * layers * math.prod(shape) * dtype.itemsize / 2**30
        self.slots = slots if memory_gib is None else min(slots, int(memory_gib / row_gib))
        if self.slots < 1:
            raise ValueError(f"kv_memory_gib: {memory_gib:.4g} GiB do not hold one row of {limit} tokens; "
                             f"give it {math.ceil(row_gib * 1000) / 1000} or lower max_new_tokens")
        self.kv = torch.zeros(layers, 2, self.slots, *shape, dtype=dtype, device=device)

    def admit(self, row, running):
        return True

    def place(self, row, slot):
        self.kv[:, :, slot] = F.pad(row.prompt.kv, (0, 0, 0, 0, 0, self.kv.shape[3] - row.cached()))

    def drop_prompts(self, prompts):
        for prompt in prompts:
            prompt.kv = None

    def reserve(self, rows, steps):
        return None

    def attend(self, position_B):
        B = len(position_B)
        row_B, position_S = (torch.arange(size, device=self.kv.device) for size in (B, self.kv.shape[3]))
        visible_B11S = (position_S <= position_B[:, None])[:, None, None]

        def attend(layer, q_BHE, k_BKE, v_BKE):
            k_BSKE, v_BSKE = self.kv[layer, :, :B]
            k_BSKE[row_B, position_B], v_BSKE[row_B, position_B] = k_BKE, v_BKE
            q_BH1E, k_BKSE, v_BKSE = q_BHE[:, :, None], k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
            o_BH1E = F.scaled_dot_product_attention(q_BH1E, k_BKSE, v_BKSE, visible_B11S, enable_gqa=True)
            return o_BH1E[:, :, 0]

        return attend

    def release(self, row):
        pass

    def move(self, source, target):
        self.kv[:, :, target] = self.kv[:, :, source]

    def close(self):
        self.kv = None


def prefill(model, prompts, kernel):
    """Compute `kv` of the first prompts, as many as fit into PREFILL_TOKENS and at least one."""
    lengths = [len(prompt.ids) - 1 for prompt in prompts]
    fit = max(1, sum(end <= PREFILL_TOKENS for end in accumulate(lengths)))
    prompts, lengths, layers, device = prompts[:fit], lengths[:fit], [], model.embed_tokens.weight.device
    attend_packed = packed_attention([0, *accumulate(lengths)], kernel if kernel == "reference" else "auto")

    def attend(layer, q_THE, k_TKE, v_TKE):
        layers.append(torch.stack((k_TKE, v_TKE)))
        return attend_packed(layer, q_THE, k_TKE, v_TKE)

    tokens_T = torch.tensor([token for prompt in prompts for token in prompt.ids[:-1]], device=device).long()
    model(tokens_T, torch.cat([torch.arange(length, device=device) for length in lengths]), attend)
    for prompt, kv in zip(prompts, torch.stack(layers).split(lengths, 2), strict=True):
        prompt.kv = kv


class Decoder:
    """Decode steps of a batch. Inputs and outputs keep their addresses, as CUDA graphs of a step need it."""

    def __init__(self, model, cache, draw, dtype, kernel):
        self.model, self.cache, self.draw, self.kernel, self.graphs = model, cache, draw, kernel, None
        self.head_DV = model.head_weight().to(dtype).T
        self.state_4B = self.head_DV.new_zeros(4, cache.slots, dtype=torch.int64)
        self.token_B, self.key_B, self.number_B, self.position_B = self.state_4B
        self.logp_B = self.head_DV.new_zeros(cache.slots, dtype=torch.float32)
        if kernel == "gpu" and self.logp_B.is_cuda:
            from fast.graphs import Graphs
            self.graphs = Graphs(self.step, cache.slots, (self.state_4B, cache.table_BM))

    def step(self, B):
        """Draw the next token of each of B rows from its last one: token_B and logp_B are overwritten."""
        position_B = self.position_B[:B]
        hidden_BD = self.model(self.token_B[:B], position_B, self.cache.attend(position_B))
        key_B = fold(self.key_B[:B], self.number_B[:B])
        self.token_B[:B], self.logp_B[:B] = self.draw(hidden_BD @ self.head_DV, key_B=key_B)
        self.state_4B[2:, :B] += 1  # number and position

    def run(self, rows, steps):
        """The next `steps` tokens of each row and their log-probs, as two lists of lists."""
        B, step, drawn = len(rows), self.graphs.step if self.graphs else self.step, []
        state = np.array([((row.rollout.ids or row.prompt.ids)[-1], row.key, len(row.rollout.ids),
                           row.cached()) for row in rows])
        self.position_B.zero_()  # a graph may pad the batch: those rows write to position 0
        self.state_4B[:, :B] = torch.from_numpy(state).T
        for _ in range(steps):
            step(B)
            drawn.append((self.token_B[:B].clone(), self.logp_B[:B].clone()))
        return [torch.stack(each, 1).tolist() for each in zip(*drawn, strict=True)]

    def close(self):
        if self.graphs:
            self.graphs.close()
        self.cache.close()
        self.head_DV = None


@torch.no_grad()
def generate(model, prompts, n, *, max_new_tokens, temperature, stop_ids, seeds_P, top_p=1.0, vocab_size=None,
             batch_size=256, kv_memory_gib=None, kernel="auto", progress=None, on_token=None,
             should_stop=lambda: False):
    """Sample n replies to each prompt: len(prompts)·n rollouts, prompt-major.

    prompts: lists of ids; max_new_tokens: tokens a reply, stop id included; temperature: 0 is greedy;
    stop_ids: ids that end a reply; seeds_P: an integer a prompt; top_p, vocab_size: as in `sample_tokens`;
    batch_size: rows decoded at once; kv_memory_gib: of keys and values, None: what a GPU has free, on a CPU
    what rows need; kernel: as in runtime/kernel.py; progress: name of a bar on a terminal; on_token(i, id):
    called for each token of rollout i; should_stop(): asked every few steps, True leaves replies unfinished.
    ValueError: a setting out of range, kv_memory_gib too little for a row, a prompt empty, too long or with
    an unknown id.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:  # NaN fails these too
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
    assert n >= 0 and batch_size >= 1 and len(seeds_P) == len(prompts), (n, batch_size, seeds_P)
    if not (rollouts := [Rollout(prompt) for prompt in prompts for _ in range(n)]):
        return []
    key_PG = fold(torch.as_tensor(seeds_P, dtype=torch.int64)[:, None], torch.arange(n)).tolist()
    rows = []  # the shortest prompts first: rows of similar lengths decode together
    for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p])):
        prompt, limit = Prompt(prompts[p], n), len(prompts[p]) + max_new_tokens - 1
        rows += [Row(p * n + g, rollouts[p * n + g], prompt, key_PG[p][g], limit) for g in range(n)]
    torch.clear_autocast_cache()  # its copies may be older than the weights
    weight = model.head_weight()[:1]
    device, dtype = weight.device, (weight @ weight.T).dtype  # of products, which autocast changes
    kernel, cache_class, draw = choose_kernel(kernel, device.type, "sampling"), Cache, sample_tokens
    if kernel == "gpu" or (kernel == "cpu" and kv_memory_gib is not None):
        from fast.paged_cache import Cache as cache_class
    elif kernel == "cpu":
        from fast.aligned_cache import Cache as cache_class
    if kernel == "gpu" and top_p == 1:
        from fast.draw import sample_tokens as draw
    torch.cuda.empty_cache()  # pages need whole segments, and so does training after them; a CPU has none
    if kv_memory_gib is None and device.type == "cuda":
        kv_memory_gib = torch.cuda.mem_get_info(device)[0] / 2**30 - MARGIN_GIB
    cache = cache_class(model.config, dtype, device, min(batch_size, len(rows)), rows, rows[-1].limit,
                        STEPS[device.type], kv_memory_gib, kernel)
    draw = functools.partial(draw, temperature=temperature, top_p=top_p, vocab_size=vocab_size)
    bar = tqdm(total=len(rows), desc=progress, disable=None if progress else True, leave=False, unit="reply")
    with closing(Decoder(model, cache, draw, dtype, kernel)) as decoder, bar:
        decode_all(decoder, rows, max_new_tokens, frozenset(stop_ids), bar, on_token, should_stop)
    torch.cuda.empty_cache()
    return rollouts


def decode_all(decoder, rows, max_new_tokens, stop_ids, bar, on_token, should_stop):
    """The scheduler: decode all rows until they end. A row waits until there are a slot and memory for it; a
    preempted one is the next to start, and draws the same tokens again."""
    cache, steps = decoder.cache, STEPS[decoder.token_B.device.type]
    waiting, running = deque(rows), []  # running: the row in each slot
    while (waiting or running) and not should_stop():
        if waiting and len(running) <= cache.slots * (1 - FREE_SHARE):
            start_rows(decoder, waiting, running)
        while row := cache.reserve(running, steps):
            free_slot(cache, running, row)
            row.rollout.ids, row.rollout.logp = [], []
            row.prompt.unstarted += 1
            waiting.appendleft(row)
        # Backwards, so that the row which moves to a freed slot has been handled already
        for row, ids, logps in reversed([*zip(running, *decoder.run(running, steps), strict=True)]):
            if append_tokens(row, ids, logps, max_new_tokens, stop_ids, on_token):
                free_slot(cache, running, row)
                bar.update()


def start_rows(decoder, waiting, running):
    """Start as many waiting rows as there are slots and memory for, and compute the prompts they need."""
    cache, first = decoder.cache, len(running)
    while waiting and len(running) < cache.slots and cache.admit(waiting[0], len(running)):
        running.append(waiting.popleft())
        running[-1].prompt.unstarted -= 1
    new = list(enumerate(running[first:], first))
    while new:  # each pass is placed before the next one, so that only one is held
        if todo := dict.fromkeys(row.prompt for _, row in new if row.prompt.kv is None):
            prefill(decoder.model, list(todo), decoder.kernel)
        ready = [pair for pair in new if pair[1].prompt.kv is not None]
        new = [pair for pair in new if pair[1].prompt.kv is None]
        for slot, row in ready:
            cache.place(row, slot)
        cache.drop_prompts(dict.fromkeys(row.prompt for _, row in ready if not row.prompt.unstarted))


def free_slot(cache, running, row):
    """Remove a row; the row in the last slot takes its place."""
    cache.release(row)
    slot, last = running.index(row), running.pop()
    if last is not row:
        running[slot] = last
        cache.move(len(running), slot)


def append_tokens(row, ids, logps, max_new_tokens, stop_ids, on_token):
    """Add drawn tokens to a reply until it ends. Returns whether it has."""
    rollout = row.rollout
    for token, logp in zip(ids, logps, strict=True):
        rollout.ids.append(token)
        rollout.logp.append(logp)
        rollout.finished = token in stop_ids
        if on_token and len(rollout.ids) > row.reported:
            on_token(row.number, token)
            row.reported += 1
        if rollout.finished or len(rollout.ids) == max_new_tokens:
            return True
    return False


def main(argv=None):
    from tools.ask import main as ask
    ask(argv)


if __name__ == "__main__":
    main()
