"""Memory and time of a run, before it starts: `python train.py CONFIG --plan`.

In:  a config, the model's config.json and, if they exist, its tokenizer and the examples. Out: what each rank
holds at each moment that can be the peak (tools/memory.py), the steps and tokens of the run, whether it fits,
what to change if it does not, and the time of a step and of the run (tools/minutes.py).
"""

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

from configs.schema import check_fits, load_config, number_of_steps
from data import Chat, read_jsonl, split_examples
from model import ModelConfig
from runtime.sharding import cpu_has_bf16, set_threads
from runtime.tensors import resolve
from tools import minutes
from tools.memory import GIB, KV, PARTS, Setup, memory, peak, sizes, total

DEFAULT_GIB = 80  # of a GPU, if this machine has none
TYPICAL_PROMPT, TYPICAL_REPLY = 900, 120  # tokens, if there are no examples or no tokenizer
WITHOUT_WEIGHTS = ("config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt",
                   "*.jinja")

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
    bf16 = c.model.precision == "bf16" or c.model.precision == "auto" and (gpus > 0 or cpu_has_bf16())
    if bf16 and device == "cpu":
        raise ValueError("--gpus 0: a run on the CPU is planned in fp32 only; set model.precision=fp32")
    folder = resolve(c.model.path, WITHOUT_WEIGHTS)
    config = ModelConfig.from_hf(folder)
    check_fits(c, positions=config.max_position_embeddings)
    found = read_lengths(c, folder)
    s = setup_of(c, config, gpus, bf16, found.longest or c.data.max_prompt_tokens,
                 found.heldout or c.eval.examples)
    gib = memory_of(device) if gib is None else gib
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "the CPU"
    return [f"{c.stage} of {c.model.path} in {'bf16' if bf16 else 'fp32'} on {where} of {gib:.4g} GiB", "",
            *length_lines(c, config, found.examples, found.note), "",
            *memory_lines(s, gib, c.data.max_prompt_tokens + c.rollout.max_new_tokens, updating), "",
            *time_lines(c, s, gib, found)]


def setup_of(c, config, gpus, bf16, prompt, heldout):
    """The Setup of a Config. prompt: tokens of the longest one; heldout: how many examples are held out."""
    is_grpo, evaluated = c.stage == "grpo", min(c.eval.examples, heldout)
    samplings = [("rollout", c.train.prompts_per_step, c.rollout.n, c.rollout.max_new_tokens),
                 ("evaluation", evaluated, 1, c.eval.max_new_tokens)]
    with_reference = is_grpo and c.grpo.kl_coef > 0
    return Setup(
        model=config, prompt=prompt, reply=c.rollout.max_new_tokens, n=c.rollout.n if is_grpo else 1,
        samplings=tuple(samplings if is_grpo else samplings[1:]), batch_size=c.rollout.batch_size,
        kv_gib=c.rollout.kv_memory_gib, updates=c.train.updates_per_step,
        micro_batch_tokens=c.train.micro_batch_tokens, checkpointed=c.train.activation_checkpointing,
        reference="none" if not with_reference else "cpu" if c.grpo.reference_on_cpu and not c.model.lora_rank
        else "cuda",
        ranks=gpus or 1, sharded=gpus > 0, device="cuda" if gpus else "cpu",
        itemsize=2 if bf16 else 4, lora_rank=c.model.lora_rank)


def memory_of(device):
    """GiB of this machine's GPU, or of its main memory; of a common GPU if the machine has none."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return DEFAULT_GIB


class Lengths(NamedTuple):
    """Training examples, held-out ones, tokens of the longest prompt, mean tokens of a prompt and of an
    example's own reply, and a note to print. None: unknown."""

    examples: int | None
    heldout: int | None
    longest: int | None
    prompt: float | None
    reply: float | None
    note: str


def read_lengths(c, folder):
    """The Lengths of the examples, as far as there are files and a tokenizer."""
    for file in (c.data.train, c.data.heldout):
        if file and not Path(file).exists():
            return Lengths(None, None, None, None, None, f"unknown, {file} is not there")
    examples = read_jsonl(c.data.train)
    if c.data.heldout is None:
        examples, heldout = split_examples(examples, c.data.heldout_fraction, c.seed)
    else:
        heldout = read_jsonl(c.data.heldout)
    try:
        chat = Chat(folder, c.data.system_prompt, c.data.chat_format)
    except ValueError:
        note = "some may be too long: there is no tokenizer to tell"
        return Lengths(len(examples), len(heldout), None, None, None, note)
    lengths, heldout = ([(length, example) for example in part
                         if (length := len(chat.encode_prompt(example))) <= c.data.max_prompt_tokens]
                        for part in (examples, heldout))
    if not lengths:
        return Lengths(0, len(heldout), None, None, None, "no prompt is short enough")
    longest = max(length for length, _ in lengths + heldout)
    prompt, reply = (mean(each) for each in zip(*((length, len(chat.encode_reply(example)))
                                                  for length, example in lengths), strict=True))
    return Lengths(len(lengths), len(heldout), longest, prompt, reply, f"prompts of at most {longest} tokens")


def length_lines(c, config, examples, note):
    """One line each for parameters, examples, steps, rollouts and tokens."""
    z, P = sizes(config, 1), c.train.prompts_per_step
    embedding = config.vocab_size * config.hidden_size
    head = "the head is tied to it" if config.tie_word_embeddings else "the head is not tied to it"
    check_fits(c, examples=examples)
    lora = sizes(config, 1, c.model.lora_rank).shard if c.model.lora_rank else 0
    trained = f"; trained are {lora:,} of adapters" if lora else ""
    lines = [f"parameters  {z.total:,}, of them {embedding:,} in the embedding; {head}{trained}",
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
    lines.append(f"tokens      at most {most:,} a step" + (f", {most * steps:,} in all" if steps else ""))
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
    most, highest = max(((name, total(parts)) for name, parts in moments.items()), key=lambda pair: pair[1])
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


def time_lines(c, s, gib, found):
    """The table of times, then lines that say what was assumed."""
    if s.device == "cuda" and s.itemsize != 2:
        return ["time        not planned: what is assumed of a GPU is its speed in bf16"]
    typical = min(found.prompt or TYPICAL_PROMPT, s.prompt), min(found.reply or TYPICAL_REPLY, s.reply)
    whose = "the means of the examples" if found.reply else "a guess"
    notes = [f"typical: prompts of {typical[0]:.0f} tokens and replies of {typical[1]:.0f}, {whose}; "
             f"at most: {s.prompt} and {s.reply}",
             "  the longest reply has twice the mean length, or the limit; all groups are trained on",
             "  not counted: rewards, files, and what a small model waits for Python on a GPU"]
    machines = []
    if s.device == "cpu":
        set_threads(c.train.threads)
        pace = minutes.measured_pace(s.model)
        machines.append(("CPU", s, minutes.cpu(pace)))
        notes.append(f"CPU: {pace / 1e9:.3g} GFLOP/s in one product, measured now, threads: "
                     f"{torch.get_num_threads()}; the rest is computed")
        s, gib = replace(s, device="cuda", itemsize=2, sharded=True), DEFAULT_GIB
    if s.kv_gib is None:
        s = replace(s, kv_gib=memory(s, gib * GIB)[s.samplings[0][0]][KV] / GIB)
    machines.append((f"{s.ranks} H100" if s.ranks > 1 else "H100", s, minutes.H100))
    notes.append("H100: by assumption, not measured: 72 % of 3.35 TB/s, 60 to 70 % of 989 TFLOP/s in bf16")
    if s.ranks > 1:
        notes.append(f"  each of {s.ranks} has its share of the prompts, without the wait for the slowest "
                     "rank or the network")
    columns = {}
    for name, setup, machine in machines:
        for kind, lengths, draws in (("typical", typical, 1), ("at most", (s.prompt, s.reply),
                                                               1 + c.rollout.refill)):
            seconds = minutes.step_seconds(setup, machine, c.train.prompts_per_step, *lengths)
            if c.stage == "grpo":
                seconds["rollout"] *= draws
            columns[f"{name}, {kind}"] = with_sums(c, found, seconds)
    lines = [f"{'time':20}" + "".join(f"{name:>18}" for name in columns)]
    for row in ("rollout", "log-probs", "update", "step", "evaluation", "run"):
        cells = [as_text(seconds.get(row, 0)) for seconds in columns.values()]
        if set(cells) != {"-"}:
            lines.append(f"{row:20}" + "".join(f"{cell:>18}" for cell in cells))
    return [*lines, "", *notes]


def with_sums(c, found, seconds):
    """{phase: seconds} with those of a step and, if the number of steps is known, of the run."""
    step = sum(value for phase, value in seconds.items() if phase != "evaluation")
    if not (steps := number_of_steps(c, found.examples or 0)):
        return seconds | {"step": step}
    if c.train.max_minutes:
        steps = min(steps, math.ceil(60 * c.train.max_minutes / step))
    evaluations = 2 * c.eval.ends + (c.eval.every is not None and (steps - 1) // c.eval.every)
    return seconds | {"step": step, "run": steps * step + evaluations * seconds["evaluation"]}


def as_text(seconds):
    """Seconds with about three digits, in a unit of which there are at least two; "-" for none."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.4g} ms" if seconds else "-"
