"""The public benchmarks, scored by their official rules: one module each, pure functions without torch.

Each has categories(folder) -> {category: number of entries}, load(folder, categories) -> entries,
prompt(entry) -> (tools, messages), decode(reply) -> calls or None, check(entry, calls) -> (valid, reason),
summarize(results, categories) -> table rows, and GROUPS, {name: predicate}: parts of the entries, across
categories, with a row of their own in the results. `categories` are the chosen ones; None means all.
"""

import json

BAD_LINE = "{path}:{number}: not JSON ({error}); is the line cut off?"


def json_lines(path, text, message=BAD_LINE):
    """Yield (line number, value) of the lines of a JSON-lines file; blank lines are skipped.

    path: of the file, for the message; text: its contents. ValueError, saying `message`: a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(message.format(path=path, number=number, error=error)) from None
        yield number, value


def choose_categories(known, text):
    """The names of `text`, separated by commas, in the order of `known`; all if text is None. ValueError,
    naming those that are known: an unknown name."""
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    unknown = [repr(name) for name in names if name not in known]
    if unknown:
        raise ValueError(f"--categories: {', '.join(unknown)} unknown; choose from {', '.join(known)}")
    return [name for name in known if name in names]


def evenly_spaced(examples, n):
    """At most `n` examples at even distances, so that every part of a file counts; all if n is None."""
    n = len(examples) if n is None else min(n, len(examples))
    return [examples[i * len(examples) // n] for i in range(n)]


def of_each(items, n, category):
    """At most n items of each category, evenly spaced; all if n is None."""
    groups = {}
    for item in items:
        groups.setdefault(category(item), []).append(item)
    return [item for group in groups.values() for item in evenly_spaced(group, n)]


def rows_of_chosen(rows, parts, chosen):
    """The rows of a table that the chosen categories allow.

    rows: of `summarize`, over all categories; parts: {label: categories of the row}; chosen: None means all.
    A row without a chosen category is left out. One that lacks some has None as its accuracy, because an
    average over the others would be another quantity, and names them under "missing".
    """
    kept = []
    for row in rows:
        missing = [name for name in parts[row["label"]] if chosen is not None and name not in chosen]
        if len(missing) < len(parts[row["label"]]):
            kept.append(row | ({"accuracy": None, "missing": missing} if missing else {}))
    return kept
