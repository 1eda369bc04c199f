"""Evaluation: held-out examples, BFCL, API-Bank and ACEBench, each in one table and one JSON file.

In:  a model and the data of a benchmark, or only existing outputs, {"id", "category", "calls"} a line.
Out: accuracies by category with the benchmark's own averages, the paper's rows below them, scores.json.

Replies are greedy. Held-out examples are scored by the reward of training, with Wilson's 95 % confidence
interval. With --samples K they also get K sampled replies each: their mean accuracy, the share of examples
with a right one (pass@K), and the share with right and wrong ones (mixed), from which GRPO can learn.

The public benchmarks are scored as their official scorers do, by the rules in the modules of benchmarks/. An
interrupted evaluation resumes (benchmarks/replies.py). Missing replies are reported and count as wrong.

Axes: P prompts.
"""

import math

import torch

from benchmarks import choose_categories, command_line, of_each
from benchmarks import evenly_spaced as evenly_spaced
from benchmarks.acebench import check_acebench as check_acebench
from benchmarks.api_bank import check_api_bank as check_api_bank
from benchmarks.bfcl import check_bfcl as check_bfcl
from benchmarks.replies import answer_entries, read_replies
from benchmarks.tables import accuracy_table as accuracy_table
from benchmarks.tables import by_category as by_category
from benchmarks.tables import print_evaluation as print_evaluation
from benchmarks.tables import summarize, summarize_samples
from benchmarks.tables import wilson as wilson
from data import Chat, Example, read_jsonl, usable_examples
from model import load_hf
from reward import judge
from runtime.kernel import KERNELS
from runtime.sharding import choose_device, set_threads
from runtime.tensors import identity, resolve
from sample import generate, prompt_seeds


# ---- held-out examples
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
    """How many of n sampled replies to each example are right: a list of integers from 0 to n. temperature:
    above 0; settings: those of `generate`. Seeds depend on the place in `examples` only, so equal lists get
    the same replies, up to rounding."""
    prompts = [chat.encode_prompt(example) for example in examples]
    rollouts = generate_replies(model, chat, prompts, n, temperature, **settings)
    right = [judge(examples[i // n], chat.decode_reply(rollout.ids), scheme).reward == 1
             for i, rollout in enumerate(rollouts)]
    return [sum(right[i * n:(i + 1) * n]) for i in range(len(examples))]


# ---- command line
def main(argv=None):
    command_line.run(argv, KERNELS, heldout_replies, bench_calls)


def find_model(args):
    """(folder of the model, its Chat); a hub name is looked up once, so both are of one snapshot."""
    if not args.model:
        raise ValueError("no model: name its folder or hub name first, or give existing outputs with --score")
    folder = resolve(args.model)
    return folder, Chat(folder, args.system_prompt)


def load_model(folder):
    set_threads()
    device, bf16 = choose_device()  # weights stay fp32 on a CPU, so that every CPU gives the same figures
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


def heldout_replies(args, folder):
    """(rows, replies) of `evaluate` as the arguments say, with --samples also those of the samples. `folder`,
    of the results, is made before the first reply."""
    model_folder, chat = find_model(args)
    examples = heldout_examples(args, chat)
    command_line.make_folder(folder)
    model = load_model(model_folder)
    settings = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "scheme": args.scheme,
                "kernel": args.kernel}
    rows, replies = evaluate(model, chat, examples, progress="evaluation", **settings)
    if args.samples:
        right = evaluate_samples(model, chat, examples, args.samples, args.temperature or 1.0,
                                 progress="samples", **settings)
        replies = [reply | {"samples_right": k} for reply, k in zip(replies, right, strict=True)]
        shares = summarize_samples(replies, args.samples)
        rows = [row | share for row, share in zip(rows, shares, strict=True)]
    return rows, replies


def bench_calls(args, bench, known, entries, skipped, folder):
    """{id: calls} of the model's replies to `entries`. All that can be checked is, before the first reply."""
    model_folder, chat = find_model(args)
    prompts = {entry.id: chat.encode_prompt(Example(entry.id, entry.category,
               *bench.prompt(entry, args.paper_prompt), [])) for entry in entries}
    for each in filter(None, (folder, args.export_official)):
        command_line.make_folder(each)
    some_prompt = chat.encode_prompt(Example("", "", [{"name": "f"}], [{"role": "user", "content": "q"}], []))
    settings = command_line.bench_settings(args, identity(model_folder), chat.decode(some_prompt))
    file = folder / "replies.jsonl"
    replies = read_replies(file, known, settings, prompts, skipped)
    model = load_model(model_folder)

    def answer(prompts):
        rollouts = generate_replies(model, chat, prompts, max_new_tokens=args.max_new_tokens,
                                    batch_size=args.batch_size, kernel=args.kernel, progress="replies")
        return [chat.decode(rollout.ids) for rollout in rollouts]

    replies = answer_entries(answer, entries, prompts, replies, file, settings, batch_size=args.batch_size,
                             room=model.config.max_position_embeddings - args.max_new_tokens)
    return {id: bench.decode(reply) for id, reply in replies.items()}


if __name__ == "__main__":
    main()
