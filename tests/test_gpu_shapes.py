"""What a CPU can show of the GPU path at true sizes: a decode step never waits for the device and takes
nothing from the host, as a CUDA graph needs it; its operations are counted; shapes and dtypes are right.

The tensors are those of Qwen2.5 1.5B and 7B in bf16 on PyTorch's meta device, without memory.
"""

import contextlib
import dataclasses
import functools

import fake_cuda
import pytest
import torch
from fake_cuda import SIZES, VOCAB_SIZE, Operations

from fast.flash_prefix import shared_prefix_attention
from fast.paged_cache import PAGE, decode_attention
from grpo import pack
from model import MLP, packed_attention
from sample import Prompt, prefill, sample_tokens
from train import logprobs_of_pack

sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors on meta say that they are on a GPU; without Triton there is nothing to launch."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def empty_model(size, **changes):
    return fake_cuda.empty_model(dataclasses.replace(SIZES[size], **changes), "meta")


# A decode step, with the pages and draws of a GPU.


def triton_draw(logits_BV, key_B):
    from fast.draw import sample_tokens
    return sample_tokens(logits_BV, 0.7, key_B, vocab_size=VOCAB_SIZE)


def step_of(model, B, draw=triton_draw, may_raise=()):
    """Operations of one step of B rows."""
    decoder, found = fake_cuda.decoder(model, B, draw), Operations("meta")
    with torch.no_grad(), found.watching(), contextlib.suppress(*may_raise):
        decoder.step(B)
    return found


@pytest.mark.parametrize(("B", "operations", "of_triton"), [(64, 633, 57), (256, 605, 29)])
@sizes
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_decode_step_is_so_many_operations_and_the_host_has_no_part_in_it(size, B, operations, of_triton):
    """Of each of 28 layers: 2 norms, 3 products with bias and 4 without, 2 × 3 of rotary positions, silu, a
    product with it, 2 sums, attention and, where a row has parts, their merge. 64 rows have parts."""
    found = step_of(empty_model(size), B)
    assert found.host == found.syncs == []
    assert found.operations.total() == operations and found.launches == of_triton
    assert found.operations["addmm"] + found.operations["mm"] == 28 * 7 + 1
    assert found.operations["addcmul"] == 28 * 2 and found.operations["_fused_rms_norm"] == 28 * 2 + 1


@pytest.mark.parametrize(("top_p", "draws_with"), [(0.9, "sort"), (1.0, "searchsorted")])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_decode_step_that_draws_without_triton_does_not_wait_either(top_p, draws_with):
    found = step_of(empty_model("1.5B"), 64, functools.partial(
        sample_tokens, temperature=0.7, top_p=top_p, vocab_size=VOCAB_SIZE))
    assert found.host == found.syncs == [] and found.operations[draws_with] == 1


@pytest.mark.parametrize(("planted", "kind"), [
    (lambda logits_BV: logits_BV[0, 0].item(), "syncs"),
    (lambda logits_BV: bool(logits_BV.isfinite().all()), "syncs"),
    (lambda logits_BV: torch.tensor([1], device=logits_BV.device), "host"),
    (lambda logits_BV: torch.zeros(1) + 1, "host"),
], ids=["item", "truth", "numbers", "tensor"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_wait_or_a_host_tensor_planted_in_a_step_is_caught(planted, kind):
    found = step_of(empty_model("1.5B", num_hidden_layers=1), 64, lambda logits_BV, key_B: (
        planted(logits_BV), triton_draw(logits_BV, key_B))[1], may_raise=[RuntimeError])  # meta has no value
    assert getattr(found, kind)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_one_more_operation_a_layer_is_28_more_a_step(monkeypatch):
    model, forward = empty_model("1.5B"), MLP.forward
    before = step_of(model, 64).operations
    monkeypatch.setattr(MLP, "forward", lambda mlp, x_TD: forward(mlp, x_TD * 1))
    assert step_of(model, 64).operations - before == {"mul": 28}


@sizes
@pytest.mark.usefixtures("as_on_a_gpu")
def test_shapes_and_dtypes_of_a_decode_step(size):
    model, B, seen = empty_model(size), 64, {}
    c = model.config

    def draw(logits_BV, key_B):
        seen["logits"], seen["key"] = logits_BV, key_B
        seen["ids"], seen["logp"] = triton_draw(logits_BV, key_B)
        return seen["ids"], seen["logp"]

    def attention(q_BHE, k_BKE, v_BKE, *pages):
        seen["q"], seen["k"], seen["v"] = q_BHE, k_BKE, v_BKE
        seen["o"] = decode_attention(q_BHE, k_BKE, v_BKE, *pages)
        return seen["o"]

    decoder = fake_cuda.decoder(model, B, draw)
    decoder.cache.attention = attention
    with torch.no_grad(), Operations("meta").watching():
        decoder.step(B)
    heads, bf16 = (B, c.num_attention_heads, c.head_dim), torch.bfloat16
    kv_heads = (B, c.num_key_value_heads, c.head_dim)
    assert {name: (tuple(x.shape), x.dtype) for name, x in seen.items()} == {
        "q": (heads, bf16), "k": (kv_heads, bf16), "v": (kv_heads, bf16), "o": (heads, bf16),
        "logits": ((B, c.vocab_size), bf16), "key": ((B,), torch.int64),
        "ids": ((B,), torch.int64), "logp": ((B,), torch.float32)}
    pool, pages = decoder.cache.pool, B * -(-1411 // PAGE) + 1  # for all rows, and one to write to in vain
    assert pool.shape == (28, 2, pages, PAGE, *kv_heads[1:]) and pool.dtype == bf16


# Training and prefill.


@sizes
def test_shapes_and_dtypes_of_a_prefill(size):
    model, prompts = empty_model(size), [Prompt([1] * length, 5) for length in (900, 1, 301)]
    with torch.no_grad():
        prefill(model, prompts, "auto")
    c = model.config
    for prompt in prompts:
        assert prompt.kv.shape == (28, 2, len(prompt.ids) - 1, c.num_key_value_heads, c.head_dim)
        assert prompt.kv.dtype == torch.bfloat16


@sizes
def test_shapes_and_dtypes_of_a_training_pass_with_checkpointing(size):
    model = empty_model(size, num_hidden_layers=4)  # each of the 28 is the same
    model.checkpoint_blocks = True
    tree = pack([[1] * 900], [[[2] * 120, [3] * 37]]).to("meta")
    logp_L, entropy_L = logprobs_of_pack(model, tree, 0.7, VOCAB_SIZE, contextlib.nullcontext())
    assert logp_L.shape == entropy_L.shape == (157,) and logp_L.dtype == entropy_L.dtype == torch.float32
    assert logp_L.requires_grad and not entropy_L.requires_grad
    logp_L.sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16 for x in model.parameters())


@sizes
def test_shapes_and_dtypes_of_a_forward_with_flash_attention_and_without(size):
    model = empty_model(size, num_hidden_layers=4)
    tree = pack([[1] * 900], [[[2] * 120, [3] * 37]]).to("meta")
    for attend in (shared_prefix_attention(tree.groups), packed_attention([0, 1057])):
        hidden_TD = model(tree.tokens_T, tree.positions_T, attend)
        assert hidden_TD.shape == (1057, model.config.hidden_size) and hidden_TD.dtype == torch.bfloat16


@sizes
@pytest.mark.usefixtures("as_on_a_gpu")
def test_shapes_and_dtypes_of_log_probs_in_triton_and_their_gradients(size):
    model = empty_model(size)
    with Operations("meta").watching() as found:
        dhidden_LD, dweight_VD = fake_cuda.logprobs_and_their_backward(model)()
    weight_VD = model.head_weight()
    assert dhidden_LD.shape == (8192, weight_VD.shape[1]) and dweight_VD.shape == weight_VD.shape
    assert dhidden_LD.dtype == dweight_VD.dtype == torch.bfloat16
    assert found.host == found.syncs == [] and found.launches == 4
