"""Nulls of a columnar file, where every object has the keys of all: recognised and taken out.

In:  the fields of examples. Out: the same, with the number of nulls taken out of calls. A parameter null in
the tool itself is such a key, and so is, in a call of that record, every null that the schema refuses. Where
nearly all answers of a file have a null that is refused, it is the answers that were stored in columns.
"""

from converters.messages import earlier_calls
from converters.schemas import read_parameters, refuses_null
from reward import format_calls

NEARLY_ALL = 0.9


def undo_nulls(examples):
    """(examples, number of arguments taken out) of a list of dicts with tools, messages and answer.

    A null that the schema allows stays, and so does every null of a file that is not recognised.
    """
    answered = [fields for fields in examples if fields["answer"]]
    refused = sum(any(_without_nulls(call, fields["tools"])[1] for call in fields["answer"])
                  for fields in answered)
    columns = refused >= NEARLY_ALL * len(answered)
    made, total = [], 0
    for fields in examples:
        tools = [_without_null_parameters(tool) for tool in fields["tools"]]
        if columns or tools != fields["tools"]:
            answer, *earlier = ([_without_nulls(call, tools) for call in calls] for calls in (
                fields["answer"], *map(earlier_calls, fields["messages"])))
            messages = [{**message, "content": format_calls([c for c, _ in calls])} if calls else message
                        for message, calls in zip(fields["messages"], earlier, strict=True)]
            total += sum(count for _, count in answer)
            fields = {**fields, "tools": tools, "messages": messages, "answer": [call for call, _ in answer]}
        made.append(fields)
    return made, total


def _without_null_parameters(tool):
    properties, _, nested = read_parameters(tool) or ({}, [], False)
    if None not in properties.values():
        return tool
    properties = {name: schema for name, schema in properties.items() if schema is not None}
    return {**tool, "parameters": {**tool["parameters"], "properties": properties} if nested else properties}


def _without_nulls(call, tools):
    """(call, number of arguments taken out)."""
    tool = next((tool for tool in tools if tool["name"] == call["name"]), {})
    properties, kept = (read_parameters(tool) or ({},))[0], {}
    for name, value in call["arguments"].items():
        if not (value is None and refuses_null(tool, name)):
            kept[name] = _strip(value, properties.get(name))
    return {**call, "arguments": kept}, len(call["arguments"]) - len(kept)


def _strip(value, schema):
    """A value without the nulls inside it that its schema refuses; all of them, where it has no schema."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_strip(item, schema.get("items")) for item in value]
    if isinstance(value, dict):
        known = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
        return {name: _strip(part, known.get(name)) for name, part in value.items() if part is not None
                or known and not refuses_null({"parameters": schema}, name)}
    return value
