"""The training and held-out files of `tools/real.py prepare`, mixed from any jsonl of examples.

Prompts have two to four tools and at most MAX_PROMPT tokens. A share of the examples loses its right tools;
their answer is no call. Another share holds the requests of two or three records. The reasoning is one line:
the tools and the names of their arguments. Whole conversations are held out.
"""

import json
import random
import re
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from converters.schemas import bare_tools
from data import Chat, Example, conversations, read_jsonl, write_jsonl
from eval import evenly_spaced
from reward import format_reply
from runtime.files import read_json, write_json, write_text
from runtime.records import read_records

PROMPT = Path(__file__).parent.parent / "configs/real_prompt.txt"
WEIGHTS = {"sgd": 5, "dria_pythonic": 3, "xlam": 3, "toolace": 2, "toolbench": 2, "star": 1.5,
           "home_assistant": 0.4, "snips": 0.4}  # by the name of a file; 1 where it is not listed
# Ids of one dialogue of these sets begin alike. Other records are one conversation if their texts are.
DIALOGUE = re.compile(r"(sgd-[a-z]+_\d+_\d+|dria-\d+|star-\d+)-")
IRRELEVANT, JOINED, MAX_PROMPT, MAX_REPLY = 0.12, 0.2, 300, 136
SIZES = {"imitation": 6000, "further": 4000, "heldout": 400, "sampled": 100}
COPIES = 3  # how often a small source is used in training, each time with other tools beside the right ones


def read_source(path):
    """The examples of a jsonl file, keys that Example lacks left out; `source` is the name of the file. Of
    equal user texts the first is kept."""
    kept = {}
    for place, record in read_records(path):
        try:
            example = Example(**{key: record[key] for key in Example.__annotations__ if key in record})
            example = replace(example, source=Path(path).stem, tools=bare_tools(example.tools))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None
        text = " ".join(message["content"] for message in example.messages if message["role"] == "user")
        kept.setdefault(" ".join(text.lower().split()), example)
    return list(kept.values())


def words(tools):
    """The words of four or more letters in the names and descriptions of tools, their first five letters."""
    text = " ".join(f"{tool['name']} {tool.get('description', '')}" for tool in tools)
    return {word.lower()[:5] for word in re.findall("[A-Z]?[a-z]{3,}", text) if len(word) >= 4}


def shown(example, strangers, is_irrelevant, chat, rng):
    """The example with two to four tools, a reasoning, and a short prompt and reply; None if that cannot be.
    Beside the right tools are others of the record and `strangers`, tools of other files, that share no word
    with those of the record: they may not answer the request too."""
    names = [call["name"] for call in example.answer]
    tools = [tool for tool in example.tools if tool["name"] in names]
    others = [tool for tool in example.tools if tool["name"] not in names]
    rng.shuffle(others)
    known = words(example.tools)
    drawn = rng.sample(strangers, min(12, len(strangers)))
    others += [tool for tool in drawn if not words([tool]) & known]
    wanted = max(rng.randint(2, 4), len(tools))
    if wanted > 2:
        others.sort(key=lambda tool: len(json.dumps(tool)))  # long ones would leave no room for others
    if is_irrelevant:
        example = replace(example, id=f"{example.id}/none", source=f"irrelevance/{example.source}", answer=[])
        tools = []
    calls = [f"{c['name']} with {', '.join(c['arguments']) or 'no arguments'}" for c in example.answer]
    example = replace(example, tools=tools, reasoning=("; ".join(calls) or "no tool fits") + ".")
    room, short = MAX_PROMPT - len(chat.encode_prompt(example)), len(chat.encode_reply(example)) <= MAX_REPLY
    for tool in others if room > 0 and short else ():
        if len(tools) < wanted and tool["name"] not in {tool["name"] for tool in tools}:
            length = len(chat.encode(json.dumps(tool))) + 12  # with its frame in the prompt, an estimate
            if length <= room:
                room, tools = room - length, [*tools, tool]
    example = replace(example, tools=rng.sample(tools, len(tools)))
    fits = 2 <= len(tools) <= 4 and short
    return example if fits and len(chat.encode_prompt(example)) <= MAX_PROMPT else None


def joined(examples, chat, rng):
    """The examples in a new order. JOINED of them hold the requests of two or three examples with one call
    each, in their place: in turn of tools that share no word, and of one tool."""
    single = [e for e in examples if len(e.answer) == len(e.messages) == 1]
    rng.shuffle(single)
    tool = {e.id: next(t for t in e.tools if t["name"] == e.answer[0]["name"]) for e in single}
    used, made = set(), []
    for first in single:
        if len(made) >= JOINED * (len(examples) - len(used) + len(made)):
            break
        parts, size, is_one_tool = [first], rng.choice((2, 2, 3)), len(made) % 2
        others = [e for e in single if tool[e.id] == tool[first.id]] if is_one_tool else (
            rng.sample(single, min(24, len(single))))
        for other in others if first.id not in used else ():
            if len(parts) < size and other.id not in used and all(
                    e.answer != other.answer and (is_one_tool or not words(e.tools) & words(other.tools))
                    for e in parts):
                parts.append(other)
        text = rng.choice((" Also: ", " And then: ", " ", "\n")).join(e.messages[0]["content"] for e in parts)
        whole = len(parts) > 1 and shown(replace(
            first, id="+".join(e.id for e in parts), source=f"joined/{first.source}",
            tools=list({t["name"]: t for e in parts for t in (*e.tools, tool[e.id])}.values()),
            messages=[{"role": "user", "content": text}], answer=[call for e in parts for call in e.answer],
        ), [], False, chat, rng)
        if whole:
            used |= {e.id for e in parts}
            made.append(whole)
    made += [e for e in examples if e.id not in used]
    return rng.sample(made, len(made))


def prepare(out, model, given, seed=0):
    """Write the files of SIZES and two system prompts into the folder `out`. given: texts FILE[=WEIGHT].
    Sources that are too small for their share leave it to the others. ValueError for unreadable files, and
    where `out` was made from other files or with other numbers."""
    given = {file: float(weight or WEIGHTS.get(Path(file).stem, 1))
             for file, _, weight in (text.partition("=") for text in given)}
    asked = {"seed": seed, "model": str(model), "sizes": SIZES, "weights": given,
             "numbers": [IRRELEVANT, JOINED, MAX_PROMPT, MAX_REPLY, COPIES],
             "files": [sha256(Path(file).read_bytes()).hexdigest() for file in given]}
    if (out / "report.json").exists():
        if read_json(out / "report.json")["asked"] != asked:
            raise ValueError(f"{out} was made from other files, another model or numbers; use another folder")
        return print(f"{out} is there")
    out.mkdir(parents=True, exist_ok=True)
    prompt = PROMPT.read_text(encoding="utf-8")
    write_text(out / "prompt.txt", prompt)
    chat, rng, made = Chat(model, out / "prompt.txt"), random.Random(seed), []
    sources, wanted = {file: read_source(file) for file in given}, sum(SIZES.values()) - SIZES["sampled"]
    total = round(wanted * (1 + JOINED * 4 / 3))  # a joined one is made of 7/3
    began, share = time.monotonic(), IRRELEVANT * wanted / total
    order = sorted(given, key=lambda file: len(sources[file]) / given[file])  # scarce ones first
    for place, file in enumerate(order):
        quota = round((total - len(made)) * given[file] / sum(given[other] for other in order[place:]))
        strangers = [tool for name in given if name != file for e in sources[name][:500] for tool in e.tools]
        rng.shuffle(sources[file])
        full, kept, empty = len(made) + quota, 0, 0
        for copy in range(1, COPIES + 1):
            for example in sources[file] if len(made) < full else ():
                if example := shown(example, strangers, empty < share * (kept + 1), chat, rng):
                    made.append(replace(example, id=f"{example.id}/{copy}"))
                    kept, empty = kept + 1, empty + (not example.answer)
                    if len(made) == 100:
                        print(f"{total} examples: {total / 6000 * (time.monotonic() - began):.0f} minutes")
                if len(made) == full:
                    break
    rng.shuffle(made)
    texts, groups, parts = conversations(made), {}, {name: [] for name in ("heldout", "further", "imitation")}
    for i, example in enumerate(made):
        dialogue = DIALOGUE.match(example.id)
        groups.setdefault(dialogue[0] if dialogue else texts[i], []).append(i)
    rng.shuffle(groups := list(groups.values()))
    for group in groups:
        name = next(name for name in parts if name == "imitation"
                    or len(parts[name]) < SIZES[name] * len(made) / wanted)
        parts[name] += [i for i in group if name != "heldout" or made[i].id.endswith("/1")]
    # Dialogues of two groups may begin with the same text; those in the held-out file are for it alone.
    held, counts = {texts[i] for i in parts["heldout"]}, {}
    files = {name: joined([made[i] for i in indices if name == "heldout" or texts[i] not in held], chat, rng)
             for name, indices in parts.items()}
    files["heldout"] = files["heldout"][:SIZES["heldout"]]
    files["sampled"] = evenly_spaced(files["heldout"], SIZES["sampled"])
    for name, examples in files.items():
        write_jsonl(out / f"{name}.jsonl", examples)
        read_jsonl(out / f"{name}.jsonl")  # which refuses what train.py would refuse
        counts[name] = {"examples": len(examples), "calls": Counter(len(e.answer) for e in examples),
                        "tools": Counter(len(e.tools) for e in examples),
                        "sources": Counter(e.source for e in examples)}
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in counts[name].items()), flush=True)
    if not (example := next((e for e in files["imitation"] if len(e.answer) == len(e.messages) == 1), None)):
        raise ValueError(f"of {len(made)} examples none is left for imitation; give more files")
    shot = (f"Example: tools {json.dumps(example.tools)}; request {example.messages[0]['content']!r}; reply "
            f"{format_reply(example.answer, example.reasoning)}")
    write_text(out / "prompt_with_example.txt", f"{prompt.rstrip()}\n{shot.replace('{tools}', '')}\n")
    write_json(out / "report.json", {"asked": asked, "counts": counts})
