"""tools/memory.py compared with measurements: tensors that autograd saves, peaks of phases of training.

A peak on a CPU is that of PyTorch's allocator, computed from the allocations and frees that its profiler
records. It is exact and the same on every machine. The ranks are those of a "fake" process group, which moves
no data; FSDP allocates the same memory there as with real ranks.
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import grpo
import sample
import train
from fast import aligned_cache, paged_cache
from grpo import pack
from model import ModelConfig, Transformer, save_hf
from runtime import metrics, sharding
from runtime import ranks as ranks_module
from runtime.adapters import add_adapters, fill_adapters
from sample import Prompt, Rollout, Row, generate
from tools import memory

ROOT = Path(__file__).parent.parent
QWEN_7B = ModelConfig(152064, 3584, 18944, 28, 28, 4, 128, tie_word_embeddings=False)
QWEN_14B = ModelConfig(152064, 5120, 13824, 48, 40, 8, 128, tie_word_embeddings=False)
QWEN_05B = ModelConfig(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True)
QWEN_15B = ModelConfig(151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True)
NULL = contextlib.nullcontext()
DEEP = ModelConfig(512, 128, 384, 4, 4, 2, 40)  # most of the memory is activations of blocks
WIDE = ModelConfig(8192, 256, 512, 2, 4, 2, 64)  # embedding and head
FLAT = ModelConfig(4096, 64, 128, 2, 2, 2, 32)  # logits
BLOCKS = ModelConfig(256, 192, 768, 4, 4, 2, 48)  # weights of blocks


def peak_of(function):
    """Bytes of tensors at the peak of function(), beyond those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bytes_of(tensors):
    storages = (getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def setup(config, **changes):
    defaults = {"prompt": 0, "reply": 0, "n": 1, "samplings": (), "batch_size": 256, "kv_gib": None,
                "updates": 1, "micro_batch_tokens": 0, "checkpointed": False, "reference": "none", "ranks": 1,
                "sharded": False, "device": "cpu", "itemsize": 4}
    return memory.Setup(config, **defaults | changes)


def ids(count, config, generator):
    return torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()


def make_update(config, prompt, reply, n, prompts, micro_batch_tokens, model, reference):
    """(optimizer, a function that makes one update on the first prompts, by default on all). All prompts have
    one length, and so have all replies.
    """
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for _ in range(prompts):
        prompt_ids = ids(prompt, config, generator)
        rollouts += [Rollout(prompt_ids, ids(reply, config, generator), [-1.0] * reply) for _ in range(n)]
    adv_PG = torch.randn(prompts, n, generator=generator)
    optimizer = train.make_optimizer(model, 0.01, 0.999)

    def update(prompts=prompts):
        train.grpo_updates(model, reference, optimizer, rollouts[:prompts * n], adv_PG[:prompts],
                           temperature=1.0, vocab_size=None, updates=1, kl_coef=1e-3 if reference else 0.0,
                           clip_low=0.2, clip_high=0.2, grad_clip=1.0,
                           micro_batch_tokens=micro_batch_tokens, autocast=NULL)

    return optimizer, update


def planned_update(s, prompt, reply, n):
    moments = memory.update_memory(s, memory.Shape.of([(prompt, [reply] * n)] * (s.micro_batch_tokens // (
        prompt + n * reply))))
    return max(map(memory.total, moments.values()))


def measured_and_planned(s, model, reference, prompt=120, reply=40, n=4, prompts=4):
    """Bytes at the peak of an update, measured and planned. s: a Setup without lengths."""
    model.checkpoint_blocks = s.checkpointed
    tokens = 2 * (prompt + n * reply)
    s = replace(s, micro_batch_tokens=tokens, reference="cuda" if reference else "none")
    optimizer, update = make_update(s.model, prompt, reply, n, prompts * s.ranks, tokens, model, reference)
    update(s.ranks)  # AdamW creates its moments in the first update, a short one
    others = reference.parameters() if reference not in (None, model) else ()
    held = bytes_of([*model.parameters(), *others])
    held += bytes_of(tensor for state in optimizer.state.values() for tensor in state.values())
    return held + peak_of(update), planned_update(s, prompt, reply, n)


def with_adapters(model, rank):
    add_adapters(model, rank, 16)
    fill_adapters(model, 0)
    return model


@pytest.mark.parametrize("lora_rank", [None, 6])
@pytest.mark.parametrize("config", [DEEP, WIDE, replace(DEEP, num_key_value_heads=4, head_dim=64)])
def test_activations_are_what_autograd_saves(config, lora_rank):
    model, generator = Transformer(config).init_weights(0), torch.Generator().manual_seed(0)
    if lora_rank:
        with_adapters(model, lora_rank)
    groups = [(70, [30, 41, 1]), (33, [20]), (90, [5, 4, 60])]
    batch = pack([ids(prompt, config, generator) for prompt, _ in groups],
                 [[ids(reply, config, generator) for reply in replies] for _, replies in groups])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = []

    def save(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(batch.tokens_T, batch.positions_T, train.shared_prefix_attention(batch.groups))
    x = memory.Shape.of(groups)
    blocks = memory.saved_by_block(setup(config, lora_rank=lora_rank), x) + 4 * x.T * config.hidden_size
    norm = 4 * x.T * (2 * config.hidden_size + 1)  # the last one
    rotary, tokens = 4 * x.T * 2 * config.head_dim, 8 * x.T
    planned = config.num_hidden_layers * blocks + norm + rotary + tokens + 4 * x.mask
    if lora_rank:  # the first block gets no gradient for its input, and frozen norms save less
        assert bytes_of(saved) < planned < 1.2 * bytes_of(saved)
    else:
        assert bytes_of(saved) == planned


@pytest.mark.parametrize("config, checkpointed, with_reference", [
    (DEEP, False, False), (DEEP, True, True), (WIDE, False, True), (FLAT, False, True),
    (replace(WIDE, tie_word_embeddings=True), False, False), (BLOCKS, True, False)])
def test_peak_of_an_update_on_a_cpu(config, checkpointed, with_reference):
    model = Transformer(config).init_weights(0)
    reference = Transformer(config).init_weights(0).requires_grad_(False) if with_reference else None
    measured, planned = measured_and_planned(setup(config, checkpointed=checkpointed), model, reference)
    assert planned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("config, checkpointed, with_reference", [
    (DEEP, False, True), (BLOCKS, True, False), (WIDE, False, False), (FLAT, True, True)])
def test_peak_of_an_update_with_adapters(config, checkpointed, with_reference):
    model = with_adapters(Transformer(config).init_weights(0), 8)
    s = setup(config, checkpointed=checkpointed, lora_rank=8)
    measured, planned = measured_and_planned(s, model, model if with_reference else None)
    assert 0.97 * measured < planned < 1.1 * measured


def test_peak_of_an_update_with_logits_in_chunks(monkeypatch):
    monkeypatch.setattr(grpo, "CHUNK_LOGITS", 50 * FLAT.vocab_size)
    measured, planned = measured_and_planned(setup(FLAT), Transformer(FLAT).init_weights(0), None)
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.fixture
def ranks(request, monkeypatch):
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    for module in (ranks_module, metrics, train):
        monkeypatch.setattr(module, "all_gather", lambda value: [value] * request.param)
    yield request.param
    dist.destroy_process_group()


ON_SHARDS = [
    (DEEP, False, {}), (DEEP, True, {}), (WIDE, True, {"prompt": 5, "reply": 3, "n": 2}),
    (BLOCKS, True, {"prompt": 20, "reply": 10, "n": 2}),
    (replace(WIDE, tie_word_embeddings=True), False, {"prompt": 20, "reply": 10, "n": 2})]


# Two ranks differ from eight in the size of a shard only: two run only the cases where weights dominate.
@pytest.mark.parametrize("ranks, config, checkpointed, lengths", [
    (ranks, *case) for ranks, cases in ((1, ON_SHARDS), (2, ON_SHARDS[3:]), (8, ON_SHARDS)) for case in cases
], indirect=["ranks"])
def test_peak_of_an_update_on_shards(ranks, config, checkpointed, lengths, tmp_path, monkeypatch):
    save_hf(Transformer(config).init_weights(0), tmp_path)
    # The fake group leaves received tensors uninitialised; a NaN among them would skip the update.
    monkeypatch.setattr(torch, "isfinite", lambda norm: torch.tensor(True))
    model, reference = (train.load_model(tmp_path, "cpu", False, trained) for trained in (True, False))
    s = setup(config, checkpointed=checkpointed, ranks=ranks, sharded=True)
    measured, planned = measured_and_planned(s, model, reference, **lengths)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("prompts, prompt, reply, slots", [
    (8, 100, 15, 32), (2, 30, 45, 8), (16, 650, 10, 32), (8, 40, 20, 32), (8, 200, 60, 32)])
def test_peak_of_a_rollout_on_a_cpu(prompts, prompt, reply, slots, monkeypatch):
    """The cache has room from the start; it grows; prefill takes several passes and the rows two rounds; the
    replies fill the room exactly; prompts are shared and replies grow.
    """
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 2000)
    monkeypatch.setattr(aligned_cache, "FIRST_ROOM", 20)
    config = replace(DEEP, hidden_size=128, intermediate_size=256)
    model, generator = Transformer(config).init_weights(0), torch.Generator().manual_seed(0)
    prompts_P = [ids(prompt, config, generator) for _ in range(prompts)]

    def rollout():
        generate(model, prompts_P, 4, max_new_tokens=reply, temperature=1.0, stop_ids=set(),
                 seeds_P=list(range(prompts)), batch_size=slots)

    s = setup(config, prompt=prompt, batch_size=slots)
    parts = memory.sampling_memory(s, prompts, 4, reply) | {memory.MOMENTS: 0}
    assert memory.total(parts) == pytest.approx(bytes_of(model.parameters()) + peak_of(rollout), rel=0.05)


def test_keys_and_values_have_the_size_of_the_caches(monkeypatch):
    s, row = setup(DEEP, prompt=100, batch_size=6), 100 + 60 - 1
    cpu, prompts = torch.device("cpu"), [Prompt([0] * 100, 3) for _ in range(2)]
    rows = [Row(0, None, prompt, 0, row) for prompt in prompts for _ in range(3)]
    for worth in (0, math.inf):
        monkeypatch.setattr(aligned_cache, "WORTH_SHARING", worth)
        cache = aligned_cache.Cache(DEEP, torch.float32, cpu, 6, rows, row, 1, None, "cpu")
        held = [x for x in (cache.keys, cache.values, cache.shared) if x is not None]
        assert memory.sampling_memory(s, 2, 3, 60)[memory.KV] == bytes_of(held)
    for gib in (0.0016, 1.0):  # fewer pages than all rows need, and more than that
        pool = paged_cache.Cache(DEEP, torch.float32, cpu, 6, rows, row, 1, gib, "cpu").pool
        assert memory.sampling_memory(replace(s, kv_gib=gib), 2, 3, 60)[memory.KV] == pool.nbytes


def test_keys_and_values_take_all_free_memory_but_the_margin():
    s = setup(QWEN_7B, prompt=900, device="cuda", sharded=True, ranks=8, itemsize=2)
    parts = memory.sampling_memory(s, 1024, 5, 8192, free=78 * memory.GIB)
    static = sum(parts[part] for part in (memory.SHARD, memory.WHOLE, memory.MOMENTS))
    left = 78 * memory.GIB - static - parts[memory.KV]
    assert left / memory.GIB == pytest.approx(sample.MARGIN_GIB, abs=0.01)


def test_full_training_of_7b_holds_16_bytes_a_parameter():
    s = setup(QWEN_7B, device="cuda", sharded=True, itemsize=2, checkpointed=True, micro_batch_tokens=12288)
    step = memory.update_memory(s, memory.Shape.of([(4096, [8192])]))["log-prob"]
    z = memory.sizes(QWEN_7B, 1)
    assert z.total == 7_615_616_512
    head = 4 * QWEN_7B.vocab_size * QWEN_7B.hidden_size  # its gradient, in transit
    held = step[memory.SHARD] + step[memory.GRADIENTS] - head + step[memory.MOMENTS]
    assert held == 16 * z.total and held / memory.GIB == pytest.approx(113.5, abs=0.05)


def test_shares_add_up_to_the_whole():
    for ranks in (2, 8):
        shard, whole = memory.sizes(QWEN_7B, ranks), memory.sizes(QWEN_7B, 1)
        assert 0 <= ranks * shard.shard / whole.total - 1 < 1e-4
        assert shard.total == whole.total and whole.shard == whole.total


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed, on_cpu", [(False, False), (True, True)])
def test_peaks_of_an_update_and_a_rollout_on_a_gpu(checkpointed, on_cpu, tmp_path):
    config = ModelConfig(32000, 1024, 4096, 12, 16, 4, 64)
    save_hf(Transformer(config).init_weights(0), tmp_path)
    ranks_module.join_ranks("cuda", 5)
    try:
        model = train.load_model(tmp_path, "cuda", True)
        reference = train.load_model(tmp_path, "cuda", True, False, on_cpu)
        model.checkpoint_blocks = checkpointed
        s = setup(config, prompt=600, reply=200, batch_size=64, device="cuda", sharded=True, itemsize=2,
                  micro_batch_tokens=2 * 1400 * 5, reference="cpu" if on_cpu else "cuda", kv_gib=0.5,
                  checkpointed=checkpointed)
        _, update = make_update(config, 600, 200, 4, 20, s.micro_batch_tokens, model, reference)
        update()
        torch.cuda.reset_peak_memory_stats()
        update()
        measured = torch.cuda.max_memory_allocated()
        assert planned_update(s, 600, 200, 4) == pytest.approx(measured, rel=0.1)

        generator = torch.Generator().manual_seed(0)
        prompts = [ids(600, config, generator) for _ in range(20)]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with sharding.unsharded(model) as policy:
            generate(policy, prompts, 4, max_new_tokens=200, temperature=1.0, stop_ids=set(),
                     seeds_P=list(range(20)), batch_size=64, kv_memory_gib=0.5)
        measured = torch.cuda.max_memory_allocated()
        assert memory.total(memory.sampling_memory(s, 20, 4, 200)) == pytest.approx(measured, rel=0.1)
    finally:
        dist.destroy_process_group()
