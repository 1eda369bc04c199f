"""Evaluation: held-out examples, BFCL, API-Bank and ACEBench, each in one table and one JSON file.

In:  a model and the data of a benchmark, or, without a model, existing outputs ({"id", "category", "calls"} a
     line).
Out: accuracies by category with the benchmark's own averages, the paper's rows below them, scores.json.

Replies are greedy. Held-out examples are scored by the reward of training, with a 95 % confidence interval:

    interval = (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n),  z = 1.96         Wilson (1927)

The public benchmarks are scored as their official scorers do, by the rules in the modules of benchmarks/.
Replies to them are appended to a file batch by batch, so an interrupted evaluation resumes. Missing replies
count as wrong and are reported, so the denominator is fixed.

Axes: P prompts.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch

from benchmarks import bfcl
from benchmarks.acebench import check_acebench as check_acebench
from benchmarks.api_bank import check_api_bank as check_api_bank
from benchmarks.bfcl import check_bfcl as check_bfcl
from benchmarks.tables import BENCHES, bench_table, paper_table, read_outputs, score_calls
from data import Chat, Example, read_jsonl
from model import load_hf
from reward import SCHEMES, judge
from runtime.files import read_json, write_json, write_text
from runtime.kernel import KERNELS
from runtime.sharding import choose_device
from sample import generate


# ---- held-out examples
def wilson(right, n, z=1.96):
    """The 95 % confidence interval (low, high) of the share right / n, by default; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    middle = p + z * z / (2 * n)
    # Wilson (1927)
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half_width) / scale), min(1.0, (middle + half_width) / scale)


def generate_greedily(model, chat, prompts, max_new_tokens, batch_size, progress, **settings):
    """One greedy rollout a prompt. Greedy decoding draws no noise, so the seeds do not matter."""
    return generate(model, prompts, 1, max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=chat.stop_ids,
                    seeds_P=[0] * len(prompts), vocab_size=chat.vocab_size, batch_size=batch_size,
                    progress=progress, **settings)


def evaluate(model, chat, examples, *, max_new_tokens, batch_size=256, scheme="binary", progress=None,
             kernel="auto", **settings):
    """Greedy replies to `examples`, judged. Returns (rows, replies).

    max_new_tokens: tokens a reply; batch_size: replies decoded at once; scheme: of the reward; progress: name
    of a progress bar; kernel: auto | reference | fast; settings: kv_memory_gib and should_stop of `generate`.
    rows: one dictionary a category and a last one for "all", see `summarize`; replies: one dictionary an
    example, with the query, the reply and the verdict. A reply is right if its reward is 1.
    """
    prompts = [chat.encode_prompt(example) for example in examples]
    rollouts = generate_greedily(model, chat, prompts, max_new_tokens, batch_size, progress, kernel=kernel,
                                 **settings)
    replies = []
    for example, rollout in zip(examples, rollouts, strict=True):
        text = chat.decode(rollout.ids)
        verdict = judge(example, text, scheme)
        replies.append({"id": example.id, "category": example.source,
                        "query": example.messages[-1]["content"], "answer": example.answer, "reply": text,
                        "right": verdict.reward == 1, "format_ok": verdict.format_ok,
                        "names_ok": verdict.names_ok, "finished": rollout.finished, "error": verdict.error})
    return summarize(replies), replies


def summarize(replies):
    """Table rows from the replies of `evaluate`: one a category in alphabetical order, then "all". Replies of
    a category such as "tools/single" also count in a row "tools", which comes before its parts."""
    rows_of = {name: {name, name.split("/")[0], "all"} for name in {reply["category"] for reply in replies}}
    rows = []
    for category in [*sorted(set().union(*rows_of.values()) - {"all"}), "all"]:
        part = [reply for reply in replies if category in rows_of[reply["category"]]]
        right = sum(reply["right"] for reply in part)
        low, high = wilson(right, len(part))
        share = {key: sum(reply[key] for reply in part) / max(1, len(part))
                 for key in ("format_ok", "names_ok", "finished")}
        rows.append({"category": category, "n": len(part), "right": right,
                     "accuracy": right / max(1, len(part)), "low": low, "high": high, **share})
    return rows


def accuracy_table(columns):
    """A text table of accuracies in percent. columns: {heading: rows of `summarize`} on the same examples."""
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


def print_evaluation(step, rows, replies):
    """Print the accuracies at a training step on one line, then query, text and verdict of `replies`."""
    by_category = "  ".join(f"{row['category']} {row['accuracy']:.1%}" for row in rows[:-1]
                            if "/" not in row["category"])
    print(f"held-out accuracy at step {step}: {rows[-1]['accuracy']:.1%} of {rows[-1]['n']}  ({by_category})")
    for reply in replies:
        # One line each and not too long, because a query can have thousands of characters.
        query, text = (" ".join(reply[key].split())[:1000] for key in ("query", "reply"))
        verdict = "right" if reply["right"] else f"wrong: {reply['error']}"
        print(f"  asked   {query}\n  wrote   {text}\n  {verdict}", flush=True)


def evenly_spaced(examples, n):
    """At most `n` examples at even distances, so that every part of a file counts; all if n is None."""
    n = len(examples) if n is None else min(n, len(examples))
    return [examples[i * len(examples) // n] for i in range(n)]


# ---- the public benchmarks
def answer_entries(model, chat, bench, entries, file, settings, *, max_new_tokens, batch_size,
                   kernel="auto"):
    """Greedy replies to the entries of a benchmark, {id: reply text}. Those in `file` are not made again.

    After every batch its replies are appended to `file`, a line {"id", "category", "reply"} each; `settings`
    are saved in settings.json in the same folder. ValueError if `file` holds replies of other settings or a
    line that is no reply, or if a prompt is too long for the model.
    """
    replies = read_replies(file, entries, settings)
    prompts = {}
    for entry in entries:
        if entry.id not in replies:
            tools, messages = bench.prompt(entry, settings["paper_prompt"])
            prompts[entry.id] = chat.encode_prompt(Example(entry.id, entry.category, tools, messages, []))
    room = model.config.max_position_embeddings - max_new_tokens
    long = [id for id, prompt in prompts.items() if len(prompt) > room]
    if long:
        raise ValueError(f"{len(long)} of {len(prompts)} prompts, {long[0]} the first, have more than the "
                         f"{room} tokens that the model's positions leave beside --max_new_tokens")
    # Sorted, so that prompts of similar length share a batch; the longest first, so that a lack of memory
    # shows in the first batch.
    waiting = [entry for entry in entries if entry.id in prompts]
    waiting.sort(key=lambda entry: len(prompts[entry.id]), reverse=True)
    if replies:
        print(f"{file}: {len(replies)} replies are there, {len(waiting)} to go", flush=True)
    with open(file, "a", encoding="utf-8") as out:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start:start + batch_size]
            rollouts = generate_greedily(model, chat, [prompts[entry.id] for entry in batch],
                                         max_new_tokens, batch_size, "replies", kernel=kernel)
            for entry, rollout in zip(batch, rollouts, strict=True):
                replies[entry.id] = chat.decode(rollout.ids)
                line = {"id": entry.id, "category": entry.category, "reply": replies[entry.id]}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            print(f"{min(start + batch_size, len(waiting))} of {len(waiting)} replies", flush=True)
    return replies


def read_replies(file, entries, settings):
    """{id: reply text} of an earlier evaluation with these settings; an incomplete last line is cut off."""
    settings_file = file.with_name("settings.json")
    if not file.exists():
        write_json(settings_file, settings)
        return {}
    if not settings_file.exists():
        raise ValueError(f"{file} has no {settings_file.name} beside it, so what made it is unknown; choose "
                         "another --out, or remove it")
    earlier = read_json(settings_file)
    for key in settings:
        if earlier.get(key) != settings[key]:
            raise ValueError(f"{file} was made with {key} {earlier.get(key)!r}, not {settings[key]!r}; "
                             "choose another --out, or remove it")
    content = file.read_bytes()  # the incomplete line may end inside a character
    if not content.endswith(b"\n"):
        write_text(file, content[:content.rfind(b"\n") + 1].decode(errors="replace"))
    return {id: line["reply"] for id, line in read_outputs(file, entries, "reply").items()}


# ---- command line
def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a model or existing outputs: a table, a JSON file.")
    parser.add_argument("model", nargs="?", help="folder in the Hugging Face layout, or a hub name")
    parser.add_argument("--bench", required=True, choices=["heldout", *BENCHES])
    parser.add_argument("--data", required=True, help="the benchmark's folder; heldout: a file of examples")
    parser.add_argument("--score", metavar="FILE", help='lines {"id", "category", "calls"}; needs no model')
    parser.add_argument("--out", type=Path, help="folder of results; default: BENCH in MODEL, or here")
    parser.add_argument("--examples", type=int, help="only so many of each category, evenly spaced")
    parser.add_argument("--system_prompt", help="text file with {tools}; default: our own wording")
    parser.add_argument("--paper_prompt", action="store_true", help="leave out an entry's own system message")
    parser.add_argument("--export_official", type=Path, metavar="DIR", help="bfcl: files for its own scorer")
    parser.add_argument("--scheme", default="binary", help="heldout: scheme of the reward (default: binary)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens a reply (default: 1024)")
    parser.add_argument("--batch_size", type=int, default=256, help="replies at once (default: 256)")
    parser.add_argument("--kernel", default="auto", choices=KERNELS, help="of decoding (default: auto)")
    args = parser.parse_args(argv)
    try:
        for name in ("examples", "max_new_tokens", "batch_size"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
        if args.bench in BENCHES:
            evaluate_bench(args)
        else:
            evaluate_heldout(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def results_folder(args):
    if args.out:
        return args.out
    return Path(args.model if args.model and os.path.isdir(args.model) else ".") / args.bench


def load_model(args):
    if not args.model:
        raise ValueError("no model: name its folder or hub name first, or give existing outputs with --score")
    chat = Chat(args.model, args.system_prompt)
    device, bf16 = choose_device()
    return load_hf(args.model, device, torch.bfloat16 if bf16 else torch.float32), chat


def evaluate_heldout(args):
    if args.score or args.export_official:
        raise ValueError("--score and --export_official are for the public benchmarks, not for heldout")
    if args.scheme not in SCHEMES:
        raise ValueError(f"unknown reward scheme {args.scheme!r}: choose one of {', '.join(SCHEMES)}")
    examples = of_each(read_jsonl(args.data), args.examples, lambda example: example.source)
    if not examples:
        raise ValueError(f"{args.data}: no examples")
    model, chat = load_model(args)
    rows, replies = evaluate(model, chat, examples, max_new_tokens=args.max_new_tokens,
                             batch_size=args.batch_size, scheme=args.scheme, progress="evaluation",
                             kernel=args.kernel)
    print(accuracy_table({"accuracy": rows}))
    out = results_folder(args) / "scores.json"
    write_json(out, {"model": args.model, "data": args.data, "scheme": args.scheme, "rows": rows,
                     "replies": replies})
    print(f"written: {out}")


def evaluate_bench(args):
    if args.export_official and args.bench != "bfcl":
        raise ValueError("--export_official writes the result files of BFCL; use it with --bench bfcl")
    if args.score and args.model:
        raise ValueError("--score scores existing outputs; leave out the model")
    bench = BENCHES[args.bench]
    entries = of_each(bench.load(args.data), args.examples, lambda entry: entry.category)
    folder = results_folder(args)
    if args.score:
        calls = {id: line["calls"] for id, line in read_outputs(args.score, entries, "calls").items()}
    else:
        model, chat = load_model(args)
        settings = {"model": args.model, "bench": args.bench, "data": args.data,
                    "paper_prompt": args.paper_prompt, "system_prompt": args.system_prompt,
                    "max_new_tokens": args.max_new_tokens}
        folder.mkdir(parents=True, exist_ok=True)
        replies = answer_entries(model, chat, bench, entries, folder / "replies.jsonl", settings,
                                 max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
                                 kernel=args.kernel)
        calls = {id: bench.decode(reply) for id, reply in replies.items()}
    verdicts = score_calls(bench, entries, calls)
    rows = {metric: bench.summarize(of_metric) for metric, of_metric in verdicts.items()}
    name = args.score or args.model
    lines = [{"id": entry.id, "category": entry.category, "calls": calls[entry.id],
              **{metric: verdicts[metric][entry.category][entry.id] for metric in verdicts}}
             for entry in entries if entry.id in calls]
    write_json(folder / "scores.json", {"model": name, "bench": args.bench, "data": args.data, "rows": rows,
                                        "verdicts": lines})
    if args.export_official:
        outputs = {entry.category: {} for entry in entries}
        for line in lines:
            outputs[line["category"]][line["id"]] = line["calls"]
        print(f"written: {len(bfcl.export_official(outputs, args.export_official))} official result files")
    print(bench_table(rows))
    print()
    print(paper_table(args.bench, rows, Path(name).name))
    print(f"\nwritten: {folder / 'scores.json'}")


def of_each(items, n, category):
    """At most n items of each category, evenly spaced; all if n is None."""
    groups = {}
    for item in items:
        groups.setdefault(category(item), []).append(item)
    return [item for group in groups.values() for item in evenly_spaced(group, n)]


if __name__ == "__main__":
    main()
