"""Outputs of a public benchmark: reading, scoring, and the tables of the scores.

In:  files of JSON lines {"id", "category", ...}; the entries of a benchmark and the calls for them.
Out: {id: line}; verdicts; text tables. Nothing needs torch.
"""

from pathlib import Path

from benchmarks import acebench, api_bank, bfcl, json_lines

BENCHES = {"bfcl": bfcl, "api_bank": api_bank, "acebench": acebench}


def read_outputs(file, entries, key):
    """{id: line} of a file of JSON lines with "id" and `key`. ValueError, naming file, line and id: an
    unreadable line, an unknown or duplicate id, another category than the entry has."""
    categories = {entry.id: entry.category for entry in entries}
    lines = {}
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    for number, line in json_lines(file, text):
        if not isinstance(line, dict) or not isinstance(line.get("id"), str) or key not in line:
            raise ValueError(f'{file}:{number}: not an object with "id" and "{key}"')
        id = line["id"]
        if id not in categories:
            raise ValueError(f"{file}:{number}: unknown id {id!r}; is it of this benchmark and version?")
        if line.get("category", categories[id]) != categories[id]:
            raise ValueError(f"{file}:{number}: {id!r} is of {categories[id]}, not {line['category']!r}")
        if id in lines:
            raise ValueError(f"{file}:{number}: the id {id!r} stands twice")
        lines[id] = line
    return lines


def score_calls(bench, entries, calls):
    """{metric: {category: {id: (valid, reason)}}} of {id: calls}; entries without calls are left out."""
    verdicts = {}
    for metric in bench.METRICS:
        of_metric = verdicts[metric] = {entry.category: {} for entry in entries}
        for entry in entries:
            if entry.id in calls:
                of_metric[entry.category][entry.id] = bench.check(entry, calls[entry.id], metric)
    return verdicts


def bench_table(rows_by_metric):
    """A text table of {metric: rows of `summarize`}, a column a metric; missing replies are mentioned."""
    first = next(iter(rows_by_metric.values()))
    width = max(len(row["label"]) for row in first)
    lines = [f"{'':<{width}}      n" + "".join(f"  {metric:>9}" for metric in rows_by_metric)]
    for i, row in enumerate(first):
        cells = "".join(f"  {100 * rows[i]['accuracy']:9.2f}" for rows in rows_by_metric.values())
        covered = ""
        if row["n"] < row["expected"]:
            share = row["n"] / row["expected"]
            covered = f"   only {row['n']} scored ({share:.1%}); the rest counts as wrong"
        lines.append(f"{row['label']:<{width}}  {row['expected']:>5}{cells}{covered}")
    return "\n".join(lines)


def paper_table(name, rows_by_metric, model):
    """A text table of the paper's figures on a benchmark, then those of this model, in percent."""
    found = {metric: {row["label"]: 100 * row["accuracy"] for row in rows}
             for metric, rows in rows_by_metric.items()}
    if name == "bfcl":
        rows = found["official"]
        ours = [rows[label] for label in (
            "Simple AST", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple",
            "live_parallel", "live_parallel_multiple", "Non-Live AST")]
        lines = {label + ("" if label in bfcl.PAPER_LIVE_IS_AST_ONLY else " *"): row
                 for label, row in bfcl.PAPER.items()}
        lines[model] = [*ours, rows["Live AST"], rows["Overall"]]
        lines[model + " *"] = [*ours, rows["Live, v3 leaderboard"], rows["Overall, v3 leaderboard"]]
        heads = ("Simple", "Mult.", "Par.", "P.Mult.", "L-Sim.", "L-Mult.", "L-Par.", "L-P.M.",
                 "NonLive", "Live", "Overall")
        note = "* Live counts live_irrelevance and live_relevance, as the v3 leaderboard: compare * with *"
    else:
        label = {"api_bank": "All entries", "acebench": "Pooled"}[name]
        lines = {who: [figure] for who, figure in BENCHES[name].PAPER.items()}
        lines |= {f"{model}, {metric}": [rows[label]] for metric, rows in found.items()}
        heads, note = ("accuracy",), f"the paper's protocol is not published; see benchmarks/{name}.py"
    width = max(map(len, lines))
    text = [f"{'':<{width}}" + "".join(f"  {head:>8}" for head in heads)]
    text += [f"{who:<{width}}" + "".join(f"  {x:8.2f}" for x in figures) for who, figures in lines.items()]
    return "\n".join([*text, note])
