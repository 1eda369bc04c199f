"""Training: GRPO or supervised fine-tuning of a Qwen2.5 model on tool calls. One process, one YAML file.

    repeat for every step:
        examples_P   the next batch of prompts                                        data.Batches
        rollouts_N   n replies to each, sampled from the policy                       sample.generate
        rewards_PG   1 where format and calls are right, else 0                       reward.score
        adv_PG       (reward - group mean) / group std                   (eq. 4)      grpo.group_advantages
        for every mini-batch of prompts:
            logp_L   log-probs of the replies' tokens under the policy                grpo.token_logprobs
            loss     -min(ratio A, clip(ratio) A) + beta KL              (eq. 3)      grpo.grpo_loss
            AdamW    on the gradient, clipped to a norm

In:  a config (configs/schema.py), a model folder, examples as JSON lines. Out: a run folder with config.yaml,
git_revision.txt, metrics.jsonl, rollouts/, evals/ and checkpoints/, each of which is a Hugging Face folder.

A run that was killed goes on from its newest whole checkpoint, bit for bit as if nothing had happened: there
is state at the boundaries between steps only, and order of the data and noise are functions of the step.

Where this differs from the paper's code: see grpo.py for the denominator. The old log-probs of the first
mini-batch are its own, detached: nothing has been updated yet. Without a KL term, groups whose rewards are
all equal have a gradient of exactly zero, so they are left out of the passes; they stay in the denominator.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from configs.schema import Config, flat, load_config, read_yaml
from data import Batches, Chat, filter_by_prompt_tokens, read_jsonl, split_examples, write_jsonl
from eval import (
    RAISED,
    check_seal,
    evaluate,
    judge,
    seal,
    spread,
    sync,
    table,
    write_json,
    write_text,
    writing,
)
from grpo import (
    Pack,
    group_advantages,
    grpo_loss,
    merge_stats,
    pack_micro_batches,
    sft_loss,
    token_logprobs,
)
from model import load_hf, read_json, resolve, save_hf, shared_prefix_attention
from sample import Stopped, generate, prompt_seeds

MAX_SKIPPED = 3  # steps in a row without a finite gradient before the run stops
MAX_DEAD = 10  # steps in a row that have nothing to learn from before the run stops, see `diagnose`
TO_FINISH_S = 10  # seconds that the updates of a step have to finish in after a signal
# What may differ when a run goes on: the name of a file (its contents are compared), what is looked at and
# kept, and what bounds memory, where rounding may differ. Steps too, unless the learning rate follows them.
MAY_CHANGE = ("out", "resume", "data.train", "data.heldout", "data.system_prompt", "eval.", "log.",
              "checkpoint.", "train.max_minutes", "train.micro_batch_tokens",
              "train.activation_checkpointing", "rollout.batch_size")
USAGE = """python train.py [FILE.yaml] [--section.key=value ...]

Presets are in configs/; configs/schema.py says what each key means. The defaults:
"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        print(yaml.safe_dump(dataclasses.asdict(Config()), sort_keys=False), end="")
        return
    try:
        status = train(load_config(argv))
    except (ValueError, OSError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 3 if isinstance(error, Diverged) else 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        status = 130
    if status:
        sys.exit(status)


def train(c):
    """The run that a config, `c`, asks for. Returns the exit status: 128 + signal where one stopped it."""
    with Run(c.out, c.resume) as run, Signals() as signals:
        try:
            take_steps(c, run, signals)
        except Stopped:
            run.stop(signals.midway)
            return 128 + signals.number
    return 0


def take_steps(c, run, signals):
    """Set up, then the loop of either stage. Only this function and `train` know the config, `c`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("WORLD_SIZE is above 1, but training is one process so far; start without torchrun")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    bf16 = c.model.precision == "bf16" or (c.model.precision == "auto" and has_bf16)
    autocast = torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    base = resolve(c.model.path)
    chat = Chat(base, c.data.system_prompt)
    train_set, heldout = read_examples(c.data.train, c.data.heldout, c.data.heldout_fraction, c.seed, chat,
                                       c.data.max_prompt_tokens, c.data.max_dropped_share)
    if len(train_set) < c.train.prompts_per_step:
        raise ValueError(f"train.prompts_per_step is {c.train.prompts_per_step}, but there are only "
                         f"{len(train_set)} training examples; choose a number up to that")
    batches = Batches(train_set, c.train.prompts_per_step, c.seed)
    steps = c.train.steps or math.ceil(c.train.epochs * len(train_set) / c.train.prompts_per_step)

    # The prompt stands for the tokenizer and the system prompt.
    fingerprint = {"data.train": batches.fingerprint, "data.heldout": Batches(heldout, 1, c.seed).fingerprint,
                   "data.system_prompt": sha256(str(chat.encode_prompt(train_set[0])).encode()).hexdigest()}
    heldout = spread(heldout, c.eval.examples)

    checkpoint = run.newest_checkpoint(flat(c))
    if checkpoint:
        run.restore(checkpoint, fingerprint)
        batches.cursor = run.step * c.train.prompts_per_step
    if run.step > steps:
        raise ValueError(f"{checkpoint} is past the {steps} steps of this run; raise train.steps")
    model = load_hf(checkpoint or base, device)
    model.checkpoint_blocks = c.train.activation_checkpointing
    longest = c.data.max_prompt_tokens + max(c.rollout.max_new_tokens, c.eval.max_new_tokens)
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"a prompt and a reply may take {longest} tokens, but {c.model.path} has "
                         f"{model.config.max_position_embeddings} positions; lower data.max_prompt_tokens, "
                         "rollout.max_new_tokens or eval.max_new_tokens")
    with_reference = c.stage == "grpo" and c.grpo.kl_coef > 0
    reference = load_hf(base, device).requires_grad_(False) if with_reference else None
    optimizer = make_optimizer(model, c.train.weight_decay, c.train.beta2)
    if checkpoint:
        read_moments(checkpoint, model, optimizer)
    run.open(dataclasses.asdict(c), flat(c), fingerprint, c.log.tracker, c.checkpoint.keep,
             functools.partial(write_checkpoint, model=model, optimizer=optimizer, base=base))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    precision = "bf16" if bf16 else "fp32"
    print(f"{c.stage} of {c.model.path}: {millions:.1f}M parameters on {device} in {precision}, "
          f"{len(train_set)} examples, {len(heldout)} held out, {steps} steps; {run.folder}", flush=True)

    sampling = {"max_new_tokens": c.rollout.max_new_tokens, "temperature": c.rollout.temperature,
                "stop_ids": chat.stop_ids, "vocab_size": chat.vocab_size, "batch_size": c.rollout.batch_size}
    updating = {"vocab_size": chat.vocab_size, "updates": c.train.updates_per_step, "autocast": autocast,
                "micro_batch_tokens": c.train.micro_batch_tokens, "grad_clip": c.train.grad_clip,
                "poll": signals.poll}
    losses = {"temperature": c.rollout.temperature, "kl_coef": c.grpo.kl_coef, "clip_low": c.grpo.clip_low,
              "clip_high": c.grpo.clip_high}
    limit_s = 60 * (c.train.max_minutes or math.inf)
    signals.catch()
    for step in range(run.step, steps + 1):
        is_last = step == steps or run.trained_s >= limit_s
        if not run.evaluated and (step % c.eval.every == 0 or is_last):
            began = time.perf_counter()
            with contextlib.suppress(Stopped), autocast:
                rows, replies = evaluate(model, chat, heldout, max_new_tokens=c.eval.max_new_tokens,
                                         batch_size=c.rollout.batch_size, scheme=c.grpo.reward,
                                         progress="evaluation", should_stop=signals.came)
            signals.poll()
            run.log_evaluation(step, rows, replies, time.perf_counter() - began)
        if step > run.saved and (step % c.checkpoint.every == 0 or is_last):
            run.save_checkpoint()
        if is_last:
            break

        began = time.perf_counter()
        lr = learning_rate(step, steps, c.train.lr, c.train.schedule, c.train.warmup)
        set_learning_rate(optimizer, lr)
        examples_P = next(batches)
        prompts_P = [chat.encode_prompt(example) for example in examples_P]
        if c.stage == "grpo":
            seeds_P = prompt_seeds(c.seed, step, 0, len(prompts_P))
            with contextlib.suppress(Stopped), autocast:
                rollouts_N = generate(model, prompts_P, c.rollout.n, seeds_P=seeds_P, progress="rollout",
                                      should_stop=signals.came, **sampling)
            signals.poll()
            verdicts_N = score_rollouts(rollouts_N, examples_P, chat, c.grpo.reward)
            rewards_PG = torch.tensor([verdict.reward for verdict in verdicts_N]).view(-1, c.rollout.n)
            adv_PG = group_advantages(rewards_PG, c.grpo.normalize)
            sampled = time.perf_counter()
            metrics = grpo_updates(model, reference, optimizer, rollouts_N, adv_PG, **losses, **updating)
            metrics |= rollout_metrics(rollouts_N, verdicts_N, rewards_PG)
            metrics |= {"time/rollout_s": sampled - began, "time/update_s": time.perf_counter() - sampled}
            is_odd = metrics["skipped_updates"] or metrics["reward/raised"]
            if (step + 1) % c.log.rollouts_every == 0 or step == 0 or is_odd:
                run.save_rollouts(step + 1, examples_P, rollouts_N, verdicts_N, adv_PG, chat)
        else:
            replies_P = [chat.encode_reply(example) for example in examples_P]
            metrics = sft_updates(model, optimizer, prompts_P, replies_P, **updating)
            if metrics["skipped_updates"]:
                write_jsonl(run.rollouts(step + 1), examples_P)
        metrics |= {"lr": lr, "epoch": batches.epoch, "time/step_s": time.perf_counter() - began}
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["time/step_s"]
        run.log_step(step + 1, steps, metrics)
    run.print_summary()


def read_examples(train, heldout, heldout_fraction, seed, chat, max_prompt_tokens, max_dropped_share):
    """(training examples, held-out examples), with prompts that are too long dropped, counted and told."""
    train_set = read_jsonl(train)
    if heldout is None:
        train_set, heldout_set = split_examples(train_set, heldout_fraction, seed)
    else:
        heldout_set = read_jsonl(heldout)
    kept = []
    for name, examples in (("training", train_set), ("held-out", heldout_set)):
        examples, dropped = filter_by_prompt_tokens(examples, chat, max_prompt_tokens, max_dropped_share)
        if dropped:
            print(f"dropped {dropped} {name} examples: prompts of more than {max_prompt_tokens} tokens")
        if not examples:
            raise ValueError(f"{train if name == 'training' else heldout or train}: no {name} examples")
        kept.append(examples)
    return kept


def score_rollouts(rollouts_N, examples_P, chat, scheme):
    """The verdict of every rollout; rollout i belongs to example i // n."""
    n = len(rollouts_N) // len(examples_P)
    return [judge(chat.decode(rollout.ids), examples_P[i // n].answer, scheme)
            for i, rollout in enumerate(rollouts_N)]


# Optimizer updates.


def make_optimizer(model, weight_decay, beta2):
    """AdamW on fp32 weights; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, beta2))


def learning_rate(step, steps, peak, schedule, warmup):
    """The rate of step `step` of `steps`: linear warm-up, then constant, or a cosine to a tenth of `peak`."""
    warmup_steps = int(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def logprobs_of_pack(model, pack, temperature, vocab_size, autocast):
    """(logp_L, entropy_L) of the reply tokens of a pack. Only their hidden states reach the head."""
    with autocast:
        hidden_TD = model(pack.tokens_T, pack.positions_T, shared_prefix_attention(pack.groups))
        return token_logprobs(hidden_TD[pack.predictor_L], model.head_weight(), pack.targets_L, temperature,
                              vocab_size)


def apply_update(optimizer, grad_clip, loss):
    """Clip the gradient's norm and step. Returns (norm, 1 where it or the loss was not finite: skipped)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip).item()
    skipped = most_of_ranks(int(not math.isfinite(norm) or not math.isfinite(loss)))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


@dataclass
class MicroBatch:
    """One pack with what its loss needs, a number for each of its L reply tokens."""

    pack: Pack
    adv_L: torch.Tensor
    sampled_logp_L: torch.Tensor
    old_logp_L: torch.Tensor | None = None
    ref_logp_L: torch.Tensor | None = None


def make_micro_batches(rollouts_N, adv_PG, live_P, micro_batch_tokens, device):
    """The micro-batches of the groups `live_P`, in order."""
    n = adv_PG.shape[1]
    groups_P = [rollouts_N[p * n:(p + 1) * n] for p in live_P]
    packs = pack_micro_batches([group[0].prompt_ids for group in groups_P],
                               [[rollout.ids for rollout in group] for group in groups_P], micro_batch_tokens)
    adv_N = adv_PG[live_P].flatten()
    sampled = [logp for group in groups_P for rollout in group for logp in rollout.logp]
    sizes = [len(pack.targets_L) for pack in packs]
    return [MicroBatch(pack.to(device), adv_N[pack.reply_L].to(device), logp_L.to(device))
            for pack, logp_L in zip(packs, torch.tensor(sampled).split(sizes), strict=True)]


def grpo_updates(model, reference, optimizer, rollouts_N, adv_PG, *, temperature, vocab_size, updates,
                 kl_coef, clip_low, clip_high, grad_clip, micro_batch_tokens, autocast, poll=lambda _: None):
    """The optimizer updates of one step: `updates` mini-batches of whole groups, in order. Returns metrics.

    Packs are built once and serve the old, the reference and the new log-probs. Each loss is a sum over its
    tokens divided by the reply tokens of its whole mini-batch, so micro-batches do not change the gradient.
    poll(whether weights have changed): asked before every pass; it may raise.
    """
    P, n = adv_PG.shape
    device = model.embed_tokens.weight.device
    mini_batches, denominators = [], []
    for first in range(0, P, P // updates):
        prompts = range(first, first + P // updates)
        live_P = [p for p in prompts if kl_coef or adv_PG[p].any()]
        mini_batches.append(make_micro_batches(rollouts_N, adv_PG, live_P, micro_batch_tokens, device))
        denominators.append(sum(len(rollouts_N[i].ids) for i in range(prompts.start * n, prompts.stop * n)))
    passes = {"temperature": temperature, "vocab_size": vocab_size, "autocast": autocast}
    with torch.no_grad():
        for i, micro_batches in enumerate(mini_batches):
            for part in micro_batches:
                poll(False)
                if i > 0:
                    part.old_logp_L, _ = logprobs_of_pack(model, part.pack, **passes)
                if reference is not None:
                    part.ref_logp_L, _ = logprobs_of_pack(reference, part.pack, **passes)

    all_stats, first_stats, norms, skipped = [], [], [], 0
    bar = tqdm(total=sum(map(len, mini_batches)), desc="update", disable=None, leave=False, unit="pack")
    for i, (micro_batches, denominator) in enumerate(zip(mini_batches, denominators, strict=True)):
        loss_of_update = 0.0
        for part in micro_batches:
            poll(bool(norms))
            logp_L, entropy_L = logprobs_of_pack(model, part.pack, **passes)
            old_logp_L = logp_L.detach() if part.old_logp_L is None else part.old_logp_L
            loss, stats = grpo_loss(logp_L, old_logp_L, part.ref_logp_L, part.adv_L, clip_low=clip_low,
                                    clip_high=clip_high, kl_coef=kl_coef, denominator=denominator)
            loss.backward()
            loss_of_update += loss.detach()
            diff_L = (old_logp_L - part.sampled_logp_L).abs()
            stats |= {"entropy_sum": entropy_L.sum(), "diff_sum": diff_L.sum(), "diff_max": diff_L.max()}
            all_stats.append(stats)
            first_stats += [stats] if i == 0 else []
            bar.update()
        if micro_batches:
            norm, skip = apply_update(optimizer, grad_clip, float(loss_of_update))
            norms.append(norm)
            skipped += skip
    bar.close()
    tokens = sum(len(r.ids) for r in rollouts_N) + sum(len(r.prompt_ids) for r in rollouts_N[::n])
    return {"tokens": tokens, **update_metrics(all_stats, first_stats, norms, skipped, updates, reference)}


def update_metrics(all_stats, first_stats, norms, skipped, updates, reference):
    """Means over the trained tokens of one step. Without a live group there is nothing but zeros to tell."""
    metrics = {"loss": 0.0, "grad_norm": 0.0, "updates": len(norms), "skipped_updates": skipped}
    if not all_stats:
        return metrics
    total = {name: float(value) for name, value in merge_stats(all_stats).items()}
    mean = {name: total[name + "_sum"] / total["tokens"]
            for name in ("ratio", "clip_low", "clip_high", "kl", "entropy", "diff")}
    metrics |= {
        "loss": total["loss"] / updates, "grad_norm": sum(norms) / len(norms), "entropy": mean["entropy"],
        "ratio/mean": mean["ratio"], "ratio/max": total["ratio_max"], "ratio/min": total["ratio_min"],
        "ratio/log_abs_max": total["log_ratio_abs_max"],
        "ratio/clip_low": mean["clip_low"], "ratio/clip_high": mean["clip_high"],
        "sampling/logp_diff_mean": mean["diff"], "sampling/logp_diff_max": total["diff_max"],
    }
    if reference is not None:
        metrics["kl"] = mean["kl"]
    if first_stats:
        first = merge_stats(first_stats)
        metrics["ratio/dev_first"] = float(max(first["ratio_max"] - 1, 1 - first["ratio_min"]))
    return metrics


def rollout_metrics(rollouts_N, verdicts_N, rewards_PG):
    """What the replies of one step were like. Shares are of replies, all_zero and all_one of groups."""
    lengths = [len(rollout.ids) for rollout in rollouts_N]
    N = len(rollouts_N)
    return {
        "reward/mean": rewards_PG.mean().item(),
        "reward/live": (rewards_PG != rewards_PG[:, :1]).any(1).float().mean().item(),
        "reward/all_zero": (rewards_PG == 0).all(1).float().mean().item(),
        "reward/all_one": (rewards_PG == 1).all(1).float().mean().item(),
        "reward/format_ok": sum(verdict.format_ok for verdict in verdicts_N) / N,
        "reward/names_ok": sum(verdict.names_ok for verdict in verdicts_N) / N,
        "reward/no_calls": sum(verdict.calls == [] for verdict in verdicts_N) / N,
        "reward/raised": sum((verdict.error or "").startswith(RAISED) for verdict in verdicts_N),
        "reward/commonest": Counter(tuple(rollout.ids) for rollout in rollouts_N).most_common(1)[0][1] / N,
        "length/mean": sum(lengths) / N, "length/min": min(lengths), "length/max": max(lengths),
        "length/cut": sum(not rollout.finished for rollout in rollouts_N) / N,
    }


def diagnose(metrics):
    """What keeps the rollouts of a step from teaching anything, with advice; None where something can."""
    if metrics.get("reward/commonest", 0) > 0.95:
        return ("nearly all replies to all prompts were the same: the policy has collapsed; go back to an "
                "earlier checkpoint, lower train.lr or raise grpo.kl_coef")
    if metrics.get("reward/live", 1) > 0:
        return None
    if metrics["reward/all_one"] == 1:
        return "every reply was right, so nothing is left to learn; take harder examples"
    return ("no group had a reply that earned more than another, so there was nothing to reinforce; teach "
            "the task first (stage: sft), raise rollout.n or rollout.temperature, or look into rollouts/")


def sft_updates(model, optimizer, prompts_P, replies_P, *, vocab_size, updates, grad_clip, micro_batch_tokens,
                autocast, poll=lambda _: None):
    """Supervised updates on the reply tokens, one a mini-batch, in order. Returns metrics."""
    device = model.embed_tokens.weight.device
    losses, norms, skipped = [], [], 0
    size = len(prompts_P) // updates
    for first in range(0, len(prompts_P), size):
        prompts, replies = prompts_P[first:first + size], replies_P[first:first + size]
        denominator, loss_of_update = sum(map(len, replies)), 0.0
        for pack in pack_micro_batches(prompts, [[reply] for reply in replies], micro_batch_tokens):
            poll(bool(norms))
            pack = pack.to(device)
            logp_L, _ = logprobs_of_pack(model, pack, 1.0, vocab_size, autocast)
            loss = sft_loss(logp_L, denominator)
            loss.backward()
            loss_of_update += loss.detach()
        losses.append(float(loss_of_update))
        norm, skip = apply_update(optimizer, grad_clip, losses[-1])
        norms.append(norm)
        skipped += skip
    return {"loss": sum(losses) / updates, "grad_norm": sum(norms) / len(norms), "updates": updates,
            "skipped_updates": skipped, "length/mean": sum(map(len, replies_P)) / len(replies_P),
            "tokens": sum(map(len, prompts_P)) + sum(map(len, replies_P))}


# Signals, and what the ranks must agree on.


class Diverged(Exception):
    """MAX_SKIPPED steps in a row had no finite gradient."""


def most_of_ranks(number):
    """The largest of the ranks' numbers, for what all must do alike. There is one rank so far."""
    return number


class Signals:
    """SIGTERM and SIGINT: the first is noted and polled where a step can be left, the second ends at once."""

    def __init__(self):
        self.number = 0  # of the signal that came
        self.noted_s = 0.0
        self.midway = False
        self.handlers = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self):
        """From here on there is something to save; before, a signal ends the process as it always does."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        # A launcher repeats what its whole group was sent: within a second it is the same signal again.
        if self.number and time.monotonic() > self.noted_s + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.noted_s = number, time.monotonic()
            os.write(2, b"\nstopping; a second signal ends this process at once\n")  # print is not reentrant

    def came(self):
        """Whether one came to this rank."""
        return self.number > 0

    def poll(self, midway=False):
        """Raise Stopped on every rank once a signal came to one; every rank must call this alike.

        midway: the weights have left the last boundary, and are worth TO_FINISH_S to reach the next.
        """
        waits = midway and time.monotonic() < self.noted_s + TO_FINISH_S
        number = most_of_ranks(0 if waits else self.number)
        if number:
            self.number, self.midway = number, midway
            raise Stopped


# Checkpoints.


def write_checkpoint(folder, model, optimizer, base):
    """A Hugging Face folder with the tokenizer of `base`, and AdamW's moments as safetensors."""
    save_hf(model, folder)
    moments = {f"{name}.{key}": value for name, parameter in model.named_parameters()
               for key, value in optimizer.state[parameter].items()}
    # Under another ending: to vLLM all *.safetensors of a folder are weights.
    save_file(moments, folder / "optimizer.state")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
                 "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)


def read_moments(folder, model, optimizer):
    device = model.embed_tokens.weight.device
    try:
        moments = load_file(folder / "optimizer.state")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'optimizer.state'}: no readable moments ({error})") from None
    for name, parameter in model.named_parameters() if moments else ():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = moments[f"{name}.{key}"]
            optimizer.state[parameter][key] = value if key == "step" else value.to(device)


def other_course(earlier, now):
    """The keys in which two configs differ so that a run cannot go on from one to the other exactly."""
    may_change = MAY_CHANGE
    if now["train.schedule"] == "constant" and now["train.warmup"] == 0:
        may_change += ("train.steps", "train.epochs")
    earlier = {**flat(Config()), **earlier}
    return [key for key in now if now[key] != earlier[key] and not key.startswith(may_change)]


# The run folder.


class Run:
    """The files of one run, and its lines on the console. It is at a boundary between steps: at `step`."""

    STATE = ("step", "rows", "evaluated", "trained_s", "skipped_in_a_row", "dead_in_a_row", "shown")

    def __init__(self, folder, resume):
        self.folder = Path(folder)
        self.resume = resume
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; choose another --out for the run folder")
        if (self.folder / "config.yaml").exists() and resume is False:
            raise ValueError(f"{folder} holds a run; go on with it by --resume=auto or choose another --out")
        self.step = 0
        self.saved = 0  # step of the newest checkpoint
        self.rows = 0  # lines of metrics.jsonl
        self.evaluated = False  # at this boundary
        self.trained_s = 0.0
        self.skipped_in_a_row = 0
        self.dead_in_a_row = 0
        self.shown = None
        self.step_times = []
        self.passed_over = set()
        self.locked = None
        if self.folder.exists():
            self.lock()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.locked:
            self.locked.close()

    def lock(self):
        """Keep a second run out of this folder. However the process ends, the kernel opens the lock."""
        self.locked = open(self.folder / "lock", "w", encoding="utf-8")
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another process is at work on this run; wait until it ends, or "
                             "choose another --out") from None
        except OSError as error:
            print(f"warning: {self.folder} cannot be locked ({error.strerror}): start no second run there")

    def newest_checkpoint(self, config):
        """The folder of the newest checkpoint that is whole and of this run; None without one. Says which.

        ValueError where the run in this folder has another `config`, {dotted key: value}.
        """
        if not (self.folder / "config.yaml").exists():
            if self.resume is True:
                raise ValueError(f"{self.folder} holds no run to go on with; leave out --resume=true")
            return None
        differing = other_course(dict(read_yaml(self.folder / "config.yaml")), config)
        if differing:
            raise ValueError(f"{self.folder} holds a run with another {', '.join(differing)}; set as in its "
                             "config.yaml to go on, or choose another --out")
        found = [path for path in self.folder.glob("checkpoints/step_*") if path.suffix != ".tmp"]
        for folder in sorted(found, key=lambda path: (path.name[:11], not path.suffix), reverse=True):
            try:
                check_seal(folder)
                state = read_json(folder / "training.json")
                if not {*self.STATE, "config", "fingerprint"} <= state.keys():
                    raise ValueError("its training.json is of another version")
                if folder.name[:11] != self.checkpoint(state["step"]).name:
                    raise ValueError(f"it is of step {state['step']}")
                differing = other_course(state["config"], config)
                if differing:
                    raise ValueError(f"it is of a run with another {', '.join(differing)}")
            except (ValueError, OSError) as error:
                print(f"passed over {folder}: {error}")
                self.passed_over.add(folder)
            else:
                print(f"going on from {folder}")
                return folder
        print(f"no whole checkpoint in {self.folder}: starting from step 0")
        return None

    def restore(self, checkpoint, fingerprint):
        """Go to the boundary of a checkpoint. ValueError where the data, {key: fingerprint}, have changed."""
        state = read_json(checkpoint / "training.json")
        changed = [key for key in fingerprint if fingerprint[key] != state["fingerprint"][key]]
        if changed:
            raise ValueError(f"{checkpoint}: the contents of {', '.join(changed)} have changed since; going "
                             "on would be another run. Restore them, or start anew with another --out")
        vars(self).update({name: state[name] for name in self.STATE})
        self.saved = self.step

    def open(self, config, settings, fingerprint, tracker, keep, write):
        """Make the folder, once all is read; drop what was logged after the boundary that the run is at.

        config and settings: the same as a tree and as {dotted key: value}; write(folder): writes the weights
        and the moments; keep: see `checkpoint.keep`.
        """
        self.facts = {"config": settings, "fingerprint": fingerprint}
        self.keep, self.write = keep, write
        self.tracker = open_tracker(tracker, self.folder, config)
        for name in ("rollouts", "evals", "checkpoints"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not self.locked:
            self.lock()
        for unfinished in (*self.folder.glob("*.tmp"), *self.folder.glob("*/*.tmp")):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        for file in (*self.folder.glob("rollouts/step_*"), *self.folder.glob("evals/step_*")):
            if file.stem > f"step_{self.step:06d}":
                file.unlink()
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.rows else []
        write_text(metrics, "".join(lines[:self.rows]))
        write_text(self.folder / "git_revision.txt", git_revision() + "\n")
        write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        sync(self.folder)

    def checkpoint(self, step):
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def rollouts(self, step):
        return self.folder / "rollouts" / f"step_{step:06d}.jsonl"

    def save_checkpoint(self):
        """Save the boundary that the run is at: written aside, sealed, and then renamed.

        ValueError where that fails; the checkpoints that were whole before are whole still.
        """
        final = self.checkpoint(self.step)
        aside = final.with_name(final.name + ".tmp")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            self.write(aside)
            state = {name: vars(self)[name] for name in self.STATE}
            write_json(aside / "training.json", {**self.facts, **state})
            seal(aside)
            sync(self.folder / "metrics.jsonl")
            if final.exists():  # one that was passed over
                replaced = final.with_name(final.name + ".replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(final, replaced)
            os.replace(aside, final)
            sync(final.parent)
        except (OSError, ValueError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise ValueError(f"{final}: cannot be saved ({error}); earlier checkpoints are whole") from None
        self.saved = self.step
        self.passed_over.discard(final)
        whole = sorted(set(self.folder.glob("checkpoints/step_??????")) - self.passed_over)
        for old in whole[:-self.keep] if self.keep else []:
            shutil.rmtree(old)

    def stop(self, midway):
        """End on a signal: save the boundary, unless the weights have left it (`midway`) or it is saved."""
        if self.step > self.saved and not midway:
            self.save_checkpoint()
        where = self.checkpoint(self.saved) if self.saved else "step 0"
        print(f"stopped after step {self.step}: the same command goes on from {where}", flush=True)

    def save_rollouts(self, step, examples_P, rollouts_N, verdicts_N, adv_PG, chat):
        """rollouts/step_….jsonl: a line a reply, with what was asked and what it earned."""
        n, lines = adv_PG.shape[1], []
        for i, (rollout, verdict) in enumerate(zip(rollouts_N, verdicts_N, strict=True)):
            example = examples_P[i // n]
            line = {"id": example.id, "query": example.messages[-1]["content"], "answer": example.answer,
                    "reply": chat.decode(rollout.ids), "reward": verdict.reward, "error": verdict.error,
                    "advantage": adv_PG[i // n, i % n].item(), "tokens": len(rollout.ids),
                    "logp": sum(rollout.logp), "finished": rollout.finished}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(self.rollouts(step), "".join(lines))

    def log(self, step, metrics):
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.rows += 1
        self.tracker(step, metrics)

    def log_step(self, step, steps, metrics):
        """One line a step on the console, reward first; the run is then at this step's boundary.

        Diverged when updates were skipped in a row; ValueError when there was nothing to learn in a row.
        """
        self.log(step, metrics)
        self.step, self.evaluated = step, False
        self.trained_s += metrics["time/step_s"]
        if metrics.get("reward/raised"):
            print(f"warning: the reward raised on {metrics['reward/raised']} replies, which earn 0; see the "
                  f"errors in {self.rollouts(step)}")
        if step == 1 and metrics.get("length/cut", 0) > 0.9:
            print(f"warning: {metrics['length/cut']:.0%} of the replies were cut at rollout.max_new_tokens "
                  "before a stop token; is the model tuned for this chat format?")
        self.step_times.append(metrics["time/step_s"])
        recent = self.step_times[-20:]
        left = int(sum(recent) / len(recent) * (steps - step))
        if "reward/mean" in metrics:
            kl = f"{metrics['kl']:.4f}" if "kl" in metrics else "off"
            lead = (f"reward {metrics['reward/mean']:.3f}  all-0 {metrics['reward/all_zero']:4.0%}  "
                    f"all-1 {metrics['reward/all_one']:4.0%}  length {metrics['length/mean']:5.1f}  kl {kl}")
        else:
            lead = f"loss {metrics['loss']:.4f}  length {metrics['length/mean']:5.1f}"
        print(f"step {step:>{len(str(steps))}}/{steps}  {lead}  {metrics['tokens_per_s'] / 1000:.1f}k tok/s  "
              f"{left // 60}:{left % 60:02d} left", flush=True)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped_updates"] else 0
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise Diverged(f"no finite gradient in {MAX_SKIPPED} steps in a row, up to step {step}; lower "
                           f"train.lr, or look at the batch in {self.rollouts(step)}")
        finding = diagnose(metrics)
        self.dead_in_a_row = self.dead_in_a_row + 1 if finding else 0
        if self.dead_in_a_row >= MAX_DEAD:
            raise ValueError(f"stopped at step {step}: for {MAX_DEAD} steps in a row {finding}")

    def log_evaluation(self, step, rows, replies, seconds):
        """Write an evaluation, print its line and two replies, the same two examples every time."""
        report = {"step": step, "rows": rows, "replies": replies}
        write_json(self.folder / "evals" / f"step_{step:06d}.json", report)
        accuracies = {f"eval/{row['category']}": row["accuracy"] for row in rows}
        self.log(step, {**accuracies, "time/eval_s": seconds})
        self.evaluated = True
        by_category = "  ".join(f"{row['category']} {row['accuracy']:.1%}" for row in rows[:-1]
                                if "/" not in row["category"])
        print(f"held-out accuracy at step {step}: {rows[-1]['accuracy']:.1%} of {rows[-1]['n']}  "
              f"({by_category})")
        if self.shown is None:
            wrong = next((i for i, reply in enumerate(replies) if not reply["right"]), 0)
            right = next((i for i, reply in enumerate(replies) if reply["right"] and i != wrong), -1)
            self.shown = [wrong, right]
        for reply in (replies[i] for i in self.shown):
            # On one line each, and no longer than a screen can take.
            query, text = (" ".join(reply[key].split())[:1000] for key in ("query", "reply"))
            verdict = "right" if reply["right"] else f"wrong: {reply['error']}"
            print(f"  asked   {query}\n  wrote   {text}\n  {verdict}", flush=True)

    def print_summary(self):
        """The first and the last evaluation, side by side."""
        files = sorted(self.folder.glob("evals/step_*.json"))
        before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (files[0], files[-1]))
        print("\nheld-out accuracy in percent, greedy, with 95 % confidence intervals")
        print(table({f"step {report['step']}": report["rows"] for report in (before, after)}))
        print(f"\nrun folder: {self.folder}")


def open_tracker(name, folder, config):
    """A function (step, metrics) that sends metrics to TensorBoard or W&B, or nowhere."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder / "tensorboard")
            return lambda step, metrics: [writer.add_scalar(key, x, step) for key, x in metrics.items()]
        if name == "wandb":
            import wandb
            run = wandb.init(project="nanon1", name=folder.name, dir=folder, config=config)
            return lambda step, metrics: run.log(metrics, step=step)
    except ImportError as error:
        raise ValueError(f"log.tracker is {name}, but {error.name} is not installed; "
                         f"pip install {name}, or set log.tracker to none") from None
    return lambda step, metrics: None


def git_revision():
    """The commit of this code, with "+changes" where the tree differs; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        said = [subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0].strip() + ("+changes" if said[1].strip() else "")


if __name__ == "__main__":
    main()
