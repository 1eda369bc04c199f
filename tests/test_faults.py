"""Faults while a run is written and trained: after each, the newest checkpoint loads and one line says what.

A save is interrupted at every single write, sync and rename, by an error and by the death of the process.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from short_run import (
    LIMIT_S,
    LOOPBACK,
    STEPS,
    arguments,
    at_call,
    die,
    equal_weights,
    in_child,
    inside_generate,
    limit_time,
    make_files,
    make_setting,
    pause,
    pay_odd_lengths,
    refusal,
    start_child,
    wait_for,
    wait_until_it_says,
)

import model
import reward
import train
from data import Example, read_jsonl
from runtime.files import seal

EXAMPLE = Example("1", "test", [{"name": "f"}], [{"role": "user", "content": "q"}], [])

limit = pytest.fixture(autouse=True)(limit_time)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


setting = pytest.fixture(autouse=True)(make_setting)


# ---- a save that is interrupted


class Interrupted:
    """Counts what a save does to the disk; does half of the operation numbered `last`, and then fails.

    Files that are opened for writing become Halting ones; sendfile is how shutil copies.
    """

    NAMES = ("replace", "rename", "mkdir", "fsync", "sendfile", "unlink", "rmdir")

    def __init__(self, last, fail):
        self.done, self.last, self.fail = 0, last, fail

    def count(self, half=lambda: None):
        self.done += 1
        if self.done == self.last:
            half()
            self.fail()

    def patch(self, monkeypatch):
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        opened = io.open

        def halting_open(file, mode="r", *arguments, **settings):
            if mode[0] not in "wxa":
                return opened(file, mode, *arguments, **settings)
            self.count()
            return Halting(opened(file, mode, *arguments, **settings), self)

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


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def saving(files, tmp_path):
    """A run whose step 1 is saved and which stands at step 2, and its model with other weights than then."""
    policy = model.load_hf(files / "base")
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
                                               save_model=model.save_hf, base=files / "base"))
        take_step()
        run.save_checkpoint()
        take_step()
        yield types.SimpleNamespace(run=run, policy=policy, settings=settings)


def newest_that_loads(saving):
    """The step of the newest checkpoint; its files are as they were sealed and load."""
    found, _ = saving.run.newest_checkpoint(
        train.read_yaml, saving.settings, train.flat(train.Config()), {})
    model.load_hf(found)
    return int(found.name[5:11])


def operations_of_a_save(saving):
    """How many there are: what a save does where none fails. The run is as it was before."""
    run = saving.run
    spare = shutil.copytree(run.folder, run.folder.with_name("spare"))
    with pytest.MonkeyPatch.context() as patches:
        faults = Interrupted(0, full_disk)
        faults.patch(patches)
        run.save_checkpoint()
    shutil.rmtree(run.folder / "checkpoints")
    shutil.copytree(spare / "checkpoints", run.folder / "checkpoints")
    run.saved = 1
    return faults.done


def restored(saving, spare):
    """Put the checkpoints back as `spare` has them."""
    shutil.rmtree(saving.run.folder / "checkpoints")
    shutil.copytree(spare, saving.run.folder / "checkpoints")
    saving.run.saved = 1


def test_an_error_at_any_operation_of_a_save_is_one_line_and_leaves_a_checkpoint_that_loads(
        saving, tmp_path, capsys):
    count = operations_of_a_save(saving)
    assert count > 40
    spare = shutil.copytree(saving.run.folder / "checkpoints", tmp_path / "as before")
    kept = []
    for last in range(1, count + 1):
        with pytest.MonkeyPatch.context() as patches:
            Interrupted(last, full_disk).patch(patches)
            told = None
            try:
                saving.run.save_checkpoint()
            except (ValueError, OSError) as error:
                told = str(error)
        kept.append(newest_that_loads(saving))
        # Nothing is told only where what tidies up tried again.
        assert ("No space left" in told and "\n" not in told) if told else kept[-1] == 2
        assert kept[-1] == 1 or equal_weights(saving.run.checkpoint(2), saving.policy)
        restored(saving, spare)
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


def test_death_at_any_operation_of_a_save_leaves_a_checkpoint_that_loads(saving, tmp_path, capsys):
    count = operations_of_a_save(saving)
    spare = shutil.copytree(saving.run.folder / "checkpoints", tmp_path / "as before")
    kept = []
    for last in range(1, count + 1):
        def action(last=last):
            Interrupted(last, lambda: os._exit(9)).patch(pytest.MonkeyPatch())
            saving.run.save_checkpoint()

        status, text = in_child(action, tmp_path / "log")
        assert status == 9, (last, text)
        kept.append(newest_that_loads(saving))
        assert kept[-1] == 1 or equal_weights(saving.run.checkpoint(2), saving.policy)
        restored(saving, spare)
    assert kept == sorted(kept) and kept[0] == 1 and kept[-1] == 2


def test_death_while_a_checkpoint_is_written_over_never_leaves_none(saving, tmp_path, capsys):
    run = saving.run
    run.save_checkpoint()  # with checkpoint.keep 1 the only one
    spare = shutil.copytree(run.folder / "checkpoints", tmp_path / "as before")
    run.save_checkpoint()
    restored(saving, spare)
    last, status = 0, 9
    while status == 9:
        last += 1

        def action(last=last):
            Interrupted(last, lambda: os._exit(9)).patch(pytest.MonkeyPatch())
            run.save_checkpoint()

        status, text = in_child(action, tmp_path / "log")
        assert newest_that_loads(saving) == 2
        restored(saving, spare)
    assert status == 0 and last > 40, text


# ---- full, read-only and shared disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk to fill: mounting one needs the rights of an administrator")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_with_room_it_goes_on_to_the_same_end(
        files, small_disk, tmp_path, capsys):
    from test_resume import differences

    error, status = refusal(arguments(files, small_disk / "run"), capsys)
    assert status == 2 and "cannot be" in error and "No space left" in error
    remount(small_disk, "size=20m")
    train.main(arguments(files, small_disk / "run"))
    assert "going on from" in capsys.readouterr().out
    train.main(arguments(files, tmp_path / "whole"))
    assert differences(small_disk / "run", tmp_path / "whole") == []


def test_a_read_only_run_folder_is_one_line(files, small_disk, capsys):
    train.main(arguments(files, small_disk / "run", "--train.steps=1", "--checkpoint.every=5"))
    remount(small_disk, "ro")
    for out in (small_disk / "run", small_disk / "new"):
        error, status = refusal(arguments(files, out, "--train.steps=1"), capsys)
        assert status == 2 and str(out) in error and "Read-only" in error


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts", "evals"])
def test_a_log_that_cannot_be_written_is_named(files, tmp_path, monkeypatch, capsys, name):
    opened = io.open

    def refuse(file, mode="r", *arguments, **settings):
        if mode[0] in "wa" and f"/{name}" in str(file) and "step" in str(file) + name * (mode == "a"):
            full_disk()
        return opened(file, mode, *arguments, **settings)

    if name == "metrics.jsonl":
        inside = train.RunFolder.log

        def log(self, step, metrics):
            (self.folder / "metrics.jsonl").unlink()
            (self.folder / "metrics.jsonl").mkdir()
            inside(self, step, metrics)

        monkeypatch.setattr(train.RunFolder, "log", log)
    else:
        monkeypatch.setattr(io, "open", refuse)
    error, status = refusal(arguments(files, tmp_path / "run"), capsys)
    assert status == 2 and f"run/{name}" in error and "cannot be written" in error


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended_or_died(
        files, tmp_path, capsys):
    out = tmp_path / "run"

    def action():
        inside_generate("generate", 2, pause)
        train.main(arguments(files, out))

    pid = start_child(action, tmp_path / "log")
    wait_until_it_says("pausing", tmp_path / "log")
    before = (out / "metrics.jsonl").read_bytes()
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and str(out) in error and "another process is at work" in error
    assert (out / "metrics.jsonl").read_bytes() == before
    os.kill(pid, signal.SIGKILL)
    assert wait_for(pid) == -signal.SIGKILL
    train.main(arguments(files, out, "--checkpoint.keep=1"))


# ---- torchrun


def children(pid):
    """{RANK: pid} of the processes that a torchrun started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                variables = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(x[5:]): int(folder.name) for x in variables if x.startswith(b"RANK=")}
    return found


def test_torchrun_stops_a_run_on_sigterm_and_restarts_it_after_a_kill(files, tmp_path):
    words = "--stage=sft", "--checkpoint.every=1", "--eval.every=100"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "--max-restarts=1", "train.py", *arguments(files, tmp_path / "run", *words)]

    def start(log):
        with open(log, "w") as out:
            return subprocess.Popen(torchrun, env=os.environ | LOOPBACK, stdout=out, stderr=out)

    stopped = start(tmp_path / "log1")
    wait_until_it_says("step 2/8", tmp_path / "log1")
    stopped.terminate()
    assert stopped.wait(LIMIT_S / 2) != 0
    assert "the same command goes on from" in (tmp_path / "log1").read_text()
    killed = start(tmp_path / "log2")
    wait_until_it_says("step 5/8", tmp_path / "log2")
    os.kill(children(killed.pid)[1], signal.SIGKILL)
    assert killed.wait(LIMIT_S / 2) == 0
    text = (tmp_path / "log2").read_text()
    assert text.count("going on from") == 2 and "error on rank 0 in the" in text, text
    steps = [line["step"] for line in map(json.loads, open(tmp_path / "run/metrics.jsonl")) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


# ---- gradients


def test_a_gradient_or_a_loss_that_is_not_finite_leaves_weights_and_moments_alone():
    for gradient, loss in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf), (1.0, 1.0)):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], 0.1)
        weight.grad = torch.full((3,), gradient)
        _, skipped = train.apply_update(optimizer, 1.0, loss)
        moves = math.isfinite(gradient) and math.isfinite(loss)
        assert skipped == (not moves) and weight.grad is None
        assert torch.equal(weight, torch.ones(3)) == (not moves) and bool(optimizer.state) == moves


def test_three_supervised_steps_without_a_gradient_end_with_status_3_and_their_examples_saved(
        files, tmp_path, monkeypatch, capsys):
    sft_loss, calls = train.sft_loss, []

    def spoiled(logp_L, denominator):
        calls.append(1)  # two a step: the first two steps are good, the third and all after it are not
        return sft_loss(logp_L, denominator) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(train, "sft_loss", spoiled)
    error, status = refusal(arguments(files, tmp_path / "run", "--stage=sft"), capsys)
    saved = tmp_path / "run/rollouts"
    assert status == 3 and str(saved / "step_000005.jsonl") in error and "train.lr" in error
    assert sorted(file.name for file in saved.iterdir()) == [f"step_00000{i}.jsonl" for i in (3, 4, 5)]
    assert len(read_jsonl(saved / "step_000005.jsonl")) == 4
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines if "loss" in line] == [0, 0, 2, 2, 2]


# ---- a reward of one's own


@pytest.mark.parametrize("paid", [math.nan, math.inf, "1", None])
def test_a_reward_that_is_no_finite_number_counts_as_one_that_raised(monkeypatch, paid):
    monkeypatch.setattr(reward, "score", lambda *_: pay_odd_lengths("x", [], "")._replace(reward=paid))
    verdict = reward.judge(EXAMPLE, "x", "binary")
    assert verdict.reward == 0 and verdict.error.startswith("the reward raised ") and not verdict.format_ok


def test_a_reward_that_raises_costs_its_reply_the_reward_and_is_counted_and_saved(
        files, tmp_path, monkeypatch, capsys):
    class Odd(Exception):
        pass

    def raising(reply, answer, scheme):
        if len(reply) % 3 == 0:
            raise Odd("no\nsuch key")
        if len(reply) % 3 == 1:
            return None
        return pay_odd_lengths(reply, answer, scheme)

    monkeypatch.setattr(reward, "score", raising)
    out = tmp_path / "run"
    train.main(arguments(files, out, "--train.steps=3", "--log.rollouts_every=100"))
    said = capsys.readouterr().out
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "loss" not in line:
            continue
        replies = [json.loads(text) for text in
                   (out / f"rollouts/step_{line['step']:06d}.jsonl").read_text().splitlines()]
        raised = [reply for reply in replies if (reply["error"] or "").startswith("the reward raised ")]
        assert len(raised) == line["reward/raised"] > 0 and all(reply["reward"] == 0 for reply in raised)
        told = {reply["error"] for reply in raised}
        assert any("Odd: no such key" in error for error in told)
        assert any("AttributeError" in error for error in told), "what is no verdict raises too"
        assert f"warning: the reward raised on {len(raised)} replies" in said
    assert len(list((out / "rollouts").iterdir())) == 3
    assert list((out / "evals").iterdir()), "evaluations survive it as well"


def test_an_interrupt_inside_the_reward_is_not_taken_for_its_error(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reward.judge(EXAMPLE, "", "binary")


# ---- files that mean harm


def reseal(folder):
    (folder / "manifest.json").unlink()
    seal(folder)


class Harm:
    """Pickled, a command that makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_no_pickle_of_a_checkpoint_or_a_model_folder_is_loaded(files, tmp_path, capsys):
    out, mark = tmp_path / "run", tmp_path / "harmed"
    train.main(arguments(files, out, "--checkpoint.every=4"))
    assert pickle.dumps(Harm(mark)) and not mark.exists()
    newest = out / f"checkpoints/step_{STEPS:06d}"
    for name in ("training.pt", "optimizer.pt", "pytorch_model.bin", "optimizer.state"):
        (newest / name).write_bytes(pickle.dumps(Harm(mark)))
    reseal(newest)
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "optimizer.state" in error
    base = shutil.copytree(files / "base", tmp_path / "base")
    shutil.move(base / "model.safetensors", base / "other")
    for name in ("pytorch_model.bin", "model.safetensors"):
        (base / name).write_bytes(pickle.dumps(Harm(mark)))
    error, status = refusal(arguments(files, tmp_path / "new", f"--model.path={base}"), capsys)
    assert status == 2 and "model.safetensors" in error
    assert not mark.exists()


def test_the_code_loads_no_pickle_and_no_unsafe_yaml():
    for file in (*Path(".").glob("*.py"), *Path("configs").glob("*.py"), *Path("benchmarks").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load|\bpickle\b|full_load|unsafe|FullLoader|\byaml\.Loader", text), file
        assert set(re.findall(r"yaml\.load\((.*)\)", text)) <= {"text, StrictLoader"}, file


def test_yaml_makes_no_objects(files, tmp_path, capsys):
    mark = tmp_path / "harmed"
    harm = f"!!python/object/apply:os.system ['touch {mark}']"
    (tmp_path / "c.yaml").write_text(f"seed: {harm}\n")
    for words in ([str(tmp_path / "c.yaml")], arguments(files, tmp_path / "run", f"--train.steps={harm}")):
        error, status = refusal(words, capsys)
        assert status == 2 and "not valid YAML" in error and not mark.exists()


def test_an_index_that_leads_out_of_its_folder_is_refused(files, tmp_path, capsys):
    base = shutil.copytree(files / "base", tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../base/model.safetensors"}}))
    error, status = refusal(arguments(files, tmp_path / "run", f"--model.path={base}"), capsys)
    assert status == 2 and "'../base/model.safetensors', not a file of this folder" in error


@pytest.mark.parametrize("size", [0, 7, 100, 10_000])
def test_truncated_weights_are_one_line(files, tmp_path, capsys, size):
    base = shutil.copytree(files / "base", tmp_path / "base")
    os.truncate(base / "model.safetensors", size)
    error, status = refusal(arguments(files, tmp_path / "run", f"--model.path={base}"), capsys)
    assert status == 2 and str(base / "model.safetensors") in error
    assert not (tmp_path / "run").exists()


def test_a_truncated_optimizer_that_was_sealed_so_is_one_line(files, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(arguments(files, out, "--checkpoint.every=100"))
    os.truncate(out / f"checkpoints/step_{STEPS:06d}/optimizer.state", 1000)
    reseal(out / f"checkpoints/step_{STEPS:06d}")
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "optimizer.state" in error


def test_a_life_that_ends_in_a_rename_of_the_logs_leaves_them_readable(files, tmp_path):
    """The rows that a resumed run drops are dropped by a rename, too."""
    out = tmp_path / "run"

    def dies_in_second_life():
        at_call(os, "replace", 1, die)
        train.main(arguments(files, out))

    def dies_in_first_life():
        inside_generate("generate", 4, die)
        train.main(arguments(files, out))

    assert in_child(dies_in_first_life, tmp_path / "log")[0] == -signal.SIGKILL
    before = (out / "metrics.jsonl").read_bytes()
    assert in_child(dies_in_second_life, tmp_path / "log")[0] == -signal.SIGKILL
    assert (out / "metrics.jsonl").read_bytes() == before
