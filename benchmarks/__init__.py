"""The public benchmarks, scored by their official rules: one module each, pure functions without torch.

Each has load(folder) -> entries, prompt(entry) -> (tools, messages), decode(reply) -> calls or None,
check(entry, calls) -> (valid, reason), summarize(results) -> table rows.
"""

import json

BAD_LINE = "{path}:{number}: not JSON ({error}); is the line cut off?"


def json_lines(path, text, message=BAD_LINE):
    """Yield (line number, value) of the lines of a JSON-lines file; blank lines are skipped.

    path: of the file, for the message; text: its contents. ValueError, saying `message`: a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(message.format(path=path, number=number, error=error)) from None
        yield number, value
