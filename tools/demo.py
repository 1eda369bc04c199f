"""The judge and the controls of the demo: does GRPO achieve what imitation does not?

In:  run folders of configs/demo.yaml, made by `make demo`. Out: verdicts, tables, an exit status.

    python tools/demo.py judge RUN      compare the gains of RUN with the bars below; status 1 if one fails
    python tools/demo.py control RUN [--arms ARM…]    train the base of RUN by imitation; the first arm below
    python tools/demo.py table RUN...   base, arms and GRPO by split and kind, over the seeds of the RUNs
    python tools/demo.py curves RUN...  accuracy over the steps, of RUNs with evaluations at the same steps

An arm has the base, the seed and the queries of RUN; what it is shown is in ARMS. Accuracies are greedy, in
percent of the held-out queries of a category, which is named split/kind. pass@8 is the percentage of queries
for which one of 8 replies at temperature 1 is right: what GRPO can amplify. `table` and `curves` write to
tools/results/demo.json.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from statistics import mean, stdev

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from data import Chat, read_jsonl, write_jsonl  # noqa: E402
from eval import by_category, evaluate_samples, summarize_samples  # noqa: E402
from model import load_hf  # noqa: E402
from runtime.files import read_json, write_json  # noqa: E402
from runtime.run_folder import read_evaluations  # noqa: E402
from tools.make_base import lazy  # noqa: E402

RESULTS = "tools/results/demo.json"
GAINS = {"values": 25, "paraphrases": 15, "tools": 25}  # points that each split must gain
LEAST = 65  # percent that every kind of query must reach on new values
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # Student's t at 95 %, 1 to 8 degrees

# What each arm is shown: replies of the lazy teacher, right replies (the answers that the reward checks, with
# the reasoning line), or right calls after an empty line. For how long: the minutes of the GRPO run's steps,
# half of them and then GRPO for the other half, or the very queries of these steps, once each.
ARMS = {"right": ("right", "minutes", "imitation of right replies, same minutes"),
        "right_once": ("right", "queries", "imitation of right replies, same queries"),
        "calls": ("calls", "minutes", "imitation of right calls without reasoning, same minutes"),
        "calls_once": ("calls", "queries", "imitation of right calls without reasoning, same queries"),
        "lazy": ("lazy", "minutes", "more imitation of the lazy teacher, same minutes"),
        "then_grpo": ("right", "half", "imitation of right replies, then GRPO, half of the minutes each")}


def evaluations(run):
    """The evaluations of a run in order, each {category: percent}. ValueError if there are fewer than two."""
    reports = read_evaluations(run)
    if len(reports) < 2:
        raise ValueError(f"{run}: {len(reports)} evaluations, not a first and a last; has the run finished?")
    return [{row["category"]: 100 * row["accuracy"] for row in report["rows"]} for report in reports]


def minutes(run):
    """(minutes of training steps, minutes of training steps and evaluations) of a run."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = sum(line.get("time/step_s", 0) for line in lines) / 60
    return steps, steps + sum(line.get("time/eval_s", 0) for line in lines) / 60


def judge(before, after, gains, least):
    """The verdict on a run: a list of (requirement, result, whether it passes)."""
    found = [(f"gains {bar} points or more on new {split}", f"{after[split] - before[split]:+.1f}",
              after[split] - before[split] >= bar) for split, bar in gains.items()]
    kinds = {name: accuracy for name, accuracy in after.items() if "/" in name}
    worst = min((name for name in kinds if name.startswith("values/")), key=kinds.get)
    found.append((f"every kind of query reaches {least} % on new values", f"{worst} {kinds[worst]:.1f} %",
                  kinds[worst] >= least))
    change = {name: accuracy - before[name] for name, accuracy in kinds.items()}
    lost = min(change, key=change.get)
    found.append(("no kind of query is worse than before", f"{lost} {change[lost]:+.1f}", change[lost] >= 0))
    return found


def control(run, arms, extra):
    """Train the base of `run` by imitation, with its seed, once for each of `arms`; print all results. An arm
    that has finished is not repeated."""
    config = yaml.safe_load((Path(run) / "config.yaml").read_text())
    for arm in arms:
        shown, amount, _ = ARMS[arm]
        spent = minutes(run)[0] / (2 if amount == "half" else 1)
        timed = ["--train.schedule=cosine_time", f"--train.max_minutes={spent}"]
        length = timed if amount != "queries" else [f"--train.steps={config['train']['steps']}"]
        out = folder_of(run, f"{arm}-first" if amount == "half" else arm)
        common = [f"--seed={config['seed']}", f"--data.heldout={config['data']['heldout']}", *extra]
        data = write_replies(config["data"]["train"], shown)
        start(["configs/demo_control.yaml", f"--out={out}", f"--model.path={config['model']['path']}",
               f"--data.train={data}", *length, *common])
        if amount == "half":
            start(["configs/demo.yaml", f"--out={folder_of(run, arm)}", f"--data.train={data}",
                   f"--model.path={newest_checkpoint(out)}", *timed, *common])
    before, *_, after = evaluations(run)
    ends = {arm: evaluations(folder_of(run, arm))[-1] for arm in arms}
    print(f"\n{'':<22}       base{''.join(f' {arm:>10}' for arm in (*arms, 'GRPO'))}")
    for name in before:
        cells = [before[name], *(end[name] for end in ends.values()), after[name]]
        print(f"{name:<22} {' '.join(f'{cell:10.1f}' for cell in cells)}")


def folder_of(run, arm):
    return Path(f"{run}-{arm}-control")


def start(words):
    """Train as a command line says, unless that run has finished. Exits if it is stopped by a signal."""
    config = train.load_config(words)
    if len(read_evaluations(config.out)) < 2 and (status := train.train(config)):
        sys.exit(status)


def write_replies(file, shown):
    """Write the examples of `file` with the replies that an arm is shown. Returns the path, beside `file`."""
    rng, examples = random.Random(0), read_jsonl(file)
    if shown == "lazy":
        examples = [lazy(example, rng) for example in examples]
    if shown == "calls":
        examples = [dataclasses.replace(example, reasoning=None) for example in examples]
    path = Path(file).with_name(f"{Path(file).stem}_{shown}.jsonl")
    write_jsonl(path, examples)
    return path


def pass_at(model, chat, examples, k):
    """{category: percent of its examples for which one of k replies at temperature 1 is right}."""
    right = evaluate_samples(model, chat, examples, k, 1.0, max_new_tokens=96, progress=f"pass@{k}")
    replies = [{"category": example.source, "samples_right": n}
               for example, n in zip(examples, right, strict=True)]
    rows = zip(by_category(replies), summarize_samples(replies, k), strict=True)
    return {category: 100 * row["pass"] for (category, _), row in rows}


def t_95(degrees):
    """Student's t at 95 %, two-sided; from 9 degrees of freedom on by Fisher's expansion."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z = 1.959964
    terms = (z, (z ** 3 + z) / 4, (5 * z ** 5 + 16 * z ** 3 + 3 * z) / 96,
             (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / 384)
    return sum(term / degrees ** k for k, term in enumerate(terms))


def over_seeds(values):
    """Half the 95 % interval of the mean over S seeds: t s / √S, 0 of one seed."""
    return t_95(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def interval(values, sign=""):
    """Mean ± half the 95 % interval over seeds, as text."""
    return f"{mean(values):{sign}.1f}" + (f" ± {over_seeds(values):.1f}" if len(values) > 1 else "")


def by_frame(frames, values):
    """Half the 95 % interval of the mean p of n values. Those of one frame resemble each other, so that only
    the F frames are independent: t √(F / (F - 1) Σ_f (Σ_i (x_i - p))²) / n, with the x_i of frame f."""
    p, sums = mean(values), {}
    for frame, value in zip(frames, values, strict=True):
        sums[frame] = sums.get(frame, 0) + value - p
    F = len(sums)
    return t_95(F - 1) * math.sqrt(F / (F - 1) * sum(each * each for each in sums.values())) / len(values)


def compare(runs):
    """The tables of README and docs/results.md as Markdown, and all of their numbers as a dictionary."""
    config = yaml.safe_load((Path(runs[0]) / "config.yaml").read_text())
    examples = read_jsonl(config["data"]["heldout"])
    passes = {}
    for name, folder in (("base", config["model"]["path"]), ("GRPO", newest_checkpoint(runs[0]))):
        chat = Chat(folder, config["data"]["system_prompt"])
        passes[name] = pass_at(load_hf(folder), chat, examples, 8)
    folders = {arm: [folder_of(run, arm) for run in runs] for arm in ARMS} | {"grpo": runs}
    ends = {arm: [evaluations(folder)[-1] for folder in each] for arm, each in folders.items()}
    frames = [{category: 100 * by_frame([reply["id"].rsplit("/", 1)[1] for reply in replies],
                                        [reply["right"] for reply in replies])
               for category, replies in by_category(read_evaluations(run)[-1]["replies"])} for run in runs]
    rows = {name: {"base": base} | {arm: [end[name] for end in each] for arm, each in ends.items()}
            | {"pass@8": {who: passes[who][name] for who in passes},
               "by frame": [frame[name] for frame in frames]}
            for name, base in evaluations(runs[0])[0].items()}
    spent = {arm: [round(minutes(folder)[0], 2) for folder in each] for arm, each in folders.items()}
    return f"{arms_table(rows)}\n\n{kinds_table(rows)}", {"rows": rows, "minutes": spent, "seeds": len(runs)}


def arms_table(rows):
    """The arms by split as Markdown, and by how much GRPO differs from the arm "right", seed by seed."""
    splits = (*GAINS, "all")
    lines = [f"| | {' | '.join(splits)} |", "|---" * (len(splits) + 1) + "|"]
    names = *(arm[2] for arm in ARMS.values()), "**GRPO**", "GRPO minus right replies, same minutes"
    columns = [[f"{rows[split]['base']:.1f}" for split in splits]]
    columns += [[interval(rows[split][arm]) for split in splits] for arm in (*ARMS, "grpo")]
    pairs = [zip(rows[split]["grpo"], rows[split]["right"], strict=True) for split in splits]
    columns.append([interval([a - b for a, b in each], "+") for each in pairs])
    for name, cells in zip(("base", *names), columns, strict=True):
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kinds_table(rows):
    """Every split and kind as Markdown: base, imitation of right replies, GRPO, the interval of its first
    seed by frame, pass@8."""
    lines = ["| split and kind | base | right | GRPO | by frame, seed 0 | pass@8, base | pass@8, GRPO |",
             "|---" * 7 + "|"]
    for name, row in rows.items():
        label = name.replace("_", " ") if "/" in name else f"**{name}**"
        cells = (label, f"{row['base']:.1f}", interval(row["right"]), interval(row["grpo"]),
                 f"{row['grpo'][0]:.1f} ± {row['by frame'][0]:.1f}",
                 f"{row['pass@8']['base']:.1f}", f"{row['pass@8']['GRPO']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(runs):
    """{"steps": [step of each evaluation], split: [[percent at each step] of each run]}"""
    steps = [[report["step"] for report in read_evaluations(run)] for run in runs]
    if any(each != steps[0] for each in steps):
        raise ValueError(f"{', '.join(map(str, runs))}: evaluated at different steps; use one --eval.every")
    found = [evaluations(run) for run in runs]
    return {"steps": steps[0], **{split: [[round(each[split], 2) for each in run] for run in found]
                                  for split in (*GAINS, "all")}}


def newest_checkpoint(run):
    return sorted(Path(run).glob("checkpoints/step_??????"))[-1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("judge").add_argument("run", type=Path)
    command = commands.add_parser("control")
    command.add_argument("run", type=Path)
    command.add_argument("--arms", nargs="+", choices=ARMS, default=[next(iter(ARMS))])
    for name in ("table", "curves"):
        commands.add_parser(name).add_argument("runs", type=Path, nargs="+")
    args, extra = parser.parse_known_args(argv)
    try:
        if args.command == "judge":
            before, *_, after = evaluations(args.run)
            verdicts = judge(before, after, GAINS, LEAST)
            for asked, found, passes in verdicts:
                print(f"{'pass' if passes else 'MISSED':<7} {asked}: {found}")
            sys.exit(not all(passes for _, _, passes in verdicts))
        elif args.command == "control":
            control(args.run, args.arms, extra)
        elif args.command == "table":
            text, numbers = compare(args.runs)
            print(text)
            write_json(RESULTS, {**read_json(RESULTS), **numbers})
        else:
            write_json(RESULTS, {**read_json(RESULTS), "curves": curves(args.runs)})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
