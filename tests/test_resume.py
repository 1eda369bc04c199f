"""A run that was killed and goes on is, bit for bit, the run that was left in peace.

Children are killed with SIGKILL in chosen places; random ones are for tools/soak.py.
"""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from short_run import (
    STEPS,
    arguments,
    ask_to_stop,
    at_call,
    die,
    in_child,
    in_ranks,
    inside_generate,
    limit_time,
    make_files,
    make_setting,
    pause,
    refusal,
    start_child,
    start_ranks,
    wait_for,
    wait_until_it_says,
)

import train
from data import write_jsonl
from runtime import checkpoints, signals, tensors
from runtime.files import check_seal
from tools.soak import differences, rows
from tools.synthetic import synthetic

limit = pytest.fixture(autouse=True)(limit_time)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


setting = pytest.fixture(autouse=True)(make_setting)


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    """The finished run of a stage with these settings, made once."""
    runs = {}

    def run_of(stage, *more):
        if (stage, more) not in runs:
            runs[stage, more] = tmp_path_factory.mktemp("runs") / stage
            train.main(arguments(files, runs[stage, more], f"--stage={stage}", *more))
        return runs[stage, more]

    return run_of


def killed(files, out, *more, by=(), log):
    """The run in a child that dies by SIGKILL where `by`, a function and its arguments, says."""
    def action():
        by[0](*by[1:])
        train.main(arguments(files, out, *more))

    status, text = in_child(action, log)
    assert status == -signal.SIGKILL, text
    return text


def newest(out):
    return sorted(path.name for path in (out / "checkpoints").glob("step_??????"))[-1]


def find(run, settings):
    """The checkpoint that a run folder resumes from, and the state in it."""
    return run.newest_checkpoint(train.read_yaml, settings, train.flat(train.Config()), {})


def back_to(run, step, out):
    """A copy of a finished run as it was some time after the checkpoint of a step."""
    shutil.copytree(run, out)
    for folder in (out / "checkpoints").iterdir():
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)
    return out


# ---- exact


def test_the_runs_of_these_tests_learn_something_in_every_step(undisturbed):
    for stage in ("grpo", "sft"):
        steps = [row for row in rows(undisturbed(stage)) if "loss" in row]
        assert len(steps) == STEPS and all(row["grad_norm"] > 0 for row in steps)
    weights = [train.load_hf(undisturbed(stage) / "checkpoints" / f"step_{STEPS:06d}").state_dict()
               for stage in ("grpo", "sft")]
    assert not torch.equal(weights[0]["norm.weight"], weights[1]["norm.weight"])


def test_two_runs_of_the_same_command_are_the_same_and_the_comparison_sees_what_is_not(
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
def test_killed_in_rollout_update_evaluation_and_save_a_run_ends_as_if_left_in_peace(
        files, undisturbed, tmp_path, stage):
    # What the life is ended in, the newest checkpoint that it leaves: each life starts from the one before.
    lives = [
        ((inside_generate, "generate", 2, die), None),  # before the first checkpoint
        ((inside_generate, "generate", 4, die), "step_000002"),
        ((at_call, train, "apply_update", 3, die, True), "step_000002"),  # the second of its step is missing
        ((inside_generate, "evaluate", 1, die), "step_000002"),
        ((at_call, checkpoints, "seal", 1, die, True), "step_000002"),  # all is written, but not renamed
        ((at_call, checkpoints, "seal", 2, die), "step_000004"),
        ((at_call, os, "replace", 1, die, True), "step_000004"),  # in setup
        ((at_call, train.RunFolder, "log_step", 3, die, True), "step_000006"),
    ]
    if stage == "sft":
        lives[:2] = [((at_call, train, "sft_loss", 4, die), None), ((at_call, train, "sft_loss", 8, die),
                                                                    "step_000002")]
    for number, (by, left) in enumerate(lives):
        text = killed(files, tmp_path / "run", f"--stage={stage}", by=by, log=tmp_path / "log")
        saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_??????"))
        assert saved[-1:] == [left] * (left is not None), f"life {number}\n{text}"
    train.main(arguments(files, tmp_path / "run", f"--stage={stage}"))
    assert differences(tmp_path / "run", undisturbed(stage)) == []
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_the_checkpoint_that_is_used_is_said_and_so_is_a_start_from_nothing(
        files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    train.main(arguments(files, out))
    assert f"going on from {out / 'checkpoints/step_000004'}\n" in capsys.readouterr().out
    shutil.rmtree(out / "checkpoints")
    train.main(arguments(files, out))
    assert f"no checkpoint in {out}: starting from step 0\n" in capsys.readouterr().out
    assert differences(out, undisturbed("grpo")) == []


def test_what_was_logged_after_the_boundary_is_dropped_and_so_is_what_was_not_finished(
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


def test_a_finished_run_that_is_started_again_does_nothing(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), STEPS, tmp_path / "run")
    train.main(arguments(files, out))
    assert "tok/s" not in capsys.readouterr().out
    assert differences(out, undisturbed("grpo")) == []


def test_steps_in_a_row_without_a_gradient_are_counted_over_a_kill(files, tmp_path, monkeypatch, capsys):
    def skip(optimizer, grad_clip, loss):
        optimizer.zero_grad()
        return float("nan"), 1

    monkeypatch.setattr(train, "apply_update", skip)
    out = tmp_path / "run"
    more = ["--checkpoint.every=1"]
    killed(files, out, *more, by=(inside_generate, "generate", 3, die), log=tmp_path / "log")
    assert newest(out) == "step_000002"
    error, status = refusal(arguments(files, out, *more), capsys)
    assert status == 3 and "step_000003.jsonl" in error


def test_minutes_of_steps_are_counted_over_a_restart(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 2, tmp_path / "run")
    state = json.loads((out / "checkpoints/step_000002/training.json").read_text())
    limit = state["trained_s"] / 60
    train.main(arguments(files, out, f"--train.max_minutes={limit / 2}"))
    assert "tok/s" not in capsys.readouterr().out, "it had its minutes"
    train.main(arguments(files, out, f"--train.max_minutes={limit * 1000}"))
    assert newest(out) == f"step_{STEPS:06d}"


# ---- signals

MAX_PROMPT, ONE_PROMPT_A_PACK = "--data.max_prompt_tokens=400", "--train.micro_batch_tokens=430"


@pytest.mark.parametrize(("by", "saved"), [
    ((inside_generate, "generate", 4, ask_to_stop), "step_000003"),
    ((inside_generate, "evaluate", 2, ask_to_stop), "step_000003"),
    ((at_call, train, "apply_update", 7, ask_to_stop), "step_000004"),  # the step is finished first
    ((at_call, train, "grpo_updates", 4, ask_to_stop), "step_000003"),
], ids=["rollout", "evaluation", "between updates", "before the first update"])
def test_sigterm_saves_the_last_boundary_and_the_run_ends_as_if_left_in_peace(
        files, undisturbed, tmp_path, by, saved):
    more = ONE_PROMPT_A_PACK, MAX_PROMPT, "--checkpoint.every=5"

    def action():
        by[0](*by[1:])
        train.main(arguments(files, tmp_path / "run", *more))

    status, text = in_child(action, tmp_path / "log")
    assert status == 143, text
    assert newest(tmp_path / "run") == saved
    assert f"goes on from {tmp_path / 'run/checkpoints' / saved}" in text and "Traceback" not in text
    train.main(arguments(files, tmp_path / "run", *more))
    assert differences(tmp_path / "run", undisturbed("grpo", *more)) == []


def test_sigterm_in_a_supervised_update_saves_too(files, undisturbed, tmp_path):
    def action():
        at_call(train, "sft_updates", 4, ask_to_stop)
        train.main(arguments(files, tmp_path / "run", *more))

    more = "--stage=sft", ONE_PROMPT_A_PACK, MAX_PROMPT, "--checkpoint.every=5"
    status, text = in_child(action, tmp_path / "log")
    assert status == 143 and newest(tmp_path / "run") == "step_000003", text
    assert "stopped after step 3" in text
    train.main(arguments(files, tmp_path / "run", *more))
    assert differences(tmp_path / "run", undisturbed("sft", *more[1:])) == []


def test_updates_that_take_too_long_after_a_signal_are_left_for_the_newest_checkpoint(
        files, undisturbed, tmp_path):
    def action():
        signals.TO_FINISH_S = 0
        at_call(train, "apply_update", 7, ask_to_stop)
        train.main(arguments(files, tmp_path / "run"))

    status, text = in_child(action, tmp_path / "log")
    assert status == 143 and newest(tmp_path / "run") == "step_000002", text
    assert "stopped after step 3" in text and "step_000002" in text
    train.main(arguments(files, tmp_path / "run"))
    assert differences(tmp_path / "run", undisturbed("grpo")) == []


def test_ctrl_c_ends_with_status_130_and_the_handlers_are_put_back(files, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside = train.generate
    inside_generate("generate", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    patched, train.generate = train.generate, inside
    monkeypatch.setattr(train, "generate", patched)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, tmp_path / "run"))
    assert stopped.value.code == 130 and newest(tmp_path / "run") == "step_000001"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_the_process_at_once_but_not_its_echo(files, tmp_path):
    def action():
        at_call(train, "generate", 1, pause)
        train.main(arguments(files, tmp_path / "run"))

    pid = start_child(action, tmp_path / "log")
    wait_until_it_says("pausing", tmp_path / "log")
    os.kill(pid, signal.SIGTERM)
    wait_until_it_says("stopping", tmp_path / "log")
    os.kill(pid, signal.SIGTERM)
    time.sleep(1.1)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "an echo of the first is not a second one"
    os.kill(pid, signal.SIGTERM)
    assert wait_for(pid, 2) == -signal.SIGTERM


# ---- several ranks


@pytest.fixture(scope="module")
def undisturbed_pair(files, tmp_path_factory):
    """`undisturbed` on two ranks."""
    runs = {}

    def run_of(stage, *more):
        if (stage, more) not in runs:
            out = runs[stage, more] = tmp_path_factory.mktemp("pairs") / stage
            words = arguments(files, out, f"--stage={stage}", *more)
            statuses, texts = in_ranks(2, lambda rank: train.main(words), f"{out}.log")
            assert statuses == [0, 0] and texts[1] == "", texts
        return runs[stage, more]

    return run_of


def pair(files, out, *more, struck=0, by=(int,), log):
    """(statuses, texts) of two ranks, one of which `by`, a function and its arguments, strikes."""
    def action(rank):
        if rank == struck:
            by[0](*by[1:])
        train.main(arguments(files, out, *more))

    return in_ranks(2, action, log)


# In each life: which rank is struck, by what, the status it ends with, the phase, the newest checkpoint left.
KILLED, STOPPED = -signal.SIGKILL, 143
PAIR_LIVES = {
    "grpo": [
        (1, (inside_generate, "generate", 4, die), KILLED, "rollout of step 4", "step_000002"),
        # Five passes a step; in this one the embedding is whole, and what is saved must be right even so.
        (0, (at_call, train, "logprobs_of_pack", 7, ask_to_stop), STOPPED, None, "step_000003"),
        (0, (at_call, train, "apply_update", 1, die, True), KILLED, "update of step 4", "step_000003"),
        (1, (at_call, tensors, "write_tensors", 1, die), KILLED, "save after step 4", "step_000003"),
        (1, (inside_generate, "evaluate", 1, die), KILLED, "evaluation after step 6", "step_000004"),
        (1, (inside_generate, "generate", 2, ask_to_stop), STOPPED, None, "step_000005"),
    ],
    "sft": [
        (1, (at_call, train, "sft_loss", 7, die), KILLED, "update of step 4", "step_000002"),
        (0, (at_call, checkpoints, "seal", 1, die, True), KILLED, "save after step 4", "step_000002"),
    ],
}


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_two_ranks_end_alike_wherever_one_is_killed_or_stopped_and_go_on_as_if_left_in_peace(
        files, undisturbed_pair, tmp_path, stage):
    for struck, by, status, phase, left in PAIR_LIVES[stage]:
        statuses, texts = pair(files, tmp_path / "run", f"--stage={stage}", struck=struck, by=by,
                               log=tmp_path / "log")
        assert statuses[struck] == status and newest(tmp_path / "run") == left, texts
        if status == STOPPED:
            assert statuses[1 - struck] == STOPPED, "a signal to one stops both at the same boundary"
            continue
        assert statuses[1 - struck] == 1
        assert f"error on rank {1 - struck} in the {phase}: " in texts[1 - struck]
        if phase.startswith("rollout"):
            assert "Ranks 1 failed" in texts[0], "the first rank names the one that did not come"
    statuses, texts = pair(files, tmp_path / "run", f"--stage={stage}", log=tmp_path / "log")
    assert statuses == [0, 0], texts
    assert differences(tmp_path / "run", undisturbed_pair(stage)) == []


def test_a_run_goes_on_with_another_number_of_ranks_and_the_same_data(
        files, undisturbed, undisturbed_pair, tmp_path):
    fewer = back_to(undisturbed_pair("grpo"), 4, tmp_path / "fewer")
    train.main(arguments(files, fewer))
    more = back_to(undisturbed("grpo"), 4, tmp_path / "more")
    statuses, texts = pair(files, more, log=tmp_path / "log")
    assert statuses == [0, 0], texts
    for run, whole in ((fewer, undisturbed_pair("grpo")), (more, undisturbed("grpo"))):
        ours, theirs = rows(run), rows(whole)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert ours[:6] == theirs[:6]
        fifth, expected = ours[6], theirs[6]
        assert fifth == pytest.approx(expected, rel=1e-3, abs=1e-3) and fifth != expected
        for name in (f"rollouts/step_{step:06d}.jsonl" for step in range(1, STEPS + 1)):
            asked = [[json.loads(line)["id"] for line in (folder / name).read_text().splitlines()]
                     for folder in (run, whole)]
            assert asked[0] == asked[1] and len(asked[0]) == 12


def test_what_the_first_rank_refuses_is_one_line_of_all(files, undisturbed_pair, tmp_path):
    statuses, texts = pair(files, undisturbed_pair("grpo"), "--seed=3", log=tmp_path / "log")
    assert statuses == [2, 2] and "another seed" in texts[0] and texts[1] == ""
    assert texts[0].startswith("error: ") and texts[0].count("\n") == 1


def test_a_rank_that_hangs_ends_the_job_within_the_timeout_and_is_named(files, tmp_path):
    def action(rank):
        if rank == 1:
            inside_generate("generate", 2, pause)
        train.main(arguments(files, tmp_path / "run", "--train.timeout_minutes=0.1"))

    waiting, hanging = start_ranks(2, action, tmp_path / "log")
    status = wait_for(waiting)
    os.kill(hanging, signal.SIGKILL)
    wait_for(hanging)
    text = (tmp_path / "log0").read_text()
    assert status == 1 and "error on rank 0 in the rollout of step 2: [Rank 0]: Ranks 1 failed" in text, text


# ---- what is refused, and what may change


@pytest.mark.parametrize("change", [
    "--seed=1", "--train.lr=0.02", "--rollout.n=2", "--grpo.clip_low=0.1", "--train.updates_per_step=1",
    "--data.max_prompt_tokens=500", "--train.steps=9", "--train.weight_decay=0.1", "--model.precision=bf16"])
def test_a_config_that_would_take_another_course_is_refused_by_its_keys(
        files, undisturbed, capsys, change):
    before = (undisturbed("grpo") / "metrics.jsonl").read_bytes()
    error, status = refusal(arguments(files, undisturbed("grpo"), change, "--grpo.normalize=none"), capsys)
    assert status == 2 and change[2:].split("=")[0] in error and "grpo.normalize" in error
    assert "train.prompts_per_step" not in error
    assert (undisturbed("grpo") / "metrics.jsonl").read_bytes() == before


def test_what_is_looked_at_kept_or_bounds_memory_may_change(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), STEPS, tmp_path / "run")
    moved = shutil.copy(files / "train.jsonl", tmp_path / "moved.jsonl")
    train.main(arguments(files, out, "--eval.every=1", "--eval.examples=3", "--log.rollouts_every=5",
                         "--checkpoint.every=1", "--checkpoint.keep=2", "--train.micro_batch_tokens=4000",
                         "--train.activation_checkpointing=true", "--rollout.batch_size=2",
                         "--train.max_minutes=100", f"--data.train={moved}"))
    assert "going on" in capsys.readouterr().out


def test_a_constant_learning_rate_lets_a_run_be_prolonged_exactly_but_not_cut_short(
        files, tmp_path, capsys):
    constant = ["--train.schedule=constant", "--eval.every=2"]
    train.main(arguments(files, tmp_path / "long", *constant, "--train.steps=6"))
    train.main(arguments(files, tmp_path / "run", *constant, "--train.steps=2"))
    train.main(arguments(files, tmp_path / "run", *constant, "--train.steps=6"))
    assert differences(tmp_path / "run", tmp_path / "long") == []
    error, status = refusal(arguments(files, tmp_path / "run", *constant, "--train.steps=3"), capsys)
    assert status == 2 and "raise train.steps" in error


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


def test_resume_false_wants_a_folder_without_a_run_and_true_one_with_a_run(
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
    """Spoil a checkpoint; some ways leave it as it is and put something newer and wrong beside it."""
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    beside = folder.with_name("step_000009")
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
        beside.mkdir()
        (beside / "notes.txt").write_text("mine")
        return beside
    elif how == "a file":
        beside.write_text("mine")
        return beside
    return folder


@pytest.mark.parametrize("how", [
    "torn", "truncated", "a file is missing", "an empty manifest", "a manifest of no files",
    "a manifest of something else", "a manifest that leads elsewhere", "another step",
    "a folder of something else", "a file"])
def test_a_spoiled_checkpoint_is_named_passed_over_and_left_where_it_is(
        files, undisturbed, tmp_path, capsys, how):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    spoiled = damage(out / "checkpoints/step_000008", how)
    with train.RunFolder(out, "auto") as run:
        found, _ = find(run, train.flat(train.load_config(arguments(files, out))))
    said = capsys.readouterr().out
    assert found == out / "checkpoints" / ("step_000008" if spoiled.name == "step_000009" else "step_000006")
    assert f"passed over {spoiled}: " in said and f"going on from {found}\n" in said
    assert spoiled.exists()


def test_a_run_none_of_whose_checkpoints_can_be_used_is_refused_and_left_as_it_is(
        files, undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    for folder in (out / "checkpoints").iterdir():
        damage(folder, "truncated")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "no checkpoint of this run can be used" in error and "--out" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_rows_that_are_missing_before_the_boundary_are_refused(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    kept = (out / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    (out / "metrics.jsonl").write_text("".join(kept))
    error, status = refusal(arguments(files, out), capsys)
    assert status == 2 and "has 3 rows, but 6 were written up to step 4" in error
    assert (out / "metrics.jsonl").read_text() == "".join(kept)


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


def test_a_checkpoint_of_another_run_is_passed_over(files, undisturbed, tmp_path, capsys):
    out = back_to(undisturbed("grpo"), 4, tmp_path / "run")
    shutil.copytree(undisturbed("sft") / "checkpoints/step_000008", out / "checkpoints/step_000008")
    train.main(arguments(files, out))
    assert "step_000008: it is of a run with another stage" in capsys.readouterr().out
    assert differences(out, undisturbed("grpo")) == []
    # What stood under the name of a new checkpoint was not thrown away.
    replaced = json.loads((out / "checkpoints/step_000008.replaced/training.json").read_text())
    assert replaced["config"]["stage"] == "sft"


def test_a_run_with_a_spoiled_newest_checkpoint_ends_as_if_left_in_peace(files, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed("grpo"), tmp_path / "run")
    for name in ("step_000008", "step_000006"):
        damage(out / "checkpoints" / name, "truncated")
    train.main(arguments(files, out, "--checkpoint.keep=2"))
    assert differences(out, undisturbed("grpo")) == []
    # Of the two that are kept none is the spoiled one.
    assert newest(out) == "step_000008"
    for name in ("step_000008", "step_000006"):
        check_seal(out / "checkpoints" / name)


def test_only_so_many_checkpoints_are_kept_and_never_by_counting_spoiled_ones(files, undisturbed, tmp_path):
    out = back_to(undisturbed("grpo"), 6, tmp_path / "run")
    shutil.copytree(out / "checkpoints/step_000006", out / "checkpoints/step_000009")
    train.main(arguments(files, out, "--checkpoint.keep=1"))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000008", "step_000009"]


def test_transformers_loads_a_checkpoint_with_equal_logits(undisturbed):
    transformers = pytest.importorskip("transformers")
    folder = undisturbed("grpo") / "checkpoints/step_000008"
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), train.load_hf(folder)
    ids = torch.arange(100, 140)
    hidden_TD = ours(ids, torch.arange(40), train.shared_prefix_attention([(40, [])]))
    assert torch.allclose(theirs(ids[None]).logits[0], hidden_TD @ ours.head_weight().T, atol=1e-5)


# ---- run folders of earlier versions


def test_a_run_folder_of_an_earlier_version_resumes_to_the_end_that_it_had_there(
        tmp_path, monkeypatch, capsys):
    """tests/old_run was written by the version before runtime/ existed: two of its four steps, and what its
    last two had logged and learnt. Machines differ in the last bit."""
    old = shutil.copytree("tests/old_run", tmp_path / "old")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"assets/tiny/{name}", old / "base")
    expected = rows(old / "run")
    replies = {file.name: file.read_bytes() for file in (old / "run/rollouts").iterdir()}
    monkeypatch.chdir(old)
    train.main(["run/config.yaml"])
    assert "going on from run/checkpoints/step_000002\n" in capsys.readouterr().out
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
