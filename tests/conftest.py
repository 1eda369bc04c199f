"""For all test files: the import path, the real data, the number of threads, the tests that need a GPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# The toy models are so small that a second thread costs more time than it saves. And one thread adds numbers
# in the same order on every machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # runs in a test keep it, in a process of their own too

# Without a GPU the kernels run in Triton's interpreter. The variable must be set before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def calls_of(function) -> int:
    """How many Python and C functions `function()` calls: work that does not depend on the machine's pace."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that REAL_DATA names: public data sets, tokenizer, golden files. Skips if it is not set."""
    folder = os.environ.get("REAL_DATA")
    if not folder:
        pytest.skip("REAL_DATA is not set: it names the folder with the real data sets and golden files")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"REAL_DATA={folder} is not a folder: correct it, or unset it to skip these tests")
    return path.resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch finds none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
