"""Numbers of a step: statistics of losses merged over micro-batches and ranks, shares of replies, diagnosis,
the line on the console, trackers. docs/metrics.md explains every metric.
"""

from collections import Counter
from uuid import uuid4

import torch

from runtime.files import read_text, write_text
from runtime.ranks import all_gather


def merge_stats(parts):
    """Statistics of the whole from those of its parts: `*_max` by maximum, `*_min` by minimum, else by sum.
    A NaN in one part is a NaN in the whole; Python's max and min would keep or drop it by its place."""
    merge_by = {"max": torch.amax, "min": torch.amin}
    columns = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: merge_by.get(name.rpartition("_")[2], torch.sum)(x) for name, x in columns.items()}


def merge_over_ranks(parts):
    """Collective: the merged statistics of the micro-batches of all ranks, as Python floats."""
    mine = {name: value.cpu() for name, value in merge_stats(parts).items()}
    return {name: float(value) for name, value in merge_stats(all_gather(mine)).items()}


def update_metrics(stats_U, norms, skipped, has_reference):
    """Collective: metrics of a GRPO step. stats_U: for each optimizer update the statistics of each of its
    micro-batches, none where no group had spread; norms: of the gradient, one for each update that was made;
    skipped: updates without a finite gradient."""
    counts = {"updates": len(norms), "skipped_updates": skipped}
    parts = [stats for update in stats_U for stats in update]
    if not parts:  # no group had spread: there was no update
        return {"loss": 0.0, "grad_norm": 0.0, **counts}
    total = merge_over_ranks(parts)
    mean = {name: total[name + "_sum"] / total["tokens"]
            for name in ("ratio", "clip_low", "clip_high", "kl", "entropy", "diff")}
    metrics = {
        "loss": total["loss"] / len(stats_U), "grad_norm": sum(norms) / len(norms), **counts,
        **({"kl": mean["kl"]} if has_reference else {}), "entropy": mean["entropy"],
        "ratio/mean": mean["ratio"], "ratio/max": total["ratio_max"], "ratio/min": total["ratio_min"],
        "ratio/log_abs_max": total["log_ratio_abs_max"],
        "ratio/clip_low": mean["clip_low"], "ratio/clip_high": mean["clip_high"],
        "sampling/logp_diff_mean": mean["diff"], "sampling/logp_diff_max": total["diff_max"],
    }
    if stats_U[0]:
        first = merge_over_ranks(stats_U[0])
        metrics["ratio/dev_first"] = max(first["ratio_max"] - 1, 1 - first["ratio_min"])
    return metrics


def sampler_stats(entropy_L, old_logp_L, sampled_logp_L):
    """More statistics of a micro-batch: the entropy, and how far sampler's and trainer's log-probs differ."""
    diff_L = (old_logp_L - sampled_logp_L).abs()
    return {"entropy_sum": entropy_L.sum(), "diff_sum": diff_L.sum(),
            "diff_max": diff_L.max() if len(diff_L) else diff_L.new_tensor(0.0)}


def token_values(passes):
    """Collective: {rollout: ([log-prob before the updates], [entropy])} of its tokens under the trainer, from
    the (rollout_L, old_logp_L, entropy_L) of the training passes of all ranks."""
    mine = {}
    for values in passes:
        for rollout, logp, entropy in zip(*(x_L.tolist() for x_L in values), strict=True):
            logps, entropies = mine.setdefault(rollout, ([], []))
            logps.append(round(logp, 6))
            entropies.append(round(entropy, 6))
    return {rollout: values for part in all_gather(mine) for rollout, values in part.items()}


def rollout_lines(chat, examples_P, rollouts_N, verdicts_N, adv_PG, values=None):
    """A JSON value for each reply: what was asked, what was written, what it earned; with `values`, those of
    `token_values`, also the text and numbers of each token, null where no training pass ran."""
    G = adv_PG.shape[1]
    for i, (rollout, verdict) in enumerate(zip(rollouts_N, verdicts_N, strict=True)):
        example = examples_P[i // G]
        line = {"id": example.id, "query": example.messages[-1]["content"], "answer": example.answer,
                "reply": chat.decode(rollout.ids), "reward": verdict.reward, "error": verdict.error,
                "advantage": adv_PG[i // G, i % G].item(), "tokens": len(rollout.ids),
                "logp": sum(rollout.logp), "finished": rollout.finished}
        if values is not None:
            trainer_logp, entropy = values.get(i, (None, None))
            line |= {"pieces": [chat.decode([id]) for id in rollout.ids], "sampler_logp": rollout.logp,
                     "trainer_logp": trainer_logp, "entropy": entropy}
        yield line


def rollout_metrics(rollouts_N, verdicts_N, rewards_PG):
    """What the replies of one step were like: shares of replies; `all_zero`, `all_one`, `live` of groups."""
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
        "reward/raised": sum(verdict.raised for verdict in verdicts_N),
        "reward/commonest": Counter(tuple(rollout.ids) for rollout in rollouts_N).most_common(1)[0][1] / N,
        "length/mean": sum(lengths) / N, "length/min": min(lengths), "length/max": max(lengths),
        "length/cut": sum(not rollout.finished for rollout in rollouts_N) / N,
    }


def diagnose(metrics):
    """Why the rollouts of a step cannot teach anything, with advice; None where they can."""
    if metrics.get("reward/commonest", 0) > 0.95:
        return ("nearly all replies to all prompts were the same: the policy has collapsed; go back to an "
                "earlier checkpoint, lower train.lr or raise grpo.kl_coef")
    if metrics.get("reward/live", 1) > 0:
        return None
    if metrics["reward/all_one"] == 1:
        return "every reply was right, so nothing is left to learn; take harder examples"
    return ("no group had a reply that earned more than another, so there was nothing to reinforce; teach "
            "the task first (stage: sft), raise rollout.n or rollout.temperature, or look into rollouts/")


def seconds_left(step_times, steps, seconds):
    """Seconds until a run ends: `steps` more at the mean of step_times, or `seconds` if that is less."""
    return int(min(sum(step_times) / len(step_times) * steps, max(0.0, seconds)))


def console_line(step, steps, metrics, seconds_left):
    """The line of one step on the console, reward first."""
    if "reward/mean" in metrics:
        kl = f"{metrics['kl']:.4f}" if "kl" in metrics else "off"
        lead = (f"reward {metrics['reward/mean']:.3f}  all-0 {metrics['reward/all_zero']:4.0%}  "
                f"all-1 {metrics['reward/all_one']:4.0%}  length {metrics['length/mean']:5.1f}  kl {kl}")
    else:
        lead = f"loss {metrics['loss']:.4f}  length {metrics['length/mean']:5.1f}"
    rate = metrics["tokens_per_s"]
    speed = f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    return (f"step {step:>{len(str(steps))}}/{steps}  {lead}  {speed} tok/s  "
            f"{seconds_left // 60}:{seconds_left % 60:02d} left")


def open_tracker(name, folder, config, step=0, rows=()):
    """A function (step, metrics) that sends metrics to TensorBoard or W&B, or nowhere.

    step: the boundary that the run resumes from, 0 for a new run; rows: [metrics] that were logged for it.
    TensorBoard then hides what an earlier process wrote from the boundary on, and `rows` are sent again, so
    that it has each step once. W&B continues the run whose id is in wandb_id.txt, and ignores known steps.
    """
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder / "tensorboard", purge_step=step)

            def send(step, metrics):
                for key, x in metrics.items():
                    writer.add_scalar(key, x, step)
                writer.flush()  # or a killed process loses two minutes of them

            for row in rows:
                send(step, row)
            return send
        if name == "wandb":
            import wandb
            known = folder / "wandb_id.txt"
            if not (step and known.exists()):
                write_text(known, uuid4().hex + "\n")
            run = wandb.init(project="nanon1", name=folder.name, dir=folder, config=config, resume="allow",
                             id=read_text(known).strip(), allow_val_change=True)
            return lambda step, metrics: run.log(metrics, step=step)
    except ImportError as error:
        raise ValueError(f"log.tracker is {name}, but {error.name} is not installed; "
                         f"pip install {name}, or set log.tracker to none") from None
    return lambda step, metrics: None
