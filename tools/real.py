"""A pretrained model learns real tool calling: data, runs, evaluations and the table of `make real`.

In:  a model folder, files of examples, BFCL's data. Out: a folder of runs that is resumed when given again.

    python tools/real.py prepare OUT --model M FILE[=WEIGHT] ...   training and held-out files from any jsonl
    python tools/real.py run RUNS --model M --data OUT [--bfcl DIR] [--train.key=value ...]

tools/real_data.py prepares. run does these jobs, two at a time on one thread each, and prints their hours
before the first:

    imitation        configs/real_sft.yaml on imitation.jsonl
    trial-RATE       a few steps of GRPO from its weights
    grpo-SEED        configs/real_grpo.yaml on further.jsonl from the weights of imitation, at the best rate
    control-SEED     imitation from the same weights on the same file in the same order, for the processor
                     time of grpo-SEED
    eval-NAME        held-out examples, samples and BFCL, of each model, and of the base with and without an
                     example in its prompt

Differences are paired: the mean d over entries of the difference of right (0 or 1, a mean over seeds), ± 1.96
s / sqrt(n), stratified where a score is a mean of categories. That leaves out the variance between seeds, so
each seed has its own row.
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter, namedtuple
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, variance

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from benchmarks import bfcl, tables  # noqa: E402
from data import Chat, read_jsonl  # noqa: E402
from model import load_hf  # noqa: E402
from runtime import sharding  # noqa: E402
from runtime.files import lock, read_json, write_json, write_text  # noqa: E402
from sample import generate, prompt_seeds  # noqa: E402
from tools.demo import newest_checkpoint  # noqa: E402
from tools.real_data import SIZES, WEIGHTS, prepare  # noqa: E402

ROOT = Path(train.__file__).parent

# ---- the plan
SEEDS, TRIALS, TRIAL_STEPS, CONTROL_LR = (1, 2), (2e-5, 4e-5, 8e-5), 12, 2e-4
IMITATION_MINUTES, CHECKPOINT_MINUTES = 60, 10
GRPO_STEPS = (100, 200)  # as many as the hours allow, within these bounds
DRAWN = 2.4  # batches of prompts that a step draws, where half of the groups have spread and refill is 2
BFCL_EVERY, BFCL_TOKENS = 4, 256
NONLIVE_AST = {"simple": 1 / 12, "java": 1 / 12, "javascript": 1 / 12, "multiple": 1 / 4, "parallel": 1 / 4,
               "parallel_multiple": 1 / 4}  # the weights of the leaderboard's mean
WATCH_S = 5
Job = namedtuple("Job", "needs hours run")


def measure(plan):
    """Processor seconds here, on one thread, of a step of imitation ("sft"), a batch of rollouts, an update
    on it in which all groups have spread, and a greedy reply in fp32; "bf16": whether the others are in bf16.
    The clock would count other programs, and a plan must not depend on what runs when it is made."""
    torch.set_num_threads(1)
    c, chat = config_of(plan, "real_grpo", "pace", 0, plan["model"]), Chat(plan["model"], plan["prompt"])
    bf16, P = sharding.choose_device(c.model.precision)[1], c.train.prompts_per_step
    model = load_hf(plan["model"])
    examples = read_jsonl(Path(plan["data"]) / "further.jsonl")[:P]
    prompts, replies = [chat.encode_prompt(e) for e in examples], [chat.encode_reply(e) for e in examples]
    optimizer = train.make_optimizer(model, 0.0, 0.95)
    train.set_learning_rate(optimizer, 0.0)
    updating = {"updates": 1, "vocab_size": chat.vocab_size, "grad_clip": 1.0,
                "autocast": sharding.autocast("cpu", bf16), "micro_batch_tokens": c.train.micro_batch_tokens}
    adv_PG, rollouts = torch.tensor([[1.0, -1.0] * (c.rollout.n // 2)] * P), []

    def sample(copies, n, temperature):
        # The base does not end its replies, so they are cut at the mean length of right ones.
        return generate(model, prompts * copies, n, temperature=temperature, vocab_size=chat.vocab_size,
                        stop_ids=(), seeds_P=prompt_seeds(0, 0, 0, P * copies),
                        max_new_tokens=round(mean(map(len, replies))))

    def roll_out():
        with updating["autocast"]:
            rollouts[:] = sample(1, c.rollout.n, 1.0)

    took = {"bf16": bf16}
    for name, work in (
            ("sft", lambda: train.sft_updates(model, optimizer, prompts, replies, **updating)),
            ("rollout", roll_out),
            ("update", lambda: train.grpo_updates(model, None, optimizer, rollouts, adv_PG, temperature=1.0,
                                                  kl_coef=0.0, clip_low=0.2, clip_high=0.2, **updating)),
            ("reply", lambda: sample(4, 1, 0.0))):
        for _ in range(2):  # the first call of each is slower
            began = time.process_time()
            work()
            took[name] = (time.process_time() - began) / (4 * P if name == "reply" else 1)
    return took


def hours_together(jobs):
    """Hours until `jobs`, {name: Job}, are done, two at a time, each as soon as its needs are."""
    done, running, now = set(), {}, 0.0
    while len(done) < len(jobs):
        ready = [name for name in jobs if name not in {*done, *running} and jobs[name].needs <= done]
        running |= {name: now + jobs[name].hours for name in ready[:2 - len(running)]}
        first = min(running, key=running.get)
        now = running.pop(first)
        done.add(first)
    return now


def plan_of(plan, hours):
    """Add the steps and hours of the jobs to a plan with "pace", and print it. ValueError if the least number
    of steps takes more than `hours` of two cores."""
    pace = plan["pace"]
    sft, grpo = pace["sft"], DRAWN * pace["rollout"] + pace["update"]
    replies = SIZES["heldout"] + 9 * SIZES["sampled"] + 700 * bool(plan["bfcl"])  # BFCL's 354 are longer
    plan["every"] = {"sft": max(1, round(60 * CHECKPOINT_MINUTES / sft)),
                     "grpo": max(1, round(60 * CHECKPOINT_MINUTES / grpo))}
    for steps in range(GRPO_STEPS[1], GRPO_STEPS[0] - 1, -1):
        plan["steps"] = {"imitation": max(1, round(60 * IMITATION_MINUTES / sft)), "grpo": steps}
        seconds = {"imitation": plan["steps"]["imitation"] * sft, "trial": TRIAL_STEPS * grpo,
                   "grpo": steps * grpo, "control": steps * grpo, "eval": replies * pace["reply"]}
        plan["hours"] = {kind: value / 3600 for kind, value in seconds.items()}
        jobs = jobs_of(plan)
        total = hours_together(jobs)
        if total <= hours:
            break
    print(f"processor seconds here: a step of imitation {sft:.1f}, a batch of rollouts "
          f"{pace['rollout']:.1f}, an update {pace['update']:.1f} ({'bf16' if pace['bf16'] else 'fp32'}), a "
          f"greedy reply {pace['reply']:.2f}\nsteps: {plan['steps']}; hours: "
          + ", ".join(f"{name} {job.hours:.2f}" for name, job in jobs.items())
          + f"\nin all {total:.1f} hours of two cores, at most {hours:g}", flush=True)
    if total > hours:
        raise ValueError(f"{steps} steps of GRPO take {total:.1f} hours in all; allow them with --hours")


def jobs_of(plan):
    """{name: Job} of a plan, in the order in which they start."""
    hours, trials = plan["hours"], {f"trial-{lr:g}" for lr in TRIALS}
    runs = [f"{kind}-{seed}" for kind in ("grpo", "control") for seed in SEEDS]
    jobs = {"imitation": Job(set(), hours["imitation"], train_job)}
    jobs |= {f"eval-{name}": Job(set(), hours["eval"], eval_job) for name in ("base", "base_example")}
    jobs |= {f"trial-{lr:g}": Job({"imitation"}, hours["trial"], train_job) for lr in TRIALS}
    for name in runs:
        needs = trials if name.startswith("grpo") else {name.replace("control", "grpo")}
        jobs[name] = Job(needs, hours[name.partition("-")[0]], train_job)
    return jobs | {f"eval-{name}": Job({name}, hours["eval"], eval_job) for name in ("imitation", *runs)}


# ---- jobs, each in its own process
def config_of(plan, preset, name, seed, model, *settings):
    """The Config of a run: a preset, the paths of the plan, further settings."""
    data = Path(plan["data"])
    return train.load_config([
        str(ROOT / f"configs/{preset}.yaml"), f"--out={Path(plan['runs']) / name}", f"--model.path={model}",
        f"--seed={seed}", f"--data.train={data / 'further.jsonl'}",
        f"--data.heldout={data / 'heldout.jsonl'}", f"--data.system_prompt={plan['prompt']}",
        *settings, *plan["extra"]])


def rows_of(run):
    """The rows of a run's metrics that are of steps; [] before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}") and '"time/step_s"' in line]


def processor_s(runs, name):
    """Processor seconds of the steps of a finished run: their time by the clock, times the share of it in
    which the run's processes had a core."""
    spent = [read_json(file) for file in (runs / "spent").glob(f"{name}.*.json")]
    share = sum(each["cpu_s"] for each in spent) / sum(each["wall_s"] for each in spent)
    return share * sum(row["time/step_s"] for row in rows_of(runs / name))


def best_rate(runs):
    """The rate of TRIALS whose trial had the highest mean reward over its last half."""
    return max(TRIALS, key=lambda lr: mean(
        row["reward/mean"] for row in rows_of(runs / f"trial-{lr:g}")[-TRIAL_STEPS // 2:]))


def steps_of(plan, name):
    """The steps of a run; those of a control follow from the processor time of its GRPO."""
    runs, (kind, _, seed) = Path(plan["runs"]), name.partition("-")
    if kind == "control":
        share = processor_s(runs, f"grpo-{seed}") / processor_s(runs, "imitation")
        return max(1, round(plan["steps"]["imitation"] * share))
    return TRIAL_STEPS if kind == "trial" else plan["steps"][kind]


def train_job(plan, name):
    runs, (kind, _, which), steps = Path(plan["runs"]), name.partition("-"), steps_of(plan, name)
    stage = "grpo" if kind in ("trial", "grpo") else "sft"
    settings = {"imitation": lambda: [f"--data.train={Path(plan['data']) / 'imitation.jsonl'}"],
                "trial": lambda: [f"--train.lr={which}", "--eval.ends=false", "--eval.every=null"],
                "grpo": lambda: [f"--train.lr={best_rate(runs)}"],
                "control": lambda: [f"--train.lr={CONTROL_LR}", f"--eval.every={-(-steps // 4)}"]}[kind]()
    start = plan["model"] if kind == "imitation" else newest_checkpoint(runs / "imitation")
    return train.train(config_of(
        plan, f"real_{stage}", name, which if kind in ("grpo", "control") else 0, start,
        f"--train.steps={steps}", f"--checkpoint.every={plan['every'][stage]}", *settings))


def eval_job(plan, name):
    """Held-out examples, greedy and sampled, and BFCL. What is finished is not repeated."""
    runs, data, name = Path(plan["runs"]), Path(plan["data"]), name.removeprefix("eval-")
    model = plan["model"] if name.startswith("base") else str(newest_checkpoint(runs / name))
    prompt = str(data / "prompt_with_example.txt") if name == "base_example" else plan["prompt"]
    tokens, out = config_of(plan, "real_grpo", name, 0, model).eval.max_new_tokens, runs / "eval" / name
    for part, more in (("heldout", []), ("sampled", ["--samples", "8"])):
        if not (out / part / "scores.json").exists():
            evaluation.main([model, "--bench", "heldout", "--data", str(data / f"{part}.jsonl"), "--out",
                             str(out / part), "--system_prompt", prompt, "--max_new_tokens", str(tokens),
                             "--batch_size", "64", *more])
    if not plan["bfcl"]:
        return
    counts = bfcl.categories(plan["bfcl"])
    chosen, live = list(counts)[:7], list(counts)[7:]
    known = bfcl.load(plan["bfcl"], chosen)
    entries = [entry for category in chosen
               for entry in [entry for entry in known if entry.category == category][::BFCL_EVERY]]
    args = argparse.Namespace(model=model, data=plan["bfcl"], system_prompt=prompt, bench="bfcl",
                              paper_prompt=False, max_new_tokens=BFCL_TOKENS, batch_size=64, kernel="auto",
                              export_official=None)
    calls = evaluation.bench_calls(args, bfcl, known, entries, live, out / "bfcl")
    lines = tables.report("bfcl", entries, calls, counts, chosen, name)[2]
    write_json(out / "bfcl/scores.json", {"replies": [  # under the names of v3
        {"id": line["id"], "category": list(bfcl.V3)[chosen.index(line["category"])],
         "right": line["official"][0], "error": line["official"][1]} for line in lines]})


def start(plan, name, job):
    """Fork a process that does a job on one thread and logs to logs/NAME.txt. Returns its id. It notes its
    processor time every WATCH_S seconds, and stops as by SIGTERM when its parent has died."""
    runs, parent, began, one_writer = Path(plan["runs"]), os.getpid(), time.time(), threading.Lock()
    sys.stdout.flush()
    if pid := os.fork():
        return pid

    def note():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        with one_writer:
            write_json(runs / f"spent/{name}.{began:.0f}.{os.getpid()}.json",
                       {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": time.time() - began})

    def watch():
        while os.getppid() == parent:
            time.sleep(WATCH_S)
            note()
        os.kill(os.getpid(), signal.SIGTERM)

    status = 1
    try:
        os.setsid()  # so that Ctrl-C reaches the parent alone, which passes it on
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(runs / f"logs/{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        torch.set_num_threads(1)
        threading.Thread(target=watch, daemon=True).start()
        status = job(plan, name) or 0
        note()
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # never back into the code of the parent


def work(plan, jobs):
    """Do the jobs that are not done, two at a time. Returns 0, 1 if one failed, 128 + a signal's number."""
    runs, running, asked, stopped, failed = Path(plan["runs"]), {}, set(), [], []
    handlers = {number: signal.signal(number, lambda number, _: stopped.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    done, began, noted = {file.name for file in (runs / "done").iterdir()}, time.time(), time.time()
    first = {name: len(rows_of(runs / name)) for name in jobs}
    while running or len(done) < len(jobs) and not stopped and not failed:
        for name, job in jobs.items():
            if (len(running) < 2 and not stopped and not failed and job.needs <= done
                    and name not in {*done, *running.values()}):
                print(f"{name}: about {60 * job.hours:.0f} minutes; {runs / 'logs' / name}.txt", flush=True)
                running[start(plan, name, job.run)] = name
        for pid, name in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[pid]
                if not status:
                    done.add(name)
                    write_text(runs / "done" / name, "")
                elif not stopped:
                    failed.append(name)
                print(f"{name}: {'not finished' if status else 'done'}", flush=True)
        for pid in running.keys() - asked if stopped or failed else ():
            asked.add(pid)  # once: a run that is asked again ends without saving
            os.kill(pid, signal.SIGTERM)
        if time.time() - noted > 60 or not running:
            noted = time.time()
            note_sitting(runs, began, {name: [first[name], len(rows_of(runs / name))] for name in jobs})
            print(*(progress(plan, name) for name in running.values()), sep="\n", flush=True)
        time.sleep(0.05)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if failed:
        print(f"{failed[0]} failed, see its log; the same command resumes", file=sys.stderr)
    return 128 + stopped[0] if stopped else int(bool(failed))


def note_sitting(runs, began, spans):
    """Write to sittings.json when this process began, its hours, and {run: [steps before, steps now]}."""
    file, when = runs / "sittings.json", time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began))
    steps = {name: span for name, span in spans.items() if span[0] < span[1]}
    write_json(file, (read_json(file) if file.exists() else {})
               | {when: {"hours": (time.time() - began) / 3600, "steps": steps}})


def progress(plan, name):
    """A bar of a run's steps, its latest mean reward or loss, and the minutes that are left."""
    rows = rows_of(Path(plan["runs"]) / name)
    if not rows:
        return f"{name:<12} at work"
    steps, last = steps_of(plan, name), rows[-20:]
    what = "reward/mean" if "reward/mean" in last[0] else "loss"
    left = (steps - len(rows)) * mean(row["time/step_s"] for row in last) / 60
    return (f"{name:<12} [{'#' * (20 * len(rows) // steps):<20}] {len(rows)}/{steps}  {what} "
            f"{mean(row[what] for row in last):.3f}  {left:.0f} minutes left")


# ---- results
KINDS = (("is absent, expected", "an argument left out"), ("expected absent", "an argument too many"),
         ("the reply calls", "other tools"), (", expected ", "another value"))
BARS = (("imitation", "held out", 8), ("imitation", "BFCL AST", 5), ("control, mean", "held out", 0),
        ("control, mean", "BFCL AST", 0))  # by how many points GRPO must be above it
# What is scored: the evaluation, the weights of its categories (None: all entries), the value of a reply.
SCORES = {"held out": ("heldout", {None: 1}, lambda reply: reply["right"]),
          "mean of 8": ("sampled", {None: 1}, lambda reply: reply["samples_right"] / 8),
          "pass@8": ("sampled", {None: 1}, lambda reply: reply["samples_right"] > 0),
          "BFCL AST": ("bfcl", NONLIVE_AST, lambda reply: reply["right"]),
          "irrelevance": ("bfcl", {"irrelevance": 1}, lambda reply: reply["right"])}


def estimate(strata):
    """(mean, half a 95 % interval) in points, of [(weight, [value of each entry])] whose weights sum to 1."""
    spread = sum(w * w * variance(values) / len(values) for w, values in strata if len(values) > 1)
    return 100 * sum(w * mean(values) for w, values in strata), 196 * math.sqrt(spread)


def results(plan):
    """Write results.json and results.md from the evaluations. Returns the text of the table."""
    runs = Path(plan["runs"])
    found = {folder.name: {part.name: read_json(part / "scores.json")["replies"] for part in folder.iterdir()}
             for folder in sorted((runs / "eval").iterdir())}
    labels = [label for label, (part, _, _) in SCORES.items() if part in found["base"]]

    def strata(names, label):
        part, weights, value = SCORES[label]
        columns = list(zip(*(found[name][part] for name in names), strict=True))
        assert all(len({reply["id"] for reply in column}) == 1 for column in columns), "not the same entries"
        return [(weight, [mean(float(value(reply)) for reply in column) for column in columns
                          if category in (None, column[0]["category"])])
                for category, weight in weights.items()]

    def difference(names, others, label):
        return estimate([(weight, [x - y for x, y in zip(ours, theirs, strict=True)]) for (weight, ours), (
            _, theirs) in zip(strata(names, label), strata(others, label), strict=True)])

    seeds = {kind: [f"{kind}-{seed}" for seed in SEEDS] for kind in ("control", "grpo")}
    rows = {name: [name] for name in ("base", "base_example", "imitation", *seeds["control"], *seeds["grpo"])}
    rows |= {f"{kind}, mean": names for kind, names in seeds.items()}
    scores = {row: {label: estimate(strata(names, label)) for label in labels} for row, names in rows.items()}
    gains = {row: {label: difference(seeds["grpo"], rows[row], label) for label in labels}
             for row in ("imitation", "control, mean")}
    lines = scores | {f"grpo, mean, less {row}": cells for row, cells in gains.items()}
    text = [f"| percent ± half a 95 % interval | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|",
            *(f"| {row} | {' | '.join(f'{x:.1f} ± {half:.1f}' for x, half in cells.values())} |"
              for row, cells in lines.items()), ""]
    for row, label, bar in BARS if "bfcl" in found["base"] else BARS[::2]:
        gain = gains[row][label][0]
        text.append(f"{'reached' if gain > 0 and gain >= bar else 'MISSED'}: GRPO {gain:+.1f} points above "
                    f"{row} on {label}, asked for {bar or 'more than 0'}")
    mistakes = {name: Counter(next((kind for mark, kind in KINDS if mark in reply["error"]), "the format")
                              for reply in parts["heldout"] if not reply["right"])
                for name, parts in found.items()}
    names, both = [name for name in jobs_of(plan) if rows_of(runs / name)], zip(
        found["imitation"]["heldout"], found[seeds["grpo"][0]]["heldout"], strict=True)
    write_json(runs / "results.json", {
        "scores": scores, "gains": gains, "mistakes": mistakes, "rate": best_rate(runs), "plan": plan,
        "steps": {name: len(rows_of(runs / name)) for name in names},
        "processor_hours": {name: processor_s(runs, name) / 3600 for name in names},
        "changed": [{"query": x["query"], "answer": x["answer"], "imitation": x["reply"], "grpo": y["reply"],
                     "right": [x["right"], y["right"]]} for x, y in both if x["right"] != y["right"]]})
    write_text(runs / "results.md", "\n".join([*text, ""]))
    return "\n".join(text)


# ---- command line
def bfcl_folder(given):
    """The folder of BFCL's data: the given one, else that of the package bfcl-eval, or None."""
    package = find_spec("bfcl_eval")
    return given or (str(Path(package.submodule_search_locations[0]) / "data") if package else None)


def run(args, extra):
    """Plan, do the jobs, print the table. Returns the exit status."""
    for folder in ("done", "logs", "spent"):
        (args.runs / folder).mkdir(parents=True, exist_ok=True)
    with lock(args.runs):
        file = args.runs / "plan.json"
        plan = {"runs": str(args.runs), "model": args.model, "data": str(args.data), "extra": extra,
                "bfcl": bfcl_folder(args.bfcl), "prompt": str(args.data / "prompt.txt")}
        if not plan["bfcl"]:
            print("no data of BFCL, so no scores on it: give --bfcl DIR, or pip install --no-deps bfcl-eval")
        earlier = read_json(file) if file.exists() else {}
        if changed := [key for key in plan if earlier and earlier[key] != plan[key]]:
            raise ValueError(f"{args.runs} was planned with another {', '.join(changed)}; choose another")
        plan |= earlier
        if not earlier:
            print("measuring the time of a step, some minutes", flush=True)
            pace = args.runs / "pace.json"  # of a process that ends, and its memory with it
            pid = start(plan, "pace", lambda plan, _: write_json(pace, measure(plan)))
            if os.waitpid(pid, 0)[1]:
                raise ValueError(f"nothing could be measured; see {args.runs / 'logs/pace.txt'}")
            plan["pace"] = read_json(pace)
            plan_of(plan, args.hours)
        if args.plan:
            return 0
        write_json(file, plan)
        status = work(plan, jobs_of(plan))
        if not status:
            print(results(plan))
    return status


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making, running = commands.add_parser("prepare"), commands.add_parser("run")
    making.add_argument("out", type=Path)
    making.add_argument("files", nargs="+", metavar="FILE[=WEIGHT]")
    running.add_argument("runs", type=Path)
    running.add_argument("--data", type=Path, required=True, help="the folder that prepare made")
    running.add_argument("--bfcl", help="folder of BFCL's data (default: that of the package bfcl-eval)")
    running.add_argument("--hours", type=float, default=9.0, help="of two cores, at most (default: 9)")
    running.add_argument("--plan", action="store_true", help="measure, print the plan and end")
    for command in (making, running):
        command.add_argument("--model", required=True, help="a folder, as tools/smollm2.py makes one")
    args, extra = parser.parse_known_args(argv)
    try:
        if args.command == "run":
            sys.exit(run(args, extra))
        pairs = [file.partition("=") for file in args.files]
        prepare(args.out, args.model, {file: float(weight or WEIGHTS.get(Path(file).stem, 1))
                                       for file, _, weight in pairs})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
