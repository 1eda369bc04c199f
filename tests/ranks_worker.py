"""The work of test_runtime_sharding.py on 1, 2 and 3 ranks: a short run, then its parts on a toy model.

`work` asserts what each rank can see by itself, and returns what must not depend on the number of ranks.
"""

import contextlib
import faulthandler
import functools
import math
import weakref

import short_run
import torch
import torch.distributed as dist

import train
from configs.schema import load_config
from model import Transformer, load_hf, save_hf
from runtime import ranks as ranks_module
from runtime import tensors
from runtime.sharding import own_rows, unsharded
from sample import generate

PROMPTS = [[3, 1, 4], [3, 1, 4], [1, 5, 9, 2, 6], [5], [9, 2], [6, 5, 3, 5, 8], [9, 7], [9, 3, 2, 3, 8, 4, 6]]
# The second group has no spread; of the last four only the fifth has some.
ADVANTAGES = [[1.5, -0.5, -1.0], [0.0, 0.0, 0.0], [-0.7, 0.2, 0.5], [0.4, 0.6, -1.0],
              [0.3, -0.3, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
VOCAB, STOPS, TEMPERATURE = 32, {29, 30, 31}, 0.7
LOSS = {"temperature": TEMPERATURE, "vocab_size": VOCAB, "clip_low": 0.2, "clip_high": 0.28,
        "autocast": contextlib.nullcontext()}


def run_arguments(folder, out):
    """Two steps of eight prompts with two replies, two updates each; two held-out examples."""
    return short_run.arguments(folder, out, "--train.steps=2", "--train.prompts_per_step=8", "--rollout.n=2",
                               "--train.lr=2e-4", "--eval.every=2", "--grpo.kl_coef=0.001",
                               "--train.timeout_minutes=3")


def model_of(folder):
    return train.load_model(folder, "cpu", bf16=False).double()


def whole(tensors):
    """{name: whole tensor} of tensors that may be sharded."""
    return {name: getattr(tensor, "full_tensor", tensor.clone)().clone() for name, tensor in tensors.items()}


def change_by(update, model):
    """(metrics, {name: change of the weight}) of an update with plain SGD, which shows the gradient."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    metrics = update(model, torch.optim.SGD(model.parameters(), 1.0))
    changes = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    return metrics, whole(changes)


def check_files(folder, copy):
    """A sharded load reads this rank's rows only; a save holds one full tensor at a time."""
    read, alive = [], []
    open_tensors, share = tensors.open_tensors, 0

    class Slice:
        def __init__(self, slice):
            self.slice, self.get_shape = slice, slice.get_shape

        def __getitem__(self, rows):
            read.append(self.slice[rows])
            return read[-1]

    def note_reads(file):
        return {name: Slice(part) for name, part in open_tensors(file).items()}

    tensors.open_tensors = note_reads
    model = train.load_model(folder, "cpu", bf16=False)
    tensors.open_tensors = open_tensors
    plain = load_hf(folder).state_dict()
    for name, parameter in model.named_parameters():
        own, rows = own_rows(parameter)
        assert torch.equal(own, plain[name][rows]), name
        share += own.nbytes
    assert sum(tensor.nbytes for tensor in read) == share
    drawn = whole(train.load_model(folder, "cpu", bf16=False, seed=3).state_dict())
    for name, weight in Transformer(model.config).init_weights(3).state_dict().items():
        assert torch.equal(drawn[name], weight), name
    if dist.is_initialized():
        from torch.distributed.tensor import DTensor
        full_tensor = DTensor.full_tensor

        def note_whole(tensor):
            assert not [name for name, x in alive if x() is not None], "another tensor is still whole"
            result = full_tensor(tensor)
            alive.append((tensor.shape, weakref.ref(result)))
            return result

        DTensor.full_tensor = note_whole
        save_hf(model, copy, max_shard_bytes=4000)
        DTensor.full_tensor = full_tensor
    else:
        save_hf(model, copy, max_shard_bytes=4000)
    optimizer = train.make_optimizer(model, 0.01, 0.95)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [tensor for parameter in model.parameters()
            for tensor in (parameter, parameter.grad, *optimizer.state[parameter].values())]
    total = sum(tensor.nbytes for tensor in plain.values())
    return {"parameters": share / total, "all": sum(own_rows(x)[0].nbytes for x in held if x.dim()) / total}


def check_rollouts(folder):
    """Ids of replies. A rollout has no collectives: at first only rank 0 samples."""
    model = train.load_model(folder, "cpu", bf16=False)
    sample = functools.partial(generate, n=3, temperature=TEMPERATURE, stop_ids=STOPS, vocab_size=VOCAB)
    with unsharded(model) as policy:
        if ranks_module.rank_variable("RANK", 0) == 0:
            sample(policy, PROMPTS, max_new_tokens=50, seeds_P=range(len(PROMPTS)))
        own_P = ranks_module.my_share(range(len(PROMPTS)))
        rollouts = sample(policy, [PROMPTS[p] for p in own_P], max_new_tokens=40, seeds_P=list(own_P))
    own_N = [3 * p + i for p in own_P for i in range(3)]
    return [rollout.ids for rollout in ranks_module.gather_in_order(own_N, rollouts)]


def check_updates(folder, rollouts_N, every_kind=True):
    """{kind: (metrics, change of the weights)} of all kinds of updates, or else those of one kind."""
    adv_PG, found = torch.tensor(ADVANTAGES, dtype=torch.float64), {}

    def grpo(model, optimizer, adv_PG=adv_PG, reference=None, updates=1, tokens=1000, **loss):
        return train.grpo_updates(model, reference, optimizer, rollouts_N, adv_PG, updates=updates,
                                  kl_coef=0.1 if reference else 0.0, grad_clip=1e9, micro_batch_tokens=tokens,
                                  **LOSS | loss)

    def checkpointed(model, optimizer):
        model.checkpoint_blocks = True
        return grpo(model, optimizer, tokens=60)

    def clipped(model, optimizer):
        return train.grpo_updates(model, None, optimizer, rollouts_N, adv_PG, updates=1, kl_coef=0.0,
                                  grad_clip=0.01, micro_batch_tokens=1000, **LOSS)

    def sft(model, optimizer):
        return train.sft_updates(model, optimizer, PROMPTS, [rollout.ids for rollout in rollouts_N[::3]],
                                 vocab_size=VOCAB, updates=2, grad_clip=1e9, micro_batch_tokens=60,
                                 autocast=contextlib.nullcontext())

    if not every_kind:
        return change_by(functools.partial(grpo, updates=2, tokens=60), model_of(folder))
    reference = train.load_model(folder, "cpu", bf16=False, trained=False).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            own_rows(parameter)[0].mul_(1.1)
    kinds = {"one pass": grpo, "micro-batches": functools.partial(grpo, tokens=60),
             "checkpointed": checkpointed, "clipped": clipped, "sft": sft,
             "two updates": functools.partial(grpo, updates=2, tokens=60),
             "kl": functools.partial(grpo, reference=reference, updates=2, tokens=60),
             "gspo": functools.partial(grpo, updates=2, tokens=60, ratio="sequence", average="reply"),
             "cispo": functools.partial(grpo, updates=2, tokens=60, clip="cispo"),
             "dr_grpo": functools.partial(grpo, updates=2, tokens=60, average="constant", limit=40),
             "flat": functools.partial(grpo, adv_PG=torch.zeros(8, 3))}
    for name, update in kinds.items():
        found[name] = change_by(update, model_of(folder))

    # One NaN, in a group of rank 0: every rank skips that update.
    accident_PG = adv_PG.clone()
    accident_PG[0, 1] = math.nan
    found["accident"] = change_by(functools.partial(grpo, adv_PG=accident_PG, updates=2),
                                  model_of(folder))
    return found


def work(folder, ranks):
    out = folder / f"run{ranks}"
    train.train(load_config(run_arguments(folder, out)))
    found = {}
    for name in ("tied", "untied"):
        rollouts_N = torch.load(folder / name / "rollouts.pt", weights_only=False)
        share = check_files(folder / name, folder / f"{name}{ranks}")
        found[name] = {"share": ranks_module.all_gather(share),
                       "ids": check_rollouts(folder / name),
                       "updates": check_updates(folder / name, rollouts_N)}
    for name in ("llama", "qwen3"):
        rollouts_N = torch.load(folder / name / "rollouts.pt", weights_only=False)
        found[name] = {"ids": check_rollouts(folder / name),
                       "updates": check_updates(folder / name, rollouts_N, every_kind=False)}
    return found


def work_and_save(folder):
    """Write the result of `work` to folder/found<ranks>.pt. Returns when all ranks have done so."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(short_run.LIMIT_S, exit=True)  # a rank that hangs prints where
    ranks = ranks_module.rank_variable("WORLD_SIZE", 1)
    found = work(folder, ranks)
    if ranks_module.is_first_rank():
        torch.save(found, folder / f"found{ranks}.pt")
    ranks_module.all_gather(None)
