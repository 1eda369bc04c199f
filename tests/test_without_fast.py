"""The definition rule: with kernel "reference" the product runs with the folder fast/ deleted.

A copy of the code without the folder trains on one rank and on two, evaluates and asks, in one child process.
"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from short_run import LOOPBACK

SCRIPT = """
import json, sys
from pathlib import Path
sys.path[:0] = ["tests", "."]
import torch
torch.set_num_threads(1)
import pytest
from short_run import arguments, in_child, in_ranks, make_files, make_setting
import eval, sample, train

with pytest.MonkeyPatch.context() as patches:
    make_setting(patches)
    files = make_files(Path("files"))
    words = ["--model.kernel=reference", "--train.steps=2"]
    status, text = in_child(lambda: train.main(arguments(files, "alone", *words)), "log")
    assert status == 0, text
    statuses, texts = in_ranks(2, lambda rank: train.main(arguments(files, "pair", *words)), "log")
    assert statuses == [0, 0], texts
    checkpoint = "alone/checkpoints/step_000002"
    eval.main([checkpoint, "--bench=heldout", f"--data={files}/heldout.jsonl", "--kernel=reference",
               "--max_new_tokens=9"])
    Path("tools.json").write_text(json.dumps([{"name": "f"}]))
    sample.main([checkpoint, "--tools=tools.json", "--kernel=reference", "--max_new_tokens=9", "query"])
    for run in ("alone", "pair"):
        rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2] and rows[1]["grad_norm"] > 0
    status, text = in_child(lambda: train.main(arguments(files, "fast", "--model.kernel=auto")), "log")
    assert status and "No module named 'fast" in text, text
assert "fast" not in sys.modules
print("it ran")
"""


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        "fast", ".git", ".venv", "runs", "old_run", "__pycache__", ".pytest_cache", "shared"))
    assert not (folder / "fast").exists() and (folder / "runtime").exists()
    return folder


def test_the_product_runs_without_the_folder_of_twins(copy):
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=copy, env=os.environ | LOOPBACK,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("it ran\n"), done.stdout + done.stderr
