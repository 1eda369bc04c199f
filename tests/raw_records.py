"""Records of published data sets, made small: what test_data.py and the tests of converters/ share."""

import json

WEATHER = {
    "name": "Get Weather (v2)",
    "description": "d",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "string", "default": "Oslo"}, "days": {"type": "int"}},
        "required": ["city"],
    },
    "required": None,
}
CLOCK = {"name": "clock/now", "description": "d", "parameters": {"type": "dict", "properties": {}}}


def toolace_file(folder, *turns, system=None):
    """A ToolACE file of one conversation; turns are "role: text"."""
    if system is None:
        system = (
            "You compose calls. Here is a list:\n"
            + json.dumps([WEATHER, CLOCK])
            + ". \nShould you [f(a=1)] do."
        )
    conversation = [dict(zip(("from", "value"), turn.split(": ", 1), strict=True)) for turn in turns]
    path = folder / "toolace.json"
    path.write_text(json.dumps([{"system": system, "conversations": conversation}]))
    return path


def xlam_row(id, answers, tools=(WEATHER, CLOCK), query="q"):
    return {"id": id, "query": query, "tools": json.dumps(tools), "answers": json.dumps(answers)}
