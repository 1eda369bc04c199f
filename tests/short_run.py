"""What the tests of runs share: a short run on a toy model, and child processes that may be killed.

A child is a fork of the test process, so it imports nothing, and what it patches ends with it.
"""

import contextlib
import errno
import functools
import io
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import reward
import train
from data import write_jsonl
from model import ModelConfig, Transformer, save_hf
from reward import Verdict
from tools.synthetic import synthetic

STEPS = 8
# Metrics of a step that teaches something.
HEALTHY = {"reward/commonest": 0.1, "reward/live": 0.5, "reward/all_one": 0.3, "reward/all_zero": 0.2}
LOOPBACK = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
LIMIT_S = 600  # of a test, and half of it of a child: only a hang takes so long


def pay_odd_lengths(reply, answer, scheme):
    """A reward that random replies earn about half of the time."""
    right = len(reply) % 2 == 1
    return Verdict(float(right), right, right, right, [], None if right else "even")


def make_base(folder, hidden_size=32):
    """A model folder with the tokenizer of assets/tiny and random weights."""
    # The tokenizer has 1,230 tokens: the last 20 rows have none.
    config = ModelConfig(vocab_size=1250, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=hidden_size // 2, tie_word_embeddings=True, max_position_embeddings=1024)
    save_hf(Transformer(config).init_weights(0), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(Path("assets/tiny") / name, folder)
    return folder


def make_files(folder):
    """A model folder `base` and two files of examples."""
    make_base(folder / "base")
    # Two steps an epoch, so that checkpoints lie at the ends of epochs.
    write_jsonl(folder / "train.jsonl", synthetic(8, 0, "train"))
    write_jsonl(folder / "heldout.jsonl", synthetic(6, 0, "heldout"))
    return folder


SHARED = {}  # made once in a test process and never changed: the files, and finished runs


def shared_files(tmp_path_factory):
    """For a fixture: the folder of `make_files`."""
    if "files" not in SHARED:
        SHARED["files"] = make_files(tmp_path_factory.mktemp("files"))
    return SHARED["files"]


def shared_runs(tmp_path_factory):
    """For a fixture: a function (stage, *more settings) that returns the folder of the finished run."""
    def run_of(stage, *more):
        if (stage, more) not in SHARED:
            out = tmp_path_factory.mktemp("runs") / stage
            with contextlib.redirect_stdout(io.StringIO()):  # a test may look at its own output only
                train.main(arguments(shared_files(tmp_path_factory), out, f"--stage={stage}", *more))
            SHARED[stage, more] = out
        return SHARED[stage, more]

    return run_of


def arguments(files, out, *more):
    """The command line of a run of STEPS steps with four checkpoints and four evaluations."""
    return ["configs/demo.yaml", f"--out={out}", f"--model.path={files / 'base'}",
            f"--data.train={files / 'train.jsonl'}", f"--data.heldout={files / 'heldout.jsonl'}",
            f"--train.steps={STEPS}", "--train.prompts_per_step=4", "--train.updates_per_step=2",
            "--train.lr=0.01", "--rollout.n=3", "--rollout.max_new_tokens=9", "--eval.every=3",
            "--eval.max_new_tokens=9", "--checkpoint.every=2", "--log.rollouts_every=1",
            "--grpo.kl_coef=0.1", *more]


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def pause():
    """Stay in this call until the process is killed; signals are handled."""
    print("pausing")
    while True:
        time.sleep(0.01)


def at_call(module, name, number, what, after=False):
    """Patch a function to do `what` before (or after) its call of that number, counted from 1."""
    function, calls = getattr(module, name), []

    def patched(*arguments, **settings):
        calls.append(1)
        if len(calls) == number and not after:
            what()
        result = function(*arguments, **settings)
        if len(calls) == number and after:
            what()
        return result

    setattr(module, name, patched)


def inside_generate(name, number, what):
    """Do `what` in the middle of the replies of train.generate or train.evaluate: at the second poll."""
    function, calls = getattr(train, name), []

    def patched(*arguments, should_stop, **settings):
        calls.append(1)
        polls = []

        def poll():
            polls.append(1)
            if len(calls) == number and len(polls) == 2:
                what()
            return should_stop()

        return function(*arguments, should_stop=poll, **settings)

    setattr(train, name, patched)


def in_child(action, log):
    """Do `action` in a child. Returns (its exit status, less than 0 for a signal; what it printed)."""
    pid = start_child(action, log)
    return wait_for(pid), Path(log).read_text(encoding="utf-8")


def start_child(action, log):
    # Modules that training imports late, once here and not in every child.
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401

    pid = os.fork()
    if pid:
        return pid
    status = 70
    # If its parent has died, the alarm ends it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIMIT_S)
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
        action()
        status = 0
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def start_ranks(ranks, action, log):
    """Do action(rank) in children that can meet, as if torchrun had started them. Returns their ids."""
    meeting = {**LOOPBACK, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def as_rank(rank):
        os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank))
        action(rank)

    return [start_child(functools.partial(as_rank, rank), f"{log}{rank}") for rank in range(ranks)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_ranks(ranks, action, log):
    """(exit statuses, what each printed) of `start_ranks`."""
    statuses = [wait_for(pid) for pid in start_ranks(ranks, action, log)]
    return statuses, [Path(f"{log}{rank}").read_text(encoding="utf-8") for rank in range(ranks)]


def wait_until_it_prints(words, log):
    deadline = time.monotonic() + LIMIT_S / 2
    while words not in (Path(log).read_text(encoding="utf-8") if Path(log).exists() else ""):
        assert time.monotonic() < deadline, f"the child never printed {words!r}"
        time.sleep(0.005)


def wait_for(pid):
    """The exit status of a child, less than 0 for a signal."""
    deadline = time.monotonic() + LIMIT_S / 2
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"the child did not end within {LIMIT_S / 2} s")


def limit_time():
    """For a fixture: TimeoutError in a test that takes longer than LIMIT_S."""
    def complain(number, frame):
        raise TimeoutError(f"no end after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, complain)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(words, capsys):
    """The one line and the status with which train.py ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    error = capsys.readouterr().err
    # Which kernel runs is printed there too, once.
    lines = [line for line in error.splitlines() if line and "kernel" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    return lines[0], stopped.value.code


def make_setting(monkeypatch):
    """For a fixture: a reward that random replies earn, and no fsync, since here no machine crashes."""
    monkeypatch.setattr(reward, "score", pay_odd_lengths)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def equal_weights(folder, model):
    saved = train.load_hf(folder).state_dict()
    return all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


def killed(files, out, *more, by, log):
    """What the run printed in a child that SIGKILL ends where `by`, a function and its arguments, says."""
    def action():
        by[0](*by[1:])
        train.main(arguments(files, out, *more))

    status, text = in_child(action, log)
    assert status == -signal.SIGKILL, text
    return text


def newest(out):
    """The name of a run folder's newest checkpoint."""
    return sorted(path.name for path in (out / "checkpoints").glob("step_??????"))[-1]


def back_to(run, step, out):
    """A copy of a finished run, at `out`, without the checkpoints after a step."""
    shutil.copytree(run, out)
    for folder in (out / "checkpoints").iterdir():
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)
    return out
