"""runtime/sharding.py: what 1, 2 and 3 ranks compute, hold and write is equal; 3 are on two nodes.

The work is that of ranks_worker.py. Every launch does all of it, and the tests compare the results.
"""

import contextlib
import functools
import json
import os

import pytest
import torch
import torch.distributed as dist
from ranks_worker import LOSS, PROMPTS, STOPS, TEMPERATURE, VOCAB, work_and_save
from safetensors.torch import load_file
from short_run import (
    LOOPBACK,
    free_port,
    in_child,
    in_ranks,
    limit_time,
    make_base,
    make_setting,
    start_child,
    wait_for,
)

import train
from data import write_jsonl
from grpo import pack
from model import ModelConfig, RopeScaling, Transformer, load_hf, packed_attention, save_hf
from runtime import sharding
from runtime.ranks import join_ranks, leave_ranks
from sample import Rollout, generate
from tools.synthetic import synthetic

limit = pytest.fixture(autouse=True)(limit_time)


MODELS = {  # one of each family, one of them tied
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "llama": {"model_type": "llama", "attention_bias": True, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8)},
    "qwen3": {"model_type": "qwen3"}}


def toy(name):
    config = ModelConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=4, initializer_range=0.25,
                         **MODELS[name])
    return Transformer(config).init_weights(0)


def launch_nodes(folder):
    """Three ranks on two nodes, two and one, by the agents that torchrun starts; they meet on loopback."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    endpoint = f"127.0.0.1:{free_port()}"

    def agent(ranks):
        os.environ.update(LOOPBACK)
        config = LaunchConfig(
            min_nodes=2, max_nodes=2, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint=endpoint,
            run_id="ranks", local_addr="127.0.0.1", start_method="fork", max_restarts=0, monitor_interval=0.1)
        elastic_launch(config, work_and_save)(folder)

    nodes = [start_child(functools.partial(agent, ranks), folder / f"log3_{ranks}") for ranks in (2, 1)]
    statuses = [wait_for(node) for node in nodes]
    assert statuses == [0, 0], [(folder / f"log3_{ranks}").read_text()[-9000:] for ranks in (2, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_base(folder / "base")
    write_jsonl(folder / "train.jsonl", synthetic(16, 0, "train"))
    write_jsonl(folder / "heldout.jsonl", synthetic(2, 0, "heldout"))
    for name in MODELS:
        model = toy(name)
        save_hf(model, folder / name)
        # One group is long and all others are short, so that ranks differ in their micro-batches.
        rollouts_N = generate(model, PROMPTS, 3, max_new_tokens=25, temperature=TEMPERATURE, stop_ids=STOPS,
                              seeds_P=range(len(PROMPTS)), vocab_size=VOCAB)
        for rollout in rollouts_N[3:]:
            del rollout.ids[4:], rollout.logp[4:]
        torch.save(rollouts_N, folder / name / "rollouts.pt")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """{number of ranks: what they found}"""
    def action(rank):
        work_and_save(folder)
        leave_ranks(0)

    with pytest.MonkeyPatch.context() as patches:
        make_setting(patches)
        status, text = in_child(lambda: work_and_save(folder), folder / "log1")
        assert status == 0, text
        statuses, texts = in_ranks(2, action, folder / "log2_")
        assert statuses == [0, 0], texts
        launch_nodes(folder)
    return {ranks: torch.load(folder / f"found{ranks}.pt") for ranks in (1, 2, 3)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("kind", [
    "one pass", "micro-batches", "checkpointed", "two updates", "clipped", "sft", "kl",
    "gspo", "cispo", "dr_grpo", "flat", "accident"])
def test_an_update_does_not_depend_on_the_number_of_ranks(found, ranks, name, kind):
    (metrics, change), (alone_metrics, alone) = (found[n][name]["updates"][kind] for n in (ranks, 1))
    for weight, expected in alone.items():
        torch.testing.assert_close(change[weight], expected, rtol=1e-9, atol=1e-12, msg=weight)
    assert metrics.keys() == alone_metrics.keys()
    for key, value in alone_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_step_of_another_family_does_not_depend_on_the_number_of_ranks(found, ranks, name):
    (metrics, change), (alone_metrics, alone) = (found[n][name]["updates"] for n in (ranks, 1))
    assert found[ranks][name]["ids"] == found[1][name]["ids"]
    for weight, expected in alone.items():
        assert expected.abs().max() > 1e-6, weight
        torch.testing.assert_close(change[weight], expected, rtol=1e-9, atol=1e-12, msg=weight)
    assert metrics["grad_norm"] == pytest.approx(alone_metrics["grad_norm"], rel=1e-9)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_updates_that_are_compared_are_of_every_kind(found, name):
    """The test above needs it: each kind moves the weights, except those that must not."""
    updates = found[1][name]["updates"]
    moved = {kind: sum(float(x.abs().sum()) for x in change.values())
             for kind, (_, change) in updates.items()}
    assert moved.pop("flat") == 0
    assert all(value > 1e-3 for value in moved.values()), moved
    assert updates["two updates"][0]["ratio/mean"] != 1 and updates["kl"][0]["kl"] > 0
    assert updates["accident"][0]["skipped_updates"] == 1 and updates["accident"][0]["updates"] == 2
    assert updates["clipped"][0]["grad_norm"] > 0.01


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_sample_the_ids_that_one_rank_samples(found, ranks):
    for name in ("tied", "untied"):
        alone = found[1][name]["ids"]
        assert found[ranks][name]["ids"] == alone
        assert len({len(ids) for ids in alone}) > 4, "replies of many lengths"


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_folder_written_by_several_ranks_is_the_one_they_read(found, folder, ranks):
    for name in ("tied", "untied"):
        before, after = load_hf(folder / name).state_dict(), load_hf(folder / f"{name}{ranks}").state_dict()
        assert all(torch.equal(before[weight], after[weight]) for weight in before)
        files = {n: sorted(x.name for x in (folder / f"{name}{n}").iterdir()) for n in (1, ranks)}
        assert files[ranks] == files[1] and len(files[1]) > 4, "shards, with nothing left behind"
        for file in files[1]:
            ours, theirs = (folder / f"{name}{n}" / file for n in (ranks, 1))
            assert ours.read_bytes() == theirs.read_bytes()
            if file.endswith(".safetensors") and name == "tied":
                assert "lm_head.weight" not in load_file(ours)


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_holds_its_share_of_weights_gradients_and_moments(found, ranks):
    for name in ("tied", "untied"):
        assert found[1][name]["share"] == [{"parameters": 1, "all": 4}]
        shares = found[ranks][name]["share"]
        assert sum(share["parameters"] for share in shares) == pytest.approx(1)
        # Rows do not divide evenly: 37 of the vocabulary are 13, 13 and 11.
        assert all(share["parameters"] < 1.15 / ranks and share["all"] < 4.6 / ranks for share in shares)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_on_several_ranks_leaves_the_folder_that_one_rank_leaves(found, folder, ranks):
    """Three ranks share two held-out examples, so one has none."""
    alone, several = folder / "run1", folder / f"run{ranks}"
    names = [sorted(str(file.relative_to(run)) for file in run.rglob("*")) for run in (alone, several)]
    assert names[0] == names[1]
    for ours, theirs in zip(lines(several / "metrics.jsonl"), lines(alone / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for key in (key for key in theirs if "time" not in key and key != "tokens_per_s"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key
    for step in (1, 2):
        rollouts = [lines(run / f"rollouts/step_{step:06d}.jsonl") for run in (alone, several)]
        assert len(rollouts[0]) == 16
        for ours, theirs in zip(*rollouts, strict=True):
            assert ours.pop("logp") == pytest.approx(theirs.pop("logp"), abs=1e-3)
            assert ours == theirs
    for name in ("evals/step_000000.json", "evals/step_000002.json"):
        assert (several / name).read_text() == (alone / name).read_text()
    states = [json.loads((run / "checkpoints/step_000002/training.json").read_text())
              for run in (several, alone)]
    for state in states:
        del state["config"]["out"], state["trained_s"]
    assert states[0] == states[1]
    for name in ("model.safetensors", "optimizer.state"):
        ours, theirs = (load_file(run / f"checkpoints/step_000002/{name}") for run in (several, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs)


def summed_gradient(rank):
    """On two ranks: the gradient of a model whose loss has a share on each of them."""
    join_ranks("cpu", 3)
    model = toy("tied")
    _, _, shard = sharding.sharder("cpu", False, trained=True, on_cpu=False)
    shard(model)
    loss_of_share(model, rank).backward()
    expected = toy("tied")
    sum(loss_of_share(expected, each) for each in (0, 1)).backward()
    for parameter, whole in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), whole.grad)
        rows = sharding.own_rows(parameter)
        assert torch.equal(rows[0], whole[rows[1]].detach())
    print("equal")
    leave_ranks(0)


def loss_of_share(model, rank):
    ids = torch.tensor(PROMPTS[2 + rank] + [7])
    hidden_TD = model(ids, torch.arange(len(ids)), packed_attention([0, len(ids)]))
    return (hidden_TD ** 2).sum()


def test_the_gradient_is_the_sum_over_ranks_and_not_the_mean(tmp_path):
    statuses, texts = in_ranks(2, summed_gradient, tmp_path / "log")
    assert statuses == [0, 0] and texts == ["equal\n"] * 2, texts


def reference_and_gradients(rank, ranks=2):
    """The log-probs of a reference that is whole during its passes are those of a sharded one, bit for bit,
    from the host's memory too. On one rank gradients are not divided and equal those without FSDP."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    join_ranks("cpu", 3)
    if not dist.is_initialized():  # a CPU has no group of size 1, a GPU has
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    batch = pack(PROMPTS[2:4], [[[5, 6, 7], [8]], [[9, 10]]])
    passing = functools.partial(train.logprobs_of_pack, pack=batch, temperature=TEMPERATURE, vocab_size=VOCAB,
                                autocast=contextlib.nullcontext())
    offloaded = toy("untied").requires_grad_(False)
    for module in (*offloaded.layers, offloaded):
        fully_shard(module, offload_policy=CPUOffloadPolicy(pin_memory=False))
    _, _, shard = sharding.sharder("cpu", False, trained=False, on_cpu=False)
    sharded = toy("untied").requires_grad_(False)
    shard(sharded)
    for model in (sharded, offloaded):
        with torch.no_grad():
            wanted_L, _ = passing(model)
            with sharding.unsharded(model) as whole:
                for _ in range(2):
                    assert torch.equal(passing(whole)[0], wanted_L)
            assert torch.equal(passing(model)[0], wanted_L), "sharded again"
    policy, expected = toy("tied"), toy("tied")
    _, _, shard = sharding.sharder("cpu", False, trained=True, on_cpu=False)
    shard(policy)
    factors = {module._get_fsdp_state()._fsdp_param_group.gradient_divide_factor
               for module in (*policy.layers, policy)}
    assert factors == {None if ranks == 1 else 1.0}
    if ranks == 1:
        for model in (policy, expected):
            for each in range(2):
                loss_of_share(model, each).backward()
        for parameter, whole in zip(policy.parameters(), expected.parameters(), strict=True):
            assert torch.equal(parameter.grad.full_tensor(), whole.grad)
    print("equal")
    leave_ranks(0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_reference_gives_the_log_probs_of_a_sharded_one(ranks, tmp_path):
    action = functools.partial(reference_and_gradients, ranks=ranks)
    statuses, texts = in_ranks(ranks, action, tmp_path / "log")
    assert statuses == [0] * ranks and all(text.endswith("equal\n") for text in texts), texts


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
@pytest.mark.parametrize("has_amx, has_avx", [(True, False), (False, True), (False, False)])
def test_a_cpu_computes_in_bf16_where_it_has_instructions_or_bf16_is_asked_for(monkeypatch, has_amx, has_avx):
    others, has_bf16 = {"avx512_f": True, "avx512_vnni": True, "amx_int8": True}, has_amx or has_avx
    for name, value in (("get_capabilities", {**others, "amx_bf16": has_amx, "avx512_bf16": has_avx}),
                        ("_is_amx_tile_supported", has_amx), ("_is_avx512_bf16_supported", has_avx)):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    assert sharding.choose_device() == sharding.choose_device("auto") == ("cpu", has_bf16)
    assert sharding.choose_device("bf16") == ("cpu", True)
    assert sharding.choose_device("fp32") == ("cpu", False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an earlier torch
    assert sharding.choose_device() == ("cpu", has_bf16)


@pytest.mark.parametrize("files, cores", [
    ({}, 6), ({"cpu.max": "max 100000\n"}, 6), ({"cpu.max": "250000 100000\n"}, 2),
    ({"cpu.max": "50000 100000\n"}, 1), ({"cpu.max": "1000000 100000\n"}, 6),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3)])
def test_usable_cores_are_those_of_the_affinity_within_the_quota(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert sharding.usable_cores(tmp_path) == cores
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert sharding.usable_cores(tmp_path) == (7 if cores == 6 else cores)


@pytest.mark.parametrize("threads, environment, set_to, key", [
    (3, {}, 3, "train.threads"), (3, {"OMP_NUM_THREADS": "5", "LOCAL_WORLD_SIZE": "4"}, 3, "train.threads"),
    (None, {}, 8, "train.threads"), (None, {"LOCAL_WORLD_SIZE": "3"}, 2, "train.threads"),
    (None, {"LOCAL_WORLD_SIZE": "9"}, 1, "train.threads"),
    (None, {"OMP_NUM_THREADS": "5"}, None, "OMP_NUM_THREADS")])
def test_threads_are_those_given_or_a_share_of_the_usable_cores(threads, environment, set_to, key,
                                                                monkeypatch):
    chosen = []
    monkeypatch.setattr(sharding, "usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1] if chosen else 12)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = sharding.set_threads(threads)
    assert chosen == ([] if set_to is None else [set_to])
    assert line == f"CPU: threads {set_to or 12}, usable cores 8 ({key})"


def test_hyperthreads_that_torch_left_out_get_no_thread(monkeypatch):
    """torch counts the physical cores, the affinity two threads of each."""
    chosen = []
    monkeypatch.setattr(sharding, "usable_cores", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    sharding.set_threads()
    assert chosen == [8]


@pytest.mark.parametrize(("given", "used"), [(None, "16"), ("64", "64")])
def test_onednn_keeps_few_primitives_unless_the_environment_says_how_many(given, used, monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given or "")
    if given is None:
        monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    sharding.set_threads(torch.get_num_threads())
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == used


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_and_other_ranks_a_model_is_plain():
    assert sharding.sharder("cpu", True, True, False) == ("cpu", torch.float32, None)
    model = toy("tied")
    with sharding.unsharded(model) as plain:
        assert plain is model
    weight = model.embed_tokens.weight
    assert sharding.own_rows(weight) == (weight, ...)
    sharding.reset_peak_memory()
    assert sharding.peak_memory("rollout") == {}
    assert isinstance(sharding.autocast("cpu", False), contextlib.nullcontext)
    with sharding.autocast("cpu", True):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_one_gpu_computes_in_bf16_and_keeps_fp32_shards():
    """The sharded path, also for one GPU. A reference equal to the policy has a KL of 0, in either memory."""
    join_ranks("cuda", 5)
    base, adv_PG = "assets/tiny", torch.tensor([[1.0, -1.0]])
    rollouts_N = [Rollout([3, 1, 4, 1, 5], ids, [-1.0] * len(ids)) for ids in ([9, 2, 6], [5, 3])]
    policy = train.load_model(base, "cuda", bf16=True)
    for on_cpu in (False, True):
        reference = train.load_model(base, "cuda", bf16=True, trained=False, on_cpu=on_cpu)
        assert {parameter.dtype for parameter in reference.parameters()} == {torch.bfloat16}
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
        metrics = train.grpo_updates(policy, reference, optimizer, rollouts_N, adv_PG, updates=1, kl_coef=0.1,
                                     grad_clip=1.0, micro_batch_tokens=100, **LOSS | {"vocab_size": None})
        assert metrics["kl"] == metrics["ratio/dev_first"] == 0 and metrics["grad_norm"] > 0
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert optimizer.state[policy.norm.weight]["exp_avg"].dtype == torch.float32
    with sharding.unsharded(policy) as plain:
        assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
        assert all(parameter.is_cuda for parameter in plain.parameters())
    torch.distributed.destroy_process_group()
