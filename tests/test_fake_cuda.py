"""tests/fake_cuda.py: its mode counts operations and catches each wait and each tensor of the host.

The device is PyTorch's meta, whose tensors have no memory, as fake ones have none. What the script
prints needs a CUDA build of torch and is not tested here.
"""

import contextlib

import fake_cuda
import pytest
import torch
from fake_cuda import Operations, faults


def watched(function, *shape, dtype=torch.float32):
    """Operations of function(x), x on meta. A read of a tensor without memory raises after it was seen."""
    found, x = Operations("meta"), torch.empty(*shape, dtype=dtype, device="meta")
    with found.watching(), contextlib.suppress(RuntimeError, NotImplementedError):
        function(x)
    return found


@pytest.mark.parametrize(("function", "counted"), [
    (lambda x: x + 1, {"add": 1}),
    (lambda x: x.add_(1).mul_(2), {"add_": 1, "mul_": 1}),
    (lambda x: (x @ x.T).to(torch.bfloat16), {"mm": 1, "_to_copy": 1}),
    (lambda x: x[:2].copy_(x[2:]), {"copy_": 1}),
    (lambda x: x[torch.zeros(2, dtype=torch.int64, device="meta")], {"zeros": 1, "index": 1}),
    (lambda x: x.T.contiguous(), {"clone": 1}),
    (torch.nn.RMSNorm(4), {"_fused_rms_norm": 1}),
], ids=range(7))
def test_each_operation_counts_one(function, counted):
    found = watched(function, 4, 4)
    assert +found.operations == counted and not found.host and not found.syncs and not found.launches


@pytest.mark.parametrize("function", [
    lambda x: x.view(2, 8).T[1:].unsqueeze(0).expand(3, -1, -1).unbind(1),
    lambda x: torch.empty_like(x).detach(),
    lambda x: torch.as_tensor(x).to(x.dtype).contiguous(),
], ids=["views", "allocation", "nothing to do"])
def test_views_and_allocations_count_nothing(function):
    found = watched(function, 4, 4)
    assert not found.operations.total() and not found.host


def test_a_launch_of_triton_counts_one_and_its_tensors_are_looked_at():
    pytest.importorskip("triton")
    from fast import paged_cache
    here, x = torch.zeros(4), torch.empty(4, device="meta")
    kernel = paged_cache.merge_parts
    assert watched(lambda y: kernel[(1,)](x, y, x, 4, 4, 4), 4).operations == {"merge_parts": 1}
    assert watched(lambda y: kernel[(1,)](x, y, x, 4, 4, 4), 4).launches == 1
    assert watched(lambda y: kernel[(1,)](x, here, y, 4, 4, 4), 4).host == ["merge_parts"]


@pytest.mark.parametrize(("function", "name"), [
    (lambda x: x[0].item(), "_local_scalar_dense"),
    (lambda x: bool(x.any()), "_local_scalar_dense"),
    (lambda x: int(x.max()), "_local_scalar_dense"),
    (lambda x: x.nonzero(), "nonzero"),
    (lambda x: x[x > 0], "index"),
    (lambda x: x.__setitem__(x > 0, x[:2]), "index_put_"),
    (lambda x: x.masked_select(x > 0), "masked_select"),
    (lambda x: torch.equal(x, x), "equal"),
    (lambda x: x.repeat_interleave(torch.empty(4, dtype=torch.int64, device="meta")), "repeat_interleave"),
], ids=range(9))
def test_an_operation_that_waits_for_the_device_is_caught(function, name):
    found = watched(function, 4)
    assert name in found.syncs
    assert f"waits in {name}" in faults(found, layers=28, host_prepares=True)


@pytest.mark.parametrize("function", [
    lambda x: torch.zeros(4),
    lambda x: torch.arange(3),
    lambda x: torch.tensor([1.0]),
    lambda x: torch.tensor([1.0], device="meta"),  # on a GPU, a copy from the host
    lambda x: x.new_tensor([1.0]),
    lambda x: torch.ones(4).to("meta"),
    lambda x: x * torch.ones(()),
    lambda x: x.copy_(torch.ones(4)),
    lambda x: x + torch.as_tensor(1.0, device="meta"),
    lambda x: x[[0, 1]],
], ids=range(10))
def test_a_tensor_of_the_host_is_caught(function):
    found = watched(function, 4)
    assert found.host and not found.syncs
    assert faults(found, layers=28, host_prepares=False)
    assert not faults(found, layers=28, host_prepares=True)


def test_what_the_host_prepares_once_is_no_fault_but_once_a_layer_is():
    found = Operations("meta")
    found.host = ["cat"] * 27 + ["arange"]
    assert faults(found, layers=28, host_prepares=True) == []
    assert faults(found, layers=27, host_prepares=True) == ["27 times cat with the host"]
    assert faults(found, layers=28, host_prepares=False) == ["27 times cat with the host",
                                                             "1 times arange with the host"]


def test_another_build_of_torch_than_that_for_cuda_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit) as caught:
        fake_cuda.main()
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out
    assert err.startswith("error: torch ") and "no CUDA build" in err and err.count("\n") == 1
