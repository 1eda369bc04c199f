"""Statistics of a step: merged from its parts, and turned into the metrics that the README explains."""

import torch


def merge_stats(parts):
    """Merge the stats of parts, {name: scalar tensor} each: `*_max` by maximum, `*_min` by minimum, others by
    sum.

    A NaN in any part gives NaN (Python's own max and min would keep or drop it depending on the order).
    """
    merge_by = {"max": torch.amax, "min": torch.amin}
    columns = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: merge_by.get(name.rpartition("_")[2], torch.sum)(x) for name, x in columns.items()}


def metrics_of_stats(total, first):
    """{metric: number}: means and extremes over the trained tokens, as the README explains them.

    total, first: merged stats, as numbers, of a step and of its first mini-batch (None if that was empty).
    """
    mean = {name: total[name + "_sum"] / total["tokens"]
            for name in ("ratio", "clip_low", "clip_high", "kl", "entropy", "diff")}
    metrics = {
        "kl": mean["kl"], "entropy": mean["entropy"],
        "ratio/mean": mean["ratio"], "ratio/max": total["ratio_max"], "ratio/min": total["ratio_min"],
        "ratio/log_abs_max": total["log_ratio_abs_max"],
        "ratio/clip_low": mean["clip_low"], "ratio/clip_high": mean["clip_high"],
        "sampling/logp_diff_mean": mean["diff"], "sampling/logp_diff_max": total["diff_max"],
    }
    if first is not None:
        metrics["ratio/dev_first"] = max(first["ratio_max"] - 1, 1 - first["ratio_min"])
    return metrics
