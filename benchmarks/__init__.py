"""The public benchmarks, scored by their official rules: one module each, pure functions without torch.

Each has load(folder) -> entries, prompt(entry) -> (tools, messages), decode(reply) -> calls or None,
check(entry, calls) -> (valid, reason), summarize(results) -> table rows.
"""
