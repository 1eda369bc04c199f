"""Evaluation: held-out examples, BFCL, API-Bank and ACEBench, each in one table and one JSON file.

In:  a model and the data of a benchmark, or, without a model, existing outputs ({"id", "category", "calls"} a
     line).
Out: accuracies by category with the benchmark's own averages, the paper's rows below them, scores.json.

Replies are greedy. Held-out examples are scored by the reward of training, with a 95 % confidence interval:

    interval = (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n),  z = 1.96         Wilson (1927)

With --samples K they also get K sampled replies each: their mean accuracy, the share of examples with a right
one (pass@K), and the share with right and wrong ones (mixed), which is what GRPO can learn from.

The public benchmarks are scored as their official scorers do, by the rules in the modules of benchmarks/.
Replies to them are appended to a file batch by batch, so an interrupted evaluation resumes, if the bytes of
weights, config and tokenizer and the prompts are the same. Missing replies count as wrong and are reported,
so the denominator is fixed.

Axes: P prompts.
"""

import argparse
import math
import os
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import torch

from benchmarks import bfcl, choose_categories, tables
from benchmarks.acebench import check_acebench as check_acebench
from benchmarks.api_bank import check_api_bank as check_api_bank
from benchmarks.bfcl import check_bfcl as check_bfcl
from benchmarks.replies import read_replies, reply_line
from benchmarks.tables import BENCHES, read_outputs
from data import Chat, Example, read_jsonl, usable_examples
from model import load_hf
from reward import SCHEMES, judge
from runtime.files import tolerant_output, write_json
from runtime.kernel import KERNELS
from runtime.sharding import choose_device
from runtime.tensors import identity, resolve
from sample import generate, prompt_seeds


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


def generate_replies(model, chat, prompts, n=1, temperature=0.0, **settings):
    """n rollouts a prompt, prompt-major; greedy by default. The seeds are fixed. settings: of `generate`."""
    return generate(model, prompts, n, temperature=temperature, stop_ids=chat.stop_ids,
                    vocab_size=chat.vocab_size, seeds_P=prompt_seeds(0, 0, 0, len(prompts)), **settings)


def evaluate(model, chat, examples, *, max_new_tokens, batch_size=256, scheme="binary", progress=None,
             kernel="auto", **settings):
    """Greedy replies to `examples`, judged. Returns (rows, replies).

    max_new_tokens: tokens a reply; batch_size: replies decoded at once; scheme: of the reward; progress: name
    of a progress bar; kernel: auto | reference | fast; settings: kv_memory_gib and should_stop of `generate`.
    rows: one dictionary a category and a last one for "all", see `summarize`; replies: one dictionary an
    example, with the query, the reply and the verdict. A reply is right if its reward is 1.
    """
    prompts = [chat.encode_prompt(example) for example in examples]
    rollouts = generate_replies(model, chat, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
                                progress=progress, kernel=kernel, **settings)
    replies = []
    for example, rollout in zip(examples, rollouts, strict=True):
        verdict = judge(example, chat.decode_reply(rollout.ids), scheme)
        replies.append({"id": example.id, "category": example.source,
                        "query": example.messages[-1]["content"], "answer": example.answer,
                        "reply": chat.decode(rollout.ids),
                        "right": verdict.reward == 1, "format_ok": verdict.format_ok,
                        "names_ok": verdict.names_ok, "finished": rollout.finished, "error": verdict.error})
    return summarize(replies), replies


def evaluate_samples(model, chat, examples, n, temperature, *, scheme="binary", **settings):
    """How many of n sampled replies to each example are right: a list of integers from 0 to n.

    temperature: above 0; settings: those of `generate`. Seeds depend on the place in `examples` only, so
    equal lists get the same replies, up to rounding.
    """
    prompts = [chat.encode_prompt(example) for example in examples]
    rollouts = generate_replies(model, chat, prompts, n, temperature, **settings)
    right = [judge(examples[i // n], chat.decode_reply(rollout.ids), scheme).reward == 1
             for i, rollout in enumerate(rollouts)]
    return [sum(right[i * n:(i + 1) * n]) for i in range(len(examples))]


def by_category(replies):
    """Yield (category, its replies) for the rows of a table; the last one is "all"."""
    rows_of = {name: {name, name.split("/")[0], "all"} for name in {reply["category"] for reply in replies}}
    for category in [*sorted(set().union(*rows_of.values()) - {"all"}), "all"]:
        yield category, [reply for reply in replies if category in rows_of[reply["category"]]]


def summarize_samples(replies, n):
    """[{"mean", "pass", "mixed"}…], shares for each row of `summarize`: of right samples, of replies with a
    right one, and with both right and wrong ones. Each reply has "samples_right", how many of n are right."""
    counts = [[reply["samples_right"] for reply in part] for _, part in by_category(replies)]
    return [{"mean": sum(right) / (n * len(right)), "pass": sum(map(bool, right)) / len(right),
             "mixed": sum(0 < k < n for k in right) / len(right)} for right in counts]


def summarize(replies):
    """Table rows from the replies of `evaluate`: one a category in alphabetical order, then "all". Replies of
    a category such as "tools/single" also count in a row "tools", which comes before its parts."""
    rows = []
    for category, part in by_category(replies):
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


def with_samples(table, rows, n):
    """The text of `accuracy_table` with columns for the rows of `summarize_samples`."""
    head, *lines = table.split("\n")
    text = [f"{head}  {f'mean of {n}':>12}  {f'pass@{n}':>8}    mixed"]
    text += [f"{line}  {100 * row['mean']:12.1f}  {100 * row['pass']:8.1f}  {100 * row['mixed']:7.1f}"
             for line, row in zip(lines, rows, strict=True)]
    return "\n".join(text)


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
def answer_entries(model, chat, entries, prompts, replies, file, settings, *, max_new_tokens, batch_size,
                   kernel="auto"):
    """Greedy replies to the entries of a benchmark, {id: reply text}, the given `replies` among them.

    prompts: {id: ids}. After every batch its replies are appended to `file`, a line {"id", "category",
    "prompt", "reply"} each, where prompt is a digest; `settings` are saved in settings.json in the same
    folder. ValueError if a prompt is too long for the model.
    """
    replies, prompts = dict(replies), {id: ids for id, ids in prompts.items() if id not in replies}
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
    if not file.exists():
        write_json(file.with_name("settings.json"), settings)
    with open(file, "a", encoding="utf-8") as out:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start:start + batch_size]
            rollouts = generate_replies(model, chat, [prompts[entry.id] for entry in batch], kernel=kernel,
                                        max_new_tokens=max_new_tokens, batch_size=batch_size,
                                        progress="replies")
            for entry, rollout in zip(batch, rollouts, strict=True):
                replies[entry.id] = chat.decode(rollout.ids)
                out.write(reply_line(entry, prompts[entry.id], replies[entry.id]))
            out.flush()
            print(f"{min(start + batch_size, len(waiting))} of {len(waiting)} replies", flush=True)
    return replies


def bench_settings(args, folder, chat):
    """What the replies to a benchmark depend on, besides the prompts. Names are for people to read; the
    digests say what they hold, and only these are compared. folder: of the model."""
    prompt = chat.decode(chat.encode_prompt(
        Example("", "", [{"name": "f"}], [{"role": "user", "content": "q"}], [])))
    return {"model": args.model, "data": args.data, "system_prompt": args.system_prompt, "bench": args.bench,
            "paper_prompt": args.paper_prompt, "max_new_tokens": args.max_new_tokens, **identity(folder),
            "system_prompt_text": sha256(prompt.encode()).hexdigest()}


# ---- command line
def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a model or existing outputs: a table, a JSON file.")
    parser.add_argument("model", nargs="?", help="folder in the Hugging Face layout, or a hub name")
    parser.add_argument("--bench", required=True, choices=["heldout", *BENCHES])
    parser.add_argument("--data", required=True, help="the benchmark's folder; heldout: a file of examples")
    parser.add_argument("--score", metavar="FILE", help='lines {"id", "category", "calls"}; needs no model')
    parser.add_argument("--out", type=Path, help="folder of results; default: BENCH in MODEL, or here")
    parser.add_argument("--categories", metavar="NAME,…", help="only these; files of others are not needed")
    parser.add_argument("--examples", type=int, metavar="N", help="N of each category, evenly spaced, so "
                        "13 N of all of bfcl; what is left out counts as wrong (default: all)")
    parser.add_argument("--system_prompt", help="text file with {tools}; default: the model's, else ours")
    parser.add_argument("--paper_prompt", action="store_true", help="leave out an entry's own system message")
    parser.add_argument("--export_official", type=Path, metavar="DIR", help="bfcl: files for its own scorer")
    parser.add_argument("--scheme", default="binary", help="heldout: of the reward (default: binary)")
    parser.add_argument("--samples", type=int, metavar="K", help="heldout: also mean accuracy and pass@K of "
                        "K sampled replies an example, which say whether GRPO can start")
    parser.add_argument("--temperature", type=float, help="of these samples (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens a reply (default: 1024)")
    parser.add_argument("--batch_size", type=int, default=256, help="replies at once (default: 256)")
    parser.add_argument("--kernel", default="auto", choices=KERNELS, help="of decoding (default: auto)")
    args = parser.parse_args(argv)
    tolerant_output()
    try:
        for name in ("examples", "samples", "max_new_tokens", "batch_size"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
        if (args.samples or args.temperature is not None) and args.bench in BENCHES:
            raise ValueError("--samples and --temperature are for heldout; the public benchmarks are greedy")
        if args.temperature is not None and not (args.samples and 0 < args.temperature < math.inf):
            raise ValueError(f"--temperature {args.temperature}: give it with --samples, as a number above 0")
        (evaluate_bench if args.bench in BENCHES else evaluate_heldout)(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def results_folder(args):
    return args.out or Path(args.model if os.path.isdir(args.model or "") else ".") / args.bench


def make_folder(folder):
    """Make a folder of results and try it, so that no error of it comes after hours of replies."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder


def find_model(args):
    """(folder of the model, its Chat); a hub name is looked up once, so both are of one snapshot."""
    if not args.model:
        raise ValueError("no model: name its folder or hub name first, or give existing outputs with --score")
    folder = resolve(args.model)
    return folder, Chat(folder, args.system_prompt)


def load_model(folder):
    device, bf16 = choose_device()  # weights stay fp32 on a CPU, so that figures do not depend on AMX
    return load_hf(folder, device, torch.bfloat16 if bf16 and device == "cuda" else torch.float32)


def heldout_examples(args, chat):
    """The examples that --data, --categories and --examples name; a category "a/b" is also one of "a". What
    cannot be answered right with the tokenizer of `chat` is dropped and counted."""
    examples = read_jsonl(args.data)
    names = [{example.source, example.source.split("/")[0]} for example in examples]
    chosen = set(choose_categories(sorted(set().union(*names)), args.categories))
    named = [example for example, own in zip(examples, names, strict=True) if own & chosen]
    examples = usable_examples("held-out", named, chat, math.inf, 1.0)
    if not examples:
        raise ValueError(f"{args.data}: no examples")
    return of_each(examples, args.examples, lambda example: example.source)


def evaluate_heldout(args):
    if args.score or args.export_official:
        raise ValueError("--score and --export_official are for the public benchmarks, not for heldout")
    if args.scheme not in SCHEMES:
        raise ValueError(f"unknown reward scheme {args.scheme!r}: choose one of {', '.join(SCHEMES)}")
    model_folder, chat = find_model(args)
    examples = heldout_examples(args, chat)
    folder, model = make_folder(results_folder(args)), load_model(model_folder)
    settings = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "scheme": args.scheme,
                "kernel": args.kernel}
    rows, replies = evaluate(model, chat, examples, progress="evaluation", **settings)
    table, temperature = accuracy_table({"accuracy": rows}), args.temperature or 1.0
    if args.samples:
        right = evaluate_samples(model, chat, examples, args.samples, temperature, progress="samples",
                                 **settings)
        replies = [reply | {"samples_right": k} for reply, k in zip(replies, right, strict=True)]
        shares = summarize_samples(replies, args.samples)
        rows = [row | share for row, share in zip(rows, shares, strict=True)]
        table = with_samples(table, shares, args.samples)
    warning = tables.common_reason({reply["id"]: (reply["right"], reply["error"]) for reply in replies})
    print("\n".join(filter(None, (table, warning))))
    of_samples = {"samples": args.samples, "temperature": temperature} if args.samples else {}
    write_json(folder / "scores.json", {"model": args.model, "data": args.data, "scheme": args.scheme,
                                        **of_samples, "rows": rows, "replies": replies})
    print(f"written: {folder / 'scores.json'}")


def evaluate_bench(args):
    if args.export_official and args.bench != "bfcl":
        raise ValueError("--export_official writes the result files of BFCL; use it with --bench bfcl")
    if args.score and args.model:
        raise ValueError("--score scores existing outputs; leave out the model")
    bench, folder = BENCHES[args.bench], results_folder(args)
    counts = bench.categories(args.data)
    chosen = choose_categories(counts, args.categories)
    skipped = [name for name in counts if name not in chosen]
    known = bench.load(args.data, chosen)
    entries = of_each(known, args.examples, lambda entry: entry.category)
    if args.score:
        lines = read_outputs(args.score, known, "calls", skipped)
        calls = {entry.id: lines[entry.id]["calls"] for entry in entries if entry.id in lines}
    else:
        calls = bench_calls(args, bench, known, entries, skipped, folder)
    name = args.score or args.model
    text, rows, verdicts = tables.report(args.bench, entries, calls, counts, chosen, Path(name).name)
    if args.export_official:
        outputs = {category: {entry.id: calls[entry.id] for entry in entries if entry.id in calls
                              and entry.category == category} for category in counts}
        paths = bfcl.export_official(outputs, args.export_official, chosen)
        print(f"written: {len(paths)} official result files")
    print(f"{text}\n")
    write_json(folder / "scores.json", {"model": name, "bench": args.bench, "data": args.data, "rows": rows,
                                        "verdicts": verdicts})
    print(f"written: {folder / 'scores.json'}")


def bench_calls(args, bench, known, entries, skipped, folder):
    """{id: calls} of the model's replies to `entries`. All that can be checked is, before the first reply."""
    model_folder, chat = find_model(args)
    prompts = {entry.id: chat.encode_prompt(Example(entry.id, entry.category,
               *bench.prompt(entry, args.paper_prompt), [])) for entry in entries}
    for each in (folder, args.export_official):
        if each:
            make_folder(each)
    file, settings = folder / "replies.jsonl", bench_settings(args, model_folder, chat)
    replies = read_replies(file, known, settings, prompts, skipped)
    replies = answer_entries(load_model(model_folder), chat, entries, prompts, replies, file, settings,
                             max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
                             kernel=args.kernel)
    return {id: bench.decode(reply) for id, reply in replies.items()}


def of_each(items, n, category):
    """At most n items of each category, evenly spaced; all if n is None."""
    groups = {}
    for item in items:
        groups.setdefault(category(item), []).append(item)
    return [item for group in groups.values() for item in evenly_spaced(group, n)]


if __name__ == "__main__":
    main()
