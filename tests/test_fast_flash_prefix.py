"""fast/flash_prefix.py against model.shared_prefix_attention, its definition, and the choice between the two.

FlashAttention exists on GPUs only: without one, the function varlen_attn below replaces torch's.
"""

import sys

import pytest
import torch
import torch.nn.attention.varlen

import model as model_module
from fast import flash_prefix
from grpo import pack
from model import ModelConfig, Transformer, packed_attention, shared_prefix_attention

CONFIG = ModelConfig(vocab_size=50, hidden_size=48, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
                     initializer_range=0.2)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn does, one sequence after the other: with a window of (-1, 0)
    causal, the last query of a sequence seeing its last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
    assert cu_seq_q[0] == cu_seq_k[0] == 0 and len(query) == cu_seq_q[-1] and len(key) == cu_seq_k[-1]
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert query.shape[1] == key.shape[1] or enable_gqa
    repeats = query.shape[1] // key.shape[1]
    out = []
    for q, k, v in zip(query.split(cu_seq_q.diff().tolist()), key.split(cu_seq_k.diff().tolist()),
                       value.split(cu_seq_k.diff().tolist()), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q, k.repeat_interleave(repeats, 1)) / q.shape[-1] ** 0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khe->qhe", weights, v.repeat_interleave(repeats, 1)))
    return torch.cat(out)


def varlen_attn_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                              scale=None, window_size=(-1, -1)):
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


@pytest.fixture(params=[varlen_attn, varlen_attn_of_torch_2_11])
def stand_in(request, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", request.param)


def random_qkv(T, H, K, dtype=torch.float64, device="cpu", E=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, heads, E, generator=generator).to(device, dtype).requires_grad_()
            for heads in (H, K, K)]


def outputs_and_gradients(attend, qkv):
    out = attend(0, *qkv)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, qkv, upstream)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("groups", [
    [(5, [3])],
    [(4, [3, 1, 6])],
    [(1, [2])],
    [(1, [1, 1]), (7, []), (3, [2, 9]), (1, [])],
    [(6, []), (2, [])],
], ids=str)
@pytest.mark.usefixtures("stand_in")
def test_two_calls_of_flash_attention_equal_the_definition(groups, heads, kv_heads):
    total = sum(prompt + sum(replies) for prompt, replies in groups)
    qkv = random_qkv(total, heads, kv_heads)
    flash = outputs_and_gradients(flash_prefix.shared_prefix_attention(groups), qkv)
    torch.testing.assert_close(flash, outputs_and_gradients(shared_prefix_attention(groups), qkv))


@pytest.mark.usefixtures("stand_in")
def test_a_model_through_flash_attention_has_the_same_gradients_and_prepares_once(monkeypatch):
    made, asked = [], flash_prefix.shares_key_heads.cache_info().misses
    runs_of = flash_prefix.Runs.of
    monkeypatch.setattr(flash_prefix.Runs, "of", lambda *args: made.append(args) or runs_of(*args))
    tree = pack([[1, 2, 3, 4, 5, 6, 7], [8]], [[[9, 10, 11, 12], [13], [14, 15, 16, 17, 18]], [[19, 20]]])
    gradients = []
    for module in (flash_prefix, model_module):
        model = Transformer(CONFIG).init_weights(0).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.cos()  # so that biases are not zero, nor norms one
        attend = module.shared_prefix_attention(tree.groups)
        model(tree.tokens_T, tree.positions_T, attend).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)
    assert len(made) == 4  # queries and keys of two calls, for two layers and their backward
    assert flash_prefix.shares_key_heads.cache_info().misses <= asked + 1


# The choice, which is made in model.py.


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_without_a_gpu_flash_attention_is_never_called(kernel, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", None)
    monkeypatch.setitem(sys.modules, "fast.flash_prefix", None)  # importing it would raise
    for dtype in (torch.float32, torch.bfloat16):
        for attend in (shared_prefix_attention([(3, [2])], kernel), packed_attention([0, 3, 5], kernel)):
            outputs_and_gradients(attend, random_qkv(5, 2, 1, dtype))


def test_without_a_gpu_asking_for_flash_attention_is_refused_in_one_line():
    for dtype in (torch.float32, torch.bfloat16):
        qkv = random_qkv(5, 2, 1, dtype)
        for attend in (shared_prefix_attention([(3, [2])], "fast"), packed_attention([0, 3, 5], "fast")):
            with pytest.raises(ValueError, match="kernel 'fast': attention on a cpu .*'auto'") as caught:
                attend(0, *qkv)
            assert "\n" not in str(caught.value)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel is 'flash'; choose one of"):
        shared_prefix_attention([(3, [2])], "flash")(0, *random_qkv(5, 2, 1))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """model.py believes that it computes on a GPU, and varlen_attn is replaced: a list, one entry a call."""
    calls = []
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn",
                        lambda *args, enable_gqa=False, **settings: calls.append(1) or varlen_attn(
                            *args, enable_gqa=enable_gqa, **settings))
    monkeypatch.setattr(model_module, "choose_kernel",
                        lambda kernel, device, part: "reference" if kernel == "reference" else "gpu")
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "calls"), [("auto", 2), ("fast", 2), ("reference", 0)])
def test_on_a_gpu_16_bits_go_to_flash_attention_unless_the_definition_is_asked_for(kernel, calls, dtype,
                                                                                  as_on_a_gpu):
    qkv = random_qkv(9, 4, 2, dtype)
    ours = outputs_and_gradients(shared_prefix_attention([(4, [3, 2])], kernel), qkv)
    assert len(as_on_a_gpu) == calls
    plain = outputs_and_gradients(shared_prefix_attention([(4, [3, 2])], "reference"), qkv)
    torch.testing.assert_close(ours, plain, atol=0.05, rtol=0.05)


def test_on_a_gpu_auto_takes_the_definition_for_32_bits_and_fast_is_refused(as_on_a_gpu):
    qkv = random_qkv(5, 2, 1, torch.float32)
    plain = outputs_and_gradients(shared_prefix_attention([(3, [2])], "reference"), qkv)
    ours = outputs_and_gradients(shared_prefix_attention([(3, [2])], "auto"), qkv)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    with pytest.raises(ValueError, match="'fast': FlashAttention computes in bf16 and fp16, not in float32"):
        shared_prefix_attention([(3, [2])], "fast")(0, *qkv)
    assert not as_on_a_gpu


def test_a_pack_of_nothing_never_goes_to_flash_attention(as_on_a_gpu):
    nothing = random_qkv(0, 2, 1, torch.bfloat16)
    out, *grads = outputs_and_gradients(shared_prefix_attention([], "fast"), nothing)
    assert out.shape == grads[0].shape == (0, 2, 8) and not as_on_a_gpu


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [[(900, [120, 1, 77])], [(1, [3]), (130, []), (64, [65] * 8)], [(99, [])]],
                         ids=["one", "many", "no reply"])
@pytest.mark.parametrize(("H", "K", "E"), [(14, 2, 64), (28, 4, 128), (8, 8, 64)])
def test_flash_attention_on_a_gpu_is_as_near_to_fp32_as_the_definition(groups, H, K, E):
    total = sum(prompt + sum(replies) for prompt, replies in groups)
    attend = shared_prefix_attention(groups)
    qkv = random_qkv(total, H, K, torch.bfloat16, "cuda", E)
    flash = outputs_and_gradients(attend, qkv)
    assert torch.equal(flash[0], flash_prefix.shared_prefix_attention(groups)(0, *qkv))
    exact = outputs_and_gradients(attend, [x.detach().float().requires_grad_() for x in qkv])
    plain = outputs_and_gradients(attend, [x.detach().cpu().requires_grad_() for x in qkv])
    for ours, theirs, truth in zip(flash, plain, exact, strict=True):
        error, plain_error = ((x.to(truth) - truth).norm() / truth.norm() for x in (ours, theirs))
        assert error < max(0.01, 2 * plain_error)


