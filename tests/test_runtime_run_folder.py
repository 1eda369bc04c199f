"""runtime/run_folder.py: logs after a resume, counters over restarts, full and read-only disks, the lock."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest
from short_run import (
    HEALTHY,
    STEPS,
    arguments,
    at_call,
    back_to,
    die,
    full_disk,
    inside_generate,
    killed,
    limit_time,
    make_setting,
    newest,
    pause,
    refusal,
    shared_files,
    shared_runs,
    start_child,
    wait_for,
    wait_until_it_prints,
)
from soak import differences, rows

import train
from data import read_jsonl

limit = pytest.fixture(autouse=True)(limit_time)
setting = pytest.fixture(autouse=True)(make_setting)
files = pytest.fixture(scope="module")(shared_files)
undisturbed = pytest.fixture(scope="module")(shared_runs)


# ---- logs


def test_rows_and_files_after_the_boundary_are_deleted_and_so_are_unfinished_ones(
        files, undisturbed, tmp_path, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    (out / "checkpoints/step_000005.tmp").mkdir()
    (out / "checkpoints/step_000005.tmp/model.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl.tmp", "rollouts/step_000005.jsonl.tmp"):
        (out / name).write_text("half")
    monkeypatch.setattr(train, "generate", interrupt)
    with pytest.raises(SystemExit):
        train.main(arguments(files, out))
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3, 3, 4]
    assert sorted(path.name for path in (out / "rollouts").iterdir()) == [
        f"step_00000{i}.jsonl" for i in (1, 2, 3, 4)]
    assert sorted(path.name for path in (out / "evals").iterdir()) == ["step_000000.json", "step_000003.json"]
    assert not list(out.rglob("*.tmp"))


def test_rows_that_are_missing_before_the_boundary_are_refused(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    kept = (out / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    (out / "metrics.jsonl").write_text("".join(kept))
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "has 3 rows, but 6 were written up to step 4" in error
    assert (out / "metrics.jsonl").read_text() == "".join(kept)


def test_a_row_cut_off_by_a_kill_does_not_stop_the_resumed_run(files, undisturbed, tmp_path):
    out = back_to(undisturbed("grpo"), 6, tmp_path / "run")
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "los')
    train.main(arguments(files, out, "--resume=true"))
    assert rows(out) == rows(undisturbed("grpo"))


def test_a_process_killed_in_a_rename_of_the_logs_leaves_them_readable(files, undisturbed, tmp_path):
    """A resumed run deletes rows by writing a new file and renaming it."""
    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    killed(files, out, by=(at_call, os, "replace", 1, die), log=tmp_path / "log")
    assert (out / "metrics.jsonl").read_bytes() == before


# ---- trackers


class Writer:
    """A stand-in for SummaryWriter: JSON lines in a file, of which a killed process loses what it has not
    flushed."""

    def __init__(self, folder, purge_step=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.waiting = folder / "events.jsonl", [["start", purge_step, 0]]

    def add_scalar(self, key, value, step):
        self.waiting.append([key, step, value])

    def flush(self):
        with open(self.file, "a") as file:
            file.write("".join(json.dumps(event) + "\n" for event in self.waiting))
        self.waiting = []


def shown(folder):
    """What TensorBoard shows: a start hides the earlier events from its purge_step on."""
    events = []
    for key, step, value in map(json.loads, (folder / "tensorboard/events.jsonl").read_text().splitlines()):
        if key == "start" and step is not None:
            events = [event for event in events if event[1] < step]
        elif key != "start":
            events.append((key, step, value))
    return sorted(events)


@pytest.mark.parametrize("call", [2, 6, 8])
def test_tensorboard_has_each_step_once_after_a_kill(files, tmp_path, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    out, more = tmp_path / "run", ["--log.tracker=tensorboard", "--train.steps=8"]
    killed(files, out, *more, by=(inside_generate, "generate", call, die), log=tmp_path / "log")
    train.main(arguments(files, out, *more))
    logged = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert shown(out) == sorted((key, row["step"], x) for row in logged for key, x in row.items()
                                if key != "step")


# ---- counters


def skip(optimizer, grad_clip, loss):
    """train.apply_update where no gradient is finite."""
    optimizer.zero_grad()
    return float("nan"), 1


def test_steps_in_a_row_without_a_gradient_are_counted_over_a_kill(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "apply_update", skip)
    out = tmp_path / "run"
    more = ["--checkpoint.every=1"]
    killed(files, out, *more, by=(inside_generate, "generate", 3, die), log=tmp_path / "log")
    assert newest(out) == "step_000002"
    error, status = refusal(arguments(files, out, *more), capsys)
    assert status == 3 and "step_000003.jsonl" in error


def test_minutes_of_steps_are_summed_over_a_restart(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 2, tmp_path / "run")
    state = json.loads((out / "checkpoints/step_000002/training.json").read_text())
    limit = state["trained_s"] / 60
    train.main(arguments(files, out, f"--train.max_minutes={limit / 2}"))
    assert "tok/s" not in capsys.readouterr().out, "its minutes are over"
    train.main(arguments(files, out, f"--train.max_minutes={limit * 1000}"))
    assert newest(out) == f"step_{STEPS:06d}"
    # Of all steps, those before the restart included.
    state = json.loads((out / f"checkpoints/step_{STEPS:06d}/training.json").read_text())
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["time/step_s"] for row in logged if "time/step_s" in row]
    assert len(seconds) == STEPS and state["trained_s"] == pytest.approx(sum(seconds))


def test_replies_of_a_skipped_update_are_saved_and_three_steps_of_them_stop_the_run(
        files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "apply_update", skip)
    error, status = refusal(arguments(files, tmp_path / "run", "--log.rollouts_every=100"), capsys)
    assert status == 3 and "step_000003.jsonl" in error
    saved = sorted(path.name for path in (tmp_path / "run/rollouts").iterdir())
    assert saved == ["step_000001.jsonl", "step_000002.jsonl", "step_000003.jsonl"]


def test_three_supervised_steps_without_a_gradient_end_with_status_3_and_their_examples_saved(
        files, tmp_path, monkeypatch, capsys):
    sft_loss, calls = train.grpo.sft_loss, []

    def spoiled(logp_L, denominator):
        calls.append(1)  # two a step: the first two steps are good, the third and all after it are not
        return sft_loss(logp_L, denominator) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(train.grpo, "sft_loss", spoiled)
    error, status = refusal(arguments(files, tmp_path / "run", "--stage=sft"), capsys)
    saved = tmp_path / "run/rollouts"
    assert status == 3 and str(saved / "step_000005.jsonl") in error and "train.lr" in error
    assert sorted(file.name for file in saved.iterdir()) == [f"step_00000{i}.jsonl" for i in (3, 4, 5)]
    assert len(read_jsonl(saved / "step_000005.jsonl")) == 4
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines if "loss" in line] == [0, 0, 2, 2, 2]


def log_steps(folder, steps):
    """Log one healthy step for each dictionary in `steps`, with its metrics changed."""
    run = train.RunFolder(folder, resume="auto")
    run.open({}, {}, "none", write_state=None, keep=None)
    usual = {**HEALTHY, "reward/mean": 0.5, "length/mean": 9.0, "tokens": 1, "skipped_updates": 0}
    for step, changed in enumerate(steps, 1):
        run.log_step(step, len(steps), {**usual, **changed})


def test_a_collapsed_run_stops_after_ten_steps_with_the_last_one_logged(tmp_path):
    dead = {"reward/commonest": 1.0}
    log_steps(tmp_path / "nine", [dead] * 9 + [{}] + [dead] * 9)
    with pytest.raises(ValueError, match="stopped at step 12: for 10 steps in a row .* collapsed"):
        log_steps(tmp_path / "ten", [{}, {}] + [dead] * 11)
    lines = (tmp_path / "ten" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


# ---- full, read-only and shared disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk to fill: mounting one needs the rights of an administrator")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_with_room_it_resumes_to_the_same_end(
        files, undisturbed, small_disk, capsys):
    error, status = refusal(arguments(files, small_disk / "run"), capsys)
    assert status == 2 and "cannot be" in error and "No space left" in error
    remount(small_disk, "size=20m")
    train.main(arguments(files, small_disk / "run"))
    assert "going on from" in capsys.readouterr().out
    assert differences(small_disk / "run", undisturbed("grpo")) == []


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
    wait_until_it_prints("pausing", tmp_path / "log")
    before = (out / "metrics.jsonl").read_bytes()
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and str(out) in error and "another process is at work" in error
    assert (out / "metrics.jsonl").read_bytes() == before
    os.kill(pid, signal.SIGKILL)
    assert wait_for(pid) == -signal.SIGKILL
    train.main(arguments(files, out, "--checkpoint.keep=1", "--train.steps=8"))
