"""JSON values against types as tool schemas write them. Pure Python, knows nothing of tools.

In:  a type, as JSON Schema names it ("integer", ["string", "null"]) or in Python's notation, as xLAM and
ToolACE write it ("int, optional", "List[str]", "dict"), and a value. Out: whether the value is of the type.
"""

import re

TYPES = {name: kinds for names, kinds in (
    ("string str text", (str,)), ("integer int long", (int,)), ("number float double", (int, float)),
    ("boolean bool", (bool,)), ("array list tuple set sequence iterable", (list,)),
    ("object dict dictionary mapping", (dict,)), ("null none nonetype", (type(None),)),
) for name in names.split()}


def fits(kind, value):
    """Whether a value is of a type: a JSON Schema name or a list of them, or Python's notation in a text, as
    in "int, optional", "List[str]", "Optional[Dict[str, int]]" or "int | None". Unknown types fit all."""
    if isinstance(kind, str):
        parts = [part for part in _split(kind.lower()) if part not in ("optional", "required", "")]
        return any(_fits_one(part, value) for part in parts) or not parts
    return not isinstance(kind, list) or not kind or any(fits(one, value) for one in kind)


def _fits_one(kind, value):
    name, bracket, inside = kind.partition("[")
    name, inside = name.strip().removeprefix("typing."), inside.rpartition("]")[0]
    if name in ("optional", "union"):
        return name == "optional" and value is None or fits(inside, value)
    if name not in TYPES:
        return True
    whole = type(value) is float and value.is_integer() and int in TYPES[name]
    if type(value) not in TYPES[name] and not whole:
        return False
    if isinstance(value, dict):  # the type of its keys comes first
        inside, value = inside.partition(",")[2], list(value.values())
    return not bracket or not isinstance(value, list) or all(fits(inside, item) for item in value)


def _split(text):
    """The parts of a type between "," or "|" or "or", those in brackets not counted."""
    parts, depth = [""], 0
    for token in re.findall(r"\bor\b|.", text):
        depth += (token == "[") - (token == "]")
        if depth == 0 and token in (",", "|", "or"):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]
