"""runtime/kernel.py: what each kernel means on each machine, what is refused, and that "auto" prints once."""

import importlib.machinery
import sys
import types

import pytest

from runtime.kernel import KERNELS, choose_kernel, kernel_of_run

PARTS = ("sampling", "token log-probs", "attention")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """machine(triton, interpreter): one with or without the triton package, and with or without its
    interpreter. The choice is kept as long as the process, so it is cleared before and after a test."""
    def make(triton, interpreter=False):
        choose_kernel.cache_clear()
        package = types.ModuleType("triton")
        package.__spec__ = importlib.machinery.ModuleSpec("triton", None)
        monkeypatch.setitem(sys.modules, "triton", package if triton else None)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")

    monkeypatch.delenv("RANK", raising=False)
    make(triton=True)
    yield make
    choose_kernel.cache_clear()


def choices(kernel, device):
    return [choose_kernel(kernel, device, part) for part in PARTS]


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reference_is_the_definition_everywhere(machine, triton, device):
    machine(triton)
    assert choices("reference", device) == ["reference"] * 3


def test_on_a_gpu_auto_and_fast_are_the_twins():
    for kernel in ("auto", "fast"):
        assert choices(kernel, "cuda") == ["gpu"] * 3


def test_on_a_gpu_without_triton_auto_takes_the_definition_where_the_twin_is_a_triton_kernel(machine):
    machine(triton=False)
    assert choices("auto", "cuda") == ["reference", "reference", "gpu"]
    assert choose_kernel("fast", "cuda", "attention") == "gpu"
    for part in ("sampling", "token log-probs"):
        with pytest.raises(ValueError, match=f"'fast': {part} on a cuda has no .*the triton package"):
            choose_kernel("fast", "cuda", part)


@pytest.mark.parametrize("triton", [True, False])
def test_on_a_cpu_only_sampling_has_a_twin(machine, triton):
    machine(triton)
    assert choices("auto", "cpu") == ["cpu", "reference", "reference"]
    assert choose_kernel("fast", "cpu", "sampling") == "cpu"
    for part in ("token log-probs", "attention"):
        with pytest.raises(ValueError, match=f"'fast': {part} on a cpu .*'auto' or 'reference'") as caught:
            choose_kernel("fast", "cpu", part)
        assert "\n" not in str(caught.value)


def test_the_interpreter_of_triton_is_taken_where_fast_is_asked_for_and_never_by_auto(machine):
    machine(triton=True, interpreter=True)
    assert choices("auto", "cpu") == ["cpu", "reference", "reference"]
    assert [choose_kernel("fast", "cpu", part) for part in PARTS[:2]] == ["gpu", "gpu"]
    with pytest.raises(ValueError, match="attention on a cpu"):
        choose_kernel("fast", "cpu", "attention")


def test_triton_is_an_older_name_of_fast():
    assert choices("triton", "cuda") == choices("fast", "cuda")
    with pytest.raises(ValueError, match="kernel 'triton': attention on a cpu"):
        choose_kernel("triton", "cpu", "attention")


@pytest.mark.parametrize("kernel", ["fused", "", "AUTO", "cpu", None])
def test_another_kernel_is_refused_with_the_names_there_are(kernel):
    for device in ("cpu", "cuda"):
        for part in PARTS:
            with pytest.raises(ValueError) as caught:
                choose_kernel(kernel, device, part)
            assert str(caught.value) == f"kernel is {kernel!r}; choose one of auto, reference, fast"
    assert KERNELS == ("auto", "reference", "fast")


def test_auto_prints_each_choice_once_and_the_others_print_nothing(capsys):
    for _ in range(3):
        choose_kernel("reference", "cpu", "attention")
        choose_kernel("fast", "cuda", "token log-probs")
        choose_kernel("auto", "cpu", "sampling")
        choose_kernel("auto", "cpu", "token log-probs")
        choose_kernel("auto", "cuda", "token log-probs")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("kernel of sampling on cpu: fast\nkernel of token log-probs on cpu: reference\n"
                   "kernel of token log-probs on cuda: fast\n")


def test_of_several_ranks_only_the_first_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert choose_kernel("auto", "cpu", "sampling") == "cpu"
    assert capsys.readouterr() == ("", "")


def test_a_run_with_fast_takes_the_twin_that_a_cpu_has_and_is_refused_on_a_gpu_without_triton(machine):
    assert kernel_of_run("fast", "cpu") == kernel_of_run("triton", "cpu") == "auto"
    assert [kernel_of_run(kernel, "cpu") for kernel in ("auto", "reference")] == ["auto", "reference"]
    assert kernel_of_run("fast", "cuda") == "fast"
    machine(triton=False)
    assert kernel_of_run("auto", "cuda") == "auto"
    with pytest.raises(ValueError, match="the triton package"):
        kernel_of_run("fast", "cuda")
    with pytest.raises(ValueError, match="choose one of"):
        kernel_of_run("quick", "cuda")
