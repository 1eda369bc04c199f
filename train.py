"""Training: GRPO or supervised fine-tuning of a model on tool calls. One YAML file has all settings.

    repeat for every step:
        examples_P   the next batch of prompts                                        data.Batches
        rollouts_N   G replies to each, sampled from the policy                       sample.generate
        rewards_PG   1 where format and calls are right, else 0                       reward.judge
        kept_P       rollout.refill: groups with differing rewards before others      grpo.choose_groups
        adv_PG       (reward - group mean) / group std                   (eq. 4)      grpo.group_advantages
        for every optimizer update, a mini-batch of the prompts:
            logp_L   log-probs of the reply tokens under the policy                   grpo.token_logprobs
            loss     -min(ratio A, clip(ratio) A) + beta KL              (eq. 3)      grpo.grpo_loss
            AdamW    a step on the gradient, whose norm is limited first              apply_update

In:  a config (configs/schema.py), a model folder, examples as JSON lines. Out: a run folder with metrics,
rollouts, evaluations and checkpoints (runtime/run_folder.py). Equations: arXiv 2505.00024.

Under torchrun the ranks share the work: weights, gradients and moments are sharded by rows (FSDP2; also on a
single GPU; gathered whole for rollouts and the reference's passes), and each mini-batch is divided by whole
groups. Rollouts and verdicts are all-gathered, so all ranks see the same batch, denominators and metrics.
Seeds come from a prompt's index in the global batch, so replies and gradients do not depend on the number of
ranks. Data order and sampling noise are functions of the step, so a killed run resumes (docs/resume.md).

Where this differs from the paper's code: see grpo.py for the denominator. In the first mini-batch the current
log-probs, detached, are the old ones, because nothing has been updated yet. Without a KL term, a group whose
rewards are all equal has a gradient of exactly zero: it is not computed, but counts in the denominator.

Axes: P prompts, G rollouts a prompt, N = P·G, U updates a step, T packed tokens, L reply tokens, D width.
"""

import dataclasses
import functools
import math
import sys
from hashlib import sha256
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm

import grpo
from configs.schema import Config, check_fits, flat, load_config, number_of_steps, read_yaml
from data import Batches, Chat, read_examples
from eval import accuracy_table, evaluate, evenly_spaced, print_evaluation, summarize
from model import ModelConfig, load_hf, save_hf, shared_prefix_attention
from reward import judge
from runtime import adapters, ranks, sharding
from runtime.checkpoints import precision_of_run, read_moments, write_state
from runtime.kernel import kernel_of_run
from runtime.metrics import rollout_lines, rollout_metrics, sampler_stats, token_values, update_metrics
from runtime.ranks import all_gather, gather_in_order, is_first_rank, my_share, pad_to_longest
from runtime.run_folder import RunFolder
from runtime.signals import Signals, Stopped
from runtime.tensors import identity, resolve
from sample import generate, prompt_seeds


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print("python train.py [FILE.yaml] [--section.key=value ...] [--plan [--gpus N] [--gpu_memory GIB]]\n"
              "Presets: configs/. Meanings: configs/schema.py. --plan prints memory and time. Defaults:\n")
        return print(yaml.safe_dump(dataclasses.asdict(Config()), sort_keys=False), end="")
    if "--plan" in argv:
        from tools.plan import main as plan
        return plan(argv)
    ranks.run_and_exit(lambda: train(load_config(argv)))


def train(c):
    """Train as the Config `c` says. Returns the exit status: 0, or 128 + the number of a signal."""
    with RunFolder(c.out, c.resume) as run, Signals() as signals:
        try:
            take_steps(c, run, signals)
        except Stopped:
            run.stop(signals.mid_update)
            return 128 + signals.number
    return 0


def take_steps(c, run, signals):
    """The training loop of both stages. Only this function, `setup` and `train` know the Config `c`."""
    s = setup(c, run)
    decoding = {"batch_size": c.rollout.batch_size, "kv_memory_gib": c.rollout.kv_memory_gib,
                "kernel": s.kernel, "should_stop": signals.received}
    sampling = {"n": c.rollout.n, "max_new_tokens": c.rollout.max_new_tokens,
                "temperature": c.rollout.temperature, "progress": is_first_rank() and "rollout", **decoding}
    update_settings = {"updates": c.train.updates_per_step, "vocab_size": s.chat.vocab_size,
                       "autocast": s.autocast, "kernel": s.kernel, "grad_clip": c.train.grad_clip,
                       "micro_batch_tokens": c.train.micro_batch_tokens, "poll": signals.poll}
    loss_settings = {"temperature": c.rollout.temperature, "kl_coef": c.grpo.kl_coef,
                     "average": c.grpo.average, "limit": c.rollout.max_new_tokens, "ratio": c.grpo.ratio,
                     "clip": c.grpo.clip, "clip_low": c.grpo.clip_low, "clip_high": c.grpo.clip_high}
    signals.catch()
    for step in range(run.step, s.steps + 1):
        time_share = run.trained_s / (60 * (c.train.max_minutes or math.inf))
        is_last = step == s.steps or time_share >= 1
        if run.is_evaluation_due(is_last, c.eval.every, c.eval.ends):
            with run.phase(f"evaluation after step {step}"):
                replies = evaluate_heldout(s, c.eval.max_new_tokens, c.grpo.reward, signals.poll, decoding)
            rows = summarize(replies)
            print_evaluation(step, rows, run.log_evaluation(rows, replies))
        if step > run.saved and (step % c.checkpoint.every == 0 or is_last):
            run.save_checkpoint()
        if is_last:
            break

        lr = learning_rate(step, s.steps, c.train.lr, c.train.schedule, c.train.warmup, time_share)
        set_learning_rate(s.optimizer, lr)
        if c.stage == "grpo":
            with run.phase(f"rollout of step {step + 1}"):
                examples_P, rollouts_N, verdicts_N, metrics = roll_out(
                    s, functools.partial(prompt_seeds, c.seed, step), c.rollout.refill, c.grpo.reward,
                    signals.poll, sampling)
            rewards_PG = torch.tensor([verdict.reward for verdict in verdicts_N]).view(-1, c.rollout.n)
            adv_PG, passes = grpo.group_advantages(rewards_PG, c.grpo.normalize), []
            with run.phase(f"update of step {step + 1}"):
                metrics |= grpo_updates(s.policy, s.reference, s.optimizer, rollouts_N, adv_PG,
                                        keep=passes.append, **loss_settings, **update_settings)
            has_problem = metrics["skipped_updates"] or metrics["reward/raised"]
            if (step + 1) % c.log.rollouts_every == 0 or step == 0 or has_problem:
                values = token_values(passes) if c.log.tokens else None
                run.save_lines(step + 1, rollout_lines(s.chat, examples_P, rollouts_N, verdicts_N, adv_PG,
                                                       values))
        else:
            examples_P = next(s.batches)
            prompts_P = [s.chat.encode_prompt(example) for example in examples_P]
            replies_P = [s.chat.encode_reply(example) for example in examples_P]
            with run.phase(f"update of step {step + 1}"):
                metrics = sft_updates(s.policy, s.optimizer, prompts_P, replies_P, **update_settings)
            if metrics["skipped_updates"]:
                run.save_lines(step + 1, map(vars, examples_P))
        metrics |= {"lr": lr, "epoch": s.batches.epoch, **adapters.metrics(s.policy)}
        run.cursor = s.batches.cursor
        run.log_step(step + 1, s.steps, metrics, c.train.max_minutes)
    if is_first_rank() and (columns := run.first_and_last_evaluation()):
        print("\nheld-out accuracy in percent, greedy, with 95 % confidence intervals")
        print(accuracy_table(columns))
    print(f"\nrun folder: {run.folder}")


# ---- setup
class Session(NamedTuple):
    """What a run works with. policy, reference: models, sharded over ranks; reference may be None."""

    chat: Chat
    batches: Batches
    heldout: list
    steps: int
    policy: Any
    reference: Any
    optimizer: torch.optim.Optimizer
    autocast: Any
    kernel: str


def setup(c, run):
    """Read the data, join the other ranks, load the models: a Session. Resumes at `run.step`, 0 if new."""
    world_size = ranks.rank_variable("WORLD_SIZE", 1)
    check_fits(c, ranks=world_size)
    print(sharding.set_threads(c.train.threads))
    device, bf16 = sharding.choose_device(precision_of_run(run.folder, c.model.precision, read_yaml))
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, precision="bf16" if bf16 else "fp32"))
    kernel = kernel_of_run(c.model.kernel, device)
    base = resolve(c.model.path)
    chat = Chat(base, c.data.system_prompt, c.data.chat_format)
    train_set, heldout = read_examples(c.data.train, c.data.heldout, c.data.heldout_fraction, c.seed, chat,
                                       c.data.max_prompt_tokens, c.data.max_dropped_share)
    check_fits(c, examples=len(train_set), positions=ModelConfig.from_hf(base).max_position_embeddings)
    batches, steps = Batches(train_set, c.train.prompts_per_step, c.seed), number_of_steps(c, len(train_set))
    fingerprint = {"data.train": batches.fingerprint, "data.heldout": Batches(heldout, 1, c.seed).fingerprint,
                   # The text of the system prompt, in one encoded prompt.
                   "data.system_prompt": sha256(str(chat.encode_prompt(train_set[0])).encode()).hexdigest()}

    ranks.join_ranks(device, c.train.timeout_minutes)
    bases = ranks.on_each_node(identity, base, c.model.init == "trained")
    if len(set(map(str, all_gather((flat(c), fingerprint))))) > 1 or any(x != bases[0] for x in bases):
        raise ranks.RankError("the ranks were not given the same settings and data; give each node the same "
                              "files")
    fingerprint |= {f"model.path ({part})": digest for part, digest in bases[0].items()}
    checkpoint, state = ranks.on_first_rank(run.newest_checkpoint, read_yaml, flat(c), flat(Config()),
                                            fingerprint)
    run.restore(state)
    batches.cursor = run.cursor or run.step * c.train.prompts_per_step  # earlier versions saved no cursor
    if run.step > steps:
        raise ranks.RankError(f"{checkpoint} is past the {steps} steps of this run; raise train.steps")
    seed = c.seed if c.model.init == "random" else None
    lora = c.model.lora_rank and (c.model.lora_rank, c.model.lora_alpha)
    whole = None if lora else checkpoint  # a checkpoint's weights are merged, and adapters need their base
    policy = load_model(whole or base, device, bf16, seed=None if whole else seed, lora=lora)
    adapters.fill_adapters(policy, c.seed, checkpoint)
    policy.checkpoint_blocks = c.train.activation_checkpointing
    reference = None
    if c.stage == "grpo" and c.grpo.kl_coef > 0:
        reference = policy if lora else load_model(base, device, bf16, trained=False, seed=seed,
                                                   on_cpu=c.grpo.reference_on_cpu)
    optimizer = make_optimizer(policy, c.train.weight_decay, c.train.beta2)
    if checkpoint:
        read_moments(checkpoint, policy, optimizer)
    save = functools.partial(write_state, model=policy, optimizer=optimizer, save_model=save_hf, base=base,
                             save_prompt=chat.save)
    run.open(dataclasses.asdict(c), {"config": flat(c), "fingerprint": fingerprint}, c.log.tracker, save,
             c.checkpoint.keep)
    heldout = evenly_spaced(heldout, c.eval.examples)
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    where = f"{world_size} x {device}" if world_size > 1 else device
    print(f"{c.stage} of {c.model.path}: {millions:.1f}M parameters on {where} in {c.model.precision}, "
          f"{len(train_set)} examples, {len(heldout)} held out, {steps} steps; {run.folder}", flush=True)
    return Session(chat, batches, heldout, steps, policy, reference, optimizer,
                   sharding.autocast(device, bf16), kernel)


def load_model(path, device, bf16, trained=True, on_cpu=False, seed=None, lora=None):
    """Load a model and shard it by rows with FSDP2 (a single process on a CPU does not shard). on_cpu: keep
    the shards in host memory; seed: draw random weights instead of reading them; lora: train adapters of this
    (rank, alpha), which get no values here, and freeze the weights."""
    adapt = lora and functools.partial(adapters.add_adapters, rank=lora[0], alpha=lora[1])
    device, dtype, shard = sharding.sharder(device, bf16, trained, on_cpu, adapt)
    model = load_hf(path, device, dtype, shard, seed)
    return model if lora else model.requires_grad_(trained)


# ---- one step: evaluation, rollouts, updates; all ranks must call these functions together
def mini_batches(P, updates):
    """The prompts of each optimizer update of a step, as ranges."""
    return [range(first, first + P // updates) for first in range(0, P, P // updates)]


def evaluate_heldout(s, max_new_tokens, scheme, poll, decoding):
    """The `replies` of `eval.evaluate` to all held-out examples; each rank generates its share."""
    with sharding.unsharded(s.policy) as policy, s.autocast:
        _, replies = evaluate(policy, s.chat, my_share(s.heldout), max_new_tokens=max_new_tokens,
                              scheme=scheme, progress=is_first_rank() and "evaluation", **decoding)
    poll()
    return gather_in_order(my_share(range(len(s.heldout))), replies)


def roll_out(s, seeds_of, refill, scheme, poll, sampling):
    """Draw a batch of prompts, and at most `refill` more until enough groups have spread; sample replies and
    judge them. Returns (examples_P, rollouts_N, verdicts_N) to train on, and metrics of all that were drawn.
    seeds_of(first, count): seeds of prompts of the step. A rank samples its share of each batch."""
    P, n, mine_P = s.batches.size, sampling["n"], [*my_share(range(s.batches.size))]
    examples_P, rollouts_N, verdicts_N, kept_P = [], [], [], None  # of all batches drawn so far
    with sharding.unsharded(s.policy) as policy, s.autocast:  # once, also for several batches
        while kept_P is None:
            batch_P, seeds_P = next(s.batches), seeds_of(len(examples_P), P)
            rollouts = generate(policy, [s.chat.encode_prompt(batch_P[p]) for p in mine_P],
                                seeds_P=seeds_P[mine_P], stop_ids=s.chat.stop_ids,
                                vocab_size=s.chat.vocab_size, **sampling)
            poll()
            verdicts = [judge(batch_P[mine_P[i // n]], s.chat.decode_reply(rollout.ids), scheme)
                        for i, rollout in enumerate(rollouts)]
            examples_P += batch_P
            rollouts_N += gather_in_order(mine_P, rollouts)
            verdicts_N += gather_in_order(mine_P, verdicts)
            rewards_PG = torch.tensor([verdict.reward for verdict in verdicts_N]).view(-1, n)
            kept_P = grpo.choose_groups(rewards_PG, P, may_draw=len(examples_P) <= refill * P)
    metrics = rollout_metrics(rollouts_N, verdicts_N, rewards_PG)
    kept_N = [p * n + i for p in kept_P for i in range(n)]
    rollouts_N, verdicts_N = [rollouts_N[i] for i in kept_N], [verdicts_N[i] for i in kept_N]
    return [examples_P[p] for p in kept_P], rollouts_N, verdicts_N, metrics


def logprobs_of_pack(model, pack, temperature, vocab_size, autocast, kernel="auto"):
    """(logp_L, entropy_L) of the reply tokens of a pack. Only their hidden states reach the head."""
    def head(hidden_TD):
        logp_L, entropy_L = grpo.token_logprobs(hidden_TD[pack.predictor_L], model.head_weight(),
                                                pack.targets_L, temperature, vocab_size, kernel)
        return logp_L.clone(), entropy_L  # FSDP's hooks warn about an output that is a view

    with autocast:
        return model(pack.tokens_T, pack.positions_T, shared_prefix_attention(pack.groups, kernel), head)


def grpo_updates(policy, reference, optimizer, rollouts_N, adv_PG, *, temperature, kl_coef, updates,
                 vocab_size, micro_batch_tokens, grad_clip, autocast, kernel="auto", average="token",
                 limit=None, poll=lambda _: None, keep=lambda _: None, **clipping):
    """The optimizer updates of one step, one for each mini-batch of whole groups, in order. Returns metrics.

    Each loss is divided by the denominator of its whole mini-batch, so neither micro-batches nor ranks change
    the gradient. Every rank gets the whole batch. average, limit: see token_weights; clipping: see grpo_loss.
    poll(mid_update) is called before every pass, True after the first update, by all ranks; it may raise.
    keep((rollout_L, old_logp_L, entropy_L)) is called after every training pass."""
    (P, G), device = adv_PG.shape, policy.embed_tokens.weight.device
    batches_U, denominator_U = [], []  # the micro-batches of each update, the denominator of its loss
    for prompts in mini_batches(P, updates):
        trained_P = [p for p in my_share(prompts) if kl_coef or adv_PG[p].any()]  # others have no gradient
        batches_U.append(grpo.make_micro_batches(rollouts_N, adv_PG, trained_P, micro_batch_tokens, device,
                                                 average))
        replies = [rollouts_N[i].ids for i in range(prompts.start * G, prompts.stop * G)]
        denominator_U.append(grpo.token_weights(replies, average, limit)[1])
    batches_U = pad_to_longest(batches_U, grpo.MicroBatch.empty(device))
    logprobs = functools.partial(logprobs_of_pack, temperature=temperature, vocab_size=vocab_size,
                                 autocast=autocast, kernel=kernel)
    with torch.no_grad(), sharding.unsharded(reference, merged=False) as reference:
        for u, batches in enumerate(batches_U):
            for batch in batches:
                poll(False)
                if u > 0:
                    batch.old_logp_L, _ = logprobs(policy, batch.pack)
                if reference is not None:
                    batch.ref_logp_L, _ = logprobs(reference, batch.pack)

    stats_U, done = [[] for _ in batches_U], []
    bar = tqdm(total=sum(map(len, batches_U)), desc="update", disable=None if is_first_rank() else True,
               leave=False, unit="pack")  # None: shown on a terminal only
    for batches, denominator, stats in zip(batches_U, denominator_U, stats_U, strict=True):
        for batch in batches:
            poll(bool(done))
            logp_L, entropy_L = logprobs(policy, batch.pack)
            old_logp_L = logp_L.detach() if batch.old_logp_L is None else batch.old_logp_L
            loss, loss_stats = grpo.grpo_loss(
                logp_L, old_logp_L, batch.ref_logp_L, batch.adv_L, reply_L=batch.pack.reply_L,
                weight_L=batch.weight_L, denominator=denominator, kl_coef=kl_coef, **clipping)
            loss.backward()
            stats.append(loss_stats | sampler_stats(entropy_L, old_logp_L, batch.sampled_logp_L))
            keep((batch.rollout_L, old_logp_L, entropy_L.detach()))
            bar.update()
        if batches:
            done.append(apply_update(optimizer, grad_clip, sum(float(each["loss"]) for each in stats)))
    bar.close()
    tokens = sum(len(r.prompt_ids) for r in rollouts_N[::G]) + sum(len(r.ids) for r in rollouts_N)
    norms, skipped = [norm for norm, _ in done], sum(skip for _, skip in done)
    return {"tokens": tokens, **update_metrics(stats_U, norms, skipped, reference is not None)}


def sft_updates(policy, optimizer, prompts_P, replies_P, *, updates, vocab_size, micro_batch_tokens,
                grad_clip, autocast, kernel="auto", poll=lambda _: None):
    """Supervised updates on the reply tokens, one for each mini-batch. Otherwise like `grpo_updates`."""
    device = policy.embed_tokens.weight.device
    prompts_U, losses, done = mini_batches(len(prompts_P), updates), [], []
    packs_U = [grpo.pack_micro_batches([prompts_P[p] for p in my_share(prompts)],
                                       [[replies_P[p]] for p in my_share(prompts)], micro_batch_tokens)
               for prompts in prompts_U]
    for prompts, packs in zip(prompts_U, pad_to_longest(packs_U, grpo.pack([], [])), strict=True):
        tokens = sum(len(replies_P[p]) for p in prompts)
        losses.append(0.0)
        for micro_batch in packs:
            poll(bool(done))
            logp_L, _ = logprobs_of_pack(policy, micro_batch.to(device), 1.0, vocab_size, autocast, kernel)
            loss = grpo.sft_loss(logp_L, tokens)
            loss.backward()
            losses[-1] += loss.item()
        done.append(apply_update(optimizer, grad_clip, losses[-1]))
    return {"loss": sum(all_gather(sum(losses))) / updates,
            "grad_norm": sum(norm for norm, _ in done) / updates,
            "updates": updates, "skipped_updates": sum(skip for _, skip in done),
            "length/mean": sum(map(len, replies_P)) / len(replies_P),
            "tokens": sum(map(len, prompts_P)) + sum(map(len, replies_P))}


# ---- optimizer and schedule
def make_optimizer(model, weight_decay, beta2):
    """AdamW on the fp32 weights that are trained, in one pass; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)


def learning_rate(step, steps, peak, schedule, warmup, time_share=0.0):
    """The rate of step `step` of `steps`: linear warm-up, then constant, or cosine decay to 0.1 · `peak`. The
    schedule cosine_time follows the steps or the minutes, whichever ends first."""
    if schedule == "cosine_time":
        step = max(step, time_share * steps)
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


def apply_update(optimizer, grad_clip, loss):
    """Clip the gradient's norm over all ranks and step. Returns (norm, 1 if the update was skipped, else 0).
    All ranks skip it if the norm, or any rank's part of the loss, is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    norm = getattr(norm, "full_tensor", norm.detach)().item()  # full_tensor: of sharded parameters
    skipped = max(all_gather(int(not math.isfinite(norm) or not math.isfinite(loss))))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


if __name__ == "__main__":
    main()
