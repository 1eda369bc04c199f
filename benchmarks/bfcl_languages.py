"""The languages of BFCL's tools: types, hints for the prompt, Java and JavaScript values as literals.

In:  tools as in the data; strings that hold a literal.
Out: tools as shown in the prompt; Python values, or the string itself if it is not a literal of its type.

The official converters match patterns instead of parsing, and their peculiarities decide verdicts: a Java
long needs its L and a float its f; lists are split at every comma; the elements of `new String[]{"a"}` keep
their quotes, those of `new ArrayList<>(Arrays.asList("a"))` lose them; a JavaScript object ends at the first
closing brace. Where we differ: some patterns are replaced by equivalent code, because they can take
exponential or quartic time, and a text of more than LIMIT characters remains a string.
"""

import json
import re

# Below the number of digits (4300) from which Python refuses to read an integer.
LIMIT = 4096
SYNTAX = {"python": "Python 3", "java": "Java 8 SDK", "javascript": "JavaScript"}
TYPES = {
    "python": {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
               "dict": dict, "any": str},
    "java": {"byte": int, "short": int, "integer": int, "long": int, "float": float, "double": float,
             "boolean": bool, "char": str, "String": str, "any": str, "Array": list, "ArrayList": list,
             "HashMap": dict},
    "javascript": {"String": str, "integer": int, "float": float, "Bigint": int, "Boolean": bool, "any": str,
                   "dict": dict, "array": list},
}
LISTS = {"python": ("array", "tuple"), "java": ("Array", "ArrayList"), "javascript": ("array",)}


# ---- hints
def language_of(category):
    """The language of a category's tools: python, java or javascript."""
    return next((language for language in ("javascript", "java") if language in category), "python")


def hinted(function, language):
    """A copy of a tool, as shown in the prompt, with hints about the language. If that is not Python,
    parameters are declared as strings that hold literals."""
    properties = function["parameters"]["properties"]
    if language != "python":
        properties = {name: _as_text(schema, language) for name, schema in properties.items()}
    hint = f" Note that the provided function is in {SYNTAX[language]} syntax."
    return {**function, "description": function["description"] + hint,
            "parameters": {**function["parameters"], "properties": properties}}


def _as_text(schema, language):
    """The schema of a Java or JavaScript parameter, declared as a string."""
    kind, name = schema["type"], {"java": "Java", "javascript": "JavaScript"}[language]
    hint = f" This is {name} {kind} type parameter in string representation."
    if kind == "any":
        hint = f" This parameter can be of any type of {name} object in string representation."
    dropped = ()
    if kind in LISTS[language]:
        element = schema["items"]["type"]
        hint += f" The list elements are of type {element}; they are not in string representation."
        dropped = ("items",)
    if language == "javascript" and kind == "dict" and "properties" in schema:
        hint += (" The dictionary entries have the following schema; they are not in string representation. "
                 + json.dumps(schema["properties"]))
        dropped = ("properties",)
    hinted = {**schema, "description": schema["description"] + hint, "type": "string"}
    return {key: value for key, value in hinted.items() if key not in dropped}


# ---- literals
_INTEGER, _REAL = r"-?\d+", r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_NUMBERS = {
    "java": {"byte": (_INTEGER, "", int), "short": (_INTEGER, "", int), "integer": (_INTEGER, "", int),
             "long": (_INTEGER, "[lL]", int), "float": (_REAL, "[fF]", float), "double": (_REAL, "", float)},
    "javascript": {"integer": (_INTEGER, "", int), "float": (r"-?\d+(?:\.\d+)?", "", float),
                   "Bigint": (_INTEGER, "n", int)},
}


def _number(text, language, kind):
    number, suffix, convert = _NUMBERS[language][kind]
    match = re.match(f"({number}){suffix}$", text)
    return convert(match[1]) if match else text


def _guess(text, quotes):
    """The value of a text of unknown type: true, false, a quoted string, a Python number, else the text."""
    if text in ("true", "false"):
        return text == "true"
    if text[:1] and text[0] in quotes and text[-1] == text[0]:
        return text[1:-1]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text


def _guess_java(text):
    for kind in ("long", "float"):
        value = _number(text, "java", kind)
        if value is not text:
            return value
    return _guess(text, '"')


def from_java(text, kind, element=None):
    """The value of a Java literal; `element` is the type of the elements of an Array or ArrayList."""
    if len(text) > LIMIT:
        return text
    if kind in _NUMBERS["java"]:
        return _number(text, "java", kind)
    if kind == "boolean":
        return text == "true" if text in ("true", "false") else text
    if kind == "Array":
        found = re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", text)
        parts = [part.strip() for part in found[1].split(",")] if found else []
        return [from_java(part, element) for part in parts if part] if found else text
    if kind == "ArrayList":
        return _java_array_list(text, element)
    return _java_map(text) if kind == "HashMap" else text


def _java_array_list(text, element):
    found = re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", text)
    parts = found[1].split(",") if found else None
    opening = re.search(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*", text)
    end = text.find("}}", opening.end() + 1) if opening else -1
    if parts is None and end >= 0:
        parts = re.findall(r"add\((.+?)\)", text[opening.end():end])
    if parts is None:
        return [] if re.search(r"new\s+ArrayList<\w*>\(\)", text) else text
    if element in ("char", "String"):
        return [part.strip()[1:-1] for part in parts]
    return [from_java(part.strip(), element) for part in parts]


def _java_map(text):
    opening = re.search(r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?\s*", text, re.DOTALL)
    end = text.find("}", opening.end()) if opening else -1
    if end >= 0:
        puts = re.findall(r'put\("(.*?)",\s*([^)\n]*)\)', text[opening.end():end].rstrip())
        return {key: _guess_java(value.strip()) for key, value in puts}
    return {} if re.search(r"new\s+HashMap<.*?>\s*\(\)", text) else text


def from_javascript(text, kind, element=None):
    """The value of a JavaScript literal; `element` is the type of the elements of an array, None: any."""
    if len(text) > LIMIT:
        return text
    if kind in _NUMBERS["javascript"]:
        return _number(text, "javascript", kind)
    if kind == "Boolean":
        return text == "true" if text in ("true", "false") else text
    if kind == "String":
        quoted = text[:1] in ('"', "'") and text[-1] == text[0]
        return text[1:-1] if quoted else text
    if kind == "array":
        return _javascript_array(text.strip(), element)
    return _javascript_dict(text.strip()) if kind == "dict" else text


def _javascript_array(text, element):
    end = _javascript_rows_end(text)
    if end is not None:
        rows = [row.strip() for row in re.findall(r"\[(.*?)\]", text[:end])]
        rows[0] = rows[0].removeprefix("[")
        return [[_guess(item.strip(), "\"'") for item in row.split(",")] for row in rows]
    found = re.match(r"\[(.*?)\]|new\s+Array\((.*?)\)", text)
    if not found:
        return text
    inside = (found[1] if found[1] is not None else found[2]).strip()
    parts = [part.strip() for part in inside.split(",")] if inside else []
    return [from_javascript(part, element) if element else _guess(part, "\"'") for part in parts]


def _javascript_rows_end(text):
    r"""The end of a list of lists at the beginning of the text, or None. The official converter matches, in
    exponential time, \[\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\], or the same with new Array( and )."""
    opening = re.match(r"(\[|new\s+Array\()\s*\[", text)
    if not opening:
        return None
    closing = "]" if opening[1] == "[" else ")"
    brackets = [match.start() for match in re.finditer(r"\]", text)]
    ends = {}

    def first_end(start):
        line_end = text.find("\n", start) % (len(text) + 1)
        return next((ends[at] for at in brackets if start <= at < line_end and at in ends), None)

    for at in reversed(brackets):
        after = re.compile(r"\s*(?:([\])])|,\s*\[)").match(text, at + 1)
        if after and after[1] in (None, closing):
            end = after.end() if after[1] else first_end(after.end())
            if end is not None:
                ends[at] = end
    return first_end(opening.end())


def _javascript_dict(text):
    found = re.match(r"\{(.*?)\}", text)
    if not found:
        return text
    pairs = re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", found[1])
    values = {}
    for key, value in pairs:
        value = value.strip()
        is_list = value.startswith("[") and value.endswith("]")
        values[key.strip().strip("'\"")] = (
            _javascript_array(value, None) if is_list else _guess(value.strip("'\"").strip(), "\"'"))
    return values
