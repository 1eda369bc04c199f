"""What the test files share: the path to the code, the real data, the threads, and which tests need a GPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# The toy models are so small that a second thread costs more than it brings, and one thread adds up in the
# same order on every machine.
torch.set_num_threads(1)

# Without a GPU the kernels run in Triton's interpreter, which must be said before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder REAL_DATA names, with public data sets, the tokenizer and golden files; skips without."""
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
