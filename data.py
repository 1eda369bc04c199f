r"""Examples: where they come from, how they are written for the model, the order in which they are seen.

In:  ToolACE and xLAM files as published, our own jsonl, or the procedural set `synthetic`.
Out: `Example`s; `Chat` turns one into ids; `Batches` deals them out.

One step of learning is one decision: each call turn of a conversation is an example, what came before is its
context, with earlier call turns as `<tool_call>[{"name": …, "arguments": {…}}]</tool_call>`. An answer that
would not score 1 when written in the reply format never becomes an example. The chat format is Qwen2.5's:

    <|im_start|>ROLE\nCONTENT<|im_end|>\n                       the model goes on from <|im_start|>assistant\n
    <|im_start|>user\n<tool_response>\nCONTENT\n</tool_response><|im_end|>\n  a run of results is one block

Where we differ from the paper's code (arXiv 2505.00024): roles are mapped, so raw ToolACE yields its calls;
these are parsed, not cut at the first ")"; earlier calls are JSON, once encoded; the split has a seed; drops
are counted by reason; no prompt is truncated; the system prompt is our own, assets/system_prompt.txt.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer

from reward import CALL, END_CALL, format_calls, format_reply, score

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Example:
    """One decision. `source` is the category it is counted under, `tools` schemas as they stand in the data,
    `messages` {"role": user|assistant|tool|system, "content"} less the system prompt that lists the tools,
    `answer` the right calls ([]: no tool fits), `reasoning` what a supervised reply thinks first."""

    id: str
    source: str
    tools: list[dict]
    messages: list[dict]
    answer: list[dict]
    reasoning: str | None = None


# ---- files
def read_jsonl(path):
    """Our own format -> examples. ValueError, naming file and line, for a line that is not a good example."""
    examples = []
    for place, record in _records(path):
        try:
            examples.append(Example(**record))
            problem = _problem(examples[-1])
        except TypeError as error:
            problem = f"{error} (the keys are {', '.join(Example.__annotations__)})"
        if problem:
            raise ValueError(f"{place}: {problem}; correct or remove this line")
    return examples


def write_jsonl(path, examples):
    """Write examples, one a line, whole or not at all: written aside, then renamed."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(example), ensure_ascii=False) + "\n" for example in examples)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_xlam(path):
    """xlam-function-calling-60k: columns id, query, tools, answers, the last two as JSON in a string.
    -> (examples, report), report {"raw": records, "without_calls": records, "kept": examples,
    "dropped_ids": {reason: ids}, "dropped": {reason: count}}. ValueError where a record lacks a column."""
    return _read_raw(path, "xlam", ("query", "tools", "answers"), _xlam_outcomes)


def read_toolace(path):
    """ToolACE: {"system", "conversations": [{"from", "value"}…]}, tools in the system text -> as read_xlam.
    Each call turn `[Name(arg=value, …), …]` is an example or is dropped under a reason; the turns after a
    dropped one still count. A record whose tools, or a turn's role, cannot be read is dropped whole."""
    return _read_raw(path, "toolace", ("system", "conversations"), _toolace_outcomes)


def _read_raw(path, prefix, columns, outcomes_of):
    """Apply outcomes_of(id, record) -> [(id, example or reason why there is none)…] to every record."""
    kept, dropped, without_calls, records = [], {}, 0, _records(path)
    for number, (place, record) in enumerate(records):
        missing = [column for column in columns if column not in record]
        if missing:
            raise ValueError(f"{place}: no {', '.join(missing)}, only {', '.join(record)}; another format?")
        outcomes = outcomes_of(f"{prefix}/{record.get('id', number)}", record)
        without_calls += not outcomes
        for id, outcome in outcomes:
            if isinstance(outcome, Example):
                kept.append(outcome)
            else:
                dropped.setdefault(outcome, []).append(id)
    counts = {reason: len(ids) for reason, ids in dropped.items()}
    return kept, {"raw": len(records), "without_calls": without_calls, "kept": len(kept), "dropped": counts,
                  "dropped_ids": dropped}


def _xlam_outcomes(id, record):
    try:
        tools, answer = (json.loads(value) if isinstance(value, str) else value
                         for value in (record["tools"], record["answers"]))
    except ValueError:
        return [(id, "tools or answers are not JSON")]
    example = Example(id, "xlam", tools, [{"role": "user", "content": record["query"]}], answer)
    return [(id, _problem(example) or example)]


def _toolace_outcomes(id, record):
    roles = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "tool": "tool",
             "observation": "tool", "function": "tool"}
    tools, reason = _find_tools(str(record["system"]))
    for turn in record["conversations"]:
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in roles or not isinstance(turn.get("value"), str):
            reason = f"a turn that is not text of a known role, but of {role!r}"
    if reason:
        return [(id, reason)]
    offered = {tool["name"].strip(): tool["name"] for tool in tools}
    outcomes, messages = [], []
    for number, turn in enumerate(record["conversations"]):
        role, content = roles[turn["from"]], turn["value"]
        calls, outcome = _read_call_turn(content, offered) if role == "assistant" else (None, None)
        if calls:
            content = format_calls(calls)
            source = "toolace_multi" if len(messages) >= 2 else "toolace_single"
            outcome = Example(f"{id}/{number}", source, tools, list(messages), calls)
            outcome = _problem(outcome) or outcome
        if outcome:
            outcomes.append((f"{id}/{number}", outcome))
        messages.append({"role": role, "content": content})
    return outcomes


def _find_tools(system):
    """(tools, None): the first JSON list of objects that have a name and parameters; or (None, reason)."""
    reason = "no tool list in the system text"
    for start in re.finditer(r"\[\s*\{", system):
        try:
            tools, _ = json.JSONDecoder().raw_decode(system, start.start())
        except ValueError:
            reason = "the tool list in the system text is not JSON"
            continue
        if all(isinstance(t, dict) and isinstance(t.get("name"), str) and "parameters" in t for t in tools):
            return tools, None
    return None, reason


def _read_call_turn(text, offered):
    """(calls, None) of a call turn, (None, reason) of one that cannot be read, (None, None) of other text.
    Text may begin with "[" too: it is held for a broken call only where an offered name and "(" follow, or
    `name(key=` or `name()` does and it ends with "]"."""
    try:
        calls = parse_calls(text)
    except ValueError as error:
        text = text.strip()
        broken = any(re.match(rf"\[\s*{re.escape(name)}\s*\(", text) for name in offered) or (
            text.endswith("]") and re.match(r"""\[[^][="]+\(\s*(\)|[^\s=()"',]+\s*=)""", text))
        return None, f"call does not parse: {error}" if broken else None
    return [{**call, "name": offered.get(call["name"], call["name"])} for call in calls], None


def _records(path):
    """[(place, object)…] of a .jsonl file, or of a .json file that is one list; place is for messages."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        records = [(f"{path}: record {k}", record) for k, record in enumerate(_read_json(text, path))]
    else:
        # splitlines would also cut at marks that JSON strings may hold, such as U+2028.
        lines = [(f"{path}:{k}", line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = [(place, _read_json(line, place)) for place, line in lines]
    for place, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{place}: a {type(record).__name__} where an object is expected")
    return records


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}); is the name right?") from None


def _read_json(text, place):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); is the file complete?") from None


def _problem(example):
    """Why this example cannot be learnt from, or None."""
    def lacks(value, *keys):
        return not isinstance(value, list) or not all(
            isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys) for item in value)

    if lacks(example.tools, "name"):
        return "tools are not a list of objects with a name"
    if not example.messages or lacks(example.messages, "role", "content") or not {
            message["role"] for message in example.messages} <= {"user", "assistant", "tool", "system"}:
        return "messages are not a list of {role, content} with known roles and text, at least one"
    try:
        json.dumps(vars(example), ensure_ascii=False, allow_nan=False).encode()
        verdict = score(format_reply(example.answer, example.reasoning or ""), example.answer)
    except ValueError as error:
        return f"holds what cannot be written or answered: {error}"
    if verdict.reward < 1:
        return f"answer cannot score 1: {verdict.error}"
    names = {tool["name"] for tool in example.tools}
    return None if names >= {c["name"] for c in example.answer} else "call of a tool that is not offered"


# ---- calls as ToolACE writes them
# A name ends at the first "(" which ")" and the end of a call, or "parameter=", follow: it may hold brackets.
_NAME = re.compile(r"""\s*([^="]+?)\s*\((?=\s*(?:\)\s*[],]|[^\s=,()"'][^=,()"']*=))""")
_PARAMETER = re.compile(r"""\s*([^\s=,()"'][^=,()"']*?)\s*=""")
_TOKEN = re.compile(r"""(?s)\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[][(){},:]|[^][(){},:\s"']+)""")
_JSON = {"True": "true", "False": "false", "None": "null", "(": "[", ")": "]"}
_ESCAPES = {'"': '\\"', "\\'": "'", "\\\n": ""}


def parse_calls(text):
    """Read `[Name(key=value, …), Name(…)]` -> [{"name", "arguments"}…], one call at least; else ValueError.
    Values are literals of Python or JSON; a tuple is read as a list. The text is rewritten as JSON token by
    token, so that the JSON reader judges its structure."""
    text, parts, depth, at = text.strip(), [], 0, 0
    while at < len(text):
        begins_call = depth == 1 and parts[-1] in ("[", ",")
        name = _NAME.match(text, at) if begins_call else None
        parameter = _PARAMETER.match(text, at) if depth == 2 else None
        token = name or parameter or _TOKEN.match(text, at)
        if not token or begins_call and not name or not parts and token[1] != "[":
            raise ValueError("not a list of name(parameter=value, …)")
        mark, at = token[1], token.end()
        if name:
            parts.append(f'{{"name": {json.dumps(mark)}, "arguments": {{')
        elif parameter:
            parts.append(f"{json.dumps(mark)}: ")
        elif mark[0] in "\"'":
            parts.append(_json_string(mark[1:-1]))
        else:
            parts.append("}}" if depth == 2 and mark == ")" else _JSON.get(mark, mark))
        if not parameter:
            depth += bool(name) + (mark in ("[", "(", "{")) - (mark in ("]", ")", "}"))
    try:
        calls = json.loads("".join(parts), object_pairs_hook=_unique, strict=False)
        json.dumps(calls, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("a value is no literal, a key stands twice or a bracket is open") from None
    return calls


def _unique(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _json_string(body):
    """The inside of a Python string literal as a JSON string; escapes that neither knows are plain text."""
    def piece(match):
        as_it_is = match[0] if (match[2] or "u") in '"\\/bfnrtu' else "\\" + match[0]
        return json.dumps(chr(int(match[1], 16)))[1:-1] if match[1] else _ESCAPES.get(match[0], as_it_is)

    return '"' + re.sub(r'(?s)\\[xU]((?<=x)[0-9a-fA-F]{2}|(?<=U)[0-9a-fA-F]{8})|\\(.)|"', piece, body) + '"'


# ---- synthetic tool calling
HELDOUT = ("values", "paraphrases", "tools")
SPLITS = ("train", *HELDOUT, "heldout")
VOWELS = ("a", "e", "i", "o", "u", "ai", "au", "ei", "oi", "ou")  # 70 syllables: few names share one


def synthetic(n, seed, split):
    """n examples of procedural tool calling; example k is a pure function of (seed, split, k).

    A tool is a verb and a noun with one to three of the noun's parameters. Two to four are drawn anew for
    each example, half the time such that they share a verb or a noun. Of 10 queries 5 ask for one of them, 2
    for two, 3 for a tool that shares no word with those offered (answer []).
    assets/synthetic.json has the words. Three ways to be new divide the held-out splits from "train";
    "heldout" deals out the three in turn:
        values       open values (made-up words, times, numbers) of another checksum; so in all three splits
        paraphrases  of every list of wordings, the last, which the other splits never take
        tools        pairs of verb and noun of another checksum
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    world, known = _read_world()
    parts, examples, pairs_of = HELDOUT if split == "heldout" else (split,), [], ([], [])
    for noun, entry in world["nouns"].items():
        for verb in entry["verbs"]:
            pairs_of[zlib.crc32(f"{verb}_{noun}".encode()) % 5 == 0].append((verb, noun))
    for k in range(n):
        part = parts[(k + k // 3) % len(parts)]  # so that every third example is not always of one part
        pairs = pairs_of[part == "tools"]
        tools = _offer(world, pairs, random.Random(f"tools/{split}/{seed}/{k}"))
        examples.append(_ask(world, known, pairs, tools, part, f"{split}/{seed}/{k}"))
    return examples


def synthetic_phrases(n, seed, least, most):
    """n times ({parameter: value}, phrases that say these values), of the "train" split, `least` to `most` at
    once: what a call copies from a query, without tools around it. A generator."""
    (world, known), rng = _read_world(), random.Random(seed)
    for _ in range(n):
        names = rng.sample(list(world["parameters"]), rng.randint(least, most))
        values, phrases = zip(*(_say(world, rng, name, known, "train") for name in names), strict=True)
        yield dict(zip(names, values, strict=True)), rng.sample(phrases, len(phrases))


def synthetic_reasoning(calls):
    """The line of reasoning that goes with these calls: which tools, with which parameters."""
    plans = (f"{call['name']} with {', '.join(call['arguments'])}" for call in calls)
    return "; ".join(plans) + "." if calls else "No tool fits."


def _read_world():
    """The words that synthetic examples are made of, and the set of them all."""
    text = _read_text(ASSETS / "synthetic.json")
    return json.loads(text), set(re.findall("[a-z]+", text.lower()))


def _offer(world, pairs, rng):
    """{(verb, noun): schema} of two to four tools."""
    first, are_alike = rng.choice(pairs), rng.random() < 0.5
    others = [pair for pair in pairs if pair != first]
    rng.shuffle(others)
    if are_alike:
        others.sort(key=lambda pair: set(pair).isdisjoint(first))
    offered = [first, *others[: rng.choices((1, 2, 3), (50, 35, 15))[0]]]
    rng.shuffle(offered)
    return {pair: _tool(world, *pair, rng) for pair in offered}


def _tool(world, verb, noun, rng):
    entry, schemas = world["nouns"][noun], {}
    while all(map(_is_closed, schemas.values())):
        names = rng.sample(entry["parameters"], rng.choices((1, 2, 3), (25, 40, 35))[0])
        schemas = {name: world["parameters"][name]["schema"] for name in entry["parameters"] if name in names}
    return {"name": f"{verb}_{noun}", "description": f"{verb.capitalize()} {entry['said'][0]}.",
            "parameters": {"type": "object", "properties": schemas, "required": list(schemas)}}


def _ask(world, known, pairs, tools, part, key):
    """The example that offers these tools, asking for one, for two or for none of them."""
    rng = random.Random(key)

    kind = rng.choices(("single", "two_calls", "no_tool"), (50, 20, 30))[0]
    asked = rng.sample(list(tools), 1 + (kind == "two_calls"))
    schemas, answer, requests = tools, [], []
    if kind == "no_tool":
        words = {word for pair in tools for word in pair}
        asked = [rng.choice([pair for pair in pairs if words.isdisjoint(pair)])]
        schemas = {asked[0]: _tool(world, *asked[0], rng)}
    for verb, noun in asked:
        arguments, phrases = {}, []
        for name in schemas[verb, noun]["parameters"]["properties"]:
            arguments[name], phrase = _say(world, rng, name, known, part)
            phrases.append(phrase)
        rng.shuffle(phrases)
        what = f"{rng.choice(world['verbs'][verb])} {rng.choice(world['nouns'][noun]['said'])}"
        requests.append(_wording(rng, world["request"], part).format(what=what, how=" ".join(phrases)))
        answer.append({"name": f"{verb}_{noun}", "arguments": arguments})
    frame = _wording(rng, world["two" if kind == "two_calls" else "one"], part)
    query = frame.format(a=requests[0], A=requests[0][0].upper() + requests[0][1:], b=requests[-1])
    answer = [] if kind == "no_tool" else answer
    return Example(f"synthetic/{key}", f"{part}/{kind}", list(tools.values()),
                   [{"role": "user", "content": query}], answer, synthetic_reasoning(answer))


def _wording(rng, choices, part):
    return rng.choice(choices[-1:] if part == "paraphrases" else choices[:-1])


def _say(world, rng, name, known, part):
    """A value of a parameter and a phrase that says it."""
    value = _value(rng, name, world["parameters"][name]["schema"], known, part != "train")
    said = _wording(rng, world["parameters"][name]["said"], part)
    return value, said[not value] if isinstance(value, bool) else said.format(value)


def _is_closed(schema):
    return schema["type"] == "boolean" or "enum" in schema


def _value(rng, name, schema, known, is_new):
    """A value of a parameter; one of an open set is drawn until it is of the split and no known word."""
    if _is_closed(schema):
        return rng.choice(schema.get("enum", (True, False)))
    value = None
    while value is None or zlib.crc32(str(value).encode()) % 2 != is_new or str(value).lower() in known:
        if schema["type"] == "integer":
            value = rng.randrange(2, 100)
        elif schema["type"] == "number":
            value = rng.randrange(1, 100) + rng.randrange(1, 10) / 10
        elif name == "time":
            value = f"{rng.randrange(1, 13)}:{rng.randrange(60):02d}"
        else:
            value = "".join(rng.choice("jkqvwxz") + rng.choice(VOWELS) for _ in range(2)).capitalize()
    return value


# ---- augmenting, after Hammer (arXiv 2410.04587)
def make_irrelevant(examples, share, seed):
    """Take the right tools away from a share (0 to 1) of the examples, whose answer is then [].
    Drawn among those with another tool to offer; their source then ends in "_irrelevant"."""
    result, wanted = list(examples), round(share * len(examples))
    for i in _permutation(len(examples), f"irrelevant/{seed}"):
        right = {call["name"] for call in examples[i].answer}
        others = [tool for tool in examples[i].tools if tool["name"] not in right]
        if wanted and right and others:
            wanted -= 1
            result[i] = replace(examples[i], id=f"{examples[i].id}/irrelevant", tools=others, answer=[],
                                source=f"{examples[i].source}_irrelevant", reasoning=None)
    return result


def mask_names(examples, share, seed):
    """Rename functions and parameters of a share (0 to 1) of the examples to random strings, save in prose;
    defaults too, save of a parameter in a call: the call's value may be the default or the user's."""
    result = list(examples)
    for i in _permutation(len(examples), f"mask/{seed}")[: round(share * len(examples))]:
        result[i] = _masked(examples[i], random.Random(f"mask/{seed}/{i}"))
    return result


def _masked(example, rng):
    earlier = [json.loads(message["content"][len(CALL) : -len(END_CALL)])
               if message["role"] == "assistant" and message["content"].startswith(CALL) else []
               for message in example.messages]
    used = {(call["name"], key) for call in sum(earlier, example.answer) for key in call["arguments"]}
    new = {}  # (function,), (function, parameter) or (function, parameter, "default") -> random string

    def rename(*key):
        letters = rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN0123456789", k=rng.randrange(6, 13))
        return new.setdefault(key, "".join(letters))

    def mask_tool(tool):
        name, schema = tool["name"], tool.get("parameters") or {}
        nested, properties = isinstance(schema.get("properties"), dict), {}
        for key, value in (schema["properties"] if nested else schema).items():
            if isinstance(value, dict):
                if isinstance(value.get("default"), str) and value["default"] and (name, key) not in used:
                    value = {**value, "default": rename(name, key, "default")}
                key = rename(name, key)
            properties[key] = value
        if nested:
            required = [new.get((name, key), key) for key in schema.get("required") or []]
            properties = {**schema, "properties": properties, "required": required}
        return {**tool, "name": rename(name), "parameters": properties}

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
    """A tokenizer and Qwen2.5's chat format.

    path is a hub name, or a folder with tokenizer.json and any of the other FILES, which name the end of
    sequence; system_prompt is a text file that holds {tools} once, None being assets/system_prompt.txt.
    stop_ids: every end of sequence that these files name, and <|im_end|>, which ends a chat turn.
    vocab_size: the ids that have a token; a model may have more rows, which must never be sampled.
    """

    DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")

    def __init__(self, path, system_prompt=None):
        folder = Path(path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            try:
                folder = Path(snapshot_download(str(path), allow_patterns=list(self.FILES)))
            except (ValueError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{path}: neither a folder nor a model of the hub ({reason})") from None
        tokenizer, named, *configs = (_read_json(_read_text(folder / name), folder / name)
                                      if (folder / name).exists() else {} for name in self.FILES)
        if not tokenizer:
            raise ValueError(f"{folder}: no tokenizer.json; copy the model's into this folder")
        self.tokenizer = Tokenizer.from_str(json.dumps(tokenizer))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

        eos = named.get("eos_token") or ""
        ends = ("<|im_end|>", eos["content"] if isinstance(eos, dict) else eos)
        stops = [self.tokenizer.token_to_id(end) for end in ends]
        for ids in (config.get("eos_token_id") for config in configs):
            stops += ids if isinstance(ids, list) else [ids]
        stops = [stop for stop in stops if stop is not None]
        if not stops:
            raise ValueError(f"{folder}: no end of sequence; name it as eos_token in tokenizer_config.json")
        self.stop_ids, self._end_of_turn = frozenset(stops), stops[0]

        text = _read_text(system_prompt or ASSETS / "system_prompt.txt")
        if text.count("{tools}") != 1:
            raise ValueError(f"{system_prompt}: {text.count('{tools}')} times {{tools}}, not 1")
        self._before_tools, self._after_tools = text.split("{tools}")

    def render(self, messages, add_generation_prompt):
        """The text of a conversation [{"role", "content"}…], as Qwen2.5's own template gives it."""
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.DEFAULT_SYSTEM}, *messages]
        text = ""
        for role, run in groupby(messages, key=lambda message: message["role"]):
            contents = [message["content"] for message in run]
            if role == "tool":
                results = (f"\n<tool_response>\n{content}\n</tool_response>" for content in contents)
                text += f"<|im_start|>user{''.join(results)}<|im_end|>\n"
            else:
                text += "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for content in contents)
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def encode(self, text):
        """Ids of a text; a marker such as <|im_end|> in it becomes its token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, example):
        """Ids up to where the reply begins: tools and system text of the example, conversation. Never cut."""
        wrapped = ({"type": "function", "function": tool} for tool in example.tools)
        tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in wrapped)
        system, messages = self._before_tools + tools + self._after_tools, example.messages
        if messages[0]["role"] == "system":
            system, messages = f"{system}\n\n{messages[0]['content']}", messages[1:]
        return self.encode(self.render([{"role": "system", "content": system}, *messages], True))

    def encode_reply(self, example):
        """Ids of the right reply: reasoning (empty if None), calls, stop token."""
        return [*self.encode(format_reply(example.answer, example.reasoning or "")), self._end_of_turn]

    def decode(self, ids):
        """Text of ids, special tokens kept; an id without a token gives nothing."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


# ---- order
@lru_cache(maxsize=2)
def _permutation(n, key):
    order = list(range(n))
    random.Random(key).shuffle(order)
    return tuple(order)


def split_examples(examples, fraction, seed):
    """(train, heldout): a fraction (0 to 1), drawn by seed, is held out; both keep their order."""
    held = set(_permutation(len(examples), f"split/{seed}")[: round(fraction * len(examples))])
    return [examples[i] for i in range(len(examples)) if i not in held], [examples[i] for i in sorted(held)]


def filter_by_prompt_tokens(examples, chat, max_prompt_tokens, max_dropped_share):
    """(kept, dropped count): examples with longer prompts are left out, as a cut prompt would lack tools.
    ValueError where that is more than a share (0 to 1) of them."""
    kept = [example for example in examples if len(chat.encode_prompt(example)) <= max_prompt_tokens]
    dropped = len(examples) - len(kept)
    if dropped > max_dropped_share * len(examples):
        raise ValueError(
            f"{dropped} of {len(examples)} prompts ({dropped / len(examples):.1%}) are longer than "
            f"{max_prompt_tokens} tokens, but only {max_dropped_share:.1%} may be dropped; raise one of both")
    return kept, dropped


class Batches(Iterator):
    """Endless batches of `size` examples, shuffled anew each epoch; example k depends on (seed, k) only.
    cursor: examples dealt out so far (given to a new object, it goes on from there); epoch: the same in
    passes; fingerprint: hex digest of the examples in their order, which a resumed run must find again."""

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
        lines = (json.dumps(vars(example)) for example in self.examples)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---- command line
def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Make training files, one example a line.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="convert a published set, counting what is dropped and why")
    convert.add_argument("format", choices=("toolace", "xlam"))
    convert.add_argument("raw", help=".json (one list) or .jsonl")
    convert.add_argument("--irrelevant", type=float, default=0, metavar="SHARE", help="as in the paper: 0.15")
    convert.add_argument("--mask", type=float, default=0, metavar="SHARE", help="as in the paper: 0.67")
    made = commands.add_parser("synthetic", help="procedural tool calling")
    made.add_argument("n", type=int)
    made.add_argument("--split", choices=SPLITS, default="train")
    for command in (convert, made):
        command.add_argument("out", help="the .jsonl file to write")
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        examples = _convert(args) if args.command == "convert" else synthetic(args.n, args.seed, args.split)
        write_jsonl(args.out, examples)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for source, count in sorted(Counter(example.source for example in examples).items()):
        print(f"{count:8d} {source}")
    print(f"{len(examples):8d} written to {args.out}")
    return 0


def _convert(args):
    for share in (args.irrelevant, args.mask):
        if not 0 <= share <= 1:
            raise ValueError(f"{share}: --irrelevant and --mask are shares between 0 and 1")
    examples, report = {"toolace": read_toolace, "xlam": read_xlam}[args.format](args.raw)
    print(f"{report['raw']:8d} raw records, {report['without_calls']} of them without a call")
    for reason, ids in report["dropped_ids"].items():
        print(f"{len(ids):8d} dropped: {reason}: {' '.join(ids)}")
    if not examples:
        raise ValueError(f"{args.raw}: no example in it can be used; is it a {args.format} file?")
    return mask_names(make_irrelevant(examples, args.irrelevant, args.seed), args.mask, args.seed)


if __name__ == "__main__":
    sys.exit(main())
