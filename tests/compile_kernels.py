"""Compile every Triton kernel of fast/ for GPUs that this machine need not have, and print what came out.

    python tests/compile_kernels.py [--arch 80 90 100] [--quick]

A kernel is launched by the function of fast/ that uses it, on tensors without memory (PyTorch's device meta).
So dtypes, constants, alignments, warps and pipeline stages are those of a real launch. The launch is stopped
when its kernel is compiled, by the assembler in the triton package. --quick takes the first case of each
launcher, which reaches every kernel.

Columns: registers a thread; `spills`, instructions that move registers to local memory or back; bytes of
shared memory a block; blocks that one multiprocessor holds at once; instructions; loads from global memory a
thread, as COUNT x BYTES (async: cp.async to shared memory); matrix instructions (HMMA: mma.sync). The exit
status is 1 if a case fails, if a kernel spills, does not fit or has no case.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated

from fast import draw, logprobs, paged_cache  # noqa: E402  before triton, whose settings it makes

import torch  # noqa: E402  isort: skip
import triton  # noqa: E402  isort: skip
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

MODULES = draw, logprobs, paged_cache
BF16, FP32 = torch.bfloat16, torch.float32
# Shared memory in KiB: of a multiprocessor, and the most that a block of it may use.
SHARED_KIB = {80: (164, 163), 90: (228, 227), 100: (228, 227)}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor, the same in all three
LOAD_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # without a name: 4
COLUMNS = "kernel case warps registers spills shared blocks instructions loads matrix".split()


class GpuTensor(torch.Tensor):
    """On device meta, and says that it is on a GPU: decode attention chooses its settings by that."""

    is_cuda = True


def empty(*shape, dtype=torch.int64):
    return torch.empty(*shape, dtype=dtype, device="meta")


def token_logprobs(dtype, V, vocab_size):
    # One whole chunk and a part of another. The width of the model does not matter to the kernels.
    hidden_LD, weight_VD = empty(logprobs.CHUNK_TOKENS + 37, 64, dtype=dtype), empty(V, 64, dtype=dtype)
    logp_L, _ = logprobs.token_logprobs(hidden_LD.requires_grad_(), weight_VD.requires_grad_(),
                                        empty(len(hidden_LD)), 0.7, vocab_size)
    torch.autograd.grad(logp_L.sum(), (hidden_LD, weight_VD))


def decode_attention(dtype, H, K, E, B):
    q_BHE, k_BKE, v_BKE = (empty(B, heads, E, dtype=dtype).as_subclass(GpuTensor) for heads in (H, K, K))
    keys, values = empty(2, 9, paged_cache.PAGE, K, E, dtype=dtype)
    # Tables and positions as Cache and Decoder have them: a slice of a wider one, and the last of four rows.
    table_BM, position_B = empty(256, 39, dtype=torch.int32)[:B], empty(4, 256)[3, :B]
    paged_cache.decode_attention(q_BHE, k_BKE, v_BKE, keys, values, table_BM, position_B)


def sample_tokens(dtype, V, vocab_size, temperature):
    draw.sample_tokens(empty(256, V, dtype=dtype), temperature, empty(256), vocab_size=vocab_size)


# A launcher and its arguments; --quick takes the first case of each. (V, vocab_size) are those of Qwen2.5, of
# whose rows an odd number, 151,665, have a token, of Llama-3.1 and of SmolLM2; (H, K, E) those of Qwen2.5
# 1.5B, 0.5B, 7B and 14B, of Llama-3.1-8B, SmolLM2-135M, assets/tiny and the tests on a GPU. At B 1 a row is
# split into parts, which a second kernel merges; at B 256 it is not.
VOCABULARIES = (151936, 151665), (152064, 151665), (151936, 151936), (128256, 128256), (49152, 49152)
HEADS = ((12, 2, 128), (14, 2, 64), (28, 4, 128), (40, 8, 128), (32, 8, 128), (9, 3, 64), (6, 2, 32),
         (4, 2, 16))
CASES = [
    (token_logprobs, BF16, 151936, 151665),
    (token_logprobs, BF16, 152064, 151665),
    (token_logprobs, BF16, 152064, 152064),
    (token_logprobs, BF16, 128256, 128256),
    (token_logprobs, BF16, 49152, 49152),
    (token_logprobs, FP32, 151936, 151665),
    *((decode_attention, BF16, *heads, B) for heads in HEADS for B in (1, 64, 256)),
    *((decode_attention, FP32, *heads, B) for heads in HEADS for B in (1, 256)),
    *((sample_tokens, BF16, V, vocab_size, temperature) for temperature in (1.0, 0.7, 0)
      for V, vocab_size in VOCABULARIES),
    (sample_tokens, FP32, 151936, 151665, 1.0),
]


class Compiled(NamedTuple):
    kernel: str
    case: str  # the first that needed it
    code: object  # triton's CompiledKernel


def compile_cases(cases, arch):
    """([Compiled], [what failed]). Cases whose kernels have the same dtypes and constants share them."""
    found, failures, case, run = {}, [], None, JITFunction.run
    # What Triton asks a driver for before a launch. Compiled kernels are kept by device: one a target.
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: arch, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32)))

    def as_pointer(x):  # a launch looks at its dtype and at whether its address is a multiple of 16
        address = x.storage_offset() * x.element_size()
        return SimpleNamespace(dtype=x.dtype, data_ptr=lambda: address)

    def compile_only(kernel, *arguments, grid, warmup, **options):
        arguments = [as_pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        code = run(kernel, *arguments, grid=grid, warmup=True, **options)
        found.setdefault(id(code), Compiled(kernel.__name__, case, code))

    JITFunction.run = compile_only
    try:
        for launcher, dtype, *sizes in cases:
            case = " ".join(map(str, (str(dtype).removeprefix("torch."), *sizes)))
            try:
                launcher(dtype, *sizes)
            except Exception as error:  # the other cases are still worth compiling
                reason = str(error).strip().splitlines()[-1:] or [""]
                failures.append(f"{launcher.__name__} {case}: {type(error).__name__}: {reason[0]}")
    finally:
        JITFunction.run = run
    return list(found.values()), failures


def run_tool(program, *arguments):
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / program
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def measure(compiled, arch, folder):
    """(a row of the table, what is wrong or None) of one compiled kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.code.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", run_tool("cuobjdump", "-res-usage", cubin))[1])
    # A line of machine code: /*0090*/ @!P0 LDG.E.128 R4, [R2.64] ;
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)",
                            run_tool("nvdisasm", "-c", cubin), re.MULTILINE)
    names = Counter(operation.split(".")[0] for operation in operations)
    loads = Counter()
    for name, *parts in (operation.split(".") for operation in operations):
        if name in ("LDG", "LDGSTS"):
            size = next((LOAD_BYTES[part] for part in parts if part in LOAD_BYTES), 4)
            loads["async " * (name == "LDGSTS"), size] += 1
    loads = ", ".join(f"{kind}{loads[kind, size]}x{size}" for kind, size in sorted(loads, reverse=True))
    spills = names["LDL"] + names["STL"]
    shared, warps = compiled.code.metadata.shared, compiled.code.metadata.num_warps
    whole, most = (1024 * kib for kib in SHARED_KIB[arch])
    # Registers are given to a warp in units of 8 a thread; the system takes 1 KiB of shared memory a block.
    blocks = min(BLOCKS, WARPS // warps, REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
                 whole // (shared + 1024))
    matrix = " ".join(name for name in sorted(names) if name.endswith("MMA"))
    row = (compiled.kernel, compiled.case, warps, registers, spills, shared, blocks,
           len(operations) - names["NOP"], loads, matrix)
    if shared > most or blocks == 0:
        return row, f"does not fit a multiprocessor, of which a block may use {most} bytes of shared memory"
    return row, f"{spills} instructions spill registers" if spills else None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compile the Triton kernels of fast/ without a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(SHARED_KIB),
                        help="compute capability times ten")
    parser.add_argument("--quick", action="store_true", help="the first case of each launcher")
    args = parser.parse_args(argv)
    cases = {case[0]: case for case in reversed(CASES)}.values() if args.quick else CASES
    failures = []
    for arch in args.arch:
        rows = [COLUMNS]
        with tempfile.TemporaryDirectory() as folder:
            triton.knobs.cache.dir = folder  # so that everything is compiled, by this triton
            found, failed = compile_cases(cases, arch)
            for compiled in found:
                row, wrong = measure(compiled, arch, Path(folder))
                rows.append([str(value) for value in row])
                failed += [f"{compiled.kernel} {compiled.case}: {wrong}"] if wrong else []
        kernels = {value.__name__ for module in MODULES for value in vars(module).values()
                   if isinstance(value, JITFunction)}
        failed += [f"{name}: no case launches it" for name in sorted(kernels - {x.kernel for x in found})]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(f"sm_{arch}, triton {triton.__version__}, torch {torch.__version__}: {len(found)} compiled")
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        failures += [f"sm_{arch} {failure}" for failure in failed]
        print(flush=True)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
