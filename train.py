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

Where this differs from the paper's code: see grpo.py for the denominator. The old log-probs of the first
mini-batch are its own, detached: nothing has been updated yet. Without a KL term, groups whose rewards are
all equal have a gradient of exactly zero, so they are left out of the passes; they stay in the denominator.
"""

import atexit
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from configs.schema import Config, load_config
from data import Batches, Chat, filter_by_prompt_tokens, read_jsonl, split_examples
from eval import evaluate, spread, summarize, table, write_json
from grpo import (
    Pack,
    extreme,
    group_advantages,
    grpo_loss,
    merge_stats,
    pack,
    pack_micro_batches,
    sft_loss,
    token_logprobs,
)
from model import (
    Qwen2,
    load_hf,
    open_tensors,
    own_rows,
    resolve,
    save_hf,
    shared_prefix_attention,
    write_tensors,
)
from reward import score
from sample import generate, prompt_seeds

MAX_SKIPPED = 3  # steps in a row without a finite gradient before the run stops
MAX_DEAD = 10  # steps in a row that have nothing to learn from before the run stops, see `diagnose`
USAGE = """python train.py [FILE.yaml] [--section.key=value ...] [--plan [--gpus N] [--gpu_memory GIB]]

Presets are in configs/; configs/schema.py says what each key means. --plan trains nothing: it prints memory,
steps and tokens. The defaults:
"""


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        print(yaml.safe_dump(dataclasses.asdict(Config()), sort_keys=False), end="")
        return
    if "--plan" in argv:
        from tools.plan import main as plan
        return plan(argv)
    status = 0
    try:
        train(load_config(argv))
    except (ValueError, OSError) as error:
        # What is wrong before the ranks meet is wrong on each of a node, and one of them says it.
        if dist.is_initialized() or environment("LOCAL_RANK", 0) == 0:
            where = f" on rank {environment('RANK', 0)}" if environment("RANK", 0) else ""
            print(f"error{where}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\ninterrupted: --resume=true goes on from the newest checkpoint", file=sys.stderr)
        status = 130
    leave_ranks(status)


def train(c):
    """Set up, then the loop of either stage. The only function that knows the config, `c`."""
    ranks, prompts = environment("WORLD_SIZE", 1), c.train.prompts_per_step // c.train.updates_per_step
    if prompts < ranks:
        raise ValueError(f"train.prompts_per_step / train.updates_per_step is {prompts} prompts an update, "
                         f"fewer than the {ranks} ranks; raise train.prompts_per_step or start fewer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    bf16 = c.model.precision == "bf16" or (c.model.precision == "auto" and has_bf16)
    # On a GPU the sharded parameters are cast instead.
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 and device == "cpu" else contextlib.nullcontext()
    if environment("RANK", 0) > 0:
        sys.stdout = open(os.devnull, "w")

    base = resolve(c.model.path)
    chat = Chat(base, c.data.system_prompt)
    train_set, heldout = read_examples(c.data.train, c.data.heldout, c.data.heldout_fraction, c.seed, chat,
                                       c.data.max_prompt_tokens, c.data.max_dropped_share)
    heldout = spread(heldout, c.eval.examples)
    if len(train_set) < c.train.prompts_per_step:
        raise ValueError(f"train.prompts_per_step is {c.train.prompts_per_step}, but there are only "
                         f"{len(train_set)} training examples; choose a number up to that")
    batches = Batches(train_set, c.train.prompts_per_step, c.seed)
    steps = c.train.steps or math.ceil(c.train.epochs * len(train_set) / c.train.prompts_per_step)

    run = Run(c.out, c.resume)
    join_ranks(device)
    start = of_ranks(run.newest_checkpoint())[0]
    if start > steps:
        raise ValueError(f"{run.checkpoint(start)} is past the {steps} steps of this run; raise train.steps")
    model = load_model(run.checkpoint(start) if start else base, device, bf16)
    model.checkpoint_blocks = c.train.activation_checkpointing
    longest = c.data.max_prompt_tokens + max(c.rollout.max_new_tokens, c.eval.max_new_tokens)
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"a prompt and a reply may take {longest} tokens, but {c.model.path} has "
                         f"{model.config.max_position_embeddings} positions; lower data.max_prompt_tokens, "
                         "rollout.max_new_tokens or eval.max_new_tokens")
    with_reference = c.stage == "grpo" and c.grpo.kl_coef > 0
    reference = load_model(base, device, bf16, False, c.grpo.reference_on_cpu) if with_reference else None
    optimizer = make_optimizer(model, c.train.weight_decay, c.train.beta2)
    if start:
        batches.cursor = run.restore(start, model, optimizer, batches.fingerprint)
    run.open(start, dataclasses.asdict(c), c.log.tracker)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{ranks} x {device}" if ranks > 1 else device
    precision = "bf16" if bf16 else "fp32"
    print(f"{c.stage} of {c.model.path}: {millions:.1f}M parameters on {where} in {precision}, "
          f"{len(train_set)} examples, {len(heldout)} held out, {steps} steps; {run.folder}", flush=True)

    sampling = {"max_new_tokens": c.rollout.max_new_tokens, "temperature": c.rollout.temperature,
                "stop_ids": chat.stop_ids, "vocab_size": chat.vocab_size, "batch_size": c.rollout.batch_size,
                "kv_memory_gib": c.rollout.kv_memory_gib}
    updating = {"vocab_size": chat.vocab_size, "updates": c.train.updates_per_step, "autocast": autocast,
                "micro_batch_tokens": c.train.micro_batch_tokens, "grad_clip": c.train.grad_clip}
    losses = {"temperature": c.rollout.temperature, "kl_coef": c.grpo.kl_coef, "clip_low": c.grpo.clip_low,
              "clip_high": c.grpo.clip_high}
    trained_s, limit_s = 0.0, 60 * (c.train.max_minutes or math.inf)
    for step in range(start, steps + 1):
        is_last = step == steps or trained_s >= limit_s
        is_new = step > start or start == 0  # else it was evaluated and saved before the interruption
        if is_new and (step % c.eval.every == 0 or is_last):
            began = time.perf_counter()
            with unsharded(model) as policy, autocast:
                _, replies = evaluate(policy, chat, own(heldout), max_new_tokens=c.eval.max_new_tokens,
                                      batch_size=c.rollout.batch_size, scheme=c.grpo.reward,
                                      kv_memory_gib=c.rollout.kv_memory_gib,
                                      progress="evaluation" if run.writes else None)
            replies = gather(own(range(len(heldout))), replies)
            run.log_evaluation(step, summarize(replies), replies, time.perf_counter() - began)
        if is_new and step > 0 and (step % c.checkpoint.every == 0 or is_last):
            run.save_checkpoint(step, model, optimizer, batches, base, c.checkpoint.keep)
        if is_last:
            break

        began = time.perf_counter()
        lr = learning_rate(step, steps, c.train.lr, c.train.schedule, c.train.warmup)
        set_learning_rate(optimizer, lr)
        examples_P = next(batches)
        prompts_P = [chat.encode_prompt(example) for example in examples_P]
        if c.stage == "grpo":
            own_P = [p for part in mini_batches(len(prompts_P), c.train.updates_per_step) for p in own(part)]
            seeds_P = prompt_seeds(c.seed, step, 0, len(prompts_P))
            with unsharded(model) as policy, autocast:
                rollouts_N = generate(policy, [prompts_P[p] for p in own_P], c.rollout.n,
                                      seeds_P=seeds_P[own_P], progress="rollout" if run.writes else None,
                                      **sampling)
            verdicts_N = score_rollouts(rollouts_N, [examples_P[p] for p in own_P], chat, c.grpo.reward)
            own_N = [p * c.rollout.n + i for p in own_P for i in range(c.rollout.n)]
            rollouts_N, verdicts_N = gather(own_N, rollouts_N), gather(own_N, verdicts_N)
            rewards_PG = torch.tensor([float(verdict.reward) for verdict in verdicts_N]).view(-1, c.rollout.n)
            adv_PG = group_advantages(rewards_PG, c.grpo.normalize)
            sampled = time.perf_counter()
            metrics = grpo_updates(model, reference, optimizer, rollouts_N, adv_PG, **losses, **updating)
            metrics |= rollout_metrics(rollouts_N, verdicts_N, rewards_PG)
            metrics |= {"time/rollout_s": sampled - began, "time/update_s": time.perf_counter() - sampled}
            if (step + 1) % c.log.rollouts_every == 0 or step == 0 or metrics["skipped_updates"]:
                run.save_rollouts(step + 1, examples_P, rollouts_N, verdicts_N, adv_PG, chat)
        else:
            replies_P = [chat.encode_reply(example) for example in examples_P]
            metrics = sft_updates(model, optimizer, prompts_P, replies_P, **updating)
        metrics |= {"lr": lr, "epoch": batches.epoch, "time/step_s": time.perf_counter() - began}
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["time/step_s"]
        metrics = of_ranks(metrics)[0]  # clocks differ, and all must end at the same step
        trained_s += metrics["time/step_s"]
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
    return [score(chat.decode(rollout.ids), examples_P[i // n].answer, scheme)
            for i, rollout in enumerate(rollouts_N)]


# Ranks.


def environment(name, default):
    """A number that torchrun sets."""
    return int(os.environ.get(name, default))


def join_ranks(device):
    """Meet the other ranks. One GPU alone is a world of its own, one CPU alone needs none."""
    waits = datetime.timedelta(minutes=60)  # for the rank with the longest replies
    if device == "cuda":
        local, gpus = environment("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"no GPU for rank {local} of this node, it has {gpus}; lower --nproc_per_node")
        torch.cuda.set_device(local)
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=waits, **alone)
    elif environment("WORLD_SIZE", 1) > 1:
        dist.init_process_group("gloo", timeout=waits)


def leave_ranks(status):
    """End with an exit status that can be relied on; return where it is 0 and there are no other ranks.

    The interpreter's own exit may abort in the threads of gloo after all is done (torch 2.13).
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        if status == 0:
            dist.barrier()
        atexit._run_exitfuncs()  # trackers send their last lines here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def of_ranks(value):
    """The values of all ranks in their order, on every rank. Like `gather`, every rank must call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather(indices, items):
    """The items of all ranks in the order of their indices, on every rank."""
    pairs = itertools.chain(*of_ranks(list(zip(indices, items, strict=True))))
    return [item for _, item in sorted(pairs, key=lambda pair: pair[0])]


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


def load_model(path, device, bf16, trained=True, on_cpu=False):
    """A folder's model, divided over the ranks, if there are any, by rows (FSDP2): each block is whole while
    it computes.

    Embedding, norm and head are one group, because they may share a weight; trained: it stays whole from
    forward to backward. On a GPU, bf16: whole weights are bf16; shards, sums of gradients and moments are
    fp32 all the same; on_cpu: shards are in the host's memory.
    """
    if not dist.is_initialized():
        return load_hf(path, device).requires_grad_(trained)
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

    return load_hf(path, device, dtype, shard).requires_grad_(trained)


@contextlib.contextmanager
def unsharded(model):
    """A plain model on the whole weights, for a phase in which no rank waits for another."""
    groups = [module for module in (*model.layers, model) if hasattr(module, "unshard")]
    plain = model
    for module in groups:
        module.unshard()
    if groups:
        with torch.device("meta"):
            plain = Qwen2(model.config)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        plain.load_state_dict(weights, assign=True)
    yield plain
    for module in groups:
        module.reshard()


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


def apply_update(optimizer, grad_clip):
    """Clip the gradient's norm, over all ranks, and step. Returns (norm, 1 if not finite: update skipped)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    skipped = not torch.isfinite(norm)
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), int(skipped)


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
                 kl_coef, clip_low, clip_high, grad_clip, micro_batch_tokens, autocast):
    """The optimizer updates of one step: `updates` mini-batches of whole groups, in order. Returns metrics.

    Packs are built once and serve the old, the reference and the new log-probs. Each loss is a sum over its
    tokens divided by the reply tokens of its whole mini-batch, so neither micro-batches nor ranks change the
    gradient. Every rank is given the whole batch and trains on its own share.
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
                if i > 0:
                    part.old_logp_L, _ = logprobs_of_pack(model, part.pack, **passes)
                if reference is not None:
                    part.ref_logp_L, _ = logprobs_of_pack(reference, part.pack, **passes)

    all_stats, first_stats, norms, skipped = [], [], [], 0
    quiet = environment("RANK", 0) > 0 or None  # None: shown on a terminal only
    bar = tqdm(total=sum(map(len, parts_U)), desc="update", disable=quiet, leave=False, unit="pack")
    for i, (parts, denominator) in enumerate(zip(parts_U, denominators, strict=True)):
        for part in parts:
            logp_L, entropy_L = logprobs_of_pack(model, part.pack, **passes)
            old_logp_L = logp_L.detach() if part.old_logp_L is None else part.old_logp_L
            loss, stats = grpo_loss(logp_L, old_logp_L, part.ref_logp_L, part.adv_L, clip_low=clip_low,
                                    clip_high=clip_high, kl_coef=kl_coef, denominator=denominator)
            loss.backward()
            diff_L = (old_logp_L - part.sampled_logp_L).abs()
            stats |= {"entropy_sum": entropy_L.sum(), "diff_sum": diff_L.sum(),
                      "diff_max": extreme(diff_L, torch.max, 0.0)}
            all_stats.append(stats)
            first_stats += [stats] if i == 0 else []
            bar.update()
        if parts:
            norm, skip = apply_update(optimizer, grad_clip)
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
    total = merge_ranks(all_stats)
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
        first = merge_ranks(first_stats)
        metrics["ratio/dev_first"] = max(first["ratio_max"] - 1, 1 - first["ratio_min"])
    return metrics


def merge_ranks(parts):
    """Stats of the whole, as numbers, from those of the micro-batches of every rank."""
    own_stats = {name: value.cpu() for name, value in merge_stats(parts).items()}
    return {name: float(value) for name, value in merge_stats(of_ranks(own_stats)).items()}


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
                autocast):
    """Supervised updates on the reply tokens, one a mini-batch, in order. Returns metrics."""
    device = model.embed_tokens.weight.device
    packs_U, losses, norms, skipped = [], [], [], 0
    for part in mini_batches(len(prompts_P), updates):
        prompts, replies = [prompts_P[p] for p in own(part)], [[replies_P[p]] for p in own(part)]
        packs_U.append(pack_micro_batches(prompts, replies, micro_batch_tokens))
    packs_U = fill_up(packs_U, pack([], []))
    for part, packs in zip(mini_batches(len(prompts_P), updates), packs_U, strict=True):
        denominator = sum(len(replies_P[p]) for p in part)
        for micro_batch in packs:
            logp_L, _ = logprobs_of_pack(model, micro_batch.to(device), 1.0, vocab_size, autocast)
            loss = sft_loss(logp_L, denominator)
            loss.backward()
            losses.append(loss.detach())
        norm, skip = apply_update(optimizer, grad_clip)
        norms.append(norm)
        skipped += skip
    loss = sum(of_ranks(float(sum(losses)))) / updates
    return {"loss": loss, "grad_norm": sum(norms) / len(norms), "updates": updates,
            "skipped_updates": skipped, "length/mean": sum(map(len, replies_P)) / len(replies_P),
            "tokens": sum(map(len, prompts_P)) + sum(map(len, replies_P))}


# The run folder.


class Run:
    """The files of one run, and its lines on the console."""

    def __init__(self, folder, resume):
        self.folder = Path(folder)
        self.resume = resume
        self.writes = environment("RANK", 0) == 0
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; choose another --out for the run folder")
        if (self.folder / "config.yaml").exists() and not resume:
            raise ValueError(f"{folder} holds a run; add --resume=true or choose another --out")
        self.shown = None
        self.step_times = []
        self.skipped_in_a_row = 0
        self.dead_in_a_row = 0

    def open(self, start, config, tracker):
        """Make the folder, once all is read. A resumed run drops what was logged after `start`."""
        if not self.writes:
            return
        self.tracker = open_tracker(tracker, self.folder, config)
        for name in ("rollouts", "evals", "checkpoints"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if start else []
        # A line without an end was being written when the run died.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        aside = metrics.with_name("metrics.jsonl.tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, metrics)
        (self.folder / "git_revision.txt").write_text(git_revision() + "\n", encoding="utf-8")
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def checkpoint(self, step):
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def newest_checkpoint(self):
        """Steps done at the newest complete checkpoint, 0 without one."""
        complete = sorted(self.folder.glob("checkpoints/step_??????/manifest.json"))
        step = int(complete[-1].parent.name.removeprefix("step_")) if complete else 0
        if step:
            print(f"going on from {self.checkpoint(step)}")
        elif self.resume:
            print(f"no checkpoint in {self.folder}: starting from step 0")
        return step

    def restore(self, step, model, optimizer, fingerprint):
        """Load the optimizer's state; returns the data cursor. ValueError where the data has changed."""
        state = json.loads((self.checkpoint(step) / "training.json").read_text(encoding="utf-8"))
        if state["fingerprint"] != fingerprint:
            raise ValueError(f"{self.checkpoint(step)}: the training examples have changed since; going on "
                             "would repeat or skip some. Restore them, or start anew with another --out")
        slices = open_tensors(self.checkpoint(step) / "optimizer.safetensors")
        for name, parameter in model.named_parameters() if slices else ():
            optimizer.state[parameter] = {"step": slices[f"{name}.step"][...]}
            for key in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[parameter][key] = torch.zeros_like(parameter)
                values, rows = own_rows(moment)
                values.copy_(slices[f"{name}.{key}"][rows])
        return state["cursor"]

    def save_checkpoint(self, step, model, optimizer, batches, base, keep):
        """A Hugging Face folder with the training state: written aside, the manifest last, then renamed."""
        final = self.checkpoint(step)
        aside = final.with_name(final.name + ".tmp")
        if self.writes:
            shutil.rmtree(aside, ignore_errors=True)
        save_hf(model, aside)
        moments = {f"{name}.{key}": moment for name, parameter in model.named_parameters()
                   for key, moment in optimizer.state[parameter].items()}
        write_tensors(aside / "optimizer.safetensors" if self.writes else os.devnull, moments)
        if not self.writes:
            return
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
                     "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if (base / name).exists():
                shutil.copyfile(base / name, aside / name)
        write_json(aside / "training.json", {"cursor": batches.cursor, "fingerprint": batches.fingerprint})
        files = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        write_json(aside / "manifest.json", {"step": step, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in sorted(self.folder.glob("checkpoints/step_??????"))[:-keep] if keep else []:
            shutil.rmtree(old)

    def save_rollouts(self, step, examples_P, rollouts_N, verdicts_N, adv_PG, chat):
        """rollouts/step_….jsonl: a line a reply, with what was asked and what it earned."""
        if not self.writes:
            return
        n = adv_PG.shape[1]
        with open(self.folder / "rollouts" / f"step_{step:06d}.jsonl", "w", encoding="utf-8") as file:
            for i, (rollout, verdict) in enumerate(zip(rollouts_N, verdicts_N, strict=True)):
                example = examples_P[i // n]
                line = {"id": example.id, "query": example.messages[-1]["content"], "answer": example.answer,
                        "reply": chat.decode(rollout.ids), "reward": verdict.reward, "error": verdict.error,
                        "advantage": adv_PG[i // n, i % n].item(), "tokens": len(rollout.ids),
                        "logp": sum(rollout.logp), "finished": rollout.finished}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def log(self, step, metrics):
        if not self.writes:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.tracker(step, metrics)

    def log_step(self, step, steps, metrics):
        """One line a step on the console, reward first. ValueError when updates were skipped in a row."""
        self.log(step, metrics)
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
            raise ValueError(f"no finite gradient in {MAX_SKIPPED} steps in a row, up to step {step}; "
                             "lower train.lr, or look at the last file in rollouts/")
        finding = diagnose(metrics)
        self.dead_in_a_row = self.dead_in_a_row + 1 if finding else 0
        if self.dead_in_a_row >= MAX_DEAD:
            raise ValueError(f"stopped at step {step}: for {MAX_DEAD} steps in a row {finding}")

    def log_evaluation(self, step, rows, replies, seconds):
        """Write an evaluation, print its line and two replies, the same two examples every time."""
        report = {"step": step, "rows": rows, "replies": replies}
        if self.writes:
            write_json(self.folder / "evals" / f"step_{step:06d}.json", report)
        accuracies = {f"eval/{row['category']}": row["accuracy"] for row in rows}
        self.log(step, {**accuracies, "time/eval_s": seconds})
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
