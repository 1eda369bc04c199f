"""Evaluation: greedy replies to held-out examples, scored by training's own reward, in one table and one
JSON file.

In:  a model, a tokenizer folder, examples. Out: for each category (an example's `source`) and for all of
them: how many, the share of right replies with its 95 % confidence interval, the share of right formats and
of right names.

    interval = (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n),  z = 1.96         Wilson (1927)

The public benchmarks are not here yet; they will be further values of --bench.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch

from data import Chat, read_jsonl
from model import load_hf
from reward import score
from sample import generate


def wilson(right, n, z=1.96):
    """The 95 % confidence interval (low, high) of a share of `right` in `n`; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def evaluate(model, chat, examples, *, max_new_tokens, batch_size=256, scheme="binary", progress=None):
    """Greedy replies to `examples`. Returns (rows, replies).

    rows: one dictionary a category and a last one for "all", as `summarize` makes them; replies: one
    dictionary an example, with what was asked, what was written and what it scored. A reply is right where
    its reward is 1.
    """
    prompts = [chat.encode_prompt(example) for example in examples]
    rollouts = generate(model, prompts, 1, max_new_tokens=max_new_tokens, temperature=0.0,
                        stop_ids=chat.stop_ids, seeds_P=[0] * len(prompts), vocab_size=chat.vocab_size,
                        batch_size=batch_size, progress=progress)
    replies = []
    for example, rollout in zip(examples, rollouts, strict=True):
        text = chat.decode(rollout.ids)
        verdict = score(text, example.answer, scheme)
        replies.append({"id": example.id, "category": example.source,
                        "query": example.messages[-1]["content"], "answer": example.answer, "reply": text,
                        "right": verdict.reward == 1, "format_ok": verdict.format_ok,
                        "names_ok": verdict.names_ok, "finished": rollout.finished, "error": verdict.error})
    return summarize(replies), replies


def summarize(replies):
    """Table rows from scored replies: one a category in alphabetical order, then "all"."""
    categories = sorted({reply["category"] for reply in replies})
    rows = []
    for category in [*categories, "all"]:
        part = [reply for reply in replies if category in ("all", reply["category"])]
        right = sum(reply["right"] for reply in part)
        low, high = wilson(right, len(part))
        share = {key: sum(reply[key] for reply in part) / max(1, len(part))
                 for key in ("format_ok", "names_ok", "finished")}
        rows.append({"category": category, "n": len(part), "right": right,
                     "accuracy": right / max(1, len(part)), "low": low, "high": high, **share})
    return rows


def table(columns):
    """A text table of accuracies in percent. columns: {heading: rows of `summarize`}, of the same set."""
    first = next(iter(columns.values()))
    width = max(len(row["category"]) for row in first)
    headings = "".join(f"  {heading:>22}" for heading in columns)
    lines = [f"{'':<{width}}     n{headings}  format   names"]
    for i, row in enumerate(first):
        cells = ""
        for rows in columns.values():
            r = rows[i]
            cells += f"  {100 * r['accuracy']:6.1f} [{100 * r['low']:5.1f}, {100 * r['high']:5.1f}]"
        last = list(columns.values())[-1][i]
        lines.append(f"{row['category']:<{width}} {row['n']:>5}{cells}  {100 * last['format_ok']:5.1f} %"
                     f" {100 * last['names_ok']:5.1f} %")
    return "\n".join(lines)


def spread(examples, n):
    """At most `n` examples, evenly spaced, so that every part of a file counts; all where n is None."""
    n = len(examples) if n is None else min(n, len(examples))
    return [examples[i * len(examples) // n] for i in range(n)]


def write_json(path, value):
    """Write aside and rename, so that nothing half-written stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a model; prints one table, writes one JSON file.")
    parser.add_argument("model", help="folder in the Hugging Face layout, or a hub name")
    parser.add_argument("--bench", required=True, choices=["heldout"])
    parser.add_argument("--data", required=True, help="JSON lines of examples, as data.py writes them")
    parser.add_argument("--examples", type=int, help="only so many, evenly spaced in the file")
    parser.add_argument("--system_prompt", help="text file with {tools}; default: our own wording")
    parser.add_argument("--scheme", default="binary", help="scheme of the reward (default: binary)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens a reply (default: 1024)")
    parser.add_argument("--batch_size", type=int, default=256, help="replies at once (default: 256)")
    parser.add_argument("--out", help="JSON file; default: heldout.json in MODEL, or here for a hub name")
    args = parser.parse_args(argv)
    out = args.out or Path(args.model if os.path.isdir(args.model) else ".") / "heldout.json"
    try:
        for name in ("examples", "max_new_tokens", "batch_size"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
        examples = spread(read_jsonl(args.data), args.examples)
        if not examples:
            raise ValueError(f"{args.data}: no examples")
        chat = Chat(args.model, args.system_prompt)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_hf(args.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
        rows, replies = evaluate(model, chat, examples, max_new_tokens=args.max_new_tokens,
                                 batch_size=args.batch_size, scheme=args.scheme, progress="evaluating")
        print(table({"accuracy": rows}))
        write_json(out, {"model": args.model, "data": args.data, "scheme": args.scheme, "rows": rows,
                         "replies": replies})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
