"""Speed and accuracy, measured side by side with peers: `python tools/bench.py [NAME ...]`, by default all.

In:  nothing but the names: shapes are those of Qwen2.5 where there is a GPU, toys on a CPU. Out: a JSON file a
benchmark, with versions and hardware, written after each row so that a run cut short keeps what it has; a
table of all rows last.

Contenders take turns in one process, after a first round that warms up and is thrown away. What counts is
the ratio within a round, so that a machine that slows down slows all: `x` is how many times as fast ours is,
the median of the rounds, with the lowest and the highest. A peer that is not installed, or runs out of
memory, has a row that says so. Peers: the extra `peers`. A bar is what `x` must reach.

A benchmark is a generator of rows; its docstring says what it measures. Axes: as in grpo.py and sample.py.
"""

import argparse
import contextlib
import json

import os
import platform
import sys
import tempfile
import time

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grpo import (  # noqa: E402
    group_advantages,
    pack,
    token_logprobs,
    token_logprobs_reference,
)
from model import ModelConfig, Qwen2, packed_attention, shared_prefix_attention  # noqa: E402
from sample import fold, generate, gumbel_tokens, prompt_seeds, sample_tokens, uniform  # noqa: E402
from train import grpo_updates, logprobs_of_pack, make_optimizer, set_learning_rate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BANDWIDTH, FLOPS = 4.3e12, 989e12  # of an H200: bytes/s as measured, bf16 FLOP/s as its data sheet says
# width, width of the MLP, layers, heads, key/value heads, head size, rows of the vocabulary, tied
SHAPES = {"tiny": (128, 384, 4, 4, 2, 32, 2048, True),
          "0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
          "1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
          "7B": (3584, 18944, 28, 28, 4, 128, 152064, False)}
# What each benchmark measures, by device: its arguments, one tuple a setting.
SETTINGS = {
    "logprob": {"cpu": [("tiny", 2048)],  # shape, N reply tokens
                "cuda": [("1.5B", 32768), ("7B", 32768), ("0.5B", 32768)]},
    "decode": {"cpu": [("tiny", 8, 8, 128, 128)],  # shape, P, G, prompt tokens, reply tokens
               "cuda": [(shape, B // 8, 8, 896, 256) for shape in ("1.5B", "0.5B", "7B") for B in (64, 256)]},
    "sampling": {"cpu": [(64, 2048)], "cuda": [(64, 151936), (256, 151936)]},  # B, V
    "step": {"cpu": [("tiny", 8, 8, 64, 64)], "cuda": [("0.5B", 8, 8, 896, 128), ("1.5B", 8, 8, 896, 128)]},
    "prefix": {"cpu": [("tiny", 1, 8, 900, 120)], "cuda": [("1.5B", 4, 8, 900, 120)]},
}
BARS = {"cpu": {"decode": {"transformers": 1.7}, "prefix": {"plain packed": 3.3},
                "step": {"TRL fp32": 1.6, "best against best": 2.5}},
        "cuda": {"logprob": {"naive": 0.87, "torch.compile": 1.0, "Liger": 2.0}, "step": {"TRL bf16": 3.0},
                 "decode": {"transformers": 8.0}, "prefix": {}}}


@dataclass
class Times:
    """What a contender took: `seconds` of each round and GPU memory above what was held, or why it did not."""

    seconds: list = field(default_factory=list)
    peak_gib: float | None = None
    failed: str | None = None


def take_turns(contenders, rounds):
    """{name: Times} of contenders called in turns, each a function or the reason why there is none.

    A function may return a number: its own seconds, where something that does not count comes before.
    """
    times = {name: Times(failed=run if isinstance(run, str) else None) for name, run in contenders.items()}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            if times[name].failed:
                continue
            try:
                seconds, peak_gib = timed(run)
            except torch.OutOfMemoryError:
                times[name].failed = "out of memory"
                continue
            if turn > 0:
                times[name].seconds.append(seconds)
                times[name].peak_gib = peak_gib
    return times


def timed(run):
    """(seconds, peak memory in GiB above what was held before, on a GPU) of one call."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    began = time.perf_counter()
    own = run()
    if DEVICE != "cuda":
        return own or time.perf_counter() - began, None
    torch.cuda.synchronize()
    seconds = own or time.perf_counter() - began
    return seconds, (torch.cuda.max_memory_allocated() - held) / 2**30


def rows(setting, times, work, unit, bars, notes=None, ours="ours"):
    """A row a contender: median seconds, work a second, how many times as fast `ours` is, notes."""
    for name, found in times.items():
        row = {"setting": setting, "who": name, **(notes or {}).get(name, {})}
        if found.failed:
            yield {**row, "failed": found.failed}
            continue
        row |= {"seconds": median(found.seconds), "all_seconds": found.seconds, "unit": unit,
                "speed": work / median(found.seconds)}
        if found.peak_gib is not None:
            row["peak_gib"] = found.peak_gib
        if name != ours and times[ours].seconds:
            row |= ratio(found.seconds, times[ours].seconds, bars.get(name))
        yield row


def ratio(theirs, ours, bar=None):
    """`x`, how many times as fast ours is: median, lowest and highest of the rounds."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    row = {"x": median(ratios), "x_low": min(ratios), "x_high": max(ratios)}
    return row | ({"bar": bar, "passes": row["x"] >= bar} if bar else {})


def missing(package, error):
    """The reason that stands in the row of a peer, told once on stderr too."""
    print(f"{package} is not installed ({error}): pip install nanon1[peers], or its packages", file=sys.stderr)
    return "not installed"


def make_model(shape, dtype):
    """Qwen2 of a shape with random weights, made on the device."""
    D, I, layers, H, K, E, V, tied = SHAPES[shape]
    config = ModelConfig(V, D, I, layers, H, K, E, tie_word_embeddings=tied)
    torch.manual_seed(0)
    with torch.device(DEVICE), default_dtype(dtype):
        model = Qwen2(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else None
    return model


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def hf_model(model, share=True):
    """The Qwen2 of transformers with the weights of `model`: the same tensors, or copies of them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    settings = {key: value for key, value in model.config.to_hf().items() if key != "architectures"}
    weights = {name if name.startswith("lm_head") else f"model.{name}": tensor.detach()
               for name, tensor in model.state_dict().items()}
    with torch.device(DEVICE), default_dtype(model.norm.weight.dtype):
        # No token ends a reply: in a benchmark all are as long.
        peer = Qwen2ForCausalLM(Qwen2Config(**settings, eos_token_id=None, bos_token_id=None))
    if not share:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    peer.load_state_dict(weights, strict=False, assign=True)
    peer.tie_weights()
    return peer


def random_ids(count, length, vocab_size):
    """`count` lists of `length` ids, the same each time."""
    return torch.randint(1, vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def disagreement(model, rollouts, n, temperature, most_tokens=2**14):
    """Mean and maximum of |log-prob of the sampler - log-prob of the trainer|, over the first groups."""
    groups = max(1, most_tokens // sum(len(r.prompt_ids) // n + len(r.ids) for r in rollouts[:n]))
    rollouts = rollouts[:groups * n]
    tree = pack([r.prompt_ids for r in rollouts[::n]],
                [[r.ids for r in rollouts[i:i + n]] for i in range(0, len(rollouts), n)]).to(DEVICE)
    with torch.no_grad():
        logp_L, _ = logprobs_of_pack(model, tree, temperature, None, contextlib.nullcontext())
    sampled_L = torch.tensor([logp for rollout in rollouts for logp in rollout.logp], device=DEVICE)
    diff_L = (logp_L - sampled_L).abs()
    return {"logp_diff_mean": diff_L.mean().item(), "logp_diff_max": diff_L.max().item()}


def logprob(rounds):
    """Token log-probs, forward and backward, T = 0.7, with entropy: the head at the shapes of Qwen2.5.

    TFLOP/s count 8NDV for all: what is done where logits are made again in backward. `extra_gib` is the peak
    beyond the gradients of hidden states and of an fp32 weight. Errors are against fp64 over 2,048 tokens: the
    mean of |Δ log p|, and |Δ| / |.| of both gradients. "naive" holds all logits at once.
    """
    for shape, N in SETTINGS["logprob"][DEVICE]:
        D, V = SHAPES[shape][0], SHAPES[shape][6]
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        torch.manual_seed(0)
        hidden_LD = torch.randn(N, D, device=DEVICE, dtype=dtype).requires_grad_()
        weight_VD = (torch.randn(V, D, device=DEVICE) * 0.02).to(dtype).requires_grad_()
        targets_L = torch.randint(V, (N,), device=DEVICE)
        functions = {"ours": token_logprobs, "reference": token_logprobs_reference,
                     "torch.compile": torch.compile(token_logprobs_reference, dynamic=False),
                     "naive": naive_logprobs, "Liger": liger_logprobs()}

        def one(function, n=N, hidden_LD=hidden_LD, weight_VD=weight_VD, targets_L=targets_L):
            hidden_LD.grad = weight_VD.grad = None
            logp_L, _ = function(hidden_LD[:n], weight_VD, targets_L[:n], 0.7)
            (logp_L.sum() if logp_L.dim() else logp_L).backward()
            return logp_L.detach(), hidden_LD.grad, weight_VD.grad

        def contender(function, one=one):
            return function if isinstance(function, str) else lambda: one(function) and None

        times = take_turns({name: contender(function) for name, function in functions.items()}, rounds)
        few, notes = min(N, 2048), {}
        exact = [x.detach().double().requires_grad_() for x in (hidden_LD[:few], weight_VD)]
        wanted = one(token_logprobs_reference, few, *exact)
        for name, function in functions.items():
            if not times[name].failed:
                logp_L, dhidden_LD, dweight_VD = one(function, few)
                notes[name] = {"tflops": 8 * N * D * V / median(times[name].seconds) / 1e12,
                               "dhidden_error": relative_error(dhidden_LD[:few], wanted[1]),
                               "dweight_error": relative_error(dweight_VD, wanted[2])}
                if logp_L.dim():
                    notes[name]["logp_error"] = (logp_L - wanted[0]).abs().mean().item()
                if times[name].peak_gib is not None:
                    gradients = (N * D * hidden_LD.element_size() + 4 * V * D) / 2**30
                    notes[name]["extra_gib"] = times[name].peak_gib - gradients
        del exact, wanted
        yield from rows(f"{shape}, N {N}", times, N, "tokens/s", BARS[DEVICE].get("logprob", {}), notes)


def relative_error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def naive_logprobs(hidden_LD, weight_VD, targets_L, temperature):
    logp_LV = torch.log_softmax((hidden_LD @ weight_VD.T).float() / temperature, -1)
    with torch.no_grad():
        entropy_L = -(logp_LV.exp() * logp_LV).sum(-1)
    return logp_LV.gather(1, targets_L[:, None])[:, 0], entropy_L


def liger_logprobs():
    """Liger's GRPO loss, which gives no log-probs: with advantages of -1 its gradients are those of their sum."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except (ImportError, RuntimeError) as error:
        return missing("liger-kernel", error)

    def loss(hidden_LD, weight_VD, targets_L, temperature):
        B = max(1, len(targets_L) // 1024)
        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, temperature=temperature, loss_type="bnpo")
        targets_BT = targets_L.view(B, -1)
        value, _ = loss(hidden_LD.view(B, -1, hidden_LD.shape[1]), weight_VD, targets_BT,
                        torch.ones_like(targets_BT), -torch.ones(B, device=targets_L.device))
        return value * len(targets_L), None

    return loss


def decode(rounds):
    """Rollouts: `generate` against transformers', all replies of full length, temperature 1.

    Seconds are those of the whole call, prefill and graph capture included. `decode_share`: the part of the
    memory roofline that decoding alone reaches on a GPU, from the difference of a long and a short call; the
    roofline is the bytes of weights, keys and values that each step must read at 4.3 TB/s.
    """
    for shape, P, G, prompt_tokens, R in SETTINGS["decode"][DEVICE]:
        model = make_model(shape, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
        prompts, last, short = random_ids(P, prompt_tokens, model.config.vocab_size), [], []

        def ours(tokens=R, model=model, prompts=prompts, G=G, P=P, last=last):
            last[:] = generate(model, prompts, G, max_new_tokens=tokens, temperature=1.0, stop_ids=(),
                               seeds_P=prompt_seeds(0, 0, 0, P))

        def brief(ours=ours, short=short):  # as many tokens as are decoded at least
            short.append(timed(lambda: ours(8))[0])

        times = take_turns({"ours": ours, "transformers": hf_generate(model, prompts, G, R)}, rounds)
        notes = disagreement(model, last, G, 1.0)
        if DEVICE == "cuda" and times["ours"].seconds:
            brief(), brief()
            per_step = (median(times["ours"].seconds) - min(short)) / (R - 8)
            notes |= {"decode_tokens_s": P * G / per_step,
                      "decode_share": roofline_seconds(model, P * G, prompt_tokens + R / 2) / per_step}
        bars = BARS[DEVICE]["decode"] if shape != "7B" else {"transformers": 3.0}
        yield from rows(f"{shape}, B {P * G}, {prompt_tokens} + {R} tokens", times, P * G * R, "tokens/s",
                        bars, {"ours": notes})
        del model, ours, brief, times


def hf_generate(model, prompts, G, R):
    try:
        peer = hf_model(model).eval()
    except (ImportError, RuntimeError) as error:
        return missing("transformers", error)
    prompts_BT = torch.tensor(prompts, device=DEVICE).repeat_interleave(G, 0)

    def theirs():
        peer.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=R, pad_token_id=0,
                      do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    return theirs


def roofline_seconds(model, B, context):
    """The least a decoding step of B rows can take: what it must read over the memory's bandwidth."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * context * B
    return 2 * (weights + kv) / BANDWIDTH


def sampling(rounds):
    """One token a row from logits [B, V]: ours against `multinomial` and against sorting, as for top-p."""
    for B, V in SETTINGS["sampling"][DEVICE]:
        logits_BV = torch.randn(B, V, device=DEVICE, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32)
        key_B = prompt_seeds(0, 0, 0, B).to(DEVICE)
        calls = 100

        def ours(i, logits_BV=logits_BV, key_B=key_B):
            if DEVICE == "cuda":
                return gumbel_tokens(logits_BV, 1.0, fold(key_B, i))
            return sample_tokens(logits_BV, 1.0, uniform(key_B, i))

        def multinomial(_, logits_BV=logits_BV):
            logp_BV = torch.log_softmax(logits_BV.float(), -1)
            ids_B1 = torch.multinomial(logp_BV.exp(), 1)
            return ids_B1[:, 0], logp_BV.gather(1, ids_B1)[:, 0]

        def by_sorting(_, logits_BV=logits_BV):
            logp_BV, order_BV = torch.log_softmax(logits_BV.float(), -1).sort(-1, descending=True)
            p_BV = logp_BV.exp()
            ids_B1 = torch.multinomial(p_BV.where(p_BV.cumsum(-1) - p_BV < 0.9999, 0.0), 1)
            return order_BV.gather(1, ids_B1)[:, 0], logp_BV.gather(1, ids_B1)[:, 0]

        def many(draw, calls=calls):
            return lambda: [draw(i) for i in range(calls)] and None

        times = take_turns({"ours": many(ours), "multinomial": many(multinomial), "sort": many(by_sorting)}, rounds)
        seconds = median(times["ours"].seconds) / calls
        gb_s = logits_BV.nbytes / seconds / 1e9
        yield from rows(f"B {B}, V {V}, {calls} calls", times, B * calls, "tokens/s", {}, {"ours": {"gb_s": gb_s}})


def step(rounds):
    """A whole GRPO step: rollouts, reward, log-probs, backward, AdamW; ours against TRL's trainer.

    TRL generates with transformers and takes its log-probs in its own fused head, which has replaced Liger's
    loss. Ours without the shared prefix takes every reply for a group of its own, in rollouts and update.
    Replies end at the length limit, but for a stop token by chance. `mfu`, of the update on a GPU: 6 FLOPs a
    parameter and token of the tree, the head on reply tokens only, attention not counted, over 989 TFLOP/s.
    """
    for shape, P, G, prompt_tokens, R in SETTINGS["step"][DEVICE]:
        size = (P, G, prompt_tokens, R)
        contenders, notes = {}, {}
        for precision in ("bf16",) if DEVICE == "cuda" else ("fp32", "bf16"):
            name = "ours" if not contenders else f"ours {precision}"
            notes[name], notes[f"{name}, no shared prefix"] = {"precision": precision}, {"precision": precision}
            model = make_model(shape, torch.float32)
            optimizer = make_optimizer(model, 0.0, 0.999)
            contenders[name] = our_step(model, optimizer, *size, precision, True, notes[name])
            contenders[f"{name}, no shared prefix"] = our_step(model, optimizer, *size, precision, False, {})
            contenders[f"TRL {precision}"] = trl_step(make_model(shape, torch.float32), *size, precision)
        times = take_turns(contenders, rounds)
        setting = f"{shape}, {P} x {G} replies, {prompt_tokens} + {R} tokens"
        bars = BARS[DEVICE]["step"]
        yield from rows(setting, times, P * G * R, "tokens/s", bars, notes)
        best = {who: min((n for n in times if n.startswith(who) and times[n].seconds), default=None,
                         key=lambda n, times=times: median(times[n].seconds)) for who in ("ours", "TRL")}
        if DEVICE == "cpu" and all(best.values()):
            yield {"setting": f"{setting}: {best['ours']} and {best['TRL']}", "who": "best against best",
                   **ratio(times[best["TRL"]].seconds, times[best["ours"]].seconds, bars["best against best"])}
        del contenders, model, optimizer


def reward_of(ids):
    """A reward that about half of all replies earn."""
    return float(sum(ids) % 2)


def our_step(model, optimizer, P, G, prompt_tokens, R, precision, share, notes):
    prompts = random_ids(P, prompt_tokens, model.config.vocab_size)
    autocast = torch.autocast(DEVICE, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    set_learning_rate(optimizer, 1e-6)
    asked, n = (prompts, G) if share else ([prompt for prompt in prompts for _ in range(G)], 1)

    def one():
        with autocast:
            rollouts = generate(model, asked, n, max_new_tokens=R, temperature=1.0, stop_ids=(0,),
                                seeds_P=prompt_seeds(0, 0, 0, len(asked)))
        rewards_PG = torch.tensor([reward_of(rollout.ids) for rollout in rollouts]).view(P, G)
        began = time.perf_counter()
        metrics = grpo_updates(model, None, optimizer, rollouts, group_advantages(rewards_PG).view(-1, n),
                               temperature=1.0, vocab_size=None, updates=1, kl_coef=0.0, clip_low=0.2,
                               clip_high=0.2, grad_clip=1.0, micro_batch_tokens=8192, autocast=autocast)
        notes["update_s"] = time.perf_counter() - began
        notes["logp_diff_mean"] = metrics["sampling/logp_diff_mean"]
        notes["logp_diff_max"] = metrics["sampling/logp_diff_max"]
        if DEVICE == "cuda":
            c, layers = model.config, sum(p.numel() for p in model.layers.parameters())
            flops = 6 * layers * metrics["tokens"] + 6 * c.vocab_size * c.hidden_size * P * G * R
            notes["mfu"] = flops / notes["update_s"] / FLOPS

    return one


def trl_step(model, P, G, prompt_tokens, R, precision):
    """TRL's GRPOTrainer for one step a call; what its trainer sets up before a step is not counted."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except (ImportError, RuntimeError) as error:
        return missing("trl", error)
    V = model.config.vocab_size
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    prompts = [" ".join(f"w{i}" for i in ids) for ids in random_ids(P, prompt_tokens, V)]
    at_once = P * G if DEVICE == "cpu" else 8
    args = GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=at_once, gradient_accumulation_steps=P * G // at_once,
        num_generations=G, max_completion_length=R, temperature=1.0, top_k=0, learning_rate=1e-6, beta=0.0,
        max_steps=1, bf16=precision == "bf16", use_cpu=DEVICE == "cpu", gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    clock = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock["began"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            clock["seconds"] = time.perf_counter() - clock["began"]

    peer = hf_model(model, share=False)
    peer.generation_config.eos_token_id = 0
    trainer = GRPOTrainer(peer, lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids], args,
                          train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
                          callbacks=[Clock()])

    def one():
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            trainer.train()
        return clock["seconds"]

    return one


def prefix(rounds):
    """Log-probs and backward of groups as trees, each prompt once, against every reply with its own prompt."""
    for shape, P, G, prompt_tokens, R in SETTINGS["prefix"][DEVICE]:
        model = make_model(shape, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
        prompts, replies = (random_ids(count, length, model.config.vocab_size)
                            for count, length in ((P, prompt_tokens), (P * G, R)))
        tree = pack(prompts, [replies[p * G:(p + 1) * G] for p in range(P)]).to(DEVICE)
        plain = pack([prompts[i // G] for i in range(P * G)], [[reply] for reply in replies]).to(DEVICE)

        def one(packed, attend, model=model):
            def run():
                model.zero_grad()
                hidden_TD = model(packed.tokens_T, packed.positions_T, attend)
                logp_L, _ = token_logprobs(hidden_TD[packed.predictor_L], model.head_weight(), packed.targets_L, 1.0)
                logp_L.sum().backward()
            return run

        bounds = range(0, P * G * (prompt_tokens + R) + 1, prompt_tokens + R)
        contenders = {"ours": one(tree, shared_prefix_attention(tree.groups)),
                      "plain packed": one(plain, packed_attention(bounds))}
        times = take_turns(contenders, rounds)
        yield from rows(f"{shape}, P {prompt_tokens}, R {R}, G {G}", times, P * G * R, "reply tokens/s",
                        BARS[DEVICE]["prefix"], {"ours": {"ceiling": G * (prompt_tokens + R) / (prompt_tokens + G * R)}})


BENCHMARKS = {"logprob": logprob, "decode": decode, "sampling": sampling, "step": step, "prefix": prefix}


def machine():
    """Hardware and versions, as they go into the results."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = {"processor": (names or [platform.machine()])[0], "cores": os.cpu_count(),
             "threads": torch.get_num_threads(), "python": platform.python_version()}
    if DEVICE == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "triton", "transformers", "trl", "liger-kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def cells(row):
    """A row of results as it stands in the table."""
    if "failed" in row:
        return [row["benchmark"], row["setting"], row["who"], row["failed"], "", "", ""]
    x = f"{row['x']:.2f} ({row['x_low']:.2f} to {row['x_high']:.2f})" if "x" in row else ""
    bar = f"{row['bar']} {'pass' if row['passes'] else 'MISSED'}" if "bar" in row else ""
    known = {"benchmark", "setting", "who", "seconds", "all_seconds", "unit", "speed", "x", "x_low", "x_high", "bar",
             "passes"}
    notes = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in row.items() if key not in known]
    seconds = f"{row['seconds']:.4g} s" if "seconds" in row else ""
    speed = f"{row['speed']:,.0f} {row['unit']}" if "speed" in row else ""
    return [row["benchmark"], row["setting"], row["who"], seconds, speed, x, bar, ", ".join(notes)]


def table(found):
    """All rows in columns as wide as they need to be."""
    lines = [["", "setting", "", "median", "speed", "ours is x times as fast", "bar", ""], *map(cells, found)]
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=False)).rstrip()
                     for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure nanon1 side by side with its peers.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results", help="folder of the JSON files")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {min(unknown)!r}; there are {', '.join(BENCHMARKS)}")
    if DEVICE == "cpu":
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    everything = []
    for name in args.names or BENCHMARKS:
        result = {"what": " ".join(BENCHMARKS[name].__doc__.split()), "date": time.strftime("%Y-%m-%d"),
                  "command": f"python tools/bench.py {name} --rounds={args.rounds}", "machine": machine(), "rows": []}
        for row in BENCHMARKS[name](args.rounds):
            result["rows"].append({"benchmark": name, **row})
            print("  ".join(filter(None, cells(result["rows"][-1]))), flush=True)
            (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        everything += result["rows"]
    print(f"\n{', '.join(f'{key} {value}' for key, value in machine().items())}\n\n{table(everything)}")


if __name__ == "__main__":
    main()
