"""LoRA (arXiv 2106.09685): two small trained matrices beside each frozen linear layer.

    y = x Wᵀ + b + scale (x Aᵀ) Bᵀ      A [rank, in], B [out, rank], scale = alpha / rank; B starts at zero

In:  a model. Out: the same model with adapters in its blocks, of which only A and B are trained; its plain
weights without the adapters (the KL reference) or merged, W + scale B A (rollouts, exports); and PEFT's
folder format. Head and embedding get no adapter. Knows a model only as a module with a list `layers`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from runtime.files import write_json
from runtime.ranks import is_first_rank
from runtime.sharding import own_rows, plain_model_on
from runtime.tensors import ADAPTER, open_tensors, write_tensors

NAMES = ("lora_A", "lora_B")


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, which shares the weight and bias of `layer`: x [T, in] -> [T, out]."""

    def __init__(self, layer, rank, alpha):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        fp32 = {"dtype": torch.float32, "device": layer.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.empty(layer.out_features, rank, **fp32))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class MergedWeight:
    """W + scale B A of one layer, not computed yet: `full_tensor()` adds in fp32 and casts to W's dtype."""

    def __init__(self, layer):
        self.layer, self.dtype, self.shape, self.nbytes = (
            layer, layer.weight.dtype, layer.weight.shape, layer.weight.nbytes)

    def parts(self):
        """(W, scale B A), both whole and at least fp32."""
        W, A, B = (whole(getattr(self.layer, name)) for name in ("weight", *NAMES))
        dtype = torch.promote_types(W.dtype, torch.float32)
        return W.to(dtype), (B.to(dtype) @ A.to(dtype)) * self.layer.scale

    @torch.no_grad()
    def full_tensor(self):
        W, change = self.parts()
        return (W + change).to(self.dtype)


def whole(tensor):
    """Collective: the detached whole tensor of one that may be sharded."""
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def has_adapters(model):
    return any(isinstance(module, LoRALinear) for module in model.modules())


def add_adapters(model, rank, alpha):
    """Put an adapter of `rank` beside every linear layer of the blocks, in place, and freeze the rest. A and
    B have no values yet. ValueError for a rank that is larger than a layer."""
    model.requires_grad_(False)
    for block in model.layers:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    if rank > min(layer.weight.shape):
                        raise ValueError(f"model.lora_rank is {rank}, more than {name} of shape "
                                         f"{list(layer.weight.shape)} has; lower it")
                    setattr(parent, name, LoRALinear(layer, rank, alpha))


@torch.no_grad()
def fill_adapters(model, seed, checkpoint=None):
    """Give A and B their values, if there are any: those that `write_adapter` put into a checkpoint, of which
    each rank reads its own rows; without one B = 0 and A uniform within ±1/√in, drawn from `seed`, as PEFT
    does. ValueError, naming the file, where a tensor is missing or of another shape."""
    generator, file = torch.Generator().manual_seed(seed), checkpoint and checkpoint / "adapter" / ADAPTER[1]
    slices = open_tensors(file) if file and has_adapters(model) else {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in NAMES:
            continue
        key, (local, rows) = peft_name(name), own_rows(parameter)
        if not file:
            A = torch.rand(parameter.shape, generator=generator) * 2 - 1
            local.copy_(A[rows] / parameter.shape[1] ** 0.5 if name.endswith("lora_A") else torch.tensor(0.0))
        elif key in slices and slices[key].get_shape() == list(parameter.shape):
            local.copy_(slices[key][rows])
        else:
            raise ValueError(f"{file}: no tensor {key!r} of shape {list(parameter.shape)}")


def plain_weights(model, merged=True):
    """{name: weight} of the model without its adapters, sharded ones as they are: merged, the adapted layers
    as a MergedWeight, which has the dtype, shape, nbytes and full_tensor() of a sharded tensor."""
    weights = {name: weight for name, weight in model.state_dict().items()
               if name.rpartition(".")[2] not in NAMES}
    for name, layer in model.named_modules() if merged else ():
        if isinstance(layer, LoRALinear):
            weights[f"{name}.weight"] = MergedWeight(layer)
    return weights


@torch.no_grad()
def plain_model(model, merged=True):
    """Collective: a model without adapters on whole weights. Weights that are neither merged nor gathered are
    those of `model`; merged ones are new tensors, and the base is never written."""
    weights = {name: whole(weight) for name, weight in plain_weights(model, merged).items()}
    return plain_model_on(model, weights).requires_grad_(False)


@torch.no_grad()
def share_lost(model):
    """Collective: the share of the adapters' change that the cast to the weights' dtype loses in merging, as
    the norm of what is lost over the norm of the change; 0.0 where there is no change."""
    lost = total = 0.0
    for weight in plain_weights(model).values():
        if isinstance(weight, MergedWeight):
            W, change = weight.parts()
            lost += ((W + change).to(weight.dtype).to(W.dtype) - W - change).square().sum().double()
            total += change.square().sum().double()
    return float(lost / total) ** 0.5 if total else 0.0


def metrics(model):
    """Collective: {"lora/lost": share_lost} of a model with adapters, else {}."""
    return {"lora/lost": share_lost(model)} if has_adapters(model) else {}


# ---- PEFT's format: adapter_config.json and adapter_model.safetensors
def peft_name(name):
    """The name that PEFT gives to an adapter's parameter of a block."""
    return f"base_model.model.model.{name}.weight"


def write_adapter(checkpoint, model, base):
    """Collective: write `adapter/` into a checkpoint: A and B in fp32, PEFT's config with the base's name."""
    tensors = {peft_name(name): parameter for name, parameter in model.named_parameters()
               if name.rpartition(".")[2] in NAMES}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    rank = len(next(iter(layers.values())).lora_A)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
              "lora_alpha": next(iter(layers.values())).scale * rank, "lora_dropout": 0.0, "bias": "none",
              "target_modules": sorted({name.rpartition(".")[2] for name in layers}), "inference_mode": True}
    folder = checkpoint / "adapter"
    if is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ADAPTER[0], config)
    write_tensors(folder / ADAPTER[1], tensors)

