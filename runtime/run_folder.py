"""The folder of one run: its state, its lock, its logs, and what the console says of a step.

    config.yaml, git_revision.txt, hardware.txt    what was run, and on what
    metrics.jsonl                    one row a step and one an evaluation
    rollouts/step_000010.jsonl       one reply a line, with its reward and advantage
    evals/step_000010.json           one evaluation with every reply
    checkpoints/step_000010/         see runtime/checkpoints.py

All ranks keep the same state, that of a completed step; rank 0 locks the folder and writes. On resume, rows
and files after the checkpoint's step are deleted, so a resumed run leaves the folder of an undisturbed one.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import yaml

from runtime import checkpoints
from runtime.files import fsync, git_revision, lock, parse_json, read_json, write_json, write_text, writing
from runtime.metrics import console_line, diagnose, open_tracker, seconds_left
from runtime.ranks import RankError, all_gather, is_first_rank, on_first_rank, rank_variable
from runtime.sharding import hardware, peak_memory, reset_peak_memory

MAX_SKIPPED = 3  # steps in a row without a finite gradient before the run ends
MAX_DEAD = 10  # steps in a row with nothing to learn from before the run ends, see `metrics.diagnose`


class Diverged(RankError):
    """MAX_SKIPPED steps in a row had no finite gradient."""

    status = 3


class Stuck(RankError):
    """MAX_DEAD steps in a row had nothing to learn from."""


class RunFolder(contextlib.AbstractContextManager):
    """Files and console output of one run, a context manager.

    step: completed steps; rows: lines of metrics.jsonl; evaluated: whether `step` has been; trained_s:
    seconds of steps; shown: indices of the two printed replies; saved: step of the newest checkpoint."""

    # The state of a step boundary besides weights and moments, as training.json holds it.
    STATE = {"step": 0, "rows": 0, "evaluated": False, "trained_s": 0.0, "skipped_in_a_row": 0,
             "dead_in_a_row": 0, "shown": None, "cursor": 0}

    def __init__(self, folder, resume):
        self.folder, self.resume = Path(folder), resume
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; choose another --out for the run folder")
        if (self.folder / "config.yaml").exists() and resume is False:
            raise ValueError(f"{folder} holds a run; go on with it by --resume=auto or choose another --out")
        vars(self).update(self.STATE)
        self.saved = 0
        self.current_phase = "setup"
        self.measured = {}  # time and memory of the phases since the last row of metrics.jsonl
        self.step_began = time.perf_counter()
        self.step_times = []
        self.skipped_checkpoints = set()
        self.write_state, self.keep, self.training, self.tracker = None, None, {}, None  # see `open`
        self.locked = lock(self.folder) if self.folder.exists() and is_first_rank() else None

    def __exit__(self, kind, error, trace):
        if isinstance(error, RuntimeError):
            rank, first_line = rank_variable("RANK", 0), str(error).partition("\n")[0]
            print(f"error on rank {rank} in the {self.current_phase}: {first_line}", file=sys.stderr)
        if self.locked:
            self.locked.close()

    @contextlib.contextmanager
    def phase(self, name):
        """Measure the time and peak memory of a part of a step. Its name, such as "rollout of step 3", is in
        the error message of a rank that fails in it; the metrics are named by its first word."""
        self.current_phase, began = name, time.perf_counter()
        if not self.measured:
            self.step_began = began
        reset_peak_memory()
        yield
        kind = name.split()[0]
        self.measured |= {f"time/{kind}_s": time.perf_counter() - began, **peak_memory(kind)}

    def newest_checkpoint(self, read_settings, settings, defaults, fingerprint):
        """`checkpoints.newest_checkpoint` of this folder: (folder, state). For rank 0."""
        checkpoint, state, self.skipped_checkpoints = checkpoints.newest_checkpoint(
            self.folder, self.resume, self.STATE, read_settings, settings, defaults, fingerprint)
        return checkpoint, state

    def restore(self, state):
        """Continue at the step boundary of a checkpoint: `state` as `newest_checkpoint` returned it."""
        vars(self).update(state)
        self.saved = self.step

    def open(self, config, training, tracker, write_state, keep):
        """Collective: create the folder, once everything has been read; delete what was logged after `step`.
        config: the tree that config.yaml shows; training: what every training.json holds besides the state;
        write_state(folder): writes weights and moments; keep: newest checkpoints kept, None for all."""
        self.training, self.write_state, self.keep = training, write_state, keep
        on_first_rank(self.prepare, config, tracker)

    def prepare(self, config, tracker):
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.rows else []
        if len(lines) < self.rows:
            raise ValueError(f"{metrics} has {len(lines)} rows, but {self.rows} were written up to step "
                             f"{self.step}; restore it, or start anew with another --out")
        kept = [parse_json(line, metrics) for line in lines[:self.rows]]
        # A step has two rows, one of them of its evaluation.
        of_boundary = [row for row in kept if row.pop("step") == self.step]
        self.tracker = open_tracker(tracker, self.folder, config, self.step, of_boundary)
        for name in ("rollouts", "evals", "checkpoints"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.locked = self.locked or lock(self.folder)
        for unfinished in (*self.folder.glob("*.tmp"), *self.folder.glob("*/*.tmp")):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        for file in (*self.folder.glob("rollouts/step_*"), *self.folder.glob("evals/step_*")):
            if file.stem > f"step_{self.step:06d}":
                file.unlink()
        write_text(metrics, "".join(lines[:self.rows]))
        write_text(self.folder / "git_revision.txt", git_revision() + "\n")
        write_text(self.folder / "hardware.txt", hardware() + "\n")
        write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        fsync(self.folder)

    def checkpoint(self, step):
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def rollouts(self, step):
        return self.folder / "rollouts" / f"step_{step:06d}.jsonl"

    def save_checkpoint(self):
        """Collective: save the current step boundary. RankError where that fails; earlier ones stay."""
        with self.phase(f"save after step {self.step}"):
            temporary = self.checkpoint(self.step).with_suffix(".tmp")
            state = {name: vars(self)[name] for name in self.STATE}
            try:
                if is_first_rank():
                    shutil.rmtree(temporary, ignore_errors=True)
                self.write_state(temporary)
                on_first_rank(checkpoints.publish, temporary, self.training | state,
                              self.folder / "metrics.jsonl", self.skipped_checkpoints, self.keep)
            except (OSError, ValueError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise RankError(f"{self.checkpoint(self.step)}: cannot be saved ({error}); earlier "
                                "checkpoints are whole") from None
        self.saved, self.measured = self.step, {}

    def stop(self, mid_update):
        """Collective: end on a signal. Saves the step boundary, unless weights have left it (mid_update)."""
        if self.step > self.saved and not mid_update:
            self.save_checkpoint()
        where = self.checkpoint(self.saved) if self.saved else "step 0"
        print(f"stopped after step {self.step}: the same command goes on from {where}", flush=True)

    def save_lines(self, step, lines):
        """Write rollouts/step_….jsonl from JSON values, one a line."""
        if is_first_rank():
            write_text(self.rollouts(step),
                       "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def log(self, step, metrics):
        """Append one row to metrics.jsonl and send it to the tracker."""
        self.rows += 1
        if is_first_rank():
            path = self.folder / "metrics.jsonl"
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.tracker(step, metrics)

    def log_step(self, step, steps, metrics, max_minutes=None):
        """Collective: complete a step: its row, its line on the console, and the new state.

        max_minutes: of steps, after which the run ends (None: no limit). Raises Diverged, Stuck. Clocks
        differ between ranks, so rank 0's metrics count: all ranks must end at the same step."""
        seconds = time.perf_counter() - self.step_began
        metrics |= self.measured | {"time/step_s": seconds, "tokens_per_s": metrics["tokens"] / seconds}
        metrics, self.measured = all_gather(metrics)[0], {}
        self.log(step, metrics)
        self.step, self.evaluated = step, False
        self.trained_s += metrics["time/step_s"]
        if metrics.get("reward/raised"):
            print(f"warning: the reward raised on {metrics['reward/raised']} replies, which earn 0; see the "
                  f"errors in {self.rollouts(step)}")
        if step == 1 and metrics.get("length/cut", 0) > 0.9:
            print(f"warning: {metrics['length/cut']:.0%} of the replies were cut at rollout.max_new_tokens "
                  "before a stop token; is the model tuned for this chat format?")
        self.step_times = [*self.step_times[-19:], metrics["time/step_s"]]
        left = seconds_left(self.step_times, steps - step, 60 * (max_minutes or math.inf) - self.trained_s)
        print(console_line(step, steps, metrics, left), flush=True)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped_updates"] else 0
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise Diverged(f"no finite gradient in {MAX_SKIPPED} steps in a row, up to step {step}; lower "
                           f"train.lr, or look at the batch in {self.rollouts(step)}")
        finding = diagnose(metrics)
        self.dead_in_a_row = self.dead_in_a_row + 1 if finding else 0
        if self.dead_in_a_row >= MAX_DEAD:
            raise Stuck(f"stopped at step {step}: for {MAX_DEAD} steps in a row {finding}")

    def is_evaluation_due(self, is_last, every, ends):
        """every: steps in between, None for none; ends: whether step 0 and the last step are evaluated."""
        due = ends if self.step == 0 or is_last else every is not None and self.step % every == 0
        return due and not self.evaluated

    def log_evaluation(self, rows, replies):
        """Write an evaluation of this step. Returns two replies to print, of the same examples each time."""
        if is_first_rank():
            report = {"step": self.step, "rows": rows, "replies": replies}
            write_json(self.folder / "evals" / f"step_{self.step:06d}.json", report)
        accuracies = {f"eval/{row['category']}": row["accuracy"] for row in rows}
        self.log(self.step, {**accuracies, "time/eval_s": self.measured["time/evaluation_s"]})
        self.evaluated, self.measured = True, {}
        if self.shown is None:
            wrong = next((i for i, reply in enumerate(replies) if not reply["right"]), 0)
            right = next((i for i, reply in enumerate(replies) if reply["right"] and i != wrong), -1)
            self.shown = [wrong, right]
        # A resumed run may evaluate fewer examples.
        return [replies[i] for i in self.shown if i < len(replies)]

    def first_and_last_evaluation(self):
        """{"step 0": rows, "step 100": rows}; empty where there was none."""
        reports = read_evaluations(self.folder)
        return {f"step {report['step']}": report["rows"] for report in (*reports[:1], *reports[-1:])}


def read_evaluations(folder):
    """The reports of a run folder's evaluations, in order: {"step", "rows", "replies"} each."""
    return [read_json(file) for file in sorted(Path(folder).glob("evals/step_*.json"))]
