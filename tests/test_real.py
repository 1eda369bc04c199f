"""Real input end to end: ToolACE and xLAM records, Qwen2.5's tokenizer, weights saved by transformers."""

import contextlib
import json
import shutil

import pytest
import torch

import data
import eval as evaluation
import reward
import train
from model import load_hf
from sample import generate

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def qwen_folder(real_data, tmp_path_factory):
    """Two random layers of Qwen2.5 with its full vocabulary, saved by transformers, and its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6, max_position_embeddings=32768)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(real_data / "qwen2.5" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def real_examples(real_data, tmp_path_factory):
    """A training file made by the documented commands from real ToolACE and xLAM records."""
    folder = tmp_path_factory.mktemp("examples")
    data.main(["convert", "toolace", str(real_data / "data/toolace/toolace_upstream_repaired.json"),
               str(folder / "toolace.jsonl")])
    data.main(["convert", "xlam", str(real_data / "data/xlam/xlam_columns_from_rlla.json"),
               str(folder / "xlam.jsonl")])
    both = (folder / "toolace.jsonl").read_text() + (folder / "xlam.jsonl").read_text()
    (folder / "both.jsonl").write_text(both)
    return folder / "both.jsonl"


def test_two_grpo_steps_on_real_prompts_then_the_checkpoint_loads_and_is_evaluated(
        qwen_folder, real_examples, tmp_path, capsys, monkeypatch):
    """The replies of a random model earn nothing, so here the reward is 1 for an even length instead."""
    score, verdicts = reward.score, []

    def pay_even_lengths(reply, answer, scheme):
        verdicts.append(score(reply, answer, scheme))
        return verdicts[-1]._replace(reward=float(len(reply) % 2 == 0))

    monkeypatch.setattr(reward, "score", pay_even_lengths)
    out = tmp_path / "run"
    train.main([f"--out={out}", f"--model.path={qwen_folder}", f"--data.train={real_examples}",
                "--train.steps=2", "--train.prompts_per_step=4", "--train.updates_per_step=2",
                "--rollout.n=2", "--model.precision=fp32",
                "--rollout.max_new_tokens=8", "--train.micro_batch_tokens=8192", "--train.weight_decay=0",
                "--eval.examples=2", "--eval.max_new_tokens=4", "--log.rollouts_every=1"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["sampling/logp_diff_max"] < 1e-3 and line["ratio/dev_first"] == 0
        assert 0 < line["reward/mean"] < 1 and line["grad_norm"] > 0 and line["updates"] == 2
    assert len(verdicts) == 16 + 4, "rollouts of two steps, two evaluations of two"
    assert all(verdict.reward == 0 and verdict.error for verdict in verdicts)

    sources = set()
    for step in (1, 2):
        text = (out / f"rollouts/step_{step:06d}.jsonl").read_text()
        rollouts = [json.loads(line) for line in text.splitlines()]
        assert len(rollouts) == 8
        sources |= {rollout["id"].partition("/")[0] for rollout in rollouts}
    assert sources == {"toolace", "xlam"}, "the batches hold examples of both sets"

    checkpoint = out / "checkpoints/step_000002"
    ours = load_hf(checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(ours.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert not torch.equal(ours.embed_tokens.weight, load_hf(qwen_folder).embed_tokens.weight)
    capsys.readouterr()
    evaluation.main([str(checkpoint), "--bench", "heldout", "--data", str(real_examples), "--examples", "2",
                     "--max_new_tokens", "4"])
    assert "all" in capsys.readouterr().out


def test_update_on_real_prompts_moves_weights_when_rewards_differ(qwen_folder, real_examples):
    chat = data.Chat(qwen_folder)
    model = load_hf(qwen_folder)
    before = model.embed_tokens.weight.detach().clone()
    examples = data.read_jsonl(real_examples)[:2]
    rollouts = generate(
        model, [chat.encode_prompt(example) for example in examples], 2, max_new_tokens=6, temperature=0.7,
        stop_ids=chat.stop_ids, seeds_P=[1, 2], vocab_size=chat.vocab_size)
    optimizer = train.make_optimizer(model, 0.0, 0.999)
    train.set_learning_rate(optimizer, 1e-3)
    metrics = train.grpo_updates(
        model, None, optimizer, rollouts, torch.tensor([[0.7, -0.7], [-0.7, 0.7]]), temperature=0.7,
        vocab_size=chat.vocab_size, updates=1, kl_coef=0.0, clip_low=0.2, clip_high=0.2, grad_clip=1.0,
        micro_batch_tokens=4096, autocast=contextlib.nullcontext())
    assert metrics["grad_norm"] > 0 and not torch.equal(before, model.embed_tokens.weight)
    assert torch.equal(before[chat.vocab_size:], model.embed_tokens.weight[chat.vocab_size:]), "phantom rows"
