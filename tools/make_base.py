"""Make assets/tiny, the base model of `make demo`, from random weights.

In:  examples from tools/synthetic.py. Out: a Hugging Face folder of a few MB.

    1. tokenizer    byte-level BPE with Qwen2.5's chat and tool tokens. A word is one piece, the same in a
                    query, in a tool's name and in JSON, so that copying needs no translation.
    2. copying      supervised, from phrases that each say a value to the JSON of the values: a minute on
                    the ability that forms last
    3. imitation    supervised, on the replies of a lazy teacher; on binding, where a reply's right plan is
                    given, and the calls with every value in its place are learnt; and on reading, where the
                    name of a tool is given, and the list of its parameters is learnt

The teacher is lazy on purpose, at the rates below: it omits arguments and calls, and invents calls where no
tool fits. A base that imitates it can give the right reply but does not always do so. A verifiable reward can
remove such faults; more imitation cannot. The optimizer (Muon) is not the one that train.py uses.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from data import Chat  # noqa: E402
from eval import accuracy_table, evaluate  # noqa: E402
from grpo import pack, sft_loss, token_logprobs  # noqa: E402
from model import ModelConfig, Transformer, save_hf, shared_prefix_attention  # noqa: E402
from reward import CALL, END_CALL, IM_END, IM_START, format_reply  # noqa: E402
from runtime.files import atomically, write_json  # noqa: E402
from tools import synthetic as world  # noqa: E402

# Rates at which the teacher …
DROPS_ARGUMENT = {1: 0.0, 2: 0.3, 3: 0.6}  # omits the last argument of a call, by its number of arguments
DROPS_CALL = 0.5  # omits the second call of two
INVENTS_CALL = 0.5  # calls the first tool where no tool fits

IMITATED, BOUND, READ = 4, 3, 2  # in a lesson: the teacher's replies, given plans, tools that are read
SAVED_EVERY = 100  # steps
TWO_CALLS = 60  # percent of the queries of binding that ask for two calls, where values are mixed up most

CONFIG = ModelConfig(vocab_size=1280, hidden_size=192, intermediate_size=320, num_hidden_layers=6,
                     num_attention_heads=6, num_key_value_heads=2, head_dim=32, rope_theta=10000.0,
                     tie_word_embeddings=True, max_position_embeddings=2048)
TOKENS = 1248  # at most; the other rows up to 1280 are padding, as in Qwen2.5, and must never be sampled
SPECIAL = ["<|endoftext|>", IM_START, IM_END]
PLAIN = [CALL, END_CALL]  # one token each, but ordinary text to a decoder, as in Qwen2.5


def lazy(example, rng):
    """The example with the teacher's answer instead of the right one, and the reasoning for that answer."""
    calls = [{"name": call["name"], "arguments": dict(call["arguments"])} for call in example.answer]
    if not calls and rng.random() < INVENTS_CALL:
        calls = [invent(example.tools[0], example.messages[-1]["content"], rng)]
    if len(calls) == 2 and rng.random() < DROPS_CALL:
        calls.pop()
    for call in calls:
        if rng.random() < DROPS_ARGUMENT[len(call["arguments"])]:
            call["arguments"].popitem()
    return dataclasses.replace(example, answer=calls, reasoning=world.synthetic_reasoning(calls))


def invent(tool, query, rng):
    """A call of `tool` whose arguments are words and numbers of the query, regardless of their meaning."""
    words = [word.strip(".,?") for word in query.split()]
    numbers = [word for word in words if word.replace(".", "", 1).isdigit()] or [str(rng.randrange(2, 100))]
    names = [word for word in words[1:] if word[:1].isupper()] or words[-1:]
    arguments = {}
    for name, schema in tool["parameters"]["properties"].items():
        if "enum" in schema:
            arguments[name] = rng.choice(schema["enum"])
        elif schema["type"] == "boolean":
            arguments[name] = rng.random() < 0.5
        elif schema["type"] == "string":
            arguments[name] = rng.choice(names)
        else:
            number = float(rng.choice(numbers))
            arguments[name] = int(number) if schema["type"] == "integer" else number
    return {"name": tool["name"], "arguments": arguments}


def make_tokenizer(texts, folder):
    """Train the tokenizer on `texts` and write its files to `folder`."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        # A digit, a word, or a run of other characters, so that no piece joins a word with its neighbours and
        # a new number has the pieces of the known ones.
        pre_tokenizers.Split(tokenizers.Regex(r"\d|[A-Za-z]+|[^A-Za-z\d]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    for token in (*SPECIAL, *PLAIN):
        texts = [text.replace(token, "") for text in texts]
    # The words of the synthetic set are frequent and become one piece; a made-up name becomes several.
    trainer = trainers.BpeTrainer(vocab_size=TOKENS - len(SPECIAL) - len(PLAIN), min_frequency=40,
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in PLAIN])
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end, pad = tokenizer.token_to_id(IM_END), tokenizer.token_to_id("<|endoftext|>")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                  "eos_token": IM_END, "pad_token": "<|endoftext|>"})
    write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})


def plain_text(example, system_prompt):
    """The text on which the tokenizer is trained: tools, query and reply of an example."""
    tools = "\n".join(json.dumps({"type": "function", "function": tool}) for tool in example.tools)
    query = "\n".join(message["content"] for message in example.messages)
    reply = format_reply(example.answer, example.reasoning)
    return f"system\n{system_prompt.replace('{tools}', tools)}\nuser\n{query}\nassistant\n{reply}"


class MuonAndAdamW:
    """Muon (https://kellerjordan.github.io/posts/muon) for hidden matrices, AdamW for the rest. Copying forms
    after a plateau of about 800 steps, several times sooner than with AdamW alone."""

    def __init__(self, model):
        parts = {}, {}
        for name, parameter in model.named_parameters():
            parts[parameter.dim() < 2 or "embed" in name][name] = parameter
        muon = torch.optim.Muon(parts[0].values(), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(parts[1].values(), betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers = muon, adamw
        self.moments = {name: optimizer.state[p] for optimizer, part in zip((muon, adamw), parts, strict=True)
                        for name, p in part.items()}

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class Lesson(NamedTuple):
    """Texts that share a prefix, as lists of ids, and how many ids at the end of each carry loss."""

    prefix: list
    texts: list
    learnt: list


def phrase_lessons(chat, n, seed, least, most):
    """n lessons: phrases that say `least` to `most` values, then these values as JSON."""
    for values, phrases in world.synthetic_phrases(n, seed, least, most):
        reply = chat.encode(json.dumps(values))
        yield Lesson(chat.encode(f"{json.dumps(list(values))}\n{' '.join(phrases)}\n"), [reply], [len(reply)])


def query_lessons(chat, n, seed, rng):
    """n lessons, each on the tools of one prompt: queries with the teacher's reply; queries with the right
    reply, of which only the calls carry loss, because the plan that precedes them is given; and names of
    tools, of which the plan's list of parameters carries loss."""
    mixes = [(50, 20, 30)] * IMITATED + [(100 - TWO_CALLS, TWO_CALLS, 0)] * BOUND
    for group in world.synthetic_groups(n, seed, mixes):
        taught = [lazy(example, rng) for example in group[:IMITATED]] + group[IMITATED:]
        replies = [chat.encode_reply(example) for example in taught]
        call = chat.encode(CALL)[0]
        learnt = [len(reply) if i < IMITATED else len(reply) - reply.index(call)
                  for i, reply in enumerate(replies)]
        for tool in rng.choices(group[0].tools, k=READ):
            name = tool["name"]
            taught.append(dataclasses.replace(group[0], messages=[{"role": "user", "content": name}]))
            plan = world.synthetic_reasoning([{"name": name, "arguments": tool["parameters"]["properties"]}])
            replies.append(chat.encode(f"<think>{plan}</think>"))
            learnt.append(len(replies[-1]) - len(chat.encode(f"<think>{name} with")))
        prompts = [chat.encode_prompt(example) for example in taught]
        shared = len(os.path.commonprefix(prompts))
        texts = [prompt[shared:] + reply for prompt, reply in zip(prompts, replies, strict=True)]
        yield Lesson(prompts[0][:shared], texts, learnt)


def loss_of(model, lessons, vocab_size):
    """The mean loss in nats of the ids of `lessons` that carry one, with gradient."""
    tree = pack([lesson.prefix for lesson in lessons], [lesson.texts for lesson in lessons])
    learnt, first, kept = [n for lesson in lessons for n in lesson.learnt], 0, []
    for length, n in zip((len(text) for lesson in lessons for text in lesson.texts), learnt, strict=True):
        first += length
        kept += range(first - n, first)
    hidden_TD = model(tree.tokens_T, tree.positions_T, shared_prefix_attention(tree.groups))
    logp_L, _ = token_logprobs(hidden_TD[tree.predictor_L[kept]], model.head_weight(), tree.targets_L[kept],
                               1.0, vocab_size)
    return sft_loss(logp_L, len(logp_L))


def learn(model, lessons, size, steps, peak, vocab_size, name, saved):
    """Train `model` in place, supervised, on `steps` batches of `size` of the iterator `lessons`. Every
    `SAVED_EVERY` steps and after the last, the state is written to `saved`, which a later call reads."""
    optimizer, began, recent, done = MuonAndAdamW(model), time.perf_counter(), [], {}
    if saved.exists():
        tensors = {tuple(key.split("/")): tensor for key, tensor in load_file(saved).items()}
        done = {phase: int(n) for (part, phase, _), n in tensors.items() if part == "steps"}
        if name in done:
            model.load_state_dict({key: t for (part, key, _), t in tensors.items() if part == "model"})
            for part, parameter, key in tensors:
                if part == "moment":
                    optimizer.moments[parameter][key] = tensors[part, parameter, key]
            lessons = itertools.islice(lessons, size * done[name], None)
            print(f"{name} resumes at step {done[name]} from {saved}")
    for step in range(done.get(name, 0), steps):
        train.set_learning_rate(optimizer, train.learning_rate(step, steps, peak, "cosine", 0.05))
        loss = loss_of(model, list(itertools.islice(lessons, size)), vocab_size)
        loss.backward()
        train.apply_update(optimizer, 1.0, loss.item())
        recent.append(loss.item())
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps:
            seconds = time.perf_counter() - began
            print(f"{name} step {step + 1}/{steps}  loss {mean(recent):.3f}  {seconds:.0f} s", flush=True)
            recent = []
            tensors = {f"steps/{phase}/": torch.tensor(n) for phase, n in (done | {name: step + 1}).items()}
            tensors |= {f"model/{key}/": tensor for key, tensor in model.state_dict().items()}
            tensors |= {f"moment/{parameter}/{key}": tensor for parameter, state in optimizer.moments.items()
                        for key, tensor in state.items()}
            with atomically(saved) as file:
                save_file(tensors, file)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the base model of the demo from nothing.")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny"))
    parser.add_argument("--copy_steps", type=int, default=800, help="batches of 32")
    parser.add_argument("--steps", type=int, default=2000, help="batches of 5 lessons")
    args = parser.parse_args(argv)
    began, prompt_file = time.perf_counter(), "configs/demo_prompt.txt"
    saved = Path(f"runs/{args.out.name}-{args.copy_steps}-{args.steps}.safetensors")
    saved.parent.mkdir(exist_ok=True)

    examples = world.synthetic(16000, 1, "train")
    system_prompt = Path(prompt_file).read_text(encoding="utf-8")
    rng = random.Random(0)
    right = sum(example.answer == lazy(example, rng).answer for example in examples) / len(examples)
    print(f"the lazy teacher is right in {right:.1%} of {len(examples)} examples")
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer([plain_text(example, system_prompt) for example in examples], Path(folder))
        chat, model = Chat(folder, prompt_file), Transformer(CONFIG).init_weights(0)
        model.embed_tokens.weight.data *= 5  # copying forms in half the steps if embeddings start far apart
        lessons = phrase_lessons(chat, 32 * args.copy_steps, 0, 1, 3)
        learn(model, lessons, 32, args.copy_steps, 3e-3, chat.vocab_size, "copying", saved)
        lessons = query_lessons(chat, 5 * args.steps, 0, rng)
        learn(model, lessons, 5, args.steps, 2e-3, chat.vocab_size, "imitation", saved)
        rows, _ = evaluate(model, chat, world.synthetic(300, 1, "heldout"), max_new_tokens=96)
        print(accuracy_table({"greedy": rows}))
        save_hf(model.to(torch.bfloat16), args.out)
        for file in sorted(Path(folder).iterdir()):
            shutil.copyfile(file, args.out / file.name)
    saved.unlink(missing_ok=True)
    print(f"{args.out}: made in {(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
