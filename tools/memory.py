"""Memory of a run, by formulas: what each rank holds at each moment that can be the peak.

In:  a Setup. Out: {moment: {part: bytes}}. No weight is read or allocated: the shapes are those of a model on
the meta device.

    moment                what is held then, besides this rank's shards of weights and moments
    rollout, evaluation   whole weights; keys and values; activations of the prompts, or logits to sample from
    reference             the whole reference; activations of one block, or logits; no gradients exist yet
    log-prob              gradients; all that autograd saved; logits and the gradient of the head
    backward              gradients; all that autograd saved; one block in its backward
    step                  gradients; the reduce-scatter of embedding and head. AdamW works in place

docs/plan.md has the formula of each part, in the letters below, and what is assumed of what is unknown. w is
the bytes of a number in a matrix product: 2 in bf16, 4 in fp32. model.kernel is taken to be auto.

Axes: T packed tokens, L reply tokens, D width, F width inside the MLP, H query heads, K key/value heads,
E head size, V vocabulary rows.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

import grpo
import sample
from fast import aligned_cache, logprobs, paged_cache
from model import ModelConfig, Transformer
from runtime.adapters import add_adapters

GIB = 2**30
CONTEXT_GIB = 2  # of a GPU, besides tensors
PARTS = ("weights, own share", "weights, whole", "gradients", "moments", "reference", "activations",
         "logits", "keys and values", "CUDA and fragments")
SHARD, WHOLE, GRADIENTS, MOMENTS, REFERENCE, ACTIVATIONS, LOGITS, KV, CONTEXT = PARTS


@dataclass(frozen=True)
class Setup:
    """What the memory of one rank depends on. Lengths in tokens."""

    model: ModelConfig
    prompt: int  # the longest
    reply: int  # the longest that is trained on
    n: int  # replies a prompt in an update
    samplings: tuple  # of (moment, prompts of all ranks, replies a prompt, longest reply)
    batch_size: int
    kv_gib: float | None
    updates: int  # of a step
    micro_batch_tokens: int
    checkpointed: bool
    reference: str  # none | cpu | cuda
    ranks: int
    sharded: bool
    device: str  # cpu | cuda
    itemsize: int  # bytes of a number in matrix products
    lora_rank: int | None = None


class Sizes(NamedTuple):
    """Counts of numbers: all parameters; this rank's trained shards, in all and each, and its frozen ones;
    the root and a block, each in all and what is trained of it."""

    total: int
    shard: int
    shards: tuple
    frozen: int
    root: int
    block: int
    trained_root: int
    trained_block: int


@functools.cache
def sizes(config, ranks, lora_rank=None):
    """The Sizes of a model on rank 0, which has the most rows."""
    with torch.device("meta"):
        model = Transformer(config)
        if lora_rank:
            add_adapters(model, lora_rank, 1.0)
    parameters = dict(model.named_parameters())

    def numbers(prefix="", trained=(True, False), ranks=1):
        return [math.prod([-(-len(parameter) // ranks), *parameter.shape[1:]])
                for name, parameter in parameters.items()
                if name.startswith(prefix) and parameter.requires_grad in trained]

    def root(trained):
        return sum(numbers("", trained)) - sum(numbers("layers.", trained))

    shards, everything, only = tuple(numbers("", (True,), ranks)), (True, False), (True,)
    return Sizes(sum(numbers()), sum(shards), shards, sum(numbers("", (False,), ranks)), root(everything),
                 sum(numbers("layers.0.")), root(only), sum(numbers("layers.0.", only)))


class Shape(NamedTuple):
    """What a micro-batch costs: packed tokens, reply tokens, keys that are read, numbers in the masks."""

    T: float
    L: float
    keys: float
    mask: float

    @classmethod
    def of(cls, groups):
        """groups: for each (prompt length, [reply lengths]), the argument of `shared_prefix_attention`."""
        pairs = [(prompt, reply) for prompt, replies in groups for reply in replies]
        prompt_tokens, L = sum(prompt for prompt, _ in groups), sum(reply for _, reply in pairs)
        return cls(prompt_tokens + L, L, prompt_tokens + sum(prompt + reply for prompt, reply in pairs),
                   sum(reply * (prompt + reply) for prompt, reply in pairs))

    @classmethod
    def full(cls, s, reply):
        """A full micro-batch: groups of the longest prompt with replies of `reply` tokens."""
        n = min(s.n, (s.micro_batch_tokens - s.prompt) // reply)
        group = cls.of([(s.prompt, [reply] * n)])
        return cls(*(x * s.micro_batch_tokens / group.T for x in group))


def saved_by_block(s, x):
    """Bytes that autograd saves in one block for a micro-batch of Shape x, the block's input not included."""
    c, is_cuda = s.model, s.device == "cuda"
    is_flash = is_cuda and s.itemsize == 2
    D, F, H, K, E = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
                     c.head_dim)
    numbers = x.T * ((3 if is_cuda else 5) * D + 4 * F + 3 * H * E + (E if is_flash else 0))
    numbers += 2 * (x.keys + (0 if is_flash else x.L)) * K * E
    numbers += x.T * 7 * (s.lora_rank or 0)
    in_fp32 = x.T * (H + 2)  # the log-sum-exp of each head, and the scales of two norms
    return s.itemsize * numbers + 4 * in_fp32 + (4 * x.mask if is_cuda and not is_flash else 0)


def update_memory(s, x):
    """{moment: {part: bytes}} of an update with micro-batches of Shape x, from its second micro-batch on."""
    n, c, w, is_cuda = sizes(s.model, s.ranks, s.lora_rank), s.model, s.itemsize, s.device == "cuda"
    D, F, V, layers = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    between = {SHARD: shard_bytes(s, n), MOMENTS: 8 * n.shard, REFERENCE: reference_bytes(s, n)}
    masks = {} if is_cuda else {ACTIVATIONS: 4 * x.mask}
    always = between | {GRADIENTS: 4 * n.shard}
    held = always | masks
    hidden, saved, trained_D = x.T * D * w, saved_by_block(s, x), 0 if s.lora_rank else D
    block = hidden + (0 if s.checkpointed else saved)

    def whole(blocks):
        """Whole weights of the root, of `blocks` blocks and, on more than one rank, of the next block."""
        return w * (n.root + n.block * (blocks + (s.ranks > 1))) if s.sharded else 0

    def reduce_scatter(numbers):
        """Bytes while so many gradients are reduce-scattered."""
        return numbers * max(w + 4, 4 + 4 / s.ranks) if s.sharded else 0

    if is_cuda:
        chunk, sums = min(logprobs.CHUNK_TOKENS, x.L), 4 * V * trained_D
        without, logits = w * V * chunk, w * V * max(chunk, trained_D if w == 2 else 0)
    else:
        most, sums = max(1, grpo.CHUNK_LOGITS // V), 0
        chunk = min(x.L, most, grpo.CHUNK_TOKENS)
        without, kept, last = 12 * V * chunk, x.L if x.L <= most else chunk, (x.L - 1) % max(1, chunk) + 1
        others = kept - last + trained_D + 2 * max(chunk, trained_D) if x.L > chunk else 0
        logits = 4 * V * max(kept + 2 * max(last, trained_D), others)
    head = w * V * D if s.sharded and not s.lora_rank else 0
    waiting = 4 * n.trained_block if s.sharded else 0
    in_block = w * n.trained_block if s.sharded else w * D * F
    is_whole = s.sharded and not (s.lora_rank and s.ranks == 1)
    passes = {} if s.reference == "none" else {"reference": plus(
        between, masks, {REFERENCE: w * n.total if is_whole else 0, WHOLE: whole(1) if s.updates > 1 else 0},
        largest({ACTIVATIONS: hidden + saved}, {LOGITS: without, ACTIVATIONS: 2 * hidden + x.L * D * w}))}
    return passes | {
        "log-prob": plus(held, {
            WHOLE: whole(0), GRADIENTS: sums, LOGITS: logits,
            ACTIVATIONS: layers * block + hidden * (2 if is_cuda else 3) + x.L * D * w}),
        "backward": largest(
            plus(held, {  # the MLP of the last block
                WHOLE: whole(1), GRADIENTS: head + w * D * F + (waiting if s.checkpointed else 0),
                ACTIVATIONS: layers * block + (saved if s.checkpointed else 0) + x.T * (2 * F + D) * w}),
            plus(held, {  # the end of the last block but one
                WHOLE: whole(1), GRADIENTS: head + waiting + in_block,
                ACTIVATIONS: max(0, layers - 2) * block + 3 * hidden}),
            plus(held, {  # the reduce-scatter of the last block's gradients
                WHOLE: whole(0), GRADIENTS: head + reduce_scatter(n.trained_block),
                ACTIVATIONS: (layers - 1) * block + hidden})),
        "step": plus(always, {GRADIENTS: reduce_scatter(n.trained_root) if s.sharded else 4 * V * D}),
    }


def shard_bytes(s, n):
    """Bytes of this rank's weights: trained ones in fp32, frozen ones on a GPU as they are multiplied."""
    return 4 * n.shard + (s.itemsize if s.device == "cuda" else 4) * n.frozen


def reference_bytes(s, n):
    """Bytes of the KL reference on the device."""
    if s.reference == "none" or s.lora_rank or s.device == "cuda" and s.reference == "cpu":
        return 0
    return (s.itemsize if s.device == "cuda" else 4) * n.shard


def sampling_memory(s, prompts, n, reply, free=math.inf):
    """{part: bytes} of sampling n replies to each of `prompts` prompts, which are divided over the ranks.

    free: bytes for all parts, which bounds the pages if kv_gib is None.
    """
    z, c, w, token = sizes(s.model, s.ranks, s.lora_rank), s.model, s.itemsize, kv_bytes(s)
    rows = math.ceil(prompts / s.ranks) * n
    slots = min(s.batch_size, rows)
    whole = w if s.sharded else 4 if s.lora_rank else 0
    parts = {SHARD: shard_bytes(s, z), WHOLE: whole * z.total, MOMENTS: 8 * z.shard,
             REFERENCE: reference_bytes(s, z)}
    if s.device == "cpu" and s.kv_gib is None:
        numbers = c.num_key_value_heads * c.head_dim
        shared = aligned_cache.shared_prompts(slots, rows // n, rows, s.prompt * numbers) * s.prompt * token
        prompt, extra = (0, 1) if shared else (s.prompt, 0)
        first = shared + slots * token * (prompt + extra + min(reply, aligned_cache.FIRST_ROOM))
        most = shared + slots * token * grown_cache(prompt, extra, reply, math.ceil(rows / slots) * reply)
    else:
        page, pages = paged_cache.PAGE * token, -(-(s.prompt + reply - 1) // paged_cache.PAGE)
        given = free - total(parts) - sample.MARGIN_GIB * GIB if s.kv_gib is None else s.kv_gib * GIB
        # Sampling raises an error if the pool cannot hold one row.
        first = most = page * max(pages + 1, min(slots * pages + 1, given // page))
    at_once = min(math.ceil(slots / n) * (s.prompt - 1), max(sample.PREFILL_TOKENS, s.prompt - 1))
    mlp = (3 * (c.intermediate_size + c.hidden_size) + 2 * c.head_dim) * w
    return largest(plus(parts, {KV: first, ACTIVATIONS: at_once * (token + max(token, mlp))}),
                   plus(parts, {KV: most, LOGITS: slots * c.vocab_size * (w if s.device == "cuda" else 20)}))


def kv_bytes(s):
    """Bytes of the keys and values of one token."""
    c, w = s.model, 4 if s.device == "cpu" and s.kv_gib is None else s.itemsize
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * w


def grown_cache(prompt, extra, reply, steps):
    """The most columns a row that fast/aligned_cache.py holds within `steps` steps, its copies while it grows
    included. extra: columns that hold no token."""
    size = most = prompt + extra + min(reply, aligned_cache.FIRST_ROOM)
    done = size - prompt - extra
    while done < steps:
        kept = min(size, prompt + extra + reply - 1)
        done += size // 2 + 1
        size, old = kept + size // 2 + 1, size
        most = max(most, size + old / 2)  # the keys have grown, the values exist twice
    return most


def plus(*parts):
    """The sum of several {part: bytes}, with every part."""
    return {name: sum(each.get(name, 0) for each in parts) for name in PARTS}


def total(parts):
    return sum(parts.values())


def largest(*moments):
    return max(moments, key=total)


def memory(s, capacity=math.inf):
    """{moment: {part: bytes}} of a run, for the reply length that costs an update most.

    capacity: bytes of the device, which bounds keys and values if `kv_gib` is None.
    """
    context = {CONTEXT: CONTEXT_GIB * GIB if s.device == "cuda" else 0}
    moments = {name: sampling_memory(s, *settings, free=capacity - context[CONTEXT])
               for name, *settings in s.samplings}
    lengths = {s.reply, *(2**i for i in range(s.reply.bit_length()))}
    updates = [update_memory(s, Shape.full(s, reply)) for reply in lengths]
    moments |= {name: largest(*(update[name] for update in updates)) for name in updates[0]}
    return {name: plus(parts, context) for name, parts in moments.items()}


def peak(s, capacity):
    return max(map(total, memory(s, capacity).values()))
