"""The demo's made-up world: examples of procedural tool calling.

In:  a number, a seed and a split; the words of assets/synthetic.json. Out: `Example`s, or a jsonl file.

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
    text = read_text(ROOT / "assets" / "synthetic.json")
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
