"""Ask a model: stream its reply to a query, print the tool calls in it. Started by `python sample.py`."""

import argparse
import json
import sys

import torch

from converters.schemas import bare_tools
from data import Chat, Example
from model import load_hf
from reward import parse_reply
from runtime.files import parse_json, read_text, tolerant_output
from runtime.sharding import choose_device, set_threads
from sample import generate, prompt_seeds


def main(argv=None):
    parser = argparse.ArgumentParser(description="Ask a model: streams its reply, prints the tool calls.")
    parser.add_argument("model", help="folder in the Hugging Face layout, or a hub name")
    parser.add_argument("query", help="what the user says")
    parser.add_argument("--tools", required=True, help="JSON file: tool schemas, in any form of the APIs")
    parser.add_argument("--system_prompt", help="text file with {tools}; default: the model's own, from its "
                        "folder, or else the project's")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernel", default="auto", help="auto, reference (plain PyTorch) or fast")
    args = parser.parse_args(argv)
    tolerant_output()
    try:
        if not -2**63 <= args.seed < 2**63:
            raise ValueError(f"--seed is {args.seed}; it must be a signed 64-bit number")
        if args.query.encode(errors="replace").decode() != args.query:
            raise ValueError("the query holds bytes that are no text in the encoding of this terminal")
        tools = read_tools(args.tools)
        chat = Chat(args.model, args.system_prompt)
        set_threads()
        device, bf16 = choose_device()
        dtype = torch.bfloat16 if bf16 and device == "cuda" else torch.float32
        model = load_hf(args.model, device, dtype)
        example = Example("query", "query", tools, [{"role": "user", "content": args.query}], [])
        rollout, = generate(model, [chat.encode_prompt(example)], 1, max_new_tokens=args.max_new_tokens,
                            temperature=args.temperature, stop_ids=chat.stop_ids, top_p=args.top_p,
                            vocab_size=chat.vocab_size, seeds_P=prompt_seeds(args.seed, 0, 0, 1),
                            kernel=args.kernel, on_token=printer(chat))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("" if rollout.finished else f"\n(cut off after {args.max_new_tokens} tokens)")
    calls, error = parse_reply(chat.decode_reply(rollout.ids))
    if calls is None:
        print(f"no calls: {error}")
    for call in calls or []:
        print(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})")


def printer(chat):
    """on_token(i, id) that prints the text of a reply as it grows, without the stop id."""
    ids, printed = [], ""

    def print_new_text(_, token):
        nonlocal printed
        ids.append(token)
        text = chat.decode([i for i in ids if i not in chat.stop_ids])
        # An incomplete character decodes to U+FFFD: wait for the rest of it.
        if not text.endswith("\ufffd"):
            print(text[len(printed):], end="", flush=True)
            printed = text

    return print_new_text


def read_tools(path):
    """The bare tool schemas in a JSON file, which may have any form of `bare_tools`. ValueError otherwise."""
    value = parse_json(read_text(path), path)
    try:
        return bare_tools(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected a JSON list of tool schemas") from None
