"""ToolACE: a conversation in, the fields of one example for each of its call turns out.

Source: the data set Team-ACE/ToolACE (arXiv 2409.00920). A raw record:

    {"system": "… [{"name": …, "description": …, "parameters": {…}}, …] …",
     "conversations": [{"from": "user", "value": TEXT},
                       {"from": "assistant", "value": "[Name(key=value, …), …]"}, …]}

The tools are the first JSON list of such objects in the system text. A call turn is a list of calls, written
almost as in Python, but a name may contain blanks, brackets and quotes, and a value may be a JSON literal.

Each call turn becomes an example or is dropped for a reason; a dropped one stays in the context of later
turns. If the tools or the role of any turn cannot be read, the record is dropped. The source of an example is
"toolace_multi" if two or more messages precede it, else "toolace_single".
"""

import contextlib
import json
import re

from converters.schemas import bare_tools
from reward import format_calls, unique_keys

COLUMNS = ("system", "conversations")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "tool": "tool",
         "observation": "tool", "function": "tool"}


def convert(id, record):
    """Yield a pair for each call turn: (id/turn, fields of the example as a dict, or the reason why it is
    dropped). A record that cannot be read yields only (id, reason), one without call turns yields nothing."""
    tools, reason = find_tools(str(record["system"]))
    turns = record["conversations"]
    turns = turns if isinstance(turns, list) else [turns]
    for turn in turns:
        role = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(turn.get("value"), str):
            reason = f"a turn that is not text of a known role, but of {role!r}"
    if reason:
        yield id, reason
        return
    offered = {tool["name"].strip(): tool["name"] for tool in tools}
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in turns]
    yield from examples_of(id, "toolace", tools, [
        (role, text, *(_read_call_turn(text, offered) if role == "assistant" else (None, None)), False)
        for role, text in turns])


def examples_of(id, name, tools, turns):
    """The pairs of `convert` from turns [(role, text, calls or None, reason why they are dropped or None,
    whether the turn has text that is left out)…]. The fields have that last one too: "text_left_out"."""
    messages = []
    for number, (role, content, calls, reason, text_left_out) in enumerate(turns):
        if reason:
            yield f"{id}/{number}", reason
        if calls:
            content = format_calls(calls)
            before = sum(message["role"] != "system" for message in messages)
            yield f"{id}/{number}", {
                "source": f"{name}_multi" if before >= 2 else f"{name}_single", "tools": tools,
                "messages": list(messages), "answer": calls, "text_left_out": text_left_out}
        messages.append({"role": role, "content": content})


def find_tools(system):
    """(tools, None), the first JSON list of schemas with a name and parameters, or (None, reason)."""
    reason = "no tool list in the system text"
    for start in re.finditer(r"\[\s*\{", system):
        try:
            listed, _ = json.JSONDecoder().raw_decode(system, start.start())
        except (ValueError, RecursionError):
            reason = "the tool list in the system text is not JSON"
            continue
        with contextlib.suppress(ValueError):
            tools = bare_tools(listed)
            if all("parameters" in tool for tool in tools):
                return tools, None
    return None, reason


def _read_call_turn(text, offered):
    """(calls, None) for a call turn, (None, reason) for one that does not parse, (None, None) for other text.

    Other text may begin with "[" too. It counts as a broken call only if an offered name and "(" follow, or
    if `name(key=` or `name()` follows and the text ends with "]". Whether a call that other text surrounds is
    made is unclear: such a turn has a reason too.
    """
    text = text.strip()
    try:
        calls = parse_calls(text)
    except ValueError as error:
        named = re.search(rf"\[\s*({'|'.join(map(re.escape, offered))})\s*\(", text)
        if named and (named.start() or 0 < text.rfind("]") + 1 < len(text)):
            return None, "text around the call"
        broken = named or (
            text.endswith("]") and re.match(r"""\[[^][="]+\(\s*(\)|[^\s=()"',]+\s*=)""", text))
        return None, f"call does not parse: {error}" if broken else None
    return [{**call, "name": offered.get(call["name"], call["name"])} for call in calls], None


# ---- the syntax of calls
# A name may hold brackets. It ends at the first "(" before `parameter=`, or before ")" and then "]" or ",".
_NAME = re.compile(r"""\s*([^="]+?)\s*\((?=\s*(?:\)\s*[],]|[^\s=,()"'][^=,()"']*=))""")
_PARAMETER = re.compile(r"""\s*([^\s=,()"'][^=,()"']*?)\s*=""")
_TOKEN = re.compile(r"""(?s)\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[][(){},:]|[^][(){},:\s"']+)""")
_JSON = {"True": "true", "False": "false", "None": "null", "(": "[", ")": "]"}
_ESCAPES = {'"': '\\"', "\\'": "'", "\\\n": ""}


def parse_calls(text):
    """Parse `[Name(key=value, …), Name(…)]` -> [{"name", "arguments"}…], at least one call.

    Values are Python or JSON literals; a tuple becomes a list. The text is rewritten as JSON token by token,
    so that the JSON parser checks its structure. ValueError for any other text.
    """
    text, parts, depth, at = text.strip(), [], 0, 0
    while at < len(text):
        begins_call = depth == 1 and parts[-1] in ("[", ",")
        name = _NAME.match(text, at) if begins_call else None
        parameter = _PARAMETER.match(text, at) if depth == 2 else None
        token = name or parameter or _TOKEN.match(text, at)
        if not token or begins_call and not name or not parts and token[1] != "[":
            raise ValueError("not a list of name(parameter=value, …)")
        mark, at = token[1], token.end()
        if name:
            parts.append(f'{{"name": {json.dumps(mark)}, "arguments": {{')
        elif parameter:
            parts.append(f"{json.dumps(mark)}: ")
        elif mark[0] in "\"'":
            parts.append(_json_string(mark[1:-1]))
        else:
            parts.append("}}" if depth == 2 and mark == ")" else _JSON.get(mark, mark))
        if not parameter:
            depth += bool(name) + (mark in ("[", "(", "{")) - (mark in ("]", ")", "}"))
    try:
        calls = json.loads("".join(parts), object_pairs_hook=unique_keys, strict=False)
        json.dumps(calls, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("a value is no literal, a key stands twice or a bracket is open") from None
    return calls


def _json_string(body):
    """The inside of a Python string literal as a JSON string. Escapes unknown to both remain plain text."""
    def piece(match):
        as_it_is = match[0] if (match[2] or "u") in '"\\/bfnrtu' else "\\" + match[0]
        return json.dumps(chr(int(match[1], 16)))[1:-1] if match[1] else _ESCAPES.get(match[0], as_it_is)

    return '"' + re.sub(r'(?s)\\[xU]((?<=x)[0-9a-fA-F]{2}|(?<=U)[0-9a-fA-F]{8})|\\(.)|"', piece, body) + '"'
