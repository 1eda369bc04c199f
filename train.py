"""Training: GRPO or supervised fine-tuning of a Qwen2.5 model on tool calls. One YAML file.

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

Under torchrun, R ranks share the work. Weights, gradients and moments are sharded by rows (FSDP2; on a GPU
also for one rank). Each mini-batch is divided over all ranks, by whole groups; what was sampled and scored
goes to every rank, so that all see the same batch, denominators and metrics, and the first one writes. No
rank waits for another inside a rollout: whole weights are gathered before it. Seeds come from a prompt's
place in the batch, so neither replies nor gradients depend on R.

A run that was killed goes on from its newest whole checkpoint, bit for bit as if nothing had happened (on
another number of ranks, up to rounding): there is state at the boundaries between steps only, and order of
data and noise are functions of the step.

Where this differs from the paper's code: see grpo.py for the denominator. The old log-probs of the first
mini-batch are its own, detached: nothing has been updated yet. Without a KL term, groups whose rewards are
all equal have a gradient of exactly zero, so they are left out of the passes; they stay in the denominator.
"""

import atexit
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from configs.schema import Config, flat, load_config, read_yaml
from data import Batches, Chat, filter_by_prompt_tokens, read_jsonl, split_examples, write_jsonl
from eval import (
    check_seal,
    diagnose,
    evaluate,
    lock,
    rollout_metrics,
    score_rollouts,
    seal,
    spread,
    summarize,
    sync,
    table,
    tell,
    write_json,
    write_text,
    writing,
)
from grpo import (
    MicroBatch,
    extreme,
    group_advantages,
    grpo_loss,
    make_micro_batches,
    merge_stats,
    metrics_of_stats,
    pack,
    pack_micro_batches,
    sft_loss,
    token_logprobs,
)
from model import (
    load_hf,
    open_tensors,
    own_rows,
    read_json,
    resolve,
    save_hf,
    shared_prefix_attention,
    unsharded,
    write_tensors,
)
from sample import generate, prompt_seeds

MAX_SKIPPED = 3  # steps in a row without a finite gradient before the run stops
MAX_DEAD = 10  # steps in a row that have nothing to learn from before the run stops, see `diagnose`
TO_FINISH_S = 10  # seconds that the updates of a step have to finish in after a signal
# What may differ when a run goes on: the name of a file (its contents are compared), what is looked at and
# kept, and what bounds memory, where rounding may differ. Steps too, unless the learning rate follows them.
MAY_CHANGE = ("out", "resume", "data.train", "data.heldout", "data.system_prompt", "eval.", "log.",
              "checkpoint.", "train.max_minutes", "train.timeout_minutes", "train.micro_batch_tokens",
              "train.activation_checkpointing", "rollout.batch_size", "rollout.kv_memory_gib",
              "grpo.reference_on_cpu")
USAGE = """python train.py [FILE.yaml] [--section.key=value ...] [--plan [--gpus N] [--gpu_memory GIB]]

Presets are in configs/; configs/schema.py says what each key means. --plan trains nothing: it prints memory,
steps and tokens. The defaults:
"""


class Stopped(Exception):
    """A signal came to a rank: `Signals.poll` raises this on every one."""


class Agreed(ValueError):
    """An error that every rank raises alike, so that the first one tells it for all."""

    status = 2


class Diverged(Agreed):
    """MAX_SKIPPED steps in a row had no finite gradient."""

    status = 3


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        print(yaml.safe_dump(dataclasses.asdict(Config()), sort_keys=False), end="")
        return
    if "--plan" in argv:
        from tools.plan import main as plan
        return plan(argv)
    try:
        status = train(load_config(argv))
    except (ValueError, OSError) as error:
        # What is wrong before the ranks meet is wrong on each of a node, and one of them says it.
        silent = isinstance(error, Agreed) if dist.is_initialized() else environment("LOCAL_RANK", 0) > 0
        if environment("RANK", 0) == 0:
            print(f"error: {error}", file=sys.stderr)
        elif not silent:
            print(f"error on rank {environment('RANK', 0)}: {error}", file=sys.stderr)
        status = getattr(error, "status", 2)
    except RuntimeError:  # a device out of memory, another rank gone: `Run` has said where
        traceback.print_exc()
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        status = 130
    leave_ranks(status)


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
    ranks, prompts = environment("WORLD_SIZE", 1), c.train.prompts_per_step // c.train.updates_per_step
    if prompts < ranks:
        raise ValueError(f"train.prompts_per_step / train.updates_per_step is {prompts} prompts an update, "
                         f"fewer than the {ranks} ranks; raise train.prompts_per_step or start fewer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    bf16 = c.model.precision == "bf16" or (c.model.precision == "auto" and has_bf16)
    # On a GPU the sharded parameters are cast instead.
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 and device == "cpu" else contextlib.nullcontext()
    if not run.writes:
        sys.stdout = open(os.devnull, "w")

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

    join_ranks(device, c.train.timeout_minutes)
    if len(set(map(str, of_ranks((flat(c), fingerprint))))) > 1:
        raise Agreed("the ranks were not given the same settings and data; give each node the same files")
    checkpoint, state = of_first_rank(run.newest_checkpoint, flat(c), fingerprint)
    vars(run).update(state)
    batches.cursor = run.step * c.train.prompts_per_step
    if run.step > steps:
        raise Agreed(f"{checkpoint} is past the {steps} steps of this run; raise train.steps")
    seed = c.seed if c.model.init == "random" else None
    model = load_model(checkpoint or base, device, bf16, seed=None if checkpoint else seed)
    model.checkpoint_blocks = c.train.activation_checkpointing
    longest = c.data.max_prompt_tokens + max(c.rollout.max_new_tokens, c.eval.max_new_tokens)
    if longest > model.config.max_position_embeddings:
        raise Agreed(f"a prompt and a reply may take {longest} tokens, but {c.model.path} has "
                     f"{model.config.max_position_embeddings} positions; lower data.max_prompt_tokens, "
                     "rollout.max_new_tokens or eval.max_new_tokens")
    reference = None
    if c.stage == "grpo" and c.grpo.kl_coef > 0:
        reference = load_model(base, device, bf16, False, c.grpo.reference_on_cpu, seed)
    optimizer = make_optimizer(model, c.train.weight_decay, c.train.beta2)
    if checkpoint:
        read_moments(checkpoint, model, optimizer)
    run.keep = c.checkpoint.keep
    run.write = functools.partial(write_checkpoint, model=model, optimizer=optimizer, base=base)
    of_first_rank(run.open, dataclasses.asdict(c), flat(c), fingerprint, c.log.tracker)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{ranks} x {device}" if ranks > 1 else device
    precision = "bf16" if bf16 else "fp32"
    print(f"{c.stage} of {c.model.path}: {millions:.1f}M parameters on {where} in {precision}, "
          f"{len(train_set)} examples, {len(heldout)} held out, {steps} steps; {run.folder}", flush=True)

    decoding = {"batch_size": c.rollout.batch_size, "kv_memory_gib": c.rollout.kv_memory_gib,
                "should_stop": signals.came}
    sampling = {"max_new_tokens": c.rollout.max_new_tokens, "temperature": c.rollout.temperature,
                "stop_ids": chat.stop_ids, "vocab_size": chat.vocab_size, **decoding}
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
            began = run.enter(f"evaluation after step {step}")
            with unsharded(model) as policy, autocast:
                _, replies = evaluate(policy, chat, own(heldout), max_new_tokens=c.eval.max_new_tokens,
                                      scheme=c.grpo.reward, progress=run.writes and "evaluation", **decoding)
            signals.poll()
            replies = gather(own(range(len(heldout))), replies)
            run.log_evaluation(step, summarize(replies), replies, time.perf_counter() - began)
        if step > run.saved and (step % c.checkpoint.every == 0 or is_last):
            run.save_checkpoint()
        if is_last:
            break

        began = run.enter(f"rollout of step {step + 1}")
        lr = learning_rate(step, steps, c.train.lr, c.train.schedule, c.train.warmup)
        set_learning_rate(optimizer, lr)
        examples_P = next(batches)
        prompts_P = [chat.encode_prompt(example) for example in examples_P]
        if c.stage == "grpo":
            own_P = [p for part in mini_batches(len(prompts_P), c.train.updates_per_step) for p in own(part)]
            seeds_P = prompt_seeds(c.seed, step, 0, len(prompts_P))
            with unsharded(model) as policy, autocast:
                rollouts = generate(policy, [prompts_P[p] for p in own_P], c.rollout.n,
                                    seeds_P=seeds_P[own_P], progress=run.writes and "rollout", **sampling)
            signals.poll()
            memory = peak_memory("rollout")
            verdicts = score_rollouts(rollouts, [examples_P[p] for p in own_P], chat, c.grpo.reward)
            rollouts_N, verdicts_N = gather(own_P, rollouts), gather(own_P, verdicts)
            rewards_PG = torch.tensor([verdict.reward for verdict in verdicts_N]).view(-1, c.rollout.n)
            adv_PG = group_advantages(rewards_PG, c.grpo.normalize)
            sampled = run.enter(f"update of step {step + 1}")
            metrics = grpo_updates(model, reference, optimizer, rollouts_N, adv_PG, **losses, **updating)
            metrics |= rollout_metrics(rollouts_N, verdicts_N, rewards_PG) | memory | peak_memory("update")
            metrics |= {"time/rollout_s": sampled - began, "time/update_s": time.perf_counter() - sampled}
            is_odd = metrics["skipped_updates"] or metrics["reward/raised"]
            if (step + 1) % c.log.rollouts_every == 0 or step == 0 or is_odd:
                run.save_rollouts(step + 1, examples_P, rollouts_N, verdicts_N, adv_PG, chat)
        else:
            run.enter(f"update of step {step + 1}")
            replies_P = [chat.encode_reply(example) for example in examples_P]
            metrics = sft_updates(model, optimizer, prompts_P, replies_P, **updating)
            if metrics["skipped_updates"]:
                run.save_examples(step + 1, examples_P)
        metrics |= {"lr": lr, "epoch": batches.epoch, "time/step_s": time.perf_counter() - began}
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["time/step_s"]
        run.log_step(step + 1, steps, of_ranks(metrics)[0])  # clocks differ; all must end at the same step
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


# Ranks.


def environment(name, default):
    """A number that torchrun sets."""
    return int(os.environ.get(name, default))


def join_ranks(device, timeout_minutes):
    """Meet the other ranks. One GPU alone is a world of its own, one CPU alone needs none."""
    rank, ranks, local = environment("RANK", 0), environment("WORLD_SIZE", 1), environment("LOCAL_RANK", 0)
    if device == "cuda":
        if local >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"no GPU for rank {local} of this node, it has {gpus}; lower --nproc_per_node")
        torch.cuda.set_device(local)
    elif ranks == 1:
        return
    waits = datetime.timedelta(minutes=timeout_minutes)
    store = next(dist.rendezvous("env://", timeout=waits))[0] if ranks > 1 else dist.HashStore()
    # The torchrun of a single node keeps its store when it restarts the ranks, with the dead ones' addresses.
    if environment("GROUP_WORLD_SIZE", 1) == 1:
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=waits)


def leave_ranks(status):
    """End with an exit status that can be relied on; return where it is 0 and there are no other ranks.

    The interpreter's own exit may abort in the threads of gloo after all is done (torch 2.13).
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        if status == 0:
            of_ranks(None)  # none leaves while another may still need it
        atexit._run_exitfuncs()  # trackers send their last lines here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def of_ranks(value):
    """The values of all ranks in their order, on every rank. Every rank must call this alike."""
    if not dist.is_initialized():
        return [value]
    dist.group.WORLD.monitored_barrier(wait_all_ranks=True)  # its error names the ranks that do not come
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_first_rank(function, *arguments):
    """What a function returns, or raises, on the first rank, which alone calls it: alike on every rank."""
    value, error = None, None
    if environment("RANK", 0) == 0:
        try:
            value = function(*arguments)
        except (ValueError, OSError) as raised:
            error = str(raised)
    value, error = of_ranks((value, error))[0]
    if error:
        raise Agreed(error)
    return value


def gather(indices, items):
    """The items of all ranks in the order of their indices, on every rank; all indices have as many."""
    each = len(items) // max(1, len(indices))
    parts = [(index, items[i * each:(i + 1) * each]) for i, index in enumerate(indices)]
    in_order = sorted(itertools.chain(*of_ranks(parts)), key=lambda part: part[0])
    return [item for _, part in in_order for item in part]


def own(items):
    """This rank's share, a run of them; no rank has two more than another."""
    if not dist.is_initialized():
        return items
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return items[len(items) * rank // ranks:len(items) * (rank + 1) // ranks]


def mini_batches(P, updates):
    """The prompts of each optimizer update of a step."""
    return [range(first, first + P // updates) for first in range(0, P, P // updates)]


def fill_up(parts_U, nothing):
    """Lengthen this rank's micro-batches of each update to the most of any rank: all make the same passes."""
    counts_U = zip(*of_ranks([len(parts) for parts in parts_U]), strict=True)
    return [parts + [nothing] * (max(counts) - len(parts))
            for parts, counts in zip(parts_U, counts_U, strict=True)]


# Sharding.


def load_model(path, device, bf16, trained=True, on_cpu=False, seed=None):
    """A folder's model, divided over the ranks, if there are any, by rows (FSDP2): each block is whole while
    it computes.

    Embedding, norm and head are one group, because they may share a weight; trained: it stays whole from
    forward to backward. On a GPU, bf16: whole weights are bf16; shards, sums of gradients and moments are
    fp32 all the same; on_cpu: shards are in the host's memory. seed: of random weights, where wanted.
    """
    if not dist.is_initialized():
        return load_hf(path, device, seed=seed).requires_grad_(trained)
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    dtype, options = torch.float32, {}
    if device == "cuda" and bf16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        dtype = torch.float32 if trained else torch.bfloat16
    if device == "cuda" and on_cpu:
        options["offload_policy"], device = CPUOffloadPolicy(), "cpu"

    def shard(model):
        for block in model.layers:
            fully_shard(block, **options)
        fully_shard(model, reshard_after_forward=not trained, **options)
        for module in (*model.layers, model):
            # Sums over ranks, not means: a loss has been divided by the tokens of all.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)

    return load_hf(path, device, dtype, shard, seed).requires_grad_(trained)


def peak_memory(phase):
    """The most GiB that tensors took since `Run.enter`, as a metric of a phase; on a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {f"memory/{phase}_gib": torch.cuda.max_memory_allocated() / 2**30}


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
    def head(hidden_TD):
        logp_L, entropy_L = token_logprobs(hidden_TD[pack.predictor_L], model.head_weight(), pack.targets_L,
                                           temperature, vocab_size)
        return logp_L.clone(), entropy_L  # the hooks of sharding warn where an output is a view

    with autocast:
        return model(pack.tokens_T, pack.positions_T, shared_prefix_attention(pack.groups), head)


def apply_update(optimizer, grad_clip, loss):
    """Clip the gradient's norm, over all ranks, and step. Returns (norm, 1 where the update was skipped).

    It is skipped on all ranks where the norm, or this rank's share of the loss on any, is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    norm = getattr(norm, "full_tensor", norm.detach)().item()
    skipped = max(of_ranks(int(not math.isfinite(norm) or not math.isfinite(loss))))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def grpo_updates(model, reference, optimizer, rollouts_N, adv_PG, *, temperature, vocab_size, updates,
                 kl_coef, clip_low, clip_high, grad_clip, micro_batch_tokens, autocast, poll=lambda _: None):
    """The optimizer updates of one step: `updates` mini-batches of whole groups, in order. Returns metrics.

    Packs are built once and serve the old, the reference and the new log-probs. Each loss is a sum over its
    tokens divided by the reply tokens of its whole mini-batch, so neither micro-batches nor ranks change the
    gradient. Every rank is given the whole batch and trains on its own share.
    poll(whether weights have changed): asked before every pass, by all ranks alike; it may raise.
    """
    P, n = adv_PG.shape
    device = model.embed_tokens.weight.device
    parts_U, denominators = [], []
    for prompts in mini_batches(P, updates):
        live_P = [p for p in own(prompts) if kl_coef or adv_PG[p].any()]
        parts_U.append(make_micro_batches(rollouts_N, adv_PG, live_P, micro_batch_tokens, device))
        denominators.append(sum(len(rollouts_N[i].ids) for i in range(prompts.start * n, prompts.stop * n)))
    none_L = torch.zeros(0, device=device)
    parts_U = fill_up(parts_U, MicroBatch(pack([], []).to(device), none_L, none_L))
    passes = {"temperature": temperature, "vocab_size": vocab_size, "autocast": autocast}
    with torch.no_grad():
        for i, parts in enumerate(parts_U):
            for part in parts:
                poll(False)
                if i > 0:
                    part.old_logp_L, _ = logprobs_of_pack(model, part.pack, **passes)
                if reference is not None:
                    part.ref_logp_L, _ = logprobs_of_pack(reference, part.pack, **passes)

    stats_U, norms, skipped = [], [], []
    quiet = environment("RANK", 0) > 0 or None  # None: shown on a terminal only
    bar = tqdm(total=sum(map(len, parts_U)), desc="update", disable=quiet, leave=False, unit="pack")
    for parts, denominator in zip(parts_U, denominators, strict=True):
        stats_U.append([])
        for part in parts:
            poll(bool(norms))
            logp_L, entropy_L = logprobs_of_pack(model, part.pack, **passes)
            old_logp_L = logp_L.detach() if part.old_logp_L is None else part.old_logp_L
            loss, stats = grpo_loss(logp_L, old_logp_L, part.ref_logp_L, part.adv_L, clip_low=clip_low,
                                    clip_high=clip_high, kl_coef=kl_coef, denominator=denominator)
            loss.backward()
            diff_L = (old_logp_L - part.sampled_logp_L).abs()
            stats |= {"entropy_sum": entropy_L.sum(), "diff_sum": diff_L.sum(),
                      "diff_max": extreme(diff_L, torch.max, 0.0)}
            stats_U[-1].append(stats)
            bar.update()
        if parts:
            loss = sum(float(stats["loss"]) for stats in stats_U[-1])
            norm, skip = apply_update(optimizer, grad_clip, loss)
            norms.append(norm)
            skipped.append(skip)
    bar.close()
    tokens = sum(len(r.ids) for r in rollouts_N) + sum(len(r.prompt_ids) for r in rollouts_N[::n])
    metrics = {"loss": 0.0, "grad_norm": 0.0, "updates": len(norms), "skipped_updates": sum(skipped),
               "tokens": tokens}
    if norms:  # without a live group there is nothing but zeros to tell
        total = merge_ranks(list(itertools.chain(*stats_U)))
        metrics |= {"loss": total["loss"] / updates, "grad_norm": sum(norms) / len(norms)}
        metrics |= metrics_of_stats(total, merge_ranks(stats_U[0]) if stats_U[0] else None)
        if reference is None:
            del metrics["kl"]
    return metrics


def merge_ranks(parts):
    """Stats of the whole, as numbers, from those of the micro-batches of every rank."""
    own_stats = {name: value.cpu() for name, value in merge_stats(parts).items()}
    return {name: float(value) for name, value in merge_stats(of_ranks(own_stats)).items()}


def sft_updates(model, optimizer, prompts_P, replies_P, *, vocab_size, updates, grad_clip, micro_batch_tokens,
                autocast, poll=lambda _: None):
    """Supervised updates on the reply tokens, one a mini-batch, in order; else as `grpo_updates`."""
    device = model.embed_tokens.weight.device
    packs_U, losses, norms, skipped = [], [], [], 0
    for part in mini_batches(len(prompts_P), updates):
        prompts, replies = [prompts_P[p] for p in own(part)], [[replies_P[p]] for p in own(part)]
        packs_U.append(pack_micro_batches(prompts, replies, micro_batch_tokens))
    packs_U = fill_up(packs_U, pack([], []))
    for part, packs in zip(mini_batches(len(prompts_P), updates), packs_U, strict=True):
        denominator = sum(len(replies_P[p]) for p in part)
        losses.append(0.0)
        for micro_batch in packs:
            poll(bool(norms))
            logp_L, _ = logprobs_of_pack(model, micro_batch.to(device), 1.0, vocab_size, autocast)
            loss = sft_loss(logp_L, denominator)
            loss.backward()
            losses[-1] += loss.item()
        norm, skip = apply_update(optimizer, grad_clip, losses[-1])
        norms.append(norm)
        skipped += skip
    loss = sum(of_ranks(sum(losses))) / updates
    return {"loss": loss, "grad_norm": sum(norms) / len(norms), "updates": updates,
            "skipped_updates": skipped, "length/mean": sum(map(len, replies_P)) / len(replies_P),
            "tokens": sum(map(len, prompts_P)) + sum(map(len, replies_P))}


# Signals.


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
        number = max(of_ranks(0 if waits else self.number))
        if number:
            self.number, self.midway = number, midway
            raise Stopped


# Checkpoints.


def write_checkpoint(folder, model, optimizer, base):
    """A Hugging Face folder with the tokenizer of `base`, and AdamW's moments as safetensors.

    Every rank must call this: tensors are gathered one at a time, and the first rank writes.
    """
    save_hf(model, folder)  # first: it divides again what a signal may have found whole
    moments = {f"{name}.{key}": moment for name, parameter in model.named_parameters()
               for key, moment in optimizer.state[parameter].items()}
    # Under another ending: to vLLM all *.safetensors of a folder are weights.
    write_tensors(folder / "optimizer.state", moments)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
                 "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        if environment("RANK", 0) == 0 and (base / name).exists():
            shutil.copyfile(base / name, folder / name)


def read_moments(folder, model, optimizer):
    """Each rank reads its rows."""
    slices = open_tensors(folder / "optimizer.state")
    for name, parameter in model.named_parameters() if slices else ():
        state = optimizer.state[parameter] = {"step": slices[f"{name}.step"][...]}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(parameter)
            values, rows = own_rows(state[key])
            values.copy_(slices[f"{name}.{key}"][rows])


def other_course(earlier, now):
    """The keys in which two configs differ so that a run cannot go on from one to the other exactly."""
    may_change = MAY_CHANGE
    if now["train.schedule"] == "constant" and now["train.warmup"] == 0:
        may_change += ("train.steps", "train.epochs")
    earlier = {**flat(Config()), **earlier}
    return [key for key in now if now[key] != earlier[key] and not key.startswith(may_change)]


# The run folder.


class Run:
    """The files of one run, and its lines on the console. It is at a boundary between steps: at `step`.

    Every rank keeps this account; the first one locks the folder and writes.
    """

    # What a boundary is, beside weights and moments. rows: lines of metrics.jsonl; shown: replies to print.
    STATE = {"step": 0, "rows": 0, "evaluated": False, "trained_s": 0.0, "skipped_in_a_row": 0,
             "dead_in_a_row": 0, "shown": None}

    def __init__(self, folder, resume):
        self.folder, self.resume = Path(folder), resume
        self.writes = environment("RANK", 0) == 0
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; choose another --out for the run folder")
        if (self.folder / "config.yaml").exists() and resume is False:
            raise ValueError(f"{folder} holds a run; go on with it by --resume=auto or choose another --out")
        vars(self).update(self.STATE)
        self.saved = 0  # step of the newest checkpoint
        self.phase = "setup"
        self.step_times = []
        self.passed_over = set()
        self.locked = None
        if self.folder.exists() and self.writes:
            self.locked = lock(self.folder)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, RuntimeError):
            rank, first_line = environment("RANK", 0), str(error).partition("\n")[0]
            print(f"error on rank {rank} in the {self.phase}: {first_line}", file=sys.stderr)
        if self.locked:
            self.locked.close()

    def enter(self, phase):
        """Note what comes next, for the last words of a rank that fails. Returns the time in seconds."""
        self.phase = phase
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def newest_checkpoint(self, config, fingerprint):
        """(folder, state) of the newest checkpoint that is whole and of this run; (None, {}) before any.

        ValueError where the run in this folder has another `config`, {dotted key: value}, or other data, by
        their `fingerprint`, {key: digits}, and where there are checkpoints but none can be used.
        """
        if not (self.folder / "config.yaml").exists():
            if self.resume is True:
                raise ValueError(f"{self.folder} holds no run to go on with; leave out --resume=true")
            return None, {}
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
                continue
            changed = [key for key in fingerprint if fingerprint[key] != state["fingerprint"][key]]
            if changed:
                raise ValueError(f"{folder}: the contents of {', '.join(changed)} have changed since; going "
                                 "on would be another run. Restore them, or start anew with another --out")
            print(f"going on from {folder}")
            return folder, {**{name: state[name] for name in self.STATE}, "saved": state["step"]}
        if found:
            raise ValueError(f"{self.folder}: no checkpoint of this run can be used, see above; nothing was "
                             "changed. Restore one, or start anew with another --out")
        print(f"no checkpoint in {self.folder}: starting from step 0")
        return None, {}

    def open(self, config, settings, fingerprint, tracker):
        """Make the folder, once all is read; drop what was logged after the boundary that the run is at.

        config and settings: the same as a tree and as {dotted key: value}. For the first rank.
        """
        self.facts = {"config": settings, "fingerprint": fingerprint}
        self.tracker = open_tracker(tracker, self.folder, config)
        for name in ("rollouts", "evals", "checkpoints"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.locked = self.locked or lock(self.folder)
        for unfinished in (*self.folder.glob("*.tmp"), *self.folder.glob("*/*.tmp")):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        for file in (*self.folder.glob("rollouts/step_*"), *self.folder.glob("evals/step_*")):
            if file.stem > f"step_{self.step:06d}":
                file.unlink()
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.rows else []
        if len(lines) < self.rows:
            raise ValueError(f"{metrics} has {len(lines)} rows, but {self.rows} were written up to step "
                             f"{self.step}; restore it, or start anew with another --out")
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
        self.enter(f"save after step {self.step}")
        aside = self.checkpoint(self.step).with_suffix(".tmp")
        try:
            if self.writes:
                shutil.rmtree(aside, ignore_errors=True)
            self.write(aside)
            of_first_rank(self.finish_checkpoint, aside)
        except (OSError, ValueError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise Agreed(f"{self.checkpoint(self.step)}: cannot be saved ({error}); earlier checkpoints are "
                         "whole") from None
        self.saved = self.step

    def finish_checkpoint(self, aside):
        """Add the state of the boundary, seal, rename, and remove checkpoints that are too many."""
        final = aside.with_suffix("")
        write_json(aside / "training.json", {**self.facts, **{name: vars(self)[name] for name in self.STATE}})
        seal(aside)
        sync(self.folder / "metrics.jsonl")
        if final.exists():  # one that was passed over
            replaced = final.with_suffix(".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(aside, final)
        sync(final.parent)
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
        if not self.writes:
            return
        n, lines = adv_PG.shape[1], []
        for i, (rollout, verdict) in enumerate(zip(rollouts_N, verdicts_N, strict=True)):
            example = examples_P[i // n]
            line = {"id": example.id, "query": example.messages[-1]["content"], "answer": example.answer,
                    "reply": chat.decode(rollout.ids), "reward": verdict.reward, "error": verdict.error,
                    "advantage": adv_PG[i // n, i % n].item(), "tokens": len(rollout.ids),
                    "logp": sum(rollout.logp), "finished": rollout.finished}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(self.rollouts(step), "".join(lines))

    def save_examples(self, step, examples_P):
        """The same for a batch that was not rolled out, as data.py reads it."""
        if self.writes:
            with writing(self.rollouts(step)):
                write_jsonl(self.rollouts(step), examples_P)

    def log(self, step, metrics):
        self.rows += 1
        if self.writes:
            path = self.folder / "metrics.jsonl"
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
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
            raise Agreed(f"stopped at step {step}: for {MAX_DEAD} steps in a row {finding}")

    def log_evaluation(self, step, rows, replies, seconds):
        """Write an evaluation, print its line and two replies, the same two examples every time."""
        if self.writes:
            report = {"step": step, "rows": rows, "replies": replies}
            write_json(self.folder / "evals" / f"step_{step:06d}.json", report)
        accuracies = {f"eval/{row['category']}": row["accuracy"] for row in rows}
        self.log(step, {**accuracies, "time/eval_s": seconds})
        self.evaluated = True
        if self.shown is None:
            wrong = next((i for i, reply in enumerate(replies) if not reply["right"]), 0)
            right = next((i for i, reply in enumerate(replies) if reply["right"] and i != wrong), -1)
            self.shown = [wrong, right]
        # A run that goes on may evaluate fewer examples.
        tell(step, rows, [replies[i] for i in self.shown if i < len(replies)])

    def print_summary(self):
        """The first and the last evaluation, side by side."""
        if not self.writes:
            return
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
