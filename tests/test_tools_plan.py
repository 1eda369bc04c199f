"""The plan compared with measurements: the tensors that autograd saves, and the peaks of phases of training.

A peak on a CPU is that of PyTorch's allocator, computed from the allocations and frees that its profiler
records. It is exact and the same on every machine. The ranks are those of a "fake" process group, which moves
no data; FSDP allocates the same memory there as with real ranks.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import grpo
import sample
import train
from configs.schema import load_config
from data import write_jsonl
from fast import aligned_cache, paged_cache
from grpo import pack
from model import ModelConfig, Transformer, load_hf, save_hf
from runtime import metrics, sharding
from runtime import ranks as ranks_module
from sample import Rollout, generate
from tools import plan
from tools.synthetic import synthetic

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
    return plan.Setup(config, **defaults | changes)


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
    moments = plan.update_memory(s, plan.Shape.of([(prompt, [reply] * n)] * (s.micro_batch_tokens // (
        prompt + n * reply))))
    return max(map(plan.total, moments.values()))


def measured_and_planned(s, model, reference, prompt=120, reply=40, n=4, prompts=4):
    """Bytes at the peak of an update, measured and planned. s: a Setup without lengths."""
    model.checkpoint_blocks = s.checkpointed
    tokens = 2 * (prompt + n * reply)
    s = replace(s, micro_batch_tokens=tokens, reference="cuda" if reference else "none")
    optimizer, update = make_update(s.model, prompt, reply, n, prompts * s.ranks, tokens, model, reference)
    update(s.ranks)  # AdamW creates its moments in the first update, a short one
    held = bytes_of([*model.parameters(), *(reference.parameters() if reference else ())])
    held += bytes_of(tensor for state in optimizer.state.values() for tensor in state.values())
    return held + peak_of(update), planned_update(s, prompt, reply, n)


@pytest.mark.parametrize("config", [DEEP, WIDE, replace(DEEP, num_key_value_heads=4, head_dim=64)])
def test_activations_are_what_autograd_saves(config):
    model, generator = Transformer(config).init_weights(0), torch.Generator().manual_seed(0)
    groups = [(70, [30, 41, 1]), (33, [20]), (90, [5, 5, 60])]
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
    x = plan.Shape.of(groups)
    blocks = plan.saved_by_block(setup(config), x) + 4 * x.T * config.hidden_size
    norm = 4 * x.T * (2 * config.hidden_size + 1)  # the last one
    rotary, tokens = 4 * x.T * 2 * config.head_dim, 8 * x.T
    assert bytes_of(saved) == config.num_hidden_layers * blocks + norm + rotary + tokens


@pytest.mark.parametrize("config, checkpointed, with_reference", [
    (DEEP, False, False), (DEEP, True, True), (WIDE, False, True), (FLAT, False, True),
    (replace(WIDE, tie_word_embeddings=True), False, False), (BLOCKS, True, False)])
def test_peak_of_an_update_on_a_cpu(config, checkpointed, with_reference):
    model = Transformer(config).init_weights(0)
    reference = Transformer(config).init_weights(0).requires_grad_(False) if with_reference else None
    measured, planned = measured_and_planned(setup(config, checkpointed=checkpointed), model, reference)
    assert planned == pytest.approx(measured, rel=0.03)


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
    (8, 100, 15, 32), (2, 30, 45, 8), (4, 1100, 10, 8), (8, 40, 20, 32)])
def test_peak_of_a_rollout_on_a_cpu(prompts, prompt, reply, slots, monkeypatch):
    """The cache has room from the start; it grows; prefill takes several passes and the rows two rounds; the
    replies fill the room exactly.
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
    parts = plan.sampling_memory(s, prompts, 4, reply) | {plan.MOMENTS: 0}
    assert plan.total(parts) == pytest.approx(bytes_of(model.parameters()) + peak_of(rollout), rel=0.05)


def test_keys_and_values_have_the_size_of_the_caches():
    s, row = setup(DEEP, prompt=100, batch_size=6), 100 + 60 - 1
    cpu = torch.device("cpu")
    cache = aligned_cache.Cache(DEEP, torch.float32, cpu, 6, 100, row, 1, None, "cpu")
    assert plan.sampling_memory(s, 2, 3, 60)[plan.KV] == bytes_of([cache.keys, cache.values])
    for gib in (0.0016, 1.0):  # fewer pages than all rows need, and more than that
        pool = paged_cache.Cache(DEEP, torch.float32, cpu, 6, 100, row, 1, gib, "cpu").pool
        assert plan.sampling_memory(replace(s, kv_gib=gib), 2, 3, 60)[plan.KV] == pool.nbytes


def test_keys_and_values_take_all_free_memory_but_the_margin():
    s = setup(QWEN_7B, prompt=900, device="cuda", sharded=True, ranks=8, itemsize=2)
    parts = plan.sampling_memory(s, 1024, 5, 8192, free=78 * plan.GIB)
    static = sum(parts[part] for part in (plan.SHARD, plan.WHOLE, plan.MOMENTS))
    left = 78 * plan.GIB - static - parts[plan.KV]
    assert left / plan.GIB == pytest.approx(sample.MARGIN_GIB, abs=0.01)


def test_full_training_of_7b_holds_16_bytes_a_parameter():
    s = setup(QWEN_7B, device="cuda", sharded=True, itemsize=2, checkpointed=True, micro_batch_tokens=12288)
    step = plan.update_memory(s, plan.Shape.of([(4096, [8192])]))["log-prob"]
    z = plan.sizes(QWEN_7B, 1)
    assert z.total == 7_615_616_512
    head = 4 * QWEN_7B.vocab_size * QWEN_7B.hidden_size  # its gradient, in transit
    held = step[plan.SHARD] + step[plan.GRADIENTS] - head + step[plan.MOMENTS]
    assert held == 16 * z.total and held / plan.GIB == pytest.approx(113.5, abs=0.05)


def test_shares_add_up_to_the_whole():
    for ranks in (2, 8):
        shard, whole = plan.sizes(QWEN_7B, ranks), plan.sizes(QWEN_7B, 1)
        assert 0 <= ranks * shard.shard / whole.total - 1 < 1e-4
        assert shard.total == whole.total and whole.shard == whole.total


# The command.


@pytest.fixture
def arguments(tmp_path):
    """The demo's config with synthetic data. The same folder has a 7B model that is only a config.json."""
    write_jsonl(tmp_path / "train.jsonl", synthetic(60, 0, "train"))
    write_jsonl(tmp_path / "heldout.jsonl", synthetic(20, 0, "heldout"))
    (tmp_path / "7b").mkdir()
    (tmp_path / "7b" / "config.json").write_text(json.dumps(QWEN_7B.to_hf()))
    return [str(ROOT / "configs/demo.yaml"), f"--data.system_prompt={ROOT / 'configs/demo_prompt.txt'}",
            f"--data.train={tmp_path / 'train.jsonl'}", f"--data.heldout={tmp_path / 'heldout.jsonl'}",
            f"--out={tmp_path / 'run'}", f"--model.path={ROOT / 'assets/tiny'}"]


def printed_plan(arguments, capsys):
    train.main([*arguments, "--plan"])
    return capsys.readouterr().out


def test_steps_rollouts_and_tokens_are_printed(arguments, capsys, tmp_path):
    out = printed_plan([*arguments, "--gpus", "2", "--train.steps=null", "--train.epochs=4"], capsys)
    model = load_hf("assets/tiny")
    numbers = sum(p.numel() for p in model.parameters()), model.embed_tokens.weight.numel()
    assert "parameters  {:,}, of them {:,} in the embedding; the head is tied to it".format(*numbers) in out
    assert re.search(r"examples    60 for training, prompts of at most \d+ tokens", out)
    assert "2.5 an epoch, 10 in all" in out and "192 a step, 1,920 in all" in out
    assert f"at most 36,864 a step, {24 * (512 + 8 * 128) * 10:,} in all" in out
    assert not (tmp_path / "run").exists()


def test_a_config_is_enough_and_nothing_is_allocated(arguments, capsys, tmp_path):
    words = [*arguments, f"--model.path={tmp_path / '7b'}", "--gpus", "8", "--gpu_memory", "80"]
    assert peak_of(lambda: train.main([*words, "--plan"])) < 1e6
    out = capsys.readouterr().out
    assert "7,615,616,512" in out and "there is no tokenizer" in out and "of 80 GiB" in out
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_missing_data_leaves_the_steps_unknown(arguments, capsys, tmp_path):
    out = printed_plan([*arguments, f"--data.train={tmp_path / 'later.jsonl'}", "--train.steps=null"], capsys)
    assert "later.jsonl is not there" in out and "unknown in all" in out


def test_columns_add_up(arguments, capsys):
    lines = printed_plan([*arguments, "--gpus", "0"], capsys).split("\nGiB")[1].split("\n\n")[0].splitlines()
    columns = [[float(cell.replace("-", "0")) for cell in line[20:].split()] for line in lines[1:]]
    for *parts, whole in zip(*columns, strict=True):
        assert sum(parts) == pytest.approx(whole, abs=0.005 * len(parts))


@pytest.mark.parametrize("gpus, gib", [(8, 80), (4, 80), (1, 141), (1, 80), (2, 48), (8, 24)])
def test_a_run_fits_after_the_changes_that_the_plan_names(arguments, capsys, tmp_path, gpus, gib):
    words = [*arguments, f"--model.path={tmp_path / '7b'}", "--gpu_memory", str(gib),
             "--train.micro_batch_tokens=30720", "--data.max_prompt_tokens=4096", "--grpo.kl_coef=0.001",
             "--train.prompts_per_step=60", "--rollout.max_new_tokens=8192",
             "--grpo.reference_on_cpu=false", "--model.precision=auto"]
    out = printed_plan([*words, "--gpus", str(gpus)], capsys)
    assert "does not fit" in out and "no setting here" not in out
    changes = re.findall(r"^  (?:take|and) (\S+|\d+ GPUs): ([\d.]+) GiB$", out, re.M)
    for change, _ in changes:
        words.append(f"--{change}")
    more = [word for word in words if word.endswith(" GPUs")]
    words = [word for word in words if word not in more]
    gpus = more[-1].removeprefix("--").split()[0] if more else gpus
    assert f"fits: {changes[-1][1]} of" in printed_plan([*words, "--gpus", str(gpus)], capsys)


def test_the_change_that_saves_most_is_named_first():
    s = setup(QWEN_7B, prompt=4096, reply=8192, n=5, device="cuda", sharded=True, ranks=8, itemsize=2,
              micro_batch_tokens=30720, reference="cuda")
    capacity = 80 * plan.GIB
    (first, least), *_ = plan.advice(s, capacity, 12288, 256)
    others = [plan.peak(changed, capacity) for _, changed in plan.changes(s, capacity, 12288, 256)]
    assert first == "train.activation_checkpointing=true" and least == min(others)
    assert plan.advice(s, 10**13, 12288, 256) == []


@pytest.mark.parametrize("words, named", [
    (["nowhere.yaml"], "nowhere.yaml"), (["--gpus", "many"], "--gpus"), (["--gpus", "-1"], "--gpus -1"),
    (["--gpu_memory", "0"], "--gpu_memory 0"), (["--gpu_memory", "nan"], "nan"), (["--gpus"], "--gpus"),
    (["--gpus", "25"], "24 prompts an update"), (["--gpus", "0", "--model.precision=bf16"], "fp32"),
    (["--rollout.max_new_tokens=4096", "--train.micro_batch_tokens=9999"], "2048 positions"),
    (["--train.prompts_per_step=90"], "only 60 training examples"), (["--rolout.n=2"], "unknown key"),
    (["--model.path=configs"], "config.json")])
def test_what_cannot_be_planned_is_one_line_and_status_2(arguments, capsys, words, named):
    arguments = words if words[0].endswith(".yaml") else [*arguments, *words]
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--plan"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err


def test_the_command_line_ends_with_status_2(tmp_path):
    command = [sys.executable, ROOT / "train.py", "nowhere.yaml", "--plan"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: nowhere.yaml")


def test_the_plan_in_the_docs_is_what_the_command_prints(real_data, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    pattern = r"^\$ python train\.py (.*--plan.*)\n((?:.*\n)*?)```"
    command, shown = re.search(pattern, text, re.M).groups()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    folder = Path(load_config([command.split()[0]]).model.path)
    folder.mkdir(parents=True)
    shutil.copy(real_data / "qwen2.5" / "configs" / f"{folder.name}.json", folder / "config.json")
    train.main(command.split())
    assert capsys.readouterr().out == shown


# The shape of a preset's model, and the GPUs that the preset is made for: how many, of how many GiB.
PRESETS = {"demo.yaml": (None, 0, 24), "demo_control.yaml": (None, 0, 24),
           "tool_n1_7b.yaml": (QWEN_7B, 8, 80), "tool_n1_14b.yaml": (QWEN_14B, 8, 80),
           "tool_n1_7b_1gpu.yaml": (QWEN_7B, 1, 139), "tool_n1_0.5b_24gb.yaml": (QWEN_05B, 1, 24),
           "tool_n1_1.5b_48gb.yaml": (QWEN_15B, 1, 48)}


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_preset_loads_and_fits_the_machine_it_is_made_for(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config, gpus, gib = PRESETS[preset]
    words = [f"configs/{preset}", "--plan", f"--gpus={gpus}", f"--gpu_memory={gib}"]
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
        words.append(f"--model.path={tmp_path}")
    train.main(words)
    assert "\nfits: " in capsys.readouterr().out


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
        assert plan.total(plan.sampling_memory(s, 20, 4, 200)) == pytest.approx(measured, rel=0.1)
    finally:
        dist.destroy_process_group()
