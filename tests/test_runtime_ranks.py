"""runtime/ranks.py: several ranks end together and resume, also on another number of ranks; torchrun.

Ranks are forks of the test process; the last test starts them with torchrun.
"""

import contextlib
import datetime
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from short_run import (
    LOOPBACK,
    arguments,
    ask_to_stop,
    at_call,
    back_to,
    die,
    in_ranks,
    inside_generate,
    limit_time,
    make_setting,
    newest,
    pause,
    shared_files,
    shared_runs,
    start_child,
    start_ranks,
    wait_for,
    wait_until_it_prints,
)
from soak import differences, rows

import train
from runtime import checkpoints, ranks, tensors

limit = pytest.fixture(autouse=True)(limit_time)
setting = pytest.fixture(autouse=True)(make_setting)
files = pytest.fixture(scope="module")(shared_files)
undisturbed = pytest.fixture(scope="module")(shared_runs)


@pytest.fixture(scope="module")
def undisturbed_pair(files, tmp_path_factory):
    """A function (stage, *more settings) that returns the folder of the finished run on two ranks."""
    runs = {}

    def run_of(stage, *more):
        if (stage, more) not in runs:
            out = runs[stage, more] = tmp_path_factory.mktemp("pairs") / stage
            words = arguments(files, out, f"--stage={stage}", f"--train.steps={STEPS[stage]}", *more)
            statuses, texts = in_ranks(2, lambda rank: train.main(words), f"{out}.log")
            assert statuses == [0, 0] and texts[1] == "", texts
        return runs[stage, more]

    return run_of


def pair(files, out, *more, struck=0, by=(int,), log):
    """(statuses, texts) of two ranks. `by`, a function and its arguments, is called on rank `struck`."""
    def action(rank):
        if rank == struck:
            by[0](*by[1:])
        train.main(arguments(files, out, *more))

    return in_ranks(2, action, log)


STEPS = {"grpo": 6, "sft": 5}
# Each life resumes what the one before left: the rank that is struck, by what, its exit status, the phase,
# and the newest checkpoint then.
KILLED, STOPPED = -signal.SIGKILL, 143


PAIR_LIVES = {
    "grpo": [
        (1, (inside_generate, "generate", 4, die), KILLED, "rollout of step 4", "step_000002"),
        # Five passes a step; in this one the embedding is gathered, and the save must be right all the same.
        (0, (at_call, train, "logprobs_of_pack", 7, ask_to_stop), STOPPED, None, "step_000003"),
        (0, (at_call, train, "apply_update", 1, die, True), KILLED, "update of step 4", "step_000003"),
        (1, (at_call, tensors, "write_tensors", 1, die), KILLED, "save after step 4", "step_000003"),
        (1, (inside_generate, "evaluate", 1, die), KILLED, "evaluation after step 6", "step_000004"),
        (1, (inside_generate, "generate", 2, ask_to_stop), STOPPED, None, "step_000005"),
    ],
    "sft": [
        (1, (at_call, train.grpo, "sft_loss", 7, die), KILLED, "update of step 4", "step_000002"),
        (0, (at_call, checkpoints, "seal", 1, die, True), KILLED, "save after step 4", "step_000002"),
    ],
}


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_if_one_of_two_ranks_is_killed_or_stopped_both_end_and_resume_as_if_undisturbed(
        files, undisturbed_pair, tmp_path, stage):
    words = f"--stage={stage}", f"--train.steps={STEPS[stage]}"
    for struck, by, status, phase, left in PAIR_LIVES[stage]:
        statuses, texts = pair(files, tmp_path / "run", *words, struck=struck, by=by, log=tmp_path / "log")
        assert statuses[struck] == status and newest(tmp_path / "run") == left, texts
        if status == STOPPED:
            assert statuses[1 - struck] == STOPPED, "a signal to one stops both at the same boundary"
            continue
        # The cause is gloo's: a monitored barrier names the rank only if it was waiting when the rank died.
        assert statuses[1 - struck] == 1
        cause = texts[1 - struck].partition(f"error on rank {1 - struck} in the {phase}: ")[2]
        assert cause and "Traceback" in texts[1 - struck], texts[1 - struck]
    statuses, texts = pair(files, tmp_path / "run", *words, log=tmp_path / "log")
    assert statuses == [0, 0], texts
    assert differences(tmp_path / "run", undisturbed_pair(stage)) == []


def test_a_run_resumes_on_another_number_of_ranks_with_the_same_data(
        files, undisturbed, undisturbed_pair, tmp_path):
    steps = f"--train.steps={STEPS['grpo']}"
    whole_pair, whole = undisturbed_pair("grpo"), undisturbed("grpo", steps)
    fewer = back_to(whole_pair, 4, tmp_path / "fewer")
    train.main(arguments(files, fewer, steps))
    more = back_to(whole, 4, tmp_path / "more")
    statuses, texts = pair(files, more, steps, log=tmp_path / "log")
    assert statuses == [0, 0], texts
    for run, expected in ((fewer, whole_pair), (more, whole)):
        ours, theirs = rows(run), rows(expected)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert ours[:6] == theirs[:6]
        # The fifth step, the first one on another number of ranks, is equal up to rounding.
        assert ours[6] == pytest.approx(theirs[6], rel=1e-3, abs=1e-3) and ours[6] != theirs[6]
        for name in (f"rollouts/step_{step:06d}.jsonl" for step in range(1, STEPS["grpo"] + 1)):
            asked = [[json.loads(line)["id"] for line in (folder / name).read_text().splitlines()]
                     for folder in (run, expected)]
            assert asked[0] == asked[1] and len(asked[0]) == 12


def test_what_the_first_rank_refuses_is_one_line_of_all_ranks(files, undisturbed_pair, tmp_path):
    words = "--train.steps=6", "--seed=3"
    statuses, texts = pair(files, undisturbed_pair("grpo"), *words, log=tmp_path / "log")
    assert statuses == [2, 2] and "another seed" in texts[0] and texts[1] == ""
    threads, error = texts[0].splitlines()
    assert threads.startswith("CPU: threads ") and error.startswith("error: ")


def test_a_rank_that_hangs_ends_the_job_after_the_timeout_and_is_named(files, tmp_path):
    def shorten_timeout():
        """Once both ranks are in their rollout: until then a slow one has all of train.timeout_minutes."""
        gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert gloo.options._timeout == datetime.timedelta(minutes=3)
        gloo._set_default_timeout(datetime.timedelta(seconds=0.5))

    def action(rank):
        inside_generate("generate", 2, pause if rank == 1 else shorten_timeout)
        train.main(arguments(files, tmp_path / "run", "--train.timeout_minutes=3"))

    waiting, hanging = start_ranks(2, action, tmp_path / "log")
    status = wait_for(waiting)
    os.kill(hanging, signal.SIGKILL)
    wait_for(hanging)
    text = (tmp_path / "log0").read_text()
    assert status == 1 and "error on rank 0 in the rollout of step 2: [Rank 0]: Ranks 1 failed" in text, text


def test_more_ranks_than_prompts_an_update_are_refused_before_they_meet(files, tmp_path, monkeypatch, capsys):
    for rank in range(3):
        for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3)):
            monkeypatch.setenv(key, str(value))
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments(files, tmp_path / "refused"))
        assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "2 prompts an update, fewer than the 3 ranks" in error and error.count("\n") == 1
    assert not (tmp_path / "refused").exists()


# ---- the functions


def raise_on_first_rank(message):
    raise ValueError(message)


def test_without_other_ranks_each_function_is_the_plain_one():
    assert ranks.all_gather("x") == ["x"] and ranks.my_share([1, 2, 3]) == [1, 2, 3]
    assert ranks.gather_in_order([1, 0], ["c", "d", "a", "b"]) == ["a", "b", "c", "d"]
    assert ranks.gather_in_order([], []) == []
    assert ranks.pad_to_longest([[1, 2], []], 0) == [[1, 2], []]
    assert ranks.on_first_rank(divmod, 7, 2) == (3, 1)
    with pytest.raises(ranks.RankError, match="^of the first$"):
        ranks.on_first_rank(raise_on_first_rank, "of the first")
    assert ranks.leave_ranks(0) is None
    with pytest.raises(SystemExit):
        ranks.leave_ranks(2)


def check_functions(rank):
    """What each of three ranks can see of the functions that are collective."""
    ranks.join_ranks("cpu", 3)
    assert ranks.all_gather(10 * rank) == [0, 10, 20] and ranks.is_first_rank() == (rank == 0)
    for items in range(8):
        shares = ranks.all_gather(ranks.my_share(range(items)))
        assert [x for share in shares for x in share] == list(range(items)), "in order, each once"
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert ranks.my_share(list(range(items))) == list(ranks.my_share(range(items)))
    # Indices out of order, two items each; the last rank has none.
    indices = ([3, 0], [1, 2], [])[rank]
    items = [f"{i}{half}" for i in indices for half in "ab"]
    assert ranks.gather_in_order(indices, items) == ["0a", "0b", "1a", "1b", "2a", "2b", "3a", "3b"]
    parts_U = ([["x"], []], [["x", "x"], []], [[], []])[rank]
    padded = ranks.pad_to_longest(parts_U, "filler")
    assert padded == [parts_U[0] + ["filler"] * (2 - len(parts_U[0])), []]
    assert ranks.on_first_rank(lambda: rank) == 0
    with pytest.raises(ranks.RankError, match="^of the first$"):
        ranks.on_first_rank(raise_on_first_rank, "of the first")
    print("checked")
    ranks.leave_ranks(0)


def test_three_ranks_exchange_values_share_work_and_raise_what_the_first_one_raised(tmp_path):
    statuses, texts = in_ranks(3, check_functions, tmp_path / "log")
    assert statuses == [0, 0, 0] and texts == ["checked\n"] * 3, texts


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


def test_torchrun_restarts_a_run_after_a_kill_and_stops_it_on_sigterm(files, tmp_path):
    from torch.distributed.run import main as torchrun

    out, log = tmp_path / "run", tmp_path / "log"
    # More steps than any machine takes before the signal.
    words = ["--stage=sft", "--train.schedule=constant", "--checkpoint.every=1", "--eval.every=1000000"]
    endless = arguments(files, out, *words, "--train.steps=900000")

    def agent():
        os.environ.update(LOOPBACK)
        torchrun(["--standalone", "--nproc_per_node=2", "--max-restarts=1", "train.py", *endless])

    pid = start_child(agent, log)
    try:
        wait_until_it_prints("step      2/900000", log)
        os.kill(children(pid)[1], signal.SIGKILL)
        wait_until_it_prints("going on from", log)
        resumed = int(re.search(r"going on from .*step_(\d+)", log.read_text())[1])
        wait_until_it_prints(f"step {resumed + 2:>6}/900000", log)
    finally:
        os.kill(pid, signal.SIGTERM)
        status, text = wait_for(pid), log.read_text()
    assert status != 0 and text.count("going on from") == 1 and "error on rank 0 in the" in text, text
    stopped = int(re.search(r"stopped after step (\d+): the same command goes on from", text)[1])
    assert newest(out) == f"step_{stopped:06d}"
    # Another start resumes, here on ranks that the test starts.
    statuses, texts = pair(files, out, *words, f"--train.steps={stopped + 1}", log=tmp_path / "log")
    assert statuses == [0, 0] and f"going on from {out / 'checkpoints'}/step_{stopped:06d}" in texts[0]
    steps = [row["step"] for row in rows(out) if "loss" in row]
    assert steps == list(range(1, stopped + 2))
