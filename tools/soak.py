"""Kills a short run again and again, with kill -9 at random times, and compares it with one left in peace.

    python tools/soak.py [--kills 100] [--ranks 2] [--stage grpo] [--steps 40] [--seed 0] [--out FOLDER]

Both runs get the same command; after each kill it is given again, which goes on from the newest whole
checkpoint. A kill strikes all ranks or, after the setup, one of them, and the others must then end by
themselves. One life in ten is ended in its setup, the others anywhere in rollouts, updates, evaluations and
saves. Ranks are forks of this process, so that a life starts within a second.

In the end weights, moments, the rows of metrics.jsonl (less times), rollouts/ and evals/ must be the same,
bit for bit, with no row lost or doubled. Prints one closing line; status 1 where anything differs.
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

import torch.distributed.fsdp  # noqa: E402, F401  once, and not in every life

import train  # noqa: E402
from data import write_jsonl  # noqa: E402
from tools.synthetic import synthetic  # noqa: E402

READY = "held out,"  # in the line that ends the setup
STEP = "tok/s"  # in the line of a step
PATIENCE_S = 600  # no life may take longer


def rows(run):
    """The lines of metrics.jsonl, less what a clock measured."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items()
             if not key.startswith("time/") and key != "tokens_per_s"} for line in lines]


def files(run, pattern):
    return {file.name: file.read_bytes() for file in Path(run).glob(pattern)}


def differences(run, other):
    """What two finished runs differ in, clocks aside; empty where they are the same, bit for bit."""
    found = [pattern for pattern in ("rollouts/*", "evals/*") if files(run, pattern) != files(other, pattern)]
    last = [sorted(Path(folder).glob("checkpoints/step_??????"))[-1] for folder in (run, other)]
    for pattern in ("*.safetensors", "optimizer.state"):
        found += [pattern] if files(last[0], pattern) != files(last[1], pattern) else []
    states = [json.loads((folder / "training.json").read_text(encoding="utf-8")) for folder in last]
    for key in ("step", "rows", "evaluated", "skipped_in_a_row", "dead_in_a_row", "shown"):
        found += [f"training.json: {key}"] if states[0][key] != states[1][key] else []
    # As text, in which NaN equals itself.
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
        "train.updates_per_step": 2, "rollout.n": 3, "rollout.max_new_tokens": 32, "eval.every": 5,
        "eval.max_new_tokens": 32, "grpo.kl_coef": 0.001, "checkpoint.every": 1, "checkpoint.keep": 2,
        "log.rollouts_every": 1, "train.timeout_minutes": 5,
    }
    return ["configs/demo.yaml", *(f"--{key}={value}" for key, value in settings.items())]


def start(words, ranks, log):
    """Fork the ranks of a run as torchrun would start them; the first prints to `log`. Returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    log.write_bytes(b"")
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            run_rank(words, rank, meeting if ranks > 1 else {}, log if rank == 0 else f"{log}.{rank}")
        pids.append(pid)
    return pids


def run_rank(words, rank, meeting, log):
    """In a child: run, and end it."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if meeting:
        os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank))
    status = 70
    try:
        train.main(words)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def live(words, ranks, log, rng, setup_s=math.inf, steps=math.inf, rest_s=0.0):
    """One life: kill it after setup_s, or rest_s after it told of so many steps (0: of being READY).

    Returns the seconds to READY and from there to its own end; None where it was killed, with how many steps
    it had told of, -1 for none of READY. SystemExit where it, or what a kill left of it, did not end well.
    """
    pids = start(words, ranks, log)
    began = told_s = ready_s = time.monotonic()
    told, statuses = -1, []
    while len(statuses) < ranks:
        done, status = os.waitpid(pids[len(statuses)], os.WNOHANG)
        statuses += [os.waitstatus_to_exitcode(status)] if done else []
        text, now = log.read_text(errors="replace"), time.monotonic()
        if READY in text and text.count(STEP) > told:
            ready_s = now if told < 0 else ready_s
            told, told_s = text.count(STEP), now
        if now - began > setup_s or (told >= steps and now - told_s > rest_s):
            # Who waits for ranks to come waits long; torchrun would end it.
            struck = pids if told < 0 or rng.random() < 0.5 else [rng.choice(pids)]
            end(pids[len(statuses):], struck, log)
            return None, told
        if now - began > PATIENCE_S:
            sys.exit(f"error: no end after {PATIENCE_S} s; see {log}")
        time.sleep(0.01)
    if any(statuses):
        sys.exit(f"error: statuses {statuses}\n{log.read_text(errors='replace')[-2000:]}")
    return ready_s - began, time.monotonic() - ready_s


def end(pids, struck, log):
    """Kill the struck ranks; the others must end by themselves."""
    for pid in set(struck) & set(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while pids:
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
        if time.monotonic() > deadline:
            sys.exit(f"error: a rank outlived another by a minute; see {log}")
        time.sleep(0.01)


def seconds_a_step(run, otherwise):
    """What the newest step took: the machine may have other work, now more and now less."""
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
    words = arguments(out / "undisturbed", out, args)
    setup_s, whole_s = live(words, args.ranks, out / "undisturbed.log", rng)

    kills, in_setup, rounds, found = 0, 0, 0, []
    while kills < args.kills or rounds == 0:
        rounds += 1
        run, log, ended = out / f"killed_{rounds}", out / "killed.log", False
        words = arguments(run, out, args)
        while kills < args.kills and not ended:
            if rng.random() < 0.1:
                ends_at = {"setup_s": rng.uniform(0, setup_s)}
            else:
                # So many that the kills are spread over the run, and then anywhere in a step or a bit more.
                steps = int(rng.expovariate(2 * args.kills / args.steps))
                rest_s = rng.uniform(0, 1.2) * seconds_a_step(run, whole_s / args.steps)
                ends_at = {"steps": steps, "rest_s": rest_s}
            ended, told = live(words, args.ranks, log, rng, **ends_at)
            kills += ended is None
            in_setup += ended is None and told < 0
            print(f"\rkill {kills} of {args.kills}", end="", file=sys.stderr, flush=True)
        if not ended:
            live(words, args.ranks, log, rng)
        found += [f"run {rounds}: {what}" for what in differences(run, out / "undisturbed")]
    same = (f"equal to the undisturbed one in weights, moments, {len(rows(run))} rows of metrics.jsonl, "
            "rollouts and evals")
    print(f"\r{args.stage}, ranks {args.ranks}, {kills} kills ({in_setup} in setup) in {rounds} run(s) of "
          f"{args.steps} steps, {time.monotonic() - began:.0f} s: {'; '.join(found) or same}; {out}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
