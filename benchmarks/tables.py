"""Outputs of a public benchmark: reading, scoring, and the tables of the scores; those of held-out examples.

In:  files of JSON lines {"id", "category", ...}; the entries of a benchmark and the calls for them; the
     replies of eval.evaluate.
Out: {id: line}; verdicts; rows of tables and their text; a warning where nearly all lines fail in the same
     way. Nothing needs torch.
"""

import math
from collections import Counter

from benchmarks import acebench, api_bank, bfcl, json_lines
from benchmarks.acebench import outsized
from runtime.files import read_text

BENCHES = {"bfcl": bfcl, "api_bank": api_bank, "acebench": acebench}
NEARLY_ALL = 0.9  # a share of lines that fail in one way: no model is that regular
NO_CALL = 'no call could be read ("calls" is null)'
FEW = 10  # lines; fewer may have one reason in common by chance


def read_outputs(file, entries, key, skipped=()):
    """{id: line} of a file of JSON lines with "id" and `key`, without the lines of `skipped` categories.

    ValueError, naming file, line and id: an unreadable line, an unknown or duplicate id, another category
    than the entry has.
    """
    categories = {entry.id: entry.category for entry in entries}
    lines = {}
    for number, line in json_lines(file, read_text(file)):
        if not isinstance(line, dict) or not isinstance(line.get("id"), str) or key not in line:
            raise ValueError(f'{file}:{number}: not an object with "id" and "{key}"')
        id = line["id"]
        if id not in categories and line.get("category") in skipped:
            continue
        if id not in categories:
            raise ValueError(f"{file}:{number}: unknown id {id!r}; is it of this benchmark and version?")
        if line.get("category", categories[id]) != categories[id]:
            raise ValueError(f"{file}:{number}: {id!r} is of {categories[id]}, not {line['category']!r}")
        if id in lines:
            raise ValueError(f"{file}:{number}: the id {id!r} stands twice")
        lines[id] = line
    return lines


def score_calls(bench, entries, calls, categories=()):
    """{metric: {category: {id: (valid, reason)}}} of {id: calls}; entries without calls are left out.

    categories: all that the data have, also those without an entry. The bench's GROUPS are further keys.
    """
    verdicts = {}
    for metric in bench.METRICS:
        names = [*categories, *(entry.category for entry in entries), *bench.GROUPS]
        of_metric = verdicts[metric] = {name: {} for name in names}
        for entry in entries:
            if entry.id in calls:
                verdict = bench.check(entry, calls[entry.id], metric)
                for name in (entry.category, *(name for name, has in bench.GROUPS.items() if has(entry))):
                    of_metric[name][entry.id] = verdict
    return verdicts


def report(name, entries, calls, categories, chosen, model):
    """(text, rows of each metric, verdicts) of a benchmark's calls, {id: calls}.

    categories: all that the data have; chosen: those that were evaluated; model: its name. text: both tables
    and, where nearly all lines fail in one way, a warning; verdicts: one dictionary a line.
    """
    bench = BENCHES[name]
    verdicts = score_calls(bench, entries, calls, categories)
    rows = {metric: bench.summarize(of_metric, chosen) for metric, of_metric in verdicts.items()}
    of_first = {id: verdict for part in verdicts[bench.METRICS[0]].values() for id, verdict in part.items()}
    lines = [{"id": entry.id, "category": entry.category,
              "calls": "too large to repeat" if outsized(calls[entry.id]) else calls[entry.id],
              **{metric: verdicts[metric][entry.category][entry.id] for metric in verdicts}}
             for entry in entries if entry.id in calls]
    warning = common_fault(calls, of_first)
    text = f"{bench_table(rows)}\n\n{paper_table(name, rows, model)}" + (f"\n\n{warning}" if warning else "")
    return text, rows, lines


def form_fault(calls):
    """What is wrong with the form of the "calls" of one line, any JSON value; None if nothing is."""
    if calls is None:
        return NO_CALL
    if type(calls) is not list:
        kind = {str: "a text", dict: "one object"}.get(type(calls), "a single value")
        return f'"calls" is {kind}, not a list of objects'
    for call in calls:
        if type(call) is not dict:
            return "a call is a text, not an object" if type(call) is str else "a call is not an object"
        if type(call.get("function")) is dict:
            return 'a call is wrapped as {"function": {…}}'
        if "name" not in call and len(call) == 1:
            return "a call has the form {NAME: ARGUMENTS}"
        if not {"name", "arguments"} <= call.keys():
            return f"a call has the keys {', '.join(map(repr, sorted(call)))}"[:200]
        if type(call["name"]) is not str:
            return "the name of a call is not a text"
        if type(call["arguments"]) is not dict:
            kind = "a text" if type(call["arguments"]) is str else "not an object"
            return f"the arguments of a call are {kind}"
    return None


def common_fault(calls, verdicts):
    """One line that says in which way nearly all lines fail, or None.

    calls: {id: calls of a line}; verdicts: {id: (valid, reason)}. A wrong form counts where the verdict is
    right too: a category without right calls counts what cannot be read as right.
    """
    faults = [form_fault(value) for id, value in calls.items()
              if value != [] and not (value is None and verdicts[id][0])]
    fault, n = Counter(filter(None, faults)).most_common(1)[0] if any(faults) else (None, 0)
    if fault and n >= NEARLY_ALL * len(faults):
        form = 'the right form is "calls": [{"name": NAME, "arguments": {PARAMETER: VALUE, …}}, …]'
        return f"warning: in {n} of {len(calls)} lines {fault}" + ("" if fault == NO_CALL else f"; {form}")
    return common_reason(verdicts)


def common_reason(verdicts):
    """One line that says for which reason nearly all of {id: (valid, reason)} are wrong, or None."""
    # A reason is the error type, a colon and details; the type may begin with the name of a checker.
    kinds = {id: reason.split(": ")[0].split(":")[-1]
             for id, (valid, reason) in verdicts.items() if not valid}
    kind, n = Counter(kinds.values()).most_common(1)[0] if kinds else (None, 0)
    if n < max(FEW, NEARLY_ALL * len(verdicts)):
        return None
    id = next(id for id in kinds if kinds[id] == kind)
    return f"warning: {n} of {len(verdicts)} are wrong for one reason, as {id} is: {verdicts[id][1]}"


def bench_table(rows_by_metric):
    """A text table of {metric: rows of `summarize`}, a column a metric; missing replies and categories are
    mentioned."""
    first = next(iter(rows_by_metric.values()))
    width = max(len(row["label"]) for row in first)
    lines = [f"{'':<{width}}      n" + "".join(f"  {metric:>9}" for metric in rows_by_metric)]
    for i, row in enumerate(first):
        cells = "".join(f"  {percent(rows[i]['accuracy']):>9}" for rows in rows_by_metric.values())
        covered = ""
        if row["accuracy"] is None:
            others = len(row["missing"]) - 3
            covered = f"   needs also {', '.join(row['missing'][:3])}" + f" and {others} more" * (others > 0)
        elif row["n"] < row["expected"]:
            share = row["n"] / row["expected"]
            covered = f"   only {row['n']} scored ({share:.1%}); the rest counts as wrong"
        lines.append(f"{row['label']:<{width}}  {row['expected']:>5}{cells}{covered}")
    return "\n".join(lines)


def percent(share):
    """A share as percent with two decimals; "-" for None, which is no share."""
    return "-" if share is None else f"{100 * share:.2f}"


def paper_table(name, rows_by_metric, model):
    """A text table of the paper's figures on a benchmark, then those of this model, in percent. What needs a
    category that was not chosen is "-"."""
    found = {metric: {row["label"]: row["accuracy"] for row in rows}
             for metric, rows in rows_by_metric.items()}
    paper = {who: [x / 100 for x in (figures if type(figures) is tuple else [figures])]
             for who, figures in BENCHES[name].PAPER.items()}
    if name == "bfcl":
        rows = found["official"]
        ours = [rows.get(label) for label in (
            "Simple AST", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple",
            "live_parallel", "live_parallel_multiple", "Non-Live AST")]
        lines = {label + ("" if label in bfcl.PAPER_LIVE_IS_AST_ONLY else " *"): row
                 for label, row in paper.items()}
        lines[model] = [*ours, rows.get("Live AST"), rows.get("Overall")]
        lines[model + " *"] = [*ours, rows.get("Live, v3 leaderboard"), rows.get("Overall, v3 leaderboard")]
        heads = ("Simple", "Mult.", "Par.", "P.Mult.", "L-Sim.", "L-Mult.", "L-Par.", "L-P.M.",
                 "NonLive", "Live", "Overall")
        note = "* Live counts live_irrelevance and live_relevance, as the v3 leaderboard: compare * with *"
    elif name == "api_bank":
        lines = {who: [None, *figures] for who, figures in paper.items()}
        lines |= {f"{model}, {metric}": [rows.get("All entries"), rows.get("First-step calls")]
                  for metric, rows in found.items()}
        heads = ("all", "first-step")
        note = ("the paper's author says that it scores first-step calls only (NVlabs/Tool-N1, issue 12); "
                "the rest of its protocol is not published; see benchmarks/api_bank.py")
    else:
        lines = paper | {f"{model}, {metric}": [rows.get("Pooled")] for metric, rows in found.items()}
        heads, note = ("accuracy",), f"the paper's protocol is not published; see benchmarks/{name}.py"
    width = max(map(len, lines))
    columns = [max(8, len(head)) for head in heads]
    text = [f"{'':<{width}}" + "".join(f"  {head:>{n}}" for head, n in zip(heads, columns, strict=True))]
    text += [f"{who:<{width}}" + "".join(f"  {percent(x):>{n}}" for x, n in zip(row, columns, strict=True))
             for who, row in lines.items()]
    return "\n".join([*text, note])


# ---- held-out examples
def wilson(right, n, z=1.96):
    """The 95 % confidence interval (low, high) of the share p = right / n, by default; (0, 1) for n = 0:

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)         Wilson (1927)
    """
    if n == 0:
        return 0.0, 1.0
    p = right / n
    middle = p + z * z / (2 * n)
    # Wilson (1927)
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half_width) / scale), min(1.0, (middle + half_width) / scale)


def by_category(replies):
    """Yield (category, its replies) for the rows of a table; the last one is "all"."""
    rows_of = {name: {name, name.split("/")[0], "all"} for name in {reply["category"] for reply in replies}}
    for category in [*sorted(set().union(*rows_of.values()) - {"all"}), "all"]:
        yield category, [reply for reply in replies if category in rows_of[reply["category"]]]


def summarize_samples(replies, n):
    """[{"mean", "pass", "mixed"}…], shares for each row of `summarize`: of right samples, of replies with a
    right one, and with both right and wrong ones. Each reply has "samples_right", how many of n are right."""
    counts = [[reply["samples_right"] for reply in part] for _, part in by_category(replies)]
    return [{"mean": sum(right) / (n * len(right)), "pass": sum(map(bool, right)) / len(right),
             "mixed": sum(0 < k < n for k in right) / len(right)} for right in counts]


def summarize(replies):
    """Table rows from the replies of `evaluate`: one a category in alphabetical order, then "all". Replies of
    a category such as "tools/single" also count in a row "tools", which comes before its parts."""
    rows = []
    for category, part in by_category(replies):
        right = sum(reply["right"] for reply in part)
        low, high = wilson(right, len(part))
        share = {key: sum(reply[key] for reply in part) / max(1, len(part))
                 for key in ("format_ok", "names_ok", "finished")}
        rows.append({"category": category, "n": len(part), "right": right,
                     "accuracy": right / max(1, len(part)), "low": low, "high": high, **share})
    return rows


def accuracy_table(columns):
    """A text table of accuracies in percent. columns: {heading: rows of `summarize`} on the same examples."""
    first = next(iter(columns.values()))
    width = max(len(row["category"]) for row in first)
    headings = "".join(f"  {heading:>22}" for heading in columns)
    lines = [f"{'':<{width}}     n{headings}  format   names"]
    for i, row in enumerate(first):
        cells = ""
        for rows in columns.values():
            r = rows[i]
            cells += f"  {100 * r['accuracy']:6.1f} [{100 * r['low']:5.1f}, {100 * r['high']:5.1f}]"
        last = list(columns.values())[-1][i]
        lines.append(f"{row['category']:<{width}} {row['n']:>5}{cells}  {100 * last['format_ok']:5.1f} %"
                     f" {100 * last['names_ok']:5.1f} %")
    return "\n".join(lines)


def with_samples(table, rows, n):
    """The text of `accuracy_table` with columns for the rows of `summarize_samples`."""
    head, *lines = table.split("\n")
    text = [f"{head}  {f'mean of {n}':>12}  {f'pass@{n}':>8}    mixed"]
    text += [f"{line}  {100 * row['mean']:12.1f}  {100 * row['pass']:8.1f}  {100 * row['mixed']:7.1f}"
             for line, row in zip(lines, rows, strict=True)]
    return "\n".join(text)


def print_evaluation(step, rows, replies):
    """Print the accuracies at a training step on one line, then query, text and verdict of `replies`."""
    by_category = "  ".join(f"{row['category']} {row['accuracy']:.1%}" for row in rows[:-1]
                            if "/" not in row["category"])
    print(f"held-out accuracy at step {step}: {rows[-1]['accuracy']:.1%} of {rows[-1]['n']}  ({by_category})")
    for reply in replies:
        # One line each and not too long, because a query can have thousands of characters.
        query, text = (" ".join(reply[key].split())[:1000] for key in ("query", "reply"))
        verdict = "right" if reply["right"] else f"wrong: {reply['error']}"
        print(f"  asked   {query}\n  wrote   {text}\n  {verdict}", flush=True)
