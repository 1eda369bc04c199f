"""Kill a short run many times, with kill -9 at random times, and compare it with an undisturbed run.

    python tests/soak.py [--kills 100] [--ranks 2] [--stage grpo] [--steps 40] [--seed 0] [--out FOLDER]

Both runs have the same settings. After each kill the run is started again and resumes from the newest valid
checkpoint. A kill hits all ranks or, after the setup, possibly a single rank; then the other ranks must exit
without help. One start in ten is killed in its setup, the others anywhere in rollouts, updates, evaluations
and saves. Ranks are forked from this process, so that a start takes less than a second.

At the end weights, moments, the rows of metrics.jsonl (without times), rollouts/ and evals/ must be equal bit
for bit, and no row may be lost or doubled. Prints one line at the end; exit status 1 if anything differs.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch.distributed.fsdp  # noqa: E402, F401  imported once, before the forks

import train  # noqa: E402
from data import write_jsonl  # noqa: E402
from tools.synthetic import synthetic  # noqa: E402

READY = "held out,"  # in the line that is printed at the end of the setup
STEP = "tok/s"  # in the line that is printed for a step
LIMIT_S = 600  # the longest time from a start to its end


def rows(run):
    """The rows of metrics.jsonl without the times and what is computed from them."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items()
             if not key.startswith("time/") and key != "tokens_per_s"} for line in lines]


def files(run, pattern):
    return {file.name: file.read_bytes() for file in Path(run).glob(pattern)}


def differences(run, other):
    """The differences of two finished runs, times excluded; empty if the runs are equal bit for bit."""
    found = [pattern for pattern in ("rollouts/*", "evals/*") if files(run, pattern) != files(other, pattern)]
    last = [sorted(Path(folder).glob("checkpoints/step_??????"))[-1] for folder in (run, other)]
    for pattern in ("*.safetensors", "optimizer.state"):
        found += [pattern] if files(last[0], pattern) != files(last[1], pattern) else []
    states = [json.loads((folder / "training.json").read_text(encoding="utf-8")) for folder in last]
    for key in ("step", "rows", "evaluated", "skipped_in_a_row", "dead_in_a_row", "shown"):
        found += [f"training.json: {key}"] if states[0][key] != states[1][key] else []
    # Compared as text, because NaN does not equal itself.
    ours, theirs = ([json.dumps(row) for row in rows(folder)] for folder in (run, other))
    if ours != theirs:
        found.append(f"metrics.jsonl: {len(ours)} rows, {len(set(ours) - set(theirs))} of them not among the "
                     f"{len(theirs)} of the other, {len(ours) - len(set(ours))} doubled")
    return found


def arguments(folder, data, args):
    """The command line of a short run."""
    settings = {
        "out": folder, "stage": args.stage, "data.train": data / "train.jsonl",
        "data.heldout": data / "heldout.jsonl", "train.steps": args.steps, "train.prompts_per_step": 4,
        # At the demo's rate so few prompts a step let the policy collapse, which ends a run.
        "train.updates_per_step": 2, "train.lr": 5e-5, "rollout.n": 3, "rollout.max_new_tokens": 32,
        "eval.every": 5, "eval.max_new_tokens": 32, "grpo.kl_coef": 0.001, "checkpoint.every": 1,
        "checkpoint.keep": 2, "log.rollouts_every": 1, "train.timeout_minutes": 5,
    }
    return ["configs/demo.yaml", *(f"--{key}={value}" for key, value in settings.items())]


def fork_ranks(argv, ranks, log):
    """Fork the ranks of a run with torchrun's environment; rank 0 prints to `log`. Returns process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    log.write_bytes(b"")
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            run_rank(argv, rank, variables if ranks > 1 else {}, log if rank == 0 else f"{log}.{rank}")
        pids.append(pid)
    return pids


def run_rank(argv, rank, variables, log):
    """In the child process: run the training, then exit."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if variables:
        os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    status = 70
    try:
        train.main(argv)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def start(argv, ranks, log, rng, setup_s=math.inf, steps=math.inf, delay_s=0.0):
    """Start the run once. Kill it setup_s after its start, or delay_s after it has printed the lines of
    `steps` steps (0: the READY line).

    Returns (seconds to READY, seconds from there to the end), or, if it was killed, (None, the number of step
    lines in its log; -1: not even READY). SystemExit if a rank failed or did not exit in time.
    """
    pids = fork_ranks(argv, ranks, log)
    began = printed_at = ready_at = time.monotonic()
    printed, statuses = -1, []
    while len(statuses) < ranks:
        done, status = os.waitpid(pids[len(statuses)], os.WNOHANG)
        statuses += [os.waitstatus_to_exitcode(status)] if done else []
        text, now = log.read_text(errors="replace"), time.monotonic()
        if READY in text and text.count(STEP) > printed:
            ready_at = now if printed < 0 else ready_at
            printed, printed_at = text.count(STEP), now
        if now - began > setup_s or (printed >= steps and now - printed_at > delay_s):
            # In the setup a rank would wait long for a killed one; torchrun would end it.
            victims = pids if printed < 0 or rng.random() < 0.5 else [rng.choice(pids)]
            kill(pids[len(statuses):], victims, log)
            return None, printed
        if now - began > LIMIT_S:
            sys.exit(f"error: no end after {LIMIT_S} s; see {log}")
        time.sleep(0.01)
    if any(statuses):
        sys.exit(f"error: statuses {statuses}\n{log.read_text(errors='replace')[-2000:]}")
    return ready_at - began, time.monotonic() - ready_at


def kill(pids, victims, log):
    """Kill the victims; the other ranks must then exit without help."""
    for pid in set(victims) & set(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while pids:
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
        if time.monotonic() > deadline:
            sys.exit(f"error: a rank outlived another by a minute; see {log}")
        time.sleep(0.01)


def seconds_a_step(run, otherwise):
    """Seconds of the newest step, which change with the other work of the machine; `otherwise` if none."""
    with contextlib.suppress(OSError):
        for line in reversed((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)):
            if line.endswith("\n") and "time/step_s" in line:
                return json.loads(line)["time/step_s"]
    return otherwise


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", default="grpo", choices=("grpo", "sft"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--out", type=Path, help="folder of the runs and their logs; default: a new one")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    out = (args.out or Path(tempfile.mkdtemp(prefix="soak_"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "train.jsonl", synthetic(40, 0, "train"))
    write_jsonl(out / "heldout.jsonl", synthetic(6, 0, "heldout"))
    began, rng = time.monotonic(), random.Random(args.seed)
    run_argv = arguments(out / "undisturbed", out, args)
    setup_s, steps_s = start(run_argv, args.ranks, out / "undisturbed.log", rng)

    kills, in_setup, rounds, found = 0, 0, 0, []
    while kills < args.kills or rounds == 0:
        rounds += 1
        run, log, ended = out / f"killed_{rounds}", out / "killed.log", False
        run_argv = arguments(run, out, args)
        while kills < args.kills and not ended:
            if rng.random() < 0.1:
                kill_at = {"setup_s": rng.uniform(0, setup_s)}
            else:
                # The number of steps spreads the kills over the run; the delay is at most 1.2 steps.
                steps = int(rng.expovariate(2 * args.kills / args.steps))
                delay_s = rng.uniform(0, 1.2) * seconds_a_step(run, steps_s / args.steps)
                kill_at = {"steps": steps, "delay_s": delay_s}
            ended, printed = start(run_argv, args.ranks, log, rng, **kill_at)
            kills += ended is None
            in_setup += ended is None and printed < 0
            print(f"\rkill {kills} of {args.kills}", end="", file=sys.stderr, flush=True)
        if not ended:
            start(run_argv, args.ranks, log, rng)
        found += [f"run {rounds}: {what}" for what in differences(run, out / "undisturbed")]
    same = (f"equal to the undisturbed one in weights, moments, {len(rows(run))} rows of metrics.jsonl, "
            "rollouts and evals")
    print(f"\r{args.stage}, ranks {args.ranks}, {kills} kills ({in_setup} in setup) in {rounds} run(s) of "
          f"{args.steps} steps, {time.monotonic() - began:.0f} s: {'; '.join(found) or same}; {out}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
