"""Qwen2.5, Llama 3 and Qwen3: configuration, forward pass, Hugging Face weights in and out.

In:  packed tokens of any number of sequences, one after the other, never padded. Out: the hidden state of
every token after the final norm; the caller multiplies the rows it needs by `head_weight()`. Parameters may
be sharded over ranks by rows (runtime/sharding.py); folders are then read and written one tensor at a time.

    x   = embed(token)
    x  += o_proj(attend(rope(q_proj(norm x)), rope(k_proj(norm x)), v_proj(norm x)))        for every layer
    x  += down_proj(silu(gate_proj(norm x)) * up_proj(norm x))
    out = norm(x)

The model does not decide which token sees which: `forward` takes a function `attend(layer, q_THE, k_TKE,
v_TKE) -> o_THE`. Packing, the shared prefix of a group and the key/value cache of the sampler are three such
functions. All families have RMSNorm, rotary positions, grouped-query attention, SwiGLU, and a head that may
be tied to the embedding. They differ in three places:

    qwen2   (arXiv 2407.10671)  q, k and v have a bias
    llama   (arXiv 2407.21783)  a bias on q, k, v and o where `attention_bias` says so; rotary angles may be
                                scaled to longer contexts
    qwen3   (arXiv 2505.09388)  the same bias; RMSNorm on each head of q and k, before the rotation

Parameters have the names of the Hugging Face checkpoints, without the leading "model.".

Axes: T packed tokens, D width, H query heads, K key/value heads, E head size, V vocabulary rows, S keys.
"""

import functools
import itertools
import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime.adapters import plain_weights
from runtime.files import read_json
from runtime.kernel import choose_kernel
from runtime.sharding import own_rows
from runtime.tensors import open_weights, resolve, write_weights

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Keys of a config.json with the only value that this module computes; a missing key has this value.
SUPPORTED = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "rope": "default",
             "quantization_config": None}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling "llama3": wavelengths of more than original_max_position_embeddings / low_freq_factor
    tokens grow by `factor`, those below original_max_position_embeddings / high_freq_factor do not."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model, under the names of its config.json. ValueError where a size is not a positive
    integer, or where the query heads cannot be shared out evenly over the key/value heads."""

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
    model_type: str = "qwen2"
    attention_bias: bool = False
    rope_scaling: RopeScaling | None = None

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
        """Read `config.json` of a local folder or hub name, as transformers 4 or 5 wrote it. ValueError,
        naming the file and the key, where it describes what this module does not compute."""
        file = resolve(path) / "config.json"
        raw = read_json(file)
        if raw.get("model_type") not in ARCHITECTURES:
            raise ValueError(f"{file}: model_type is {raw.get('model_type')!r}, but this module computes "
                             f"{', '.join(ARCHITECTURES)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        found = {**SUPPORTED, **raw, "rope": rope.get("rope_type", rope.get("type", "default"))}
        is_scaled = found["rope"] == "llama3" and raw["model_type"] == "llama"
        for key, value in SUPPORTED.items():
            if found[key] != value and not (key == "rope" and is_scaled):
                raise ValueError(f"{file}: {key} is {found[key]!r}, but this module computes only {value!r}")
        if odd := set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"{file}: layer_types has {min(odd)!r}, but this module computes only "
                             "'full_attention'")
        values = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None}
        if raw["model_type"] == "qwen2":
            values.pop("attention_bias", None)  # transformers does not read it there
        # Older files have it at the top level; transformers takes 10,000 where it is missing.
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 1e4))
        try:
            scaling = {key: rope[key] for key in RopeScaling.__annotations__} if is_scaled else None
            values["rope_scaling"] = scaling and RopeScaling(**scaling)
            if "head_dim" not in values:  # as transformers fills it in
                share = raw.get("hidden_size", 0) // raw.get("num_attention_heads", 1)
                values["head_dim"] = 128 if raw["model_type"] == "qwen3" else share
            return cls(**values)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = str(error).split("__init__() ")[-1]
            raise ValueError(f"{file}: {reason}; is this a config of {raw['model_type']}?") from None

    def to_hf(self):
        """The dictionary that `transformers` and vLLM read as config.json."""
        values = {"architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu",
                  "attention_dropout": 0.0, **asdict(self)}
        if self.model_type != "llama":
            values["use_sliding_window"] = False
        if self.rope_scaling:
            values["rope_scaling"]["rope_type"] = "llama3"
        return values


def rope_tables(positions_T, config, dtype=torch.float32):
    """(cos, cos) and (-sin, sin) of the angles position · frequency of each pair i < E/2 of a head: two
    [T, 1, E] of `dtype`. frequency = theta^(-2i/E) (arXiv 2104.09864), or scaled as in Llama 3.1."""
    E, scaling = config.head_dim, config.rope_scaling
    exponent = torch.arange(0, E, 2, device=positions_T.device, dtype=torch.float32) / E
    # A product with the reciprocal, as in training: at large positions a quotient rounds to another angle.
    frequency = 1.0 / config.rope_theta**exponent
    if scaling:
        # The share of the unscaled frequency, by the number of turns within the original context.
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        frequency = torch.lerp(frequency / scaling.factor, frequency, share.clamp(0, 1))
    angle = positions_T[:, None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x_THE, cos, sin):
    """Rotate elements i and i + E/2 of each head, the pairs of published weights, by the token's angle."""
    cos, sin = cos.to(x_THE.dtype), sin.to(x_THE.dtype)  # under autocast the products have another dtype
    return torch.addcmul(x_THE * cos, x_THE.roll(x_THE.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: x_TD -> [T, D]. `attend` decides what a token sees."""

    def __init__(self, config):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        has_bias, self.head_dim = config.model_type == "qwen2" or config.attention_bias, E
        self.q_proj = nn.Linear(D, H * E, has_bias)
        self.k_proj = nn.Linear(D, K * E, has_bias)
        self.v_proj = nn.Linear(D, K * E, has_bias)
        self.o_proj = nn.Linear(H * E, D, config.attention_bias)
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = nn.RMSNorm(E, config.rms_norm_eps), nn.RMSNorm(E, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x_TD, cos, sin, layer, attend):
        q_THE = self.q_norm(self.q_proj(x_TD).unflatten(1, (-1, self.head_dim)))
        k_TKE = self.k_norm(self.k_proj(x_TD).unflatten(1, (-1, self.head_dim)))
        v_TKE = self.v_proj(x_TD).unflatten(1, (-1, self.head_dim))
        o_THE = attend(layer, rotate(q_THE, cos, sin), rotate(k_TKE, cos, sin), v_TKE)
        return self.o_proj(o_THE.flatten(1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): x_TD -> [T, D]."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD):
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    """One layer: attention and MLP, each of the normed x_TD and each added to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD, cos, sin, layer, attend):
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos, sin, layer, attend)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Transformer(nn.Module):
    """The model. `Transformer(config).init_weights(seed)` has random weights, `load_hf(path)` a folder's.

    checkpoint_blocks: keep only the input of each block for backward, which computes the block again.
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
        """Hidden states [T, D] of the packed tokens after the final norm, or the result of `head` on them.

        tokens_T: int64 ids; positions_T: int64 position of each token in its own sequence;
        attend(layer, q_THE, k_TKE, v_TKE) -> o_THE: decides what each token sees (layer counts from 0);
        head(hidden_TD): called inside forward, where alone `head_weight()` of a sharded model is gathered.
        """
        x_TD = self.embed_tokens(tokens_T)
        cos, sin = rope_tables(positions_T, self.config, x_TD.dtype)
        for layer, block in enumerate(self.layers):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x_TD = block(x_TD, cos, sin, layer, attend)
        hidden_TD = self.norm(x_TD)
        return head(hidden_TD) if head else hidden_TD

    def head_weight(self):
        """weight_VD, with which logits = hidden @ weight_VD.T: the embedding itself where they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw matrices from N(0, initializer_range²), set biases to 0 and norms to 1; return self. They
        depend only on `seed` and whether there is a GPU, which draws a 7B in a second, a CPU in a minute."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            local, rows = own_rows(parameter)
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator, device=device)
                local.copy_(noise[rows] * self.config.initializer_range)
            else:
                local.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


Qwen2 = Transformer  # an older name


def sdpa(q_THE, k_SKE, v_SKE, mask_TS=None):
    """Attention of T queries over S keys, each key head shared by Q = H / K query heads: float [T, K, Q, E].

    mask_TS: is added to the scores, 0 where query t sees key s, else -inf; None: causal, with T = S."""
    # The Q query heads are a batch with the same keys, of which nothing is copied.
    q_QKTE = q_THE.unflatten(1, (k_SKE.shape[1], -1)).permute(2, 1, 0, 3)
    k_QKSE, v_QKSE = (x.transpose(0, 1).expand(len(q_QKTE), -1, -1, -1) for x in (k_SKE, v_SKE))
    o_QKTE = F.scaled_dot_product_attention(q_QKTE, k_QKSE, v_QKSE, mask_TS, is_causal=mask_TS is None)
    return o_QKTE.permute(2, 1, 0, 3)


def packed_attention(cu_seqlens, kernel="auto"):
    """attend: causal within each sequence of a pack. cu_seqlens: the boundaries 0, …, T; kernel: as below."""
    groups = [(int(end - start), []) for start, end in itertools.pairwise(cu_seqlens)]
    return shared_prefix_attention(groups, kernel)


def shared_prefix_attention(groups, kernel="auto"):
    """attend: each group is a tree, its prompt once and then its replies (Prefix Grouper, arXiv 2506.05433).

    groups: for each group (prompt length, [reply lengths]) in tokens, in the order of the pack. A prompt is
    causal within itself; a reply sees the whole prompt and, causally, itself, but no other reply. The result
    equals `packed_attention` on prompt + reply for every reply, with the prompt computed once.
    kernel: "reference", the definition below; "fast", FlashAttention; "auto", FlashAttention for bf16 and
    fp16 on a GPU, else the definition. attend raises ValueError where "fast" cannot run."""
    lengths = [length for prompt, replies in groups for length in (prompt, *replies)]
    total = sum(lengths)

    @functools.cache  # the twin prepares its indices once for all layers
    def flash_attention():
        from fast import flash_prefix
        return flash_prefix.shared_prefix_attention(groups)

    @functools.cache  # all layers share it, and so do replies of one length
    def mask_of(prompt, reply, dtype, device):
        return torch.full((reply, prompt + reply), -math.inf, dtype=dtype, device=device).triu(prompt + 1)

    def attend(layer, q_THE, k_TKE, v_TKE):
        assert len(q_THE) == total, f"{len(q_THE)} tokens in a pack of {total}"
        if total and flash_attention_runs(kernel, q_THE):
            return flash_attention()(layer, q_THE, k_TKE, v_TKE)
        if q_THE.dtype == torch.bfloat16 and q_THE.device.type == "cpu":  # whose SDPA in bf16 is slow
            with torch.autocast("cpu", enabled=False):
                return attend(layer, q_THE.float(), k_TKE.float(), v_TKE.float()).to(q_THE.dtype)
        parts = zip(q_THE.split(lengths), k_TKE.split(lengths), v_TKE.split(lengths), strict=True)
        out = []
        for prompt_length, reply_lengths in groups:
            q_prompt, k_prompt, v_prompt = next(parts)
            out.append(sdpa(q_prompt, k_prompt, v_prompt))
            for reply_length in reply_lengths:
                q, k, v = next(parts)
                mask_TS = mask_of(prompt_length, reply_length, q.dtype, q.device)
                out.append(sdpa(q, torch.cat((k_prompt, k)), torch.cat((v_prompt, v)), mask_TS))
        # An empty pack has a graph too, down to every weight: all ranks must reduce the same gradients.
        return torch.cat(out).flatten(1, 2) if out else q_THE + k_TKE.sum() + v_TKE.sum()

    return attend


def flash_attention_runs(kernel, q_THE):
    """Whether FlashAttention, which exists on GPUs and for 16 bits only, computes attention for q_THE."""
    is_16_bit = q_THE.dtype in (torch.bfloat16, torch.float16)
    if kernel == "auto" and not is_16_bit or choose_kernel(kernel, q_THE.device.type, "attention") != "gpu":
        return False
    if not is_16_bit:
        raise ValueError(f"kernel {kernel!r}: FlashAttention computes in bf16 and fp16, not in "
                         f"{str(q_THE.dtype).removeprefix('torch.')}; use 'auto' or 'reference'")
    return True


# ---- Hugging Face folders
def hf_name(name):
    """The name that a parameter has in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head.") else "model." + name


@torch.no_grad()
def load_hf(path, device="cpu", dtype=torch.float32, shard=None, seed=None):
    """The model of a Hugging Face folder or hub name, its tensors cast to `dtype` on `device`.

    shard(model): shards the parameters over the ranks before they have memory, and may add some, which get no
    values; each rank then reads its rows. seed: read config.json only and draw the weights.
    ValueError, naming the folder and the tensor, where one is missing, unknown or of another shape. The head
    that some tied checkpoints repeat must equal the embedding; saved rotary frequencies are ignored.
    """
    folder = resolve(path)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_hf(folder)).to(dtype)
    if seed is not None:
        if shard:
            shard(model)
        return model.to_empty(device=device).init_weights(seed)
    slices = {name: part for name, part in open_weights(folder).items()
              if not name.endswith("rotary_emb.inv_freq")}  # of older tools; rope_theta gives them
    head = slices.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
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
        if hf_name(name) in slices:
            local, rows = own_rows(parameter)
            local.copy_(slices[hf_name(name)][rows])
    _, rows = own_rows(model.embed_tokens.weight)
    if head is not None and not torch.equal(head[rows], slices["model.embed_tokens.weight"][rows]):
        raise ValueError(f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs")
    return model


def save_hf(model, path, max_shard_bytes=5_000_000_000):
    """Collective: write config.json and safetensors, in the dtype of the parameters, for `transformers`, vLLM
    and `load_hf`. Rank 0 writes; sharded parameters are gathered one at a time, adapters merged into them.

    More than `max_shard_bytes` of weights become numbered shards with an index; other weights in the folder
    are removed. ValueError, naming the file, where one cannot be written: the folder is then as before."""
    tensors = {hf_name(name): tensor for name, tensor in plain_weights(model).items()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {**model.config.to_hf(), "torch_dtype": dtype}
    write_weights(path, tensors, {"config.json": config}, max_shard_bytes)
