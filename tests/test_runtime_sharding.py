"""train.py on several ranks: 1 alone, 2 of one node, 4 of two torchruns that meet on loopback.

The work is that of ranks_worker.py, each launch does all of it, and the tests compare what came out.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from ranks_worker import LOSS, PROMPTS, ROOT, STOPS, TEMPERATURE, VOCAB, run_arguments, work_and_save
from safetensors.torch import load_file
from short_run import LOOPBACK, free_port, in_child, in_ranks

import train
from data import write_jsonl
from model import ModelConfig, Qwen2, load_hf, save_hf
from runtime.ranks import join_ranks
from runtime.sharding import unsharded
from sample import Rollout, generate
from tools.synthetic import synthetic

SECONDS = 240  # a launch takes 10 to 15; one that takes longer hangs


def toy(tied):
    config = ModelConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=4, initializer_range=0.25,
                         tie_word_embeddings=tied)
    return Qwen2(config).init_weights(0)


def launch_agents(folder):
    """Four ranks, by two torchruns of two that meet on loopback."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=ranks",
             "--local_addr=127.0.0.1", str(ROOT / "tests/ranks_worker.py"), str(folder)]
    log = folder / "log4"
    with open(log, "w") as out:
        settings = {"env": os.environ | LOOPBACK, "stdout": out, "stderr": out}
        running = [subprocess.Popen(agent, **settings) for _ in range(2)]
        try:
            statuses = [agent.wait(SECONDS) for agent in running]
        finally:
            for agent in running:
                agent.terminate()  # an agent that is killed leaves its ranks behind
            for agent in running:
                agent.wait(60)
    assert not any(statuses), log.read_text()[-10000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "train.jsonl", synthetic(16, 0, "train"))
    write_jsonl(folder / "heldout.jsonl", synthetic(3, 0, "heldout"))
    for name in ("tied", "untied"):
        model = toy(name == "tied")
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
    """{ranks: what they found}"""
    assert in_child(lambda: work_and_save(folder), folder / "log1")[0] == 0
    statuses, texts = in_ranks(2, lambda rank: work_and_save(folder), folder / "log2_")
    assert statuses == [0, 0], texts
    launch_agents(folder)
    return {ranks: torch.load(folder / f"found{ranks}.pt") for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("kind", [
    "one pass", "micro-batches", "checkpointed", "two updates", "clipped", "sft", "kl", "flat", "accident"])
def test_an_update_does_not_depend_on_the_number_of_ranks(found, ranks, name, kind):
    (metrics, change), (alone_metrics, alone) = (found[n][name]["updates"][kind] for n in (ranks, 1))
    for weight, expected in alone.items():
        torch.testing.assert_close(change[weight], expected, rtol=1e-9, atol=1e-12, msg=weight)
    assert metrics.keys() == alone_metrics.keys()
    for key, value in alone_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_updates_that_are_compared_are_of_every_kind(found, name):
    """What the test above rests on: each kind moves the weights, but for those that must not."""
    updates = found[1][name]["updates"]
    moved = {kind: sum(float(x.abs().sum()) for x in change.values())
             for kind, (_, change) in updates.items()}
    assert moved.pop("flat") == 0
    assert all(value > 1e-3 for value in moved.values()), moved
    assert updates["two updates"][0]["ratio/mean"] != 1 and updates["kl"][0]["kl"] > 0
    assert updates["accident"][0]["skipped_updates"] == 1 and updates["accident"][0]["updates"] == 2
    assert updates["clipped"][0]["grad_norm"] > 0.01


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_sample_the_ids_that_one_rank_samples(found, ranks):
    for name in ("tied", "untied"):
        alone = found[1][name]["ids"]
        assert found[ranks][name]["ids"] == alone
        assert len({len(ids) for ids in alone}) > 4, "replies of many lengths"


@pytest.mark.parametrize("ranks", [2, 4])
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


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_its_share_of_weights_gradients_and_moments(found, ranks):
    for name in ("tied", "untied"):
        assert found[1][name]["share"] == [{"parameters": 1, "all": 4}]
        shares = found[ranks][name]["share"]
        assert sum(share["parameters"] for share in shares) == pytest.approx(1)
        # Rows do not divide evenly: 37 of the vocabulary are 10, 10, 10 and 7.
        assert all(share["parameters"] < 1.1 / ranks and share["all"] < 4.4 / ranks for share in shares)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_on_several_ranks_leaves_the_folder_that_one_rank_leaves(found, folder, ranks):
    """Four ranks have three held-out examples among them, so one has none."""
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


def test_more_ranks_than_prompts_an_update_are_refused_before_they_meet(folder, monkeypatch, capsys):
    arguments = run_arguments(folder, folder / "refused")
    for rank in range(5):
        for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 5)):
            monkeypatch.setenv(key, str(value))
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments)
        assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "4 prompts an update, fewer than the 5 ranks" in error and error.count("\n") == 1
    assert not (folder / "refused").exists()


@pytest.mark.gpu
def test_one_gpu_computes_in_bf16_and_keeps_fp32_shards():
    """One path, also for one GPU. A reference equal to the policy is at no distance, wherever it is kept."""
    join_ranks("cuda", 5)
    base, adv_PG = ROOT / "assets/tiny", torch.tensor([[1.0, -1.0]])
    rollouts_N = [Rollout([3, 1, 4, 1, 5], ids, [-1.0] * len(ids)) for ids in ([9, 2, 6], [5, 3])]
    policy = train.load_model(base, "cuda", bf16=True)
    for on_cpu in (False, True):
        reference = train.load_model(base, "cuda", bf16=True, trained=False, reference_on_cpu=on_cpu)
        assert {parameter.dtype for parameter in reference.parameters()} == {torch.bfloat16}
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
        metrics = train.grpo_updates(policy, reference, optimizer, rollouts_N, adv_PG, updates=1, kl_coef=0.1,
                                     grad_clip=1.0, micro_batch_tokens=100, **LOSS | {"vocab_size": None})
        assert metrics["kl"] == metrics["ratio/dev_first"] == 0 and metrics["grad_norm"] > 0
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert optimizer.state[policy.norm.weight]["exp_avg"].dtype == torch.float32
    with unsharded(policy) as plain:
        assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
        assert all(parameter.is_cuda for parameter in plain.parameters())
    torch.distributed.destroy_process_group()
