"""API-Bank, level 1, Call mode: 399 points in dialogues at which one call of a given tool is expected.

In:  a folder with level-1-api.json, the official file (github.com/AlibabaResearch/DAMO-ConvAI, api-bank), or
     with level1_call.jsonl, the same samples in parsed form; calls `[{"name", "arguments"}, ...]`.
Out: entries, prompts, verdicts (valid, reason), table rows. Only `load` touches files, nothing needs torch.

Nothing is executed. There must be one call; it is compared with the answer, whose values are all texts.
`exact`: the same name, the same argument names, and for each the same text, str(value) without blanks at its
ends: 2 is "2", true is "True", ["a"] is "['a']", but 2.0 is not "2". `lenient`: the same, but these may
differ:

    case        names of scenes and switches, stock_code, user_id, receiver of a mail, symptom of
                SymptomSearch, and the keyword or name of Dictionary, Wiki, SearchEngine and PlayMusic
    spelling    dates and times of appointments, stocks, health data, switches and history (2023-3-5); blanks
                in a formula; lists and objects, JSON or not, by their parts; health_data in any order
    wording     content of an agenda or, in any case, of a reminder, topic of a meeting: |A & B| / |A | B| of
                the sets of words above 1/2 (Jaccard)
    any other   of an agenda, reminder or meeting to delete, but not its token and its time (start_time)

These are the comparisons of the tools, as far as they compare the call and not its result.

Denominators: 399 entries, or 389, because 10 of them, those with an odd sample_id, repeat the call of
another. 8 answers (TimedSwitch, CancelTimedSwitch) have an argument `device_id`, which the schema that is
shown to the model calls `name`, so no model can produce them.

The official scorer executes instead: it searches [Name(key='value')] with a regular expression, calls the
Python tool in a fresh set of tools, without the earlier calls of the dialogue, and the tool compares input,
output and exception with the recorded ones, over the 389. The official answers score 328 of them, 84.3 % (332
if an online translator answers): nested quotes break the expression (all 19 RecordHealthData calls, lists of
attendees), `device_id` is rejected, the state of earlier calls is missing, some recordings are stale.

The paper's author says (github.com/NVlabs/Tool-N1, issue 12) that the paper (arXiv 2505.00024, Figure 3)
scores first-step calls only, without tool feedback. 212 entries are such: no earlier call is in their
dialogue. They have a row, and the paper's figures are shown beside it. How the paper compares calls and which
entries it counts is not published: none of its five figures is a fraction of 212, three are fractions of 197
or 394 and those of Tool-N1 of 219. So no row here is certain to be the same measurement.
"""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks import rows_of_chosen
from benchmarks.acebench import check_results, malformed, outsized, read_lines, row
from benchmarks.bfcl import decode as decode  # one reply format, one way to read it
from reward import format_calls

CATEGORIES = {"level1": 389, "level1_repeated": 10}  # and how many entries each has
FIRST_STEP = {"first_step": 212}  # a part of level1: no earlier call in the dialogue
METRICS = ("exact", "lenient")
PAPER = {"LLaMA-3.1-8B": 60.41, "GPT-4o-mini": 73.10, "GPT-4o": 77.16, "Tool-N1-7B": 81.28,
         "Tool-N1-14B": 82.19}  # percent

YEAR = "The current year is 2023."
INSTRUCTION = "Reply with exactly one call: the next one that this dialogue needs."
REQUEST = "Generate the API request."

_CALL = re.compile(r"\[(\w+)\((.*?)\)\](?:->(.*)|\s*$)", re.DOTALL)
# Values contain quotes, so a value ends only before the next argument or at the end.
_ARGUMENT = re.compile(r"(\w+)='(.*?)'(?=, \w+='|$)", re.DOTALL)
_TURN = re.compile(r"^(User|AI|API-Request): ?", re.MULTILINE)
_ROLES = {"User": "user", "AI": "assistant", "API-Request": "api"}


class Entry(NamedTuple):
    """One expected call. messages: chat messages, with earlier calls and results; answer: the right call
    {"name", "arguments"}."""

    id: str
    category: str
    tools: list
    messages: list
    answer: dict


def is_first_step(entry):
    """Whether the dialogue has no earlier call, so the model sees no feedback of a tool."""
    return all(message["role"] != "tool" for message in entry.messages)


GROUPS = {"first_step": is_first_step}


# ---- files, prompts
def categories(folder):
    """{category: number of entries}, of whatever folder."""
    return CATEGORIES


def load(folder, chosen=None):
    """The 399 entries, in the order of the file: level1_call.jsonl if it exists, else level-1-api.json. Or
    those of the `chosen` categories.

    ValueError, naming file and line or sample: a missing file, a record that is not a sample, a duplicate, an
    unexpected number of entries.
    """
    path, official = Path(folder) / "level1_call.jsonl", Path(folder) / "level-1-api.json"
    if path.exists():
        fields = {"id": str, "sample_id": int, "tools": list, "turns": list, "answer": dict}
        samples = {f"{path}, line {line}": record for line, record in read_lines(path, fields).values()}
    else:
        path, samples = official, _official_samples(official)
    entries = [_entry(place, sample) for place, sample in samples.items()]
    for category, expected in CATEGORIES.items():
        n = sum(entry.category == category for entry in entries)
        if n != expected:
            raise ValueError(f"{path}: {n} entries of {category}, expected {expected}; get the file again")
    return [entry for entry in entries if chosen is None or entry.category in chosen]


def _official_samples(path):
    """{place: sample} of level-1-api.json, in the form of a line of level1_call.jsonl."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; it or level1_call.jsonl must be there") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON; is the file cut off?") from None
    samples, seen = {}, set()
    for i, record in enumerate(records if isinstance(records, list) else [records]):
        place = f"{path}, sample {i}"
        try:
            key = record["file"], record["id"]
            _, *parts = _TURN.split(record["input"].rpartition("\nGenerate API Request:")[0])
            tools = record["instruction"].partition("API descriptions:\n")[2].split("\n")
            samples[place] = {
                "id": f"api_bank_l1_{i}", "sample_id": record["id"],
                "tools": [json.loads(tool) for tool in tools if tool.strip()],
                "turns": [{"role": _ROLES[role], "content": text.removesuffix("\n")}
                          for role, text in zip(parts[::2], parts[1::2], strict=True)],
                "answer": _read_call(record["expected_output"])[0]}
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{place}: not a sample of API-Bank; get the file again") from None
        if key in seen:
            raise ValueError(f"{place}: duplicate of {key[0]}, id {key[1]}")
        seen.add(key)
    return samples


def _read_call(text):
    """`[Name(key='value', ...)]`, with or without `->result` -> (call, result or None)."""
    found = _CALL.search(text)
    if not found:
        raise ValueError("no call")
    name, arguments, result = found.groups()
    return {"name": name, "arguments": dict(_ARGUMENT.findall(arguments))}, result


def _entry(place, sample):
    messages = []
    try:
        for turn in sample["turns"]:
            if turn["role"] == "api":
                call, result = _read_call(turn["content"])
                messages.append({"role": "assistant", "content": format_calls([call])})
                messages.append({"role": "tool", "content": result or ""})
            else:
                messages.append({"role": turn["role"], "content": turn["content"]})
        answer = {"name": sample["answer"]["name"], "arguments": sample["answer"]["arguments"]}
        good = bool(messages) and all(type(value) is str for value in answer["arguments"].values())
    except (KeyError, TypeError, AttributeError, ValueError):
        good = False
    if not good or malformed([answer]):
        raise ValueError(f"{place}: {sample['id']} has no turns, or no call of texts as its answer")
    category = "level1_repeated" if sample["sample_id"] % 2 else "level1"
    return Entry(sample["id"], category, sample["tools"], messages, answer)


def prompt(entry, paper_prompt=False):
    """-> (tools, messages), tools as in the data. paper_prompt omits our instruction.

    The dialogue becomes chat turns, with earlier calls in our reply format. As in the official prompt, the
    year comes before it and a request for the call after it.
    """
    system = {"role": "system", "content": YEAR if paper_prompt else f"{YEAR} {INSTRUCTION}"}
    messages, last = [system, *entry.messages[:-1]], entry.messages[-1]
    if last["role"] == "user":
        return entry.tools, [*messages, {"role": "user", "content": f"{last['content']}\n\n{REQUEST}"}]
    return entry.tools, [*messages, last, {"role": "user", "content": REQUEST}]


# ---- verdicts
def check(entry, calls, metric="exact"):
    """(valid, reason) of one entry by one of METRICS. calls: any JSON value, None if the reply has none."""
    problem = _problem(calls, entry.answer, metric)
    return problem is None, problem or ""


def check_api_bank(calls, answer, mode):
    """Whether `calls`, any JSON value, is the one right call. mode: "exact" or "lenient".

    answer: {"name", "arguments"} with texts as values. ValueError: an unknown mode.
    """
    return _problem(calls, answer, mode) is None


def _problem(calls, answer, mode):
    if mode not in METRICS:
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(METRICS)}")
    problem = malformed(calls)
    if problem:
        return problem
    if len(calls) != 1:
        return f"calls: {len(calls)}, expected 1"
    name, arguments, right = calls[0]["name"], calls[0]["arguments"], answer["arguments"]
    if name != answer["name"]:
        return f"name: expected {answer['name']}"
    if arguments.keys() != right.keys():
        return f"arguments: expected {', '.join(right) or 'none'}"
    for parameter, value in arguments.items():
        same = _text(value) == _text(right[parameter])
        if not same and not (mode == "lenient" and _is_equivalent(name, parameter, value, right[parameter])):
            return f"value: {parameter}, expected {right[parameter]}"
    return None


def _text(value):
    return str(value).strip()


def _is_equivalent(tool, parameter, value, right):
    if parameter in _IGNORED.get(tool, ()):
        return True
    if parameter == _WORDS.get(tool):
        words, right_words = (set(_normal(tool, parameter, text).split(" ")) for text in (value, right))
        return len(words & right_words) / len(words | right_words) > 0.5
    parts, right_parts = _parts(value), _parts(right)
    if parts is None or right_parts is None:
        return _normal(tool, parameter, value) == _normal(tool, parameter, right)
    if parameter == "health_data":
        parts, right_parts = (sorted(part, key=_sort_key) for part in (parts, right_parts))
    return parts == right_parts


def _normal(tool, parameter, value):
    return _NORMAL.get(tool, {}).get(parameter, str)(_text(value))


def _parts(value):
    """A list or object, or a text that denotes one in JSON or Python, with its values as texts; else None."""
    if type(value) is str and value.strip().startswith(("[", "{")):
        for text in (value, value.replace("'", '"')):
            try:
                value = json.loads(text)
                break
            except (ValueError, RecursionError):
                continue
    return _texts(value) if type(value) in (list, dict) and not outsized(value) else None


def _texts(value):
    if type(value) is list:
        return [_texts(item) for item in value]
    if type(value) is dict:
        return {key: _texts(item) for key, item in value.items()}
    return _text(value)


def _sort_key(value):
    return json.dumps(value, sort_keys=True)


def _day(text):
    return _moment(text, "%Y-%m-%d")


def _second(text):
    return _moment(text, "%Y-%m-%d %H:%M:%S")


def _day_of_year(text):
    # 2000 is a leap year, so February 29 is a valid day if no year is given.
    day = _day(text if text.count("-") == 2 else f"2000-{text}")
    return (day.month, day.day) if isinstance(day, datetime) else text


def _moment(text, form):
    year, dash, rest = text.partition("-")
    try:
        return datetime.strptime(year.zfill(4) + dash + rest, form)
    except ValueError:
        return text


def _unspaced(text):
    return text.replace(" ", "")


_IGNORED = {"DeleteAgenda": ("content", "location"), "DeleteReminder": ("content",),
            "DeleteMeeting": ("meeting_topic", "end_time", "location", "attendees")}
_WORDS = {"AddAgenda": "content", "QueryAgenda": "content", "ModifyAgenda": "content",
          "AddReminder": "content", "QueryReminder": "content", "ModifyReminder": "content",
          "AddMeeting": "meeting_topic", "QueryMeeting": "meeting_topic", "ModifyMeeting": "meeting_topic"}
_NORMAL = {
    "AddReminder": {"content": str.lower}, "QueryReminder": {"content": str.lower},
    "ModifyReminder": {"content": str.lower},
    "AddScene": {"name": str.lower}, "QueryScene": {"name": str.lower}, "ModifyScene": {"name": str.lower},
    "DeleteScene": {"name": str.lower},
    "TimedSwitch": {"name": str.lower, "time": _second},
    "CancelTimedSwitch": {"name": str.lower, "time": _second},
    "AppointmentRegistration": {"date": _day}, "QueryRegistration": {"date": _day},
    "ModifyRegistration": {"new_appointment_date": _day},
    "QueryStock": {"stock_code": str.upper, "date": _day},
    "QueryHealthData": {"user_id": str.upper, "start_time": _second, "end_time": _second},
    "RecordHealthData": {"user_id": str.upper, "time": _second},
    "QueryHistoryToday": {"date": _day_of_year},
    "SymptomSearch": {"symptom": str.lower}, "SendEmail": {"receiver": str.lower},
    "Calculator": {"formula": _unspaced},
    # These tools compare only their results, and search without case.
    "Dictionary": {"keyword": str.lower}, "Wiki": {"keyword": str.lower},
    "SearchEngine": {"keyword": str.lower}, "PlayMusic": {"music_name": str.lower},
}


# ---- table
def summarize(results, chosen=None):
    """{category: {id: (valid, reason)}} -> rows {"label", "n", "expected", "right", "accuracy"}.

    results: besides the categories, the group first_step holds the verdicts on such entries once more.
    chosen: the categories that were evaluated, None for all; see `rows_of_chosen`. Three rows: all 399
    entries, the 389 without repeated calls, and the 212 first-step calls. n of the `expected` entries were
    scored; missing ones count as wrong. ValueError: an unknown category, or more verdicts than its entries.
    """
    check_results(results, CATEGORIES | FIRST_STEP)
    without_repeated = {"level1": CATEGORIES["level1"]}
    rows = [row("All entries", results, CATEGORIES), row("Without repeated calls", results, without_repeated),
            row("First-step calls", results, FIRST_STEP)]
    return rows_of_chosen(rows, {"All entries": CATEGORIES, "Without repeated calls": without_repeated,
                                 "First-step calls": without_repeated}, chosen)
