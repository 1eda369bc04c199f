"""tests/compile_kernels.py: every kernel compiles for a GPU that is not there, and what must fail does.

Each test runs the tool in a separate process, because it compiles kernels that this one interprets.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton.backends.nvidia", reason="no Triton here that compiles for NVIDIA GPUs")


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True)


def test_a_case_of_every_kernel_compiles_for_a_hopper_gpu_and_loads_16_bytes_at_once():
    finished = run_python("tests/compile_kernels.py", "--quick", "--arch", "90")
    assert finished.returncode == 0 and not finished.stderr, finished.stdout + finished.stderr
    head, columns, *lines = finished.stdout.strip().splitlines()
    assert head.startswith("sm_90, ") and head.endswith(": 5 compiled")
    assert columns.split() == ["kernel", "case", "warps", "registers", "spills", "shared", "blocks",
                               "instructions", "loads", "matrix"]
    rows = {line.split()[0]: line for line in lines}
    # The vocabulary is odd: 151,665 ids have a token. A thread reads 16 logits.
    for kernel in ("logprob_of_row", "gradient_of_logits", "best_of_block"):
        assert " 151936 151665" in rows[kernel] and "  2x16" in rows[kernel], rows[kernel]
    # Keys and values go to shared memory, 16 bytes at once, and are multiplied by tensor cores.
    assert "  async 32x16," in rows["attend_to_pages"] and rows["attend_to_pages"].endswith("HMMA")
    assert "  8x16" in rows["merge_parts"]
    spills = columns.index("spills")
    assert [line[spills:].split()[0] for line in lines] == ["0"] * 5


def test_a_spill_a_kernel_that_does_not_fit_a_case_that_fails_and_a_kernel_without_a_case_are_named():
    finished = run_python("-c", """
import sys
sys.path.insert(0, "tests")
import compile_kernels as tool

def spilling(*arguments):
    tool.paged_cache.FP32_BLOCK = (64, 4, 2)
    tool.decode_attention(*arguments)

def too_large(*arguments):
    tool.paged_cache.BF16_BLOCK = (128, 4, 6)  # 137 KiB
    tool.SHARED_KIB[90] = (228, 99)
    tool.decode_attention(*arguments)

def failing(*arguments):
    raise ValueError("no such shape")

tool.CASES = [(spilling, tool.FP32, 12, 2, 128, 256), (too_large, tool.BF16, 12, 2, 128, 256),
              (failing, tool.BF16, 1)]
sys.exit(tool.main(["--arch", "90"]))
""")
    failures = [line for line in finished.stdout.splitlines() if line.startswith("FAILED")]
    assert finished.returncode == 1 and len(failures) == 7, finished.stdout + finished.stderr
    assert failures[0] == "FAILED sm_90 failing bfloat16 1: ValueError: no such shape"
    assert failures[1].startswith("FAILED sm_90 attend_to_pages float32 12 2 128 256: ")
    assert failures[1].endswith(" instructions spill registers")
    assert failures[2].startswith("FAILED sm_90 attend_to_pages bfloat16 12 2 128 256: does not fit")
    assert failures[3:] == [f"FAILED sm_90 {kernel}: no case launches it" for kernel in (
        "best_of_block", "gradient_of_logits", "logprob_of_row", "merge_parts")]
