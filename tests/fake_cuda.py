"""What a GPU is asked to do, counted on a machine without one: `python tests/fake_cuda.py`.

In:  a CUDA build of torch (`pip install torch` on x86 Linux). Out: for Qwen2.5 1.5B and 7B in bf16, the
operations of each pass, those with the host, and waits. Tensors are fake: they have shapes, dtypes and the
device cuda, but no memory; PyTorch chooses operations for them as on a GPU.

    forward     a pack of two groups: checkpointed blocks, FlashAttention, log-probs of the replies
    log-probs   forward and backward, which is called by hand because autograd's engine asks for a driver
    prefill     two prompts through FlashAttention
    decode      one step of a batch: what a CUDA graph holds

The exit status is 1 where a pass fails, waits for the device or takes something from the host (forward and
prefill may, less than once a layer: they prepare indices); 2 where torch is no CUDA build.
"""

import contextlib
import functools
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast.logprobs import FusedLogprobs
from fast.paged_cache import Cache
from grpo import pack
from model import ModelConfig, Transformer
from sample import Decoder, Prompt, prefill
from train import logprobs_of_pack

# V, D, width inside the MLP, layers, H, K, E
SIZES = {"1.5B": ModelConfig(151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True),
         "7B": ModelConfig(152064, 3584, 18944, 28, 28, 4, 128)}
VOCAB_SIZE = 151665  # ids of Qwen2.5 that have a token
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Operations(TorchDispatchMode):
    """Counts what PyTorch and Triton ask of a device, and lists what the host does in between.

    operations: by name. A view and an allocation are none; a Triton launch is one, also in `launches`.
    host: operations with an operand or a result that is not on the device, and tensors of Python numbers.
    syncs: operations for whose result the host waits.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.launches = device, 0
        self.operations, self.host, self.syncs = Counter(), [], []

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        (namespace, name), tags = operation._schema.name.split("::"), operation.tags
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*tags}
        if name.startswith("index"):  # a mask as an index is a search for its True; other indices are not
            waits = any(x.dtype == torch.bool for x in tensors_in(arguments[1]))
        self.syncs += [name] * bool(waits)
        # The rule of torch 2.11 for fake tensors in this product of bf16, which adds to fp32, is broken.
        is_broken = operation is torch.ops.aten.addmm.dtype_out
        result = settings["out"] if is_broken else operation(*arguments, **settings or {})
        if namespace == "prim" or name in ALLOCATIONS:  # prim asks for a property of a tensor
            return result
        devices = {x.device.type for x in tensors_in((arguments, settings, result))}
        self.host += [name] * bool(devices - {self.device} or name == "lift_fresh")
        writes = [x.alias_info.is_write for x in operation._schema.arguments if x.alias_info]
        self.operations[name] += self.device in devices and (any(writes) or not writes)  # else a view
        return result

    @contextlib.contextmanager
    def watching(self):
        """Count here. Triton kernels are neither compiled nor run."""
        from triton.runtime.jit import KernelInterface

        def launch(kernel, *arguments, **options):
            self.operations[kernel.__name__] += 1
            self.launches += 1
            self.host += [kernel.__name__] * any(x.device.type != self.device for x in tensors_in(arguments))

        at_grid = mock.patch.object(KernelInterface, "__getitem__", lambda k, _: functools.partial(launch, k))
        with at_grid, Functions(self), self:
            yield self


class Functions(TorchFunctionMode):
    """What meta does not show: a norm is one operation of a GPU, and numbers come from the host."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), settings=None):
        if function is F.rms_norm and self.found.device == "meta":
            self.found.operations["_fused_rms_norm"] += 1
            return torch.empty_like(arguments[0])
        seen, result = len(self.found.host), function(*arguments, **settings or {})
        takes_numbers = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        is_new = takes_numbers and not isinstance(arguments[-1], torch.Tensor)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = arguments[1] if isinstance(arguments[1], tuple) else arguments[1:2]
            is_new = any(isinstance(x, list) for x in index)
        self.found.host += [function.__name__] * (is_new and len(self.found.host) == seen)
        return result


def tensors_in(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def empty_model(config, device):
    with torch.device("meta"):
        model = Transformer(config)
    weights = {name: torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
               for name, weight in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model


def decoder(model, B, draw):
    """A Decoder of B rows as `generate` makes it on a GPU: for 900 tokens of prompt and 512 of reply."""
    weight = model.head_weight()
    cache = Cache(model.config, weight.dtype, weight.device, B, [], 1411, 8, None, "gpu")
    return Decoder(model, cache, draw, weight.dtype, "gpu")


def forward(model):
    model.checkpoint_blocks = True
    tree = pack([[1] * 900] * 2, [[[2] * 1000, [2] * 1048], [[2] * 1024] * 6])
    tree = tree.to(model.embed_tokens.weight.device)
    return functools.partial(logprobs_of_pack, model, tree, 1.0, VOCAB_SIZE, contextlib.nullcontext(), "fast")


def logprobs_and_their_backward(model):
    weight_VD = model.head_weight()
    hidden_LD, targets_L = weight_VD.new_empty(8192, weight_VD.shape[1]), weight_VD.new_empty(8192).long()

    @torch.no_grad()
    def run():
        context = mock.Mock(needs_input_grad=(True, True))
        context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
        logp_L, _ = FusedLogprobs.forward(context, hidden_LD, weight_VD, targets_L, 1.0, VOCAB_SIZE)
        return FusedLogprobs.backward(context, torch.ones_like(logp_L), None)[:2]

    return run


def prefill_of_two(model):
    return lambda: torch.no_grad()(prefill)(model, [Prompt([1] * 901, 5), Prompt([1] * 701, 5)], "fast")


def decode_step(model, B):
    from fast.draw import sample_tokens
    step = decoder(model, B, functools.partial(sample_tokens, temperature=1.0, vocab_size=VOCAB_SIZE)).step
    return lambda: torch.no_grad()(step)(B)


# (name, what makes the pass of a model, whether the host may prepare its indices and tokens).
PASSES = [("forward", forward, True), ("log-probs", logprobs_and_their_backward, False),
          ("prefill", prefill_of_two, True), ("decode B 64", functools.partial(decode_step, B=64), False),
          ("decode B 256", functools.partial(decode_step, B=256), False)]


def faults(found, layers, host_prepares):
    most = layers - 1 if host_prepares else 0
    return [*(f"waits in {name}" for name in dict.fromkeys(found.syncs)),
            *(f"{n} times {name} with the host" for name, n in Counter(found.host).items() if n > most)]


def main():
    if torch.version.cuda is None:
        print(f"error: torch {torch.__version__} is no CUDA build: take torch of PyPI", file=sys.stderr)
        sys.exit(2)
    from torch._subclasses.fake_tensor import FakeTensorMode
    lines, failures = ["size pass operations Triton host syncs".split()], []
    for size, config in SIZES.items():
        for name, make, prepares in PASSES:
            found = Operations("cuda")
            try:
                with FakeTensorMode():
                    run = make(empty_model(config, "cuda"))
                    with found.watching():
                        run()
            except Exception as error:  # whatever it is, the other passes are still worth a look
                failures.append(f"{size} {name}: {type(error).__name__}: {str(error).strip()[:200]}")
            failures += [f"{size} {name}: {x}" for x in faults(found, config.num_hidden_layers, prepares)]
            numbers = found.operations.total(), found.launches, len(found.host), len(found.syncs)
            lines.append([size, name, *map(str, numbers)])
    print(f"torch {torch.__version__}, bf16, fake cuda tensors",
          *(" ".join(map(str.ljust, line, (5, 13, 11, 7, 5, 5))).rstrip() for line in lines),
          *(f"FAILED {x}" for x in failures), f"{len(lines) - 1} passes, {len(failures)} faults", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
