"""runtime/adapters.py: gradients of LoRA, merging, the plain base, PEFT's folder; resumed runs, and ranks."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from short_run import (
    STEPS,
    arguments,
    at_call,
    die,
    in_ranks,
    killed,
    limit_time,
    make_setting,
    newest,
    refusal,
    shared_files,
    shared_runs,
)
from soak import differences, rows
from torch.func import functional_call

import train
from model import ModelConfig, Transformer, load_hf, packed_attention, save_hf
from runtime import adapters, checkpoints, sharding
from runtime.adapters import LoRALinear, MergedWeight
from runtime.ranks import join_ranks, leave_ranks

limit = pytest.fixture(autouse=True)(limit_time)
setting = pytest.fixture(autouse=True)(make_setting)
files = pytest.fixture(scope="module")(shared_files)
finished = pytest.fixture(scope="module")(shared_runs)
LORA = ("--model.lora_rank=4", "--model.lora_alpha=8")

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
    adapters.fill_adapters(model, 0)
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
    adapters.fill_adapters(model, 0)
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


@pytest.mark.parametrize("merged", [True, False])
def test_the_plain_model_of_a_phase_holds_no_weights_after_it(merged):
    model = adapted(base_model())
    with sharding.unsharded(model, merged) as plain:
        assert all(weight.device.type == "cpu" for weight in plain.parameters())
    assert all(weight.is_meta for weight in plain.parameters())
    assert not any(weight.is_meta for weight in model.parameters())


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
    adapters.write_adapter(tmp_path, model, tmp_path / "base")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = torch.cat([peer(part[None]).logits[0] for part in TOKENS.split([12, 18])])
    torch.testing.assert_close(logits(model), theirs, atol=1e-4, rtol=0)


def test_an_adapter_survives_its_folder_bit_for_bit(tmp_path):
    save_hf(base_model(), tmp_path / "base")
    before, after = adapted(base_model()), load_hf(tmp_path / "base")
    adapters.write_adapter(tmp_path, before, tmp_path / "base")
    adapters.add_adapters(after, RANK, ALPHA)
    adapters.fill_adapters(after, 0, tmp_path)
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_adapter_of_another_rank_is_one_clear_line(tmp_path):
    adapters.write_adapter(tmp_path, adapted(base_model()), "base")
    other = base_model()
    adapters.add_adapters(other, RANK + 1, ALPHA)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no tensor .*lora_A\.weight' of shape"):
        adapters.fill_adapters(other, 0, tmp_path)


def test_a_rank_larger_than_a_layer_is_one_clear_line():
    with pytest.raises(ValueError, match=r"model\.lora_rank is 17, more than k_proj of shape \[16, 32\]"):
        adapters.add_adapters(base_model(), 17, ALPHA)


# Runs.


def newest_folder(out):
    return out / "checkpoints" / newest(out)


def test_a_run_with_adapters_learns_and_keeps_its_base(files, finished):
    out = finished("grpo", *LORA)
    steps = [row for row in rows(out) if "loss" in row]
    assert len(steps) == STEPS and all(row["grad_norm"] > 0 for row in steps)
    assert steps[0]["kl"] < 1e-4 < 5e-4 < steps[-1]["kl"]  # against the base
    # Merged weights sample what the adapters are trained on.
    assert all(row["sampling/logp_diff_max"] < 1e-3 and row["lora/lost"] < 1e-3 for row in steps)
    base, last = load_file(files / "base/model.safetensors"), load_hf(newest_folder(out)).state_dict()
    changed = {name for name, weight in last.items() if not torch.equal(weight, base["model." + name])}
    assert changed == {name for name in last if "proj.weight" in name}


def test_a_checkpoint_has_the_adapter_that_peft_reads_and_the_merged_weights(files, finished):
    import peft

    checkpoint = newest_folder(finished("grpo", *LORA))
    config = json.loads((checkpoint / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["base_model_name_or_path"] == str(files / "base")
    peer = transformers.AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, checkpoint / "adapter").eval()
    with torch.no_grad():
        theirs = torch.cat([peer(part[None]).logits[0] for part in TOKENS.split([12, 18])])
    torch.testing.assert_close(logits(load_hf(checkpoint)), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_a_killed_run_with_adapters_ends_with_the_bytes_of_an_undisturbed_one(
        files, finished, tmp_path, stage):
    settings = (f"--stage={stage}", *LORA)
    in_second_save = (at_call, checkpoints, "seal", 2, die)
    killed(files, tmp_path / "run", *settings, by=in_second_save, log=tmp_path / "log")
    assert newest(tmp_path / "run") == "step_000002"
    train.main(arguments(files, tmp_path / "run", *settings))
    assert not differences(finished(stage, *LORA), tmp_path / "run")


def test_a_damaged_adapter_is_found_by_the_seal(files, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished("grpo", *LORA), out)
    file = newest_folder(out) / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    train.main(arguments(files, out, *LORA, "--train.steps=8"))
    assert "adapter/adapter_model.safetensors is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("other", [(), ("--model.lora_rank=5", LORA[1]), (LORA[0], "--model.lora_alpha=9")])
def test_a_run_resumes_with_its_own_rank_and_alpha_only(files, finished, tmp_path, capsys, other):
    shutil.copytree(finished("grpo", *LORA), tmp_path / "run")
    line, status = refusal(arguments(files, tmp_path / "run", *other), capsys)
    assert "model.lora_" in line and status == 2


def test_a_folder_that_is_an_adapter_itself_is_one_clear_line(files, finished, tmp_path, capsys):
    folder = newest_folder(finished("grpo", *LORA)) / "adapter"
    line, _ = refusal(arguments(files, tmp_path / "run", *LORA, f"--model.path={folder}"), capsys)
    assert "a LoRA adapter without its model" in line


# Ranks: frozen weights in bf16 beside trained ones in fp32, on FSDP2.


def step_on_ranks(folder, rank):
    """On two ranks: gradients and merged weights equal those of one process, in fp32 and in bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    join_ranks("cpu", 3)
    for tied in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            model = base_model(tie_word_embeddings=tied).to(dtype)
            adapters.add_adapters(model, RANK, ALPHA)
            policy = MixedPrecisionPolicy(dtype, torch.float32)
            for block in model.layers:
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy, reshard_after_forward=False)
            alone = adapted(base_model(tie_word_embeddings=tied).to(dtype))
            adapters.fill_adapters(model, 0)
            for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                own, rows_of = adapters.own_rows(mine)
                own.data.copy_(theirs.data[rows_of])
            for parameter in alone.parameters():  # as the policy gathers them
                parameter.data = parameter.data.to(dtype)
            for each in (model, alone):
                each(TOKENS, torch.arange(30), ATTEND, lambda h, m=each: h @ m.head_weight().T
                     ).float().logsumexp(-1).sum().backward()
            for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
                if not mine.requires_grad:
                    assert mine.grad is None and mine.dtype == dtype, name
                    continue
                assert mine.dtype == mine.grad.dtype == torch.float32, name
                torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad.float(), rtol=1e-5, atol=1e-5)
            for merged in (True, False):
                plain = adapters.plain_model(model, merged)
                assert {x.dtype for x in plain.parameters()} == {dtype}
                again = load_plain(model, merged)
                assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again, strict=True))
    if dist.get_rank() == 0:
        print("equal")
    leave_ranks(0)


def load_plain(model, merged):
    """The weights of `plain_model`, from whole parameters by the definition."""
    whole = {name: x.full_tensor().detach() for name, x in model.named_parameters()}
    for name in [name for name in whole if merged and name.endswith("lora_A")]:
        layer = name.removesuffix(".lora_A")
        W, A, B = (whole[f"{layer}.{part}"] for part in ("weight", "lora_A", "lora_B"))
        whole[f"{layer}.weight"] = (W.float() + B.float() @ A.float() * (ALPHA / RANK)).to(W.dtype)
    return [weight for name, weight in whole.items() if "lora_" not in name]


def test_frozen_bf16_and_trained_fp32_parameters_shard_over_two_ranks(tmp_path):
    statuses, texts = in_ranks(2, lambda rank: step_on_ranks(tmp_path, rank), tmp_path / "log")
    assert statuses == [0, 0] and "equal" in texts[0], texts


def test_a_run_with_adapters_on_two_ranks_leaves_what_one_leaves(files, finished, tmp_path):
    def action(rank):
        train.main(arguments(files, tmp_path / "run", *LORA))

    statuses, texts = in_ranks(2, action, tmp_path / "log")
    assert statuses == [0, 0], texts
    ours, alone = newest_folder(tmp_path / "run"), newest_folder(finished("grpo", *LORA))
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "optimizer.state"):
        found, wanted = load_file(ours / file), load_file(alone / file)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[key], wanted[key], atol=1e-4) for key in wanted), file
