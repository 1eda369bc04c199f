"""train.py --plan: what it prints, what it refuses, whether every preset fits the machine it is made for."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_tools_memory import QWEN_05B, QWEN_7B, QWEN_14B, QWEN_15B, ROOT, peak_of, setup

import train
from configs.schema import load_config
from data import write_jsonl
from model import ModelConfig, RopeScaling, load_hf
from tools import memory, minutes, plan
from tools.synthetic import synthetic


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
    assert f"at most 30,720 a step, {24 * (512 + 8 * 96) * 10:,} in all" in out
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
    capacity = 80 * memory.GIB
    (first, least), *_ = plan.advice(s, capacity, 12288, 256)
    others = [memory.peak(changed, capacity) for _, changed in plan.changes(s, capacity, 12288, 256)]
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


LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, model_type="llama",
                       rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), max_position_embeddings=131072)
SMOLLM2_135M = ModelConfig(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tie_word_embeddings=True,
                           model_type="llama", max_position_embeddings=8192)
# The shape of a preset's model, and the GPUs that the preset is made for: how many, of how many GiB.
PRESETS = {"demo.yaml": (None, 0, 24), "demo_control.yaml": (None, 0, 24),
           "tool_n1_7b.yaml": (QWEN_7B, 8, 80), "tool_n1_14b.yaml": (QWEN_14B, 8, 80),
           "tool_n1_7b_1gpu.yaml": (QWEN_7B, 1, 139), "tool_n1_0.5b_24gb.yaml": (QWEN_05B, 1, 24),
           "tool_n1_1.5b_48gb.yaml": (QWEN_15B, 1, 48), "dapo.yaml": (QWEN_7B, 8, 80),
           "tool_n1_7b_sft_lora.yaml": (QWEN_7B, 1, 48), "tool_n1_7b_lora_1gpu.yaml": (QWEN_7B, 1, 48),
           "tool_n1_llama3.1_8b.yaml": (LLAMA_8B, 8, 80),
           "real_sft.yaml": (SMOLLM2_135M, 0, 24), "real_grpo.yaml": (SMOLLM2_135M, 0, 24)}


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")
                                          if path.name != "study.yaml"))  # its arms are of two presets
def test_every_preset_loads_and_fits_the_machine_it_is_made_for(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config, gpus, gib = PRESETS[preset]
    words = [f"configs/{preset}", "--plan", f"--gpus={gpus}", f"--gpu_memory={gib}"]
    words += ["--model.precision=fp32"] * (gpus == 0)  # as a run on a CPU is planned
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
        words.append(f"--model.path={tmp_path}")
    train.main(words)
    assert "\nfits: " in capsys.readouterr().out


def times(out):
    """{row: its cells as seconds} of the table of times, and the names of the columns."""
    header, *lines = out.split("\ntime ")[1].split("\n\n")[0].splitlines()
    units = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "days": 86400}
    cells = {line[:20].strip(): re.findall(r"([\d.]+) (\w+)|(-)", line[20:]) for line in lines}
    return re.split(r"\s{2,}", header.strip()), {
        row: [0 if none else float(number) * units[unit] for number, unit, none in found]
        for row, found in cells.items()}


def test_time_on_this_cpu_and_on_an_h100(arguments, capsys, monkeypatch):
    monkeypatch.setattr(minutes, "measured_pace", lambda config: 5e10)
    words = [*arguments, "--gpus", "0", "--rollout.refill=2"]
    out = printed_plan(words, capsys)
    columns, rows = times(out)
    assert columns == ["CPU, typical", "CPU, at most", "H100, typical", "H100, at most"]
    assert list(rows) == ["rollout", "update", "step", "evaluation", "run"]
    assert re.search(r"typical: prompts of 2\d\d tokens and replies of [34]\d, the means of the exam", out)
    assert "CPU: 50 GFLOP/s in one product" in out and "H100: by assumption, not measured" in out
    for typical, most, *_ in rows.values():
        assert 0 < 1.5 * typical < most
    # 60 steps, evaluated after 0 and 60
    for rollout, update, step, evaluation, run in zip(*rows.values(), strict=True):
        assert rollout + update == pytest.approx(step, rel=0.02)
        assert 60 * step + 2 * evaluation == pytest.approx(run, rel=0.02)
    monkeypatch.setattr(minutes, "measured_pace", lambda config: 1e11)
    _, faster = times(printed_plan(words, capsys))
    assert faster["step"][0] == pytest.approx(rows["step"][0] / 2, rel=0.01)
    assert faster["step"][2:] == rows["step"][2:]


def test_time_ends_at_max_minutes_and_is_unknown_without_steps(arguments, capsys, monkeypatch):
    monkeypatch.setattr(minutes, "measured_pace", lambda config: 1e9)
    words = [*arguments, "--gpus", "0", "--train.max_minutes=60", "--train.steps=100", "--eval.ends=false"]
    _, rows = times(printed_plan(words, capsys))
    assert rows["run"][0] == pytest.approx(3600, rel=0.2) and 100 * rows["step"][0] > 5000
    words = [*arguments, "--data.train=nowhere.jsonl", "--train.steps=null", "--model.precision=auto"]
    out = printed_plan([*words, "--gpus", "1"], capsys)
    columns, rows = times(out)
    assert columns == ["H100, typical", "H100, at most"] and "run" not in rows
    assert "typical: prompts of 512 tokens and replies of 96, a guess; at most: 512 and 96" in out


def test_time_of_gpus_with_and_without_a_reference(arguments, capsys, tmp_path):
    words = [*arguments, f"--model.path={tmp_path / '7b'}", "--gpu_memory", "139", "--model.precision=auto",
             "--grpo.kl_coef=0.001", "--data.train=nowhere.jsonl", "--data.max_prompt_tokens=4096"]
    columns, one = times(printed_plan([*words, "--gpus", "1"], capsys))
    assert "log-probs" in one and columns[0] == "H100, typical"
    out = printed_plan([*words, "--gpus", "8"], capsys)
    columns, eight = times(out)
    assert columns[0] == "8 H100, typical" and "the wait for the slowest rank" in out
    assert 4 < one["step"][0] / eight["step"][0] < 8
    for column in (0, 1):
        parts = sum(one[row][column] for row in ("rollout", "log-probs", "update"))
        assert parts == pytest.approx(one["step"][column], rel=0.02)
    _, without = times(printed_plan([*words, "--gpus", "1", "--grpo.kl_coef=0"], capsys))
    assert "log-probs" not in without and without["update"] == one["update"]
    out = printed_plan([*words, "--gpus", "1", "--model.precision=fp32"], capsys)
    assert "time        not planned" in out


def test_time_of_supervised_training(arguments, capsys):
    words = [*arguments, "--stage=sft", "--gpus", "1", "--model.precision=auto"]
    _, rows = times(printed_plan(words, capsys))
    assert list(rows) == ["update", "step", "evaluation", "run"]
    assert rows["update"] == rows["step"]
