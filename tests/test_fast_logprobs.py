"""fast/logprobs.py against grpo.token_logprobs_reference: in Triton's interpreter, or compiled on a GPU.

Everywhere uninitialised memory is NaN, chunks hold 5 tokens and blocks 16 logits, so that the odd sizes below
have many of each with ragged ends.
"""

import importlib
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="triton has no wheels for this platform")

import grpo  # noqa: E402
from fast import logprobs  # noqa: E402
from grpo import pack, token_logprobs, token_logprobs_reference  # noqa: E402
from model import ModelConfig, Transformer, shared_prefix_attention  # noqa: E402
from runtime.kernel import choose_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE = 0.7
# (tokens, width, rows of the weight, ids that have a token)
SIZES = [(13, 7, 37, 33), (1, 3, 5, None), (5, 1, 16, 16), (6, 4, 17, 16), (11, 9, 48, 1), (10, 2, 64, 49)]


@pytest.fixture(autouse=True)
def small_chunks_and_uninitialised_memory_of_nan(request, monkeypatch):
    if request.node.get_closest_marker("gpu"):
        return
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(logprobs, "BLOCK", 16)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def filled(*args, plain=plain, **kwargs):
            tensor = plain(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, filled)


def random_head(L, D, V, vocab_size=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_LD = torch.randn(L, D, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    targets_L = torch.randint(vocab_size or V, (L,), generator=generator).to(DEVICE)
    return hidden_LD.requires_grad_(), weight_VD.requires_grad_(), targets_L


def results(function, hidden_LD, weight_VD, targets_L, vocab_size=None, temperature=TEMPERATURE):
    """logp_L, entropy_L and the gradients of a sum of logp_L with uneven weights."""
    logp_L, entropy_L = function(hidden_LD, weight_VD, targets_L, temperature, vocab_size)
    upstream_L = torch.linspace(-1, 2, len(logp_L)).to(logp_L)
    return logp_L, entropy_L, *torch.autograd.grad(logp_L, (hidden_LD, weight_VD), upstream_L)


def assert_equal(fused, reference, tolerance):
    for a, b in zip(fused, reference, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Equal to the definition.


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_equal_the_definition(sizes, temperature):
    *head, vocab_size = *random_head(*sizes), sizes[-1]
    assert_equal(results(logprobs.token_logprobs, *head, vocab_size, temperature),
                 results(token_logprobs_reference, *head, vocab_size, temperature), 1e-12)


@pytest.mark.parametrize("target", [0, 32])
def test_the_first_and_the_last_id_are_targets_like_any_other(target):
    hidden_LD, weight_VD, targets_L = random_head(7, 4, 37, 33)
    head = hidden_LD, weight_VD, torch.full_like(targets_L, target), 33
    assert_equal(results(logprobs.token_logprobs, *head), results(token_logprobs_reference, *head), 1e-12)


@pytest.mark.parametrize("peak", [0, 15, 16, 32])
def test_the_largest_logit_may_be_in_any_block(peak):
    hidden_LD, weight_VD, targets_L = random_head(4, 3, 37, 33)
    with torch.no_grad():
        hidden_LD.abs_()
        weight_VD[peak] += 40
    head = hidden_LD, weight_VD, targets_L, 33
    assert_equal(results(logprobs.token_logprobs, *head), results(token_logprobs_reference, *head), 1e-12)


def test_upstream_gradients_and_targets_of_any_stride_are_taken():
    hidden_LD, weight_VD, _ = random_head(7, 4, 20)
    targets_L = torch.arange(14, device=DEVICE)[::2]
    numbers_L = torch.arange(14, device=DEVICE, dtype=torch.float64)[::2]
    one_L = torch.ones(1, device=DEVICE, dtype=torch.float64).expand(7)  # the upstream gradient of a sum
    for upstream_L in (numbers_L, one_L):
        grads = []
        for function in (logprobs.token_logprobs, token_logprobs_reference):
            logp_L, _ = function(hidden_LD, weight_VD, targets_L, TEMPERATURE)
            grads.append(torch.autograd.grad(logp_L, (hidden_LD, weight_VD), upstream_L))
        assert_equal(*grads, 1e-12)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_get_the_same(monkeypatch):
    hidden_LD, weight_VD, targets_L = random_head(7, 4, 37)
    _, _, wanted_LD, _ = results(logprobs.token_logprobs, hidden_LD, weight_VD, targets_L)
    monkeypatch.setattr(torch, "zeros_like", None)  # no sum of the weight's gradient is made
    logp_L, _ = logprobs.token_logprobs(hidden_LD, weight_VD.detach(), targets_L, TEMPERATURE)
    found_LD, = torch.autograd.grad(logp_L, hidden_LD, torch.linspace(-1, 2, 7).to(logp_L))
    assert torch.equal(found_LD, wanted_LD)


def test_no_tokens_give_no_log_probs_and_gradients_of_zero():
    hidden_LD, weight_VD, targets_L = random_head(0, 3, 5)
    logp_L, entropy_L, *grads = results(logprobs.token_logprobs, hidden_LD, weight_VD, targets_L)
    assert logp_L.shape == entropy_L.shape == (0,)
    assert grads[0].shape == (0, 3) and grads[1].tolist() == [[0.0] * 3] * 5


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a phantom logit, which is not used
def test_phantom_rows_change_nothing_and_get_no_gradient():
    both = []
    for boost in (0.0, 1e4):
        hidden_LD, weight_VD, targets_L = random_head(8, 5, 40, 33)
        with torch.no_grad():
            weight_VD[33:] += boost
        both.append(results(logprobs.token_logprobs, hidden_LD, weight_VD, targets_L, 33))
        assert not both[-1][3][33:].any() and both[-1][3][:33].any(1).all()
    # The one place where phantom rows enter is a product with zeros.
    assert_equal(*both, 1e-15)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradients_of_a_whole_model_equal_those_through_the_definition(tied):
    config = ModelConfig(vocab_size=40, hidden_size=12, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=6, tie_word_embeddings=tied,
                         initializer_range=0.4)
    tree = pack([[1, 2, 3], [4]], [[[5, 6], [7, 8, 9, 10]], [[11, 32]]]).to(DEVICE)
    grads = []
    for kernel in ("fast", "reference"):
        model = Transformer(config).init_weights(0).double().to(DEVICE)
        hidden_TD = model(tree.tokens_T, tree.positions_T, shared_prefix_attention(tree.groups))
        logp_L, _ = token_logprobs(hidden_TD[tree.predictor_L], model.head_weight(), tree.targets_L,
                                   TEMPERATURE, 33, kernel)
        grads.append(torch.autograd.grad(logp_L.square().sum(), list(model.parameters())))
    assert_equal(*grads, 1e-11)
    # Where they are tied, the row of a prompt token has its share from the embedding too.
    assert grads[0][0][1].any()


def test_the_entropy_has_no_gradient():
    hidden_LD, weight_VD, targets_L = random_head(7, 4, 20)
    logp_L, entropy_L = logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE)
    assert logp_L.requires_grad and not entropy_L.requires_grad


# Numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e4])
def test_log_probs_are_never_positive_and_entropies_never_negative(scale, dtype):
    hidden_LD, weight_VD, _ = random_head(12, 8, 33, dtype=dtype)
    hidden_LD = (hidden_LD * scale).detach()
    for pick in (torch.argmax, torch.argmin):
        targets_L = pick(hidden_LD.float() @ weight_VD.float().T, -1)
        logp_L, entropy_L = logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE)
        assert logp_L.dtype == entropy_L.dtype == torch.float32
        assert logp_L.max() <= 0 and logp_L.isfinite().all()
        assert entropy_L.isfinite().all() and entropy_L.min() >= 0
        # Of logits beside 1e4, fp32 keeps three places behind the point.
        reference = token_logprobs_reference(hidden_LD, weight_VD, targets_L, TEMPERATURE)
        torch.testing.assert_close((logp_L, entropy_L), reference, rtol=1e-5, atol=1e-6 * max(1, scale))


def test_logits_of_ten_thousand_above_and_below_zero_are_exact_where_their_softmax_is():
    hidden_LD = torch.full((3, 1), 1e4, device=DEVICE, requires_grad=True)
    weight_VD = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], device=DEVICE, requires_grad=True)
    targets_L = torch.tensor([0, 1, 3], device=DEVICE)
    head = hidden_LD, weight_VD, targets_L
    logp_L, entropy_L, dhidden_LD, _ = results(logprobs.token_logprobs, *head, temperature=0.5)
    torch.testing.assert_close(logp_L.tolist(), [-4e4 - math.log(2), -math.log(2), -math.log(2)])
    torch.testing.assert_close(entropy_L.tolist(), [math.log(2)] * 3)
    torch.testing.assert_close(dhidden_LD.flatten().tolist(), [4.0, 0.0, 0.0], atol=4e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_nan_stays_visible():
    hidden_LD, weight_VD, targets_L = random_head(3, 4, 20, dtype=torch.float32)
    with torch.no_grad():
        hidden_LD[1, 2] = math.nan
    logp_L, entropy_L = logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE)
    assert logp_L.isnan().tolist() == entropy_L.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_fp32_is_as_near_to_fp64_as_the_softmax_of_all_logits(scale, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(logprobs, "BLOCK", 128)
    hidden_LD, weight_VD, targets_L = random_head(40, 16, 300, dtype=torch.float32)
    with torch.no_grad():
        hidden_LD *= scale

    def naive(hidden_LD, weight_VD, targets_L, temperature, vocab_size):
        logp_LV = F.log_softmax(hidden_LD @ weight_VD.T / temperature, -1)
        return logp_LV.gather(1, targets_L[:, None])[:, 0], -(logp_LV.exp() * logp_LV).sum(-1).detach()

    doubles = [x.detach().double().requires_grad_() for x in (hidden_LD, weight_VD)]
    exact = results(naive, *doubles, targets_L)
    fused = results(logprobs.token_logprobs, hidden_LD, weight_VD, targets_L)
    whole = results(naive, hidden_LD, weight_VD, targets_L)
    names = "logp", "entropy", "gradient of hidden", "gradient of weight"
    for name, ours, theirs, truth in zip(names, fused, whole, exact, strict=True):
        error, naive_error = ((x.double() - truth).abs().mean().item() for x in (ours, theirs))
        # A GPU's e^x of fp32 is good to 22 bits.
        assert error <= 1.2 * naive_error + (1e-8 if DEVICE == "cpu" else 2e-7), name


def test_the_weight_gradient_is_added_up_in_fp32():
    # Logits of zero: p is 1/4, and with an upstream gradient of 5 each of 60 tokens in 12 chunks adds exactly
    # 3.75 to one row and takes 1.25 from the others. From the fifth chunk on, bf16 cannot hold the sum.
    hidden_LD = torch.ones(60, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight_VD = torch.zeros(4, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    targets_L = torch.zeros(60, dtype=torch.int64, device=DEVICE)
    logp_L, _ = logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, 1.0)
    (5 * logp_L).sum().backward()
    assert weight_VD.grad.dtype == torch.bfloat16
    assert weight_VD.grad.flatten().tolist() == [225.0, -75.0, -75.0, -75.0]


def test_bf16_gradients_are_near_those_of_fp64():
    head = random_head(33, 8, 37, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in head]
    for ours, truth in zip(results(logprobs.token_logprobs, *head), results(token_logprobs_reference, *exact),
                           strict=True):
        assert (ours.double() - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_bf16_and_keeps_statistics_and_weight_gradient_in_fp32(hidden_dtype):
    hidden_LD, weight_VD, targets_L = random_head(13, 16, 37, 33, dtype=torch.float32)
    hidden_LD = hidden_LD.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        fused = logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE, 33)
        reference = token_logprobs_reference(hidden_LD, weight_VD, targets_L, TEMPERATURE, 33)
    torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5)
    assert fused[0].dtype == fused[1].dtype == torch.float32
    fp32_L, _ = token_logprobs_reference(hidden_LD.float(), weight_VD, targets_L, TEMPERATURE, 33)
    assert (fused[0] - fp32_L).abs().max() > 1e-3
    # Backward outside autocast, as in training.
    grads = [torch.autograd.grad(logp_L.sum(), (hidden_LD, weight_VD)) for logp_L in (fused[0], reference[0])]
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


# Memory.


class Storages(TorchDispatchMode):
    """Notes the memory of all tensors of at least `size` numbers that any operation returned."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.size * 8:
            self.seen.add(result.untyped_storage().data_ptr())
        return result


def test_one_chunk_of_logits_exists_and_none_is_kept_for_backward():
    hidden_LD, weight_VD, targets_L = random_head(30, 2, 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with Storages(4 * 50) as forward:
            logp_L, _ = logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE)
    with Storages(4 * 50) as backward:
        logp_L.sum().backward()
    assert len(forward.seen) == len(backward.seen) == 1
    assert sum(x.numel() for x in kept) == hidden_LD.numel() + weight_VD.numel() + 3 * len(targets_L)


@pytest.mark.skipif(DEVICE == "cuda", reason="rows past 2^31 are tested at true shapes there")
def test_rows_past_two_to_the_31st_logit_are_found(tmp_path):
    # A sparse file, of which only the pages of three rows exist. Offsets that wrap around in 32 bits would
    # lead to its beginning, which is all zeros.
    stride = 2**30
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=2**32 + 64, dtype=torch.float16)
    logits_CV = file.as_strided((3, 33), (stride, 1), 2**31)
    generator = torch.Generator().manual_seed(0)
    logits_CV.copy_(torch.randn(3, 33, generator=generator))
    exact_CV = logits_CV.float().log_softmax(-1)
    targets_C = torch.tensor([3, 0, 32])
    logp_C, entropy_C, peak_C, log_total_C = (torch.empty(3) for _ in range(4))
    logprobs.logprob_of_row[(3,)](logits_CV, targets_C, logp_C, entropy_C, peak_C, log_total_C,
                                  stride, 33, 33, 1.0, 16)
    torch.testing.assert_close(logp_C, exact_CV.gather(1, targets_C[:, None])[:, 0])
    logprobs.gradient_of_logits[(3, 3)](logits_CV, targets_C, peak_C, log_total_C, torch.ones(3),
                                        stride, 33, 33, 1.0, 16)
    expected_CV = F.one_hot(targets_C, 33) - exact_CV.exp()
    torch.testing.assert_close(logits_CV.float(), expected_CV, atol=1e-3, rtol=0)
    (tmp_path / "logits").unlink()


# Which kernel, and where.


@pytest.fixture
def fresh_choice():
    """The choice of a kernel is kept as long as the process: clear it before and after a test."""
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_auto_is_the_definition_on_a_cpu_and_says_so_once(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(grpo, "token_logprobs_reference", lambda *args: calls.append("reference"))
    monkeypatch.setattr(logprobs, "token_logprobs", lambda *args: calls.append("fast"))
    on_cpu = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1.0
    for _ in range(3):
        token_logprobs(*on_cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    token_logprobs(*on_cpu, kernel="fast")
    token_logprobs(*on_cpu, kernel="triton")  # the older name
    token_logprobs(*on_cpu, kernel="reference")
    assert calls == ["reference"] * 3 + ["fast"] * 2 + ["reference"]
    assert capsys.readouterr().err == "kernel of token log-probs on cpu: reference\n"


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("kernel", ["fast", "triton"])
def test_the_fused_version_is_refused_in_one_line_where_it_cannot_run(kernel, monkeypatch):
    head = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64), 1.0
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"kernel '{kernel}'.* CUDA GPU .*'auto'") as caught:
        token_logprobs(*head, kernel=kernel)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="the triton package"):
        token_logprobs(*head, kernel=kernel)


@pytest.mark.usefixtures("fresh_choice")
def test_a_machine_without_triton_has_the_definition(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("grpo", "fast", "fast.logprobs"):
        monkeypatch.delitem(sys.modules, name)
    one = torch.ones(1, 2)
    without_triton = importlib.import_module("grpo").token_logprobs
    assert without_triton is not token_logprobs
    assert without_triton(one, one, torch.zeros(1, dtype=torch.int64), 1.0)[0].item() == 0.0


# True shapes.


@pytest.mark.gpu
def test_true_shapes_equal_the_definition_within_the_memory_of_one_chunk():
    hidden_LD, weight_VD, targets_L = random_head(9001, 896, 151936, 151665, dtype=torch.float32)
    with torch.no_grad():
        weight_VD *= 0.1
        weight_VD[151665:] += 10
    outcomes = []
    for function in (logprobs.token_logprobs, token_logprobs_reference):
        with torch.autocast("cuda", torch.bfloat16):
            logp_L, entropy_L = function(hidden_LD, weight_VD, targets_L, TEMPERATURE, 151665)
        grads = torch.autograd.grad(logp_L.sum(), (hidden_LD, weight_VD))
        outcomes.append((logp_L, entropy_L, *grads))
    assert outcomes[0][0].max() <= 0 and not outcomes[0][3][151665:].any()
    for ours, theirs in zip(*outcomes, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [896, 1536, 3584])
def test_the_memory_beyond_the_gradients_is_that_of_one_chunk_at_any_number_of_tokens(width):
    peaks = []
    for tokens in (64, 8192, 32768):
        options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
        hidden_LD, weight_VD = torch.randn(tokens, width, **options), torch.randn(152064, width, **options)
        targets_L = torch.randint(151665, (tokens,), device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        logp_L, _ = logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, TEMPERATURE, 151665)
        logp_L.sum().backward()
        # The weight's gradient is counted as the fp32 sum that it is until the end.
        gradients = 2 * hidden_LD.numel() + 4 * weight_VD.numel()
        peaks.append((torch.cuda.max_memory_allocated() - before - gradients) / 2**30)
        del hidden_LD, weight_VD, targets_L, logp_L
    # In GiB: the logits of a chunk, 4096 · 152064 in bf16, are 1.160, and the gradient of its hidden states
    # at most 0.027. When the chunk is freed, a copy of the weight's gradient in bf16 takes at most 1.015. So
    # 1.19 are needed. The first 64 tokens are not counted: there each of the two threads takes the workspace
    # of cuBLAS, 0.031, which it keeps, so that the order of the widths does not matter.
    assert max(peaks[1:]) <= 1.21


@pytest.mark.gpu
def test_a_buffer_of_more_than_two_to_the_31st_logits_is_addressed_right(monkeypatch):
    hidden_LD, weight_VD, targets_L = random_head(14500, 64, 151936, 151665, dtype=torch.bfloat16)
    assert len(hidden_LD) * len(weight_VD) > 2**31
    chunked = results(logprobs.token_logprobs, hidden_LD, weight_VD, targets_L, 151665)
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 2**14)
    whole = results(logprobs.token_logprobs, hidden_LD, weight_VD, targets_L, 151665)
    for a, b in zip(whole, chunked, strict=True):
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()
