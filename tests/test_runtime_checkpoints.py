"""runtime/checkpoints.py: exact resume, what is refused, spoiled checkpoints, interrupted saves, old folders.

Children are killed with SIGKILL in chosen places; tests/soak.py chooses random ones. A save is interrupted at
every write, fsync, rename and removal, by an error and by the death of the process.
"""

import dataclasses
import functools
import io
import json
import os
import pickle
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_run import (
    STEPS,
    arguments,
    at_call,
    back_to,
    die,
    equal_weights,
    full_disk,
    in_child,
    in_ranks,
    inside_generate,
    killed,
    limit_time,
    make_base,
    make_setting,
    newest,
    refusal,
    shared_files,
    shared_runs,
)
from soak import differences, rows

import model
import train
from data import write_jsonl
from runtime import checkpoints
from runtime.files import check_seal, seal
from runtime.ranks import join_ranks, leave_ranks
from tools.synthetic import synthetic

limit = pytest.fixture(autouse=True)(limit_time)
setting = pytest.fixture(autouse=True)(make_setting)
files = pytest.fixture(scope="module")(shared_files)
undisturbed = pytest.fixture(scope="module")(shared_runs)


def find(run, settings):
    """The checkpoint that a run folder resumes from, and the state in it."""
    return run.newest_checkpoint(train.read_yaml, settings, train.flat(train.Config()), {})


# ---- exact resume


def test_the_runs_of_these_tests_learn_something_in_every_step(undisturbed):
    for stage in ("grpo", "sft"):
        steps = [row for row in rows(undisturbed(stage)) if "loss" in row]
        assert len(steps) == STEPS and all(row["grad_norm"] > 0 for row in steps)
    weights = [train.load_hf(undisturbed(stage) / "checkpoints" / f"step_{STEPS:06d}").state_dict()
               for stage in ("grpo", "sft")]
    assert not torch.equal(weights[0]["norm.weight"], weights[1]["norm.weight"])


def test_two_runs_of_the_same_command_are_equal_and_the_comparison_sees_what_differs(
        files, undisturbed, tmp_path):
    out = tmp_path / "run"
    train.main(arguments(files, out))
    assert differences(out, undisturbed("grpo")) == []
    assert len(differences(out, undisturbed("sft"))) >= 4
    with open(out / "metrics.jsonl", "a") as file:
        file.write((out / "metrics.jsonl").read_text().splitlines()[-1] + "\n")
    (out / "rollouts/step_000003.jsonl").unlink()
    assert [what.split(":")[0] for what in differences(out, undisturbed("grpo"))] == [
        "rollouts/*", "metrics.jsonl"]


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_killed_in_rollout_update_evaluation_and_save_a_run_ends_as_if_undisturbed(
        files, undisturbed, tmp_path, stage):
    # What kills the process, and the newest checkpoint then. Each life resumes what the one before left.
    lives = [
        ((inside_generate, "generate", 2, die), None),  # before the first checkpoint
        ((inside_generate, "generate", 4, die), "step_000002"),
        ((at_call, train, "apply_update", 3, die, True), "step_000002"),  # between the two of a step
        ((inside_generate, "evaluate", 1, die), "step_000002"),
        ((at_call, checkpoints, "seal", 1, die, True), "step_000002"),  # all is written, but not renamed
        ((at_call, checkpoints, "seal", 2, die), "step_000004"),
        ((at_call, os, "replace", 1, die, True), "step_000004"),  # in setup
        ((at_call, train.RunFolder, "log_step", 3, die, True), "step_000006"),
    ]
    if stage == "sft":
        lives[:2] = [((at_call, train.grpo, "sft_loss", 4, die), None),
                     ((at_call, train.grpo, "sft_loss", 8, die), "step_000002")]
    for number, (by, left) in enumerate(lives):
        text = killed(files, tmp_path / "run", f"--stage={stage}", by=by, log=tmp_path / "log")
        saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_??????"))
        assert saved[-1:] == [left] * (left is not None), f"life {number}\n{text}"
    train.main(arguments(files, tmp_path / "run", f"--stage={stage}"))
    assert differences(tmp_path / "run", undisturbed(stage)) == []
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_the_checkpoint_that_is_used_is_printed_and_so_is_a_start_from_step_0(
        files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    train.main(arguments(files, out))
    assert f"going on from {out / 'checkpoints/step_000004'}\n" in capsys.readouterr().out
    shutil.rmtree(out / "checkpoints")
    train.main(arguments(files, out))
    assert f"no checkpoint in {out}: starting from step 0\n" in capsys.readouterr().out
    assert differences(out, undisturbed("grpo")) == []


def test_a_finished_run_that_is_started_again_takes_no_step(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), STEPS, tmp_path / "run")
    train.main(arguments(files, out))
    assert "tok/s" not in capsys.readouterr().out
    assert differences(out, undisturbed("grpo")) == []


def test_a_resumed_run_has_the_bytes_of_an_undisturbed_one_though_a_torn_checkpoint_is_newer(
        files, undisturbed, tmp_path, capsys):
    whole, out = undisturbed("grpo"), back_to(undisturbed("grpo"), 6, tmp_path / "run")
    # A checkpoint without a manifest was being written when the process died.
    shutil.copytree(out / "checkpoints/step_000006", out / "checkpoints/step_000007")
    (out / "checkpoints/step_000007/manifest.json").unlink()
    train.main(arguments(files, out, "--resume=true"))
    assert f"going on from {out / 'checkpoints/step_000006'}" in capsys.readouterr().out
    assert rows(out) == rows(whole)
    ours, theirs = (train.load_hf(x / "checkpoints/step_000008").state_dict() for x in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = ((x / "checkpoints/step_000008/optimizer.state").read_bytes() for x in (out, whole))
    moments = sum(2 * 4 * weight.numel() for weight in train.load_hf(files / "base").parameters())
    assert ours == theirs and len(ours) > moments


def test_transformers_loads_a_checkpoint_and_its_tokenizer_with_equal_logits(undisturbed):
    transformers = pytest.importorskip("transformers")
    folder = undisturbed("grpo") / "checkpoints/step_000008"
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), train.load_hf(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for ids in (tokenizer("<|im_start|>user\nwake me at 7:45<|im_end|>\n").input_ids, range(100, 140)):
        ids = torch.tensor(ids)
        hidden_TD = ours(ids, torch.arange(len(ids)), train.shared_prefix_attention([(len(ids), [])]))
        assert torch.allclose(theirs(ids[None]).logits[0], hidden_TD @ ours.head_weight().T, atol=1e-5)


def test_two_ranks_read_their_rows_of_the_moments_that_one_process_wrote(undisturbed, tmp_path):
    folder = undisturbed("grpo") / "checkpoints/step_000008"
    saved = load_file(folder / "optimizer.state")

    def action(rank):
        join_ranks("cpu", 3)
        policy = train.load_model(folder, "cpu", bf16=False)
        optimizer = train.make_optimizer(policy, 0.0, 0.9)
        checkpoints.read_moments(folder, policy, optimizer)
        for name, parameter in policy.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[parameter][key]
                assert moment.to_local().numel() < saved[f"{name}.{key}"].numel()
                assert torch.equal(moment.full_tensor(), saved[f"{name}.{key}"]), (name, key)
        print("equal")
        leave_ranks(0)

    statuses, texts = in_ranks(2, action, tmp_path / "log")
    assert statuses == [0, 0] and texts == ["equal\n"] * 2, texts


# ---- what is refused, and what may change


@pytest.mark.parametrize("change", [
    "--seed=1", "--train.lr=0.02", "--rollout.n=2", "--grpo.clip_low=0.1", "--train.updates_per_step=1",
    "--data.max_prompt_tokens=500", "--train.steps=9", "--train.steps=3", "--train.weight_decay=0.1",
    "--model.precision=bf16", "--grpo.kl_coef=0"])
def test_a_config_that_would_change_the_trajectory_is_refused_by_its_keys(
        files, undisturbed, capsys, change):
    before = (undisturbed("grpo") / "metrics.jsonl").read_bytes()
    error, status = refusal(arguments(files, undisturbed("grpo"), change, "--grpo.normalize=none"), capsys)
    assert status == 2 and "a run with another" in error
    assert change[2:].split("=")[0] in error and "grpo.normalize" in error
    assert "train.prompts_per_step" not in error
    assert (undisturbed("grpo") / "metrics.jsonl").read_bytes() == before


def test_settings_of_evaluation_logs_checkpoints_and_memory_may_change(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), STEPS, tmp_path / "run")
    moved = shutil.copy(files / "train.jsonl", tmp_path / "moved.jsonl")
    train.main(arguments(files, out, "--eval.every=1", "--eval.examples=3", "--log.rollouts_every=5",
                         "--checkpoint.every=1", "--checkpoint.keep=2", "--train.micro_batch_tokens=4000",
                         "--train.activation_checkpointing=true", "--rollout.batch_size=2",
                         "--train.max_minutes=100", f"--data.train={moved}"))
    assert "going on" in capsys.readouterr().out


def test_with_a_constant_learning_rate_more_steps_are_exact_and_fewer_are_refused(
        files, tmp_path, capsys):
    constant = ["--train.schedule=constant", "--eval.every=2"]
    train.main(arguments(files, tmp_path / "long", *constant, "--train.steps=6"))
    train.main(arguments(files, tmp_path / "run", *constant, "--train.steps=2"))
    train.main(arguments(files, tmp_path / "run", *constant, "--train.steps=6"))
    assert differences(tmp_path / "run", tmp_path / "long") == []
    error, status = refusal(arguments(files, tmp_path / "run", *constant, "--train.steps=3"), capsys)
    assert status == 2 and "raise train.steps" in error


def test_minutes_that_the_learning_rate_follows_may_not_change():
    now = train.flat(train.Config())
    for schedule, refused in (("cosine", []), ("cosine_time", ["train.max_minutes"])):
        now |= {"train.schedule": schedule, "train.max_minutes": 30.0}
        assert checkpoints.incompatible_keys({**now, "train.max_minutes": 20.0}, now) == refused


def overwrite(file, content):
    """Change a file but neither its size nor its times, as a copy that keeps times could."""
    before = file.stat()
    assert len(content) == before.st_size
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_base_model_whose_bytes_have_changed_is_refused_by_what_of_it_changed(files, tmp_path, capsys):
    base, out = shutil.copytree(files / "base", tmp_path / "base"), tmp_path / "run"
    words = [f"--model.path={base}", "--train.steps=2"]
    train.main(arguments(files, out, *words))
    shutil.rmtree(out / "checkpoints/step_000002", ignore_errors=False)
    train.main(arguments(files, out, *words))  # from step 0, which compares nothing
    before = (out / "metrics.jsonl").read_bytes()
    for name, old, new, part in (
            ("model.safetensors", None, None, "weights"),
            ("tokenizer.json", b'"<|endoftext|>"', b'"<|endoftexx|>"', "tokenizer"),
            ("config.json", b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 2e-06', "config")):
        content = (base / name).read_bytes()
        changed = content.replace(old, new) if old else content[:-1] + bytes([content[-1] ^ 1])
        assert changed != content
        overwrite(base / name, changed)
        error, status = refusal(arguments(files, out, *words), capsys)
        assert status == 2 and "step_000002: the contents of " in error
        assert f"model.path ({part}) have changed since; going on would be another run." in error
        assert "Restore them, or start anew with another --out" in error
        overwrite(base / name, content)
    assert (out / "metrics.jsonl").read_bytes() == before
    train.main(arguments(files, out, *words))
    printed = capsys.readouterr().out
    assert "going on from" in printed and "earlier version" not in printed


def test_nodes_that_have_different_weights_under_the_same_name_are_refused(files, tmp_path):
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
        (tmp_path / f"node{rank}/configs").symlink_to(Path("configs").resolve())
        base = shutil.copytree(files / "base", tmp_path / f"node{rank}/base")
    content = (base / "model.safetensors").read_bytes()
    overwrite(base / "model.safetensors", content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])

    def action(rank):
        os.environ["LOCAL_RANK"] = "0"
        os.chdir(tmp_path / f"node{rank}")
        train.main(arguments(files, tmp_path / "run", "--model.path=base"))

    statuses, texts = in_ranks(2, action, tmp_path / "log")
    assert statuses == [2, 2], texts
    assert "the ranks were not given the same settings and data; give each node the same files" in texts[0]
    assert not (tmp_path / "run").exists()


def test_auto_precision_of_a_resumed_run_is_the_one_that_it_began_with(files, tmp_path, monkeypatch, capsys):
    def on_machine(has_bf16, *more):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_bf16}, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_bf16, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
        words = arguments(files, tmp_path / f"{began}", "--checkpoint.every=1", "--eval.every=null",
                          "--train.schedule=constant", *more)
        return words if "--model.precision=bf16" in more else train.main(words)

    for began, name in ((False, "fp32"), (True, "bf16")):
        for has_bf16, steps in ((began, 1), (not began, 2)):
            on_machine(has_bf16, "--model.precision=auto", f"--train.steps={steps}")
            printed = capsys.readouterr().out
            assert f"on cpu in {name}," in printed and f"step {steps}/{steps}" in printed
        config = dict(train.read_yaml(tmp_path / f"{began}/config.yaml"))
        assert config["model.precision"] == name
    began = False
    error, status = refusal(on_machine(True, "--model.precision=bf16", "--train.steps=2"), capsys)
    assert status == 2 and "another model.precision" in error
    # What an earlier version left.
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("model: {precision: auto}\n")
    for asked, precision in (("auto", "fp32"), ("bf16", "bf16")):
        assert checkpoints.precision_of_run(tmp_path / "old", asked, train.read_yaml) == precision


@pytest.mark.parametrize("key", ["data.train", "data.heldout", "data.system_prompt"])
def test_changed_examples_and_a_changed_prompt_are_refused_by_their_keys(
        files, undisturbed, tmp_path, capsys, key):
    changed = tmp_path / "changed"
    if key == "data.system_prompt":
        changed.write_text(open("configs/demo_prompt.txt").read() + "Be brief.")
    else:
        examples = synthetic(8 if key == "data.train" else 6, 0, key.removeprefix("data."))
        examples[-1] = dataclasses.replace(examples[-1], source="elsewhere")
        write_jsonl(changed, examples)
    error, status = refusal(arguments(files, undisturbed("grpo"), f"--{key}={changed}"), capsys)
    assert status == 2 and f"the contents of {key} have changed" in error


def test_resume_false_needs_a_folder_without_a_run_and_true_one_with_a_run(
        files, undisturbed, tmp_path, capsys):
    error, status = refusal(arguments(files, undisturbed("grpo"), "--resume", "false"), capsys)
    assert status == 2 and "holds a run" in error
    error, status = refusal(arguments(files, tmp_path / "new", "--resume=true"), capsys)
    assert status == 2 and "holds no run" in error and not (tmp_path / "new").exists()
    train.main(arguments(files, undisturbed("grpo"), "--resume", "auto"))
    train.main(arguments(files, undisturbed("grpo"), "--resume=true"))
    train.main(arguments(files, tmp_path / "new", "--resume=false", "--train.steps=1"))


# ---- checkpoints that are not whole


def damage(folder, how):
    """Spoil a checkpoint, or put something newer next to it that is none. Returns what is spoiled."""
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    other = folder.with_name("step_000009")
    if how == "torn":
        manifest.unlink()
    elif how == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "a file is missing":
        (folder / "optimizer.state").unlink()
    elif how == "an empty manifest":
        manifest.write_text("")
    elif how == "a manifest of no files":
        manifest.write_text("{}")
    elif how == "a manifest of something else":
        manifest.write_text('{"files": {"a": 1}}')
    elif how == "a manifest that leads elsewhere":
        shutil.copy(weights, folder.parent / "outside")
        sealed = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**sealed, "../outside": sealed["model.safetensors"]}))
    elif how == "another step":
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("step_000002"), folder)
    elif how == "a folder of something else":
        other.mkdir()
        (other / "notes.txt").write_text("mine")
        return other
    elif how == "a file":
        other.write_text("mine")
        return other
    return folder


@pytest.mark.parametrize("how", [
    "torn", "truncated", "a file is missing", "an empty manifest", "a manifest of no files",
    "a manifest of something else", "a manifest that leads elsewhere", "another step",
    "a folder of something else", "a file"])
def test_a_spoiled_checkpoint_is_named_and_skipped_and_stays(
        files, undisturbed, tmp_path, capsys, how):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    spoiled = damage(out / "checkpoints/step_000008", how)
    with train.RunFolder(out, "auto") as run:
        found, _ = find(run, train.flat(train.load_config(arguments(files, out))))
    printed = capsys.readouterr().out
    assert found == out / "checkpoints" / ("step_000008" if spoiled.name == "step_000009" else "step_000006")
    assert f"passed over {spoiled}: " in printed and f"going on from {found}\n" in printed
    assert spoiled.exists()


def test_a_run_without_a_usable_checkpoint_is_refused_and_not_changed(
        files, undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    for folder in (out / "checkpoints").iterdir():
        damage(folder, "truncated")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "no checkpoint of this run can be used" in error and "--out" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_seen(files, undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step_000008")
    config = train.flat(train.load_config(arguments(files, out)))
    for file in sorted((out / "checkpoints/step_000006").iterdir()):
        content = file.read_bytes()
        for place in (0, len(content) // 3, len(content) // 2):
            flipped = bytearray(content)
            flipped[place] ^= 4
            file.write_bytes(flipped)
            with train.RunFolder(out, "auto") as run:
                found, _ = find(run, config)
                assert found == out / "checkpoints/step_000004", (file.name, place)
        file.write_bytes(content)
    with train.RunFolder(out, "auto") as run:
        assert find(run, config)[0] == out / "checkpoints/step_000006"


def test_a_checkpoint_of_another_run_is_skipped(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    shutil.copytree(undisturbed("sft") / "checkpoints/step_000008", out / "checkpoints/step_000008")
    train.main(arguments(files, out))
    assert "step_000008: it is of a run with another stage" in capsys.readouterr().out
    assert differences(out, undisturbed("grpo")) == []
    # The folder that had the name of a new checkpoint was not deleted.
    replaced = json.loads((out / "checkpoints/step_000008.replaced/training.json").read_text())
    assert replaced["config"]["stage"] == "sft"


def test_a_run_with_spoiled_newest_checkpoints_ends_as_if_undisturbed(files, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    for name in ("step_000008", "step_000006"):
        damage(out / "checkpoints" / name, "truncated")
    train.main(arguments(files, out, "--checkpoint.keep=2"))
    assert differences(out, undisturbed("grpo")) == []
    # Of the two that are kept none is spoiled.
    assert newest(out) == "step_000008"
    for name in ("step_000008", "step_000006"):
        check_seal(out / "checkpoints" / name)


def test_only_so_many_checkpoints_are_kept_and_spoiled_ones_neither_count_nor_are_deleted(
        files, undisturbed, tmp_path):
    out = back_to(undisturbed("grpo"), 6, tmp_path / "run")
    shutil.copytree(out / "checkpoints/step_000006", out / "checkpoints/step_000009")
    train.main(arguments(files, out, "--checkpoint.keep=1"))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000008", "step_000009"]


def reseal(folder):
    (folder / "manifest.json").unlink()
    seal(folder)


class Harm:
    """Pickled, a command that makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_no_pickle_of_a_checkpoint_or_a_model_folder_is_loaded(files, undisturbed, tmp_path, capsys):
    out, mark = shutil.copytree(undisturbed("grpo"), tmp_path / "run"), tmp_path / "harmed"
    assert pickle.dumps(Harm(mark)) and not mark.exists()
    folder = out / f"checkpoints/step_{STEPS:06d}"
    for name in ("training.pt", "optimizer.pt", "pytorch_model.bin", "optimizer.state"):
        (folder / name).write_bytes(pickle.dumps(Harm(mark)))
    reseal(folder)
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "optimizer.state" in error
    base = shutil.copytree(files / "base", tmp_path / "base")
    shutil.move(base / "model.safetensors", base / "other")
    for name in ("pytorch_model.bin", "model.safetensors"):
        (base / name).write_bytes(pickle.dumps(Harm(mark)))
    error, status = refusal(arguments(files, tmp_path / "new", f"--model.path={base}"), capsys)
    assert status == 2 and "model.safetensors" in error
    assert not mark.exists()


def test_a_sealed_checkpoint_with_a_truncated_optimizer_is_one_line(files, undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    os.truncate(out / f"checkpoints/step_{STEPS:06d}/optimizer.state", 1000)
    reseal(out / f"checkpoints/step_{STEPS:06d}")
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "optimizer.state" in error


# ---- a save that is interrupted


class Death(BaseException):
    """Stands for the end of the process."""


class Interrupted:
    """Counts what a save does to the disk; does half of the operation numbered `last`, and then fails.

    With fail=None the process dies without ending: no later operation is done, and what a file has not
    flushed is lost. Files that are opened for writing become Halting ones; sendfile is how shutil copies.
    """

    NAMES = ("replace", "rename", "mkdir", "fsync", "sendfile", "unlink", "rmdir")

    def __init__(self, last, fail):
        self.done, self.last, self.fail, self.files = 0, last, fail, []

    def count(self, half=lambda: None):
        self.done += 1
        if self.done == self.last:
            half()
            if self.fail:
                self.fail()
            with open(os.devnull, "rb") as null:
                for file in self.files:
                    if not file.closed:
                        os.dup2(null.fileno(), file.fileno())
        if self.done >= self.last > 0 and not self.fail:
            raise Death

    def patch(self, monkeypatch):
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        # In Python 3.10 Path.unlink does not look the function up in os.
        monkeypatch.setattr(Path, "unlink", lambda path: os.unlink(path))
        opened = io.open

        def halting_open(file, mode="r", *arguments, **settings):
            if mode[0] not in "wxa":
                return opened(file, mode, *arguments, **settings)
            self.count()
            self.files.append(opened(file, mode, *arguments, **settings))
            return Halting(self.files[-1], self)

        monkeypatch.setattr(io, "open", halting_open)
        monkeypatch.setattr("builtins.open", halting_open)

    def counted(self, function):
        def operation(*arguments, **settings):
            self.count()
            return function(*arguments, **settings)

        return operation


class Halting:
    """A file whose writes count."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def write(self, content):
        self.faults.count(lambda: (self.file.write(content[:len(content) // 2]), self.file.flush()))
        return self.file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def saving(files, tmp_path):
    """A run at step 2 whose checkpoint is of step 1, and its model, whose weights have changed since."""
    base = make_base(tmp_path / "base", hidden_size=8)
    policy = model.load_hf(base)
    optimizer = train.make_optimizer(policy, 0.0, 0.9)
    config = train.load_config(arguments(files, tmp_path / "run"))
    settings = train.flat(config)

    def take_step():
        sum(parameter.sum() for parameter in policy.parameters()).backward()
        train.apply_update(optimizer, 1.0, 0.0)
        run.step += 1

    with train.RunFolder(tmp_path / "run", "auto") as run:
        run.open(dataclasses.asdict(config), {"config": settings, "fingerprint": {}}, "none", keep=1,
                 write_state=functools.partial(train.write_state, model=policy, optimizer=optimizer,
                                               save_model=model.save_hf, base=base))
        take_step()
        run.save_checkpoint()
        take_step()
        yield types.SimpleNamespace(run=run, policy=policy, settings=settings, loaded=set(),
                                    spare=shutil.copytree(run.folder, tmp_path / "spare"))


def newest_that_loads(saving):
    """The step of the newest checkpoint. It holds what was sealed, it loads, and its weights are right."""
    found, _ = saving.run.newest_checkpoint(lambda file: saving.settings, saving.settings, {}, {})
    step, hashes = int(found.name[5:11]), (found / "manifest.json").read_text()
    if hashes not in saving.loaded:
        assert equal_weights(found, saving.policy) == (step == 2)
        saving.loaded.add(hashes)
    return step


def restore(saving):
    """Put the checkpoints back as they were at first."""
    shutil.rmtree(saving.run.folder / "checkpoints")
    shutil.copytree(saving.spare / "checkpoints", saving.run.folder / "checkpoints")
    saving.run.saved = 1


def interrupt(saving, last, fail):
    """Save, interrupted at the operation numbered `last` (0: at none). Returns (the error, or None; how many
    operations there were)."""
    with pytest.MonkeyPatch.context() as patches:
        faults = Interrupted(last, fail)
        faults.patch(patches)
        try:
            saving.run.save_checkpoint()
        except (ValueError, OSError, Death) as error:
            return error, faults.done
    return None, faults.done


def operations_of_a_save(saving):
    """How many there are where none fails. The run is then as it was before."""
    _, count = interrupt(saving, 0, full_disk)
    restore(saving)
    return count


def contents(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_an_error_at_any_operation_of_a_save_is_one_line_and_leaves_a_checkpoint_that_loads(saving, capsys):
    count = operations_of_a_save(saving)
    assert count > 40
    kept = []
    for last in range(1, count + 1):
        error, _ = interrupt(saving, last, full_disk)
        kept.append(newest_that_loads(saving))
        # No error only where a clean-up succeeds at its second try.
        assert ("No space left" in str(error) and "\n" not in str(error)) if error else kept[-1] == 2
        restore(saving)
    assert kept[0] == 1 and kept[-1] == 2 and kept.count(1) > 30


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest_and_its_name(saving, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def note_replace(old, new):
        done.append(("replace", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    saving.run.save_checkpoint()
    assert done[-6:] == [
        ("fsync", "manifest.json.tmp"), ("replace", "manifest.json"), ("fsync", "step_000002.tmp"),
        ("fsync", "metrics.jsonl"), ("replace", "step_000002"), ("fsync", "checkpoints")]
    names = {path.name for path in saving.run.checkpoint(2).iterdir()} - {"manifest.json"}
    assert {"model.safetensors", "optimizer.state", "tokenizer.json", "training.json"} < names
    assert names <= {name for what, name in done[:-6] if what == "fsync"}


def test_the_prompt_of_the_run_is_in_the_sealed_checkpoint_in_place_of_the_template_of_the_base(
        files, tmp_path, monkeypatch):
    base = shutil.copytree(files / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text("of the base")
    monkeypatch.setattr(train.Chat, "save", lambda chat, folder: (folder / "chat_template.jinja").write_text(
        "of the run"), raising=False)
    train.main(arguments(files, tmp_path / "run", f"--model.path={base}", "--train.steps=1", "--stage=sft"))
    folder = tmp_path / "run/checkpoints/step_000001"
    assert (folder / "chat_template.jinja").read_text() == "of the run"
    check_seal(folder)


def test_death_at_any_operation_of_a_save_leaves_a_checkpoint_that_loads(saving, capsys):
    kept = []
    for last in range(1, operations_of_a_save(saving) + 1):
        assert isinstance(interrupt(saving, last, fail=None)[0], Death)
        kept.append(newest_that_loads(saving))
        restore(saving)
    assert kept == sorted(kept) and kept[0] == 1 and kept[-1] == 2


def test_death_while_a_checkpoint_is_overwritten_never_leaves_none(saving, capsys):
    saving.run.save_checkpoint()  # with checkpoint.keep 1 the only one
    shutil.rmtree(saving.spare / "checkpoints")
    shutil.copytree(saving.run.folder / "checkpoints", saving.spare / "checkpoints")
    count = operations_of_a_save(saving)
    assert count > 40
    for last in range(1, count + 1):
        assert isinstance(interrupt(saving, last, fail=None)[0], Death)
        assert newest_that_loads(saving) == 2
        restore(saving)


def test_the_death_of_a_process_leaves_the_files_that_the_tests_above_assume(saving, tmp_path):
    for last in range(1, operations_of_a_save(saving) + 1, 6):
        status, text = in_child(functools.partial(interrupt, saving, last, lambda: os._exit(9)),
                                tmp_path / "log")
        assert status == 9, (last, text)
        left = contents(saving.run.folder)
        restore(saving)
        interrupt(saving, last, fail=None)
        assert contents(saving.run.folder) == left, last
        restore(saving)


# ---- run folders of earlier versions


def test_a_run_folder_of_an_earlier_version_resumes_to_the_same_end(
        tmp_path, monkeypatch, capsys):
    """tests/old_run was written before runtime/ existed: a checkpoint of step 2, and logs and weights of all
    four steps. Machines differ in the last bit."""
    old = shutil.copytree("tests/old_run", tmp_path / "old")
    expected = rows(old / "run")
    replies = {file.name: file.read_bytes() for file in (old / "run/rollouts").iterdir()}
    monkeypatch.chdir(old)
    train.main(["run/config.yaml"])
    printed = capsys.readouterr().out
    assert "going on from run/checkpoints/step_000002\n" in printed and " on cpu in fp32, " in printed
    line, = [line for line in printed.splitlines() if "earlier version" in line]
    assert line.startswith("run/checkpoints/step_000002 is of an earlier version, without digests of "
                           "model.path (weights), model.path (config), model.path (tokenizer): ")
    digests = json.loads((old / "run/checkpoints/step_000004/training.json").read_text())["fingerprint"]
    assert len(digests["model.path (weights)"]) == 64
    train.main(["run/config.yaml"])
    assert "earlier version" not in capsys.readouterr().out
    for ours, theirs in zip(rows(old / "run"), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, text in replies.items():
        lines = [[json.loads(line) for line in content.splitlines()]
                 for content in (text, (old / "run/rollouts" / name).read_bytes())]
        assert [line["reply"] for line in lines[0]] == [line["reply"] for line in lines[1]]
        assert [line["advantage"] for line in lines[0]] == [line["advantage"] for line in lines[1]]
    ours, theirs = (load_file(folder / "model.safetensors")
                    for folder in (old / "run/checkpoints/step_000004", old / "finished"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
