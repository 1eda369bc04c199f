"""Records of xlam-function-calling-60k."""

import json

COLUMNS = ("query", "tools", "answers")


def convert(id, record):
    """Yield (id, fields of the example or the reason why there is none)."""
    try:
        tools, answer = (json.loads(value) if isinstance(value, str) else value
                         for value in (record["tools"], record["answers"]))
    except ValueError:
        yield id, "tools or answers are not JSON"
        return
    messages = [{"role": "user", "content": record["query"]}]
    yield id, {"source": "xlam", "tools": tools, "messages": messages, "answer": answer}
