"""ACEBench, English: the 500 entries of Normal / Atom (six categories) and Normal / Single-turn (two).

In:  a folder with data_<category>.json and possible_answer/data_<category>.json, JSON lines as published
     (github.com/chenchen0103/ACEBench, data_all/data_en); calls `[{"name", "arguments"}, ...]`.
Out: entries, prompts, verdicts (valid, reason), table rows. Only `load` touches files, nothing needs torch.

The `official` metric is the verdict of the published scorer, in its surprising cases too. A reason begins
with its error type.

1. Answers: one object {tool: {parameter: value}}, or a list of such, of which one must pass. Several calls of
   one tool have the keys tool_1, tool_2 and so on, so a trailing _<digits> is not part of a name.
2. Calls: as many as the answer has keys, with the same multiset of names. For each gold call *some* call of
   its name passes 3 to 5; one call may pass for several gold calls. The tool is the first one whose name is a
   part of the key.
3. Arguments: every `required` one, none that the schema or the answer lacks. An argument of the answer may be
   missing unless it is required. A call without arguments passes only if the schema is empty.
4. Types: the type of the schema (integer and number mean int, never bool), or of the answer if that differs.
   In that case, or if the value equals such an answer, 5 is skipped. The texts "true" and "false" count as
   booleans here, also if the schema says string, where they then fail. If the answer is an empty list or
   object, every value of its type fails.
5. Values: compared for strings, lists and objects only, so 2 passes for 1 and false for true. N removes
   blanks and , . / - _ * ^, lowers the case and turns ' into ".
       string            N(gold) is part of N(value): "New York City" passes for "New York", not vice versa
       list              equal in order, its strings by N
       list of objects   as long as the answer, each object compared with the one at its position
       object            the same keys; objects in it by the same rule; other values, also lists, pass if
                         str(N(gold)) is part of str(N(value)), so 12 passes for 1; "true" is True

One answer fails its own scorer (normal_single_turn_parallel_function_42 holds an empty list): 499 of 500.

The `strict` metric requires the answer: a one-to-one match of calls and gold calls with the same arguments,
none missing; strings are equal by N at any depth; types are equal, but an int passes for a float of the
answer. All 500 answers pass it.

Where we differ: the official scorer reads [Name(key='value')] and first removes all white space of a reply;
we read the JSON list of our reply format unchanged. Where the scorer crashes, the entry is wrong here, and so
are calls nested deeper than 64 or with an integer of more than about 4,200 digits. The paper (arXiv
2505.00024, Figure 3b) does not state how it averages the eight accuracies: 86.00 and 87.00 fit `Pooled`,
82.34 does not.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks import json_lines, rows_of_chosen
from benchmarks.bfcl import decode as decode  # one reply format, one way to read it

ATOM = dict.fromkeys((f"normal_atom_{name}" for name in (
    "bool", "enum", "number", "list", "object_deep", "object_short")), 50)
SINGLE_TURN = dict.fromkeys((f"normal_single_turn_{name}_function" for name in ("single", "parallel")), 100)
CATEGORIES = ATOM | SINGLE_TURN  # and how many entries each has
METRICS = ("official", "strict")
GROUPS = {}
PAPER = {"LLaMA-3.1-8B": 50.63, "GPT-4o-mini": 81.63, "Tool-N1-7B": 82.34, "Tool-N1-14B": 86.00,
         "GPT-4o": 87.00}  # percent

INSTRUCTION = (
    "The next message is a dialogue whose lines begin with user: or system:, where system is you. Reply with"
    " the calls that you should make next. A parameter is optional unless its description says otherwise:"
    " give the ones that the user mentions and leave out the others. Where a description asks for no format,"
    " use the user's own words as the value.")

MAX_DEPTH = 64
# str() raises for integers of more than 4,300 digits, about 14,284 bits.
MAX_BITS = 14_000

_TYPES = {"string": str, "integer": int, "number": int, "float": float, "boolean": bool, "array": list,
          "list": list, "object": dict, "dict": dict}
_BOOLEANS = {"true": True, "false": False}
_DROPPED = str.maketrans("", "", " ,./-_*^")


class Entry(NamedTuple):
    """One question. answer: {tool: {parameter: value}} or a list of them; time: may be empty."""

    id: str
    category: str
    tools: list
    question: str
    time: str
    answer: dict | list


# ---- files, prompts, replies
def categories(folder):
    """{category: number of entries}, of whatever folder."""
    return CATEGORIES


def load(folder, chosen=None):
    """The 500 entries, in the order of CATEGORIES and of the files.

    chosen: the categories to read, None for all; files of others need not exist.

    ValueError, naming file, line and id: a missing file, a line that is not such a record, a duplicate or
    unknown id, an unexpected number of entries.
    """
    entries = []
    for category, expected in CATEGORIES.items():
        if chosen is not None and category not in chosen:
            continue
        path = Path(folder) / f"data_{category}.json"
        answers_path = path.parent / "possible_answer" / path.name
        questions = read_lines(path, {"id": str, "question": str, "function": list, "time": str})
        answers = read_lines(answers_path, {"id": str, "ground_truth": (dict, list)})
        for place, found in ((path, questions), (answers_path, answers)):
            if len(found) != expected:
                raise ValueError(f"{place}: {len(found)} entries, expected {expected}; get the file again")
        for name, (line, record) in questions.items():
            if not all(type(tool) is dict and type(tool.get("name")) is str for tool in record["function"]):
                raise ValueError(f"{path}, line {line}: {name} has a function without a name")
        for name, (line, record) in answers.items():
            truth = record["ground_truth"]
            if name not in questions:
                raise ValueError(f"{answers_path}, line {line}: unknown id {name}; {path} has no such entry")
            if not truth or not all(isinstance(gold, dict) for gold in _alternatives(truth)):
                raise ValueError(f"{answers_path}, line {line}: {name} has no calls as its ground_truth")
        entries += [Entry(name, category, record["function"], record["question"], record["time"],
                          answers[name][1]["ground_truth"]) for name, (_, record) in questions.items()]
    return entries


def read_lines(path, fields):
    """{id: (line number, record)} of a file of JSON lines. fields: {key: type} that each record must have.

    ValueError, naming file, line and id: a missing file, a line that is not JSON, a missing field or one of
    another type, a duplicate id.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the benchmark needs this file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; get the file again") from None
    records = {}
    for number, record in json_lines(path, text, "{path}, line {number}: not JSON; is the line cut off?"):
        for key, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                raise ValueError(f"{path}, line {number}: {key} is missing or of another type")
        if record["id"] in records:
            earlier = records[record["id"]][0]
            raise ValueError(f"{path}, line {number}: duplicate id {record['id']}, first on line {earlier}")
        records[record["id"]] = number, record
    return records


def prompt(entry, paper_prompt=False):
    """-> (tools, messages), tools as in the data. paper_prompt omits our instruction.

    As in the official prompt, the dialogue is one user message, and the time, if any, is part of the system
    message.
    """
    system = "\n".join(filter(None, ["" if paper_prompt else INSTRUCTION, entry.time.strip()]))
    messages = [{"role": "user", "content": f"Conversation history 1..t:\n{entry.question}"}]
    return entry.tools, [{"role": "system", "content": system}, *messages] if system else messages


# ---- verdicts
def check(entry, calls, metric="official"):
    """(valid, reason) of one entry by one of METRICS. calls: any JSON value, None if the reply has none."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")
    if metric == "strict":
        return check_acebench_strict(calls, entry.answer)
    return check_acebench(entry.tools, calls, entry.answer)


def check_acebench(tools, calls, ground_truth):
    """The official verdict (valid, reason). It raises for no JSON value of `calls`.

    tools: schemas of the entry; ground_truth: as in the data; reason: "" or the error of the first
    alternative, as `type: details`.
    """
    return _verdict(calls, ground_truth, lambda gold: _official_problem(tools, calls, gold))


def check_acebench_strict(calls, ground_truth):
    """The strict verdict (valid, reason). It does not depend on the schemas."""
    return _verdict(calls, ground_truth, lambda gold: _strict_problem(calls, gold))


def malformed(calls):
    """Why `calls`, any JSON value, cannot be compared with an answer; None if it is a list of calls."""
    if type(calls) is not list:
        return "wrong_output_format: no list of calls"
    for call in calls:
        if type(call) is not dict or (type(call.get("name")), type(call.get("arguments"))) != (str, dict):
            return "wrong_output_format: a call without a name and an object of arguments"
    return "wrong_output_format: nested too deep, or too long an integer" if outsized(calls) else None


def outsized(value):
    """Whether a JSON value nests deeper than MAX_DEPTH or holds an integer of more than MAX_BITS bits."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if any(type(item) is int and item.bit_length() > MAX_BITS for item in level):
            return True
        level = [part for item in level if type(item) in (list, dict)
                 for part in (item.values() if type(item) is dict else item)]
    return bool(level)


def _verdict(calls, ground_truth, find_problem):
    problem = malformed(calls)
    problems = [problem] if problem else [find_problem(gold) for gold in _alternatives(ground_truth)]
    return (True, "") if None in problems else (False, problems[0])


def _alternatives(ground_truth):
    return ground_truth if isinstance(ground_truth, list) else [ground_truth]


def _official_problem(tools, calls, gold):
    """None if the calls pass for one alternative, else the error."""
    if len(calls) != len(gold):
        return f"wrong functions number: {len(calls)}, expected {len(gold)}"
    names = [_tool_name(key) for key in gold]
    if Counter(call["name"] for call in calls) != Counter(names):
        return f"function_mismatch: expected {', '.join(names)}"
    for name, (key, gold_arguments) in zip(names, gold.items(), strict=True):
        tool = next((tool for tool in tools if tool["name"] in key), None)
        for call in calls:
            problem = "simple_function_checker:unclear: " + name
            if call["name"] == name:
                problem = _call_problem(tool, name, call["arguments"], gold_arguments)
            if problem is None:
                break
        else:
            return problem
    return None


def _tool_name(key):
    return re.sub(r"_\d+$", "", key)


def _call_problem(tool, name, arguments, gold):
    schema = (tool or {}).get("parameters")
    if arguments == {} and schema == {}:
        return None
    if not arguments or not schema:
        return f"wrong_param: {name} takes {'arguments' if schema else 'none'}"
    properties = schema.get("properties")
    if gold == properties:
        return None
    if gold == {} or properties is None:
        return f"wrong_param: {name} takes no arguments"
    if tool["name"] != name:
        return f"wrong_function_name: expected {tool['name']}"
    for parameter in schema.get("required", []):
        if parameter not in arguments:
            return f"lack_args: {parameter}"
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in gold:
            return f"addition_args: {parameter[:80]!r}"
        problem = _value_problem(value, gold[parameter], properties[parameter])
        if problem:
            return f"{problem}: {parameter}"
    return None


def _value_problem(value, gold, schema):
    expected, inner = _TYPES.get(schema["type"]), None
    if schema["type"] in ("array", "object"):
        inner = _TYPES.get(schema.get("items", {}).get("type", "object"))
    if expected is float and type(value) is int:
        return None
    accepted, by_gold = _type_passes(value, gold, expected, inner)
    if not accepted:
        return "type_error"
    if by_gold:
        return None
    if expected is dict:
        return None if _object_passes(value, gold) else "value_error"
    if expected is list and inner is dict:
        if len(value) != len(gold):
            return "value_error:list_dict_count"
        return None if all(map(_object_passes, value, gold)) else "value_error"
    if expected is str:
        return None if _n(gold) in _n(value) else "value_error:string"
    if expected is list:
        return None if list(map(_n, value)) == list(map(_n, gold)) else "value_error:list/tuple"
    return None


def _type_passes(value, gold, expected, inner):
    """-> (accepted, whether by the type or value of the answer, so that the value check is skipped)."""
    gold_type = None if gold == "" else type(gold)
    by_gold = gold_type not in (None, expected)
    value = _as_boolean(value)
    if type(value) is not expected:
        passes = gold_type is not None and (type(value) is gold_type or gold == value)
        return passes, passes
    if inner is None:
        return True, by_gold
    # One part of the answer must agree, so an empty answer never does; a part that is not a list always does.
    for part in gold if isinstance(gold, (list, dict, str)) else ():
        if type(part) is not list or all(_type_passes(item, part, inner, None)[0] for item in value):
            return True, by_gold
    return False, False


def _object_passes(value, gold):
    if type(value) is not dict or type(gold) is not dict or len(value) != len(gold):
        return False
    for key, item in value.items():
        if key not in gold:
            return False
        item, gold_item = _as_boolean(item), gold[key]
        if type(gold_item) is dict:
            if not _object_passes(item, gold_item):
                return False
        elif str(_n(gold_item)) not in str(_n(item)):
            return False
    return True


def _strict_problem(calls, gold):
    left = list(calls)
    for key, arguments in gold.items():
        right = {"name": _tool_name(key), "arguments": arguments}
        match = next((i for i, call in enumerate(left) if _same_call(call, right)), None)
        if match is None:
            return f"no call of its own is equal to {key}"
        del left[match]
    return f"{len(left)} calls too many" if left else None


def _same_call(call, right):
    return call["name"] == right["name"] and _same(call["arguments"], right["arguments"])


def _same(value, gold):
    if type(value) is int and type(gold) is float:
        return value == gold
    if type(value) is not type(gold):
        return False
    if type(gold) is dict:
        return value.keys() == gold.keys() and all(_same(value[key], gold[key]) for key in gold)
    if type(gold) is list:
        return len(value) == len(gold) and all(map(_same, value, gold))
    return _n(value) == _n(gold)


def _as_boolean(value):
    return _BOOLEANS.get(value, value) if type(value) is str else value


def _n(value):
    """N, the official normal form of a string; any other value unchanged."""
    return value.translate(_DROPPED).lower().replace("'", '"') if type(value) is str else value


# ---- table
def summarize(results, chosen=None):
    """{category: {id: (valid, reason)}} -> rows {"label", "n", "expected", "right", "accuracy"}.

    chosen: the categories that were evaluated, None for all; see `rows_of_chosen`. A row a category, then the
    official means over categories, Atom and Single-turn, then all pooled. n of the `expected` entries were
    scored. Missing ones count as wrong, so the denominator is fixed. ValueError: an unknown category, or more
    verdicts than it has entries.
    """
    check_results(results, CATEGORIES)
    rows = {category: row(category, results, {category: n}) for category, n in CATEGORIES.items()}
    for label, group in (("Atom mean", ATOM), ("Single-turn mean", SINGLE_TURN)):
        mean = sum(rows[category]["accuracy"] for category in group) / len(group)
        rows[label] = row(label, results, group) | {"accuracy": mean}
    rows["Pooled"] = row("Pooled", results, CATEGORIES)
    parts = {category: [category] for category in CATEGORIES}
    parts |= {"Atom mean": ATOM, "Single-turn mean": SINGLE_TURN, "Pooled": CATEGORIES}
    return rows_of_chosen(rows.values(), parts, chosen)


def row(label, results, categories):
    """One row over the entries of `categories`, {category: number of entries}."""
    verdicts = [valid for category in categories for valid, _ in results.get(category, {}).values()]
    expected = sum(categories.values())
    return {"label": label, "n": len(verdicts), "expected": expected, "right": sum(verdicts),
            "accuracy": sum(verdicts) / expected}


def check_results(results, categories):
    """ValueError if the results have an unknown category, or more verdicts for one than it has entries."""
    for category, verdicts in results.items():
        if len(verdicts) > categories.get(category, 0):
            expected = categories.get(category, "no such category")
            raise ValueError(f"{category}: {len(verdicts)} verdicts, expected {expected}")
