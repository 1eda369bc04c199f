r"""Tool schemas: the forms in which they are published, and what they say about the arguments of a call.

In:  the tools of a record, in any of the forms below, and calls {"name", "arguments"}.
Out: a list of bare schemas, which give the same prompt from every form.

    {"name": …, "description": …, "parameters": {…}}                          bare: xLAM, ToolACE
    {"type": "function", "function": {bare}}                                  Chat Completions API of OpenAI
    {"type": "function", "name": …, "parameters": {…}, "strict": true}        Responses API of OpenAI
    [form, …], {"tools": [form, …]}, one form, or a JSON text of any of these

`strict` asks an API for constrained decoding; it is no part of a schema and is left out.
"""

import json

from runtime.json_types import fits

NO_TOOLS = "tools are not a list of objects with a name"


def bare_tools(value, may_be_empty=False):
    """The bare schemas [{"name", …}…] of `value`, a tool list in any form of the docstring above.

    ValueError, with the reason, for anything else, and for an empty list unless it may be empty.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError("tools are a text that is not JSON") from None
    if isinstance(value, dict):
        value = value["tools"] if isinstance(value.get("tools"), list) and "name" not in value else [value]
    if not isinstance(value, list):
        raise ValueError(NO_TOOLS)
    tools = [_bare_tool(tool) for tool in value]
    try:
        json.dumps(tools, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("a tool holds NaN, half a surrogate pair or too deep nesting") from None
    if not tools and not may_be_empty:
        raise ValueError("the list of tools is empty")
    return tools


def _bare_tool(tool):
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict) and "name" not in tool:
        tool = tool["function"]
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise ValueError(NO_TOOLS)
    # "type": "function" belongs to the API; a bare schema of another kind keeps its "type".
    api = {"strict": (True, False, None), "type": ("function",)}
    return {key: part for key, part in tool.items() if key not in api or part not in api[key]}


# ---- what a schema says about arguments
def read_parameters(tool):
    """(properties {name: schema}, required names, nested) of a bare tool, or None if it holds no schema.

    nested: `parameters` is a JSON schema with "properties"; otherwise it maps names to schemas, as in xLAM,
    where a parameter is required if it has no default and its type does not say "optional".
    """
    schema = tool.get("parameters")
    if not isinstance(schema, dict):
        return None
    properties, kind = schema.get("properties"), schema.get("type")
    # In a flat schema "properties" and "type" are parameters too: their values are a schema, not schemas.
    if isinstance(properties, dict) and (isinstance(kind, (str, list)) or all(
            isinstance(value, dict) or value is None for value in properties.values())):
        return properties, _required(schema, properties), True
    if isinstance(kind, str) and kind.lower() in ("object", "dict"):
        return {}, [], True
    return schema, [name for name, value in schema.items() if isinstance(value, dict) and not (
        "default" in value or "optional" in str(value.get("type", "optional")).lower()
        or value.get("required") is False)], False


def _required(schema, properties):
    """The names in "required", a list or one name, and the properties that say so themselves."""
    named = schema.get("required")
    named = named if isinstance(named, list) else [named]
    return [name for name, value in properties.items()
            if name in named or isinstance(value, dict) and value.get("required") is True]


def contradictions(call, tool):
    """{reason: detail} of what a call {"name", "arguments"} of a bare tool does that its schema forbids.

    The reasons: "wrong type", "unknown parameter", "required parameter missing", "not of the enum". What a
    schema leaves open is no contradiction: types that are not known, no "properties", "additionalProperties".
    An integer is a number, and 2.0 an integer (JSON Schema, draft 6); the default is always right.
    """
    if read := read_parameters(tool):
        _check_object(call["arguments"], *read, tool["parameters"], found := {})
    return found if read else {}


def contradictions_of(tools, answer):
    """`contradictions` of all calls of an answer. Of tools with one name the most fitting counts."""
    found = {}
    for call in answer:
        named = (tool for tool in tools if tool["name"] == call["name"])
        found |= min((contradictions(call, tool) for tool in named), key=len)
    return found


def rename_parameters(tool, rename):
    """A bare tool whose parameters have the names and schemas that `rename(name, schema)` returns as a pair.
    Names in "required" follow. ValueError if `parameters` is no object: then the names are unknown."""
    schema = tool.get("parameters")
    if not schema:
        return tool
    if not isinstance(schema, dict):
        raise ValueError(f"the parameters of {tool['name']} are no object")
    properties, _, nested = read_parameters(tool)
    pairs = {name: rename(name, part) for name, part in properties.items()}
    if not nested or "properties" not in schema:
        return {**tool, "parameters": dict(pairs.values()) or schema}
    schema, named = {**schema, "properties": dict(pairs.values())}, schema.get("required")
    renamed = [pairs[name][0] if isinstance(name, str) and name in pairs else name
               for name in (named if isinstance(named, list) else [named])]
    if "required" in schema:
        schema["required"] = renamed if isinstance(named, list) else renamed[0]
    return {**tool, "parameters": schema}


def refuses_null(tool, name):
    """Whether a bare tool refuses null for a parameter, by its type or because it has no such parameter."""
    properties, _, nested = read_parameters(tool) or ({}, [], True)
    schema = properties.get(name)
    if not isinstance(schema, dict):
        return name in properties or not _is_open(nested, tool.get("parameters"))
    return _contradicts({key: part for key, part in schema.items() if key != "default"}, None)


def _is_open(nested, schema):
    return nested and (not isinstance(schema, dict) or "properties" not in schema
                       or bool(schema.get("additionalProperties")))


def _check_object(value, properties, required, nested, schema, found):
    for name, part in value.items():
        if name in properties:
            _check_value(part, properties[name], name, found)
        elif not _is_open(nested, schema):
            found.setdefault("unknown parameter", name[:60])
    for name in required:
        if name not in value:
            found.setdefault("required parameter missing", name)


def _check_value(value, schema, name, found):
    schema = {"type": schema} if isinstance(schema, str) else schema
    if not isinstance(schema, dict) or value is None and schema.get("nullable") is True:
        return
    if "default" in schema and one_of(value, [schema["default"]]):
        return
    says, branches = f"{name} is {json.dumps(value)[:60]}", schema.get("anyOf") or schema.get("oneOf")
    if isinstance(branches, list) and all(_contradicts(one, value) for one in branches):
        found.setdefault("wrong type", says)
    if not fits(schema.get("type"), value):
        found.setdefault("wrong type", f"{says}, not {json.dumps(schema['type'])}")
        return
    choices = schema.get("enum")
    # The enum of a list may be that of its items, as BFCL has it.
    if isinstance(choices, list) and not one_of(value, choices) and not (
            isinstance(value, list) and all(one_of(item, choices) for item in value)):
        found.setdefault("not of the enum", says)
    if isinstance(value, dict) and isinstance(properties := schema.get("properties"), dict):
        _check_object(value, properties, _required(schema, properties), True, schema, found)
    for item in value if isinstance(value, list) else []:
        _check_value(item, schema.get("items"), f"{name}[]", found)


def one_of(value, choices):
    """Whether a value is equal to a choice, type and all: true, 1 and 1.0 differ."""
    return json.dumps(value, sort_keys=True) in [json.dumps(choice, sort_keys=True) for choice in choices]


def _contradicts(schema, value):
    _check_value(value, schema, "", found := {})
    return bool(found)
