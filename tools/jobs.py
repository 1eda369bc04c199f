"""The jobs of an experiment: two at a time, each a process with one thread; killed, the same call resumes.

In:  {name: Job} and a folder. Out: what the jobs write, and in the folder

    done/NAME, logs/NAME.txt    a mark of each job that is done, and what it printed
    sittings.json               of each call of `work`, by its beginning: hours, {run: [steps before, steps
                                now]}, and {job: [processor seconds, seconds]} of the jobs that ended in it

A job that is a run of train.py has its run folder there under its name.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import namedtuple
from pathlib import Path

import torch

import train
from runtime.files import lock, read_json, write_json, write_text
from runtime.signals import Signals

AT_ONCE = 2
WATCH_S, NOTE_S = 1, 60  # how often a job looks whether its parent lives; how often progress is printed

# needs: names of the jobs that must be done before; minutes that it should take; run() -> exit status or None
Job = namedtuple("Job", "needs minutes run")


def minutes_together(jobs, done=()):
    """Minutes until all jobs are done, each started in turn when its needs are."""
    ends, lanes = dict.fromkeys(done, 0.0), [0.0] * AT_ONCE
    for name in [name for name in jobs if name not in ends]:
        lane = lanes.index(min(lanes))
        begins = max([lanes[lane], *(ends[other] for other in jobs[name].needs)])
        ends[name] = lanes[lane] = begins + jobs[name].minutes
    return max(lanes)


def rows_of(run, metric="time/step_s"):
    """The rows of metrics.jsonl that have this metric, by default those of steps; [] before the first."""
    file = Path(run) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []  # whole ones
    return [row for row in map(json.loads, lines) if metric in row]


def pace_of(c):
    """Seconds of the last step and evaluation of a short run with the Config `c`, by metric."""
    train.train(c)
    rows = rows_of(c.out)[-1] | rows_of(c.out, "time/eval_s")[-1]
    return {name: round(value, 3) for name, value in rows.items() if name.startswith("time/")}


def pace_jobs(folder, minutes, measure):
    """Jobs that write measure(i) to pace-i.json: as many as run at once, because runs slow each other."""
    return {f"pace-{i}": Job(set(), minutes, lambda i=i: write_json(folder / f"pace-{i}.json", measure(i)))
            for i in range(AT_ONCE)}


def progress(folder, name):
    """A bar of a run's steps, and what train.py printed last of them."""
    text = (folder / f"logs/{name}.txt").read_text(encoding="utf-8", errors="replace")
    *_, last = None, *re.finditer(r"^step +(\d+)/(\d+) .*", text, re.MULTILINE)
    bar = "#" * (20 * int(last[1]) // int(last[2])) if last else ""
    return f"{name:<20} [{bar:<20}] {last[0] if last else 'at work'}"


def start(folder, name, run):
    """Fork a process that does run() on one thread and ends, by SIGTERM, with its parent. Returns its id."""
    parent = os.getpid()
    (folder / f"logs/{name}.txt").touch()  # before `progress` opens it
    sys.stdout.flush()
    if pid := os.fork():
        return pid

    def watch():
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGTERM)

    status = 1
    try:
        os.setsid()  # so that Ctrl-C reaches the parent alone, which passes it on
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(folder / f"logs/{name}.txt", os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        torch.set_num_threads(1)
        threading.Thread(target=watch, daemon=True).start()
        status = run() or 0
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # never back into the code of the parent


def work(folder, jobs):
    """Do the jobs that are not done, except those that need a failed one. Returns 0, 1 if one failed, 128 +
    the number of a signal."""
    for name in ("done", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    done, running, asked = {file.name for file in (folder / "done").iterdir()}, {}, set()
    failed, spent, began, noted = [], {}, time.time(), time.time()
    before = {name: len(rows_of(folder / name)) for name in jobs}
    print(f"{len(jobs.keys() - done)} jobs left: {minutes_together(jobs, done) / 60:.1f} hours", flush=True)
    # Forked jobs inherit the lock, so that none of an earlier call is at work.
    with lock(folder), Signals() as signals:
        signals.catch()
        while True:
            waiting = [name for name in jobs if name not in {*done, *running, *failed}
                       and jobs[name].needs <= done and not signals.received()]
            if not waiting and not running:
                break
            for name in waiting[:AT_ONCE - len(running)]:
                print(f"{name}: about {jobs[name].minutes:.0f} minutes; {folder}/logs/{name}.txt", flush=True)
                running[name] = start(folder, name, jobs[name].run), time.time()
            for name in running.keys() - asked if signals.received() else ():
                asked.add(name)  # once: a run that is asked again ends without saving
                os.kill(running[name][0], signal.SIGTERM)
            for name, (pid, since) in list(running.items()):
                ended, status, usage = os.wait4(pid, os.WNOHANG)
                if ended:
                    del running[name]
                    spent[name] = [usage.ru_utime + usage.ru_stime, time.time() - since]
                    note_sitting(folder, began, before, spent)
                    if not status:
                        done.add(name)
                        write_text(folder / "done" / name, "")
                    else:
                        failed.append(name)
                    print(f"{name}: {'not finished' if status else 'done'}", flush=True)
            if time.time() - noted > NOTE_S:
                noted = time.time()
                note_sitting(folder, began, before, spent)
                print(*(progress(folder, name) for name in running), sep="\n", flush=True)
            time.sleep(0.05)
    if failed and not signals.number:
        print(f"failed: {', '.join(failed)}; see {folder}/logs; the same command resumes", file=sys.stderr)
    return 128 + signals.number if signals.number else int(bool(failed))


def note_sitting(folder, began, before, spent):
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began)) + f"{began % 1:.6f}"[1:]  # one may be short
    file = folder / "sittings.json"
    now = {name: len(rows_of(folder / name)) for name in before}
    steps = {name: [before[name], now[name]] for name in before if before[name] < now[name]}
    write_json(file, (read_json(file) if file.exists() else {}) | {
        when: {"hours": (time.time() - began) / 3600, "steps": steps, "spent": spent}})
