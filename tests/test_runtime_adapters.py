"""runtime/adapters.py: LoRA's gradients, merging, the plain base, and PEFT's folder."""

import pytest
import torch
import transformers
from torch.func import functional_call

from model import ModelConfig, Transformer, load_hf, packed_attention, save_hf
from runtime import adapters
from runtime.adapters import LoRALinear, MergedWeight

RANK, ALPHA = 3, 12
FAMILIES = [{}, {"model_type": "llama", "attention_bias": True}, {"model_type": "qwen3"}]
LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def base_model(**changes):
    config = ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
                         **changes)
    return Transformer(config).init_weights(0)


def adapted(model, B=0.1):
    """The model with adapters whose B is random of this size."""
    adapters.add_adapters(model, RANK, ALPHA)
    adapters.init_adapters(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * B)
    return model


TOKENS, ATTEND = torch.arange(1, 31), packed_attention([0, 12, 30])


def hidden(model):
    return model(TOKENS, torch.arange(30), ATTEND)


def logits(model):
    with torch.no_grad():
        return hidden(model) @ model.head_weight().T


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_blocks_has_an_adapter_and_nothing_else_is_trained(family):
    model = adapted(base_model(**family))
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert sorted({name.rpartition(".")[2] for name in names}) == LAYERS and len(names) == 2 * len(LAYERS)
    trained = {name.rpartition(".")[2] for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_fresh_adapters_change_no_bit_of_the_output():
    model = base_model()
    wanted = logits(model)
    adapters.add_adapters(model, RANK, ALPHA)
    adapters.init_adapters(model, 0)
    assert torch.equal(logits(model), wanted)
    A = model.layers[0].mlp.down_proj.lora_A
    assert 0.9 / 48**0.5 < A.abs().max() <= 1 / 48**0.5
    assert not torch.equal(A, model.layers[1].mlp.down_proj.lora_A)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_adapters_equal_autograd_through_the_merged_weight(family):
    model = adapted(base_model(**family)).double()
    layers = {name: x for name, x in model.named_modules() if isinstance(x, LoRALinear)}
    plain = base_model(**family).double()
    merged = {f"{name}.weight": layer.weight.detach() + ALPHA / RANK * layer.lora_B @ layer.lora_A
              for name, layer in layers.items()}
    wanted = functional_call(plain, merged, (TOKENS, torch.arange(30), ATTEND))
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = [getattr(layer, name) for layer in layers.values() for name in adapters.NAMES]
    expected = torch.autograd.grad((wanted * weights).sum(), parameters)
    found = torch.autograd.grad((hidden(model) * weights).sum(), parameters)
    for got, want in zip(found, expected, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_equals_the_adapted_one_and_a_plain_one_the_base(tied):
    model = base_model(tie_word_embeddings=tied)
    wanted, before = logits(model), {name: x.clone() for name, x in model.state_dict().items()}
    adapted(model)
    merged, plain = adapters.plain_model(model), adapters.plain_model(model, merged=False)
    assert torch.equal(logits(plain), wanted)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    assert (logits(merged) - wanted).abs().max() > 0.5
    assert not adapters.has_adapters(merged) and adapters.has_adapters(model)
    for name, weight in before.items():  # merging writes new tensors
        assert torch.equal(model.state_dict()[name], weight), name
    assert plain.embed_tokens.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    assert plain.layers[0].mlp.up_proj.weight.data_ptr() == model.layers[0].mlp.up_proj.weight.data_ptr()


def test_merging_adds_in_fp32_and_casts_once():
    model = adapted(base_model().bfloat16())
    layer = model.layers[0].mlp.up_proj
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    wanted = (layer.weight.double() + ALPHA / RANK * layer.lora_B.double() @ layer.lora_A.double())
    merged = MergedWeight(layer).full_tensor()
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, wanted.bfloat16(), atol=0, rtol=2**-8)
    assert (merged != wanted.bfloat16()).float().mean() < 0.001  # ties between two bf16 numbers only


@pytest.mark.parametrize("dtype, B, least, most", [
    (torch.float32, 0.1, 0.0, 1e-6), (torch.bfloat16, 0.1, 1e-4, 0.05), (torch.bfloat16, 1e-6, 0.9, 5.0),
    (torch.bfloat16, 0.0, 0.0, 0.0)])
def test_the_share_of_the_change_that_the_cast_loses(dtype, B, least, most):
    model = base_model().to(dtype)
    assert least <= adapters.share_lost(adapted(model, B)) <= most


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_the_adapter_and_gives_the_same_logits(tmp_path, family):
    import peft

    save_hf(base_model(**family), tmp_path / "base")
    model = adapted(base_model(**family))
    adapters.write_adapter(tmp_path / "adapter", model, tmp_path / "base")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = torch.cat([peer(part[None]).logits[0] for part in TOKENS.split([12, 18])])
    torch.testing.assert_close(logits(model), theirs, atol=1e-4, rtol=0)


def test_an_adapter_survives_its_folder_bit_for_bit(tmp_path):
    save_hf(base_model(), tmp_path / "base")
    before, after = adapted(base_model()), load_hf(tmp_path / "base")
    adapters.write_adapter(tmp_path / "adapter", before, tmp_path / "base")
    adapters.add_adapters(after, RANK, ALPHA)
    adapters.read_adapter(tmp_path / "adapter", after)
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_adapter_of_another_rank_is_one_clear_line(tmp_path):
    adapters.write_adapter(tmp_path, adapted(base_model()), "base")
    other = base_model()
    adapters.add_adapters(other, RANK + 1, ALPHA)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no tensor .*lora_A\.weight' of shape"):
        adapters.read_adapter(tmp_path, other)


def test_a_rank_larger_than_a_layer_is_one_clear_line():
    with pytest.raises(ValueError, match=r"model\.lora_rank is 17, more than k_proj of shape \[16, 32\]"):
        adapters.add_adapters(base_model(), 17, ALPHA)
