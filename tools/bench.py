"""Measure speed and accuracy side by side with peers: `python tools/bench.py [NAME ...]`, default all.

In:  the names of benchmarks. On a GPU the shapes are those of Qwen2.5, on a CPU those of toy models. Out: a
JSON file a benchmark, with hardware and versions, written after each setting, and a table of all rows.

The contenders take turns in one process. The first round warms up and is discarded. Times are compared
within a round, so a machine that becomes slower affects all contenders. `x` says how many times as fast ours
is: the median over the rounds, with the lowest and the highest. The bar is the value that `x` must reach.
Seconds are wall-clock time on a GPU. On a CPU one thread computes, and seconds are processor time. A peer
that is not installed or that fails has a row that says so. The extra `peers` installs the peers of peers.py.

Axes: P prompts, G rollouts a prompt, N = P·G, T packed tokens, L reply tokens, B sequences being decoded,
D width, F width of the MLP, H query heads, K key/value heads, E head size, V vocabulary rows, C chunk of L.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from peers import hf_generate, liger_loss, trl_step  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from data import write_jsonl  # noqa: E402
from fast import aligned_cache  # noqa: E402
from grpo import group_advantages, pack, token_logprobs, token_logprobs_reference  # noqa: E402
from model import ModelConfig, Transformer, packed_attention, shared_prefix_attention  # noqa: E402
from runtime.files import write_json  # noqa: E402
from runtime.sharding import processor_name  # noqa: E402
from sample import fold, generate, prompt_seeds, sample_tokens  # noqa: E402
from tools.synthetic import synthetic  # noqa: E402
from train import grpo_updates, logprobs_of_pack, make_optimizer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # of weights that no optimizer updates
# On a CPU, with one thread, processor time, so that other work on the machine does not count.
CLOCK = time.process_time if DEVICE == "cpu" else time.perf_counter
BANDWIDTH, FLOPS = 4.3e12, 989e12  # of an H200: measured bytes/s, bf16 FLOP/s of its data sheet
# D, F, layers, H, K, E, V, whether the head is tied to the embedding
SHAPES = {"tiny": (128, 384, 4, 4, 2, 32, 2048, True), "0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
          "1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
          "7B": (3584, 18944, 28, 28, 4, 128, 152064, False)}
SETTINGS = {  # the arguments of each benchmark after `rounds`
    "logprob": {"cpu": [("tiny", 2048)],  # shape, L
                "cuda": [("1.5B", 32768), ("7B", 32768), ("0.5B", 32768)]},
    "decode": {"cpu": [("tiny", 8, 8, 128, 128)],  # shape, P, G, tokens of a prompt, tokens of a reply
               "cuda": [(shape, P, 8, 960, 128) for shape in ("1.5B", "0.5B", "7B") for P in (8, 32)]},
    "decode_prompt": {"cpu": [("tiny", 8, 8, 900, 120)], "cuda": []},  # long prompts, as decode on a GPU
    "sampling": {"cpu": [(64, 2048)], "cuda": [(64, 151936), (256, 151936)]},  # B, V
    "step": {"cpu": [("tiny", 8, 8, 64, 64)],  # as in decode
             "cuda": [("0.5B", 8, 8, 896, 128), ("1.5B", 8, 8, 896, 128)]},
    "prefix": {"cpu": [("tiny", 1, 8, 900, 120)], "cuda": [("1.5B", 4, 8, 900, 120)]},  # as in decode
    "run": {"cpu": [("tiny", 4, 4, 16)],  # shape, P, tools in a prompt (at least 4), tokens of a reply
            "cuda": [("7B", 32, 16, 120), ("1.5B", 64, 16, 120), ("0.5B", 64, 16, 120)]},
}


@dataclass
class Times:
    """One contender: seconds of each round, peak GPU memory beyond what was held; or why there is none."""

    seconds: list = field(default_factory=list)
    peak_gib: float | None = None
    outcome: str | None = None


def take_turns(contenders, rounds):
    """Call the contenders in turns: {name: Times}. A contender is a function, or why it is missing, a text.

    A function whose first part does not count returns its seconds. A peer that raises a RuntimeError, for
    example when memory is exhausted, is skipped in later rounds. An error of ours is raised.
    """
    times = {name: Times(outcome=run if isinstance(run, str) else None) for name, run in contenders.items()}
    for turn in range(rounds + 1):
        for name in [name for name in contenders if times[name].outcome is None]:
            try:
                seconds, times[name].peak_gib = timed(contenders[name])
            except RuntimeError as error:
                if name.startswith("ours"):
                    raise
                times[name].outcome = f"failed: {str(error).splitlines()[0][:60]}"
                continue
            times[name].seconds += [seconds] if turn else []
    return times


def timed(run):
    """Call run(): (seconds, peak GPU memory in GiB beyond what was held before the call; None on a CPU)."""
    if DEVICE == "cpu":
        began = CLOCK()
        return run() or CLOCK() - began, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, began = torch.cuda.memory_allocated(), CLOCK()
    counted_s = run()
    torch.cuda.synchronize()
    seconds = counted_s or CLOCK() - began
    return seconds, (torch.cuda.max_memory_allocated() - held) / 2**30


def rows(setting, times, work, unit, bars=(), notes=()):
    """One row a contender: median seconds, work a second, how many times as fast "ours" is, its notes."""
    bars, notes = dict(bars), dict(notes)
    for name, measured in times.items():
        row = {"setting": setting, "who": name}
        if measured.outcome:
            yield row | {"outcome": measured.outcome}
            continue
        row |= {"seconds": median(measured.seconds), "rounds": measured.seconds,
                "speed": work / median(measured.seconds), "unit": unit}
        row |= ratio(measured.seconds, times["ours"].seconds, bars.get(name)) if name != "ours" else {}
        row |= {"peak_gib": measured.peak_gib} if DEVICE == "cuda" else {}
        yield row | notes.get(name, {})


def ratio(theirs, ours, bar=None):
    """`x`, how many times as fast ours is: the median, lowest and highest of the rounds."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    row = {"x": median(ratios), "x_low": min(ratios), "x_high": max(ratios)}
    return row | ({"bar": bar, "passes": row["x"] >= bar} if bar else {})


def peer(package, make, *arguments):
    """make(*arguments), a contender. If its package is missing: "not installed", with a line on stderr."""
    try:
        return make(*arguments)
    except ImportError as error:
        print(f"{package} is not installed ({error}); the extra `peers` has it", file=sys.stderr)
        return "not installed"


def config_of(shape):
    D, F, layers, H, K, E, V, tied = SHAPES[shape]
    return ModelConfig(V, D, F, layers, H, K, E, tie_word_embeddings=tied)


def make_model(shape, dtype):
    """A model of a shape with random weights, created on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(config_of(shape)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def random_ids(count, length, vocab_size):
    """`count` lists of `length` ids above 0, the same at each call."""
    return torch.randint(1, vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def disagreement(model, rollouts, n):
    """Mean and maximum of |log-prob of the sampler - log-prob of the trainer| over the first groups."""
    most = max(1, 2**14 // (len(rollouts[0].prompt_ids) + n * len(rollouts[0].ids)))
    groups = [rollouts[i:i + n] for i in range(0, len(rollouts), n)][:most]
    tree = pack([group[0].prompt_ids for group in groups], [[r.ids for r in group] for group in groups])
    with torch.no_grad():
        logp_L, _ = logprobs_of_pack(model, tree.to(DEVICE), 1.0, None, contextlib.nullcontext())
    sampled_L = torch.tensor([logp for group in groups for r in group for logp in r.logp])
    diff_L = (logp_L.cpu() - sampled_L).abs()
    return {"logp_diff_mean": diff_L.mean().item(), "logp_diff_max": diff_L.max().item()}


def logprob(rounds, shape, L):
    """Token log-probs and entropy, forward and backward, at temperature 0.7, for the head of a shape.

    TFLOP/s count 8LDV operations for all contenders: the number if the logits are computed again in backward.
    `extra_gib`: peak memory beyond the gradients of the hidden states and, in fp32, of the weight. Errors are
    relative to fp64 over 2,048 tokens: the mean of |Δ log p|, and |Δ| / |.| of both gradients. "naive" holds
    all logits.
    """
    D, V = SHAPES[shape][0], SHAPES[shape][6]
    torch.manual_seed(0)
    hidden_LD = torch.randn(L, D, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight_VD = (torch.randn(V, D, device=DEVICE) * 0.02).to(DTYPE).requires_grad_()
    targets_L = torch.randint(V, (L,), device=DEVICE)

    def run(function, hidden_LD, weight_VD, targets_L):
        logp_L, _ = function(hidden_LD, weight_VD, targets_L, 0.7)
        gradients = torch.autograd.grad(logp_L.sum(), (hidden_LD, weight_VD))
        return logp_L.detach(), *gradients

    functions = {"ours": token_logprobs, "reference": token_logprobs_reference,
                 "torch.compile": compiled_logprobs(), "naive": naive_logprobs,
                 "Liger": peer("liger-kernel", liger_loss)}
    arguments = (hidden_LD, weight_VD, targets_L)
    times = take_turns({name: f if isinstance(f, str) else lambda f=f: run(f, *arguments) and None
                        for name, f in functions.items()}, rounds)

    few, notes = (hidden_LD[:2048].detach().requires_grad_(), weight_VD, targets_L[:2048]), {}
    doubles = [x.detach().double().requires_grad_() for x in few[:2]]
    exact = run(token_logprobs_reference, *doubles, few[2])
    for name in [name for name in functions if not times[name].outcome]:
        logp_L, *gradients = run(functions[name], *few)
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(gradients, exact[1:], strict=True)]
        notes[name] = {"tflops": 8 * L * D * V / median(times[name].seconds) / 1e12,
                       "dhidden_error": errors[0], "dweight_error": errors[1]}
        if logp_L.dim():
            notes[name]["logp_error"] = (logp_L - exact[0]).abs().mean().item()
        if DEVICE == "cuda":
            notes[name]["extra_gib"] = times[name].peak_gib - (hidden_LD.nbytes + 4 * V * D) / 2**30
    bars = {"naive": 0.87, "torch.compile": 1.0, "Liger": 2.0} if DEVICE == "cuda" else {}
    return rows(f"{shape}, L {L}", times, L, "tokens/s", bars, notes)


def naive_logprobs(hidden_LD, weight_VD, targets_L, temperature):
    logp_LV = torch.log_softmax((hidden_LD @ weight_VD.T).float() / temperature, -1)
    with torch.no_grad():
        entropy_L = -(logp_LV.exp() * logp_LV).sum(-1)
    return logp_LV.gather(1, targets_L[:, None])[:, 0], entropy_L


def compiled_logprobs():
    """The naive version by torch.compile, in chunks of 4,096 tokens, as in the kernels."""
    compiled = torch.compile(naive_logprobs, dynamic=False)

    def function(hidden_LD, weight_VD, targets_L, temperature):
        chunks = zip(hidden_LD.split(4096), targets_L.split(4096), strict=True)
        parts = [checkpoint(compiled, hidden_CD, weight_VD, targets_C, temperature, use_reentrant=False)
                 for hidden_CD, targets_C in chunks]
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    return function


def decode(rounds, shape, P, G, prompt_tokens, reply_tokens):
    """Rollouts: our `generate` against that of transformers, all replies of full length, temperature 1.

    Seconds are of the whole call, prefill and graph capture included. "prompt not shared", on a CPU, reads a
    prompt once a reply. `decode_share`, on a GPU: the share of the memory roofline that decoding alone
    reaches. Its time is the difference to a short call; the roofline is the bytes of weights, keys and values
    that each step has to read, at 4.3 TB/s.
    """
    model, last = make_model(shape, DTYPE), []
    prompts, B = random_ids(P, prompt_tokens, model.config.vocab_size), P * G

    def ours(tokens=reply_tokens, worth=aligned_cache.WORTH_SHARING):
        with patch.object(aligned_cache, "WORTH_SHARING", worth):
            last[:] = generate(model, prompts, G, max_new_tokens=tokens, temperature=1.0, stop_ids=(),
                               seeds_P=prompt_seeds(0, 0, 0, P))

    theirs = peer("transformers", hf_generate, model, prompts, G, reply_tokens)
    old = {"ours, prompt not shared": lambda: ours(worth=math.inf)} if DEVICE == "cpu" else {}
    times = take_turns(old | {"ours": ours, "transformers": theirs}, rounds)
    notes = disagreement(model, last, G)
    if DEVICE == "cuda":
        short_s = min(timed(lambda: ours(8))[0] for _ in range(2))
        seconds = (median(times["ours"].seconds) - short_s) / (reply_tokens - 8)
        c, read = model.config, sum(p.numel() for p in (*model.layers.parameters(), model.head_weight()))
        kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        read += kv * B * (prompt_tokens + reply_tokens / 2)
        notes |= {"decode_tokens_s": B / seconds, "decode_share": 2 * read / BANDWIDTH / seconds}
    bar = {"tiny": 2.1 if prompt_tokens < 900 else 4.2, "7B": 3.0}.get(shape, 8.0)
    return rows(f"{shape}, B {B}, {prompt_tokens} + {reply_tokens} tokens", times, B * reply_tokens,
                "tokens/s", {"transformers": bar}, {"ours": notes})


def sampling(rounds, B, V):
    """One token a row and its log-prob from logits [B, V]: ours, `multinomial`, and sorting as for top-p."""
    logits_BV = torch.randn(B, V, device=DEVICE, dtype=DTYPE)
    key_B, calls, draw_tokens = prompt_seeds(0, 0, 0, B).to(DEVICE), 100, sample_tokens
    if DEVICE == "cuda":
        from fast.draw import sample_tokens as draw_tokens

    def ours(i):
        return draw_tokens(logits_BV, 1.0, fold(key_B, i))

    def multinomial(_):
        logp_BV = torch.log_softmax(logits_BV.float(), -1)
        ids_B1 = torch.multinomial(logp_BV.exp(), 1)
        return ids_B1[:, 0], logp_BV.gather(1, ids_B1)[:, 0]

    def by_sorting(_):
        logp_BV, order_BV = torch.log_softmax(logits_BV.float(), -1).sort(-1, descending=True)
        p_BV = logp_BV.exp()
        ids_B1 = torch.multinomial(p_BV.where(p_BV.cumsum(-1) - p_BV < 0.9999, 0.0), 1)
        return order_BV.gather(1, ids_B1)[:, 0], logp_BV.gather(1, ids_B1)[:, 0]

    functions = {"ours": ours, "multinomial": multinomial, "sort": by_sorting}
    times = take_turns({name: lambda draw=draw: [draw(i) for i in range(calls)] and None
                        for name, draw in functions.items()}, rounds)
    notes = {"ours": {"gb_s": logits_BV.nbytes * calls / median(times["ours"].seconds) / 1e9}}
    return rows(f"B {B}, V {V}, {calls} calls", times, B * calls, "tokens/s", notes=notes)


def step(rounds, shape, P, G, prompt_tokens, reply_tokens):
    """A whole GRPO step: rollouts, reward, log-probs, backward, AdamW; ours against TRL's trainer.

    TRL generates with transformers and computes log-probs with its built-in fused head, which has replaced
    Liger's loss. "no shared prefix" is ours with a group for each reply, in rollouts and in the update.
    Replies reach their limit unless a stop token is drawn by chance. `mfu`, of the update on a GPU: 6 FLOPs a
    parameter and token of the trees, the head on replies only, attention not counted, over 989 TFLOP/s.
    """
    prompts, contenders, notes = random_ids(P, prompt_tokens, SHAPES[shape][6]), {}, {}
    for precision in ("bf16",) if DEVICE == "cuda" else ("fp32", "bf16"):
        model = make_model(shape, torch.float32)
        optimizer = make_optimizer(model, 0.0, 0.999)
        ours = f"ours {precision}" if contenders else "ours"
        for name, is_shared in ((ours, True), (f"{ours}, no shared prefix", False)):
            notes[name] = {"precision": precision}
            contenders[name] = our_step(model, optimizer, prompts, G, reply_tokens, precision, is_shared,
                                        notes[name])
        contenders[f"TRL {precision}"] = peer(
            "trl", trl_step, make_model(shape, torch.float32), prompts, G, reply_tokens, precision, reward_of,
            P * G if DEVICE == "cpu" else 8, CLOCK)
    times = take_turns(contenders, rounds)
    setting = f"{shape}, {P} x {G} replies, {prompt_tokens} + {reply_tokens} tokens"
    yield from rows(setting, times, P * G * reply_tokens, "tokens/s",
                    {"TRL fp32": 2.5} if DEVICE == "cpu" else {"TRL bf16": 3.0}, notes)
    ours, theirs = (min((times[name].seconds for name in times if who in name and times[name].seconds),
                        key=median, default=None) for who in ("ours", "TRL"))
    if DEVICE == "cpu" and theirs:
        yield {"setting": setting, "who": "TRL's best, and our best", **ratio(theirs, ours, 2.9)}


def reward_of(ids):
    """A reward of 1 for about half of all replies, 0 for the others."""
    return float(sum(ids) % 2)


def our_step(model, optimizer, prompts, G, reply_tokens, precision, is_shared, notes):
    """A function that makes one step as train.py does and writes its measurements to `notes`."""
    group_prompts, n = (prompts, G) if is_shared else ([prompt for prompt in prompts for _ in range(G)], 1)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")

    def take_step():
        with autocast:
            rollouts = generate(model, group_prompts, n, max_new_tokens=reply_tokens, temperature=1.0,
                                stop_ids=(0,), seeds_P=prompt_seeds(0, 0, 0, len(group_prompts)))
        rewards_N = torch.tensor([reward_of(rollout.ids) for rollout in rollouts])
        adv_PG = group_advantages(rewards_N.view(-1, G)).view(-1, n)
        began = CLOCK()
        metrics = grpo_updates(model, None, optimizer, rollouts, adv_PG, temperature=1.0, vocab_size=None,
                               updates=1, kl_coef=0.0, clip_low=0.2, clip_high=0.2, grad_clip=1.0,
                               micro_batch_tokens=8192, autocast=autocast)
        notes.update(update_s=CLOCK() - began, logp_diff_mean=metrics["sampling/logp_diff_mean"],
                     logp_diff_max=metrics["sampling/logp_diff_max"])
        if DEVICE == "cuda":
            body = sum(p.numel() for p in model.layers.parameters()) * metrics["tokens"]
            head = model.head_weight().numel() * sum(len(rollout.ids) for rollout in rollouts)
            notes["mfu"] = 6 * (body + head) / notes["update_s"] / FLOPS

    return take_step


def prefix(rounds, shape, P, G, prompt_tokens, reply_tokens):
    """Log-probs and backward: groups packed as trees (each prompt once) against one prompt for each reply."""
    model = make_model(shape, DTYPE)
    prompts, replies = (random_ids(count, length, model.config.vocab_size)
                        for count, length in ((P, prompt_tokens), (P * G, reply_tokens)))
    tree = pack(prompts, [replies[p * G:(p + 1) * G] for p in range(P)]).to(DEVICE)
    plain = pack([prompts[i // G] for i in range(P * G)], [[reply] for reply in replies]).to(DEVICE)
    ends = range(0, len(plain.tokens_T) + 1, prompt_tokens + reply_tokens)

    def differentiate(packed, attend):
        model.zero_grad()
        hidden_LD = model(packed.tokens_T, packed.positions_T, attend)[packed.predictor_L]
        logp_L, _ = token_logprobs(hidden_LD, model.head_weight(), packed.targets_L, 1.0)
        logp_L.sum().backward()

    times = take_turns({"ours": lambda: differentiate(tree, shared_prefix_attention(tree.groups)),
                        "plain packed": lambda: differentiate(plain, packed_attention(ends))}, rounds)
    setting = f"{shape}, {P} x {G} replies, {prompt_tokens} + {reply_tokens} tokens"
    notes = {"plain packed": {"ceiling": len(plain.tokens_T) / len(tree.tokens_T)}}
    return rows(setting, times, P * G * reply_tokens, "tokens/s", {"plain packed": 3.3}, notes)


def run(rounds, shape, P, tools, reply_tokens):
    """Whole steps of train.py with configs/tool_n1_7b_1gpu.yaml, on random weights of a shape.

    A step has P prompts with `tools` tools each (16: about 900 tokens), 5 replies of at most `reply_tokens`
    tokens, one update and the KL reference. Each phase has a row; the first step does not count. Speed: reply
    tokens a second, in an update those of the trees. `peak_gib`, on a GPU: the peak of all its memory.
    """
    pool = synthetic(8 * tools, 1, "train")
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base"), Path(folder, "run")
        shutil.copytree(ROOT / "assets/tiny", base, ignore=shutil.ignore_patterns("*.safetensors"))
        (base / "config.json").write_text(json.dumps(config_of(shape).to_hf()), encoding="utf-8")
        examples = []
        for example in synthetic(P + 8, 0, "train"):
            by_name = {tool["name"]: tool for other in (example, *pool) for tool in other.tools}
            examples.append(replace(example, tools=list(by_name.values())[:tools]))
        write_jsonl(f"{folder}/train.jsonl", examples[:P])
        write_jsonl(f"{folder}/heldout.jsonl", examples[P:])
        settings = [f"--model.path={base}", "--model.init=random", f"--out={out}",
                    f"--data.train={folder}/train.jsonl", f"--data.heldout={folder}/heldout.jsonl",
                    "--data.system_prompt=configs/demo_prompt.txt", f"--train.steps={rounds + 1}",
                    f"--train.prompts_per_step={P}", "--train.updates_per_step=1",
                    f"--rollout.max_new_tokens={reply_tokens}", f"--eval.max_new_tokens={reply_tokens}"]
        # Nothing is saved: weights and moments of a 7B model are 91 GB.
        code = "import train; train.RunFolder.save_checkpoint = lambda run: None; train.main()"
        subprocess.run([sys.executable, "-c", code, "configs/tool_n1_7b_1gpu.yaml", *settings], cwd=ROOT,
                       check=True, stdout=sys.stderr)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/rollout_s" in line][1:]
    for phase in ("rollout", "update"):
        seconds = [line[f"time/{phase}_s"] for line in steps]
        work = [5 * P * line["length/mean"] if phase == "rollout" else line["tokens"] for line in steps]
        row = {"setting": f"{shape}, {P} x 5 replies, {tools} tools + {reply_tokens} tokens",
               "who": f"ours, {phase}", "seconds": median(seconds), "rounds": seconds, "unit": "tokens/s",
               "speed": median(n / s for n, s in zip(work, seconds, strict=True))}
        peak = max(line.get(f"memory/{phase}_gib", 0) for line in steps)
        yield row | ({"peak_gib": peak} if peak else {})


BENCHMARKS = {f.__name__: f for f in (logprob, decode, sampling, step, prefix, run)}
BENCHMARKS["decode_prompt"] = decode


def machine():
    """Hardware and versions, for the results."""
    details = {"processor": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "python": platform.python_version()}
    details |= {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    for package in ("torch", "triton", "transformers", "trl", "liger-kernel"):
        try:
            details[package] = version(package)
        except PackageNotFoundError:
            details[package] = "not installed"
    return details


def table(all_rows):
    """The rows as text, in columns."""
    lines = [["", "setting", "", "median", "speed", "ours is x times as fast", "bar", ""]]
    columns = ("benchmark", "setting", "who", "outcome", "seconds", "rounds", "speed", "unit", "x", "x_low",
               "x_high", "bar", "passes")
    for row in all_rows:
        notes = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                 for key, value in row.items() if key not in columns]
        lines.append([
            row["benchmark"], row["setting"], row["who"],
            f"{row['seconds']:.4g} s" if "seconds" in row else row.get("outcome", ""),
            f"{row['speed']:,.0f} {row['unit']}" if "speed" in row else "",
            f"{row['x']:.2f} ({row['x_low']:.2f} to {row['x_high']:.2f})" if "x" in row else "",
            f"{row['bar']} {'passed' if row['passes'] else 'MISSED'}" if "bar" in row else "",
            ", ".join(notes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure nanon1 side by side with its peers.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results", help="folder of JSON files")
    parser.add_argument("--show", action="store_true", help="measure nothing, show the files of --out")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {min(unknown)!r}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(1 if DEVICE == "cpu" else torch.get_num_threads())
    names = args.names or list(BENCHMARKS)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [] if args.show else names:
        result = {"what": " ".join(BENCHMARKS[name].__doc__.split()), "date": time.strftime("%Y-%m-%d"),
                  "command": f"python tools/bench.py {name} --rounds={args.rounds}",
                  "machine": machine(), "rows": []}
        for setting in SETTINGS[name][DEVICE]:
            setting_rows = BENCHMARKS[name](args.rounds, *setting)
            result["rows"] += [{"benchmark": name, **row} for row in setting_rows]
            write_json(args.out / f"{name}.json", result)
            gc.collect()  # a trainer and its model refer to each other
    files = [file for name in names if (file := args.out / f"{name}.json").exists()]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    machines = [", ".join(f"{key} {value}" for key, value in r["machine"].items()) for r in results]
    print(*dict.fromkeys(machines), table([row for r in results for row in r["rows"]]), sep="\n")


if __name__ == "__main__":
    main()
