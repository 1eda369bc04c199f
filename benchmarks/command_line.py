"""The command line of eval.py: its arguments, the folder of results, and a whole public benchmark.

In:  the words of a command line. Out: its arguments, checked; a table on stdout and scores.json. Nothing
     needs torch: a model's calls come from a function of eval.py.
"""

import argparse
import math
import os
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from benchmarks import bfcl, choose_categories, of_each
from benchmarks.tables import BENCHES, accuracy_table, common_reason, read_outputs, report, with_samples
from reward import SCHEMES
from runtime.files import tolerant_output, write_json


def run(argv, kernels, heldout_replies, model_calls):
    """Evaluate as the words of a command line say, None for those of the process. Exit status 2 and one line
    on stderr after an error of the input.

    kernels: the choices of --kernel; heldout_replies, model_calls: see `evaluate_heldout`, `evaluate_bench`.
    """
    args = parse_arguments(argv, kernels)
    tolerant_output()
    try:
        check_arguments(args)
        if args.bench == "heldout":
            evaluate_heldout(args, heldout_replies)
        else:
            evaluate_bench(args, model_calls)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(argv, kernels):
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
    parser.add_argument("--kernel", default="auto", choices=kernels, help="of decoding (default: auto)")
    return parser.parse_args(argv)


def check_arguments(args):
    """ValueError for a number that cannot work, and for arguments that do not go together."""
    for name in ("examples", "samples", "max_new_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if (args.samples or args.temperature is not None) and args.bench in BENCHES:
        raise ValueError("--samples and --temperature are for heldout; the public benchmarks are greedy")
    if args.temperature is not None and not (args.samples and 0 < args.temperature < math.inf):
        raise ValueError(f"--temperature {args.temperature}: give it with --samples, as a number above 0")
    if args.bench == "heldout" and (args.score or args.export_official):
        raise ValueError("--score and --export_official are for the public benchmarks, not for heldout")
    if args.bench == "heldout" and args.scheme not in SCHEMES:
        raise ValueError(f"unknown reward scheme {args.scheme!r}: choose one of {', '.join(SCHEMES)}")
    if args.export_official and args.bench != "bfcl":
        raise ValueError("--export_official writes the result files of BFCL; use it with --bench bfcl")
    if args.score and args.model:
        raise ValueError("--score scores existing outputs; leave out the model")


def results_folder(args):
    """--out, or a folder named after the benchmark in that of the model, or here."""
    return args.out or Path(args.model if os.path.isdir(args.model or "") else ".") / args.bench


def make_folder(folder):
    """Make a folder of results and try it, so that no error of it comes after hours of replies."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder


def evaluate_heldout(args, heldout_replies):
    """Print and write the scores of held-out examples.

    heldout_replies(args, folder): rows of a table and replies, as eval.summarize and eval.evaluate return
    them; folder: of the results.
    """
    folder = results_folder(args)
    rows, replies = heldout_replies(args, folder)
    table, of_samples = accuracy_table({"accuracy": rows}), {}
    if args.samples:
        table = with_samples(table, rows, args.samples)
        of_samples = {"samples": args.samples, "temperature": args.temperature or 1.0}
    warning = common_reason({reply["id"]: (reply["right"], reply["error"]) for reply in replies})
    print("\n".join(filter(None, (table, warning))))
    write_json(folder / "scores.json", {"model": args.model, "data": args.data, "scheme": args.scheme,
                                        **of_samples, "rows": rows, "replies": replies})
    print(f"written: {folder / 'scores.json'}")


def bench_settings(args, identity, prompt):
    """What the replies to a benchmark depend on, besides the prompts. Names are for people to read; the
    digests say what they hold, and only these are compared.

    identity: digests of the model's files; prompt: a prompt with the system prompt in it.
    """
    return {"model": args.model, "data": args.data, "system_prompt": args.system_prompt, "bench": args.bench,
            "paper_prompt": args.paper_prompt, "max_new_tokens": args.max_new_tokens, **identity,
            "system_prompt_text": sha256(prompt.encode()).hexdigest()}


def evaluate_bench(args, model_calls):
    """Score the outputs that --score names, or a model, on a public benchmark; print and write the scores.

    model_calls(args, bench, known, entries, skipped, folder): {id: calls} of the model. known: all entries of
    the chosen categories; entries: those of them to answer; skipped: the categories that were not chosen;
    folder: of the results.
    """
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
        calls = model_calls(args, bench, known, entries, skipped, folder)
    name = args.score or args.model
    text, rows, verdicts = report(args.bench, entries, calls, counts, chosen, Path(name).name)
    if args.export_official:
        outputs = {category: {entry.id: calls[entry.id] for entry in entries if entry.id in calls
                              and entry.category == category} for category in counts}
        paths = bfcl.export_official(outputs, args.export_official, chosen)
        print(f"written: {len(paths)} official result files")
    print(f"{text}\n")
    write_json(folder / "scores.json", {"model": name, "bench": args.bench, "data": args.data, "rows": rows,
                                        "verdicts": verdicts})
    print(f"written: {folder / 'scores.json'}")
