r"""Training examples: reading and converting them, augmenting them, encoding them as chat, ordering them.

In:  our own jsonl, or published files through converters/ (xLAM, ToolACE, chat messages).
Out: `Example`s. `Chat` encodes an example as token ids, `Batches` yields batches of examples.

An example is one decision of the model: an assistant turn that makes calls, or should make none. The turns
before it are the context, with earlier calls as `<tool_call>[{"name": …, "arguments": {…}}]</tool_call>`. It
is dropped if its answer, in the reply format, does not score 1. docs/chat_formats.md has the chat formats.

Differences from the paper's code (arXiv 2505.00024): roles are mapped, so raw ToolACE yields its calls; calls
are parsed and not cut at the first ")"; earlier calls are JSON that is encoded once; the split has a seed;
dropped examples are counted by reason; prompts are never truncated; assets/system_prompt.txt is our own.
"""

import argparse
import contextlib
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer

from converters import messages as chat_messages
from converters import toolace, xlam
from converters.nulls import undo_nulls
from converters.schemas import bare_tools, contradictions_of, rename_parameters
from reward import CALL, CHAT_FORMATS, END_THINK, format_calls, format_reply, score
from runtime.files import atomically, parse_json, read_text, tolerant_output, write_text
from runtime.records import convert_records, print_report, print_shortfall, read_records

ASSETS = Path(__file__).parent / "assets"
MAX_OVERLAP = 0.01  # of held-out examples whose conversation is in the training file too


@dataclass(frozen=True)
class Example:
    """One decision of the model, and the right one."""

    id: str
    source: str  # the category under which statistics count it
    tools: list[dict]  # schemas of the offered tools, as the data has them
    messages: list[dict]  # {"role": user|assistant|tool|system, "content"}, without the list of tools
    answer: list[dict]  # the right calls, {"name", "arguments"}; [] if no tool fits
    reasoning: str | None = None  # the <think> text of a supervised reply


# ---- files
def read_jsonl(path):
    """Read examples, one JSON object a line: fields of Example, `tools` in any form of converters/schemas.py.
    ValueError, with file and line, if the file cannot be read or a line is not a valid example."""
    examples = []
    for place, record in read_records(path):
        try:
            example = Example(**record)
            examples.append(replace(example, tools=bare_tools(example.tools, may_be_empty=True)))
            problem = _problem(examples[-1])
        except TypeError as error:
            problem = f"{error} (the keys are {', '.join(Example.__annotations__)})"
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ValueError(f"{place}: {problem}; correct or remove this line")
    return examples


def write_jsonl(path, examples):
    """Write examples, one a line. An existing file is unchanged after an error. ValueError for I/O."""
    # atomically() would create the folder, and a misspelt one must not appear silently.
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: cannot be written (No such file or directory)")
    with atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(example), ensure_ascii=False) + "\n" for example in examples)


def _read_raw(form, path, strict_schema=False):
    """Convert a file whose form is a key of CONVERTERS, which describe it -> (examples, report).

    report: {"raw": number of records, "without_calls": number of records that gave neither an example nor a
    drop, "kept": number of examples, "dropped": {reason: count}, "dropped_ids": {reason: ids}, "nulls":
    number that undo_nulls took out, "text_left_out": number of call turns that lost text, "contradictions":
    [(id, {reason: detail})…] of answers that their tools forbid; strict_schema drops them}.
    ValueError if the file cannot be read or a record lacks a column."""
    made, report = convert_records(path, form, CONVERTERS[form], lambda fields: _problem(Example(**fields)))
    made, nulls = undo_nulls(made)
    found = [contradictions_of(fields["tools"], fields["answer"]) for fields in made]
    contradictory = [(fields["id"], reasons) for fields, reasons in zip(made, found, strict=True) if reasons]
    if strict_schema and contradictory:
        report["dropped_ids"]["answer contradicts the schema of its tool"] = [id for id, _ in contradictory]
        made = [fields for fields, reasons in zip(made, found, strict=True) if not reasons]
    counts = {reason: len(ids) for reason, ids in report["dropped_ids"].items()}
    return [Example(**fields) for fields in made], {
        **report, "kept": len(made), "dropped": counts, "contradictions": contradictory, "nulls": nulls}


CONVERTERS = {"toolace": toolace, "xlam": xlam, "chat": chat_messages}
read_toolace, read_xlam, read_chat = (partial(_read_raw, form) for form in CONVERTERS)


def _problem(example):
    """Why this example cannot be used for training, or None."""
    for key, kinds in {"id": str, "source": str, "reasoning": str | None}.items():
        if not isinstance(value := getattr(example, key), kinds):
            return f"{key} is of type {type(value).__name__}, not a text"

    def lacks(value, *keys):
        return not isinstance(value, list) or not all(
            isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys) for item in value)

    if lacks(example.tools, "name"):
        return "tools are not a list of objects with a name"
    if not example.messages or lacks(example.messages, "role", "content") or not {
            message["role"] for message in example.messages} <= {"user", "assistant", "tool", "system"}:
        return "messages are not a list of {role, content} with known roles and text, at least one"
    if any(message.get("tool_calls") for message in example.messages):
        return "a message holds tool_calls, which would be lost; `data.py convert chat` reads them"
    try:
        json.dumps(vars(example), ensure_ascii=False, allow_nan=False).encode()
        verdict = score(format_reply(example.answer, example.reasoning or ""), example.answer)
    except (ValueError, RecursionError) as error:
        return f"holds what cannot be written or answered: {error}"
    if verdict.reward < 1:
        return f"answer cannot score 1: {verdict.error}"
    names = {tool["name"] for tool in example.tools}
    return None if names >= {c["name"] for c in example.answer} else "call of a tool that is not offered"


# ---- augmenting, after Hammer (arXiv 2410.04587)
def make_irrelevant(examples, share, seed):
    """Remove the right tools from a share (0 to 1) of the examples, so that their answer becomes [].
    `seed` selects them from the examples that offer another tool and whose earlier turns call none of the
    right ones. "_irrelevant" is appended to their source, "/irrelevant" to their id."""
    result, wanted = list(examples), round(share * len(examples))
    for i in _permutation(len(examples), f"irrelevant/{seed}"):
        right = {call["name"] for call in examples[i].answer}
        others = [tool for tool in examples[i].tools if tool["name"] not in right]
        history = (call["name"] for message in examples[i].messages
                   for call in chat_messages.earlier_calls(message))
        if wanted and right and others and right.isdisjoint(history):
            wanted -= 1
            result[i] = replace(examples[i], id=f"{examples[i].id}/irrelevant", tools=others, answer=[],
                                source=f"{examples[i].source}_irrelevant", reasoning=None)
    return result


def mask_names(examples, share, seed):
    """Rename functions and parameters to random strings in a share (0 to 1) of the examples.

    Schemas, answers, earlier calls and the names in tool results are renamed together; descriptions and user
    text are not changed. Text defaults are replaced too, except where a call sets the parameter: the value
    may have been copied from the default. "/masked" is appended to the id. An example stays as it is if the
    parameters of one of its tools are no object: then their names are unknown.
    """
    result = list(examples)
    for i in _permutation(len(examples), f"mask/{seed}")[: round(share * len(examples))]:
        with contextlib.suppress(ValueError):  # raised by rename_parameters
            result[i] = _masked(examples[i], random.Random(f"mask/{seed}/{i}"))
    return result


def _masked(example, rng):
    earlier = [chat_messages.earlier_calls(message) for message in example.messages]
    used = {(call["name"], key) for call in sum(earlier, example.answer) for key in call["arguments"]}
    new = {}  # (function,), (function, parameter) or (function, parameter, "default") to its random string

    def rename(*key):
        letters = rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN0123456789", k=rng.randrange(6, 13))
        return new.setdefault(key, "".join(letters))

    def mask_tool(tool):
        def mask(key, value):
            default = value.get("default") if isinstance(value, dict) else None
            if isinstance(default, str) and default and (tool["name"], key) not in used:
                value = {**value, "default": rename(tool["name"], key, "default")}
            return rename(tool["name"], key), value

        return {**rename_parameters(tool, mask), "name": rename(tool["name"])}

    def mask_calls(calls):
        pairs = ((call["name"], call["arguments"].items()) for call in calls)
        return [{"name": new.get((name,), name), "arguments": {new.get((name, key), key): value
                for key, value in items}} for name, items in pairs]

    tools, messages = [mask_tool(tool) for tool in example.tools], []
    for message, calls in zip(example.messages, earlier, strict=True):
        content = format_calls(mask_calls(calls)) if calls else message["content"]
        for tool, masked in zip(example.tools, tools, strict=True) if message["role"] == "tool" else ():
            content = content.replace(f'"name": {json.dumps(tool["name"])}', f'"name": "{masked["name"]}"')
        messages.append({**message, "content": content})
    return replace(example, id=f"{example.id}/masked", tools=tools, messages=messages, reasoning=None,
                   answer=mask_calls(example.answer))


# ---- text and ids
class Chat:
    """A tokenizer and a chat format.

    path: a hub name, or a folder with tokenizer.json. The other FILES are optional; they name stop tokens.
    system_prompt: a text file that contains {tools} once; None: system_prompt.txt of the folder or of assets.
    chat_format: chatml, llama3, or auto: by the tokenizer's tokens, then the folder's template, or chatml.
    stop_ids: the token that ends a chat turn, and every end-of-sequence token that the files name.
    vocab_size: number of ids that have a token. A model may have more rows; these must never be sampled.
    ValueError if a file is missing or unusable, or the tokenizer lacks a token of the chat format.
    """

    # The system text of a chat without one is that in the folder's own template, or this without a template.
    DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    _SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\+n)([^<>{}#'\"\\]+)<\|im_end\|>")
    FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    PROMPT, TEMPLATE = "system_prompt.txt", "chat_template.jinja"

    def __init__(self, path, system_prompt=None, chat_format="auto"):
        # Imported here because it loads torch, which `data.py convert` does not need.
        from runtime.tensors import resolve

        folder = resolve(path, (*self.FILES, self.PROMPT, self.TEMPLATE))
        tokenizer, named, *configs = (parse_json(read_text(folder / name), folder / name)
                                      if (folder / name).exists() else {} for name in self.FILES)
        if not tokenizer:
            raise ValueError(f"{folder}: no tokenizer.json; copy the model's into this folder")
        self.tokenizer = Tokenizer.from_str(json.dumps(tokenizer))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

        own = folder / self.TEMPLATE
        template = read_text(own) if own.exists() else str(named.get("chat_template") or "")
        self.format = self._choose_format(folder, template, chat_format)
        self.default_system = [*self._SYSTEM.findall(template), "" if template else self.DEFAULT_SYSTEM][0]
        self.cuts_reasoning = self.tokenizer.token_to_id(END_THINK) is not None  # as Qwen3's template does

        eos = named.get("eos_token") or ""
        ends = (CHAT_FORMATS[self.format][-1], eos["content"] if isinstance(eos, dict) else eos)
        self._end_of_turn, *stops = map(self.tokenizer.token_to_id, ends)
        for ids in (config.get("eos_token_id") for config in configs):
            stops += ids if isinstance(ids, list) else [ids]
        self.stop_ids = frozenset([self._end_of_turn, *stops]) - {None}

        file = system_prompt or (folder if (folder / self.PROMPT).exists() else ASSETS) / self.PROMPT
        self.prompt = read_text(file)
        if self.prompt.count("{tools}") != 1:
            raise ValueError(f"{file}: {self.prompt.count('{tools}')} times {{tools}}, not 1")

    def _choose_format(self, folder, template, asked):
        lacks = {name: [token for token in tokens if self.tokenizer.token_to_id(token) is None]
                 for name, tokens in CHAT_FORMATS.items() if asked in ("auto", name)}
        for name in sorted(lacks, key=lambda name: CHAT_FORMATS[name][-1] not in template):
            if not lacks[name]:
                return name
        needs = ", and ".join(f"{name} needs {' and '.join(lacks[name])}" for name in lacks)
        raise ValueError(f"{folder}: the chat format {needs}, which its tokenizer lacks; add them to it, or "
                         "choose another format or model")

    def save(self, folder):
        """Write the prompt into a checkpoint: system_prompt.txt, which Chat reads, and chat_template.jinja,
        with which `apply_chat_template` of transformers equals `encode_prompt`."""
        write_text(Path(folder, self.PROMPT), self.prompt)
        # Jinja reads the escapes of JSON, but not those of surrogate pairs.
        texts = json.dumps(self.prompt.split("{tools}"), ensure_ascii=False)
        template = read_text(ASSETS / f"{self.format}.jinja").replace("DEFAULT_SYSTEM", self.default_system)
        template = template.replace("CUTS_REASONING", json.dumps(self.cuts_reasoning))
        write_text(Path(folder, self.TEMPLATE), template.replace("PROMPT_TEXTS", texts))

    def render(self, messages, add_generation_prompt):
        """The text of a conversation [{"role", "content"}…], as the family's own chat template has it."""
        if self.format == "llama3":
            begin, header, end_header, end = CHAT_FORMATS["llama3"]
            turns = [("ipython", message["content"]) if message["role"] == "tool" else
                     (message["role"], message["content"].strip()) for message in messages]
            text = "".join(f"{header}{role}{end_header}\n\n{content}{end}" for role, content in turns)
            return f"{begin}{text}" + (f"{header}assistant{end_header}\n\n" if add_generation_prompt else "")
        start, end = CHAT_FORMATS["chatml"]
        if messages[0]["role"] != "system" and self.default_system:
            messages = [{"role": "system", "content": self.default_system}, *messages]
        text = ""
        for role, run in groupby(messages, key=lambda message: message["role"]):
            parts = [message["content"] for message in run]
            if role == "tool":
                role, parts = "user", ["\n".join(f"<tool_response>\n{p}\n</tool_response>" for p in parts)]
            elif role == "assistant" and self.cuts_reasoning:
                parts = [re.sub(f"(?s)^(?!{CALL}).*{END_THINK}\n*", "", part) for part in parts]
            text += "".join(f"{start}{role}\n{part}{end}\n" for part in parts)
        return text + (f"{start}assistant\n" if add_generation_prompt else "")

    def encode(self, text):
        """Ids of a text. A marker in it, such as <|im_end|>, becomes its special token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, example):
        """Ids of the prompt: system prompt with tools, conversation, start of the reply. Never truncated."""
        wrapped = ({"type": "function", "function": tool} for tool in example.tools)
        tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in wrapped)
        system, messages = self.prompt.replace("{tools}", tools), example.messages
        if messages[0]["role"] == "system":
            system, messages = f"{system}\n\n{messages[0]['content']}", messages[1:]
        return self.encode(self.render([{"role": "system", "content": system}, *messages], True))

    def encode_reply(self, example):
        """Ids of the right reply: reasoning (empty if None), calls, stop token."""
        return [*self.encode(format_reply(example.answer, example.reasoning or "")), self._end_of_turn]

    def decode(self, ids):
        """The text of ids, with special tokens. Ids without a token are skipped."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decode_reply(self, ids):
        """The text of a rollout, as it is judged: without the stop id that ended it, whichever it is."""
        return self.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)


# ---- order
@lru_cache(maxsize=2)
def _permutation(n, key):
    order = list(range(n))
    random.Random(key).shuffle(order)
    return tuple(order)


def conversations(examples):
    """A key an example, equal for turns of one conversation, for equal examples, and for what make_irrelevant
    and mask_names make of them: the texts of user and system, which neither changes, and of these the
    shortest beginning that is all of them in some example."""
    texts = [tuple(message["content"] for message in example.messages
                   if message["role"] in ("user", "system")) for example in examples]
    whole = set(texts)
    return [next((own[:end] for end in range(1, len(own)) if own[:end] in whole), own) for own in texts]


def split_examples(examples, fraction, seed):
    """(training, held-out): `seed` selects the fraction (0 to 1) that is held out, or the nearest size that
    leaves `conversations` whole. Both keep their order."""
    groups, others, held = {}, [], set()
    for i, key in enumerate(conversations(examples)):
        groups.setdefault(key, []).append(i)
    groups, wanted = list(groups.values()), round(fraction * len(examples))
    for g in _permutation(len(groups), f"split/{seed}"):
        (held.update if len(held) + len(groups[g]) <= wanted else others.append)(groups[g])
    smallest = min(others, key=len, default=[])
    if len(smallest) <= 2 * (wanted - len(held)):
        held.update(smallest)
    return [examples[i] for i in range(len(examples)) if i not in held], [examples[i] for i in sorted(held)]


def usable_examples(name, examples, chat, max_prompt_tokens, max_dropped_share):
    """Those whose prompt has at most max_prompt_tokens, because a truncated one would lack tools, and whose
    right reply scores 1 after the tokenizer, which may change text. The number of others is printed.
    ValueError if more than a share (0 to 1) would be dropped for one reason. name: of the examples."""
    for what, fault, remedy, usable in (
            ("prompts", f"are longer than {max_prompt_tokens} tokens", "raise one of both",
             lambda e: len(chat.encode_prompt(e)) <= max_prompt_tokens),
            ("answers", "cannot score 1, because the tokenizer changes their text",
             "write them in its normal form (NFC) or raise data.max_dropped_share",
             lambda e: score(chat.decode_reply(chat.encode_reply(e)), e.answer).reward == 1)):
        kept = [example for example in examples if usable(example)]
        dropped = len(examples) - len(kept)
        if dropped > max_dropped_share * len(examples):
            raise ValueError(f"{dropped} of {len(examples)} {what} ({dropped / len(examples):.1%}) {fault}, "
                             f"but only {max_dropped_share:.1%} may be dropped; {remedy}")
        if dropped:
            print(f"dropped {dropped} {name} examples: {what} that {fault}")
        examples = kept
    return examples


def read_examples(path, heldout_path, heldout_fraction, seed, chat, max_prompt_tokens, max_dropped_share):
    """(training examples, held-out examples) of two jsonl files, or of one that is split by `seed`.
    What cannot be used is dropped, and its number printed. ValueError if no example is left, or if more than
    MAX_OVERLAP of the held-out examples are of a conversation in the training file; fewer are printed."""
    training = read_jsonl(path)
    if heldout_path is None:
        training, heldout = split_examples(training, heldout_fraction, seed)
    else:
        heldout = read_jsonl(heldout_path)
        keys = conversations([*training, *heldout])
        seen, keys = set(keys[:len(training)]), keys[len(training):]
        overlap = sum(key in seen for key in keys)
        found = f"{heldout_path}: {overlap} of {len(heldout)} examples are of a conversation in {path}"
        if overlap > MAX_OVERLAP * len(heldout):
            raise ValueError(f"{found}, and at most {MAX_OVERLAP:.0%} may be; remove them from one of both, "
                             "or leave out data.heldout")
        if overlap:
            print(f"warning: {found}")
    sides = {"training": training, "held-out": heldout}
    for name, examples in sides.items():
        sides[name] = usable_examples(name, examples, chat, max_prompt_tokens, max_dropped_share)
        if not sides[name]:
            raise ValueError(f"{path if name == 'training' else heldout_path or path}: no {name} examples")
    return list(sides.values())


class Batches(Iterator):
    """An endless iterator over batches of `size` examples, in a new order each epoch.

    The k-th example is a function of (seed, k) only. ValueError if size is larger than the data.
    cursor: examples yielded so far, where a new object with it resumes; epoch: the cursor in passes over the
    data; fingerprint: hex digest of the examples in their order; a run resumes only on equal ones.
    """

    def __init__(self, examples, size, seed, cursor=0):
        if not 1 <= size <= len(examples):
            raise ValueError(f"batches of {size} from {len(examples)} examples; choose a size from 1 to that")
        self.examples, self.size, self.seed, self.cursor = examples, size, seed, cursor

    def __next__(self):
        n, numbers = len(self.examples), range(self.cursor, self.cursor + self.size)
        self.cursor += self.size
        return [self.examples[_permutation(n, f"batches/{self.seed}/{k // n}")[k % n]] for k in numbers]

    @property
    def epoch(self):
        return self.cursor / len(self.examples)

    @cached_property
    def fingerprint(self):
        return hashlib.sha256("\n".join(json.dumps(vars(e)) for e in self.examples).encode()).hexdigest()


# ---- command line
def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Make training files, one example a line.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="convert a published set, counting what is dropped and why")
    convert.add_argument("format", choices=CONVERTERS)
    convert.add_argument("raw", help=".json (one list) or .jsonl, or one of them as .gz")
    convert.add_argument("--irrelevant", type=float, default=0, metavar="SHARE", help="as in the paper: 0.15")
    convert.add_argument("--mask", type=float, default=0, metavar="SHARE", help="as in the paper: 0.67")
    convert.add_argument("--strict_schema", action="store_true", help="drop answers against their schema")
    convert.add_argument("out", help="the .jsonl file to write")
    convert.add_argument("--seed", type=int, default=0)
    tolerant_output()
    args = parser.parse_args(argv)
    try:
        for share in (args.irrelevant, args.mask):
            if not 0 <= share <= 1:
                raise ValueError(f"{share}: --irrelevant and --mask are shares between 0 and 1")
        examples, report = _read_raw(args.format, args.raw, args.strict_schema)
        print_report(report)
        if not examples:
            raise ValueError(f"{args.raw}: no example in it can be used; is it a {args.format} file?")
        made = make_irrelevant(examples, args.irrelevant, args.seed)
        print_shortfall(args.irrelevant, made, "irrelevant",
                        "no other tool, or the history calls the right one")
        made = mask_names(made, args.mask, args.seed)
        print_shortfall(args.mask, made, "masked", "the parameters of a tool are no object")
        write_and_count(args.out, made)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_and_count(path, examples):
    """Write examples to a jsonl file and print how many of each source it holds."""
    write_jsonl(path, examples)
    for source, count in sorted(Counter(example.source for example in examples).items()):
        print(f"{count:8d} {source}")
    print(f"{len(examples):8d} written to {path}")


if __name__ == "__main__":
    sys.exit(main())
