"""Time of a step, by counted operations: rollout, log-probs, update, evaluation.

In:  a Setup (tools/memory.py), a Machine, lengths in tokens. Out: {phase: seconds} on each rank. A phase is a
list of operations; each has FLOPs, bytes and launches, and takes

    seconds = max(FLOPs / rate of its kind, bytes / bandwidth, launches · least time of a launch)

docs/plan.md has the FLOPs and bytes of each operation, in the letters below, and what is left out.

Axes: T packed tokens, L reply tokens, B rows being decoded, D width, F width inside the MLP, H query heads,
K key/value heads, E head size, V vocabulary rows.
"""

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch

import grpo
from fast import aligned_cache, logprobs
from tools.memory import GIB, kv_bytes, sizes

ADAMW_BYTES = 40  # AdamW reads 4 fp32 numbers and writes 3; clipping reads 2 and writes 1
FSDP_BYTES = 46
DRAW_BYTES = {"cpu": 40, "cuda": 16}  # a logit; the GPU's kernel is bound by instructions, not by memory


@dataclass(frozen=True)
class Machine:
    """FLOP/s of large products, of the products of a decode step, and of attention; bytes/s; seconds of a
    launch from Python, of one in a decode step (of a product, of another), and of the host for each row."""

    products: float
    thin: float
    attention: float
    bandwidth: float
    eager: float
    thin_product: float
    thin_pass: float
    row: float


def gpu(flops, bandwidth):
    """A Machine from the figures of a data sheet, bf16 FLOP/s and bytes/s, by the shares that the project
    assumes: 70 % in large products, 60 in those of a decode step and in attention, 72 % of the bandwidth."""
    return Machine(0.7 * flops, 0.6 * flops, 0.6 * flops, 0.72 * bandwidth, 6e-6, 4e-6, 2e-6, 1.2e-6)


H100, H200 = gpu(989e12, 3.35e12), gpu(989e12, 4.8e12)


def cpu(pace):
    """A Machine whose FLOP/s in one product are `pace`. The rest follows by ratios that were fitted once, to
    rollouts and updates of six settings on one CPU: 1 to 135 M parameters, rows of 130 to 1,020 tokens."""
    rates = {"products": 0.8 * pace, "thin": 0.3 * pace, "attention": 0.5 * pace, "bandwidth": 0.04 * pace}
    return Machine(**rates, eager=5e5 / pace, thin_product=1e6 / pace, thin_pass=1e6 / pace, row=1e6 / pace)


def measured_pace(config, rounds=9, clock=time.perf_counter):
    """FLOP/s of one fp32 product of this machine's CPU, of 1,024 rows and about the shape of the MLP."""
    D, F = min(config.hidden_size, 1024), min(config.intermediate_size, 4096)
    x, weight, seconds = torch.randn(1024, D), torch.randn(F, D), []
    repeats = max(1, int(1e9 / (2 * 1024 * D * F)))
    for _ in range(rounds + 1):  # the first warms up
        began = clock()
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)
        seconds.append(clock() - began)
    return repeats * 2 * 1024 * D * F / median(seconds[1:])


class Op(NamedTuple):
    """One operation, or several equal ones as their sum. kind: product | attention | pass."""

    kind: str
    flops: float
    bytes: float
    launches: float

    def times(self, factor):
        return self._replace(flops=factor * self.flops, bytes=factor * self.bytes,
                             launches=factor * self.launches)


def seconds_of(ops, m, thin=False):
    """Seconds of operations on the Machine m; thin: in a decode step."""
    rate = {"product": m.thin if thin else m.products, "attention": m.attention, "pass": math.inf}
    least = {"product": m.thin_product, "attention": m.thin_pass, "pass": m.thin_pass}
    return sum(max(op.flops / rate[op.kind], op.bytes / m.bandwidth,
                   op.launches * (least[op.kind] if thin else m.eager)) for op in ops)


def product(rows, inputs, outputs, w):
    return Op("product", 2 * rows * inputs * outputs, w * (rows * (inputs + outputs) + inputs * outputs), 1)


class Tokens(NamedTuple):
    """What the layers compute: T tokens, pairs of a query and a key, keys that are read, sequences."""

    T: float
    pairs: float
    keys: float
    sequences: float

    @classmethod
    def trees(cls, s, prompts, prompt, n=0, reply=0):
        """Prompts, each with n replies: all of one length."""
        keys = prompt + reply
        seen = keys if s.device == "cpu" else prompt + reply / 2  # a mask hides pairs, but they are computed
        return cls(prompts * (prompt + n * reply), prompts * (prompt * prompt / 2 + n * reply * seen),
                   prompts * (prompt + n * keys), prompts * (1 + n))


def layers(s, x, cached=False):
    """Operations of all layers for Tokens x, the last product of an MLP last; cached: keys and values are
    read where they lie."""
    c, w, is_cuda = s.model, s.itemsize, s.device == "cuda"
    D, F, H, K, E = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
                     c.head_dim)
    shapes = ((D, H * E), (D, K * E), (D, K * E), (H * E, D), (D, F), (D, F), (F, D))
    copies = 0 if cached else 6 * x.T * H * E + 4 * x.keys * K * E
    in_attention = 2 if cached or is_cuda else 8 * x.sequences
    ops = [product(x.T, *shape, w) for shape in shapes]
    read = 2 * x.T * H * E + 2 * x.keys * K * E
    ops.insert(0, Op("attention", 4 * x.pairs * H * E, w * read, in_attention))
    for numbers, launches in ((10 * D, 4), (8 * (H + K) * E, 6), (5 * F, 2)):
        ops.insert(0, Op("pass", 0, w * x.T * numbers, launches))
    ops.insert(0, Op("pass", 0, w * copies, 1 if cached else 7))
    return [op.times(c.num_hidden_layers) for op in ops]


def backward(ops, frozen):
    """Operations of the backward of `ops`; frozen: no gradient of a weight is made."""
    factor = {"product": 1 if frozen else 2, "attention": 2.5, "pass": 2}
    return [op.times(factor[op.kind]) for op in ops]


def head(s, L, trained, micro_batches=1):
    """Operations of the log-probs of L reply tokens, with their backward if trained."""
    c, w, is_cuda = s.model, s.itemsize, s.device == "cuda"
    D, V = c.hidden_size, c.vocab_size
    forward, reading = product(L, D, V, w), Op("pass", 0, w * L * V, 1)
    ops = [forward, reading.times(1 if is_cuda else 6)]
    if trained:
        chunk = logprobs.CHUNK_TOKENS if is_cuda else max(1, grpo.CHUNK_LOGITS // V)
        again = is_cuda or L / micro_batches > chunk
        gradients = 1 if s.lora_rank else 2
        ops += [forward.times(gradients + again), reading.times(2 if is_cuda else 6)]
        if is_cuda and not s.lora_rank:
            ops.append(Op("pass", 0, 8 * V * D * L / chunk, math.ceil(L / chunk)))
    return ops


def decode_step(s, B, context, prefix=0, groups=0):
    """Operations of a decode step of B rows with `context` tokens each; prefix: of them, tokens of a prompt
    that attention reads once for each of so many groups."""
    c, w = s.model, s.itemsize
    keys = groups * prefix + B * (context - prefix) if groups else B * context
    ops = [*layers(s, Tokens(B, B * context, keys, B), cached=True),
           product(B, c.hidden_size, c.vocab_size, w),
           Op("pass", 0, DRAW_BYTES[s.device] * B * c.vocab_size, 10)]
    if groups:  # a second launch; both write their mean in fp32, which the merge reads. A CPU also reorders
        partial = 2 * 2 * 4 * B * c.num_attention_heads * c.head_dim
        launches = 1 if s.device == "cuda" else 12
        ops.append(Op("attention", 0, c.num_hidden_layers * partial, c.num_hidden_layers * launches))
    return ops


def sampling_seconds(s, m, prompts, n, limit, prompt, reply):
    """Seconds in which a rank samples its share of n replies to each of `prompts` prompts."""
    prompts, reply = prompts / s.ranks, min(reply, limit)
    rows = prompts * n
    slots = min(s.batch_size, rows)
    if s.kv_gib is not None:
        slots = min(slots, max(1, s.kv_gib * GIB / (kv_bytes(s) * (prompt / n + reply))))
    longest = min(limit, 2 * reply)
    seconds = seconds_of(layers(s, Tokens.trees(s, prompts, prompt - 1)), m)
    keys = prompt * s.model.num_key_value_heads * s.model.head_dim
    is_shared = (s.device == "cpu" and s.kv_gib is None
                 and aligned_cache.shared_prompts(slots, prompts, rows, keys) > 0)
    for steps, B in (((rows - slots) * reply / slots, slots), (longest, slots * reply / longest)):
        step = seconds_of(decode_step(s, B, prompt + (reply - 1) / 2, prompt - 1,
                                      slots / n if is_shared else 0), m, thin=True)
        seconds += steps * (step + m.row * B)
    return seconds


def step_seconds(s, m, prompts, prompt, reply, live=1.0):
    """{phase: seconds} of a step on `prompts` prompts of all ranks, mean lengths in tokens. live: the share
    of groups that are trained on, which is below 1 without a KL term."""
    z, is_grpo = sizes(s.model, s.ranks, s.lora_rank), any(name == "rollout" for name, *_ in s.samplings)
    mine = prompts * live / s.ranks
    x, L = Tokens.trees(s, mine, prompt, s.n, reply), mine * s.n * reply
    forward = layers(s, x)
    untrained = seconds_of([*forward, *head(s, L, trained=False)], m)
    passes = (s.reference != "none") + (s.updates - 1) / s.updates
    micro_batches = math.ceil(x.T / s.updates / s.micro_batch_tokens) * s.updates
    update = [*forward, *backward(forward, s.lora_rank), *head(s, L, True, micro_batches),
              *(forward[:-1] if s.checkpointed else ()),  # what autograd saves is complete before the last
              Op("pass", 0, s.updates * ADAMW_BYTES * z.shard, 0)]
    if s.sharded and s.device == "cuda":
        update.append(Op("pass", 0, micro_batches * FSDP_BYTES * z.total, 0))
    seconds = {"log-probs": passes * untrained if is_grpo else 0, "update": seconds_of(update, m)}
    for name, count, n, limit in s.samplings:
        seconds[name] = sampling_seconds(s, m, count, n, limit, prompt, reply)
    return seconds
