"""Memory and length of a run, before it starts: `python train.py CONFIG --plan`.

In:  a config, the model's config.json and, if they exist, its tokenizer and the examples. Out: what each rank
holds at each moment that can be the peak, the steps and tokens of the run, whether it fits, and what to
change if it does not. No weight is read or allocated: the shapes are those of a model on the meta device.

    moment                what is held then, besides this rank's shards of weights and moments
    rollout, evaluation   whole weights; keys and values; activations of the prompts, or logits to sample from
    reference             the whole reference; activations of one block, or logits; no gradients exist yet
    log-prob              gradients; all that autograd saved; logits and the gradient of the head
    backward              gradients; all that autograd saved; one block in its backward
    step                  gradients; the reduce-scatter of embedding and head, or AdamW's temporary tensors

Bytes on each rank. `parameters` is their number; matrix products have w bytes a number (2 in bf16, 4 in
fp32):

weights     4·parameters/ranks in fp32, sharded by rows. A rollout also holds the whole copy that `unsharded`
            makes, w·parameters. In an update FSDP holds three things whole: the root (embedding, norm and
            head, from forward until the end of its backward), the block that computes and, on more than one
            rank, the next block, which is already being gathered. A single CPU process does not shard:
            4·parameters, without a copy
gradients   4·parameters/ranks at every moment of an update, because they exist from its second micro-batch
            on. In transit: the gradient of the head, 4·V·D while it is summed over chunks of logits, then
            w·V·D until the root is reduce-scattered at the end of backward; the gradients of one block; the
            fp32 input of that block's reduce-scatter, which is held until the next block's. A reduce-scatter
            holds w + 4 bytes a number, then 4 and its output. A single CPU process holds a new gradient and
            the one that it is added to
moments     8·parameters/ranks. AdamW steps one parameter at a time and then holds 8 more bytes a number of
            this parameter's shard
reference   as the weights, but w bytes a number on a GPU; nothing there if grpo.reference_on_cpu is set. For
            its passes, which come before the first backward of a step, every rank holds it whole, so that it
            is gathered or crosses PCIe once a step: w·parameters. The old log-probs are made between them
            and leave the policy's root gathered. A block is taken to hold what it would save for a backward
activations numbers a token. For each block its input, D. Inside each block (with activation_checkpointing:
            inside one block at a time) these:
            3·D: the outputs of both norms, and x after attention; on a CPU 5·D, because a norm is two steps
            4·F: the gate, its silu, up, their product
            3·H·E: the queries, and the output of attention in two orders, its own and that of the pack
            keys and values as the queries read them, so those of a prompt once more for each reply. With
            FlashAttention (bf16 on a GPU) they are 2·K·E, otherwise 2·H·E, and each reply has a mask of
            reply·(prompt + reply) fp32 numbers, where prompt and reply are their tokens
            The backward of an MLP holds 2·F + D more
logits      the larger of a chunk of CHUNK_TOKENS rows in w bytes and the bf16 copy of the head's gradient; on
            a CPU 4 fp32 copies of a chunk of CHUNK_LOGITS. Sampling: one row for each running reply, in w
            bytes a number, on a CPU in 20 (logits, log-probs, probabilities, cumulative sums in fp64)
keys and    pages of PAGE tokens: rollout.kv_memory_gib or, on a GPU without it, all free memory but
values      MARGIN_GIB; never more than all rows can fill. On a CPU without it each row has room for the
            longest row, and this room grows by half
prompts     (part of the activations) one pass of PREFILL_TOKENS is computed and placed in the cache before
            the next. It holds its keys and values, and also either a stacked copy of them or 3·F + 3·D
            numbers a token in an MLP

What is unknown before the run is planned at its maximum. Every prompt has data.max_prompt_tokens or, if data
and tokenizer exist, the tokens of the longest prompt. Every sampled reply reaches its limit. Micro-batches
are full, of replies whose length costs most. A GPU also needs CONTEXT_GIB for CUDA, NCCL and fragmentation.
The formulas are those of the kernels that model.kernel=auto chooses.

Axes: T packed tokens, L reply tokens, D width, F width inside the MLP, H query heads, K key/value heads,
E head size, V vocabulary rows.
"""

import argparse
import functools
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import grpo
import sample
from configs.schema import check_fits, load_config, number_of_steps
from data import Chat, read_jsonl, split_examples
from fast import aligned_cache, logprobs, paged_cache
from model import ModelConfig, Transformer
from runtime.sharding import cpu_has_amx
from runtime.tensors import resolve

GIB = 2**30
CONTEXT_GIB = 2  # of a GPU, besides tensors
DEFAULT_GIB = 80  # of a GPU, if this machine has none
WITHOUT_WEIGHTS = ("config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt",
                   "*.jinja")
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


class Sizes(NamedTuple):
    """Counts of numbers: all parameters; this rank's shards, in all and each; the root; a block."""

    total: int
    shard: int
    shards: tuple
    root: int
    block: int


@functools.cache
def sizes(config, ranks):
    """The Sizes of a model on rank 0, which has the most rows."""
    with torch.device("meta"):
        named = [(name, list(parameter.shape)) for name, parameter in Transformer(config).named_parameters()]
    root = [shape for name, shape in named if not name.startswith("layers.")]
    block = [shape for name, shape in named if name.startswith("layers.0.")]
    shapes = [shape for _, shape in named]

    def shard(shape):
        return math.prod([-(-shape[0] // ranks), *shape[1:]])

    shards = tuple(map(shard, shapes))
    return Sizes(sum(map(math.prod, shapes)), sum(shards), shards, sum(map(math.prod, root)),
                 sum(map(math.prod, block)))


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
    numbers += 2 * x.keys * (K if is_flash else H) * E
    in_fp32 = x.T * (H + 2)  # the log-sum-exp of each head, and the scales of two norms
    return s.itemsize * numbers + 4 * in_fp32 + (0 if is_flash else 4 * x.mask)


def update_memory(s, x):
    """{moment: {part: bytes}} of an update with micro-batches of Shape x, from its second micro-batch on."""
    n, c, w, is_cuda = sizes(s.model, s.ranks), s.model, s.itemsize, s.device == "cuda"
    D, F, V, layers = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    between = {SHARD: 4 * n.shard, MOMENTS: 8 * n.shard, REFERENCE: reference_bytes(s, n)}
    always = between | {GRADIENTS: 4 * n.shard}
    hidden, saved = x.T * D * w, saved_by_block(s, x)
    block = hidden + (0 if s.checkpointed else saved)

    def whole(blocks):
        """Whole weights of the root, of `blocks` blocks and, on more than one rank, of the next block."""
        return w * (n.root + n.block * (blocks + (s.ranks > 1))) if s.sharded else 0

    def reduce_scatter(numbers):
        """Bytes while so many gradients are reduce-scattered."""
        return numbers * max(w + 4, 4 + 4 / s.ranks) if s.sharded else 0

    if is_cuda:
        chunk, sums = min(logprobs.CHUNK_TOKENS, x.L), 4 * V * D
        without, logits = w * V * chunk, w * V * max(chunk, D if w == 2 else 0)
    else:
        chunk, sums = min(x.L, max(1, grpo.CHUNK_LOGITS // V)), 0
        without, logits = 16 * V * chunk, 4 * V * max(4 * chunk, 2 * chunk + 2 * D)
    head = w * V * D if s.sharded else 0
    waiting = 4 * n.block if s.sharded else 0
    in_block = w * n.block if s.sharded else w * D * F
    passes = {} if s.reference == "none" else {"reference": plus(
        between, {REFERENCE: w * n.total if s.sharded else 0, WHOLE: whole(1) if s.updates > 1 else 0},
        largest({ACTIVATIONS: hidden + saved}, {LOGITS: without, ACTIVATIONS: 2 * hidden + x.L * D * w}))}
    return passes | {
        "log-prob": plus(always, {
            WHOLE: whole(0), GRADIENTS: sums, LOGITS: logits,
            ACTIVATIONS: layers * block + hidden * (2 if is_cuda else 3) + x.L * D * w}),
        "backward": largest(
            plus(always, {  # the MLP of the last block
                WHOLE: whole(1), GRADIENTS: head + w * D * F + (waiting if s.checkpointed else 0),
                ACTIVATIONS: layers * block + (saved if s.checkpointed else 0) + x.T * (2 * F + D) * w}),
            plus(always, {  # the end of the last block but one
                WHOLE: whole(1), GRADIENTS: head + waiting + in_block,
                ACTIVATIONS: max(0, layers - 2) * block + 3 * hidden}),
            plus(always, {  # the reduce-scatter of the last block's gradients
                WHOLE: whole(0), GRADIENTS: head + reduce_scatter(n.block),
                ACTIVATIONS: (layers - 1) * block + hidden})),
        "step": largest(
            plus(always, {GRADIENTS: reduce_scatter(n.root) if s.sharded else 4 * V * D}),
            plus(always, {MOMENTS: 8 * max(n.shards)})),
    }


def reference_bytes(s, n):
    """Bytes of the KL reference on the device."""
    if s.reference == "none" or s.device == "cuda" and s.reference == "cpu":
        return 0
    return (s.itemsize if s.device == "cuda" else 4) * n.shard


def sampling_memory(s, prompts, n, reply, free=math.inf):
    """{part: bytes} of sampling n replies to each of `prompts` prompts, which are divided over the ranks.

    free: bytes for all parts, which bounds the pages if kv_gib is None.
    """
    z, c, w, token = sizes(s.model, s.ranks), s.model, s.itemsize, kv_bytes(s)
    rows = math.ceil(prompts / s.ranks) * n
    slots = min(s.batch_size, rows)
    parts = {SHARD: 4 * z.shard, WHOLE: w * z.total if s.sharded else 0, MOMENTS: 8 * z.shard,
             REFERENCE: reference_bytes(s, z)}
    if s.device == "cpu" and s.kv_gib is None:
        first = slots * token * (s.prompt + min(reply, aligned_cache.FIRST_ROOM))
        most = slots * token * grown_cache(s.prompt, reply, math.ceil(rows / slots) * reply)
    else:
        page, pages = paged_cache.PAGE * token, -(-(s.prompt + reply - 1) // paged_cache.PAGE)
        given = free - total(parts) - sample.MARGIN_GIB * GIB if s.kv_gib is None else s.kv_gib * GIB
        # Sampling raises an error if the pool cannot hold one row.
        first = most = page * max(pages + 1, min(slots * pages + 1, given // page))
    at_once = min(math.ceil(slots / n) * (s.prompt - 1), max(sample.PREFILL_TOKENS, s.prompt - 1))
    mlp = (3 * (c.intermediate_size + c.hidden_size) + 2 * c.head_dim) * w
    logits = slots * c.vocab_size * (w if s.device == "cuda" else 20)
    return largest(plus(parts, {KV: first, ACTIVATIONS: at_once * (token + max(token, mlp))}),
                   plus(parts, {KV: most, LOGITS: logits}))


def kv_bytes(s):
    """Bytes of the keys and values of one token."""
    c = s.model
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * s.itemsize


def grown_cache(prompt, reply, steps):
    """The most tokens a row that fast/aligned_cache.py holds within `steps` steps, its copies while it grows
    included."""
    size = most = prompt + min(reply, aligned_cache.FIRST_ROOM)
    done = size - prompt
    while done < steps:
        kept = min(size, prompt + reply - 1)
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


# What to change.


def changes(s, capacity, least_micro_batch, most_ranks):
    """(setting and value, Setup with it) of each change that may save memory, the cheapest first."""
    for numerator in range(63, 0, -1):
        gib = float(f"{capacity / GIB * numerator / 64:.2g}")
        smaller = replace(s, kv_gib=gib)
        if numerator == 1 or sampling_fits(smaller, capacity):
            yield f"rollout.kv_memory_gib={gib:g}", smaller
            break
    if s.reference == "cuda":
        yield "grpo.reference_on_cpu=true", replace(s, reference="cpu")
    for tokens in (*range((s.micro_batch_tokens - 1) // 1024 * 1024, least_micro_batch, -1024),
                   least_micro_batch):
        smaller = replace(s, micro_batch_tokens=tokens)
        if tokens == least_micro_batch or peak(replace(smaller, samplings=()), capacity) <= capacity:
            yield f"train.micro_batch_tokens={tokens}", smaller
            break
    if not s.checkpointed:
        yield "train.activation_checkpointing=true", replace(s, checkpointed=True)
    ranks = 2 * s.ranks
    while s.device == "cuda" and ranks <= most_ranks:
        more = replace(s, ranks=ranks)
        if 2 * ranks > most_ranks or peak(replace(more, kv_gib=0), capacity) <= capacity:
            yield f"{ranks} GPUs", more
            break
        ranks *= 2


def sampling_fits(s, capacity):
    moments = memory(s, capacity)
    return all(total(moments[name]) <= capacity for name, *_ in s.samplings)


def advice(s, capacity, least_micro_batch, most_ranks):
    """[(setting and value, peak with it and the changes before)]: the largest gain first, until it fits."""
    chosen, least = [], peak(s, capacity)
    while least > capacity:
        # Memory below the capacity is no gain: of two changes that make it fit, the cheaper one is chosen.
        options = [(max(peak(changed, capacity), capacity), change, changed)
                   for change, changed in changes(s, capacity, least_micro_batch, most_ranks)]
        _, change, changed = min(options, key=lambda option: option[0])
        if peak(changed, capacity) >= least:
            break
        s, least = changed, peak(changed, capacity)
        chosen.append((change, least))
    return chosen


# The command line.


def main(argv):
    """`train.py --plan`: print the plan. On an error print one line on stderr and exit with status 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 1)
    parser.add_argument("--gpu_memory", type=float)
    try:
        args, config_args = parser.parse_known_args(argv)
        print("\n".join(plan(load_config(config_args), args.gpus, args.gpu_memory)))
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def plan(c, gpus, gib):
    """The lines of the plan of a Config on `gpus` GPUs of `gib` GiB; 0 GPUs: on the CPU of this machine."""
    updating = c.train.prompts_per_step // c.train.updates_per_step
    if gpus < 0 or gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"--gpus {gpus} --gpu_memory {gib}: expected a number of GPUs, 0 for a run on "
                         "the CPU, and a number of GiB above 0")
    check_fits(c, ranks=gpus)
    device = "cuda" if gpus else "cpu"
    bf16 = c.model.precision == "bf16" or c.model.precision == "auto" and (gpus > 0 or cpu_has_amx())
    if bf16 and device == "cpu":
        raise ValueError("--gpus 0: a run on the CPU is planned in fp32 only; set model.precision=fp32")
    folder = resolve(c.model.path, WITHOUT_WEIGHTS)
    config = ModelConfig.from_hf(folder)
    check_fits(c, positions=config.max_position_embeddings)
    examples, heldout, longest, note = read_lengths(c, folder)
    s = setup_of(c, config, gpus, bf16, longest or c.data.max_prompt_tokens, heldout or c.eval.examples)
    if gib is None:
        gib = memory_of(device)
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "the CPU"
    precision = "bf16" if bf16 else "fp32"
    return [f"{c.stage} of {c.model.path} in {precision} on {where} of {gib:.4g} GiB", "",
            *length_lines(c, config, examples, note), "",
            *memory_lines(s, gib, c.data.max_prompt_tokens + c.rollout.max_new_tokens, updating)]


def setup_of(c, config, gpus, bf16, prompt, heldout):
    """The Setup of a Config. prompt: tokens of the longest one; heldout: how many examples are held out."""
    is_grpo, evaluated = c.stage == "grpo", min(c.eval.examples, heldout)
    samplings = [("rollout", c.train.prompts_per_step, c.rollout.n, c.rollout.max_new_tokens),
                 ("evaluation", evaluated, 1, c.eval.max_new_tokens)]
    with_reference = is_grpo and c.grpo.kl_coef > 0
    return Setup(
        model=config, prompt=prompt, reply=c.rollout.max_new_tokens,
        n=c.rollout.n if is_grpo else 1,
        samplings=tuple(samplings if is_grpo else samplings[1:]),
        batch_size=c.rollout.batch_size, kv_gib=c.rollout.kv_memory_gib,
        updates=c.train.updates_per_step, micro_batch_tokens=c.train.micro_batch_tokens,
        checkpointed=c.train.activation_checkpointing,
        reference="none" if not with_reference else "cpu" if c.grpo.reference_on_cpu else "cuda",
        ranks=gpus or 1, sharded=gpus > 0, device="cuda" if gpus else "cpu",
        itemsize=2 if bf16 else 4)


def memory_of(device):
    """GiB of this machine's GPU, or of its main memory; of a common GPU if the machine has none."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return DEFAULT_GIB


def read_lengths(c, folder):
    """(training examples, held-out examples, tokens of the longest prompt, note to print); None: unknown."""
    for file in (c.data.train, c.data.heldout):
        if file and not Path(file).exists():
            return None, None, None, f"unknown, {file} is not there"
    examples = read_jsonl(c.data.train)
    if c.data.heldout is None:
        examples, heldout = split_examples(examples, c.data.heldout_fraction, c.seed)
    else:
        heldout = read_jsonl(c.data.heldout)
    try:
        chat = Chat(folder, c.data.system_prompt, c.data.chat_format)
    except ValueError:
        return len(examples), len(heldout), None, "some may be too long: there is no tokenizer to tell"
    lengths, heldout = ([length for length in (len(chat.encode_prompt(example)) for example in part)
                         if length <= c.data.max_prompt_tokens] for part in (examples, heldout))
    longest = max(lengths + heldout, default=None)
    return len(lengths), len(heldout), longest, f"prompts of at most {longest} tokens"


def length_lines(c, config, examples, note):
    """One line each for parameters, examples, steps, rollouts and tokens."""
    z, P = sizes(config, 1), c.train.prompts_per_step
    embedding = config.vocab_size * config.hidden_size
    head = "the head is tied to it" if config.tie_word_embeddings else "the head is not tied to it"
    check_fits(c, examples=examples)
    lines = [f"parameters  {z.total:,}, of them {embedding:,} in the embedding; {head}",
             "examples    " + (note if examples is None else f"{examples:,} for training, {note}")]
    steps = number_of_steps(c, examples or 0)
    epoch = f"{examples / P:.1f} an epoch, " if examples else ""
    lines.append(f"steps       {epoch}{f'{steps:,}' if steps else 'unknown'} in all; in each {P:,} "
                 f"{'prompts' if c.stage == 'grpo' else 'examples'}, {c.train.updates_per_step} updates")
    if c.stage == "grpo":
        N = P * c.rollout.n
        most = P * c.data.max_prompt_tokens + N * c.rollout.max_new_tokens
        lines.append(f"rollouts    {N:,} a step" + (f", {N * steps:,} in all" if steps else ""))
    else:
        most = P * c.train.micro_batch_tokens
    in_all = f", {most * steps:,} in all" if steps else ""
    lines.append(f"tokens      at most {most:,} a step{in_all}")
    return lines


def memory_lines(s, gib, least_micro_batch, most_ranks):
    """The table, then lines: does it fit, what to change, what was assumed."""
    capacity = gib * GIB
    moments = memory(s, capacity)
    unit = "GiB on each GPU" if s.device == "cuda" else "GiB"
    lines = [f"{unit:20}" + "".join(f"{name:>12}" for name in moments)]
    rows = {part: [parts[part] for parts in moments.values()] for part in PARTS}
    for name, row in (rows | {"in all": map(total, moments.values())}).items():
        cells = [f"{value / GIB:12.2f}" if value else f"{'-':>12}" for value in row]
        if set(cells) != {f"{'-':>12}"}:
            lines.append(f"{name:20}" + "".join(cells))
    most = max(moments, key=lambda name: total(moments[name]))
    highest = total(moments[most])
    fits = "fits" if highest <= capacity else "does not fit"
    lines += ["", f"{fits}: {highest / GIB:.1f} of {gib:.4g} GiB ({most})"]
    chosen = advice(s, capacity, least_micro_batch, most_ranks)
    for word, (change, after) in zip(("take", *["and"] * len(chosen)), chosen, strict=False):
        lines.append(f"  {word} {change}: {after / GIB:.1f} GiB")
    if highest > capacity and (not chosen or chosen[-1][1] > capacity):
        lines.append("  no setting here makes it fit: take a smaller model or shorter limits")
    lines.append(f"assumed: prompts of {s.prompt} tokens, replies as long as allowed, micro-batches "
                 "full of what costs most")
    if s.reference == "cpu" and s.device == "cuda":
        z = sizes(s.model, s.ranks)
        pinned = sum(2 ** math.ceil(math.log2(s.itemsize * numbers)) for numbers in z.shards)
        lines += [f"in the host's memory, for each GPU: the reference, {s.itemsize * z.shard / GIB:.2f} GiB; "
                  f"pinned, up to {pinned / GIB:.2f}", "  (the rule of PyTorch's allocator, each tensor "
                  "rounded up to a power of two; not measured)"]
    return lines
