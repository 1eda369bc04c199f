"""Qwen2.5: configuration, forward pass, Hugging Face weights in and out.

In:  packed tokens of any number of sequences, one after the other, never padded. Out: the hidden state of
every token after the final norm; the caller multiplies the rows it needs by `head_weight()`. Parameters may
be sharded over ranks by rows (train.py does that): folders are then read and written a tensor at a time.

    x   = embed(token)
    x  += o_proj(attend(rope(q_proj(norm x)), rope(k_proj(norm x)), v_proj(norm x)))        for every layer
    x  += down_proj(silu(gate_proj(norm x)) * up_proj(norm x))
    out = norm(x)

Which token sees which is not the model's business: `forward` is given one function `attend(layer, q_THE,
k_TKE, v_TKE) -> o_THE`, and packing, the shared prefix of a group and the key/value cache of the sampler
are three such functions. The architecture is that of Qwen2 (arXiv 2407.10671): RMSNorm, rotary positions,
grouped-query attention with a bias on q, k and v only, SwiGLU, a head that may be tied to the embedding.
Parameter names are those of the Hugging Face checkpoints without their leading "model.".

Axes: T packed tokens, D width, H query heads, K key/value heads, E head size, V vocabulary rows.
"""

import contextlib
import functools
import inspect
import itertools
import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

INDEX = "model.safetensors.index.json"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Qwen2.5 model, under the names of its config.json. `head_dim` is E, in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}, but must be a positive integer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")

    @classmethod
    def from_hf(cls, path):
        """Read `config.json` of a local folder or hub name. ValueError where it is not a plain Qwen2."""
        file = resolve(path) / "config.json"
        raw = read_json(file)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        wanted = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False, "rope": "default"}
        found = {**wanted, "model_type": None, **raw}
        found["rope"] = rope.get("rope_type", rope.get("type", "default"))
        for key, value in wanted.items():
            if found[key] != value:
                raise ValueError(f"{file}: {key} is {found[key]!r}, but this module is Qwen2 with {value!r}")
        values = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None}
        # Old files have it on the top level; where none is given, transformers takes 10,000.
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 1e4))
        try:
            if "head_dim" not in values:
                values["head_dim"] = raw.get("hidden_size", 0) // raw.get("num_attention_heads", 1)
            return cls(**values)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            reason = str(error).split("__init__() ")[-1]
            raise ValueError(f"{file}: {reason}; is this a Qwen2.5 config?") from None

    def to_hf(self):
        """The dictionary that `transformers` and vLLM read as config.json."""
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
                "use_sliding_window": False, "attention_dropout": 0.0, **asdict(self)}


def rope_tables(positions_T, head_dim, theta):
    """cos and sin of position · theta^(-2i/E) for i < E/2: two fp32 [T, 1, E/2] (arXiv 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    # A product with the reciprocal, as the weights were trained: far out, a quotient rounds to another angle.
    angle = positions_T[:, None, None].float() * (1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def rotate(x_THE, cos, sin):
    """Rotate element i of each head together with element i + E/2, the pairing of the published weights."""
    a, b = x_THE.chunk(2, -1)
    cos, sin = cos.to(x_THE.dtype), sin.to(x_THE.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = E
        self.q_proj = nn.Linear(D, H * E, bias=True)
        self.k_proj = nn.Linear(D, K * E, bias=True)
        self.v_proj = nn.Linear(D, K * E, bias=True)
        self.o_proj = nn.Linear(H * E, D, bias=False)

    def forward(self, x_TD, cos, sin, layer, attend):
        E = self.head_dim
        q_THE = rotate(self.q_proj(x_TD).unflatten(1, (-1, E)), cos, sin)
        k_TKE = rotate(self.k_proj(x_TD).unflatten(1, (-1, E)), cos, sin)
        v_TKE = self.v_proj(x_TD).unflatten(1, (-1, E))
        return self.o_proj(attend(layer, q_THE, k_TKE, v_TKE).flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD):
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD, cos, sin, layer, attend):
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos, sin, layer, attend)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Qwen2(nn.Module):
    """Qwen2.5 as one module; `Qwen2(config).init_weights(seed)` is random, `load_hf` trained.

    checkpoint_blocks: keep only the input of each block for backward and compute the block once more there.
    """

    checkpoint_blocks = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_T, positions_T, attend, head=None):
        """Hidden states [T, D] of the packed tokens after the final norm, or what `head` makes of them.

        tokens_T: int64 ids; positions_T: int64 position of each token in its own sequence;
        attend(layer, q_THE, k_TKE, v_TKE) -> o_THE: decides what each token sees (layer counts from 0);
        head(hidden_TD): where parameters are sharded, `head_weight()` is whole only in here.
        """
        x_TD = self.embed_tokens(tokens_T)
        cos, sin = rope_tables(positions_T, self.config.head_dim, self.config.rope_theta)
        for layer, block in enumerate(self.layers):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x_TD = block(x_TD, cos, sin, layer, attend)
        hidden_TD = self.norm(x_TD)
        return head(hidden_TD) if head else hidden_TD

    def head_weight(self):
        """weight_VD with logits = hidden_LD @ weight_VD.T: the embedding itself where they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, seed):
        """Matrices from N(0, initializer_range²), biases 0, norms 1; a function of `seed`, and of whether
        there is a GPU: it draws the billions of a 7B in a second, a CPU in a minute. -> self"""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            own, rows = own_rows(parameter)
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator, device=device)
                own.copy_(noise[rows] * self.config.initializer_range)
            else:
                own.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


def sdpa(q_THE, k_SKE, v_SKE, mask_TS=None):
    """Attention of T queries over S keys, grouped heads. mask_TS: True is visible; None: causal, T = S."""
    share = q_THE.shape[1] // k_SKE.shape[1]
    k_SHE, v_SHE = k_SKE.repeat_interleave(share, 1), v_SKE.repeat_interleave(share, 1)
    q_1HTE, k_1HSE, v_1HSE = (x.transpose(0, 1)[None] for x in (q_THE, k_SHE, v_SHE))
    o_1HTE = F.scaled_dot_product_attention(q_1HTE, k_1HSE, v_1HSE, mask_TS, is_causal=mask_TS is None)
    return o_1HTE[0].transpose(0, 1)


def packed_attention(cu_seqlens):
    """attend: causal within each sequence of a pack. cu_seqlens: the boundaries 0, …, T of its sequences."""
    bounds = [int(bound) for bound in cu_seqlens]
    return shared_prefix_attention([(end - start, []) for start, end in itertools.pairwise(bounds)])


def shared_prefix_attention(groups):
    """attend: each group is a tree, its prompt once and then its replies (Prefix Grouper, arXiv 2506.05433).

    groups: for each group (prompt length, [reply lengths]), in the order of the pack. A prompt is causal
    within itself; a reply sees the whole prompt and, causally, itself, but no other reply. Equal to
    `packed_attention` on prompt + reply for every reply, with the prompt computed once. What stands here is
    the definition; in bf16 or fp16 on a GPU `flash_attention` takes its place.
    """
    lengths = [length for prompt, replies in groups for length in (prompt, *replies)]
    total = sum(lengths)
    attend_flash = flash_attention(groups)

    def attend(layer, q_THE, k_TKE, v_TKE):
        assert len(q_THE) == total, f"{len(q_THE)} tokens in a pack of {total}"
        if q_THE.is_cuda and q_THE.dtype in (torch.bfloat16, torch.float16) and total:
            return attend_flash(layer, q_THE, k_TKE, v_TKE)
        parts = zip(q_THE.split(lengths), k_TKE.split(lengths), v_TKE.split(lengths), strict=True)
        out = []
        for P, replies in groups:
            q_prompt, k_prompt, v_prompt = next(parts)
            out.append(sdpa(q_prompt, k_prompt, v_prompt))
            for R in replies:
                q, k, v = next(parts)
                mask_RS = torch.ones(R, P + R, dtype=torch.bool, device=q.device).tril(P)
                out.append(sdpa(q, torch.cat((k_prompt, k)), torch.cat((v_prompt, v)), mask_RS))
        # A pack of nothing has a graph too, down to every weight: ranks reduce the same gradients.
        return torch.cat(out) if out else q_THE + k_TKE.sum() + v_TKE.sum()

    return attend


def flash_attention(groups):
    """attend: `shared_prefix_attention` as two calls of FlashAttention over sequences of many lengths.

    The first takes the prompts, each over itself; the second takes each reply over [its prompt; itself], so a
    prompt's keys are gathered once for every reply. Two calls and not one, because a call launches as many
    blocks for each sequence as its longest one needs.
    """
    @functools.cache  # once for all layers
    def calls(device):
        """[(queries, keys)] of the calls, and the place in their outputs of each of the T tokens."""
        prompts, replies, keys, end = [], [], [], 0
        for P, lengths in groups:
            prompts.append(torch.arange(end, end + P))
            end += P
            for R in lengths:
                replies.append(torch.arange(end, end + R))
                keys.append(torch.cat((prompts[-1], replies[-1])))
                end += R
        pairs = [(prompts, prompts), (replies, keys)] if replies else [(prompts, prompts)]
        place_T = torch.cat(prompts + replies).argsort().to(device)
        return [(Runs.of(queries, device), Runs.of(keys, device)) for queries, keys in pairs], place_T

    def attend(layer, q_THE, k_TKE, v_TKE):
        pairs, place_T = calls(q_THE.device)
        return torch.cat([varlen_causal(q_THE, k_TKE, v_TKE, *pair) for pair in pairs])[place_T]

    return attend


class Runs(NamedTuple):
    """Sequences of tokens of a pack: the index of each token, int32 boundaries, tokens of the longest."""

    index: torch.Tensor
    bounds: torch.Tensor
    longest: int

    @classmethod
    def of(cls, parts, device):
        lengths = [len(part) for part in parts]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(torch.cat(parts).to(device), bounds, max(lengths))


def varlen_causal(q_THE, k_TKE, v_TKE, queries, keys):
    """FlashAttention of each run of queries over its run of keys, where the last query sees the last key."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import
    # Plain indexing: its gradient adds up the copies of a prompt in a fixed order.
    q, k, v = q_THE[queries.index], k_TKE[keys.index], v_TKE[keys.index]
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        share, grouped = q.shape[1] // k.shape[1], {}
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    # The window, any key before and none after, is counted from the last query and the last key.
    return varlen_attn(q, k, v, queries.bounds, keys.bounds, queries.longest, keys.longest,
                       window_size=(-1, 0), **grouped)


@contextlib.contextmanager
def unsharded(model):
    """A plain model on the whole weights, for a phase in which no rank waits for another."""
    if not dist.is_initialized():
        yield model
        return
    groups = (*model.layers, model)
    try:
        for module in groups:
            module.unshard()
        with torch.device("meta"):
            plain = Qwen2(model.config)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        plain.load_state_dict(weights, assign=True)
        yield plain
    finally:
        for module in groups:
            module.reshard()


# Hugging Face folders.


def resolve(path, patterns=("*.json", "*.safetensors", "*.txt", "*.jinja")):
    """The local folder of a model: `path` itself where it is one, else such files of the hub's snapshot."""
    if os.path.isdir(path):
        return Path(path)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: no local folder, and the hub gave no such model ({reason})") from None


def read_json(file):
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable JSON file ({error}); is the folder complete?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def hf_name(name):
    """The name of a parameter in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head.") else "model." + name


def open_weights(folder):
    """{name: slice} of a checkpoint: of its model.safetensors, or of every shard that its index names."""
    files = ["model.safetensors"]
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else [None]
        for file in files:
            if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
                raise ValueError(f"{folder / INDEX}: weight_map names {file!r}, not a file of this folder; "
                                 "refused")
    return {name: part for file in sorted(set(files)) for name, part in open_tensors(folder / file).items()}


def open_tensors(file):
    """{name: slice} of a safetensors file: `slice[rows]` reads only these."""
    try:
        opened = safe_open(file, framework="pt")
        return {name: opened.get_slice(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: no readable tensors ({error}); is it all there?") from None


def own_rows(tensor):
    """(this rank's rows of a tensor, as which they count in the whole one); all where it is not sharded."""
    if not hasattr(tensor, "to_local"):
        return tensor, ...
    size = -(-len(tensor) // tensor.device_mesh.size())
    first = min(len(tensor), size * tensor.device_mesh.get_local_rank())
    return tensor.to_local(), slice(first, min(len(tensor), first + size))


@torch.no_grad()
def load_hf(path, device="cpu", dtype=torch.float32, shard=None, seed=None):
    """The model in a Hugging Face folder or under a hub name, its tensors cast to `dtype` on `device`.

    shard(model): divides the parameters over the ranks before any has memory; each rank then reads its rows.
    seed: read config.json only, and draw the weights. ValueError, naming the folder and the tensor, where one
    is missing, unknown or of another shape. A tied model's copy of its head is accepted where it equals the
    embedding.
    """
    folder = resolve(path)
    with torch.device("meta"):
        model = Qwen2(ModelConfig.from_hf(folder)).to(dtype)
    if seed is not None:
        if shard:
            shard(model)
        return model.to_empty(device=device).init_weights(seed)
    slices = open_weights(folder)
    copy = slices.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    parameters = {hf_name(name): parameter for name, parameter in model.named_parameters()}
    for name, parameter in parameters.items():
        if name not in slices:
            raise ValueError(f"{folder}: no tensor {name!r}, which its config.json asks for")
        if slices[name].get_shape() != list(parameter.shape):
            raise ValueError(f"{folder}: {name!r} has shape {slices[name].get_shape()}, but config.json "
                             f"asks for {list(parameter.shape)}")
    if unknown := slices.keys() - parameters.keys():
        raise ValueError(f"{folder}: holds {min(unknown)!r}, which the model of its config.json has not")
    if shard:
        shard(model)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        own, rows = own_rows(parameter)
        own.copy_(slices[hf_name(name)][rows])
    _, rows = own_rows(model.embed_tokens.weight)
    if copy is not None and not torch.equal(copy[rows], slices["model.embed_tokens.weight"][rows]):
        raise ValueError(f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs")
    return model


def save_hf(model, path, max_shard_bytes=5_000_000_000):
    """Write config.json and safetensors, in the parameters' own dtype, for `transformers`, vLLM, `load_hf`.

    More than `max_shard_bytes` of weights become numbered shards with an index. All files are written aside
    and then renamed, the config last; other weights that the folder held are removed. Of a sharded model
    every rank must call this: parameters are gathered one at a time, and the first rank writes.
    """
    tensors = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    folder = Path(path)
    if dist.is_initialized() and dist.get_rank() > 0:
        write_tensors(folder, tensors)
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weights, texts = {"model.safetensors": shards[0]}, {}
    if len(shards) > 1:
        weights = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": x for i, x in enumerate(shards, 1)}
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in weights.items() for name in shard}
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    texts["config.json"] = {**model.config.to_hf(), "torch_dtype": dtype}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished_") as aside:
        for file, shard in weights.items():
            write_tensors(Path(aside, file), shard)
        for file, value in texts.items():
            Path(aside, file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for old in folder.glob("model*.safetensors*"):
            if old.name not in weights | texts:
                old.unlink()
        for file in weights | texts:
            os.replace(Path(aside, file), folder / file)


def write_tensors(file, tensors):
    """Write {name: tensor} as safetensors, a tensor at a time; a sharded one is gathered for it by all ranks,
    which all must call this: the first one writes.

    The format: the length of a JSON header in 8 bytes, the header, the numbers of each tensor in its order.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    with open(file if is_first else os.devnull, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            gather = getattr(tensor, "full_tensor", tensor.detach)
            # No name keeps a whole tensor while the next one is gathered.
            out.write(gather().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
