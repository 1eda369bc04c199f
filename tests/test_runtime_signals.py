"""runtime/signals.py: the first SIGTERM or SIGINT saves the last step boundary, the second one kills.

Children send themselves the signals, so no test waits for one.
"""

import os
import signal
import types

import pytest
from short_run import (
    arguments,
    ask_to_stop,
    at_call,
    in_child,
    inside_generate,
    limit_time,
    make_setting,
    newest,
    shared_files,
    shared_runs,
)
from soak import differences

import train
from runtime import signals

limit = pytest.fixture(autouse=True)(limit_time)
setting = pytest.fixture(autouse=True)(make_setting)
files = pytest.fixture(scope="module")(shared_files)
undisturbed = pytest.fixture(scope="module")(shared_runs)

MAX_PROMPT, ONE_PROMPT_A_PACK = "--data.max_prompt_tokens=400", "--train.micro_batch_tokens=430"


@pytest.mark.parametrize(("by", "saved"), [
    ((inside_generate, "generate", 4, ask_to_stop), "step_000003"),
    ((inside_generate, "evaluate", 2, ask_to_stop), "step_000003"),
    ((at_call, train, "apply_update", 7, ask_to_stop), "step_000004"),  # the step is finished first
    ((at_call, train, "grpo_updates", 4, ask_to_stop), "step_000003"),
], ids=["rollout", "evaluation", "between updates", "before the first update"])
def test_sigterm_saves_the_last_boundary_and_the_resumed_run_ends_as_if_undisturbed(
        files, undisturbed, tmp_path, by, saved):
    more = ONE_PROMPT_A_PACK, MAX_PROMPT, "--checkpoint.every=5"

    def action():
        signals.TO_FINISH_S = float("inf")  # for the step to be finished on a machine of any pace
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
        signals.TO_FINISH_S = float("inf")
        at_call(train, "sft_updates", 4, ask_to_stop)
        train.main(arguments(files, tmp_path / "run", *more))

    more = "--stage=sft", ONE_PROMPT_A_PACK, MAX_PROMPT, "--checkpoint.every=5"
    status, text = in_child(action, tmp_path / "log")
    assert status == 143 and newest(tmp_path / "run") == "step_000003", text
    assert "stopped after step 3" in text
    train.main(arguments(files, tmp_path / "run", *more))
    assert differences(tmp_path / "run", undisturbed("sft", *more[1:])) == []


def test_updates_that_take_too_long_after_a_signal_are_dropped_for_the_newest_checkpoint(
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


def test_ctrl_c_ends_with_status_130_and_the_handlers_are_restored(files, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside = train.generate
    inside_generate("generate", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    patched, train.generate = train.generate, inside
    monkeypatch.setattr(train, "generate", patched)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, tmp_path / "run"))
    assert stopped.value.code == 130 and newest(tmp_path / "run") == "step_000001"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_kills_the_process_but_an_echo_of_the_first_does_not(files, tmp_path):
    """The clock is the test's: an echo arrives within a second of the first signal."""
    clock = types.SimpleNamespace(now=100.0)

    def send():
        for clock.now in (100.0, 100.9, 101.1):
            print("sending at", clock.now)
            signal.raise_signal(signal.SIGTERM)
        print("still running")

    def action():
        signals.time = types.SimpleNamespace(monotonic=lambda: clock.now)
        at_call(train, "generate", 1, send)
        train.main(arguments(files, tmp_path / "run"))

    status, text = in_child(action, tmp_path / "log")
    assert status == -signal.SIGTERM
    assert text.count("stopping; a second signal ends this process at once") == 1
    assert "sending at 101.1" in text and "still running" not in text


def test_polling_stops_at_once_before_an_update_and_waits_for_the_boundary_within_one(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    with signals.Signals() as caught:
        caught.catch()
        caught.poll()
        caught.poll(True)
        assert not caught.received()
        signal.raise_signal(signal.SIGINT)
        assert caught.received() and caught.number == signal.SIGINT
        clock.now += signals.TO_FINISH_S - 0.1
        caught.poll(True)
        clock.now += 0.2
        for mid_update in (True, False):
            with pytest.raises(signals.Stopped):
                caught.poll(mid_update)
            assert caught.mid_update == mid_update


def test_before_there_is_state_to_save_a_signal_ends_the_process(files, tmp_path):
    def action():
        at_call(train, "load_model", 1, ask_to_stop)
        train.main(arguments(files, tmp_path / "run"))

    assert in_child(action, tmp_path / "log")[0] == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_prints_how_to_resume_and_no_traceback(files, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "generate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(files, tmp_path / "run"))
    error = capsys.readouterr().err
    assert stopped.value.code == 130 and "the same command" in error and "Traceback" not in error
