"""One page that shows runs: summary and warnings, curves, rollouts with their verdicts, evaluations compared.

In:  run folders (runtime/run_folder.py), finished, stopped or at work; docs/metrics.md, which explains each
     metric; tools/report_page.html, the page's style and script. Out: one HTML file that needs nothing else:
     no network, no other file. By default report.html in the run's folder, for several runs in the folder
     that holds the first.

    python tools/report.py RUN [RUN ...] [--out FILE]

Curves are SVG, drawn here; the script only adds the values under the pointer. Runs whose configs differ in
the seed alone are drawn as their mean, with a band from their least to their greatest value.
docs/report.md says how replies are packed, and why nothing that a model wrote can be run.
"""

import argparse
import base64
import contextlib
import fcntl
import gzip
import json
import math
import re
import sys
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.schema import Config, flat, read_yaml  # noqa: E402
from reward import parse_reply  # noqa: E402
from runtime.files import parse_json, read_json, read_text, tolerant_output, write_text  # noqa: E402
from runtime.metrics import diagnose  # noqa: E402
from runtime.run_folder import MAX_DEAD, MAX_SKIPPED  # noqa: E402

MOST_READ = 100_000_000  # bytes of a page's rollout files, and of its evaluations, that are read
MOST_ROLLOUTS, MOST_EVALUATIONS = 12_000_000, 5_000_000  # bytes of them in the page, gzipped and in base64

# (heading, metrics, least and greatest value of the axis or None)
CHARTS = (
    ("Reward", ("reward/mean",), (0, 1)),
    ("Held-out accuracy", ("eval/all",), (0, 1)),
    ("KL to the reference", ("kl",), None),
    ("Entropy", ("entropy",), None),
    ("Reply length", ("length/mean", "length/min"), None),
    ("Groups that teach", ("reward/live", "reward/all_zero", "reward/all_one"), (0, 1)),
    ("What replies are like", ("reward/format_ok", "reward/names_ok", "reward/no_calls"), (0, 1)),
    ("Collapse and cut replies", ("reward/commonest", "length/cut"), (0, 1)),
    ("Ratio", ("ratio/mean", "ratio/min", "ratio/max"), None),
    ("Clipped tokens", ("ratio/clip_low", "ratio/clip_high"), None),
    ("Sampler against trainer", ("sampling/logp_diff_mean", "sampling/logp_diff_max"), None),
    ("Gradient norm", ("grad_norm",), None),
    ("Loss", ("loss",), None),
    ("Speed", ("tokens_per_s",), None),
    ("Seconds of a step", ("time/step_s", "time/rollout_s", "time/update_s"), None),
    ("Memory", ("memory/rollout_gib", "memory/update_gib"), None),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 190, 46, 372, 8, 166  # of a chart, in SVG units; the plot's
DEFAULTS = flat(Config())
COLOURS = 7  # classes c0… of the page's style; dashes d0… too

LARGEST_CUT, LARGEST_JUMP = 0.05, 0.1  # share of cut replies; rise of the KL from one step to the next
LARGEST_DIFF = {"fp32": 1e-4, "bf16": 5e-3}  # mean |log-prob of the trainer - of the sampler|
UNCOMPARED = ("seed", "out", "resume")  # settings in which runs of one band may differ


class Run(NamedTuple):
    """A run folder as far as it is needed. steps: {metric: value} of each step, in order; evaluated: of each
    evaluation; settings: {dotted key: value} as config.yaml has them; rollouts, evaluations: all files."""

    folder: Path
    name: str
    settings: dict
    steps: list
    evaluated: list
    revision: str
    hardware: str
    rollouts: list
    evaluations: list


def read_run(folder, name):
    """The Run of a folder. ValueError if it is none."""
    folder = Path(folder)
    for needed in ("config.yaml", "metrics.jsonl"):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder}: no {needed} there; give the folder of a run, its --out")
    path = folder / "metrics.jsonl"
    # What follows the last line's end is a row that is still being written.
    lines = read_text(path).split("\n")[:-1]
    rows = [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    notes = {part: read_text(folder / f"{part}.txt").strip() if (folder / f"{part}.txt").exists() else ""
             for part in ("git_revision", "hardware")}
    return Run(folder, name, dict(read_yaml(folder / "config.yaml")),
               [row for row in rows if "time/eval_s" not in row],
               [row for row in rows if "time/eval_s" in row], notes["git_revision"], notes["hardware"],
               sorted(folder.glob("rollouts/step_*.jsonl")), sorted(folder.glob("evals/step_*.json")))


def setting(run, key):
    return run.settings.get(key, DEFAULTS.get(key))


def show(text):
    """Any text as HTML. A lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    return escape(str(text).encode("utf-8", "replace").decode())


# ---- what docs/metrics.md says of a metric
def read_meanings(path=ROOT / "docs" / "metrics.md"):
    """{metric: (names, formula, healthy)} of the rows of its table, cells as HTML. "`length/mean`, `min`" are
    length/mean and length/min: a short name replaces the last word of the first one."""
    found = {}
    for line in read_text(path).split("\n"):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        names = re.findall(r"`([^`]+)`", cells[0]) if len(cells) == 3 else []
        for name in names:
            full = name if "/" in name or "/" not in names[0] else re.sub(r"[^/_]+$", name, names[0])
            found[full] = tuple(map(markdown, cells))
    if not found:
        raise ValueError(f"{path}: no table of metrics in it; restore the file")
    return found


def markdown(cell):
    """The HTML of a table's cell: `code` and escaped bars are all its markup."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", show(cell.replace("\\|", "|")))


# ---- summary
def warnings(run, meanings):
    """[(steps, HTML of what was found and what to do)…]: what `diagnose` finds, and the metrics that leave
    the healthy range of docs/metrics.md, whose words follow."""
    found, before = {}, None
    diff = LARGEST_DIFF.get(setting(run, "model.precision"), LARGEST_DIFF["bf16"])
    for row in run.steps:
        kl = row.get("kl", 0)
        limits = (("length/cut", row.get("length/cut", 0) > LARGEST_CUT, f"above {LARGEST_CUT}"),
                  ("kl", before is not None and kl - before > LARGEST_JUMP,
                   f"rose by more than {LARGEST_JUMP} in one step"),
                  ("sampling/logp_diff_mean", row.get("sampling/logp_diff_mean", 0) > diff,
                   f"above {diff:g}: sampler and trainer disagree"),
                  ("reward/raised", row.get("reward/raised", 0) > 0, "above 0"),
                  ("skipped_updates", row.get("skipped_updates", 0) > 0, "above 0"))
        before = kl
        causes = [f"<code>{name}</code> {words}. Healthy: {meanings[name][2]}"
                  for name, is_broken, words in limits if is_broken]
        if "reward/mean" in row and (finding := diagnose(row)):
            causes.insert(0, show(finding))
        for cause in causes:
            found.setdefault(cause, []).append(row["step"])
    return [(steps, cause) for cause, steps in found.items()]


def is_at_work(folder):
    """Whether a process holds the lock of the run folder; False where there is none."""
    with contextlib.suppress(OSError), open(folder / "lock", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def planned_steps(run):
    """train.steps, or the steps that train.epochs make, found from the logged epoch; None: not known."""
    if setting(run, "train.steps") or not run.steps:
        return setting(run, "train.steps")
    batch, epoch = setting(run, "train.prompts_per_step"), run.steps[-1].get("epoch")
    if not epoch or setting(run, "rollout.refill"):  # then a step deals more examples than it trains on
        return None
    return math.ceil(round(run.steps[-1]["step"] * batch / epoch) * setting(run, "train.epochs") / batch)


def exit_state(run):
    """How the run ended, in words, from what it left in its folder."""
    if is_at_work(run.folder):
        return "at work"
    if not run.steps:
        return "no step was completed"
    last, planned = run.steps[-1]["step"], planned_steps(run)
    minutes, spent = setting(run, "train.max_minutes"), sum(row.get("time/step_s", 0) for row in run.steps)
    of = f" of {planned}" if planned else ""
    if len(run.steps) >= MAX_SKIPPED and all(row.get("skipped_updates") for row in run.steps[-MAX_SKIPPED:]):
        return f"diverged: no finite gradient in the last {MAX_SKIPPED} steps, up to step {last}"
    if planned and last >= planned or minutes and spent >= 60 * minutes:
        return f"finished after step {last}{of}"
    dead = run.steps[-MAX_DEAD:]
    if len(dead) == MAX_DEAD and all("reward/mean" in row and diagnose(row) for row in dead):
        return f"ended by itself at step {last}{of}: nothing to learn from in {MAX_DEAD} steps in a row"
    return f"stopped after step {last}{of}; the same command resumes it"


def duration(run):
    """What steps and evaluations took, in words."""
    took = [sum(row.get(metric, 0) for row in rows) for rows, metric in ((run.steps, "time/step_s"),
                                                                         (run.evaluated, "time/eval_s"))]
    words = [f"{x / 3600:.1f} h" if x >= 3600 else f"{x / 60:.1f} min" if x >= 60 else f"{x:.1f} s"
             for x in took]
    return f"steps {words[0]}, evaluations {words[1]}"


def model_of(run):
    stage, path, precision, rank = (setting(run, key) for key in ("stage", "model.path", "model.precision",
                                                                  "model.lora_rank"))
    return f"{stage} of {path} in {precision}" + (f", LoRA of rank {rank}" if rank else "")


def accuracies(run):
    """HTML: the first and the last evaluation by category, in percent with 95 % intervals."""
    if not run.evaluations:
        return "not evaluated"
    reports = [read_json(file) for file in dict.fromkeys((run.evaluations[0], run.evaluations[-1]))]
    columns = [{row["category"]: row for row in report["rows"]} for report in reports]
    names = sorted({name for rows in columns for name in rows if "/" not in name} - {"all"})
    lines = ["<table class='accuracy'><tr><td></td>"
             + "".join(f"<th scope='col'>step {report['step']}</th>" for report in reports) + "</tr>"]
    for name in ("all", *names):
        cells = [f"{100 * row['accuracy']:.1f} % <small>[{100 * row['low']:.1f}, {100 * row['high']:.1f}] of "
                 f"{row['n']}</small>" if (row := rows.get(name)) else "–" for rows in columns]
        lines.append(f"<tr><th scope='row'>{show(name)}</th>"
                     + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(lines) + "</table>"


def table(headings, rows, kind):
    """An HTML table. rows: [(heading, [HTML of a cell…])…]"""
    head = "".join(f"<th scope='col'>{show(heading)}</th>" for heading in headings)
    body = "".join(f"<tr><th scope='row'>{title}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
                   for title, cells in rows)
    return (f"<div class='scroll' tabindex='0' role='region' aria-label='{kind}'><table class='{kind}'>"
            f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def summary(runs, meanings):
    names = [run.name for run in runs]
    facts = {"model": model_of, "state": exit_state, "held-out accuracy": accuracies, "duration": duration,
             "hardware": lambda run: run.hardware or "not recorded",
             "code": lambda run: run.revision or "not recorded", "folder": lambda run: run.folder}
    parts = [table(names, [(title, [of(run) if of is accuracies else show(of(run)) for run in runs])
                           for title, of in facts.items()], "facts")]
    notes = []
    for run in runs:
        for steps, cause in warnings(run, meanings):
            where = (f"step {steps[0]}" if len(steps) == 1 else
                     f"{len(steps)} of {len(run.steps)} steps, from {steps[0]} to {steps[-1]}")
            owner = f"{show(run.name)}, " if len(runs) > 1 else ""
            notes.append(f"<li><b>{owner}{where}:</b> {cause}</li>")
    parts.insert(0, f"<div class='warnings'><h3>Warnings</h3><ul>{''.join(notes)}</ul></div>" if notes else
                 "<p>No warnings.</p>")
    keys = [key for key in dict.fromkeys([*DEFAULTS, *(key for run in runs for key in run.settings)])
            if key not in ("out", "resume") and any(setting(run, key) != DEFAULTS.get(key) for run in runs)]
    rows = []
    for key in keys:
        values = [setting(run, key) for run in runs]
        title = f"<code>{show(key)}</code>" + ("" if all(value == values[0] for value in values) else " ≠")
        values.append(DEFAULTS.get(key, "unknown key"))
        words = [value if isinstance(value, str) else json.dumps(value) for value in values]
        rows.append((title, [f"<code>{show(word)}</code>" for word in words]))
    parts.append(f"<details open><summary>Settings that differ from the defaults ({len(keys)})</summary>"
                 + table([*names, "default"], rows, "settings") + "</details>")
    return f"<div class='summary{' wide' if len(runs) > 1 else ''}'>{''.join(parts)}</div>"


# ---- curves
def groups_of(runs):
    """[[run…]…]: runs whose settings differ at most in UNCOMPARED and the seed of first weights, together."""
    groups = {}
    for run in runs:
        settings = {key: setting(run, key) for key in {**DEFAULTS, **run.settings}}
        key = json.dumps(sorted((k, v) for k, v in settings.items() if k not in UNCOMPARED), default=str)
        groups.setdefault(key.replace(f"-{setting(run, 'seed')}/checkpoints/", "-/"), []).append(run)
    return list(groups.values())


def number(value):
    """A finite number, or None, where a curve has a gap."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def series_of(group, metric):
    """([(step, mean, least, greatest)…], None for the last three where no run has a finite value); empty if
    no run of the group logged the metric."""
    values = {}
    for run in group:
        for row in run.evaluated if metric.startswith("eval/") else run.steps:
            if metric in row:
                values.setdefault(row["step"], []).append(number(row[metric]))
    points = []
    for step, found in sorted(values.items()):
        finite = [value for value in found if value is not None]
        points.append((step, sum(finite) / len(finite), min(finite), max(finite)) if finite else
                      (step, None, None, None))
    return points


def ticks(low, high, about=5):
    """Round numbers from low to high, about so many steps apart."""
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, first + 12) if i * size <= high + size * 1e-9]


def limits_of(values, fixed):
    """(low, high) of an axis. A few values far above all the others do not set it: they are at its edge."""
    ordered = sorted(values)
    low, high = fixed or (ordered[0], ordered[-1])
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    if not fixed and len(ordered) > 20 and low >= 0 and high > 20 * usual > 0:
        high = 1.5 * usual
    if not fixed and 0 < low < 0.6 * high:
        low = 0
    if high - low < 1e-12 * max(1, abs(high)):  # a flat line: in the middle, 0 at the bottom
        low, high = low - abs(high) / 10, high + (abs(high) / 10 or 1)
    return low, high


def rough(value):
    """Five digits of a number or None, for the script."""
    return value if value is None else float(f"{value:.5g}")


def short(value):
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def charts_of(runs):
    """([(heading, metrics, series, limits)…] of the charts with a value, headings of those without). series:
    [(name, colour, dash, points of series_of)…]"""
    groups, charts, empty = groups_of(runs), [], []
    for heading, metrics, limits in CHARTS:
        if metrics == ("eval/all",) and len(runs) == 1:
            names = {key for row in runs[0].evaluated for key in row if key.startswith("eval/")}
            metrics += tuple(sorted(name for name in names - {"eval/all"} if name.count("/") == 1))
        series = []
        for m, metric in enumerate(metrics):
            for g, group in enumerate(groups):
                owner = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
                points = series_of(group, metric)
                name = metric if len(runs) == 1 else f"{metric}, {owner}"
                if any(point[1] is not None for point in points):
                    series.append((name, (g if len(groups) > 1 else m) % COLOURS, m % COLOURS, points))
        if series:
            charts.append((heading, metrics, series, limits))
        else:
            empty.append(heading)
    return charts, empty


def polylines(points, x_of, y_of, kind):
    """The SVG of a curve: polylines without gaps, and dots where a stretch is one point or points are few."""
    stretches, parts = [[]], []
    for step, mean, *_ in points:
        if mean is None:
            stretches.append([])
        else:
            stretches[-1].append((x_of(step), y_of(mean)))
    for stretch in filter(None, stretches):
        if len(stretch) == 1 or len(points) <= 20:
            parts += [f"<circle class='{kind}' cx='{x}' cy='{y}' r='2.5'/>" for x, y in stretch]
        text = " ".join(f"{x},{y}" for x, y in stretch)
        parts.append(f"<polyline class='{kind}' points='{text}'/>")
    return "".join(parts)


def draw(heading, series, limits, first, last):
    """The SVG text of a chart whose axis of steps runs from first to last."""
    found = [point for *_, points in series for point in points]
    values = [x for point in found for x in point[1:] if x is not None]
    low, high = limits_of(values, limits)

    def x_of(step):
        return round(LEFT + (RIGHT - LEFT) * (step - first) / (last - first), 1)

    def y_of(value):
        return round(BOTTOM - (BOTTOM - TOP) * (min(max(value, low), high) - low) / (high - low), 1)

    lines = []
    for value in ticks(low, high):
        lines += [f"<line class='grid' x1='{LEFT}' x2='{RIGHT}' y1='{y_of(value)}' y2='{y_of(value)}'/>",
                  f"<text class='end' x='{LEFT - 5}' y='{y_of(value) + 4}'>{short(value)}</text>"]
    for step in ticks(first, last):
        if step == int(step):
            anchor = " class='end'" if x_of(step) > RIGHT - 8 else " class='middle'"
            lines.append(f"<text{anchor} x='{x_of(step)}' y='{BOTTOM + 17}'>{int(step)}</text>")
    for _, colour, dash, points in series:
        spread = [point for point in points if point[1] is not None]
        if any(least < greatest for _, _, least, greatest in spread):
            edge = [(step, greatest) for step, _, _, greatest in spread]
            edge += [(step, least) for step, _, least, _ in reversed(spread)]
            text = " ".join(f"{x_of(step)},{y_of(value)}" for step, value in edge)
            lines.append(f"<polygon class='band c{colour}' points='{text}'/>")
        lines.append(polylines(points, x_of, y_of, f"c{colour} d{dash}"))
    label = "; ".join(f"{name} from {short(points[0][1] or 0)} at step {points[0][0]} to "
                      f"{short(points[-1][1] or 0)} at step {points[-1][0]}" for name, *_, points in series)
    svg = (f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' tabindex='0' aria-label='{show(heading)} over "
           f"steps: {show(label)}. Arrow keys read the values.'>{''.join(lines)}"
           f"<line class='cursor' y1='{TOP}' y2='{BOTTOM}' x1='-9' x2='-9'/></svg>")
    if max(values) > high:
        svg += f"<p>Values above {short(high)}, up to {short(max(values))}, are drawn at the edge.</p>"
    return svg


def curves(runs, meanings):
    """(HTML of all charts, what the script knows of each, first and last step of their common axis)"""
    charts, empty = charts_of(runs)
    steps = [row["step"] for run in runs for row in (*run.steps, *run.evaluated)] or [0]
    scale, parts, known = [min(steps), max(*steps, min(steps) + 1)], [], []
    for heading, metrics, series, limits in charts:
        keys = "".join(f"<li><svg viewBox='0 0 26 8' aria-hidden='true'><polyline class='c{colour} d{dash}' "
                       f"points='0,4 26,4'/></svg>{show(name)}</li>" for name, colour, dash, _ in series)
        svg = draw(heading, series, limits, *scale)
        rows = dict.fromkeys(filter(None, (meanings.get(re.sub("^eval/.*", "eval/…", x)) for x in metrics)))
        said = "".join(f"<p><b>{names}</b>: {formula}. <b>Healthy:</b> {healthy}.</p>"
                       for names, formula, healthy in rows)
        parts.append(f"<figure><h3>{show(heading)}</h3><ul class='keys'>{keys}</ul>{svg}"
                     f"<output></output><figcaption>{said}</figcaption></figure>")
        known.append({"series": [
            [name, [point[0] for point in points], [rough(point[1]) for point in points],
             [[rough(x) for x in point[2:]] for point in points]
             if any(point[2] != point[3] for point in points) else None] for name, *_, points in series]})
    notes = [f"Not logged: {', '.join(empty)}."] if empty else []
    notes += [f"{', '.join(run.name for run in group)} differ in seeds only: the line is their mean, the "
              "band their range." for group in groups_of(runs) if len(group) > 1]
    html = "".join(f"<p>{show(note)}</p>" for note in notes) + f"<div class='charts'>{''.join(parts)}</div>"
    return html, known, scale


# ---- replies
def evenly(items, size_of, most):
    """Evenly spaced items, the first and the last among them, whose sizes sum to at most `most` where more
    than these two are left."""
    count = len(items)
    while count > 2:
        chosen = [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
        size = sum(map(size_of, chosen))
        if size <= most:
            return chosen
        count = max(2, min(count - 1, int(count * most / size)))
    return items[:1] + items[1:][-1:]


def read_lines(path):
    """The replies of a rollout file. Supervised training leaves the examples of a failed step there instead,
    which have none."""
    lines = [parse_json(line, f"{path}:{k}") for k, line in enumerate(read_text(path).split("\n"), 1) if line]
    return [line for line in lines if "reply" in line]


def examples_of(path, ids):
    """{id: example} of the wanted ids in a file of examples; empty where it is gone."""
    place = next((place for place in (Path(path or ""), ROOT / (path or "")) if place.is_file()), None)
    lines = read_text(place).split("\n") if place and ids else ()
    examples = (parse_json(line, place) for line in lines if line.strip())
    return {example["id"]: example for example in examples if example["id"] in ids}


def call_texts(calls):
    """[[name, {argument: JSON text}]…] of calls, None for None. Two texts are equal where the reward takes
    the values for equal: keys in order, types distinct."""
    if calls is None:
        return None
    # Written and read again, so that -0.0 becomes 0.0 as in a reply.
    calls = json.loads(json.dumps(calls), parse_float=lambda text: float(text) + 0.0)
    return [[call["name"], {name: json.dumps(value, sort_keys=True, ensure_ascii=False)
                            for name, value in call["arguments"].items()}] for call in calls]


def whole(numbers, scale):
    """scale · each as a whole number, None where it is not finite: a third of the bytes of fractions."""
    return numbers and [round(x * scale) if abs(x) < 1e9 else None for x in numbers]


def reply_of(line):
    """What the script needs of a reply. tokens, if the run kept them: [texts, log-probs of the sampler in
    1/100, those of the trainer less these in 1/10000 or None, entropies in 1/100 or None]."""
    reply = {"text": line["reply"], "error": line["error"], "finished": line["finished"],
             "calls": call_texts(parse_reply(line["reply"])[0])}
    if "reward" not in line:
        return reply | {"reward": int(line["right"])}
    reply |= {key: number(line[key]) for key in ("reward", "advantage")} | {"length": line["tokens"]}
    if "pieces" in line:
        sampler, trainer, entropy = line["sampler_logp"], line["trainer_logp"], line["entropy"]
        ratio = trainer and [a - b for a, b in zip(trainer, sampler, strict=True)]
        reply["tokens"] = [line["pieces"], whole(sampler, 100), whole(ratio, 10000), whole(entropy, 100)]
    return reply


def prompt_of(line, example):
    """The prompt of a reply, with its tools and earlier turns if the file of examples still has them."""
    prompt = {"id": line["id"], "query": line["query"], "answer": call_texts(line["answer"])}
    if example and example["messages"][-1]["content"] == line["query"]:
        return prompt | {"tools": example["tools"], "messages": example["messages"]}
    return prompt | {"tools": None, "messages": [{"role": "user", "content": line["query"]}]}


def packed(value):
    """JSON in gzip in base64. mtime: the same page for the same run."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), 6, mtime=0)).decode()


def packed_rollouts(run, lines_of):
    """[(step, replies, part)…] of {step: lines}."""
    n = setting(run, "rollout.n")
    ids = {line["id"] for lines in lines_of.values() for line in lines}
    examples = examples_of(run.settings.get("data.train"), ids)
    for step, lines in lines_of.items():
        prompts = []
        for i in range(0, len(lines), n):
            replies, example = [reply_of(line) for line in lines[i:i + n]], examples.get(lines[i]["id"])
            prompts.append({**prompt_of(lines[i], example), "step": step, "replies": replies})
        yield step, len(lines), packed(prompts)


def parts_of(run, share):
    """(what the script's list knows of the run, [packed part…]): a part for each rollout file, for each
    evaluation, and for the held-out prompts. share: of the page's bytes."""
    def chosen(files):
        return evenly(files, lambda file: file.stat().st_size, MOST_READ * share)

    lines_of = {int(file.stem.removeprefix("step_")): read_lines(file) for file in chosen(run.rollouts)}
    rollouts = list(packed_rollouts(run, {step: lines for step, lines in lines_of.items() if lines}))
    reports = [read_json(file) for file in chosen(run.evaluations)]
    evaluations = [(report["step"], len(report["replies"]), packed([
        reply_of(reply) | {key: reply[key] for key in ("id", "category")} for reply in report["replies"]]))
        for report in reports]
    asked = {reply["id"]: reply for report in reports for reply in report["replies"]}
    examples = examples_of(setting(run, "data.heldout") or run.settings.get("data.train"), asked.keys())
    known, parts = {"name": run.name, "note": ""}, []
    for kind, made, files, most in (("rollouts", rollouts, run.rollouts, MOST_ROLLOUTS),
                                    ("evaluations", evaluations, run.evaluations, MOST_EVALUATIONS)):
        shown = evenly(made, lambda part: len(part[2]), most * share)
        known[kind] = [part[:2] for part in shown]
        parts += [part[2] for part in shown]
        if shown and len(shown) < len(files):
            known["note"] += f"{run.name}: shown are {len(shown)} of {len(files)} files of {kind}. "
    return known, [*parts, packed({id: prompt_of(reply, examples.get(id)) for id, reply in asked.items()})]


# ---- the page
def make_page(folders):
    """The HTML of the page of run folders. ValueError if one holds no run."""
    names = [Path(folder).resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    runs, meanings = [read_run(*each) for each in zip(folders, names, strict=True)], read_meanings()
    template = read_text(ROOT / "tools" / "report_page.html")
    charts, known, scale = curves(runs, meanings)
    listed, texts = [], []
    for run in runs:
        about, parts = parts_of(run, 1 / len(runs))
        listed.append(about | {"first": len(texts)})
        texts += parts
    # "<" would let a name end the element, whatever it holds.
    data = {"charts": known, "scale": scale, "plot": [LEFT, RIGHT], "runs": listed}
    data = json.dumps(data).replace("<", "\\u003c")
    inline = {tag: re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1] for tag in ("style", "script")}
    digests = {tag: base64.b64encode(sha256(text.encode()).digest()).decode() for tag, text in inline.items()}
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; " + "; ".join(
        f"{tag}-src 'sha256-{digest}'" for tag, digest in digests.items())
    data = [f"<script type='application/json' id='data'>{data}</script>"]
    data += [f"<script type='text/plain' id='part{i}'>{text}</script>" for i, text in enumerate(texts)]
    fields = {"title": show(", ".join(names)), "policy": policy, "summary": summary(runs, meanings),
              "curves": charts, "data": "\n".join(data)}
    # In one pass: no field is looked for in what another one brought in.
    return re.sub(r"<!-- ([a-z]+) -->", lambda match: fields[match[1]], template)


def main(argv=None):
    tolerant_output()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="the HTML file (default: report.html in the run's folder)")
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(args.runs))
    try:
        page = make_page(folders)
        out = args.out or (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
        write_text(out, page)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"report: {out} ({len(page) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
