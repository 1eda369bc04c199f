"""Weights over ranks: device, precision and threads, FSDP2 by rows, the full copy for a rollout, peak memory.

Knows a model only as a module with a list `layers`, a `config`, and a constructor that takes the config.
"""

import contextlib
import os
import platform
import re
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.ranks import rank_variable


def choose_device(precision="auto"):
    """(device, whether matrix products are in bf16) of this machine. precision: "bf16", "fp32", or "auto",
    which is bf16 on a GPU or a CPU that has instructions for it, else fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else cpu_has_bf16()
    return device, precision == "bf16" or (precision == "auto" and has_bf16)


def cpu_has_bf16():
    """Whether torch finds instructions for bf16 in this CPU, AMX or AVX-512. With either a step in bf16 took
    about half as long as one in fp32 (NOTES.md), and without both three to four times as long."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any(map(torch.cpu.get_capabilities().get, ("amx_bf16", "avx512_bf16")))
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()  # torch 2.11


def usable_cores(cgroup="/sys/fs/cgroup"):
    """CPU cores of this process's affinity, at most the whole ones in its container's quota (cgroup 1, 2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for names in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            quota, period = map(int, " ".join(Path(cgroup, name).read_text() for name in names).split())
            cores = min(cores, max(1, quota // period)) if quota > 0 else cores
    return cores


def set_threads(threads=None):
    """Set the CPU threads of this process; returns a line that says so. None: OMP_NUM_THREADS, or else the
    usable cores, divided by the ranks of this node, at most what torch had chosen. Limits oneDNN's cache."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")  # the heap grows with these
    cores, is_given = usable_cores(), not threads and "OMP_NUM_THREADS" in os.environ
    if not is_given:
        share = max(1, cores // rank_variable("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(threads or min(share, torch.get_num_threads()))
    key = "OMP_NUM_THREADS" if is_given else "train.threads"
    return f"CPU: threads {torch.get_num_threads()}, usable cores {cores} ({key})"


def autocast(device, bf16):
    """The autocast context of a CPU in bf16. On a GPU FSDP casts the parameters instead."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 and device == "cpu" else contextlib.nullcontext()


def sharder(device, bf16, trained, on_cpu, adapt=None):
    """How a model is sharded by rows with FSDP2: (device, dtype, shard) as `model.load_hf` takes them; shard
    is `adapt` for a single process on a CPU. Each block is all-gathered while it computes.

    Embedding, final norm and head are one group, because they may share a weight; trained: the group stays
    gathered from forward to backward. On a GPU with bf16 the gathered weights are bf16, while gradient sums
    and moments are fp32, and so are shards unless they are frozen. on_cpu: the shards live in host memory;
    adapt(model): freezes the weights and adds adapters, which are trained in fp32."""
    if not dist.is_initialized():
        return device, torch.float32, adapt
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    dtype, options = torch.float32, {}
    if device == "cuda" and bf16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        dtype = torch.float32 if trained and not adapt else torch.bfloat16
    if device == "cuda" and on_cpu:
        options["offload_policy"], device = CPUOffloadPolicy(), "cpu"

    def shard(model):
        if adapt:
            adapt(model)
        for block in model.layers:
            fully_shard(block, **options)
        fully_shard(model, reshard_after_forward=not trained, **options)
        # Not for a single rank: divided by 1.0, each gradient would be copied once more.
        for module in (*model.layers, model) if dist.get_world_size() > 1 else ():
            # Sums over ranks, not means: a loss is already divided by the denominator of all ranks.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)

    return device, dtype, shard


def own_rows(tensor):
    """(local shard, its row slice in the full tensor); (tensor, ...) where it is not sharded."""
    if not hasattr(tensor, "to_local"):
        return tensor, ...
    size = -(-len(tensor) // tensor.device_mesh.size())
    first = min(len(tensor), size * tensor.device_mesh.get_local_rank())
    return tensor.to_local(), slice(first, min(len(tensor), first + size))


@contextlib.contextmanager
def unsharded(model, merged=True):
    """Collective: a plain model on the gathered weights, on the device that computes, for a phase without
    collectives. None stays None. Adapters are merged into new weights, or left out (merged=False)."""
    from runtime.adapters import has_adapters, plain_model  # imports this module
    if model is not None and has_adapters(model):
        plain = plain_model(model, merged)
        try:
            yield plain
        finally:
            plain.to("meta")  # frees what was gathered, whoever still refers to this model
        return
    if model is None or not dist.is_initialized():
        yield model
        return
    groups = (*model.layers, model)
    try:
        for module in groups:
            module.unshard()
        yield plain_model_on(model, {name: weight.detach() for name, weight in model.named_parameters()})
    finally:
        for module in groups:
            module.reshard()


def plain_model_on(model, weights):
    """A model of the same config on {name: whole weight}, without FSDP and adapters; nothing is copied."""
    with torch.device("meta"):
        plain = type(model)(model.config)  # the class that FSDP puts in front makes a model without FSDP
    plain.load_state_dict(weights, assign=True)
    return plain


def hardware():
    """The device that computes, in words."""
    cpu = f"{processor_name()}, CPU threads: {torch.get_num_threads()}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu


def processor_name():
    """The CPU in words, as Linux names it; elsewhere the kind of machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return re.search("model name[^:]*: (.*)|$", info)[1] or platform.machine()


def peak_memory(phase):
    """{metric: GiB} of the most memory that tensors took since `reset_peak_memory`; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {f"memory/{phase}_gib": torch.cuda.max_memory_allocated() / 2**30}


def reset_peak_memory():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
