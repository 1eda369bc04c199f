"""A pretrained model learns real tool calling: data, runs, evaluations and the table of `make real`.

In:  a model folder, examples, BFCL's data. Out: a folder of runs, resumed when given again (docs/real.md).

    python tools/real.py prepare OUT --model M FILE[=WEIGHT] ...              (tools/real_data.py)
    python tools/real.py run RUNS --model M --data OUT [--bfcl DIR] [--train.key=value ...]
"""

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, variance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from benchmarks import bfcl, tables  # noqa: E402
from reward import parse_reply  # noqa: E402
from runtime.files import read_json, write_json, write_text  # noqa: E402
from runtime.run_folder import Diverged, Stuck  # noqa: E402
from tools import report  # noqa: E402
from tools.demo import newest_checkpoint  # noqa: E402
from tools.jobs import Job, minutes_together, pace_jobs, pace_of, rows_of, work  # noqa: E402
from tools.real_data import SIZES, prepare  # noqa: E402

# ---- the plan
SEEDS, TRIALS, TRIAL_STEPS, CONTROL_LR = (1, 2), (4e-5, 8e-5, 1.6e-4), 12, 2e-4
IMITATION_MINUTES, CHECKPOINT_MINUTES = 45, 10
GRPO_STEPS = (100, 200)  # as many as the hours allow, within these bounds
DRAWN = 2.8  # batches of prompts that a step draws, where 42 % of the groups have spread and refill is 2
BFCL_EVERY, BFCL_TOKENS = 4, 256
PLANNED = ("--out", "--seed", "--model.path", "--data.train", "--data.heldout", "--data.system_prompt",
           "--train.lr", "--train.steps", "--checkpoint.every")
NONLIVE_AST = {"simple": 1 / 12, "java": 1 / 12, "javascript": 1 / 12, "multiple": 1 / 4, "parallel": 1 / 4,
               "parallel_multiple": 1 / 4}  # the weights of the leaderboard's mean


def measure(plan, i):
    """Seconds here of a step of imitation ("sft"), of one of GRPO and of a greedy reply, from short runs. The
    base does not end its replies, so they are cut at 96 tokens, which takes as long as replies of GRPO, of 65
    tokens on average and at most 130. They earn nothing, so a KL penalty makes an update of them."""
    short = ["--train.steps=2", "--rollout.refill=0", "--grpo.kl_coef=1e-3", "--eval.examples=16",
             "--rollout.max_new_tokens=96", "--eval.max_new_tokens=64"]
    sft, grpo = (pace_of(config_of(plan, f"real_{stage}", f"pace-{i}-{stage}", plan["model"], *short))
                 for stage in ("sft", "grpo"))
    return {"sft": sft["time/step_s"], "grpo": DRAWN * grpo["time/rollout_s"] + grpo["time/update_s"],
            "reply": grpo["time/eval_s"] / 16}


def plan_steps(plan, hours):
    """Add steps and minutes of the jobs to a plan with "pace". ValueError if the fewest exceed `hours`."""
    pace = plan["pace"]
    plan["every"] = {stage: max(1, round(60 * CHECKPOINT_MINUTES / pace[stage])) for stage in ("sft", "grpo")}
    imitation = max(1, round(60 * IMITATION_MINUTES / pace["sft"]))
    replies = SIZES["heldout"] + 9 * SIZES["sampled"] + 700  # BFCL's 348 are longer
    for steps in range(GRPO_STEPS[1], GRPO_STEPS[0] - 1, -1):
        plan["steps"] = {"imitation": imitation, "trial": TRIAL_STEPS, "grpo": steps}
        seconds = {"imitation": imitation * pace["sft"], "eval": replies * pace["reply"],
                   "trial": TRIAL_STEPS * pace["grpo"], "grpo": steps * pace["grpo"]}
        plan["minutes"] = {kind: round(each / 60, 1) for kind, each in seconds.items()}
        if (total := minutes_together(jobs_of(plan)) / 60) <= hours:
            break
    print(f"seconds here: {pace}\nsteps: {plan['steps']}\nminutes of a job: {plan['minutes']}\n"
          f"in all {total:.1f} hours of two cores, at most {hours:g}", flush=True)
    if total > hours:
        raise ValueError(f"{steps} steps of GRPO take {total:.1f} hours in all; allow them with --hours")


def jobs_of(plan):
    """{name: Job} of a plan, in the order in which they start."""
    jobs, trials = {}, [f"trial-{lr:g}" for lr in TRIALS]

    def add(name, *needs):
        kind = name.partition("-")[0].replace("control", "grpo")  # as long
        do = eval_job if kind == "eval" else train_job
        jobs[name] = Job({*needs}, plan["minutes"][kind], lambda: do(plan, name))

    for name in ("imitation", "eval-base", "eval-base_example"):
        add(name)
    for name in trials:
        add(name, "imitation")
    for kind, seed in itertools.product(("grpo", "control"), SEEDS):
        add(f"{kind}-{seed}", *(trials if kind == "grpo" else [f"grpo-{seed}"]))
    for name in [name for name in jobs if name.startswith(("imitation", "grpo", "control"))]:
        add(f"eval-{name}", name)
    return jobs


# ---- jobs
def config_of(plan, preset, name, model, *settings):
    """The Config of a run: a preset, the paths of the plan, further settings."""
    data = Path(plan["data"])
    return train.load_config([
        f"configs/{preset}.yaml", f"--out={Path(plan['runs']) / name}", f"--model.path={model}",
        f"--data.train={data / 'further.jsonl'}", f"--data.heldout={data / 'heldout.jsonl'}",
        f"--data.system_prompt={plan['prompt']}", *settings, *plan["extra"]])


def processor_s(runs, name, of=sum):
    """Processor seconds of a run's steps, or of the median step: clock seconds × processor / clock time."""
    sittings = [sitting["spent"] for sitting in read_json(runs / "sittings.json").values()]
    if not (spent := [sitting[name] for sitting in sittings if name in sitting]):
        raise ValueError(f"{runs / 'sittings.json'}: no time of {name}; restore the file")
    cpu, clock = map(sum, zip(*spent, strict=True))
    return cpu / clock * of(row["time/step_s"] for row in rows_of(runs / name))


def earned(runs, lr):
    """The mean rewards of the last half of a trial's steps; a collapsed one lacks steps."""
    return [row["reward/mean"] for row in rows_of(runs / f"trial-{lr:g}")[TRIAL_STEPS // 2:]]


def best_rate(runs):
    """The rate of TRIALS whose trial earned most over its last half."""
    return max(TRIALS, key=lambda lr: sum(earned(runs, lr)))


def train_job(plan, name):
    """A run of train.py. Steps of a control: processor time of its GRPO / imitation's median step."""
    runs, (kind, _, which), steps = Path(plan["runs"]), name.partition("-"), plan["steps"]
    stage = "grpo" if kind in ("trial", "grpo") else "sft"
    if kind == "control":
        steps = {kind: max(1, round(processor_s(runs, f"grpo-{which}")
                                    / processor_s(runs, "imitation", median)))}
    more = {"imitation": lambda: [f"--data.train={Path(plan['data']) / 'imitation.jsonl'}"],
            "trial": lambda: [f"--train.lr={which}", "--eval.ends=false", "--eval.every=null"],
            "grpo": lambda: [f"--train.lr={best_rate(runs)}", f"--seed={which}"],
            "control": lambda: [f"--train.lr={CONTROL_LR}", f"--seed={which}"]}[kind]()
    start = plan["model"] if kind == "imitation" else newest_checkpoint(runs / "imitation")
    try:
        return train.train(config_of(plan, f"real_{stage}", name, start, f"--train.steps={steps[kind]}",
                                     f"--checkpoint.every={plan['every'][stage]}", *more))
    except (Diverged, Stuck) as error:  # a rate at which the policy collapses is a result of a trial
        print(f"error: {error}")
        return 0 if kind == "trial" else error.status


def eval_job(plan, name):
    """Held-out examples, greedy and sampled, and BFCL. What is finished is not repeated."""
    runs, data, name = Path(plan["runs"]), Path(plan["data"]), name.removeprefix("eval-")
    model = plan["model"] if name.startswith("base") else str(newest_checkpoint(runs / name))
    prompt = str(data / "prompt_with_example.txt") if name == "base_example" else plan["prompt"]
    tokens, out = config_of(plan, "real_grpo", name, model).eval.max_new_tokens, runs / "eval" / name
    for part, more in (("heldout", ["--batch_size=64"]), ("sampled", ["--batch_size=64", "--samples=8"])):
        if not (out / part / "scores.json").exists():
            evaluation.main([model, "--bench=heldout", f"--data={data / part}.jsonl", f"--out={out / part}",
                             f"--system_prompt={prompt}", f"--max_new_tokens={tokens}", *more])
    counts = bfcl.categories(plan["bfcl"])
    chosen, live = list(counts)[:7], list(counts)[7:]
    known = bfcl.load(plan["bfcl"], chosen)
    entries = [e for name in chosen for e in [e for e in known if e.category == name][::BFCL_EVERY]]
    args = argparse.Namespace(model=model, data=plan["bfcl"], system_prompt=prompt, bench="bfcl",
                              paper_prompt=False, max_new_tokens=BFCL_TOKENS, batch_size=64, kernel="auto",
                              export_official=None)
    calls = evaluation.bench_calls(args, bfcl, known, entries, live, out / "bfcl")
    lines = tables.report("bfcl", entries, calls, counts, chosen, name)[2]
    write_json(out / "bfcl/scores.json", {"replies": [  # under the names of v3
        {"id": line["id"], "category": list(bfcl.V3)[chosen.index(line["category"])],
         "right": line["official"][0], "error": line["official"][1]} for line in lines]})


# ---- results
BARS = (("imitation", "held out", 8), ("imitation", "BFCL AST", 5), ("control, mean", "held out", 0),
        ("control, mean", "BFCL AST", 0))  # by how many points GRPO must be above it
# What is scored: the evaluation, the weights of its categories ("" is all of them), the value of a reply.
SCORES = {"held out": ("heldout", {"": 1}, lambda reply: reply["right"]),
          "mean of 8": ("sampled", {"": 1}, lambda reply: reply["samples_right"] / 8),
          "pass@8": ("sampled", {"": 1}, lambda reply: reply["samples_right"] > 0),
          "BFCL AST": ("bfcl", NONLIVE_AST, lambda reply: reply["right"]),
          "BFCL irrelevance": ("bfcl", {"irrelevance": 1}, lambda reply: reply["right"])}


def estimate(strata):
    """(mean, half a 95 % interval) in points, of [(weight, [value of each entry])] whose weights sum to 1."""
    spread = sum(w * w * variance(values) / len(values) for w, values in strata if len(values) > 1)
    return 100 * sum(w * mean(values) for w, values in strata), 196 * math.sqrt(spread)


def part_of(reply):
    """The category of BFCL, the source of a held-out example: joined and irrelevance are one each."""
    return reply["category"].split("/")[0]


def mistake(reply):
    """The kind of a wrong reply: its format, the number of its calls, their tools, their arguments."""
    if not reply["format_ok"]:
        return "the format"
    calls, answer = ([json.dumps([call["name"], call["arguments"]], sort_keys=True) for call in each]
                     for each in (parse_reply(reply["reply"])[0], reply["answer"]))
    if len(calls) != len(answer):
        return ("a call where no tool fits" if not answer else "no call" if not calls else
                "too few calls" if len(calls) < len(answer) else "too many calls")
    rest = (map(json.loads, sorted((Counter(a) - Counter(b)).elements()))  # less the equal calls, by tool
            for a, b in ((calls, answer), (answer, calls)))
    pairs = [(set(given), set(asked)) for (_, given), (_, asked) in zip(*rest, strict=True)]
    return ("another tool" if not reply["names_ok"] else
            "an argument left out" if any(asked - given for given, asked in pairs) else
            "an argument too many" if any(given - asked for given, asked in pairs) else "another value")


def table(scores, labels):
    """Markdown: a row for each of scores, a column for each of labels."""
    return [f"| percent ± half a 95 % interval | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|",
            *(f"| {row} | {' | '.join('{:.1f} ± {:.1f}'.format(*cells[label]) for label in labels)} |"
              for row, cells in scores.items()), ""]


def results(plan):
    """Write results.json and results.md from the evaluations. Returns the text of the tables."""
    runs = Path(plan["runs"])
    found = {folder.name: {part.name: read_json(part / "scores.json")["replies"] for part in folder.iterdir()}
             for folder in sorted((runs / "eval").iterdir())}
    categories = {f"BFCL {each}": ("bfcl", {each: 1}, SCORES["BFCL AST"][2]) for each in NONLIVE_AST}
    n = Counter(sorted(map(part_of, found["imitation"]["heldout"])))  # a source below 5 % has no column
    sources = {each: ("heldout", {each: 1}, SCORES["held out"][2]) for each in n if 20 * n[each] >= n.total()}
    columns = SCORES | categories | sources

    def score(label, names, others=()):
        """The mean over `names`, less that over `others`, paired by entry."""
        (part, weights, value), each = columns[label], (*names, *others)
        shares = [1 / len(names) for _ in names] + [-1 / len(others) for _ in others]
        entries = list(zip(*(found[name][part] for name in each), strict=True))
        assert all(len({reply["id"] for reply in entry}) == 1 for entry in entries), "not the same entries"
        return estimate([(weight, [sum(map(lambda s, reply: s * value(reply), shares, entry))
                                   for entry in entries if category in ("", part_of(entry[0]))])
                         for category, weight in weights.items()])

    seeds = {kind: [f"{kind}-{seed}" for seed in SEEDS] for kind in ("control", "grpo")}
    rows = {name: [[name]] for name in ("base", "base_example", "imitation", *sum(seeds.values(), []))}
    rows |= {f"{kind}, mean": [names] for kind, names in seeds.items()}
    rows |= {f"grpo, mean, less {row}": [seeds["grpo"], *rows[row]] for row in ("imitation", "control, mean")}
    scores = {row: {label: score(label, *names) for label in columns} for row, names in rows.items()}
    text = [*table(scores, SCORES), *table(scores, categories), *table(scores, sources)]
    for row, label, bar in BARS:
        gain, half = scores[f"grpo, mean, less {row}"][label]
        text.append(f"{'reached' if gain > 0 and gain >= bar else 'MISSED'}: GRPO {gain:+.1f} ± {half:.1f} "
                    f"points above {row} on {label}, asked for {bar or 'more than 0'}")
    hours = {name: processor_s(runs, name) / 3600 for name in jobs_of(plan) if rows_of(runs / name)}
    trials = {f"{lr:g}": earned(runs, lr) for lr in TRIALS}
    text += ["processor hours: " + ", ".join(f"{name} {spent:.2f}" for name, spent in hours.items()),
             "mean rewards of the last half of the steps of the trials: " + ", ".join(
                 f"{lr}: {' '.join(f'{x:.2f}' for x in rewards)}" for lr, rewards in trials.items())]
    report.main([*(str(runs / name) for name in hours), f"--out={runs / 'report.html'}"])
    both = zip(found["imitation"]["heldout"], found[seeds["grpo"][0]]["heldout"], strict=True)
    write_json(runs / "results.json", {
        "scores": scores, "rate": best_rate(runs), "trials": trials, "processor_hours": hours,
        "mistakes": {name: Counter(mistake(reply) for reply in evaluated["heldout"] if not reply["right"])
                     for name, evaluated in found.items()},
        "curves": {name: [[row["step"], row["eval/all"]] for row in rows_of(runs / name, "eval/all")]
                   for name in hours}})
    changed = {"replies": [x | {"grpo": y["reply"]} for x, y in both if x["right"] != y["right"]]}
    write_json(runs / "changed.json", changed)  # the records too, which results.json has not
    write_text(runs / "results.md", "\n".join([*text, ""]))
    return "\n".join(text)


# ---- command line
def run(args, extra):
    """Plan, do the jobs, print the table. Returns the exit status."""
    if fixed := [word for word in extra if word.startswith(PLANNED)]:
        raise ValueError(f"{' '.join(fixed)}: the plan sets this itself; remove it")
    package, file = find_spec("bfcl_eval"), args.runs / "plan.json"
    packaged = package and str(Path(package.submodule_search_locations[0]) / "data")
    plan = {"runs": str(args.runs), "model": args.model, "data": str(args.data), "extra": extra,
            "bfcl": args.bfcl or packaged, "prompt": str(args.data / "prompt.txt")}
    if not plan["bfcl"]:
        raise ValueError("no data of BFCL: give --bfcl DIR, or pip install --no-deps bfcl-eval")
    earlier = read_json(file) if file.exists() else {}
    if changed := [key for key in plan if earlier and earlier[key] != plan[key]]:
        raise ValueError(f"{args.runs} was planned with another {', '.join(changed)}; choose another")
    plan |= earlier
    if "steps" not in plan:
        write_json(file, plan)
        # In other processes, because their memory ends with them.
        if status := work(args.runs, pace_jobs(args.runs, 5, lambda i: measure(plan, i))):
            return status
        plan["pace"] = read_json(args.runs / "pace-0.json")
        plan_steps(plan, args.hours)
        write_json(file, plan)
    if not (status := work(args.runs, jobs_of(plan))):
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
    running.add_argument("--hours", type=float, default=10.0, help="of two cores, at most (default: 10)")
    for command in (making, running):
        command.add_argument("--model", required=True, help="a folder, as tools/smollm2.py makes one")
    args, extra = parser.parse_known_args(argv)
    try:
        if args.command == "run":
            sys.exit(run(args, extra))
        if extra:
            raise ValueError(f"prepare has no option {' '.join(extra)}")
        prepare(args.out, args.model, args.files)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
