"""train.py as a whole, on the demo's base: the run folder, the console, resuming, and what it refuses."""

import dataclasses
import json
import shutil
import sys
import types

import pytest
import torch
import yaml
from short_run import pay_odd_lengths

import model
import reward
import train
from configs.schema import Config
from data import read_jsonl, write_jsonl
from model import Qwen2, load_hf
from runtime import metrics
from tools.ask import read_tools
from tools.synthetic import synthetic


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", synthetic(40, 0, "train"))
    write_jsonl(folder / "other.jsonl", synthetic(40, 1, "train"))
    write_jsonl(folder / "heldout.jsonl", synthetic(6, 0, "heldout"))
    return folder


def arguments(files, out, *more):
    """A short run of the demo's preset: four steps of 4 prompts with 2 replies, two updates a step."""
    return ["configs/demo.yaml", f"--out={out}", f"--data.train={files / 'train.jsonl'}",
            f"--data.heldout={files / 'heldout.jsonl'}", "--train.steps=4", "--train.prompts_per_step=4",
            "--train.updates_per_step=2", "--rollout.n=2", "--rollout.max_new_tokens=48", "--eval.every=2",
            "--eval.max_new_tokens=48", "--checkpoint.every=2", "--log.rollouts_every=2", *more]


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "time" not in key and key != "tokens_per_s"}
            for line in lines]


@pytest.fixture(scope="module")
def whole_run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(arguments(files, out, "--grpo.kl_coef=0.001"))
    return out


def test_run_folder_holds_what_the_readme_says(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert names == {"config.yaml", "git_revision.txt", "metrics.jsonl", "rollouts", "evals", "checkpoints",
                     "lock"}
    assert sorted(x.name for x in (whole_run / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    evaluations = sorted(x.name for x in (whole_run / "evals").iterdir())
    assert evaluations == [f"step_00000{i}.json" for i in (0, 2, 4)]
    rollouts = (whole_run / "rollouts/step_000002.jsonl").read_text().splitlines()
    assert len(rollouts) == 8 and {"query", "reply", "reward", "advantage"} <= json.loads(rollouts[0]).keys()


def test_every_logged_metric_is_explained_in_the_docs(whole_run):
    table = open("docs/metrics.md", encoding="utf-8").read()
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    told = set()
    for line in lines:
        names = [name.strip(" `") for name in line.split("|")[1].split(",")]
        prefix = names[0].rpartition("/")[0]
        told |= {name if "/" in name or not prefix else f"{prefix}/{name}" for name in names}
        if names[0].startswith("sampling/"):
            told.add("sampling/logp_diff_max")
    logged = {key for line in metrics_of(whole_run) for key in line if not key.startswith("eval/")} - {"step"}
    assert logged <= told, f"not in docs/metrics.md: {sorted(logged - told)}"


def test_example_and_tools_that_the_readme_shows_are_read(tmp_path):
    text = open("README.md", encoding="utf-8").read()
    (tmp_path / "mine.jsonl").write_text(text.split("```json\n")[1].split("```")[0])
    assert len(read_jsonl(tmp_path / "mine.jsonl")) == 1
    (tmp_path / "tools.json").write_text(text.split("\necho '")[1].split("' > tools.json")[0])
    tool, = read_tools(tmp_path / "tools.json")
    known = {tool["name"]: tool for example in synthetic(2000, 0, "train") for tool in example.tools}
    world = json.loads(open("assets/synthetic.json", encoding="utf-8").read())
    assert tool["description"] == known[tool["name"]]["description"]
    for name, schema in tool["parameters"]["properties"].items():
        assert schema == world["parameters"][name]["schema"]
        assert name in world["nouns"][tool["name"].split("_")[1]]["parameters"]


def test_four_steps_equal_two_steps_then_a_resumed_run_bit_for_bit(files, whole_run, tmp_path, capsys):
    out = tmp_path / "resumed"
    shutil.copytree(whole_run, out)
    shutil.rmtree(out / "checkpoints/step_000004")
    # A checkpoint without its manifest was being written when the run died: it is passed over.
    shutil.copytree(out / "checkpoints/step_000002", out / "checkpoints/step_000003")
    (out / "checkpoints/step_000003/manifest.json").unlink()
    train.main(arguments(files, out, "--grpo.kl_coef=0.001", "--resume=true"))
    assert f"going on from {out / 'checkpoints/step_000002'}" in capsys.readouterr().out
    assert metrics_of(out) == metrics_of(whole_run)
    ours, theirs = (load_hf(x / "checkpoints/step_000004").state_dict() for x in (out, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = ((x / "checkpoints/step_000004/optimizer.state").read_bytes() for x in (out, whole_run))
    assert ours == theirs and len(ours) > 10_000_000


def test_activation_checkpointing_reaches_the_model_and_changes_no_metric(
        files, whole_run, tmp_path, monkeypatch):
    recomputed = []
    checkpoint = model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *a, **k: recomputed.append(a) or checkpoint(*a, **k))
    train.main(arguments(files, tmp_path / "run", "--grpo.kl_coef=0.001",
                         "--train.activation_checkpointing=true"))
    assert recomputed
    assert metrics_of(tmp_path / "run") == metrics_of(whole_run)


def test_resuming_on_changed_data_is_refused(files, whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run, tmp_path / "changed")
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, out, "--grpo.kl_coef=0.001", f"--data.train={files / 'other.jsonl'}"))
    assert stopped.value.code == 2 and "have changed" in capsys.readouterr().err


def test_folder_of_another_run_is_refused_and_left_alone(files, whole_run, capsys):
    before = (whole_run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, whole_run))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "grpo.kl_coef" in error and error.count("\n") == 1
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_checkpoint_is_a_folder_that_transformers_loads(whole_run):
    transformers = pytest.importorskip("transformers")
    folder = whole_run / "checkpoints/step_000004"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("<|im_start|>user\nwake me at 7:45<|im_end|>\n").input_ids])
    ours = load_hf(folder)
    hidden_TD = ours(ids[0], torch.arange(ids.shape[1]), train.shared_prefix_attention([(ids.shape[1], [])]))
    assert torch.allclose(model(ids).logits[0], hidden_TD @ ours.head_weight().T, atol=1e-4)


def test_console_has_one_line_a_step_that_leads_with_reward_and_two_replies_an_evaluation(
        files, tmp_path, capsys):
    train.main(arguments(files, tmp_path / "run", "--train.steps=2"))
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ") and "tok/s" in line]
    assert len(steps) == 2 and all("  reward " in line and "left" in line for line in steps)
    assert steps[0].index("reward") < steps[0].index("length") < steps[0].index("kl off")
    assert sum(line.startswith("held-out accuracy at step") for line in lines) == 2
    assert sum(line.startswith("  asked") for line in lines) == 4


def test_sft_lowers_the_loss_and_keeps_only_so_many_checkpoints(files, tmp_path):
    out, data = tmp_path / "sft", tmp_path / "eight.jsonl"
    write_jsonl(data, synthetic(8, 0, "train"))  # the same batch in every step
    train.main(arguments(files, out, "--stage=sft", "--checkpoint.every=1", "--checkpoint.keep=2",
                         "--train.prompts_per_step=8", f"--data.train={data}"))
    losses = [line["loss"] for line in metrics_of(out) if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [x.name for x in sorted((out / "checkpoints").iterdir())] == ["step_000003", "step_000004"]


def test_interrupted_run_says_how_to_go_on_without_a_traceback(files, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "generate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, tmp_path / "run"))
    error = capsys.readouterr().err
    assert stopped.value.code == 130 and "the same command" in error and "Traceback" not in error


def test_metrics_line_cut_off_by_a_kill_does_not_stop_the_resumed_run(files, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "killed")
    shutil.rmtree(out / "checkpoints/step_000004")
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "los')
    train.main(arguments(files, out, "--grpo.kl_coef=0.001", "--resume=true"))
    assert metrics_of(out) == metrics_of(whole_run)


def test_fewer_steps_are_refused_where_the_learning_rate_follows_them(files, whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run, tmp_path / "past")
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, out, "--grpo.kl_coef=0.001", "--train.steps=3"))
    assert stopped.value.code == 2 and "another train.steps" in capsys.readouterr().err


def test_accuracy_is_measured_with_the_reward_of_training(files, tmp_path, monkeypatch):
    schemes = []

    def note_scheme(*arguments, scheme, **settings):
        schemes.append(scheme)
        return evaluate(*arguments, scheme=scheme, **settings)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", note_scheme)
    train.main(arguments(files, tmp_path / "run", "--train.steps=1", "--grpo.reward=partial_format"))
    assert schemes == ["partial_format"] * 2


def test_replies_of_a_skipped_update_are_saved_and_three_steps_of_them_stop_the_run(
        files, tmp_path, monkeypatch, capsys):
    def skip(optimizer, grad_clip, loss):
        optimizer.zero_grad()
        return float("nan"), 1

    monkeypatch.setattr(train, "apply_update", skip)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, tmp_path / "run", "--log.rollouts_every=100", "--grpo.kl_coef=0.1"))
    assert stopped.value.code == 3 and "step_000003.jsonl" in capsys.readouterr().err
    saved = sorted(path.name for path in (tmp_path / "run/rollouts").iterdir())
    assert saved == ["step_000001.jsonl", "step_000002.jsonl", "step_000003.jsonl"]


def test_random_weights_ask_for_a_config_and_a_tokenizer_only(files, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "score", pay_odd_lengths)
    shutil.copytree("assets/tiny", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    words = arguments(files, tmp_path / "run", f"--model.path={tmp_path / 'base'}", "--model.init=random",
                      "--train.steps=2", "--train.updates_per_step=1", "--grpo.kl_coef=0.1",
                      "--checkpoint.every=1", "--rollout.max_new_tokens=9", "--eval.max_new_tokens=9")
    train.main(words)
    lines = metrics_of(tmp_path / "run")
    first = next(line for line in lines if "kl" in line)
    assert first["kl"] == 0, "policy and reference are the same draw"
    assert first["entropy"] > 6, "of 1,230 tokens, ln 1,230 = 7.1"
    shutil.rmtree(tmp_path / "run/checkpoints/step_000002")
    train.main(words)
    assert metrics_of(tmp_path / "run") == lines, "it goes on from what it had learned"
    again = load_hf("assets/tiny", seed=0).state_dict()
    assert all(torch.equal(again[name], x) for name, x in Qwen2(load_hf("assets/tiny").config).init_weights(
        0).state_dict().items())


def test_help_prints_every_key_with_its_default(capsys):
    train.main(["--help"])
    told = yaml.safe_load(capsys.readouterr().out.split("The defaults:")[1])
    assert told == dataclasses.asdict(Config())


def test_training_moves_weights_only_where_replies_earned_differently(files, tmp_path):
    """With a reward that nothing earns, every group is flat and the policy must not move."""
    write_jsonl(tmp_path / "never.jsonl", [
        dataclasses.replace(example, answer=[{"name": example.tools[0]["name"], "arguments": {"never": 1}}])
        for example in synthetic(8, 0, "train")])
    out = tmp_path / "flat"
    train.main(arguments(files, out, f"--data.train={tmp_path / 'never.jsonl'}", "--train.steps=2"))
    before, after = load_hf("assets/tiny").state_dict(), load_hf(out / "checkpoints/step_000002").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = [line for line in metrics_of(out) if "loss" in line]
    assert all(line["loss"] == 0 and line["updates"] == 0 and line["reward/all_zero"] == 1 for line in steps)


@pytest.mark.parametrize("change, told", [
    ("--data.train=missing.jsonl", "missing.jsonl"), ("--model.path=missing_folder/x", "missing_folder/x"),
    ("--train.prompts_per_step=100", "100"), ("--data.max_prompt_tokens=20", "prompts"),
    ("--data.system_prompt=none.txt", "none.txt"), ("--train.lrr=1", "train.lr"),
    ("--train.prompts_per_step=100", "train.prompts_per_step"), ("--out=README.md", "--out"),
    ("--out=README.md/run", "README.md"), ("--eval.max_new_tokens=2000", "eval.max_new_tokens")])
def test_bad_input_is_one_line_and_status_2(files, tmp_path, capsys, change, told):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, tmp_path / "run", change))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and told in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing half-made stays"


def test_trackers_get_every_metric_and_their_absence_is_one_line(tmp_path, monkeypatch):
    sent = []
    run = types.SimpleNamespace(log=lambda metrics, step: sent.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: run))
    metrics.open_tracker("wandb", tmp_path, {})(3, {"loss": 1.0})
    assert sent == [(3, {"loss": 1.0})]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="not installed; pip install wandb"):
        metrics.open_tracker("wandb", tmp_path, {})


@pytest.mark.parametrize("schedule, warmup, expected", [
    ("constant", 0.0, [1.0] * 10), ("constant", 0.2, [0.5] + [1.0] * 9)])
def test_constant_schedule_warms_up_and_stays(schedule, warmup, expected):
    rates = [train.learning_rate(step, 10, 1.0, schedule, warmup) for step in range(10)]
    assert rates == expected


def test_cosine_schedule_falls_from_the_peak_towards_a_tenth():
    rates = [train.learning_rate(step, 100, 2.0, "cosine", 0.1) for step in range(100)]
    assert rates[10] == 2.0 and 0.2 < rates[99] < 0.21
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
