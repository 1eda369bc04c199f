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

NO_TOOLS = "tools are not a list of objects with a name"


def bare_tools(value, may_be_empty=False):
    """The bare schemas [{"name", …}…] of `value`, a tool list in any form of the docstring above.

    ValueError, with the reason, for anything else, also for what cannot be written as JSON (NaN, half a
    surrogate pair), and for an empty list unless it may be empty.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, dict):
            value = value["tools"] if isinstance(value.get("tools"), list) and "name" not in value else [value]
        if not isinstance(value, list):
            raise ValueError(NO_TOOLS)
        tools = [_bare_tool(tool) for tool in value]
        json.dumps(tools, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError:
        raise ValueError("tools are a text that is not JSON") from None
    except UnicodeEncodeError:
        raise ValueError("a tool holds half a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("a tool nests too deep to be read") from None
    except ValueError as error:
        reason = "a tool holds NaN or Infinity, which JSON has not"
        raise ValueError(reason if "JSON compliant" in str(error) else str(error)) from None
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
