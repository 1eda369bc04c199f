r"""Conversations with tool calls as chat APIs and their data sets have them: each call turn is one example.

A record is {"tools": …, "messages" or "conversations": [turn, …]}, maybe with "system", a text, and "id". The
form of a turn is recognised turn by turn:

    {"role", "content", "tool_calls": [{"type": "function", "function": {"name", "arguments"}}]}    OpenAI [1]
        arguments: a JSON text or an object (Hugging Face [2]); content may be null or a list of text parts
    {"from": "function_call", "value": "{\"name\": …, \"arguments\": {…}}"}, "observation"    ShareGPT [3, 4]
    {"from": "gpt", "value": "<tool_call>\n{\"name\": …, \"arguments\": …}\n</tool_call>…"}       Hermes [5]

[1] Chat Completions API, platform.openai.com/docs/guides/function-calling; its older "function_call" too
[2] Templates of transformers, huggingface.co/docs/transformers/chat_extras
[3] LLaMA-Factory, data/README.md, with a list of calls in one turn, as glaive_toolcall has it
[4] Salesforce/APIGen-MT-5k (arXiv 2504.03601)  [5] NousResearch/hermes-function-calling-v1, one or more

Tools are read by schemas.bare_tools; without a column they are those in the system text, between <tools> tags
or as in ToolACE. A system text that lists the tools is left out, for the prompt lists them. Call turns in a
row are one turn. Text in a call turn is left out, and counted in "text_left_out". An example is dropped by a
reason, or its record if the tools or a turn cannot be read.
"""

import ast
import contextlib
import json
import re

from converters.schemas import bare_tools
from converters.toolace import examples_of, find_tools
from reward import CALL, END_CALL, MAX_DEPTH, MAX_DIGITS, loads_within, unique_keys

COLUMNS = ()
ROLES = {name: role for role, names in (
    ("user", "user human"), ("assistant", "assistant gpt model function_call tool_call"),
    ("tool", "tool function observation tool_response ipython"), ("system", "system developer"),
) for name in names.split()}
_BLOCK = re.compile(rf"{CALL}\s*(.*?)\s*{END_CALL}", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


def earlier_calls(message):
    """The calls [{"name", "arguments"}…] of an assistant message in our own form, else []."""
    content = message["content"]
    if message["role"] != "assistant" or not (content.startswith(CALL) and content.endswith(END_CALL)):
        return []
    with contextlib.suppress(ValueError):
        calls = loads_within(content[len(CALL) : -len(END_CALL)], MAX_DEPTH, MAX_DIGITS)
        return calls if isinstance(calls, list) and calls == read_calls(calls) else []
    return []


def convert(id, record):
    """Yield a pair for each call turn: (id/turn, fields of the example as a dict, or the reason why it is
    dropped). A record that cannot be read yields only (id, reason), one without call turns yields nothing."""
    try:
        turns = _read_turns(record)
        if not any(calls or reason for _, _, calls, reason, _ in turns):
            return
        tools = _read_tools(record, turns)
    except ValueError as error:
        yield id, str(error)
        return
    names = [json.dumps(tool["name"], ensure_ascii=False) for tool in tools]
    turns = [turn for turn in turns if turn[0] != "system" or not (
        "<tools>" in turn[1] or all(name in turn[1] for name in names))]
    yield from examples_of(id, "chat", tools, turns)


def _read_turns(record):
    """[(role, text, calls or None, reason why they cannot be read or None, whether text is left out)…]."""
    raw = record.get("messages") or record.get("conversations")
    raw = _parse(raw) if isinstance(raw, str) else raw
    if not isinstance(raw, list):
        raise ValueError("no list of messages or conversations")
    system, turns = record.get("system") or "", []
    for turn in [{"role": "system", "content": system}, *raw] if system else raw:
        turn = turn if isinstance(turn, dict) else {}
        name = turn.get("role") or turn.get("from")
        role = ROLES.get(name) if isinstance(name, str) else None
        text = _text(turn.get("value") if turn.get("content") is None else turn["content"], role)
        if role is None or text is None:
            raise ValueError(f"a turn that is not text of a known role, but of {name!r}")
        reason = None
        try:
            calls, rest = _calls_of(turn, name, text) if role == "assistant" else (None, "")
        except ValueError as error:
            calls, reason, rest = None, f"call does not parse: {error}", ""
            text = text or json.dumps(turn.get("tool_calls"), ensure_ascii=False)
        if calls and turns and turns[-1][2]:
            role, text, earlier, reason, left_out = turns.pop()
            turns.append((role, text, earlier + calls, reason, left_out or bool(rest)))
        else:
            parts = role == "tool" and _RESULT.findall(text) or [text]
            turns += [(role, part, calls, reason, bool(rest)) for part in parts]
    return turns


def _text(content, role):
    """The text of a content: a text, null, text parts, or the JSON of a tool's result; None if it is none."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) and content else [None]
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    if role == "tool" and not isinstance(content, str):
        return json.dumps(content, ensure_ascii=False)
    return content if isinstance(content, str) else None


def _calls_of(turn, name, text):
    """(calls or None, the text beside them) of an assistant turn. ValueError if its calls cannot be read."""
    raw = turn.get("tool_calls") or turn.get("function_call")
    if raw:
        return read_calls(raw), text.strip()
    if CALL not in text:
        return (read_calls(text), "") if name in ("function_call", "tool_call") else (None, "")
    rest = _BLOCK.sub("", text).strip()
    if CALL in rest or END_CALL in rest:
        raise ValueError(f"{CALL} and {END_CALL} do not pair")
    return sum((read_calls(block) for block in _BLOCK.findall(text)), []), rest


def read_calls(value):
    """[{"name", "arguments"}…] of one call or a list of calls, or a text of either, with or without the
    "function" around them. Arguments may be a text too, and are {} for null. ValueError for anything else."""
    value = _parse(value) if isinstance(value, str) else value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not (
                {"arguments", "parameters"} & call.keys()):
            raise ValueError("not an object with a name and arguments")
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = _parse(arguments) if arguments.strip() else {}
        if not isinstance(arguments, (dict, type(None))):
            raise ValueError("the arguments are no object")
        calls.append({"name": call["name"], "arguments": arguments or {}})
    return calls


def _parse(text):
    """The value of a JSON text or, as some turns of Hermes are written, of a Python literal."""
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        return json.loads(text, object_pairs_hook=unique_keys)
    try:
        value = ast.literal_eval(text.strip())
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError("not JSON") from None


def _read_tools(record, turns):
    tools = record.get("tools") or record.get("functions")
    tools = bare_tools(tools, may_be_empty=True) if tools else []
    for text in (text for role, text, *_ in turns if role == "system" and not tools):
        if listed := re.search(r"<tools>\s*(.*?)\s*</tools>", text, re.DOTALL):
            # One list, or one schema after another, as Qwen's template writes them.
            listed = re.sub(r"\}\s*\n\s*\{", "},{", listed[1])
            tools = bare_tools(_parse(listed if listed.startswith("[") else f"[{listed}]"))
        else:
            tools = find_tools(text)[0]
    if not tools:
        raise ValueError("no tools, neither as a column nor in a system text")
    return tools
