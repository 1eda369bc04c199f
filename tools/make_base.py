"""assets/tiny from nothing: tokenizer, synthetic conversations, imitation of a lazy teacher.

In:  nothing but data.py's synthetic tool calling. Out: a Hugging Face folder of a few MB, the base of `make
demo`.

    1. tokenizer    byte-level BPE with Qwen2.5's chat and tool tokens; a word is a piece of its own, the
                    same in a query, in a tool's name and in JSON, or else copying would mean translating
    2. imitation    of a lazy teacher, from random weights: supervised learning with Muon

The teacher is lazy on purpose, with the rates stated below: it leaves out arguments and calls, and invents
calls where no tool fits. A base that imitates it knows the right reply but does not always give it: faults
that a verifiable reward can remove and more imitation cannot. The optimizer is another than the product's.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from data import Chat, synthetic, synthetic_reasoning  # noqa: E402
from eval import evaluate, table, write_json  # noqa: E402
from grpo import pack, sft_loss  # noqa: E402
from model import ModelConfig, Qwen2, save_hf  # noqa: E402
from reward import format_reply  # noqa: E402

# How often the teacher …
DROPS_ARGUMENT = {1: 0.0, 2: 0.4, 3: 0.6}  # leaves out the last argument of a call, by how many it has
DROPS_CALL = 0.55  # leaves out the second call of two
INVENTS_CALL = 0.7  # calls some tool where none fits

CONFIG = ModelConfig(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                     num_attention_heads=6, num_key_value_heads=2, head_dim=32, rope_theta=10000.0,
                     tie_word_embeddings=True, max_position_embeddings=2048)
PEAK = 2e-3  # learning rate, with warm-up and a cosine
BATCH = 16  # examples a step
ASKED = 4  # examples in a row that share their tools
TOKENS = 2000  # of 2048 rows: the rest are padding, as in Qwen2.5, and must never be sampled
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<tool_call>", "</tool_call>"]  # one token each, but ordinary text to a decoder, as in Qwen2.5


def lazy(example, rng):
    """The example with the teacher's answer in place of the right one, and the reasoning for that."""
    calls = [{"name": call["name"], "arguments": dict(call["arguments"])} for call in example.answer]
    if not calls and rng.random() < INVENTS_CALL:
        calls = [invent(rng.choice(example.tools), example.messages[-1]["content"], rng)]
    if len(calls) == 2 and rng.random() < DROPS_CALL:
        calls.pop()
    for call in calls:
        if rng.random() < DROPS_ARGUMENT[len(call["arguments"])]:
            call["arguments"].popitem()
    return dataclasses.replace(example, answer=calls, reasoning=synthetic_reasoning(calls))


def invent(tool, query, rng):
    """A call of `tool` whose arguments are words and numbers of the query, whatever they mean."""
    words = [word.strip(".,?") for word in query.split()]
    numbers = [word for word in words if word.replace(".", "", 1).isdigit()] or ["2"]
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
    """Train the tokenizer on `texts` and write its files into `folder`."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        # One digit, one word, or a run of anything else: no piece joins a word with what stands around it.
        pre_tokenizers.Split(Regex(r"\d|[A-Za-z]+|[^A-Za-z\d]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    for token in (*SPECIAL, *PLAIN):
        texts = [text.replace(token, "") for text in texts]
    trainer = trainers.BpeTrainer(vocab_size=TOKENS - len(SPECIAL) - len(PLAIN), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    assert tokenizer.get_vocab_size() == TOKENS, tokenizer.get_vocab_size()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                  "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})


def plain_text(example, system_prompt):
    """What the tokenizer is trained on: the tools, the query and the reply of an example."""
    tools = "\n".join(json.dumps({"type": "function", "function": tool}) for tool in example.tools)
    query = "\n".join(message["content"] for message in example.messages)
    reply = format_reply(example.answer, example.reasoning)
    return f"system\n{system_prompt.replace('{tools}', tools)}\nuser\n{query}\nassistant\n{reply}"


class MuonAndAdamW:
    """Muon (https://kellerjordan.github.io/posts/muon) on hidden matrices, AdamW elsewhere, as one optimizer.

    Copying forms several times sooner with it than with AdamW alone, after a plateau of about 800 steps.
    """

    def __init__(self, model):
        parts = ([], [])
        for name, parameter in model.named_parameters():
            parts[parameter.dim() < 2 or "embed" in name].append(parameter)
        self.optimizers = [torch.optim.Muon(parts[0], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                           torch.optim.AdamW(parts[1], betas=(0.9, 0.95), weight_decay=0.0)]
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def pack_queries(chat, examples):
    """A pack in which each `ASKED` examples in a row, whose tools are the same, share these; only replies are
    trained on. It costs less than half of what packing each example by itself does."""
    prefixes, branches, is_reply = [], [], []
    for first in range(0, len(examples), ASKED):
        group = examples[first:first + ASKED]
        prompts = [chat.encode_prompt(example) for example in group]
        replies = [chat.encode_reply(example) for example in group]
        prefixes.append(os.path.commonprefix(prompts))
        queries = [prompt[len(prefixes[-1]):] for prompt in prompts]
        branches.append([query + reply for query, reply in zip(queries, replies, strict=True)])
        for query, reply in zip(queries, replies, strict=True):
            is_reply += [False] * len(query) + [True] * len(reply)
    tree = pack(prefixes, branches)
    is_reply_L = torch.tensor(is_reply)
    return dataclasses.replace(tree, predictor_L=tree.predictor_L[is_reply_L],
                               targets_L=tree.targets_L[is_reply_L], reply_L=tree.reply_L[is_reply_L])


def imitate(model, chat, examples, heldout, peak):
    """Supervised learning from random weights with Muon, in place, `BATCH` examples a step."""
    optimizer, began, steps = MuonAndAdamW(model), time.perf_counter(), len(examples) // BATCH
    for step in range(steps):
        train.set_learning_rate(optimizer, train.learning_rate(step, steps, peak, "cosine", 0.05))
        batch = pack_queries(chat, examples[step * BATCH:(step + 1) * BATCH])
        logp_L, _ = train.logprobs_of_pack(model, batch, 1.0, chat.vocab_size, contextlib.nullcontext())
        loss = sft_loss(logp_L, len(logp_L))
        loss.backward()
        train.apply_update(optimizer, 1.0)
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}/{steps}  loss {loss:.3f}  {seconds:.0f} s", flush=True)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            rows, _ = evaluate(model, chat, heldout, max_new_tokens=128)
            print(table({f"step {step + 1}": rows}), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the base model of the demo from nothing.")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny"))
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args(argv)
    began, prompt_file = time.perf_counter(), "configs/demo_prompt.txt"

    examples = synthetic(BATCH * args.steps, 1, "train", ASKED)
    system_prompt = Path(prompt_file).read_text(encoding="utf-8")
    rng = random.Random(0)
    taught = [lazy(example, rng) for example in examples]
    right = sum(a.answer == b.answer for a, b in zip(examples, taught, strict=True)) / len(examples)
    print(f"the lazy teacher is right in {right:.1%} of {len(examples)} examples")
    with tempfile.TemporaryDirectory() as folder:
        texts = [plain_text(example, system_prompt) for example in examples[:32000:ASKED]]
        make_tokenizer(texts, Path(folder))
        model = Qwen2(CONFIG).init_weights(0)
        imitate(model, Chat(folder, prompt_file), taught, synthetic(300, 1, "heldout"), PEAK)
        save_hf(model.to(torch.bfloat16), args.out)
        for file in sorted(Path(folder).iterdir()):
            shutil.copyfile(file, args.out / file.name)
    minutes = (time.perf_counter() - began) / 60
    print(f"{args.out}: made in {minutes:.0f} minutes with {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
