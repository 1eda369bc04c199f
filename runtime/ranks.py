"""The ranks that torchrun starts: meeting, exchanging Python values, sharing work, leaving.

Every function also works in a single process, which has no process group (a single GPU has one of size 1).
Functions marked "collective" must be called by all ranks in the same order.
"""

import atexit
import datetime
import itertools
import os
import sys
import traceback

import torch
import torch.distributed as dist

from runtime.files import tolerant_output


class RankError(ValueError):
    """A ValueError that is raised identically on all ranks; only rank 0 prints it."""

    status = 2


def rank_variable(name, default):
    """An integer that torchrun sets in the environment."""
    return int(os.environ.get(name, default))


def is_first_rank():
    """Whether this process is rank 0, the one that prints and writes; also before the ranks have met."""
    return dist.get_rank() == 0 if dist.is_initialized() else rank_variable("RANK", 0) == 0


def join_ranks(device, timeout_minutes):
    """Collective: create the process group. One GPU gets a group of size 1, one CPU gets none."""
    rank, ranks = rank_variable("RANK", 0), rank_variable("WORLD_SIZE", 1)
    local_rank = rank_variable("LOCAL_RANK", 0)
    if device == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"no GPU for rank {local_rank} of this node, it has {gpus}; lower "
                             "--nproc_per_node")
        torch.cuda.set_device(local_rank)
    elif ranks == 1:
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store = next(dist.rendezvous("env://", timeout=timeout))[0] if ranks > 1 else dist.HashStore()
    # torchrun on a single node keeps its store over restarts, with the addresses of the dead ranks in it.
    if rank_variable("GROUP_WORLD_SIZE", 1) == 1:
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def run_and_exit(function):
    """Call `function`, which returns an exit status, and end the process with it. An error becomes a line on
    stderr and a status: its own, or 2 for bad input; 1 for a lost rank or no memory; 130 for Ctrl-C."""
    if not is_first_rank():
        sys.stdout = open(os.devnull, "w")
    tolerant_output()
    try:
        status = function()
    except (ValueError, OSError) as error:
        # Before the ranks have met, each rank of a node finds the same error, and one of them prints it.
        silent = isinstance(error, RankError) if dist.is_initialized() else rank_variable("LOCAL_RANK", 0) > 0
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr)
        elif not silent:
            print(f"error on rank {rank_variable('RANK', 0)}: {error}", file=sys.stderr)
        status = getattr(error, "status", 2)
    except RuntimeError:  # RunFolder has printed the phase
        traceback.print_exc()
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        status = 130
    leave_ranks(status)


def leave_ranks(status):
    """End the process with `status`; return where it is 0 and there are no other ranks. With other ranks the
    interpreter's own exit is skipped: it may abort in gloo's threads after all work is done (torch 2.13),
    which would change the status."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        if status == 0:
            all_gather(None)  # a barrier: no rank leaves while another still needs it
        atexit._run_exitfuncs()  # trackers flush here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def all_gather(value):
    """Collective: the values of all ranks, in rank order, on every rank. Values are pickled."""
    if not dist.is_initialized():
        return [value]
    dist.group.WORLD.monitored_barrier(wait_all_ranks=True)  # its error names the missing ranks
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(function, *arguments):
    """Collective: call the function on rank 0 only; return its result, or raise its error, on every rank."""
    return on_chosen_ranks(is_first_rank(), function, *arguments)[0]


def on_each_node(function, *arguments):
    """Collective: as `on_first_rank`, but on the first rank of each node; returns the results of them all."""
    return on_chosen_ranks(rank_variable("LOCAL_RANK", 0) == 0, function, *arguments)


def on_chosen_ranks(chosen, function, *arguments):
    value, error = None, None
    if chosen:
        try:
            value = function(*arguments)
        except (ValueError, OSError) as raised:
            error = str(raised)
    results = [(value, error) for chosen, value, error in all_gather((chosen, value, error)) if chosen]
    for _, error in results:
        if error:
            raise RankError(error)
    return [value for value, _ in results]


def gather_in_order(indices, items):
    """Collective: all-gather `items` and sort them by index. Every index owns the same number of items."""
    each = len(items) // max(1, len(indices))
    parts = [(index, items[i * each:(i + 1) * each]) for i, index in enumerate(indices)]
    in_order = sorted(itertools.chain(*all_gather(parts)), key=lambda part: part[0])
    return [item for _, part in in_order for item in part]


def my_share(items):
    """This rank's contiguous share of `items`; the sizes of two shares differ by at most 1."""
    if not dist.is_initialized():
        return items
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return items[len(items) * rank // ranks:len(items) * (rank + 1) // ranks]


def pad_to_longest(parts_U, filler):
    """Collective: extend this rank's list of micro-batches of each update U with `filler` to the longest list
    of any rank, so that all ranks make the same number of passes."""
    counts_U = zip(*all_gather([len(parts) for parts in parts_U]), strict=True)
    return [parts + [filler] * (max(counts) - len(parts))
            for parts, counts in zip(parts_U, counts_U, strict=True)]
