"""model.py: equal to transformers' Qwen2, Llama and Qwen3, both ways through folders, and the attentions."""

import errno
import json
import re
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import model as model_module
import runtime.tensors
from model import (
    ModelConfig,
    RopeScaling,
    Transformer,
    load_hf,
    packed_attention,
    rope_tables,
    save_hf,
    shared_prefix_attention,
)

INDEX = "model.safetensors.index.json"
# Llama 3.1's scaling, with an original context so short that the positions of the tests go beyond it.
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=64)
FAMILIES = {"qwen2": {}, "llama": {"model_type": "llama"}, "qwen3": {"model_type": "qwen3", "head_dim": 16},
            "llama3.1": {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 5e5, "head_dim": 16},
            "llama with biases": {"model_type": "llama", "attention_bias": True}}


def config(heads=4, kv_heads=2, tied=True, **changes):
    sizes = {"vocab_size": 50, "hidden_size": 8 * heads, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8,
             "tie_word_embeddings": tied, "initializer_range": 0.2}
    return ModelConfig(**sizes | changes)


def random_model(seed=0, **changes):
    """Weights large enough that every part of the model shows in the logits, biases and norms too."""
    model = Transformer(config(**changes)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def random_tokens(*lengths, seed=0, vocab=50):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def boundaries(sequences):
    return [sum(map(len, sequences[:i])) for i in range(len(sequences) + 1)]


def packed_hidden(model, sequences):
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    return model(torch.cat(sequences), positions, packed_attention(boundaries(sequences)))


def logits_of(model, sequences):
    with torch.no_grad():
        return packed_hidden(model, sequences) @ model.head_weight().T


def peer_logits_of(peer, sequences):
    with torch.no_grad():
        return torch.cat([peer(sequence[None]).logits[0] for sequence in sequences])


def assert_logits_equal(ours, theirs):
    spread = (theirs.max() - theirs.min()).item()
    assert spread > 1
    assert (ours - theirs).abs().max().item() <= 1e-4 * spread


@pytest.fixture
def folder(tmp_path):
    """A tied toy model in one file of weights."""
    save_hf(random_model(), tmp_path / "model")
    return tmp_path / "model"


# Equal to transformers.


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(14, 2), (12, 2), (16, 2), (10, 2), (4, 4), (3, 1)])
def test_logits_equal_transformers(tmp_path, heads, kv_heads, tied):
    ours = random_model(heads=heads, kv_heads=kv_heads, tied=tied)
    save_hf(ours, tmp_path)
    peer = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    sequences = random_tokens(17, 1, 9)
    assert_logits_equal(logits_of(ours, sequences), peer_logits_of(peer, sequences))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1), (8, 2), (8, 1)])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])
def test_logits_of_the_other_families_equal_transformers(tmp_path, family, heads, kv_heads, tied):
    ours = random_model(heads=heads, kv_heads=kv_heads, tied=tied, **FAMILIES[family])
    save_hf(ours, tmp_path)
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                        output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(peer).__name__ == model_module.ARCHITECTURES[ours.config.model_type]
    sequences = random_tokens(150, 1, 9)
    assert_logits_equal(logits_of(ours, sequences), peer_logits_of(peer.eval(), sequences))


def test_scaled_rotary_angles_equal_transformers_far_beyond_the_original_context(tmp_path):
    scaling = replace(LLAMA3, original_max_position_embeddings=8192)
    ours = random_model(model_type="llama", rope_scaling=scaling, rope_theta=5e5, head_dim=64,
                        max_position_embeddings=131072)
    save_hf(ours, tmp_path)
    peer = LlamaForCausalLM.from_pretrained(tmp_path)
    positions = torch.tensor([0, 1, 8191, 8192, 131071])
    cos, sin = rope_tables(positions, ours.config)
    peer_cos, peer_sin = peer.model.rotary_emb(torch.zeros(1), positions[None])
    assert (cos[:, 0] - peer_cos[0]).abs().max() < 0.02  # 131,071 radians in fp32: the last bit is 0.008
    torch.testing.assert_close(cos[:4, 0], peer_cos[0, :4], atol=1e-3, rtol=0)
    torch.testing.assert_close(sin[:4, 0, 32:], peer_sin[0, :4, 32:], atol=1e-3, rtol=0)
    unscaled = rope_tables(positions, replace(ours.config, rope_scaling=None))[0]
    assert (cos - unscaled).abs().max() > 0.5


@pytest.mark.parametrize("old", [False, True], ids=["transformers 5", "transformers 4"])
@pytest.mark.parametrize("peer_class, peer_config", [
    (LlamaForCausalLM, LlamaConfig(
        attention_bias=True, head_dim=8, tie_word_embeddings=True, max_position_embeddings=512,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64})),
    (LlamaForCausalLM, LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    (Qwen3ForCausalLM, Qwen3Config(
        head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))])
def test_a_folder_of_another_family_that_transformers_wrote_loads(tmp_path, peer_class, peer_config, old):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    peer_config = type(peer_config).from_dict(peer_config.to_dict() | sizes | {"layer_types": None})
    peer = peer_class(peer_config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    peer.save_pretrained(tmp_path)
    if old:
        raw = json.loads((tmp_path / "config.json").read_text())
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
        (tmp_path / "config.json").write_text(json.dumps(raw))
    sequences = random_tokens(140, 3)
    ours = load_hf(tmp_path)
    assert_logits_equal(logits_of(ours, sequences), peer_logits_of(peer, sequences))
    save_hf(ours, tmp_path / "again")
    again = peer_class.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert_logits_equal(logits_of(ours, sequences), peer_logits_of(again, sequences))


@pytest.mark.parametrize("shard", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_that_transformers_wrote_loads(tmp_path, tied, shard):
    torch.manual_seed(0)
    peer = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=tied, rms_norm_eps=0.1,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"})).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    peer.save_pretrained(tmp_path, **shard)
    assert (tmp_path / INDEX).exists() == bool(shard)
    sequences = random_tokens(40, 3)
    assert_logits_equal(logits_of(load_hf(tmp_path), sequences), peer_logits_of(peer, sequences))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_sharded_export_loads_in_transformers(tmp_path, tied):
    ours = random_model(tied=tied)
    save_hf(ours, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-0000?-of-0000?.safetensors"))) > 2
    peer, report = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    sequences = random_tokens(11)
    assert_logits_equal(logits_of(ours, sequences), peer_logits_of(peer.eval(), sequences))


def test_rotary_angles_equal_transformers_to_the_last_position(folder):
    peer = Qwen2ForCausalLM.from_pretrained(folder)
    positions = torch.tensor([0, 1, 777, 32767])
    cos, sin = rope_tables(positions, ModelConfig.from_hf(folder))
    peer_cos, peer_sin = peer.model.rotary_emb(torch.zeros(1), positions[None])
    signs = torch.tensor([-1.0] * 4 + [1.0] * 4)
    assert torch.equal(cos[:, 0], peer_cos[0]) and torch.equal(sin[:, 0], peer_sin[0] * signs)


def test_parameter_totals_are_those_of_the_published_models(real_data, tmp_path):
    text = (real_data / "qwen2.5" / "README.md").read_text(encoding="utf-8")
    totals = dict(re.findall(r"^\| ([\d.]+B) \|.*\| ([\d,]+) \|$", text, flags=re.MULTILINE))
    assert len(totals) == 5
    for size, total in totals.items():
        name = f"Qwen2.5-{size}-Instruct.json"
        shutil.copyfile(real_data / "qwen2.5" / "configs" / name, tmp_path / "config.json")
        with torch.device("meta"):
            model = Transformer(ModelConfig.from_hf(tmp_path))
        assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" == total


# Folders, out and in.


@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_keeps_every_bit(tmp_path, family, tied, dtype, max_shard_bytes):
    before = random_model(tied=tied, **FAMILIES[family]).to(dtype)
    save_hf(before, tmp_path, max_shard_bytes)
    after = load_hf(tmp_path, dtype=dtype)
    assert after.config == before.config
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert after.state_dict()[name].dtype == dtype and torch.equal(after.state_dict()[name], tensor), name


def test_a_tied_export_has_no_head_and_an_untied_one_has(tmp_path):
    for tied in (True, False):
        save_hf(random_model(tied=tied), tmp_path)
        assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


def edit_weights(folder, name, tensor):
    """Put a tensor into model.safetensors, or with None take it out."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(name, None)
    save_file(weights | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


def test_a_tied_folder_may_repeat_its_embedding_as_the_head(folder):
    edit_weights(folder, "lm_head.weight", load_hf(folder).embed_tokens.weight.detach())
    model = load_hf(folder)
    assert model.head_weight() is model.embed_tokens.weight


def test_rotary_frequencies_that_older_tools_saved_are_ignored(folder):
    before = load_hf(folder).state_dict()
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        edit_weights(folder, name, torch.ones(4))
    after = load_hf(folder).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("names, words", [
    (["adapter_model.safetensors", "adapter_config.json"], "a LoRA adapter without its model; merge"),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "copy it from where"),
    (["consolidated.safetensors"], "rename a single file to model.safetensors"),
    (["pytorch_model-00001-of-00003.bin", "training_args.bin"], "save the model as safetensors"),
    ([], "no readable tensors")])
def test_weights_in_another_form_are_one_line_with_advice(folder, names, words):
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        load_hf(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not names or sorted(names)[0] in str(caught.value)


def test_loading_casts_to_the_dtype_asked_for_and_leaves_trainable_parameters(folder):
    model = load_hf(folder, dtype=torch.float64)
    assert all(parameter.dtype == torch.float64 and parameter.requires_grad and not parameter.is_meta
               for parameter in model.parameters())


def test_the_new_export_replaces_one_that_was_cut_otherwise(tmp_path):
    for first, second in ((5e9, 20_000), (20_000, 5e9)):
        save_hf(random_model(seed=1), tmp_path, first)
        save_hf(random_model(seed=2), tmp_path, second)
        named = {"model.safetensors"}
        if (tmp_path / INDEX).exists():
            named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
        assert {file.name for file in tmp_path.glob("*.safetensors")} == named
        assert torch.equal(load_hf(tmp_path).head_weight(), random_model(seed=2).head_weight())


@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000], ids=["single", "sharded"])
def test_an_interrupted_save_leaves_nothing_half_written(tmp_path, monkeypatch, max_shard_bytes):
    write_tensors = runtime.tensors.write_tensors

    def fill_the_disk(file, tensors):
        write_tensors(file, tensors)
        if "00001-of" not in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = random_model(seed=1)
    save_hf(before, tmp_path / "old")
    monkeypatch.setattr(runtime.tensors, "write_tensors", fill_the_disk)
    for folder in ("new", "old"):
        with pytest.raises(ValueError, match=rf"{folder}/model.*\.safetensors: cannot be written \(No space"):
            save_hf(random_model(seed=2), tmp_path / folder, max_shard_bytes)
    assert list((tmp_path / "new").iterdir()) == []
    assert {file.name for file in (tmp_path / "old").iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(load_hf(tmp_path / "old").head_weight(), before.head_weight())


def test_a_hub_name_is_resolved_through_the_hub(folder, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(load_hf("someone/a-model").head_weight(), load_hf(folder).head_weight())
    assert ModelConfig.from_hf("someone/a-model") == config()
    assert asked == ["someone/a-model"] * 2


@pytest.mark.parametrize("name", ["someone/no-such-model", "no such folder", "/no/such/folder"])
def test_an_unknown_name_is_one_clear_line(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        load_hf(name)
    assert str(caught.value).startswith(f"{name}: no local folder") and "\n" not in str(caught.value)


# Folders that are wrong: one line that names the file and the tensor or key.


def assert_one_line_error(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_hf(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b'{"vocab_size": 5', b"\xff\xfe", b"[]", b"3"])
def test_a_config_that_is_no_json_object_is_one_clear_line(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    assert_one_line_error(folder, r"config\.json: (not a readable JSON file|expected a JSON object)")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope is 'llama3'"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope is 'yarn'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope is 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope is 'yarn'"),
    ({"vocab_size": None}, "'vocab_size'"),
    ({"hidden_size": None, "head_dim": None}, "'hidden_size'"),
    ({"hidden_size": "32", "head_dim": None}, "'str'"),
    ({"vocab_size": "50"}, "vocab_size is '50'"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
    ({"num_attention_heads": 0, "head_dim": None}, "zero"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
])
def test_a_config_of_another_model_is_one_clear_line(folder, changes, message):
    raw = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    assert_one_line_error(folder, rf"config\.json: .*{message}")


def test_null_in_a_config_counts_as_absent(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"head_dim": None, "rope_scaling": None, "initializer_range": None}
    (folder / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_hf(folder) == config(initializer_range=0.02)


def test_a_qwen3_config_without_a_head_size_has_the_one_of_transformers(tmp_path):
    save_hf(random_model(model_type="qwen3"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_hf(tmp_path).head_dim == Qwen3Config.from_pretrained(tmp_path).head_dim == 128


def test_weights_that_are_missing_empty_or_truncated_are_one_clear_line(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b""):
        file.write_bytes(content)
        assert_one_line_error(folder, r"model\.safetensors: no readable tensors")
    file.unlink()
    assert_one_line_error(folder, r"model\.safetensors: no readable tensors")


@pytest.mark.parametrize(("name", "tensor", "message"), [
    ("model.norm.weight", None, r"no tensor 'model\.norm\.weight'"),
    ("model.layers.1.self_attn.k_proj.bias", None, r"no tensor 'model\.layers\.1\.self_attn\.k_proj\.bias'"),
    ("model.layers.2.mlp.up_proj.weight", torch.ones(48, 32), r"holds 'model\.layers\.2\.mlp\.up_proj"),
    ("model.norm.weight", torch.ones(31), r"'model\.norm\.weight' has shape \[31\].* \[32\]"),
    ("lm_head.weight", torch.ones(50, 32), r"ties the head .*lm_head\.weight differs"),
    ("lm_head.weight", torch.ones(49, 32), r"ties the head .*lm_head\.weight differs"),
])
def test_a_tensor_missing_unknown_or_of_another_shape_is_one_clear_line(folder, name, tensor, message):
    edit_weights(folder, name, tensor)
    assert_one_line_error(folder, message)


@pytest.mark.parametrize("file", [
    "../outside.safetensors", "/outside.safetensors", "sub/x.safetensors", "..", ".", "", 3, None, ["a"]])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(tmp_path, file):
    save_hf(random_model(), tmp_path / "model", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    # The file is there and holds the right tensor: only its place is wrong.
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "outside.safetensors")
    index["weight_map"]["model.norm.weight"] = file
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    message = rf"index\.json: weight_map names {re.escape(repr(file))}, not a file of this folder"
    assert_one_line_error(tmp_path / "model", message)


@pytest.mark.parametrize(("text", "message"), [
    ('{"weight_map": {"model.norm.weight": "gone.safetensors"}}', r"gone\.safetensors: no readable tensors"),
    ('{"weight_map": {}}', "no tensor 'model.embed_tokens.weight'"),
    ('{"weight_map": []}', r"index\.json: weight_map"),
    ("{}", r"index\.json: weight_map"),
    ("[]", r"index\.json: expected a JSON object"),
    ('{"weight', r"index\.json: not a readable JSON file"),
])
def test_a_broken_index_is_one_clear_line(folder, text, message):
    (folder / INDEX).write_text(text)
    assert_one_line_error(folder, message)


# What a token sees.


def test_a_pack_equals_its_sequences_alone():
    model = random_model()
    sequences = random_tokens(5, 1, 12, 3)
    alone = torch.cat([packed_hidden(model, [sequence]) for sequence in sequences])
    torch.testing.assert_close(packed_hidden(model, sequences), alone, atol=1e-5, rtol=1e-5)


def test_a_later_token_does_not_change_earlier_hidden_states():
    model = random_model()
    tokens, = random_tokens(10)
    before = packed_hidden(model, [tokens])
    for changed in range(10):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % 50
        after = packed_hidden(model, [other])
        assert torch.equal(after[:changed], before[:changed])
        assert all(not torch.allclose(after[i], before[i], atol=1e-4) for i in range(changed, 10))


def tree(groups_of_tokens):
    """(tokens, positions, groups, sequences, index): the same replies as a tree and as plain sequences, and
    the index in the tree of each token of the plain pack."""
    tokens, positions, groups, sequences, index = [], [], [], [], []
    end = 0
    for prompt, *replies in groups_of_tokens:
        groups.append((len(prompt), [len(reply) for reply in replies]))
        prompt_at = torch.arange(end, end + len(prompt))
        tokens.append(prompt)
        positions.append(torch.arange(len(prompt)))
        end += len(prompt)
        for reply in replies:
            tokens.append(reply)
            positions.append(torch.arange(len(prompt), len(prompt) + len(reply)))
            sequences.append(torch.cat((prompt, reply)))
            index += [prompt_at, torch.arange(end, end + len(reply))]
            end += len(reply)
    return torch.cat(tokens), torch.cat(positions), groups, sequences, torch.cat(index)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_shared_prefix_equals_repeated_prompts_in_outputs_and_gradients(tied):
    tokens, positions, groups, sequences, index = tree(
        [random_tokens(7, 4, 1, 5), random_tokens(1, 2, 3, seed=1), random_tokens(6, 6, seed=2)])
    results = []
    for shared in (True, False):
        model = random_model(heads=6, kv_heads=2, tied=tied).double()
        if shared:
            hidden = model(tokens, positions, shared_prefix_attention(groups))[index]
        else:
            hidden = packed_hidden(model, sequences)
        logits = hidden @ model.head_weight().T
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (logits * weights).sum().backward()
        results.append((logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (logits, gradients), (wanted_logits, wanted_gradients) = results
    torch.testing.assert_close(logits, wanted_logits, atol=1e-10, rtol=1e-10)
    for name, wanted in wanted_gradients.items():
        assert wanted.abs().max() > 1e-3, name
        torch.testing.assert_close(gradients[name], wanted, atol=1e-10, rtol=1e-10, msg=name)


def test_replies_see_their_prompt_but_not_each_other_nor_other_groups():
    model = random_model()
    groups_of_tokens = [random_tokens(4, 3, 3), random_tokens(3, 2, 5, seed=1)]
    tokens, positions, groups, _, _ = tree(groups_of_tokens)
    attend = shared_prefix_attention(groups)
    before = model(tokens, positions, attend)
    # Where each changed token shows: from itself on, in its own reply, or if it is the prompt's in its group.
    visible_from = {2: range(2, 10), 4: range(4, 7), 6: range(6, 7), 8: range(8, 10), 10: range(10, 20),
                    13: range(13, 15), 15: range(15, 20)}
    for changed, expected in visible_from.items():
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % 50
        after = model(other, positions, attend)
        assert (after != before).any(-1).nonzero()[:, 0].tolist() == list(expected)


def test_a_mask_is_made_once_for_all_layers_and_for_replies_of_one_length(monkeypatch):
    made, full = [], torch.full
    monkeypatch.setattr(torch, "full", lambda shape, *args, **more: made.append(shape) or full(
        shape, *args, **more))
    tokens, positions, groups, _, _ = tree([random_tokens(4, 3, 3, 2), random_tokens(4, 2, 5, seed=1),
                                            random_tokens(3, 2, seed=2)])
    random_model()(tokens, positions, shared_prefix_attention(groups))  # of two layers
    assert made == [(3, 7), (2, 6), (5, 9), (2, 5)]


def test_a_pack_of_another_length_than_promised_is_caught():
    tokens, = random_tokens(5)
    for attend in (packed_attention([0, 4]), shared_prefix_attention([(2, [2])])):
        with pytest.raises(AssertionError, match="5 tokens in a pack of 4"):
            random_model()(tokens, torch.arange(5), attend)


# Activation checkpointing.


def kept_for_backward(model, tokens, autocast):
    """(numbers kept for backward, gradients) of one pass."""
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with keep, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = packed_hidden(model, [tokens])
    hidden.float().square().sum().backward()
    return sum(kept), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_checkpointed_blocks_keep_less_and_give_the_same_gradients_bit_for_bit(autocast):
    tokens, = random_tokens(40)
    results = []
    for checkpoint_blocks in (False, True):
        model = random_model(num_hidden_layers=4)
        model.checkpoint_blocks = checkpoint_blocks
        results.append(kept_for_backward(model, tokens, autocast))
    (kept, gradients), (kept_by_checkpoints, same_gradients) = results
    assert kept_by_checkpoints < kept / 4
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


def test_without_gradients_no_block_is_checkpointed(monkeypatch):
    monkeypatch.setattr(model_module, "checkpoint", None)
    model = random_model()
    model.checkpoint_blocks = True
    with torch.no_grad():
        packed_hidden(model, random_tokens(4))
    with pytest.raises(TypeError):
        packed_hidden(model, random_tokens(4))


# Numbers.


def test_initial_weights_are_a_pure_function_of_the_seed():
    first, other = Transformer(config()).init_weights(0), Transformer(config()).init_weights(1)
    torch.manual_seed(5)
    again = Transformer(config()).init_weights(0)
    torch.rand(3)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert (a.dim() == 1) == torch.equal(a, c), name
    for name, parameter in first.named_parameters():
        if parameter.dim() == 2:
            assert abs(parameter.std().item() / 0.2 - 1) < 0.1, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_a_bf16_forward_stays_near_fp32():
    model = random_model()
    sequences = random_tokens(20, 5)
    wanted = packed_hidden(model, sequences)
    hidden = packed_hidden(model.bfloat16(), sequences)
    assert hidden.dtype == torch.bfloat16
    assert (hidden.float() - wanted).norm() < 0.05 * wanted.norm()


def test_the_head_is_the_embedding_where_tied_and_its_own_where_not():
    tied, untied = random_model(tied=True), random_model(tied=False)
    assert tied.head_weight() is tied.embed_tokens.weight
    assert untied.head_weight() is untied.lm_head.weight
    assert tied.head_weight().shape == untied.head_weight().shape == (50, 32)


def test_a_pack_of_nothing_goes_through_and_has_a_graph():
    model = Transformer(ModelConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=4)).init_weights(0)
    nothing = torch.empty(0, dtype=torch.int64)
    hidden_TD = model(nothing, nothing, shared_prefix_attention([]))
    hidden_TD.sum().backward()
    assert hidden_TD.shape == (0, 8) and model.embed_tokens.weight.grad.abs().sum() == 0
