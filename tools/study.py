"""The paper's comparisons in the world of the demo: `make study`.

In:  configs/study.yaml, which fixes arms, steps and seeds; the presets of the demo. Out: in RUNS a run folder
for each arm and seed, a page of tools/report.py for each table; tools/results/study.json, docs/study.md.

    python tools/study.py RUNS [--quick]    --quick: less, as study.yaml says; the results stay in RUNS/quick
    python tools/study.py                   docs/study.md from tools/results/study.json

Runs are jobs of tools/jobs.py: given again, the command resumes between and inside runs. Accuracies are
percentages of held-out queries whose greedy reply earns the binary reward, whatever the reward of an arm.

    of an arm      mean ± t s / √S over its S seeds, with Student's t at 95 %
    of two arms    mean of the differences paired by seed and query, ± √(a² + b²): a over seeds, b over
                   queries, by frame (tools/demo.py). Noise of a query in a seed is in a and in b, so the
                   interval covers more than 95 %.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
from hashlib import sha256
from pathlib import Path
from statistics import mean

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from data import mask_names, write_jsonl  # noqa: E402
from reward import score  # noqa: E402
from runtime.files import read_json, write_text  # noqa: E402
from runtime.run_folder import Diverged, Stuck, read_evaluations  # noqa: E402
from tools import report  # noqa: E402
from tools.demo import by_frame, interval, minutes, over_seeds  # noqa: E402
from tools.jobs import Job, pace_jobs, pace_of, rows_of, work  # noqa: E402
from tools.make_base import lazy  # noqa: E402
from tools.synthetic import HELDOUT, synthetic  # noqa: E402

SPEC, RESULTS, PAGE = map(Path, ("configs/study.yaml", "tools/results/study.json", "docs/study.md"))
PRESETS = {"grpo": "configs/demo.yaml", "sft": "configs/demo_control.yaml"}
RIGHT, CALLS_RIGHT, WRONG = "2", "1", "0"  # a held-out reply: by the binary reward, by its calls alone, else
MASKED = 0.67  # share of the examples, as in the paper's code
WORLD_SEED = 3  # of all examples: on seed 0 the learning rates were chosen, on seed 1 the base was


def digest(text):
    """Of a study.yaml without its prose, which may be changed after the first run."""
    spec = yaml.safe_load(text) | {"about": None}
    for table in spec["tables"].values():
        table["notes"] = None
    return sha256(json.dumps(spec).encode()).hexdigest()[:12]


def read_spec(quick=False):
    """configs/study.yaml, or what --quick takes of it. Adds "runs": {run: (arm, seed)}, seed by seed, and the
    steps of each arm."""
    text = SPEC.read_text(encoding="utf-8")
    spec = yaml.safe_load(text) | {"digest": digest(text)}
    if quick:
        short = spec["quick"]
        spec["tables"] = {name: spec["tables"][name] | {"seeds": short["seeds"]} for name in short["tables"]}
        spec |= {key: short[key] for key in ("steps", "examples", "heldout")}
    for arm in spec["arms"].values():
        arm["steps"] = spec["steps"] // (2 if arm["data"].endswith(("_first", "_second")) else 1)
    tables = spec["tables"].values()
    spec["runs"] = {f"{arm}-{seed}": (arm, seed) for seed in range(max(table["seeds"] for table in tables))
                    for table in tables if seed < table["seeds"] for arm in table["arms"]}
    return spec


# ---- runs
def write_data(spec, folder):
    """Write a copy of study.yaml and the files that arms name by `data`; heldout.jsonl last."""
    write_text(folder / "study.yaml", SPEC.read_text(encoding="utf-8"))
    n, rng = spec["examples"], random.Random(0)
    pool = synthetic(4 * n, WORLD_SEED, "train")  # half of it are single calls
    single = [example for example in pool if example.source.endswith("/single")][:n]
    files = {"right": pool[:n], "calls": [dataclasses.replace(e, reasoning=None) for e in pool[:n]],
             "lazy": [lazy(example, rng) for example in pool[:n]], "single": single,
             "single_none": [e for e in pool if not e.source.endswith("/two_calls")][:n],
             "single_masked": mask_names(single, MASKED, 0)}
    for name in ("right", "calls"):
        files |= {f"{name}_first": files[name][:n // 2], f"{name}_second": files[name][n // 2:]}
    for name, examples in (files | {"heldout": synthetic(spec["heldout"], WORLD_SEED, "heldout")}).items():
        write_jsonl(folder / f"{name}.jsonl", examples)


def words(spec, arm, seed, runs):
    """The command line of train.py for a run."""
    it = spec["arms"][arm]
    settings = {"out": f"{runs}/{arm}-{seed}", "seed": seed, "data.train": f"{runs}/data/{it['data']}.jsonl",
                "data.heldout": f"{runs}/data/heldout.jsonl", "train.steps": it["steps"],
                "eval.examples": spec["heldout"], **spec["settings"], **it.get("settings", {})}
    if start := it.get("from"):
        settings["model.path"] = f"{runs}/{start}-{seed}/checkpoints/step_{spec['arms'][start]['steps']:06d}"
    return [PRESETS[it["stage"]], *(f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
                                    for key, value in settings.items())]


def measure(spec, runs, i):
    """{stage: seconds of a step and of an evaluation} here, of the second of two steps."""
    return {stage: pace_of(train.load_config([*words(spec, arm, 0, runs), f"--out={runs}/pace-{i}-{stage}",
                                              "--train.steps=2"]))
            for arm, stage in (("rl", "grpo"), ("right", "sft"))}


def run_arm(given):
    """Train as a command line says. A run that stops because it cannot learn any more is a result: its newest
    checkpoint is evaluated. Returns the exit status."""
    c = train.load_config(given)
    try:
        return train.train(c)
    except (Diverged, Stuck) as stopped:
        print(stopped)
        return train.train(train.load_config([*given, "--train.max_minutes=1e-6"]))  # over as soon as resumed


def jobs_of(spec, runs, pace):
    """{name: Job} of all runs. A step of GRPO has as many replies in every arm, times draws of a refill."""
    jobs = {}
    for run, (arm, seed) in spec["runs"].items():
        it, given = spec["arms"][arm], words(spec, arm, seed, runs)
        steps = it["steps"] * (1 + it.get("settings", {}).get("rollout.refill", 0))
        seconds = steps * pace[it["stage"]]["time/step_s"] + 2 * pace[it["stage"]]["time/eval_s"]
        needs = {f"{it['from']}-{seed}"} if "from" in it else set()
        jobs[run] = Job(needs, seconds / 60, lambda given=given: run_arm(given))
    return jobs


# ---- results
def verdict(line):
    found = score(line["reply"], line["answer"])
    return RIGHT if found.reward == 1 else CALLS_RIGHT if found.calls_ok else WRONG


def collect(spec, runs):
    """What the page is computed from. Of each run: the verdicts on the held-out queries, a digit each; the
    examples drawn, the minutes, the percentages of groups with spread and of clipped tokens; of the replies
    sampled at the steps that kept them, the percentages in the right format, right, and with right calls."""
    found = {"spec": digest((runs / "data/study.yaml").read_text(encoding="utf-8")), "queries": None,
             "base": None, "runs": {}}
    for name, (arm, _) in spec["runs"].items():
        run, rows, it = runs / name, rows_of(runs / name), spec["arms"][arm]
        first, *_, last = read_evaluations(run)
        queries = [f"{reply['category']} {reply['id'].rsplit('/', 1)[-1]}" for reply in last["replies"]]
        if found["queries"] not in (None, queries):
            raise ValueError(f"{run}: evaluated on other queries than other runs; choose a new folder")
        found["queries"] = queries
        if "from" not in it:
            found["base"] = "".join(map(verdict, first["replies"]))
        sampled, shares = {}, {"spread": [row["reward/live"] for row in rows if "reward/live" in row]}
        shares["clipped"] = [r["ratio/clip_low"] + r["ratio/clip_high"] for r in rows if "ratio/mean" in r]
        for file in sorted(run.glob("rollouts/step_*.jsonl")):
            verdicts = [score(line["reply"], line["answer"])  # there is no reply in those of a skipped update
                        for line in map(json.loads, file.open()) if "reply" in line]
            if verdicts:
                sampled[file.stem[-6:]] = [round(100 * mean(getattr(v, key) == 1 for v in verdicts), 1)
                                           for key in ("format_ok", "reward", "calls_ok")]
        found["runs"][name] = {
            "right": "".join(map(verdict, last["replies"])), "steps": last["step"],
            "examples": round(rows[-1]["epoch"] * spec["examples"] * it["steps"] / spec["steps"]),
            "minutes": round(minutes(run)[1], 2), "sampled": sampled,
            **{key: round(100 * mean(each), 1) if each else None for key, each in shares.items()}}
    for key in ("hardware", "git_revision"):
        found[key] = sorted({(runs / name / f"{key}.txt").read_text().strip() for name in spec["runs"]})
    return found


def percent(found, marks, part, least=RIGHT):
    """Of the queries of a split, of a kind, or of "all"."""
    return 100 * mean(mark >= least for mark, query in zip(marks, found["queries"], strict=True)
                      if part == "all" or part in query.split()[0].split("/"))


def difference(found, ours, theirs, least=RIGHT):
    """(mean, half of the 95 % interval) in points of two arms, whose verdicts are given by seed."""
    rows = [[100 * ((a >= least) - (b >= least)) for a, b in zip(*pair, strict=True)]
            for pair in zip(ours, theirs, strict=True)]
    seeds, queries = list(map(mean, rows)), list(map(mean, zip(*rows, strict=True)))
    frames = [query.split()[-1] for query in found["queries"]]
    return mean(seeds), math.hypot(over_seeds(seeds), by_frame(frames, queries))


def only_format_rose(sampled):
    """Whether the format of sampled replies rose over the steps and the share right by less than 5 points, by
    intervals over seeds, of which there must be two. sampled: {step: [format, right…]} of each run."""
    form, right = ([each[max(each)][i] - each[min(each)][i] for each in sampled] for i in (0, 1))
    return len(sampled) > 1 and mean(form) > over_seeds(form) and mean(right) + over_seeds(right) < 5


def findings(found, table):
    """A sentence on each comparison of a table, and the smallest observed differences that it could show."""
    halves = []
    for arm, other, claim in table["findings"]:
        ours, theirs = ([found["runs"][f"{each}-{seed}"]["right"] for seed in range(table["seeds"])]
                        for each in (arm, other))
        both = [difference(found, ours, theirs, least) for least in (RIGHT, CALLS_RIGHT)]
        halves += [half for _, half in both]
        said, by_calls = ("**{}**, {:+.1f} ± {:.1f} points".format(
            "seen" if d > half else "the opposite is seen" if d < -half else "no difference seen", d, half)
            for d, half in both)
        yield f"- {claim}: {said}{f'; by calls {by_calls}' * (by_calls != said)}."
    yield f"\nThe smallest difference that is seen is its ±: {min(halves):.1f} to {max(halves):.1f} points."


def table_lines(spec, found, table):
    """A table, what its runs were, and what was sampled."""
    says = {arm: it["says"] for arm, it in spec["arms"].items()}
    runs = {arm: [found["runs"][f"{arm}-{seed}"] for seed in range(table["seeds"])] for arm in table["arms"]}
    marks = {arm: [run["right"] for run in each] for arm, each in runs.items()}
    parts = [*HELDOUT, *sorted({query.split()[0].split("/")[1] for query in found["queries"]}), "all"]
    columns, reference = [*((part, RIGHT) for part in parts), ("all", CALLS_RIGHT)], table["arms"][0]
    yield (f"| | paper | {' | '.join(parts).replace('_', ' ')} | all, by calls | less {says[reference]} |\n"
           f"{'|---' * (len(columns) + 3)}|")
    for arm, by_seed in {"base": [found["base"]], **marks}.items():
        cells = [interval([percent(found, each, *column) for each in by_seed]) for column in columns]
        cells.append("" if arm in ("base", reference) else
                     "{:+.1f} ± {:.1f}".format(*difference(found, by_seed, marks[reference])))
        short = [str(run["steps"]) for run in runs.get(arm, ()) if run["steps"] < spec["arms"][arm]["steps"]]
        note = f" (stopped at step {', '.join(short)})" if short else ""
        yield f"| {says.get(arm, arm)}{note} | {table['paper'].get(arm, '')} | {' | '.join(cells)} |"
    yield ("\n| last stage | all, by seed | drawn | groups with spread, % | clipped tokens, % | minutes |\n"
           f"{'|---' * 6}|")
    for arm, each in runs.items():
        drawn, spent = (mean(run[key] for run in each) for key in ("examples", "minutes"))
        spread, clipped = ("" if None in (had := [run[key] for run in each]) else f"{mean(had):.{digits}f}"
                           for key, digits in (("spread", 0), ("clipped", 1)))
        seeds = ", ".join(f"{percent(found, run['right'], 'all'):.1f}" for run in each)
        yield f"| {says[arm]} | {seeds} | {drawn:.0f} | {spread} | {clipped} | {spent:.1f} |"
    if "samples" in table:
        yield f"\n{table['samples']}\n"
    for arm in [arm for arm in runs if "samples" in table and runs[arm][0]["sampled"]]:
        sampled = [{int(step): shares for step, shares in run["sampled"].items()} for run in runs[arm]]
        form, right, calls = (", ".join(
            f"{mean(each[step][i] for each in sampled if step in each):.0f}"
            for step in sorted(set().union(*sampled))) for i in range(3))
        hacked = "; **only the format rose**" * only_format_rose(sampled)
        yield f"- {says[arm]}: format {form}; right calls {calls}; both {right}{hacked}"


def page(spec, found):
    """docs/study.md as text. found: of `collect`."""
    lines = ["# The study", "", "<!-- written by tools/study.py, whose head has the formulas -->",
             *(f"{paragraph}\n" for paragraph in spec["about"][:3])]
    hours = sum(run["minutes"] for run in found["runs"].values()) / 60
    when = "fixed before" if found["spec"] == spec["digest"] else "**changed after**"
    machines, code = map(", ".join, (found["hardware"], found["git_revision"]))
    lines += [f"{len(found['runs'])} runs, {hours:.1f} hours of one thread; {machines}; code {code}. "
              f"Arms, steps and seeds were {when} the first run.", "", "## What is seen"]
    for table in spec["tables"].values():
        lines += ["", f"**{table['title']}**", "", *findings(found, table)]
    for table in spec["tables"].values():
        lines += ["", f"## {table['title']}", "", f"{table['seeds']} seed{'s' * (table['seeds'] > 1)}, "
                  f"{spec['heldout']} held-out queries, percent right; paper: average on BFCL.", "",
                  *table_lines(spec, found, table), "", *(f"- {note}" for note in table.get("notes", ()))]
    lines += ["", "## How it was made", "", *(f"{paragraph}\n" for paragraph in spec["about"][3:]),
              "`tools/study.py` writes RUNS/data before the first run. The commands:", "", "```"]
    for arm in dict.fromkeys(arm for arm, _ in spec["runs"].values()):
        lines += [f"# {spec['arms'][arm]['says']}",
                  f"python train.py {' '.join(words(spec, arm, 'SEED', 'RUNS'))}"]
    return "\n".join([*lines, "```", ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", help="their folder; without it, the page is written")
    parser.add_argument("--quick", action="store_true", help="less, as `quick` in study.yaml says")
    args = parser.parse_args(argv)
    spec = read_spec(args.quick)
    try:
        if not args.runs:
            return write_text(PAGE, page(spec, read_json(RESULTS)))
        runs = (args.runs / "quick" if args.quick else args.runs).resolve()  # train.py refuses another path
        if not (runs / "data/heldout.jsonl").exists():
            write_data(spec, runs / "data")
        if status := work(runs, pace_jobs(runs, 2, lambda i: measure(spec, runs, i))) or (
                work(runs, jobs_of(spec, runs, read_json(runs / "pace-0.json")))):
            sys.exit(status)
        found = collect(spec, runs)
        text, numbers = page(spec, found), json.dumps(found).replace("}}, ", "}},\n") + "\n"  # a line a run
        for results, shown in ((runs / "study.json", runs / "study.md"), (RESULTS, PAGE))[:2 - args.quick]:
            write_text(results, numbers)
            write_text(shown, text)
        for name, table in spec["tables"].items():
            folders = [str(runs / f"{arm}-{seed}") for arm in table["arms"] for seed in range(table["seeds"])]
            report.main([*folders, f"--out={runs / name}.html"])
        print(text.partition("\n## How")[0])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
