"""BFCL (Berkeley Function Calling Leaderboard), single-turn: data, prompts, verdicts, averages.

In:  a folder with the leaderboard's files, BFCL_v3_<category>.json or BFCL_v4_<category>.json, JSON lines,
     and possible_answer/ with files of the same names; replies, or the calls decoded from them.
Out: entries, tools and messages of their prompts, verdicts, table rows, files for the official tool.

The rules are those of the official checker (github.com/ShishirPatil/gorilla, Apache-2.0; PyPI bfcl-eval
2026.3.23), the surprising ones included, because otherwise scores are not comparable. By category:

    irrelevance   right if nothing can be read as a call, thus also if a reply cannot be decoded
    relevance     right if there is a call, of any content
    others        as many calls as gold calls. If the name has "parallel", each gold call in turn takes the
                  first free call that agrees with it, without backtracking; else the two must agree

A gold call lists accepted values, {function: {parameter: [value, ...]}}; with "" among them the parameter may
be omitted. The checks of one call, in order:

    1. The name is equal, dots and case included. Every `required` parameter is given, "" accepted or not.
    2. The tool has each parameter, and the gold call lists it.
    3. Types are exact: neither True nor 5.0 is an integer. An integer is accepted as a float at the top
       level, but not in a list. Elements of a list must have the declared type too, one level deep, unless ""
       or another value that is not a list is accepted. The type of the first accepted value that is not "" is
       also accepted.
    4. If that type differs from the declared one, the value must be `in` the accepted ones, case included.
       Else strings are compared by N, which removes blanks and ,./-_*^, lowers the case and turns ' into ".
       N also applies to the elements of a list, the values of an object and the values of objects in a list,
       but not deeper. Order matters in lists; "" equals the empty list. Python's equality decides the rest.
    5. A gold parameter that is not given has "" among its values.

Java and JavaScript values are strings (bfcl_languages.py). Hints about that and about the language are added
to the tools in the prompt only, not to the tools that calls are checked against. Where the official checker
crashes (an integer beyond 1e308 for a float, a text among objects), the call is wrong here.

The paper (arXiv 2505.00024, Table 1) mixes two definitions of Live: its Tool-N1 rows count the four live AST
categories ("Live AST" in `summarize`), its other rows copy the column of the v3 leaderboard, which counts
live_irrelevance and live_relevance as well ("Live, v3 leaderboard"). Compare each row by its own definition.
"""

import json
from pathlib import Path
from typing import NamedTuple

from benchmarks import json_lines, rows_of_chosen
from benchmarks.bfcl_languages import LISTS, TYPES, from_java, from_javascript, hinted, language_of
from reward import CALL, END_CALL, OFFICIAL_DEPTH, OFFICIAL_DIGITS, loads_within
from runtime.files import write_text

# Categories and how many entries each has.
V3 = {"simple": 400, "java": 100, "javascript": 50, "multiple": 200, "parallel": 200,
      "parallel_multiple": 200, "irrelevance": 240, "live_simple": 258, "live_multiple": 1053,
      "live_parallel": 16, "live_parallel_multiple": 24, "live_irrelevance": 882, "live_relevance": 18}
V4_NAMES = {"simple": "simple_python", "java": "simple_java", "javascript": "simple_javascript"}
V4 = {V4_NAMES.get(name, name): n for name, n in V3.items()} | {"live_irrelevance": 884, "live_relevance": 16}
COUNTS = {"v3": V3, "v4": V4}
METRICS = ("official",)
GROUPS = {}

# Table 1 in percent: Simple, Multiple, Parallel, Parallel Multiple, those four live, Non-live, Live, Overall.
PAPER = {
    "GPT-4o": (79.42, 95.50, 94.00, 83.50, 84.88, 79.77, 87.50, 75.00, 88.10, 79.83, 83.97),
    "Qwen2.5-7B-Instruct": (75.33, 94.50, 91.50, 84.50, 76.74, 74.93, 62.50, 70.83, 86.46, 67.44, 76.95),
    "ToolACE-8B": (76.67, 93.50, 90.50, 89.50, 73.26, 76.73, 81.25, 70.83, 87.54, 78.59, 82.57),
    "Hammer2.1-7B": (78.08, 95.00, 93.50, 88.00, 76.74, 77.40, 81.25, 70.83, 88.65, 75.11, 81.88),
    "Tool-N1-7B": (77.00, 95.00, 94.50, 90.50, 82.17, 80.44, 62.50, 70.83, 89.25, 80.38, 84.82),
    "Tool-N1-14B": (80.58, 96.00, 93.50, 92.00, 84.10, 81.10, 81.25, 66.67, 90.52, 81.42, 85.97),
}
PAPER_LIVE_IS_AST_ONLY = ("Tool-N1-7B", "Tool-N1-14B")

# A model that the official tool knows and whose result files have a JSON object for each call.
OFFICIAL_MODEL = "Qwen/Qwen3-8B-FC"


class Entry(NamedTuple):
    """One question. functions: as in the data; messages: {"role", "content"}; answer: the gold calls, None in
    the categories irrelevance and relevance."""

    id: str
    category: str
    functions: list
    messages: list
    answer: list | None


# ---- data
def categories(folder):
    """{category: number of entries} of the version, v3 or v4, whose files a folder has. ValueError: it has
    none, or both."""
    versions = [version for version in COUNTS if any(Path(folder).glob(f"BFCL_{version}_*.json"))]
    if len(versions) != 1:
        found = " and ".join(versions) or "no"
        raise ValueError(f"{folder}: {found} BFCL files; name a folder with those of v3 or of v4")
    return COUNTS[versions[0]]


def load(folder, chosen=None):
    """The entries of a folder with the files of v3 or v4, in the order of COUNTS, then of the files.

    chosen: the categories to read, None for all; files of others need not exist.

    Questions and answers are paired by line, because an id of the data of April 2025 differs between the two.
    In that data live_relevance also has a duplicate id; the second entry is renamed as in later data.
    ValueError, naming file and line: a missing file, a line that cannot be read, a duplicate id, an
    unexpected number of entries.
    """
    folder, counts = Path(folder), categories(folder)
    entries, seen = [], set()
    for category, expected in counts.items():
        if chosen is not None and category not in chosen:
            continue
        path = folder / f"BFCL_{_version(counts)}_{category}.json"
        questions = _read(path, ("id", "question", "function"), expected)
        answers = [(None, {"ground_truth": None})] * expected
        if "relevance" not in category:
            answers = _read(folder / "possible_answer" / path.name, ("id", "ground_truth"), expected)
        for (place, question), (_, answer) in zip(questions, answers, strict=True):
            id = question["id"]
            if id in seen and id == "live_relevance_3-3-0":
                id = "live_relevance_17-17-0"
            if id in seen:
                raise ValueError(f"{place}: the id {id!r} stands twice; take the file from its source again")
            seen.add(id)
            entries.append(Entry(id, category, question["function"], question["question"][0],
                                 answer["ground_truth"]))
    return entries


def _read(path, keys, expected):
    """[(place, record), ...] of a file of JSON lines, each an object with these keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8 text")
        raise ValueError(f"{path}: cannot be read ({why}); BFCL needs it") from None
    records = []
    for number, record in json_lines(path, text):
        if not isinstance(record, dict) or any(key not in record for key in keys):
            raise ValueError(f"{path}:{number}: not an object with {', '.join(keys)}")
        records.append((f"{path}:{number}", record))
    if len(records) != expected:
        raise ValueError(f"{path}: {len(records)} entries, expected {expected}; is it whole?")
    return records


# ---- prompts and replies
def prompt(entry, paper_prompt=False):
    """(tools, messages) of an entry: the tools with hints about their language, the messages as in the data.

    92 live entries begin with a system message, which the paper's run replaced by its own text. paper_prompt
    omits it.
    """
    tools = [hinted(function, language_of(entry.category)) for function in entry.functions]
    messages = [m for m in entry.messages if m["role"] != "system"] if paper_prompt else entry.messages
    return tools, messages


def decode(reply_text):
    """The calls of a reply, or None if they cannot be read, by the rule of the paper's run: the first
    <tool_call>...</tool_call> holds a JSON list of objects with name and arguments; <think> is optional."""
    start = reply_text.find(CALL)
    end = reply_text.find(END_CALL, start)
    if start < 0 or end < 0:
        return None
    try:
        calls = loads_within(reply_text[start + len(CALL):end].strip(), OFFICIAL_DEPTH, OFFICIAL_DIGITS)
    except ValueError:
        return None
    return calls if _are_calls(calls) else None


def _are_calls(calls):
    return type(calls) is list and all(
        type(call) is dict and {"name", "arguments"} <= call.keys() and type(call["name"]) not in (list, dict)
        for call in calls)


# ---- verdicts
def check(entry, calls, metric="official"):
    """(whether the calls are right, "" or the reason). calls: any JSON value, None for a reply that cannot be
    decoded; metric: as in the other benchmarks; BFCL has only one."""
    return check_bfcl(entry.functions, calls, entry.answer, language_of(entry.category), entry.category)


def check_bfcl(functions, calls, possible_answer, language, category):
    """(valid, reason) by the official rules. It raises for no value of `calls`.

    functions: tool schemas without hints. calls: [{"name", "arguments"}...]; any other value counts as a
    reply that cannot be decoded. possible_answer: the gold calls. language: python, java or javascript.
    category: its name selects the rule. reason: "" or the official error type and a detail.
    """
    if not _are_calls(calls):
        calls = None
    has_format = calls is not None and all(type(call["arguments"]) is dict for call in calls)
    if "relevance" in category:
        called = has_format and len(calls) > 0
        if "irrelevance" in category:
            return not called, "irrelevance_error:decoder_success: a call where none fits" if called else ""
        return called, "" if called else "relevance_error:decoder_failed: no call where one fits"
    if calls is None:
        return False, "ast_decoder:decoder_failed: not a list of calls"
    if not has_format:
        return False, "ast_decoder:decoder_wrong_output_format: arguments that are not an object"

    rule = next((rule for rule in ("parallel", "multiple") if rule in category), "simple")
    checker = {"parallel": "parallel_function_checker_no_order"}.get(rule, f"{rule}_function_checker")
    wanted = 1 if rule == "simple" else len(possible_answer)
    if len(calls) != wanted:
        return False, f"{checker}:wrong_count: {len(calls)} calls, expected {wanted}"
    if rule == "simple":
        error = _call_error(functions[0], calls[0], possible_answer[0], language)
        return not error, error
    docs = {function["name"]: function for function in reversed(functions)}
    free = list(calls)
    for gold in possible_answer:
        function, errors = docs[next(iter(gold))], []
        for i, call in enumerate(free):
            errors.append(_call_error(function, call, gold, language))
            if not errors[-1]:
                del free[i]
                break
        else:
            if rule == "multiple":
                return False, errors[0]
            return False, f"{checker}:cannot_find_match: of {function['name']}; " + "; ".join(errors)[:400]
    return True, ""


def _call_error(function, call, gold, language):
    """"" if a call agrees with a gold call, else the official error type and a detail."""
    checker, (accepted,) = "simple_function_checker", gold.values()
    properties, arguments = function["parameters"]["properties"], call["arguments"]
    if call["name"] != function["name"]:
        return f"{checker}:wrong_func_name: {_show(call['name'])}, expected {_show(function['name'])}"
    for name in function["parameters"]["required"]:
        if name not in arguments:
            return f"{checker}:missing_required: {_show(name)}"
    for name, value in arguments.items():
        if name not in properties or name not in accepted:
            return f"{checker}:unexpected_param: {_show(name)}"
        error = _value_error(value, accepted[name], properties[name], language)
        if error:
            return f"{error}: {_show(name)} is {_show(value)}, accepted {_clip(str(accepted[name]))}"
    for name, values in accepted.items():
        if name not in arguments and "" not in values:
            return f"{checker}:missing_optional: {_show(name)}"
    return ""


def _value_error(value, accepted, schema, language):
    """"" if a value agrees with one of the accepted values, else the official error type."""
    kind = schema["type"]
    expected = TYPES[language][kind]
    if language != "python" and type(value) is not str:
        return "type_error:java" if language == "java" else "type_error:js"
    element_kind = schema["items"]["type"] if kind in LISTS[language] else None
    element = TYPES[language][element_kind] if element_kind else None
    if language != "python":
        value = (from_java if language == "java" else from_javascript)(value, kind, element_kind)
    if language == "python" and kind == "float" and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            return "type_error:simple"

    error, has_other_type = _type_error(value, accepted, expected, element)
    if error:
        return error
    if has_other_type or expected not in (dict, list, str):
        return "" if value in accepted else "value_error:others"
    if expected is dict:
        return _dict_error(value, accepted)
    if expected is str:
        right = _plain(value) in [_plain(other) for other in accepted if type(other) is str]
        return "" if right else "value_error:string"
    if element is dict:
        return _dict_list_error(value, accepted)
    # A text among the accepted lists is read as the list of its characters, so "" is the empty list.
    right = [_plain(item) for item in value] in [[_plain(item) for item in other] for other in accepted]
    return "" if right else "value_error:list/tuple"


def _type_error(value, accepted, expected, element):
    """("" or the official error type, whether the value has the type of the first accepted value instead)."""
    first = next((type(other) for other in accepted if other != ""), None)
    if type(value) is not expected:
        return ("", True) if type(value) is first else ("type_error:simple", False)
    if element is None or any(
            type(other) is not list or not any(_type_error(item, other, element, None)[0] for item in value)
            for other in accepted):
        return "", first not in (None, expected)
    return "type_error:nested" if first is expected else "type_error:simple", False


def _plain(value):
    """N: a string in lower case without blanks and some marks, with ' as "; any other value unchanged."""
    return value.translate(_DELETED).lower().replace("'", '"') if type(value) is str else value


_DELETED = dict.fromkeys(map(ord, " ,./-_*^"))


def _dict_error(value, accepted):
    error = "dict_checker:unclear"
    for other in accepted:
        if other == "":
            continue
        if type(value) is not dict or type(other) is not dict:
            return "value_error:dict_value"
        error = ""
        for key, item in value.items():
            if key not in other:
                error = "value_error:dict_key"
            elif _plain(item) not in [_plain(choice) for choice in other[key]]:
                error = "value_error:dict_value"
            if error:
                break
        if any(key not in value and "" not in choices for key, choices in other.items()):
            error = "value_error:dict_key"
        if not error:
            break
    return error


def _dict_list_error(value, accepted):
    error = "list_dict_checker:unclear"
    for other in accepted:
        error = "value_error:list_dict_count"
        if len(value) == len(other):
            errors = (_dict_error(item, [gold]) for item, gold in zip(value, other, strict=True))
            error = next(filter(None, errors), "")
        if not error:
            break
    return error


def _show(value):
    """A value as shown in an error: short, even if the value nests deeply or has a million digits."""
    if type(value) in (list, dict):
        return f"a {'list' if type(value) is list else 'dictionary'} of {len(value)}"
    if type(value) is int and value.bit_length() > 128:
        return "a huge integer"
    return _clip(repr(value[:100] if type(value) is str else value))


def _clip(text, most=100):
    return (text if len(text) <= most else text[:most - 1] + "…").encode(errors="replace").decode()


# ---- the table
def summarize(results, chosen=None):
    """{category: {id: (valid, reason)}} -> rows {"label", "n", "expected", "right", "accuracy"}.

    chosen: the categories that were evaluated, None for all; see `rows_of_chosen`. A row a category, then
        Simple AST               mean of the accuracies of Python, Java and JavaScript
        Non-Live AST             mean of Simple AST and the other three: the paper's Non-live
        Live AST                 all entries of the four live ones: the paper's Live in its Tool-N1 rows
        Live, v3 leaderboard     those, live_irrelevance and live_relevance: the paper's Live in other rows
        Irrelevance, Relevance   mean of irrelevance and live_irrelevance; live_relevance
        Overall                  mean of Non-Live AST and Live AST: the paper's in its Tool-N1 rows
        Overall, v3 leaderboard  mean of Non-Live AST and Live, v3 leaderboard: the paper's in other rows
    n of the `expected` entries were scored. Missing ones count as wrong, so the denominator is fixed. Names
    of categories of v4 select the table of v4, whose leaderboard calls Live AST Live. ValueError: an unknown
    category, or more verdicts than it has entries.
    """
    counts = COUNTS[_version(results)]
    for category, verdicts in results.items():
        if len(verdicts) > counts.get(category, 0):
            expected = counts.get(category, "no such category")
            raise ValueError(f"{category}: {len(verdicts)} verdicts, expected {expected}")
    rows, leaves = {}, {category: [category] for category in counts}
    for category, expected in counts.items():
        verdicts = results.get(category, {}).values()
        right = sum(valid for valid, _ in verdicts)
        rows[category] = {"label": category, "n": len(verdicts), "expected": expected, "right": right,
                          "accuracy": right / expected}

    def average(label, names, over_entries=False):
        parts = [rows[name] for name in names]
        row = {key: sum(part[key] for part in parts) for key in ("n", "expected", "right")}
        mean = sum(part["accuracy"] for part in parts) / len(parts)
        accuracy = row["right"] / row["expected"] if over_entries else mean
        rows[label] = {"label": label, **row, "accuracy": accuracy}
        leaves[label] = [leaf for name in names for leaf in leaves[name]]

    others = ("multiple", "parallel", "parallel_multiple")
    live = [f"live_{name}" for name in ("simple", *others)]
    average("Simple AST", list(counts)[:3])
    average("Non-Live AST", ["Simple AST", *others])
    average("Live AST", live, over_entries=True)
    average("Live, v3 leaderboard", [*live, "live_irrelevance", "live_relevance"], over_entries=True)
    average("Irrelevance", ["irrelevance", "live_irrelevance"])
    average("Relevance", ["live_relevance"])
    average("Overall", ["Non-Live AST", "Live AST"])
    average("Overall, v3 leaderboard", ["Non-Live AST", "Live, v3 leaderboard"])
    return rows_of_chosen(rows.values(), leaves, chosen)


def _version(names):
    return "v4" if any(name in names for name in V4_NAMES.values()) else "v3"


# ---- files for the official command line
def export_official(results_by_category, folder, chosen=None):
    """Write {category: {id: calls}}, calls as for `check`, as result files of the official tool -> paths.

    chosen: the categories to write, None for all of them.

    They have the paths in `folder` and the names, of v4 or v3, of results of OFFICIAL_MODEL, so that
        bfcl evaluate --model Qwen/Qwen3-8B-FC --test-category single_turn --result-dir FOLDER
    scores them. ValueError: an unknown category, a file that cannot be written.
    """
    version = _version(results_by_category)
    model_folder = Path(folder) / OFFICIAL_MODEL.replace("/", "_")
    paths = []
    for category, outputs in results_by_category.items():
        if category not in COUNTS[version]:
            raise ValueError(f"{category}: no such category in BFCL {version}")
        if chosen is not None and category not in chosen:
            continue
        # v4 expects the files in two folders, v3 directly in the folder of the model.
        group = {"v3": ".", "v4": "live" if category.startswith("live") else "non_live"}[version]
        path = model_folder / group / f"BFCL_{version}_{category}_result.json"
        lines = []
        for id, calls in outputs.items():
            calls = calls if _are_calls(calls) else []
            result = "\n".join(f"{CALL}\n{json.dumps(call)}\n{END_CALL}" for call in calls)
            lines.append(json.dumps({"id": id, "result": result}) + "\n")
        write_text(path, "".join(lines))
        paths.append(path)
    return paths
