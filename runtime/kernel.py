"""The choice between a definition in plain PyTorch and its fast twin in fast/, for every caller."""

import functools
import importlib.util
import os
import sys

from runtime.ranks import is_first_rank

KERNELS = ("auto", "reference", "fast")


def gpu_twin_runs(device, part):
    """Whether the twin for GPUs runs on this type of device; a Triton kernel also in Triton's interpreter."""
    if part == "attention":  # FlashAttention comes with torch
        return device == "cuda"
    is_there = importlib.util.find_spec("triton") is not None
    return is_there and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def choose_kernel(kernel, device, part):
    """What computes one part of the method on one type of device: "reference", or the twin "gpu" or "cpu".

    part: "sampling", "token log-probs" or "attention"; device: "cpu" or "cuda"; kernel: "reference", the
    definition; "fast", or "triton", its older name, the twin for the device; "auto", the twin where there is
    one, else the definition, printed on stderr once. ValueError for another, or where "fast" cannot run.
    """
    if kernel not in (*KERNELS, "triton"):
        raise ValueError(f"kernel is {kernel!r}; choose one of {', '.join(KERNELS)}")
    if kernel == "reference":
        return kernel
    twin = "cpu" if device == "cpu" and part == "sampling" else None
    # The interpreter, which runs the GPU's twin on a CPU, is for tests: "auto" never takes it.
    if gpu_twin_runs(device, part) and (device == "cuda" or kernel != "auto"):
        twin = "gpu"
    if kernel == "auto" and is_first_rank():
        print(f"kernel of {part} on {device}: {'fast' if twin else 'reference'}", file=sys.stderr)
    if twin or kernel == "auto":
        return twin or "reference"
    raise ValueError(f"kernel {kernel!r}: {part} on a {device} has no fast version that can run here: it "
                     "needs a CUDA GPU and the triton package; use 'auto' or 'reference' "
                     "(TRITON_INTERPRET=1, set before the start, runs Triton kernels on a CPU, slowly)")


def kernel_of_run(kernel, device):
    """The kernel of a whole run. "fast" on a CPU becomes "auto", which takes the one twin that a CPU has, the
    cache of the sampler. ValueError, before anything is loaded, where "fast" cannot run on a GPU."""
    if kernel in ("fast", "triton") and device == "cpu":
        return "auto"
    for part in ("sampling", "token log-probs", "attention") if kernel != "auto" else ():
        choose_kernel(kernel, device, part)
    return kernel
