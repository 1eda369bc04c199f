"""Reply text and ground truth in, verdict out. Pure Python, shared by training and evaluation.

In: `reply`, the text that the model generated, without the prompt, and `answer`, the right calls,
`[{"name": str, "arguments": dict}, ...]`, where `[]` means that no tool fits. Out: a `Verdict`.
The format, as `format_reply` renders it:

    <think>any reasoning, may be empty</think>
    <tool_call>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}]</tool_call>

The strict reader removes at most one trailing stop token and trims blanks (space, tab, CR, LF). Then each of
the four tags must occur exactly once, in this order, the first and the last at the ends of the text, with
only blanks between the blocks and no chat marker anywhere. The payload is a JSON list of objects with exactly
`name` (a string) and `arguments` (an object). It has no duplicate key, no NaN or Infinity (1e999 is one), at
most 64 nested brackets, at most 64 kB (65536 bytes of UTF-8) and integers of at most 40 digits.
Calls are right if the multisets of (name, arguments) are equal. The order of keys does not matter, the order
of lists does, and types are distinct: true, 1, 1.0 and "1" all differ (but 1.0 is 1e0, and -0.0 is 0.0).

Schemes (arXiv 2505.00024, Table 4). *Reasoning* means that the reply begins with its only <think>...</think>,
without a chat marker in it. *Calls* are the payload, strictly read, of the only <tool_call>...</tool_call>,
which ends the reply:

    binary                 1 if the strict format holds and the calls are right, else 0: the method
    binary_no_reasoning    1 if the calls are right, with any text before the call block
    partial_format         0.2 reasoning + 0.8 calls right
    partial_format_names   0.2 reasoning + (0.8 calls right, else 0.2 if the multiset of names is right)
    official               1 or 0, the verdict of the authors' released scorer

Where we differ: the paper requires the output *wrapped* in both blocks, its code the think tags anywhere.
`binary` follows the paper. `official` follows the code, which reads from the last assistant header on, takes
the last call block, accepts one object, or a JSON string of it or of the list, as the list, and takes the
last of duplicate keys; where the code crashes, `official` is 0. The other schemes use the strict reader.
"""

import json
import math
import os
import re
from collections import Counter
from itertools import accumulate
from typing import NamedTuple

SCHEMES = ("binary", "binary_no_reasoning", "partial_format", "partial_format_names", "official")

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
# The tokens of a chat format; the last one ends a turn. chatml is that of Qwen2.5, Qwen3 and SmolLM2.
CHAT_FORMATS = {"chatml": (IM_START, IM_END),
                "llama3": ("<|begin_of_text|>", HEADER, END_HEADER, "<|eot_id|>")}
STOP_TOKENS = (IM_END, "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
CHAT_MARKERS = (IM_START, "<|begin_of_text|>", HEADER, END_HEADER, *STOP_TOKENS)
BLANKS = " \t\r\n"
MAX_DEPTH, MAX_BYTES, MAX_DIGITS = 64, 64 * 1024, 40
# The released scorer crashes at limits that depend on the interpreter and the call stack. These are fixed.
OFFICIAL_DEPTH, OFFICIAL_DIGITS = 500, 4300

_FIELDS = {"name", "arguments"}
_NO_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[^][{}"]+', re.DOTALL)
_DEPTH_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_KINDS = {str: "string", bool: "boolean", int: "integer", float: "float", list: "list", dict: "object"}


class Verdict(NamedTuple):
    """The result of `score` and `judge`."""

    reward: float
    format_ok: bool  # the strict format holds, under every scheme
    names_ok: bool  # the multiset of names is right; may be true, as calls_ok, where format_ok is false
    calls_ok: bool
    calls: list | None  # as the scheme reads them; None if it cannot
    error: str | None  # None if the reward is full, else one sentence that says what to change
    raised: bool = False  # the reward raised an exception, which `error` names


def format_calls(calls):
    """The call block on one line: the end of a right reply, and an earlier call turn in a prompt."""
    return f"{CALL}{json.dumps(calls, ensure_ascii=False)}{END_CALL}"


def format_reply(calls, reasoning=""):
    """The text of a right reply. It scores 1 unless a string contains a tag or marker or exceeds a limit."""
    return f"{THINK}{reasoning}{END_THINK}\n{format_calls(calls)}"


def parse_reply(reply):
    """Read any string strictly, in linear time -> (calls or None, None or the error in the format)."""
    calls, *errors = _read(reply)
    return calls, next(filter(None, errors), None)


def score(reply, answer, scheme="binary"):
    """The Verdict on one reply, with a reward in [0, 1], in linear time. It raises for no string. ValueError:
    an unknown scheme, or an answer that is not a list of calls."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown reward scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
    _check_calls(answer, "ground truth")
    calls, calls_error, reasoning_error, layout_error = _read(reply)
    format_error = calls_error or reasoning_error or layout_error
    if scheme == "official":
        calls, calls_error = _attempt(_official_calls, reply)
    else:
        # Written as JSON and read again, so that -0.0 becomes 0.0 as in the reply.
        answer = json.loads(json.dumps(answer), parse_float=lambda text: float(text) + 0.0)
    names_ok, error = (False, calls_error) if calls is None else _compare(calls, answer)
    calls_ok = error is None

    if scheme == "binary":
        error = format_error or error
    elif scheme.startswith("partial"):
        error = reasoning_error or error
    reward = float(error is None)
    if scheme.startswith("partial"):
        names_part = 0.2 if names_ok and scheme == "partial_format_names" else 0.0
        reward = (0.0 if reasoning_error else 0.2) + (0.8 if calls_ok else names_part)
    return Verdict(reward, format_error is None, names_ok, calls_ok, calls, error)


def judge(example, reply, scheme):
    """The verdict on a reply: all calls of `score` in training and evaluation are here. For a reward that
    looks at example.tools or .messages, edit this function. If it raises, the reply earns 0."""
    try:
        verdict = score(reply, example.answer, scheme)
        if not math.isfinite(verdict.reward):
            raise ValueError(f"a reward of {verdict.reward}")
        return verdict._replace(reward=float(verdict.reward))
    except Exception as error:  # only here: what an edited reward raises is unknown, and must not end a run
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return Verdict(0.0, False, False, False, None, f"the reward raised {what}", raised=True)


def _read(reply):
    stop = next((token for token in STOP_TOKENS if reply.endswith(token)), "")
    text = reply.removesuffix(stop).strip(BLANKS)
    calls, calls_error = _attempt(_strict_calls, text)
    _, reasoning_error = _attempt(_only_block, text, THINK, END_THINK)
    if not text.startswith(THINK):
        reasoning_error = f"the reply does not begin with {THINK}"
    wrapped = text.partition(CALL)[0].rstrip(BLANKS).endswith(END_THINK)
    layout_error = None if wrapped else f"more than blanks stands between {END_THINK} and {CALL}"
    return calls, calls_error, reasoning_error, layout_error


def _attempt(read, *arguments):
    """-> (result of `read`, None) or (None, its error); errors in JSON and UTF-8 are ValueErrors too."""
    try:
        return read(*arguments), None
    except ValueError as error:
        return None, f"{'not JSON: ' if isinstance(error, json.JSONDecodeError) else ''}{error}"


def _only_block(text, opening, closing):
    opened, closed = text.count(opening), text.count(closing)
    if opened != 1 or closed != 1:
        raise ValueError(f"the reply has {opened} {opening} and {closed} {closing}, expected one of each")
    inside = text[text.index(opening) + len(opening) : text.index(closing)]
    for marker in CHAT_MARKERS:
        if marker in inside:
            raise ValueError(f"the chat marker {marker} stands inside {opening}...{closing}")
    return inside


def _strict_calls(text):
    if not text.endswith(END_CALL):
        raise ValueError(f"the reply does not end with {END_CALL}")
    payload = _only_block(text, CALL, END_CALL).strip(BLANKS)
    if len(payload.encode()) > MAX_BYTES:
        raise ValueError(f"the payload has more than {MAX_BYTES} bytes")
    hooks = {"object_pairs_hook": unique_keys, "parse_float": _finite, "parse_constant": _finite}
    return _check_calls(loads_within(payload, MAX_DEPTH, MAX_DIGITS, **hooks), "reply")


def _official_calls(reply):
    headers = (f"{IM_START}assistant", f"{HEADER}assistant{END_HEADER}")
    text = reply[max(0, *map(reply.rfind, headers)) :]
    payload, at = None, 0
    # From left to right, each opening tag is paired with the next closing tag, as a regular expression does.
    while (start := text.find(CALL, at)) >= 0 and (end := text.find(END_CALL, start)) >= 0:
        payload = text[start + len(CALL) : end]
        at = end + len(END_CALL)
    if payload is None or THINK not in text or END_THINK not in text:
        raise ValueError(f"the reply lacks {THINK}, {END_THINK} or a whole {CALL}...{END_CALL}")
    calls = loads_within(payload.strip(), OFFICIAL_DEPTH, OFFICIAL_DIGITS)
    if isinstance(calls, str):
        calls = loads_within(calls, OFFICIAL_DEPTH, OFFICIAL_DIGITS)
    calls = [calls] if isinstance(calls, dict) else calls
    # The released scorer iterates over a string inside the string too; only an empty one passes its checks.
    if not isinstance(calls, (list, str)) or any(type(c) is not dict or _FIELDS - c.keys() for c in calls):
        raise ValueError("the payload is not a list of objects with name and arguments")
    return list(calls)


def loads_within(payload, max_depth, max_digits, **hooks):
    """json.loads with limits. The depth is measured before parsing, because the parser recurses."""

    def parse_int(text):
        if len(text.lstrip("-")) > max_digits:
            raise ValueError(f"an integer has more than {max_digits} digits")
        return int(text)

    brackets = _NO_BRACKETS.sub("", payload)
    if max(accumulate(map(_DEPTH_STEP.get, brackets)), default=0) > max_depth:
        raise ValueError(f"the payload nests deeper than {max_depth} brackets")
    return json.loads(payload, parse_int=parse_int, **hooks)


def unique_keys(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"an object has a key twice: {_clip(', '.join(key for key, _ in pairs))}")
    return dict(pairs)


def _finite(text):
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {_clip(text)} is not finite")
    # -0.0 + 0.0 is 0.0: equal values must have the same `_key`.
    return float(text) + 0.0


def _check_calls(calls, owner):
    if not isinstance(calls, list):
        raise ValueError(f"the {owner} holds {_clip(repr(calls))}, expected a list of calls")
    for call in calls:
        if not isinstance(call, dict) or call.keys() != _FIELDS:
            raise ValueError(f"the {owner} holds {_clip(repr(call))}, expected exactly name and arguments")
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            raise ValueError(f"the {owner} holds {_clip(repr(call))}, expected a string and an object in it")
    return calls


def _key(value):
    """A text that is the same exactly for JSON values that are equal and of the same types."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _compare(calls, answer):
    """-> (whether the multisets of names are equal, None or how the calls differ), in linear time."""
    names, right_names = ([_key(call["name"]) for call in some] for some in (calls, answer))
    if Counter(names) != Counter(right_names):
        found, expected = (_clip(", ".join(some)) or "nothing" for some in (names, right_names))
        return False, f"the reply calls {found}, expected {expected}"
    keys, right_keys = ([_key([c["name"], c["arguments"]]) for c in some] for some in (calls, answer))
    extra, missing = Counter(keys) - Counter(right_keys), Counter(right_keys) - Counter(keys)
    if not extra:
        return True, None
    # The multisets of names are equal, so for a wrong call there is a missing one of the same name.
    odd = next(i for i, key in enumerate(keys) if key in extra)
    right = next(i for i, key in enumerate(right_keys) if key in missing and right_names[i] == names[odd])
    got, wanted = calls[odd]["arguments"], answer[right]["arguments"]
    if not isinstance(got, dict):
        got, wanted = {"arguments": got}, {"arguments": wanted}
    for name in [*wanted, *got]:
        found, expected = (
            f"the {_KINDS.get(type(side[name]), 'value')} {_key(side[name])}" if name in side else "absent"
            for side in (got, wanted))
        if found != expected:
            break
    skip = max(0, len(os.path.commonprefix([found, expected])) - 60)
    where = f"call {odd + 1} {_clip(repr(calls[odd]['name']))}: argument {_clip(repr(name))}"
    return True, f"{where} is {_clip(found[skip:])}, expected {_clip(expected[skip:])}"


def _clip(text, most=80):
    """`text` shortened, and without lone surrogates, so that it can be printed and written."""
    return (text if len(text) <= most else text[: most - 1] + "…").encode(errors="replace").decode()
