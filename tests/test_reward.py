"""What reward.py promises: the strict format and its limits, five schemes, one verdict for every string.

`score` is compared with two oracles that use another method: for the strict schemes a reader of single
characters with quadratic matching, for `official` a transcription of the released scorer, where a crash is 0.
"""

import functools
import json
import random
import re
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import SCHEMES, Verdict, format_calls, format_reply, judge, parse_reply, score

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# Of ChatML and of Llama-3
HEADERS = ("<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>")
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
MARKERS = ("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", *STOPS)

CALL = {"name": "f", "arguments": {"a": 1, "b": "x"}}
ANSWER = [CALL]
RIGHT = json.dumps(ANSWER)


def reply_with(payload, reasoning="r"):
    return f"<think>{reasoning}</think><tool_call>{payload}</tool_call>"


def payload_of(value):
    """The payload of one call whose only argument is the JSON text `value`."""
    return f'[{{"name": "f", "arguments": {{"a": {value}}}}}]'


def answer_of(value):
    """The answer whose one call has `value` as its only argument."""
    return [{"name": "f", "arguments": {"a": value}}]


# -------------------- the cases, by hand

# name: (reply, answer, binary, official)
CASES = {
    "a right reply": (reply_with(RIGHT), ANSWER, 1, 1),
    "blanks at the ends, between and inside": (
        f" \r\n<think>\nr\n</think>\t\n <tool_call>\n{RIGHT}\r\n</tool_call> \n",
        ANSWER,
        1,
        1,
    ),
    "an empty think": (reply_with(RIGHT, ""), ANSWER, 1, 1),
    "no call, none expected": (reply_with("[]"), [], 1, 1),
    "no call, one expected": (reply_with("[]"), ANSWER, 0, 0),
    "a call, none expected": (reply_with(RIGHT), [], 0, 0),
    "no reasoning": (f"<tool_call>{RIGHT}</tool_call>", ANSWER, 0, 0),
    "text before the reasoning": ("so " + reply_with(RIGHT), ANSWER, 0, 1),
    "text after the calls": (reply_with(RIGHT) + " done", ANSWER, 0, 1),
    "text between the blocks": (f"<think>r</think> so <tool_call>{RIGHT}</tool_call>", ANSWER, 0, 1),
    "a no-break space between the blocks": (
        f"<think>r</think>\xa0<tool_call>{RIGHT}</tool_call>",
        ANSWER,
        0,
        1,
    ),
    "reasoning after the calls": (f"<tool_call>{RIGHT}</tool_call><think>r</think>", ANSWER, 0, 1),
    "calls inside the reasoning": (f"<think><tool_call>{RIGHT}</tool_call></think>", ANSWER, 0, 1),
    "blocks that cross": (f"<think>r<tool_call></think>{RIGHT}</tool_call>", ANSWER, 0, 0),
    "reasoning twice": ("<think>q</think>" + reply_with(RIGHT), ANSWER, 0, 1),
    "calls twice, the last one right": (f"{reply_with('[]')}<tool_call>{RIGHT}</tool_call>", ANSWER, 0, 1),
    "calls twice, the first one right": (f"{reply_with(RIGHT)}<tool_call>[]</tool_call>", ANSWER, 0, 0),
    "an unclosed block after the calls": (reply_with(RIGHT) + "<tool_call>", ANSWER, 0, 1),
    "one stop token": (reply_with(RIGHT) + "\n<|im_end|>", ANSWER, 1, 1),
    "the other stop token": (reply_with(RIGHT) + "<|endoftext|>", ANSWER, 1, 1),
    "two stop tokens": (reply_with(RIGHT) + "<|im_end|><|endoftext|>", ANSWER, 0, 1),
    "two stop tokens the other way": (reply_with(RIGHT) + "<|endoftext|><|im_end|>", ANSWER, 0, 1),
    "a stop token of Llama-3": (reply_with(RIGHT) + "\n<|eot_id|>", ANSWER, 1, 1),
    "the end of a message of Llama-3": (reply_with(RIGHT) + "<|eom_id|>", ANSWER, 1, 1),
    "the end of a text of Llama-3": (reply_with(RIGHT) + "<|end_of_text|>", ANSWER, 1, 1),
    "stop tokens of two formats": (reply_with(RIGHT) + "<|eot_id|><|im_end|>", ANSWER, 0, 1),
    "a stop token of Llama-3 in the reasoning": (reply_with(RIGHT, "a<|eot_id|>b"), ANSWER, 0, 1),
    "a header of Llama-3 before the reply": (
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{reply_with(RIGHT)}",
        ANSWER,
        0,
        1,
    ),
    "a last header of Llama-3 with nothing behind": (
        f"{reply_with(RIGHT)}<|start_header_id|>assistant<|end_header_id|>\n\n",
        ANSWER,
        0,
        0,
    ),
    "a right reply behind the last header of Llama-3": (
        f"{reply_with('[]')}<|eot_id|>{HEADERS[1]}\n\n{reply_with(RIGHT)}<|eot_id|>",
        ANSWER,
        0,
        1,
    ),
    "a header of Llama-3 that is not the assistant's": (
        f"{reply_with(RIGHT)}<|start_header_id|>user<|end_header_id|>\n\n",
        ANSWER,
        0,
        1,
    ),
    "a stop token in the reasoning": (reply_with(RIGHT, "a<|im_end|>b"), ANSWER, 0, 1),
    "another turn made up inside the reasoning": (
        f"<think>r<|im_start|>assistant\n</think><tool_call>{RIGHT}</tool_call>",
        ANSWER,
        0,
        0,
    ),
    "a last header with nothing behind": (
        f"<|im_start|>assistant{reply_with(RIGHT)}<|im_start|>assistant",
        ANSWER,
        0,
        0,
    ),
    "a bare object": (reply_with(json.dumps(CALL)), ANSWER, 0, 1),
    "the list as a JSON string": (reply_with(json.dumps(RIGHT)), ANSWER, 0, 1),
    "a further key in the call": (
        reply_with('[{"name": "f", "arguments": {}, "id": 1}]'),
        [{"name": "f", "arguments": {}}],
        0,
        1,
    ),
    "a key twice, the last one right": (
        reply_with('[{"name": "f", "arguments": {"a": 2, "a": 1}}]'),
        answer_of(1),
        0,
        1,
    ),
    "a key twice, once escaped": (
        reply_with(r'[{"name": "f", "arguments": {"a": 2, "\u0061": 1}}]'),
        answer_of(1),
        0,
        1,
    ),
    "an escaped character": (reply_with(payload_of(r'"\u00e9\/"')), answer_of("é/"), 1, 1),
    "arguments as a string": (
        reply_with('[{"name": "f", "arguments": "{}"}]'),
        [{"name": "f", "arguments": {}}],
        0,
        0,
    ),
    "no arguments": (reply_with('[{"name": "f"}]'), [{"name": "f", "arguments": {}}], 0, 0),
    "true for 1": (reply_with(payload_of("true")), answer_of(1), 0, 0),
    "1.0 for 1": (reply_with(payload_of("1.0")), answer_of(1), 0, 0),
    "a string for 1": (reply_with(payload_of('"1"')), answer_of(1), 0, 0),
    "true for 1 deep inside": (reply_with(payload_of('{"b": [true]}')), answer_of({"b": [1]}), 0, 0),
    "1e0 for 1.0": (reply_with(payload_of("1e0")), answer_of(1.0), 1, 1),
    "the other float zero": (reply_with(payload_of("-0.0")), answer_of(0.0), 1, 0),
    "lists in another order": (reply_with(payload_of("[2, 1]")), answer_of([1, 2]), 0, 0),
    "keys in another order": (reply_with('[{"arguments": {"b": "x", "a": 1}, "name": "f"}]'), ANSWER, 1, 1),
    "not a number, as expected": (reply_with(payload_of("NaN")), answer_of(float("nan")), 0, 1),
    "an overflow, as expected": (reply_with(payload_of("1e999")), answer_of(float("inf")), 0, 1),
    "a tag in a value, as expected": (reply_with(payload_of('"<think>"')), answer_of("<think>"), 0, 1),
    "a marker in a value, as expected": (
        reply_with(payload_of('"<|im_end|>"')),
        answer_of("<|im_end|>"),
        0,
        1,
    ),
    "an empty string within a string": (reply_with(json.dumps(json.dumps(""))), [], 0, 1),
    "a zero within a string": (reply_with('"0"'), [], 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_strict_and_the_released_verdict(name):
    reply, answer, binary, official = CASES[name]
    assert score(reply, answer).reward == binary
    assert score(reply, answer, "official").reward == official
    assert oracle(reply, answer, "binary") == binary
    assert oracle(reply, answer, "official") == official


def test_every_row_of_the_reward_cases_in_both_columns(real_data):
    lines = (real_data / "reward_cases.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 47
    for row in rows:
        for scheme in ("binary", "official"):
            assert score(row["output"], row["answer"], scheme).reward == row[scheme], (row["name"], scheme)
            assert oracle(row["output"], row["answer"], scheme) == row[scheme], (row["name"], scheme)


OTHER_NAME = RIGHT.replace('"f"', '"g"')
OTHER_VALUE = RIGHT.replace('"x"', '"y"')
ABLATION = {
    # name: (reply, binary, binary_no_reasoning, partial_format, partial_format_names)
    "all right": (reply_with(RIGHT), 1, 1, 1, 1),
    "no reasoning": (f"<tool_call>{RIGHT}</tool_call>", 0, 1, 0.8, 0.8),
    "anything before the calls": (
        f"<|im_start|></think> so <think> <tool_call>{RIGHT}</tool_call>",
        0,
        1,
        0.8,
        0.8,
    ),
    "text between": (f"<think>r</think> so <tool_call>{RIGHT}</tool_call>", 0, 1, 1, 1),
    "a wrong value": (reply_with(OTHER_VALUE), 0, 0, 0.2, 0.4),
    "a wrong value, no reasoning": (f"<tool_call>{OTHER_VALUE}</tool_call>", 0, 0, 0, 0.2),
    "a wrong name": (reply_with(OTHER_NAME), 0, 0, 0.2, 0.2),
    "a call too many": (reply_with(json.dumps(ANSWER * 2)), 0, 0, 0.2, 0.2),
    "payload unreadable": (reply_with("["), 0, 0, 0.2, 0.2),
    "a bare object": (reply_with(json.dumps(CALL)), 0, 0, 0.2, 0.2),
    "no calls": ("<think>r</think>", 0, 0, 0.2, 0.2),
    "text after the calls": (reply_with(RIGHT) + ".", 0, 0, 0.2, 0.2),
    "calls twice": (reply_with(RIGHT) + f"<tool_call>{RIGHT}</tool_call>", 0, 0, 0.2, 0.2),
    "reasoning twice": ("<think></think>" + reply_with(RIGHT), 0, 1, 0.8, 0.8),
    "a marker in the reasoning": (reply_with(RIGHT, "<|im_start|>"), 0, 1, 0.8, 0.8),
    "text before the reasoning": ("." + reply_with(RIGHT), 0, 1, 0.8, 0.8),
    "nothing": ("", 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", ABLATION)
def test_the_schemes_of_the_ablation(name):
    reply, *rewards = ABLATION[name]
    for scheme, reward in zip(SCHEMES, rewards, strict=False):
        assert score(reply, ANSWER, scheme).reward == pytest.approx(reward, abs=1e-12), scheme
        assert oracle(reply, ANSWER, scheme) == pytest.approx(reward, abs=1e-12), scheme


def test_calls_are_compared_as_a_multiset():
    one, two = {"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}
    assert score(format_reply([two, one]), [one, two]).reward == 1
    assert score(format_reply([one, one, two]), [one, two, two]).reward == 0
    assert score(format_reply([one]), [one, one]).reward == 0
    assert score(format_reply([one, one]), [one]).reward == 0


# -------------------- the limits


def nested(depth):
    """A call list in which the brackets are `depth` deep: three are the list, the call and its arguments."""
    value = 0
    for _ in range(depth - 3):
        value = [value]
    return [{"name": "f", "arguments": {"a": value}}]


def sized(size):
    """A call list whose rendering has `size` bytes, most of them in characters of two bytes."""
    calls = [{"name": "f", "arguments": {"a": ""}}]
    free = size - len(json.dumps(calls))
    calls[0]["arguments"]["a"] = "é" * (free // 2) + "x" * (free % 2)
    return calls


@pytest.mark.parametrize(
    "inside, outside",
    [
        (nested(64), nested(65)),
        (sized(65536), sized(65537)),
        ([{"name": "f", "arguments": {"a": 10**39}}], [{"name": "f", "arguments": {"a": 10**40}}]),
        ([{"name": "f", "arguments": {"a": -(10**39)}}], [{"name": "f", "arguments": {"a": -(10**40)}}]),
    ],
    ids=["depth 64", "65536 bytes", "40 digits", "40 digits and a sign"],
)
def test_each_limit_holds_exactly(inside, outside):
    assert score(format_reply(inside), inside).reward == 1
    verdict = score(format_reply(outside), outside)
    assert (verdict.reward, verdict.format_ok, verdict.calls) == (0, False, None)
    assert score(format_reply(outside), outside, "official").reward == 1


def test_brackets_inside_strings_are_no_depth():
    calls = [{"name": "f", "arguments": {"a": '"\\[{' * 300, "[" * 99: "\\"}}]
    assert score(format_reply(calls), calls).reward == 1


def test_the_released_scorer_is_followed_up_to_its_own_limits_only():
    many_digits = [{"name": "f", "arguments": {"a": 10**4299}}]
    assert score(format_reply(many_digits), many_digits, "official").reward == 1
    verdict = score(reply_with(payload_of("1" * 4301)), many_digits, "official")
    assert (verdict.reward, verdict.calls) == (0, None)
    assert score(format_reply(nested(500)), nested(500), "official").reward == 1
    assert score(format_reply(nested(501)), nested(501), "official").reward == 0


HARD = {
    "nothing": "",
    "NUL": "\0",
    "a lone surrogate": payload_of('"\ud800"'),
    "an escaped lone surrogate": payload_of(r'"\ud800"'),
    "100,000 lists": "[" * 100_000,
    "100,000 lists, closed": "[" * 100_000 + "]" * 100_000,
    "100,000 objects": '{"a":' * 100_000,
    "100,000 closings": "]" * 100_000,
    "100,000 digits": payload_of("9" * 100_000),
    "100,000 digits after the point": payload_of("0." + "9" * 100_000),
    "a huge exponent": payload_of("1e" + "9" * 10_000),
    "Infinity": payload_of("-Infinity"),
    "true": "true",
    "a number": "5",
    "null": "null",
    "a byte order mark": "\ufeff[]",
    "a string open to the end": '["\\',
    "a name that is a list": '[{"name": [], "arguments": {}}]',
    "a name that is an object": '[{"name": {}, "arguments": []}]',
    "a string in a string in a string": json.dumps(json.dumps(json.dumps(RIGHT))),
    "deep lists in a string": json.dumps("[" * 10_000),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hard_payloads_never_raise_and_never_score(name, scheme):
    for reply in (HARD[name], reply_with(HARD[name]), HARD[name] + reply_with(HARD[name], HARD[name])):
        verdict = score(reply, ANSWER, scheme)
        assert verdict.reward <= (0.4 if scheme.startswith("partial") else 0)
        verdict.error.encode("utf-8")
        assert len(verdict.error) < 500


LONG = {
    "unclosed think": "<think>",
    "unclosed calls": "<tool_call>",
    "closings": "</tool_call>",
    "all four tags": "".join(TAGS),
    "lists": "[",
    "empty lists": "[],",
    "objects": '{"a":',
    "quotes": '"',
    "backslashes": "\\",
    "escaped quotes": '\\"',
    "digits": "1",
    "blanks": " ",
    "no-break spaces": "\xa0",
    "stop tokens": "<|im_end|>",
    "assistant headers": "<|im_start|>assistant",
    "assistant headers of Llama-3": HEADERS[1],
}


def cpu_seconds(function, *arguments):
    start = time.thread_time()
    function(*arguments)
    return time.thread_time() - start


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_megabyte_of_anything_takes_at_most_three_times_as_long_as_half_of_it(scheme):
    # Times below this are too short to be compared: that of one pass over as many characters.
    least = min(cpu_seconds(re.findall, "[^x]", " " * 500_000) for _ in range(5))
    wraps = (str, reply_with, lambda text: reply_with(f'"{text}'), lambda text: reply_with(RIGHT, text),
             lambda text: "<think>" + text)
    for name, unit in LONG.items():
        for wrap in wraps:
            half, full = (wrap(unit * (size // len(unit))) for size in (500_000, 1_000_000))
            halves, fulls = [], []
            # Several tries, because other work may share the core.
            while len(halves) < 7 and (not halves or min(fulls) > 3 * max(least, min(halves))):
                halves.append(cpu_seconds(score, half, ANSWER, scheme))
                fulls.append(cpu_seconds(score, full, ANSWER, scheme))
            assert min(fulls) <= 3 * max(least, min(halves)), (name, half[:40])


# -------------------- words and edges


@pytest.mark.parametrize(
    "payload, words",
    [
        (payload_of('"3"'), "call 1 'f': argument 'a' is the string \"3\", expected the integer 3"),
        (payload_of("null"), "call 1 'f': argument 'a' is the value null, expected the integer 3"),
        (payload_of("true"), "call 1 'f': argument 'a' is the boolean true, expected the integer 3"),
        ('[{"name": "f", "arguments": {}}]', "call 1 'f': argument 'a' is absent, expected the integer 3"),
        (payload_of('3, "b": 3.0'), "call 1 'f': argument 'b' is the float 3.0, expected absent"),
        ('[{"name": "g", "arguments": {"a": 3}}]', 'the reply calls "g", expected "f"'),
        (payload_of('"é"'), "argument 'a' is the string \"é\", expected the integer 3"),
        ("[]", 'the reply calls nothing, expected "f"'),
        (payload_of('3, "a": 3'), "a key twice: a, a"),
        (payload_of("NaN"), "NaN is not finite"),
        ("[1]", "holds 1, expected exactly name and arguments"),
        ('{"name": "f"}', "expected a list of calls"),
        ('[{"name": "f", "arguments": []}]', "expected a string and an object in it"),
        ("[,]", "not JSON: Expecting value: line 1 column 2"),
        (payload_of('"<|im_end|>"'), "the chat marker <|im_end|> stands inside <tool_call>...</tool_call>"),
        ("[]</tool_call>", "the reply has 1 <tool_call> and 2 </tool_call>, expected one of each"),
    ],
)
def test_the_error_says_what_to_change(payload, words):
    assert words in score(reply_with(payload), [{"name": "f", "arguments": {"a": 3}}]).error


def test_the_error_shows_where_long_values_part():
    wanted, got = ([{"name": "f", "arguments": {"a": "x" * 500 + end}}] for end in ("right", "wrong"))
    error = score(format_reply(got), wanted).error
    assert "wrong" in error and "right" in error and len(error) < 300


def test_the_error_names_the_call_that_is_odd():
    calls = [{"name": "f", "arguments": {"a": a}} for a in (1, 2, 3)]
    wrong = [calls[2], {"name": "f", "arguments": {"a": 9}}, calls[0]]
    error = score(format_reply(wrong), calls).error
    assert error == "call 2 'f': argument 'a' is the integer 9, expected the integer 2"


@pytest.mark.parametrize(
    "reply", ["x" + reply_with(RIGHT), "<think></think>.<tool_call>[]</tool_call>", "", "<think>"]
)
def test_a_broken_format_is_an_error_of_the_method_even_with_right_calls(reply):
    verdict = score(reply, ANSWER)
    assert not verdict.format_ok and verdict.reward == 0 and verdict.error


def test_the_verdict_separates_format_names_and_calls():
    assert score("x" + reply_with(RIGHT), ANSWER)[:5] == (0, False, True, True, ANSWER)
    assert score(reply_with(OTHER_VALUE), ANSWER)[:4] == (0, True, True, False)
    assert score(reply_with(OTHER_NAME), ANSWER)[:4] == (0, True, False, False)
    assert score(reply_with(RIGHT), ANSWER) == Verdict(1, True, True, True, ANSWER, None)
    # Under `official` the calls are those that it reads; the format stays the strict one.
    verdict = score(reply_with(json.dumps(CALL)), ANSWER, "official")
    assert verdict == Verdict(1, False, True, True, ANSWER, None)


def test_an_unknown_scheme_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'best'.*binary, binary_no_reasoning.*official"):
        score("", [], "best")


@pytest.mark.parametrize(
    "answer", [None, "[]", CALL, [1], [{"name": "f"}], [{"name": 1, "arguments": {}}], (CALL,)]
)
@pytest.mark.parametrize("scheme", ["binary", "official"])
def test_an_answer_that_is_no_list_of_calls_is_refused(answer, scheme):
    with pytest.raises(ValueError, match="the ground truth holds"):
        score(reply_with("[]"), answer, scheme)


def test_parse_reply_gives_the_calls_or_the_reason():
    assert parse_reply(reply_with(RIGHT)) == (ANSWER, None)
    calls, error = parse_reply(f"<tool_call>{RIGHT}</tool_call>")
    assert calls == ANSWER and "<think>" in error
    calls, error = parse_reply(reply_with("[1]"))
    assert calls is None and "holds 1" in error


def test_the_rendering_is_one_line_of_plain_json_after_the_reasoning():
    calls = [{"name": "größe", "arguments": {"a": "x\ny"}}]
    block = '<tool_call>[{"name": "größe", "arguments": {"a": "x\\ny"}}]</tool_call>'
    assert format_calls(calls) == block
    assert format_reply(calls) == f"<think></think>\n{block}"
    assert format_reply([], "none fits") == "<think>none fits</think>\n<tool_call>[]</tool_call>"


# -------------------- judge


def example(answer=ANSWER):
    return SimpleNamespace(answer=answer, tools=[], messages=[])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_reply_to_an_example_is_judged_by_its_answer(scheme):
    for reply in (reply_with(RIGHT), reply_with(OTHER_VALUE), ""):
        assert judge(example(), reply, scheme) == score(reply, ANSWER, scheme)
        assert not judge(example(), reply, scheme).raised


def raising(reply, answer, scheme):
    raise KeyError("one\ntwo")


@pytest.mark.parametrize(
    "edited, words",
    [
        (raising, r"KeyError: 'one\ntwo'"),
        (lambda *_: Verdict(float("nan"), True, True, True, [], None), "ValueError: a reward of nan"),
        (lambda *_: None, "AttributeError: 'NoneType' object has no attribute 'reward'"),
    ],
    ids=["raises", "not finite", "no verdict"],
)
def test_a_reward_that_raises_earns_nothing_and_its_error_is_in_the_verdict(monkeypatch, edited, words):
    monkeypatch.setattr("reward.score", edited)
    verdict = judge(example(), reply_with(RIGHT), "binary")
    error = f"the reward raised {words}"
    assert verdict == Verdict(0.0, False, False, False, None, error, raised=True)


def test_a_reward_may_be_any_number_that_is_finite(monkeypatch):
    monkeypatch.setattr("reward.score", lambda *_: Verdict(True, True, True, True, [], None))
    verdict = judge(example(), "", "binary")
    assert verdict.reward == 1.0 and type(verdict.reward) is float and not verdict.raised


# -------------------- properties

PLAIN = st.text().filter(lambda text: not any(part in text for part in (*TAGS, *MARKERS)))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40) + 1, 10**40 - 1)
    | PLAIN
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PLAIN, inner, max_size=4),
    max_leaves=12,
)
CALLS = st.lists(
    st.fixed_dictionaries({"name": PLAIN, "arguments": st.dictionaries(PLAIN, VALUES, max_size=4)}),
    max_size=4,
)
QUICK = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@QUICK
@given(CALLS, PLAIN, st.randoms(use_true_random=False))
def test_every_rendered_answer_scores_one_under_every_scheme_in_any_order(calls, reasoning, shuffler):
    shuffled = json.loads(json.dumps(calls))
    shuffler.shuffle(shuffled)
    for scheme in SCHEMES:
        assert score(format_reply(calls, reasoning), shuffled, scheme)[:4] == (1, True, True, True)


@QUICK
@given(CALLS, CALLS, st.sampled_from(SCHEMES))
def test_an_answer_scores_against_another_as_the_oracle_says(calls, answer, scheme):
    reward = score(format_reply(calls), answer, scheme).reward
    assert reward == pytest.approx(oracle(format_reply(calls), answer, scheme), abs=1e-12)


PIECES = st.sampled_from(
    [*TAGS, *MARKERS, RIGHT, "[]", "\n", "[", '"', "\\", "\ud800", *HEADERS]
)


@QUICK
@given(st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join), st.sampled_from(SCHEMES))
def test_any_string_gets_a_verdict_with_an_error_where_the_reward_is_not_full(reply, scheme):
    verdict = score(reply, ANSWER, scheme)
    assert verdict.reward == pytest.approx(oracle(reply, ANSWER, scheme), abs=1e-12)
    assert 0 <= verdict.reward <= 1
    assert (verdict.error is None) == (verdict.reward == 1)
    assert verdict.calls_ok <= verdict.names_ok


# -------------------- mutations


def random_value(rng, depth=0):
    kind = rng.randrange(9 if depth < 2 else 7)
    if kind < 2:
        return rng.choice(
            ["", "x", "3", "true", "née", "a\nb", 'say "hi"', "Oslo, N", "東京", "[1]", "\\", "<b>", "😀"]
        )
    if kind == 7:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 8:
        return {name: random_value(rng, depth + 1) for name in rng.sample("abcé", rng.randrange(3))}
    return [0, 1, -7, 10**20, 0.5, 1.0, -2e-7, 3.0, True, False, None][rng.randrange(11)]


def random_calls(rng):
    return [
        {
            "name": rng.choice(["f", "g", "get_weather"]),
            "arguments": {
                name: random_value(rng) for name in rng.sample(["a", "b", "city", "días"], rng.randrange(4))
            },
        }
        for _ in range(rng.choice([0, 1, 1, 2, 3]))
    ]


LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:e-?\d+)?|true|false|null')
RETYPED = [
    "1",
    "1.0",
    '"1"',
    "true",
    "false",
    "0",
    "null",
    "[]",
    "{}",
    "-0",
    "1e0",
    "NaN",
    "1e999",
    '""',
    "01",
    "1.",
    "+1",
]
SPLICED = [
    *TAGS,
    *MARKERS,
    *'{}[]",:\\<>/ \t\n\0',
    "\xa0",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\\u0061",
    ', "a": 1',
    "[]",
    "x",
]


def mutate(rng, text, reply_of_others):
    """One random damage, or harmless change, of a valid reply."""
    at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    if rng.random() < 0.5:
        to = min(to, at + rng.randrange(1, 5))
    kind = rng.randrange(11)
    if kind == 0:
        return text[:at] + text[to:]
    if kind == 1:
        return text[:to] + text[at:to] + text[to:]
    if kind == 2:
        further = rng.randrange(to, len(text) + 1)
        return text[:at] + text[to:further] + text[at:to] + text[further:]
    if kind in (3, 4):
        literal = rng.choice(list(LITERAL.finditer(text)) or [re.search("", text)])
        start, end = literal.span()
        new = (
            rng.choice(RETYPED)
            if kind == 3
            else rng.choice(["[%s]", '{"a": %s}', '"%s"', " %s\n"]) % literal[0]
        )
        return text[:start] + new + text[end:]
    if kind == 5:
        return text[:at]
    if kind == 6:
        data = text.encode()
        cut = rng.randrange(len(data) + 1)
        data = data[:cut] + rng.randbytes(rng.randrange(1, 4)) + data[cut + rng.randrange(3) :]
        return data.decode(errors=rng.choice(["replace", "ignore", "surrogateescape"]))
    if kind == 7:
        return text[:at] + rng.choice(SPLICED) + text[at:]
    if kind == 8:
        return text[:at] + reply_of_others[rng.randrange(len(reply_of_others)) :]
    if kind == 9:
        place = rng.choice([tag.span()[rng.randrange(2)] for tag in re.finditer(r"[\]\[{},:]|</?\w+>", text)])
        return text[:place] + rng.choice([" ", "\n", "\t \r\n", "\x0b", "\xa0"]) + text[place:]
    letters = [i for i, letter in enumerate(text) if letter.isalpha() and i > text.index("<tool_call>[") + 12]
    if not letters or kind != 10:
        return text + rng.choice(MARKERS)
    place = rng.choice(letters)
    return text[:place] + f"\\u{ord(text[place]):04x}" + text[place + 1 :]


def test_twenty_thousand_mutations_of_valid_replies_score_as_the_oracle_says():
    rng = random.Random(20250425)
    ones = zeros = 0
    seen = set()
    for _ in range(500):
        calls = random_calls(rng)
        shuffled = rng.sample(calls, len(calls))
        text = format_reply(calls, rng.choice(["", "r", "so\nthen", "a <b> 1"])) + rng.choice(
            ["", "", "\n", "<|im_end|>", "<|eot_id|>"]
        )
        assert score(text, shuffled).reward == 1
        for number in range(40):
            mutant = mutate(rng, text, format_reply(shuffled))
            reward = score(mutant, shuffled).reward
            assert reward == oracle(mutant, shuffled, "binary"), (mutant, shuffled)
            ones += reward == 1
            zeros += reward == 0
            scheme = SCHEMES[1 + number % 4]
            other = score(mutant, shuffled, scheme).reward
            assert abs(other - oracle(mutant, shuffled, scheme)) < 1e-12, (scheme, mutant, shuffled)
            seen.add((scheme, round(other, 3)))
    assert ones + zeros == 20_000
    assert ones > 1_000 and zeros > 10_000
    # Every value that each of the four schemes can take.
    assert len(seen) == 2 + 4 + 5 + 2


# -------------------- the oracles


class Refused(Exception):
    pass


class Reader:
    """JSON as RFC 8259 has it, one character at a time, into trees that are never equal across types."""

    def __init__(self, text):
        self.text = text
        self.at = 0

    def whole(self):
        tree = self.value(1)
        self.blanks()
        if self.at != len(self.text):
            raise Refused
        return tree

    def peek(self):
        return self.text[self.at] if self.at < len(self.text) else ""

    def blanks(self):
        while self.peek() and self.peek() in " \t\r\n":
            self.at += 1

    def take(self, expected):
        if not self.text.startswith(expected, self.at):
            raise Refused
        self.at += len(expected)

    def value(self, depth):
        self.blanks()
        first = self.peek()
        if first == '"':
            return ("string", self.string())
        if first and first in "[{":
            if depth > 64:
                raise Refused
            return self.items(depth) if first == "[" else self.members(depth)
        for word in ("true", "false", "null"):
            if first == word[0]:
                self.take(word)
                return ("word", word)
        return self.number()

    def items(self, depth):
        self.take("[")
        self.blanks()
        items = []
        if self.peek() != "]":
            items.append(self.value(depth + 1))
            self.blanks()
            while self.peek() == ",":
                self.take(",")
                items.append(self.value(depth + 1))
                self.blanks()
        self.take("]")
        return ("list", items)

    def members(self, depth):
        self.take("{")
        self.blanks()
        members = []
        while self.peek() != "}":
            if members:
                self.take(",")
                self.blanks()
            name = self.string()
            self.blanks()
            self.take(":")
            if any(name == other for other, _ in members):
                raise Refused
            members.append((name, self.value(depth + 1)))
            self.blanks()
        self.take("}")
        return ("object", members)

    def string(self):
        self.take('"')
        units = []
        while self.peek() != '"':
            letter = self.peek()
            if letter < " " or 0xD800 <= ord(letter) <= 0xDFFF:
                raise Refused
            self.at += 1
            if letter != "\\":
                units.append(letter)
                continue
            escape = self.peek()
            self.at += 1
            if escape == "u":
                digits = self.text[self.at : self.at + 4]
                if len(digits) < 4 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                    raise Refused
                self.at += 4
                units.append(chr(int(digits, 16)))
            elif escape and escape in '"\\/bfnrt':
                units.append(dict(zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True))[escape])
            else:
                raise Refused
        self.take('"')
        return "".join(units).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def digits(self):
        start = self.at
        while self.peek() and self.peek() in "0123456789":
            self.at += 1
        if start == self.at:
            raise Refused
        return self.at - start

    def number(self):
        start = self.at
        if self.peek() == "-":
            self.at += 1
        zero = self.peek() == "0"
        length = self.digits()
        if zero and length > 1:
            raise Refused
        whole = True
        if self.peek() == ".":
            self.at += 1
            self.digits()
            whole = False
        if self.peek() and self.peek() in "eE":
            self.at += 1
            if self.peek() and self.peek() in "+-":
                self.at += 1
            self.digits()
            whole = False
        if whole:
            if length > 40:
                raise Refused
            return ("integer", int(self.text[start : self.at]))
        number = float(self.text[start : self.at])
        if number in (float("inf"), float("-inf")):
            raise Refused
        return ("float", number)


def tree_of(value):
    """The tagged tree of a Python value."""
    if isinstance(value, dict):
        return ("object", [(name, tree_of(member)) for name, member in value.items()])
    if isinstance(value, list):
        return ("list", [tree_of(item) for item in value])
    if value is None or isinstance(value, bool):
        return ("word", {None: "null", True: "true", False: "false"}[value])
    return ({str: "string", int: "integer", float: "float"}[type(value)], value)


def same(one, two):
    if one[0] != two[0]:
        return False
    if one[0] == "list":
        return len(one[1]) == len(two[1]) and all(same(a, b) for a, b in zip(one[1], two[1], strict=True))
    if one[0] == "object":
        return paired(one[1], two[1], lambda a, b: a[0] == b[0] and same(a[1], b[1]))
    return one[1] == two[1]


def paired(ones, twos, equal):
    """Whether the two lists are the same multiset, by crossing off."""
    left = list(twos)
    for one in ones:
        match = next((i for i, two in enumerate(left) if equal(one, two)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


@functools.lru_cache(maxsize=2)  # the schemes read a text in the same way
def oracle_calls(text):
    """[(name, arguments tree)] of the only call block, or None."""
    places = [i for i in range(len(text)) if text[i] == "<" and text[i:].startswith(TAGS[2:])]
    if len(places) != 2 or not text[places[0] :].startswith(TAGS[2]) or text[places[1] :] != TAGS[3]:
        return None
    payload = text[places[0] + len(TAGS[2]) : places[1]]
    if any(marker in payload for marker in MARKERS):
        return None
    try:
        tree = Reader(payload).whole()
    except Refused:
        return None
    if tree[0] != "list":
        return None
    calls = []
    for kind, members in tree[1]:
        if kind != "object" or sorted(name for name, _ in members) != ["arguments", "name"]:
            return None
        fields = dict(members)
        if fields["name"][0] != "string" or fields["arguments"][0] != "object":
            return None
        calls.append((fields["name"][1], fields["arguments"]))
    return calls


def oracle_reasoning(text):
    places = [i for i in range(len(text)) if text[i] == "<" and text[i:].startswith(TAGS[:2])]
    if len(places) != 2 or places[0] != 0 or not text.startswith(TAGS[0]) or text[places[1] + 1] != "/":
        return False
    return not any(marker in text[: places[1]] for marker in MARKERS)


def oracle_official(reply, answer):
    text = reply[max(0, *(reply.rfind(header) for header in HEADERS)) :]
    blocks = re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    if not blocks or "<think>" not in text or "</think>" not in text:
        return 0
    try:
        calls = json.loads(blocks[-1].strip())
        if isinstance(calls, str):
            calls = json.loads(calls)
        if isinstance(calls, dict):
            calls = [calls]
        found = sorted((call["name"], json.dumps(call["arguments"], sort_keys=True)) for call in calls)
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return int(
        found == sorted((call["name"], json.dumps(call["arguments"], sort_keys=True)) for call in answer)
    )


def oracle(reply, answer, scheme):
    if scheme == "official":
        return oracle_official(reply, answer)
    text = reply
    for stop in STOPS:
        if text.endswith(stop):
            text = text[: len(text) - len(stop)]
            break
    while text and text[0] in " \t\r\n":
        text = text[1:]
    while text and text[-1] in " \t\r\n":
        text = text[:-1]
    calls, reasoning = oracle_calls(text), oracle_reasoning(text)
    wanted = [(call["name"], tree_of(call["arguments"])) for call in answer]
    right = calls is not None and paired(calls, wanted, lambda a, b: a[0] == b[0] and same(a[1], b[1]))
    named = calls is not None and paired(calls, wanted, lambda a, b: a[0] == b[0])
    if scheme == "binary":
        between = re.fullmatch(r"<think>[^\0]*</think>[ \t\r\n]*<tool_call>[^\0]*", text.replace("\0", "?"))
        return int(
            right and reasoning and between is not None and not any(marker in text for marker in MARKERS)
        )
    if scheme == "binary_no_reasoning":
        return int(right)
    return 0.2 * reasoning + (0.8 if right else 0.2 if named and scheme == "partial_format_names" else 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_letter_case_counts_in_names_keys_and_values(scheme):
    answer = [{"name": "f", "arguments": {"a": "x"}}]
    for calls in ([{"name": "F", "arguments": {"a": "x"}}], [{"name": "f", "arguments": {"A": "x"}}],
                  [{"name": "f", "arguments": {"a": "X"}}]):
        assert score(format_reply(answer), answer, scheme).reward == 1
        assert score(format_reply(calls), answer, scheme).reward < 1
