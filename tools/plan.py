"""The memory and the length of a run, told before it starts: `python train.py CONFIG --plan`.

In:  a config, the model's config.json and, where they are there, its tokenizer and the examples. Out:
what each rank holds at each moment that can be the worst, the steps and tokens of the run, whether it
fits, and what to change if not. No weight is read or allocated: shapes are those of a model on the meta
device.

    moment                what is held then, beside this rank's share of weights and moments
    rollout, evaluation   whole weights; keys and values; prompts being computed, or logits being sampled
    log-prob              gradients; all that autograd saved; logits and the gradient of the head
    backward              gradients; all that autograd saved; a block in its backward
    step                  gradients; sums over ranks of those of embedding and head, or AdamW's scratch

Bytes on each of R ranks, for N parameters and w bytes a number in matrix products (2 in bf16, 4 in
fp32):

weights     4 N/R in fp32, by rows. A rollout has w N more, the whole copy that `unsharded` makes. In an
            update FSDP has the root whole (embedding, norm and head, from forward until backward has
            passed), the block that computes and, of many ranks, the next one on its way. One CPU: 4 N,
            used as it is
gradients   4 N/R at every moment of an update: they are there from its second micro-batch on. On their
            way: the head's, 4 V D summed over chunks of logits, then w V D until the root's are summed
            at the end of backward; a block's own; the fp32 input of its sum over ranks, which waits for
            the next block's. A sum holds w + 4 bytes a number, then 4 and its output, and at R = 1,
            where FSDP divides by 1, a copy. One CPU: a new gradient beside the one it is added to
moments     8 N/R, and 8 bytes a number of the largest share as AdamW steps, a parameter at a time
reference   as the weights, in w bytes on a GPU, nothing there where grpo.reference_on_cpu is set. Its
            own pass saves nothing for a backward, so it is never the worst moment
activations of a token, numbers. The input of each block, D. Of each block, with activation_checkpointing
            of one at a time: 3 D (outputs of both norms, x after attention), on a CPU 5 D (a norm is two
            steps there); 4 F (gate, its silu, up, their product); 3 H E (queries; the output of
            attention, in its own order and in the pack's); keys and values as the queries read them, so
            a prompt again for each reply, 2 K E with FlashAttention (bf16 on a GPU), else 2 H E and a
            mask of R (P + R) fp32 numbers a reply. Backward of an MLP takes 2 F + D more
logits      a chunk of CHUNK_TOKENS rows in w bytes or, if larger, the bf16 copy of the head's gradient;
            on a CPU 4 fp32 copies of a chunk of CHUNK_LOGITS. Sampling: a row for each reply that runs,
            in w bytes, on a CPU 20 (logits, log-probs, probabilities, sums in fp64)
keys and    pages of PAGE tokens: rollout.kv_memory_gib of them, else what is free but MARGIN_GIB, and no
values      more than all rows can fill. On a CPU every row has room for the longest, which grows by half
prompts     (among activations) one pass of PREFILL_TOKENS is computed and placed before the next: its keys
            and values, and then a second copy of them, stacked, or 3 F + 3 D a token in an MLP

What is not known before is taken as the worst: every prompt has data.max_prompt_tokens, or the tokens of
the longest one where data and tokenizer are there; every sampled reply its limit; micro-batches are
full, of replies of the length that costs most. Beside tensors a GPU needs CONTEXT_GIB for CUDA, NCCL and
fragments.

Axes: T packed tokens, L reply tokens, D width, F width inside the MLP, H query heads, K key/value heads,
E head size, V vocabulary rows, P and R tokens of a prompt and of a reply.
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
from model import ModelConfig, Qwen2
from runtime.tensors import resolve

GIB = 2**30
CONTEXT_GIB = 2  # of a GPU, beside tensors
DEFAULT_GIB = 80  # of a GPU, where none is here to be asked
WITHOUT_WEIGHTS = ("config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt",
                   "*.jinja")
PARTS = ("weights, own share", "weights, whole", "gradients", "moments", "reference", "activations",
         "logits", "keys and values", "CUDA and fragments")
SHARE, WHOLE, GRADIENTS, MOMENTS, REFERENCE, ACTIVATIONS, LOGITS, KV, CONTEXT = PARTS


@dataclass(frozen=True)
class Setup:
    """What the memory of one rank follows from. Lengths in tokens."""

    model: ModelConfig
    prompt: int  # the longest
    reply: int  # the longest that is trained on
    n: int  # replies a prompt in an update
    samplings: tuple  # of (moment, prompts of all ranks, replies a prompt, longest reply)
    batch_size: int
    kv_gib: float | None
    micro_batch_tokens: int
    checkpointed: bool
    reference: str  # none | cpu | cuda
    ranks: int
    sharded: bool
    device: str  # cpu | cuda
    width: int  # bytes of a number in matrix products


class Sizes(NamedTuple):
    """Numbers in: all parameters, this rank's rows of them; the root; a block; the largest rows."""

    total: int
    share: int
    root: int
    block: int
    largest_share: int


@functools.cache
def sizes(config, ranks):
    """The Sizes of a model over ranks; those of the first rank, which has the most rows."""
    with torch.device("meta"):
        named = [(name, list(parameter.shape)) for name, parameter in Qwen2(config).named_parameters()]
    root = [shape for name, shape in named if not name.startswith("layers.")]
    block = [shape for name, shape in named if name.startswith("layers.0.")]
    shapes = [shape for _, shape in named]

    def share(shape):
        return math.prod([-(-shape[0] // ranks), *shape[1:]])

    return Sizes(sum(map(math.prod, shapes)), sum(map(share, shapes)), sum(map(math.prod, root)),
                 sum(map(math.prod, block)), max(map(share, shapes)))


class Shape(NamedTuple):
    """What costs in a micro-batch: packed tokens, reply tokens, keys read, numbers in replies' masks."""

    T: float
    L: float
    keys: float
    mask: float

    @classmethod
    def of(cls, groups):
        """groups: for each (prompt length, [reply lengths]), as `shared_prefix_attention` takes them."""
        pairs = [(P, R) for P, replies in groups for R in replies]
        P, L = sum(P for P, _ in groups), sum(R for _, R in pairs)
        return cls(P + L, L, P + sum(P + R for P, R in pairs), sum(R * (P + R) for P, R in pairs))

    @classmethod
    def full(cls, s, reply):
        """A full micro-batch of groups of the longest prompt with replies of `reply` tokens."""
        n = min(s.n, (s.micro_batch_tokens - s.prompt) // reply)
        one = cls.of([(s.prompt, [reply] * n)])
        return cls(*(x * s.micro_batch_tokens / one.T for x in one))


def saved_by_block(s, x):
    """Bytes that autograd saves in one block for a micro-batch of Shape x, without the block's input."""
    c, is_cuda = s.model, s.device == "cuda"
    is_flash = is_cuda and s.width == 2
    D, F, H, K, E = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
                     c.head_dim)
    numbers = x.T * ((3 if is_cuda else 5) * D + 4 * F + 3 * H * E + (E if is_flash else 0))
    numbers += 2 * x.keys * (K if is_flash else H) * E
    in_fp32 = x.T * (H + 2)  # each head's log-sum-exp, and two norms' scales
    return s.width * numbers + 4 * in_fp32 + (0 if is_flash else 4 * x.mask)


def update_memory(s, x):
    """{moment: {part: bytes}} of an update from micro-batches of Shape x, from its second one on."""
    n, c, w, is_cuda = sizes(s.model, s.ranks), s.model, s.width, s.device == "cuda"
    D, F, V, layers = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    always = {SHARE: 4 * n.share, GRADIENTS: 4 * n.share, MOMENTS: 8 * n.share,
              REFERENCE: reference(s, n)}
    line, saved = x.T * D * w, saved_by_block(s, x)
    block = line + (0 if s.checkpointed else saved)

    def whole(blocks):
        """Of the root, of blocks and of the next one, which a rank alone copies when it needs it."""
        return w * (n.root + n.block * (blocks + (s.ranks > 1))) if s.sharded else 0

    def summed(numbers):
        """While gradients are summed over ranks."""
        copies = 1 + (s.ranks == 1) + 1 / s.ranks
        return numbers * max(w + 4, 4 * copies) if s.sharded else 0

    if is_cuda:
        logits = w * V * max(min(logprobs.CHUNK_TOKENS, x.L), D if w == 2 else 0)
        sums = 4 * V * D
    else:
        chunk = min(x.L, max(1, grpo.CHUNK_LOGITS // V))
        logits, sums = 4 * V * max(4 * chunk, 2 * chunk + 2 * D), 0
    head = w * V * D if s.sharded else 0
    waiting = 4 * n.block if s.sharded else 0
    own = w * n.block if s.sharded else w * D * F
    return {
        "log-prob": plus(always, {
            WHOLE: whole(0), GRADIENTS: sums, LOGITS: logits,
            ACTIVATIONS: layers * block + line * (2 if is_cuda else 3) + x.L * D * w}),
        "backward": largest(
            plus(always, {  # the last block's MLP
                WHOLE: whole(1), GRADIENTS: head + w * D * F + (waiting if s.checkpointed else 0),
                ACTIVATIONS: layers * block + (saved if s.checkpointed else 0) + x.T * (2 * F + D) * w}),
            plus(always, {  # the end of the block before
                WHOLE: whole(1), GRADIENTS: head + waiting + own,
                ACTIVATIONS: max(0, layers - 2) * block + 3 * line}),
            plus(always, {  # the sums of the last block's gradients
                WHOLE: whole(0), GRADIENTS: head + summed(n.block),
                ACTIVATIONS: (layers - 1) * block + line})),
        "step": largest(
            plus(always, {GRADIENTS: summed(n.root) if s.sharded else 4 * V * D}),
            plus(always, {MOMENTS: 8 * n.largest_share})),
    }


def reference(s, n):
    """Bytes of the KL reference among the tensors of the device."""
    if s.reference == "none" or s.device == "cuda" and s.reference == "cpu":
        return 0
    return (s.width if s.device == "cuda" else 4) * n.share


def sampling_memory(s, prompts, n, reply, free=math.inf):
    """{part: bytes} of sampling n replies to each of `prompts` prompts, dealt to all ranks.

    free: bytes for all of it, which bounds the pages where kv_gib is None.
    """
    z, c, w, token = sizes(s.model, s.ranks), s.model, s.width, kv_bytes(s)
    rows = math.ceil(prompts / s.ranks) * n
    slots = min(s.batch_size, rows)
    parts = {SHARE: 4 * z.share, WHOLE: w * z.total if s.sharded else 0, MOMENTS: 8 * z.share,
             REFERENCE: reference(s, z)}
    if s.device == "cpu" and s.kv_gib is None:
        first = slots * token * (s.prompt + min(reply, aligned_cache.FIRST_ROOM))
        most = slots * token * grown_cache(s.prompt, reply, math.ceil(rows / slots) * reply)
    else:
        page, pages = paged_cache.PAGE * token, -(-(s.prompt + reply - 1) // paged_cache.PAGE)
        given = free - total(parts) - sample.MARGIN_GIB * GIB if s.kv_gib is None else s.kv_gib * GIB
        # One reply must have room, or sampling refuses to start.
        first = most = page * max(pages + 1, min(slots * pages + 1, given // page))
    at_once = min(math.ceil(slots / n) * (s.prompt - 1), max(sample.PREFILL_TOKENS, s.prompt - 1))
    mlp = 3 * (c.intermediate_size + c.hidden_size) * w + 4 * c.head_dim
    logits = slots * c.vocab_size * (w if s.device == "cuda" else 20)
    return largest(plus(parts, {KV: first, ACTIVATIONS: at_once * (token + max(token, mlp))}),
                   plus(parts, {KV: most, LOGITS: logits}))


def kv_bytes(s):
    """Bytes of one token's keys and values."""
    c = s.model
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * s.width


def grown_cache(prompt, reply, steps):
    """Tokens a row that `sample.Cache` holds at most in so many steps, with its copies as it grows."""
    size = most = prompt + min(reply, aligned_cache.FIRST_ROOM)
    done = size - prompt
    while done < steps:
        kept = min(size, prompt + reply - 1)
        done += size // 2 + 1
        size, old = kept + size // 2 + 1, size
        most = max(most, size + old / 2)  # the keys have grown, the values are there twice
    return most


def plus(*parts):
    """The sum of {part: bytes}, with every part."""
    return {name: sum(each.get(name, 0) for each in parts) for name in PARTS}


def total(parts):
    return sum(parts.values())


def largest(*moments):
    return max(moments, key=total)


def memory(s, capacity=math.inf):
    """{moment: {part: bytes}} of a run, with replies of the length that costs an update the most.

    capacity: bytes of the device, which bounds keys and values where `kv_gib` is None.
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
    """(setting and value, Setup with it) of whatever may save memory, the cheapest first."""
    for share in range(63, 0, -1):
        gib = float(f"{capacity / GIB * share / 64:.2g}")
        smaller = replace(s, kv_gib=gib)
        if share == 1 or sampling_fits(smaller, capacity):
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
    """[(setting and value, peak with it and those before)]: what gains most first, until it fits."""
    said, least = [], peak(s, capacity)
    while least > capacity:
        # What is left over gains nothing: of two that make it fit, the cheaper one.
        options = [(max(peak(changed, capacity), capacity), words, changed)
                   for words, changed in changes(s, capacity, least_micro_batch, most_ranks)]
        _, words, changed = min(options, key=lambda option: option[0])
        if peak(changed, capacity) >= least:
            break
        s, least = changed, peak(changed, capacity)
        said.append((words, least))
    return said


# The command line.


def main(argv):
    """`train.py --plan`: print the plan, or one line on stderr and exit with status 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 1)
    parser.add_argument("--gpu_memory", type=float)
    try:
        args, words = parser.parse_known_args(argv)
        print("\n".join(plan(load_config(words), args.gpus, args.gpu_memory)))
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def plan(c, gpus, gib):
    """The lines of the plan of a Config on `gpus` GPUs of `gib` GiB; 0 GPUs: on this machine's CPU."""
    updating = c.train.prompts_per_step // c.train.updates_per_step
    if gpus < 0 or gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"--gpus {gpus} --gpu_memory {gib}: expected a number of GPUs, 0 for a run on "
                         "the CPU, and a number of GiB above 0")
    check_fits(c, ranks=gpus)
    device = "cuda" if gpus else "cpu"
    bf16 = c.model.precision == "bf16" or c.model.precision == "auto" and device == "cuda"
    if bf16 and device == "cpu":
        raise ValueError("--gpus 0: a run on the CPU is planned in fp32 only; set model.precision=fp32")
    folder = resolve(c.model.path, WITHOUT_WEIGHTS)
    config = ModelConfig.from_hf(folder)
    check_fits(c, positions=config.max_position_embeddings)
    examples, heldout, longest, told = read_lengths(c, folder)
    is_grpo = c.stage == "grpo"
    evaluated = min(c.eval.examples, heldout or c.eval.examples)
    samplings = [("rollout", c.train.prompts_per_step, c.rollout.n, c.rollout.max_new_tokens),
                 ("evaluation", evaluated, 1, c.eval.max_new_tokens)]
    with_reference = is_grpo and c.grpo.kl_coef > 0
    s = Setup(model=config, prompt=longest or c.data.max_prompt_tokens, reply=c.rollout.max_new_tokens,
              n=c.rollout.n if is_grpo else 1,
              samplings=tuple(samplings if is_grpo else samplings[1:]),
              batch_size=c.rollout.batch_size, kv_gib=c.rollout.kv_memory_gib,
              micro_batch_tokens=c.train.micro_batch_tokens,
              checkpointed=c.train.activation_checkpointing,
              reference="none" if not with_reference else "cpu" if c.grpo.reference_on_cpu else "cuda",
              ranks=gpus or 1, sharded=gpus > 0, device=device, width=2 if bf16 else 4)
    if gib is None:
        gib = memory_of(device)
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "the CPU"
    precision = "bf16" if bf16 else "fp32"
    return [f"{c.stage} of {c.model.path} in {precision} on {where} of {gib:.4g} GiB", "",
            *length_lines(c, config, examples, told), "",
            *memory_lines(s, gib, c.data.max_prompt_tokens + c.rollout.max_new_tokens, updating)]


def memory_of(device):
    """GiB of this machine's GPU, or of the machine; of a common GPU where none is here."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return DEFAULT_GIB


def read_lengths(c, folder):
    """(training examples, held-out ones, tokens of the longest prompt, what to say); None: unknown."""
    for file in (c.data.train, c.data.heldout):
        if file and not Path(file).exists():
            return None, None, None, f"unknown, {file} is not there"
    examples = read_jsonl(c.data.train)
    if c.data.heldout is None:
        examples, heldout = split_examples(examples, c.data.heldout_fraction, c.seed)
    else:
        heldout = read_jsonl(c.data.heldout)
    try:
        chat = Chat(folder, c.data.system_prompt)
    except ValueError:
        return len(examples), len(heldout), None, "some may be too long: there is no tokenizer to tell"
    lengths, heldout = ([length for length in (len(chat.encode_prompt(example)) for example in part)
                         if length <= c.data.max_prompt_tokens] for part in (examples, heldout))
    longest = max(lengths + heldout, default=None)
    return len(lengths), len(heldout), longest, f"prompts of at most {longest} tokens"


def length_lines(c, config, examples, told):
    """Parameters, steps, rollouts and tokens, a line each."""
    z, P = sizes(config, 1), c.train.prompts_per_step
    embedding = config.vocab_size * config.hidden_size
    head = "the head is tied to it" if config.tie_word_embeddings else "the head is not tied to it"
    check_fits(c, examples=examples)
    lines = [f"parameters  {z.total:,}, of them {embedding:,} in the embedding; {head}",
             "examples    " + (told if examples is None else f"{examples:,} for training, {told}")]
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
    """The table, whether it fits, what to change, what was assumed."""
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
    reached = total(moments[most])
    fits = "fits" if reached <= capacity else "does not fit"
    lines += ["", f"{fits}: {reached / GIB:.1f} of {gib:.4g} GiB ({most})"]
    said = advice(s, capacity, least_micro_batch, most_ranks)
    for word, (change, after) in zip(("take", *["and"] * len(said)), said, strict=False):
        lines.append(f"  {word} {change}: {after / GIB:.1f} GiB")
    if reached > capacity and (not said or said[-1][1] > capacity):
        lines.append("  no setting here makes it fit: take a smaller model or shorter limits")
    lines.append(f"assumed: prompts of {s.prompt} tokens, replies as long as allowed, micro-batches "
                 "full of what costs most")
    if s.reference == "cpu" and s.device == "cuda":
        held = s.width * sizes(s.model, s.ranks).share / GIB
        lines.append(f"in the host's memory, for each GPU: the reference, {held:.2f} GiB")
    return lines
