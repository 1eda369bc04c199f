"""The judge and the control of the demo: does GRPO achieve what more imitation does not?

In:  run folders of configs/demo.yaml, made by `make demo`. Out: verdicts, tables, an exit status.

    python tools/demo.py judge RUN      compare the gains of RUN with the bars below; status 1 if one fails
    python tools/demo.py control RUN    train the base on replies of the lazy teacher, as long as RUN took
    python tools/demo.py table RUN...   base, control and GRPO by split and kind, over the seeds of the RUNs
    python tools/demo.py curves RUN...  accuracy over the steps, of RUNs with evaluations at the same steps

Accuracies are greedy, in percent of the held-out queries of a category, which is named split/kind. pass@8 is
the percentage of queries for which one of 8 replies at temperature 1 is right: what GRPO can amplify.
Confidence intervals are over seeds: mean ± t · s / √n, with Student's t at 95 %. `table` and `curves` write
to tools/results/demo.json.
"""

import argparse
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
from tools.synthetic import synthetic  # noqa: E402

RESULTS = "tools/results/demo.json"
GAINS = {"values": 25, "paraphrases": 15, "tools": 15}  # points that each split must gain
LEAST = 50  # percent that every kind of query must reach on new values
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t at 95 %, by the number of seeds


def evaluations(run):
    """The evaluations of a run in order, each {category: percent}. ValueError if there are fewer than two."""
    reports = read_evaluations(run)
    if len(reports) < 2:
        raise ValueError(f"{run}: {len(reports)} evaluations, not a first and a last; is this a finished "
                         "run?")
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


def control(run, extra):
    """Train the base of `run` by imitation, with its seed and its minutes of steps; print both results."""
    out = Path(f"{run}-control")
    config = yaml.safe_load((Path(run) / "config.yaml").read_text())
    rng = random.Random(0)  # with the seed 2 below: queries that neither the base nor the demo has seen
    write_jsonl("runs/data/demo_lazy.jsonl", [lazy(example, rng) for example in synthetic(20000, 2, "train")])
    status = train.train(train.load_config(["configs/demo_control.yaml", f"--out={out}",
                                            f"--seed={config['seed']}",
                                            f"--train.max_minutes={minutes(run)[0]}", *extra]))
    if status:
        sys.exit(status)
    print(f"\n{'':<22}    base  control    GRPO")
    before, after, imitated = evaluations(run)[0], evaluations(run)[-1], evaluations(out)[-1]
    for name in before:
        print(f"{name:<22} {before[name]:7.1f}  {imitated[name]:7.1f} {after[name]:7.1f}")


def pass_at(model, chat, examples, k):
    """{category: percent of its examples for which one of k replies at temperature 1 is right}."""
    right = evaluate_samples(model, chat, examples, k, 1.0, max_new_tokens=128, progress=f"pass@{k}")
    replies = [{"category": example.source, "samples_right": n}
               for example, n in zip(examples, right, strict=True)]
    rows = zip(by_category(replies), summarize_samples(replies, k), strict=True)
    return {category: 100 * row["pass"] for (category, _), row in rows}


def interval(values):
    """Mean ± half the 95 % confidence interval over seeds, as text."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {T_95[len(values)] * stdev(values) / math.sqrt(len(values)):.1f}"


def compare(runs):
    """The README's table as Markdown, and all of its numbers as a dictionary."""
    grpo, imitated = [evaluations(run) for run in runs], [evaluations(f"{run}-control") for run in runs]
    config = yaml.safe_load((Path(runs[0]) / "config.yaml").read_text())
    examples = read_jsonl(config["data"]["heldout"])
    passes = {}
    for name, folder in (("base", config["model"]["path"]), ("GRPO", newest_checkpoint(runs[0]))):
        chat = Chat(folder, config["data"]["system_prompt"])
        passes[name] = pass_at(load_hf(folder), chat, examples, 8)
    lines = ["| split and kind | base | control | GRPO | pass@8, base | pass@8, GRPO |", "|---" * 6 + "|"]
    rows = {}
    for name in grpo[0][0]:
        rows[name] = {"base": grpo[0][0][name], "control": [run[-1][name] for run in imitated],
                      "grpo": [run[-1][name] for run in grpo],
                      "pass@8": {who: passes[who][name] for who in passes}}
        row, label = rows[name], name.replace("_", " ") if "/" in name else f"**{name}**"
        cells = (label, f"{row['base']:.1f}", interval(row["control"]), interval(row["grpo"]),
                 f"{row['pass@8']['base']:.1f}", f"{row['pass@8']['GRPO']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    spent = {who: [round(minutes(folder)[1], 2) for folder in folders] for who, folders in
             (("grpo", runs), ("control", [f"{run}-control" for run in runs]))}
    return "\n".join(lines), {"rows": rows, "minutes": spent, "seeds": len(runs)}


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
    for name in ("judge", "control"):
        commands.add_parser(name).add_argument("run", type=Path)
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
            control(args.run, extra)
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
