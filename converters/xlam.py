r"""xlam-function-calling-60k: a record in, the fields of one example out.

Source: the data set Salesforce/xlam-function-calling-60k (APIGen, arXiv 2406.18518). A raw record:

    {"id": 0, "query": TEXT, "tools": "[{\"name\": …, \"parameters\": …}, …]",
     "answers": "[{\"name\": …, \"arguments\": {…}}, …]"}

`tools` and `answers` are JSON in a string, or already parsed. The example has one user message, `query`.
"""

import contextlib
import json

from converters.messages import read_calls
from converters.schemas import bare_tools

COLUMNS = ("query", "tools", "answers")


def convert(id, record):
    """Yield one pair: (id, fields of the example as a dict) or (id, the reason why it is dropped)."""
    try:
        tools, answer = (json.loads(value) if isinstance(value, str) else value
                         for value in (record["tools"], record["answers"]))
    except (ValueError, RecursionError):
        yield id, "tools or answers are not JSON"
        return
    try:
        tools = bare_tools(tools, may_be_empty=True)
    except ValueError as error:
        yield id, str(error)
        return
    # What read_calls refuses stays as it is: the check of every example says what is wrong with it.
    with contextlib.suppress(ValueError):
        answer = read_calls(answer)
    messages = [{"role": "user", "content": record["query"]}]
    yield id, {"source": "xlam", "tools": tools, "messages": messages, "answer": answer}
