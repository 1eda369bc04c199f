"""tools/minutes.py: operations against those that PyTorch's counter counts, times against those of real
steps, and the tables of docs/gpu.md."""

import contextlib
import math
import time
from dataclasses import replace
from statistics import median

import pytest
import torch
from expected import FIGURES
from test_tools_memory import DEEP, QWEN_05B, QWEN_7B, QWEN_15B, ROOT, ids, setup
from torch.utils.flop_counter import FlopCounterMode

import grpo
import train
from fast import paged_cache
from model import ModelConfig, Transformer
from sample import generate
from tools import minutes
from tools.minutes import H200, Machine, Op, decode_step, product, seconds_of, step_seconds

INF = math.inf
# Machines on which a second is a FLOP of a product, or of attention.
PRODUCTS, ATTENTION = Machine(1, 1, INF, INF, 0, 0, 0, 0), Machine(INF, INF, 1, INF, 0, 0, 0, 0)
UNTIED = ModelConfig(320, 64, 160, 2, 6, 2, 32)
SIZES = {"0.5B": QWEN_05B, "1.5B": QWEN_15B, "7B": QWEN_7B}


def count(function):
    """(FLOPs of products of weights, FLOPs of attention) of function(). PyTorch counts neither attention of a
    CPU, nor its mask; here a causal one counts half."""
    def forward(q, k, v, dropout=0.0, is_causal=False, **_):
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3] / (2 if is_causal else 1)

    def backward(grad, q, k, v, out, lse, dropout, is_causal, **_):
        return 2.5 * forward(q, k, v, is_causal=is_causal)

    aten = torch.ops.aten
    counter = FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: with_shapes(forward),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: with_shapes(backward)})
    with counter:
        function()
    found = counter.get_flop_counts()["Global"]
    return (sum(found.get(op, 0) for op in (aten.mm, aten.addmm)),
            sum(flops for op, flops in found.items() if op not in (aten.mm, aten.addmm)))


def with_shapes(function):
    """The counter passes shapes, and an output that is not needed here."""
    def counted(*args, out_shape=None, **options):
        return function(*args, **{key: value for key, value in options.items() if key == "is_causal"})
    return counted


def rollouts_of(model, prompts, prompt, n, reply):
    """Rollouts of equal lengths, and their advantages."""
    generator = torch.Generator().manual_seed(0)
    found = generate(model, [ids(prompt, model.config, generator) for _ in range(prompts)], n,
                     max_new_tokens=reply, temperature=1.0, stop_ids=(), seeds_P=range(prompts),
                     batch_size=12)
    return found, torch.randn(prompts, n, generator=generator)


def update(model, reference, optimizer, rollouts, adv, updates, micro_batch_tokens):
    train.grpo_updates(model, reference, optimizer, rollouts, adv, temperature=1.0, updates=updates,
                       kl_coef=0.1 if reference else 0.0, vocab_size=None, grad_clip=1.0,
                       micro_batch_tokens=micro_batch_tokens, autocast=contextlib.nullcontext(),
                       clip_low=0.2, clip_high=0.2)


@pytest.mark.parametrize("config, updates, reference, checkpointed, chunk", [
    (UNTIED, 1, False, False, None), (UNTIED, 3, True, True, None), (DEEP, 2, True, False, None),
    (DEEP, 1, False, True, 512 * 32)])
def test_counted_flops_are_those_of_a_step(config, updates, reference, checkpointed, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(grpo, "CHUNK_LOGITS", chunk)
    prompts, n, prompt, reply, tokens = 6, 4, 33, 10, 90  # two passes of 12 rows; a micro-batch a prompt
    model = Transformer(config).init_weights(0)
    model.checkpoint_blocks = checkpointed
    other = Transformer(config).init_weights(1) if reference else None
    s = setup(config, prompt=prompt, reply=reply, n=n, samplings=(("rollout", prompts, n, reply),),
              batch_size=12, updates=updates, micro_batch_tokens=tokens, checkpointed=checkpointed,
              reference="cpu" if reference else "none")
    made = []
    products, attention = count(lambda: made.append(rollouts_of(model, prompts, prompt, n, reply)))
    products -= 2 * config.hidden_size  # a row by a row, from which `generate` takes its dtype
    assert step_seconds(s, PRODUCTS, prompts, prompt, reply)["rollout"] == pytest.approx(products, rel=1e-9)
    # A cache on a CPU may also compute masked keys.
    assert step_seconds(s, ATTENTION, prompts, prompt, reply)["rollout"] == pytest.approx(attention, rel=0.25)

    rollouts, adv = made[0]
    optimizer = train.make_optimizer(model, 0.0, 0.9)
    products, attention = count(lambda: update(model, other, optimizer, rollouts, adv, updates, tokens))
    for machine, counted in ((PRODUCTS, products), (ATTENTION, attention)):
        planned = step_seconds(s, machine, prompts, prompt, reply)
        assert planned["update"] + planned["log-probs"] == pytest.approx(counted, rel=1e-9)
        assert bool(planned["log-probs"]) == (reference or updates > 1)


def test_planned_time_is_near_that_of_a_step():
    """Of processor time, the product and the steps in turns, so that the machine's pace cancels out. The
    bounds are wide: what is fitted to one CPU may be some way off on another. They catch a wrong factor."""
    config = ModelConfig(1280, 192, 512, 4, 6, 2, 32, tie_word_embeddings=True)  # the demo's
    prompts, n, prompt, reply = 3, 8, 200, 24
    model, ratios = Transformer(config).init_weights(0), []
    s = setup(config, prompt=prompt, reply=reply, n=n, samplings=(("rollout", prompts, n, reply),),
              batch_size=12, micro_batch_tokens=16384)
    optimizer, threads = train.make_optimizer(model, 0.0, 0.9), torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(4):
        pace = minutes.measured_pace(config, 3, time.process_time)
        began = time.process_time()
        update(model, None, optimizer, *rollouts_of(model, prompts, prompt, n, reply), 1, 16384)
        planned = step_seconds(s, minutes.cpu(pace), prompts, prompt, reply)
        ratios.append(sum(planned.values()) / (time.process_time() - began))
    torch.set_num_threads(threads)
    assert 0.4 < median(ratios[1:]) < 2.5, ratios


@pytest.mark.parametrize("B", [64, 256])
@pytest.mark.parametrize("size", SIZES)
def test_a_decode_step_of_a_gpu_is_as_expected(size, B):
    """Both are estimates: the share of the roofline in tests/expected.py, which was counted by hand."""
    s = on_gpu(size)
    c, context = s.model, 1024
    weights = minutes.sizes(c, 1).total - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    roofline = max(2 * weights / 4.3e12, 2 * weights * B / 790e12)
    roofline += B * context * minutes.kv_bytes(s) / 4.3e12
    expected, = (figure["expected"] for figure in FIGURES
                 if (figure["name"], figure["setting"]) == ("decode_share", f"{size}, B {B}"))
    seconds = seconds_of(decode_step(s, B, context), H200, thin=True)
    assert roofline / seconds == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("size", SIZES)
def test_log_probs_of_a_gpu_are_as_expected(size):
    s, L = on_gpu(size), 32768
    expected, = (figure["expected"] for figure in FIGURES
                 if (figure["name"], figure["setting"]) == ("tflops", f"{size},"))
    seconds = seconds_of(minutes.head(s, L, trained=True), H200)
    tflops = 8 * L * s.model.hidden_size * s.model.vocab_size / seconds / 1e12
    assert tflops == pytest.approx(expected, rel=0.12)


def test_ranks_share_the_work_and_a_part_of_the_groups_costs_a_part():
    s = replace(on_gpu("7B"), n=5, samplings=(("rollout", 64, 5, 512), ("evaluation", 32, 1, 512)),
                reference="cpu", micro_batch_tokens=4096)
    one, two = (step_seconds(replace(s, ranks=ranks), H200, 64, 900, 120) for ranks in (1, 2))
    assert one.keys() == two.keys() == {"rollout", "evaluation", "log-probs", "update"}
    assert all(0.5 <= two[name] / one[name] < 0.95 for name in one)
    half = step_seconds(s, H200, 64, 900, 120, live=0.5)
    assert half["log-probs"] == pytest.approx(one["log-probs"] / 2, rel=0.02)
    assert half["rollout"] == one["rollout"]
    longer = step_seconds(s, H200, 64, 900, 240)
    assert all(longer[name] > 1.05 * one[name] for name in one)


def test_waiting_rows_keep_the_slots_full():
    """Twice the rows in the same slots take less than twice the time, because fewer steps have few rows."""
    s = setup(QWEN_7B, batch_size=64, device="cuda", itemsize=2)
    few, many = (minutes.sampling_seconds(s, H200, P, 8, 4096, 900, 120) for P in (8, 16))
    assert 1.4 < many / few < 2
    bounded = minutes.sampling_seconds(replace(s, kv_gib=0.4), H200, 16, 8, 4096, 900, 120)
    assert bounded > 1.3 * many


def test_a_cpu_reads_a_prompt_once_a_group_unless_its_memory_is_bounded():
    memory_only = Machine(INF, INF, INF, 1, 0, 0, 0, 0)
    shared, paged = setup(UNTIED), setup(UNTIED, kv_gib=9)
    for P, n, shares in ((8, 8, True), (64, 1, False)):
        once, each = (minutes.sampling_seconds(s, memory_only, P, n, 10, 900, 10) for s in (shared, paged))
        assert once < 0.6 * each if shares else once == each


def on_gpu(size):
    return setup(SIZES[size], device="cuda", itemsize=2, sharded=True)


# The tables of docs/gpu.md.


def sharing_table():
    """Decode steps with and without a prompt that attention reads once a group, in the middle of a reply."""
    prompt, reply = 900, 120
    prefix, context = (prompt - 1) // paged_cache.PAGE * paged_cache.PAGE, prompt + reply // 2
    for size in SIZES:
        s = on_gpu(size)
        weights = minutes.sizes(s.model, 1).total
        if not s.model.tie_word_embeddings:
            weights -= s.model.vocab_size * s.model.hidden_size
        for B in (64, 256):
            for G in (5, 8):
                groups = -(-B // G)
                plain = B * context * minutes.kv_bytes(s)
                shared = (groups * prefix + B * (context - prefix)) * minutes.kv_bytes(s)
                before, after = (1000 * seconds_of(ops, H200, thin=True) for ops in (
                    decode_step(s, B, context), decode_step(s, B, context, prefix, groups)))
                in_gb = " | ".join(f"{number / 1e9:.1f}" for number in (2 * weights, plain, shared))
                yield f"| {size} | {B} | {G} | {in_gb} | {before:.1f} | {after:.1f} | {before / after:.2f} |"


def without(ops, old, new):
    """Operations of a decode step of the layers with those equal to `old` replaced by `new`."""
    kept = list(ops)
    for op in old:
        kept.remove(op)
    return kept + new


def fusions(s, B):
    """{name: operations that it replaces, operations in their place} in a step of B rows."""
    c = s.model
    D, F, H, K, E = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
                     c.head_dim)

    def elementwise(numbers, launches):
        return Op("pass", 0, 2 * B * numbers, launches).times(c.num_hidden_layers)

    def products(*shapes):
        return [product(B, *shape, 2).times(c.num_hidden_layers) for shape in shapes]

    draw = Op("pass", 0, minutes.DRAW_BYTES["cuda"] * B * c.vocab_size, 10)
    return {"merged weights of q, k, v and of gate, up": (
                products((D, H * E), (D, K * E), (D, K * E), (D, F), (D, F)),
                products((D, (H + 2 * K) * E), (D, 2 * F))),
            "rotation of q and k, one kernel": ([elementwise(8 * (H + K) * E, 6)],
                                                [elementwise(2 * (H + K) * E, 1)]),
            "sum and norm, one kernel": ([elementwise(10 * D, 4)], [elementwise(8 * D, 2)]),
            "silu · up, one kernel": ([elementwise(5 * F, 2)], [elementwise(3 * F, 1)]),
            "draw: one logarithm, a hash of 32 bits": ([draw], [draw._replace(bytes=draw.bytes / 2)])}


LINES = {"merged weights of q, k, v and of gate, up": 15, "rotation of q and k, one kernel": 15,
         "sum and norm, one kernel": 15, "silu · up, one kernel": 12,
         "draw: one logarithm, a hash of 32 bits": 10}


def fusion_table():
    """What each fusion takes off a decode step, in percent, the largest gain a line first."""
    rows = {}
    for name in LINES:
        for size, B in (("0.5B", 64), ("1.5B", 64), ("1.5B", 256), ("7B", 256)):
            s = on_gpu(size)
            ops, (old, new) = decode_step(s, B, 1024), fusions(s, B)[name]
            before, after = (seconds_of(each, H200, thin=True) for each in (ops, without(ops, old, new)))
            rows.setdefault(name, []).append(100 * (1 - after / before))
    for name in sorted(rows, key=lambda name: -sum(rows[name]) / LINES[name]):
        cells = " | ".join(f"{gain:.1f}" for gain in rows[name])
        yield f"| {name} | {LINES[name]} | {cells} |"


@pytest.mark.parametrize("table", [sharing_table, fusion_table])
def test_the_tables_in_the_docs_are_computed(table):
    assert "\n".join(table()) in (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
