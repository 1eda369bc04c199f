"""Procedural tool calling, the data of the demo: made-up tools, queries and answers.

In:  number, seed and split of the examples; words from assets/synthetic.json. Out: `Example`s or a jsonl.

    python tools/synthetic.py N OUT.jsonl --split train|values|paraphrases|tools|heldout --seed S
"""

import argparse
import json
import random
import re
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Example, write_and_count  # noqa: E402
from runtime.files import read_text  # noqa: E402

HELDOUT = ("values", "paraphrases", "tools")
SPLITS = ("train", *HELDOUT, "heldout")
NEW = 8  # one value in so many is new
VOWELS = ("a", "e", "i", "o", "u", "ai", "au", "ei", "oi", "ou")  # 70 syllables, so few names share one


def synthetic(n, seed, split):
    """n examples; example k is a pure function of (seed, split, k). ValueError for an unknown split.

    A tool is a verb and a noun with one to three of the noun's parameters. Each example offers two to four
    tools; half of the examples prefer tools that share a verb or a noun. Of 10 queries, 5 ask for one of the
    tools, 2 for two of them, and 3 for a tool that shares no word with them (answer []).
    The id of an example ends with its frame, as in "…/two-3": queries of one frame resemble each other, so
    intervals treat them as one cluster. Each held-out split differs from "train" in one way; "heldout" takes
    examples of the three in turn:
        values       open values (made-up words, times, numbers) have another checksum, in all three splits;
                     one of `NEW` values has it: with one of two, training would teach which pieces of a name
                     never follow each other, and a model would mend new names to known ones
        paraphrases  only "new" frames, orders and phrases, which the other splits never use
        tools        only pairs of verb and noun with another checksum
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    world, known = _read_world()
    parts, examples = HELDOUT if split == "heldout" else (split,), []
    for k in range(n):
        part = parts[(k + k // 3) % len(parts)]  # the shift keeps examples[::3] balanced
        pairs = _pairs(world, part == "tools")
        tools = _offer(world, pairs, random.Random(f"tools/{split}/{seed}/{k}"))
        examples.append(_ask(world, known, pairs, tools, part, f"{split}/{seed}/{k}"))
    return examples


def synthetic_groups(n, seed, mixes):
    """Yield n lists of examples of the "train" split that offer the same tools, an example for each of
    `mixes`: weights of queries for one tool, for two of them, and for a tool that is not offered."""
    world, known = _read_world()
    pairs = _pairs(world, False)
    for k in range(n):
        tools = _offer(world, pairs, random.Random(f"tools/group/{seed}/{k}"))
        yield [_ask(world, known, pairs, tools, "train", f"group/{seed}/{k}-{i}", mix)
               for i, mix in enumerate(mixes)]


def synthetic_phrases(n, seed, least, most):
    """Yield n pairs ({parameter: value}, phrases that say these values in random order) of the "train" split,
    with `least` to `most` parameters each: what a call copies from a query, without tools."""
    (world, known), rng = _read_world(), random.Random(seed)
    for _ in range(n):
        names = rng.sample(list(world["parameters"]), rng.randint(least, most))
        values, phrases = zip(*(_say(world, rng, name, known, "train") for name in names), strict=True)
        yield dict(zip(names, values, strict=True)), rng.sample(phrases, len(phrases))


def synthetic_reasoning(calls):
    """The reasoning that precedes these calls: which tools, with which parameters."""
    plans = (f"{call['name']} with {', '.join(call['arguments'])}" for call in calls)
    return "; ".join(plans) + "." if calls else "No tool fits."


def _read_world():
    """(assets/synthetic.json, the set of all words in it)."""
    text = read_text(ROOT / "assets" / "synthetic.json")
    return json.loads(text), set(re.findall("[a-z]+", text.lower()))


def _pairs(world, is_new):
    """The pairs of verb and noun that only the split "tools" uses, or those of all the others."""
    return [(verb, noun) for noun, entry in world["nouns"].items() for verb in entry["verbs"]
            if (zlib.crc32(f"{verb}_{noun}".encode()) % 5 == 0) == is_new]


def _offer(world, pairs, rng):
    """{(verb, noun): schema} of two to four tools."""
    first, share_words = rng.choice(pairs), rng.random() < 0.5
    others = [pair for pair in pairs if pair != first]
    rng.shuffle(others)
    if share_words:
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


def _ask(world, known, pairs, tools, part, key, mix=(50, 20, 30)):
    """An example that offers these tools and asks for one, two or none of them, with the weights of `mix`."""
    rng = random.Random(key)
    kind = rng.choices(("single", "two_calls", "no_tool"), mix)[0]
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
    size = "two" if kind == "two_calls" else "one"
    frame = _wording(rng, world[size], part)
    number = (world[size]["train"] + world[size]["new"]).index(frame)
    query = frame.format(a=requests[0], A=requests[0][0].upper() + requests[0][1:], b=requests[-1])
    answer = [] if kind == "no_tool" else answer
    return Example(f"synthetic/{key}/{size}-{number}", f"{part}/{kind}", list(tools.values()),
                   [{"role": "user", "content": query}], answer, synthetic_reasoning(answer))


def _wording(rng, choices, part):
    return rng.choice(choices["new" if part == "paraphrases" else "train"])


def _say(world, rng, name, known, part):
    """A value of a parameter and a phrase that says it."""
    value = _value(rng, name, world["parameters"][name]["schema"], known, part != "train")
    said = _wording(rng, world["parameters"][name]["said"], part)
    return value, said[not value] if isinstance(value, bool) else said.format(value)


def _is_closed(schema):
    return schema["type"] == "boolean" or "enum" in schema


def _value(rng, name, schema, known, is_new):
    """A value of a parameter. An open value is redrawn until it belongs to the split and is no known word."""
    if _is_closed(schema):
        return rng.choice(schema.get("enum", (True, False)))
    value = None
    while (value is None or (zlib.crc32(str(value).encode()) % NEW == 0) != is_new
           or str(value).lower() in known):
        if schema["type"] == "integer":
            value = rng.randrange(2, 100)
        elif schema["type"] == "number":
            value = rng.randrange(1, 100) + rng.randrange(1, 10) / 10
        elif name == "time":
            value = f"{rng.randrange(1, 13)}:{rng.randrange(60):02d}"
        else:
            value = "".join(rng.choice("jkqvwxz") + rng.choice(VOWELS) for _ in range(2)).capitalize()
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(prog="synthetic.py", description="Make procedural tool calling.")
    parser.add_argument("n", type=int)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("out", help="the .jsonl file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        write_and_count(args.out, synthetic(args.n, args.seed, args.split))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
