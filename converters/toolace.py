"""Records of ToolACE."""

import json
import re

from reward import _unique_keys, format_calls

COLUMNS = ("system", "conversations")


def convert(id, record):
    """Yield (id, fields of the example or the reason why there is none) for each call turn."""
    roles = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "tool": "tool",
             "observation": "tool", "function": "tool"}
    tools, reason = _find_tools(str(record["system"]))
    for turn in record["conversations"]:
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in roles or not isinstance(turn.get("value"), str):
            reason = f"a turn that is not text of a known role, but of {role!r}"
    if reason:
        yield id, reason
        return
    offered = {tool["name"].strip(): tool["name"] for tool in tools}
    messages = []
    for number, turn in enumerate(record["conversations"]):
        role, content = roles[turn["from"]], turn["value"]
        calls, reason = _read_call_turn(content, offered) if role == "assistant" else (None, None)
        if reason:
            yield f"{id}/{number}", reason
        if calls:
            content = format_calls(calls)
            source = "toolace_multi" if len(messages) >= 2 else "toolace_single"
            yield f"{id}/{number}", {"source": source, "tools": tools, "messages": list(messages),
                                     "answer": calls}
        messages.append({"role": role, "content": content})


def _find_tools(system):
    """(tools, None): the first JSON list of objects that have a name and parameters; or (None, reason)."""
    reason = "no tool list in the system text"
    for start in re.finditer(r"\[\s*\{", system):
        try:
            tools, _ = json.JSONDecoder().raw_decode(system, start.start())
        except ValueError:
            reason = "the tool list in the system text is not JSON"
            continue
        if all(isinstance(t, dict) and isinstance(t.get("name"), str) and "parameters" in t for t in tools):
            return tools, None
    return None, reason


def _read_call_turn(text, offered):
    """(calls, None) of a call turn, (None, reason) of one that cannot be read, (None, None) of other text.
    Text may begin with "[" too: it is held for a broken call only where an offered name and "(" follow, or
    `name(key=` or `name()` does and it ends with "]"."""
    try:
        calls = parse_calls(text)
    except ValueError as error:
        text = text.strip()
        broken = any(re.match(rf"\[\s*{re.escape(name)}\s*\(", text) for name in offered) or (
            text.endswith("]") and re.match(r"""\[[^][="]+\(\s*(\)|[^\s=()"',]+\s*=)""", text))
        return None, f"call does not parse: {error}" if broken else None
    return [{**call, "name": offered.get(call["name"], call["name"])} for call in calls], None


# A name ends at the first "(" which ")" and the end of a call, or "parameter=", follow: it may hold brackets.
_NAME = re.compile(r"""\s*([^="]+?)\s*\((?=\s*(?:\)\s*[],]|[^\s=,()"'][^=,()"']*=))""")
_PARAMETER = re.compile(r"""\s*([^\s=,()"'][^=,()"']*?)\s*=""")
_TOKEN = re.compile(r"""(?s)\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[][(){},:]|[^][(){},:\s"']+)""")
_JSON = {"True": "true", "False": "false", "None": "null", "(": "[", ")": "]"}
_ESCAPES = {'"': '\\"', "\\'": "'", "\\\n": ""}


def parse_calls(text):
    """Read `[Name(key=value, …), Name(…)]` -> [{"name", "arguments"}…], one call at least; else ValueError.
    Values are literals of Python or JSON; a tuple is read as a list. The text is rewritten as JSON token by
    token, so that the JSON reader judges its structure."""
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
        calls = json.loads("".join(parts), object_pairs_hook=_unique_keys, strict=False)
        json.dumps(calls, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("a value is no literal, a key stands twice or a bracket is open") from None
    return calls


def _json_string(body):
    """The inside of a Python string literal as a JSON string; escapes that neither knows are plain text."""
    def piece(match):
        as_it_is = match[0] if (match[2] or "u") in '"\\/bfnrtu' else "\\" + match[0]
        return json.dumps(chr(int(match[1], 16)))[1:-1] if match[1] else _ESCAPES.get(match[0], as_it_is)

    return '"' + re.sub(r'(?s)\\[xU]((?<=x)[0-9a-fA-F]{2}|(?<=U)[0-9a-fA-F]{8})|\\(.)|"', piece, body) + '"'
