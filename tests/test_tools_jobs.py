"""tools/jobs.py: jobs run two at a time, in order, once; a failure, a signal and a kill end all of them."""

import os
import signal
import time

import pytest
import short_run
import torch

from runtime.files import read_json
from tools import jobs
from tools.jobs import Job, minutes_together, work


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(jobs, "WATCH_S", 0.02)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def note(folder, name, until=None):
    """A job that writes that it began, and that it ended once the file `until` is there."""
    def run():
        with open(folder / "order", "a") as file:
            print(f"+{name}", file=file)
        deadline = time.monotonic() + 60
        while until and not (folder / until).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with open(folder / "order", "a") as file:
            print(f"-{name}", file=file)

    return run


def test_the_time_of_jobs_that_wait_for_others_is_that_of_two_lanes():
    waiting = {"a": Job(set(), 2, None), "b": Job(set(), 1, None), "c": Job({"b"}, 3, None),
               "d": Job({"a", "c"}, 1, None)}
    assert minutes_together(waiting) == 5
    assert minutes_together(waiting, {"a", "b"}) == 4


def test_two_jobs_are_at_work_at_once_and_a_third_waits_for_what_it_needs(tmp_path):
    order = tmp_path / "order"
    waiting = {"a": Job(set(), 1, note(tmp_path, "a", until="done/b")),
               "b": Job(set(), 1, note(tmp_path, "b")), "c": Job({"a"}, 1, note(tmp_path, "c"))}
    assert work(tmp_path, waiting) == 0
    lines = order.read_text().split()
    assert lines.index("+b") < lines.index("-a") < lines.index("+c")
    assert {file.name for file in (tmp_path / "done").iterdir()} == {"a", "b", "c"}
    assert work(tmp_path, waiting) == 0 and order.read_text().split() == lines, "what is done is not repeated"


def test_the_pace_is_measured_in_as_many_jobs_as_run_at_once(tmp_path):
    def measure(i):
        (tmp_path / f"began-{i}").touch()
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"began-{k}").exists() for k in range(jobs.AT_ONCE)):
            assert time.monotonic() < deadline, "alone"
        return {"i": i}

    assert work(tmp_path, jobs.pace_jobs(tmp_path, 1, measure)) == 0
    assert [read_json(tmp_path / f"pace-{i}.json")["i"] for i in range(jobs.AT_ONCE)] == [0, 1]


def test_a_job_has_one_thread_its_own_log_and_its_time_in_sittings(tmp_path):
    def run():
        print(torch.get_num_threads(), "thread")

    assert work(tmp_path, {"a": Job(set(), 1, run)}) == 0
    assert (tmp_path / "logs/a.txt").read_text() == "1 thread\n"
    (sitting,) = read_json(tmp_path / "sittings.json").values()
    processor, clock = sitting["spent"]["a"]
    assert 0 < processor and 0 < clock <= 3600 * sitting["hours"] and sitting["steps"] == {}


def test_sittings_of_one_second_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.time, "gmtime", lambda began: time.localtime(0))
    for name in ("a", "b"):
        assert work(tmp_path, {name: Job(set(), 1, note(tmp_path, name))}) == 0
    assert [set(each["spent"]) for each in read_json(tmp_path / "sittings.json").values()] == [{"a"}, {"b"}]


def test_what_does_not_need_a_failed_job_is_done_and_the_failed_one_is_named(tmp_path, capsys):
    def fail():
        raise KeyError("missing")

    waiting = {"a": Job(set(), 1, note(tmp_path, "a")), "b": Job(set(), 1, fail),
               "c": Job({"b"}, 1, note(tmp_path, "c")), "d": Job({"a"}, 1, note(tmp_path, "d"))}
    assert work(tmp_path, waiting) == 1
    assert "failed: b; see " in capsys.readouterr().err
    assert "KeyError: 'missing'" in (tmp_path / "logs/b.txt").read_text()
    assert {file.name for file in (tmp_path / "done").iterdir()} == {"a", "d"}
    assert "c" not in (tmp_path / "order").read_text()
    assert work(tmp_path, waiting | {"b": Job(set(), 1, note(tmp_path, "b"))}) == 0, "it is tried again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_end_with_the_process_that_started_them(tmp_path, number):
    waiting = {name: Job(set(), 1, note(tmp_path, name, until="never")) for name in ("a", "b")}

    def start():
        raise SystemExit(work(tmp_path, waiting))

    pid = short_run.start_child(start, tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "order").exists() or len((tmp_path / "order").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, number)
    assert short_run.wait_for(pid) == (128 + number if number == signal.SIGTERM else -number)
    while True:
        try:
            jobs.lock(tmp_path).close()  # which the jobs hold too
            break
        except ValueError:
            assert time.monotonic() < deadline, "a job outlived the killed process"
            time.sleep(0.01)
    assert "-" not in (tmp_path / "order").read_text()
