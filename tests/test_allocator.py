"""The presets for one GPU on a simulation of PyTorch's caching allocator: does fragmentation leave enough?

`--plan` counts tensors. A GPU runs out of memory earlier, where free memory lies inside segments that another
stream holds. Nothing is allocated here: numbers of bytes go through the allocator's rules, as they were read
in the source of PyTorch 2.11 to 2.13, in the order in which a run takes and frees memory. The sizes are those
of tools/plan.py. What was simulated has not been compared with a GPU.
"""

import bisect
import itertools
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sampling import toy_model
from test_tools_memory import ROOT
from test_tools_plan import PRESETS

import sample
from configs.schema import load_config
from fast import logprobs
from model import Transformer
from tools import memory, plan

MIB, GIB = 2**20, 2**30
CONTEXT = 0.6 * GIB  # of CUDA, NCCL and cuBLAS: no part of the allocator


@dataclass(eq=False)
class Block:
    """Bytes start … start + size - 1 of a segment, free or in use; a neighbour ends where the next starts."""

    pool: Any
    segment: int
    start: int
    size: int
    is_free: bool = True
    mapped: bool = True  # False: addresses of an expandable segment that have no memory
    before: Any = None
    after: Any = None


class OutOfMemory(Exception):
    pass


class Allocator:
    """c10/cuda/CUDACachingAllocator.cpp: best fit in the pool of a stream, split, merge with free neighbours.

    A pool belongs to one stream and to small (up to 1 MiB) or large requests. If the driver refuses because
    it has no memory left, all that is wholly free goes back to it, whatever its stream, and the request is
    tried once more. A segment that is not expandable goes back as a whole or not at all.
    """

    def __init__(self, capacity, expandable):
        self.capacity, self.expandable = int(capacity), expandable
        self.reserved = self.used = self.peak = self.refusals = 0
        self.free = defaultdict(list)  # pool -> [(size, number, block)], sorted
        self.segments = {}  # number -> first block
        self.numbers = itertools.count()

    def add(self, block):
        block.is_free = True
        if block.mapped:
            bisect.insort(self.free[block.pool], (block.size, next(self.numbers), block))

    def remove(self, block):
        blocks = self.free[block.pool]
        at = bisect.bisect_left(blocks, (block.size,))
        while blocks[at][2] is not block:
            at += 1
        del blocks[at]

    def cut(self, block, size):
        """Make a block `size` bytes long; the rest becomes a new one, which is returned."""
        rest = Block(block.pool, block.segment, block.start + size, block.size - size, True, block.mapped,
                     block, block.after)
        if block.after:
            block.after.before = rest
        block.size, block.after = size, rest
        return rest

    def merge(self, left, right):
        left.size, left.after = left.size + right.size, right.after
        if right.after:
            right.after.before = left

    def take(self, size, stream="compute"):
        size = max(512, -(-size // 512) * 512)
        pool = (stream, size <= MIB)
        block = self.best_fit(pool, size) or self.grow(pool, size)
        if block is None:
            self.refusals += 1
            self.empty_cache()
            block = self.best_fit(pool, size) or self.grow(pool, size)
        if block is None:
            raise OutOfMemory(f"{size / GIB:.2f} GiB on the stream {stream}: {self.used / GIB:.1f} used, "
                              f"{self.reserved / GIB:.1f} reserved of {self.capacity / GIB:.1f}")
        self.remove(block)
        rest = block.size - size
        if rest > MIB or rest >= 512 and (pool[1] or self.expandable):
            self.add(self.cut(block, size))
        block.is_free = False
        self.used += block.size
        return block

    def best_fit(self, pool, size):
        at = bisect.bisect_left(self.free[pool], (size,))
        return self.free[pool][at][2] if at < len(self.free[pool]) else None

    def reserve(self, size):
        """Whether the driver has so much memory left; then it is taken."""
        fits = self.reserved + size <= self.capacity
        self.reserved += size if fits else 0
        self.peak = max(self.peak, self.reserved)
        return fits

    def grow(self, pool, size):
        """A free block from the driver, or None."""
        if self.expandable:
            return self.grow_expandable(pool, size)
        size = 2 * MIB if pool[1] else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if not self.reserve(size):
            return None
        block = Block(pool, next(self.numbers), 0, size)
        self.segments[block.segment] = block
        self.add(block)
        return block

    def grow_expandable(self, pool, size):
        """Map memory behind a free block, in pieces of `unit`, until it is large enough."""
        unit = 2 * MIB if pool[1] else 20 * MIB
        if pool not in self.segments:
            self.segments[pool] = Block(pool, pool, 0, 2**60, mapped=False)
        block = self.segments[pool]
        while True:  # the first run of free blocks, unmapped ones among them, with so many addresses
            run, end, unmapped = 0, block, False
            while end and end.is_free and run < size:
                run, unmapped, end = run + end.size, unmapped or not end.mapped, end.after
            if run >= size and unmapped:
                break
            block = end.after if end and not end.is_free else block.after
        while not block.mapped or block.size < size:
            hole = block.after if block.mapped else block
            wanted = min(hole.size, -(-(size - (block.size if block.mapped else 0)) // unit) * unit)
            if not self.reserve(wanted):
                return None
            if hole.size > wanted:
                self.cut(hole, wanted)
            hole.mapped = True
            if hole is not block:
                self.remove(block)
                self.merge(block, hole)
            if hole.after and hole.after.is_free and hole.after.mapped:
                self.remove(hole.after)
                self.merge(block, hole.after)
            self.add(block)
        return block

    def give(self, block):
        self.used -= block.size
        for other in (block.before, block.after):
            if other and other.is_free and other.mapped:
                self.remove(other)
                left, right = (other, block) if other is block.before else (block, other)
                self.merge(left, right)
                block = left
        self.add(block)

    def empty_cache(self):
        for blocks in self.free.values():
            for _, _, block in list(blocks):
                if self.expandable:
                    self.unmap(block)
                elif block.before is None and block.after is None:
                    self.remove(block)
                    self.reserved -= block.size
                    del self.segments[block.segment]

    def unmap(self, block):
        """Give back the whole units inside a free block."""
        unit = 2 * MIB if block.pool[1] else 20 * MIB
        first = -(-block.start // unit) * unit - block.start
        size = (block.start + block.size) // unit * unit - block.start - first
        if size <= 0:
            return
        self.remove(block)
        if first:
            rest = self.cut(block, first)
            self.add(block)
            block = rest
        if block.size > size:
            self.add(self.cut(block, size))
        block.mapped = False
        self.reserved -= size
        for left, right in ((block, block.after), (block.before, block)):
            if left and right and not left.mapped and not right.mapped:
                self.merge(left, right)


class Run:
    """What a run of train.py on one GPU takes and frees.

    before: without the calls of empty_cache around pages, each gradient divided by 1, the reference's blocks
    gathered one at a time; captures: CUDA graphs are captured, which empties the cache too.
    """

    def __init__(self, s, capacity, expandable, before, captures):
        self.a, self.s, self.before, self.captures = Allocator(capacity, expandable), s, before, captures
        with torch.device("meta"):
            named = [(name, parameter.numel()) for name, parameter in Transformer(s.model).named_parameters()]
        self.root = [numel for name, numel in named if not name.startswith("layers.")]
        self.block = [numel for name, numel in named if name.startswith("layers.0.")]
        self.groups = [self.block] * s.model.num_hidden_layers + [self.root]
        self.all = [numel for group in self.groups for numel in group]
        self.weights = self.take_all(4 * n for n in self.all)
        self.reference = self.take_all(s.itemsize * n for n in self.all) if s.reference == "cuda" else []
        self.moments = []
        most = max((s.reply, *(2**i for i in range(s.reply.bit_length()))),
                   key=lambda r: memory.total(memory.update_memory(s, memory.Shape.full(s, r))["backward"]))
        self.full = self.x = memory.Shape.full(s, most)
        self.random = random.Random(0)

    def take_all(self, sizes, stream="compute"):
        return [self.a.take(int(size), stream) for size in sizes]

    def give_all(self, blocks):
        for block in blocks:
            self.a.give(block)

    def pass_by(self, *sizes):
        """Memory that is taken and freed at once."""
        self.give_all(self.take_all(sizes))

    def gathered(self, group, cast=True):
        """The whole weights of a group: each parameter is cast, or moved to the GPU, and copied."""
        whole = []
        for numel in group:
            cast_or_moved = self.take_all([self.s.itemsize * numel] if cast else [])
            whole += self.take_all([self.s.itemsize * numel])
            self.give_all(cast_or_moved)
        return whole

    def sampling(self, moment):
        """Prefill, decoding in graphs, and what `generate` frees."""
        s, c, w = self.s, self.s.model, self.s.itemsize
        _, prompts, n, reply = next(each for each in s.samplings if each[0] == moment)
        whole = self.gathered(self.all)
        if not self.before:
            self.a.empty_cache()
        slots = min(s.batch_size, prompts * n)
        held = self.take_all([memory.sampling_memory(s, prompts, n, reply)[memory.KV], 8 * 5 * slots])
        for _ in range(3):
            kv, T = [], int(sample.PREFILL_TOKENS * self.random.uniform(0.85, 1))
            for _ in range(c.num_hidden_layers):
                self.pass_by(*[w * T * c.hidden_size] * 3, *[w * T * c.intermediate_size] * 3)
                kv += self.take_all([2 * w * T * c.num_key_value_heads * c.head_dim])
            stacked = self.take_all([T * memory.kv_bytes(s)])
            self.give_all(kv)
            self.give_all(stacked)
        size = slots
        graphs = []
        pool = f"graphs {next(self.a.numbers)}"
        while size:  # each capture first warms up, then empties the cache, and shares a pool with the others
            self.pass_by(w * size * c.vocab_size, *[w * size * c.intermediate_size] * 3)
            if self.captures:
                self.a.empty_cache()
            graphs += self.take_all([] if graphs else [w * size * c.vocab_size,
                                                       *[w * size * c.intermediate_size] * 3], pool)
            size //= 2
        self.give_all(held + graphs)
        if not self.before:
            self.a.empty_cache()
        self.give_all(whole)

    def saved(self):
        """The tensors that a block saves for its backward: four of the MLP's width, others of the model's."""
        s, x = self.s, self.x
        wide, narrow = (int(s.itemsize * x.T * size) for size in (s.model.intermediate_size,
                                                                  s.model.hidden_size))
        rest = memory.saved_by_block(s, x) - 4 * wide
        count = max(1, round(rest / narrow))
        return [rest / count] * count + [wide] * 4

    def pass_without_gradients(self, groups):
        """groups: a context of weights for each block."""
        s, x = self.s, self.x
        hidden = s.itemsize * x.T * s.model.hidden_size
        for group in groups:
            whole = self.gathered(group)
            self.pass_by(hidden, *self.saved())
            self.give_all(whole)
        self.pass_by(s.itemsize * x.L * s.model.hidden_size,
                     s.itemsize * s.model.vocab_size * min(logprobs.CHUNK_TOKENS, x.L))

    def reduce(self, group, waiting, gradients, w_gradients):
        """The reduce-scatter of a group on one rank: its input is kept until the next group's."""
        self.give_all(waiting)
        kept = self.take_all([4 * sum(group)])
        self.give_all(w_gradients)
        output = self.take_all([4 * sum(group)], "reduce-scatter")
        if self.before:
            self.give_all(self.take_all([4 * sum(group)], "reduce-scatter"))
        if gradients is None:
            return kept, output
        self.give_all(output)
        return kept, gradients

    def micro_batch(self, gradients):
        """Forward and backward. gradients: those of each group so far, or None. Returns them."""
        s, x, c = self.s, self.x, self.s.model
        w, V, D = s.itemsize, c.vocab_size, c.hidden_size
        hidden, chunk = w * x.T * D, w * V * min(logprobs.CHUNK_TOKENS, x.L)
        root, inputs, saved = self.gathered(self.root), [], []
        for _ in range(c.num_hidden_layers):
            whole = self.gathered(self.block)
            inputs.append(self.take_all([hidden]))
            if s.checkpointed:
                self.pass_by(*self.saved())
            else:
                saved.append(self.take_all(self.saved()))
            self.give_all(whole)
        self.pass_by(w * x.L * D, chunk)
        sums = self.take_all([4 * V * D])  # in fp32, of the head
        self.pass_by(chunk)
        head = self.take_all([w * V * D])
        self.give_all(sums)
        waiting, found = [], []
        for layer in reversed(range(c.num_hidden_layers)):
            whole = self.gathered(self.block)
            held = saved.pop() if saved else self.take_all(self.saved())
            w_gradients = self.take_all(w * n for n in self.block)
            self.pass_by(hidden, *[w * x.T * c.intermediate_size] * 2)
            self.give_all(held + inputs.pop() + whole)
            waiting, group = self.reduce(self.block, waiting, gradients and gradients[layer], w_gradients)
            found.insert(0, group)
        if len(self.root) > 2:  # the embedding has its own gradient
            head += self.take_all([w * V * D])
        waiting, group = self.reduce(self.root, waiting, gradients and gradients[-1], head)
        self.give_all(waiting)
        self.give_all(root)
        return [*found, group]

    def ragged(self):
        self.x = memory.Shape(*(size * self.random.uniform(0.85, 1) for size in self.full))

    def step(self, updates=2, micro_batches=3):
        self.sampling("rollout")
        whole = [] if self.before or self.s.reference == "none" else self.gathered(self.all)
        for u in range(updates if self.s.updates > 1 else 1):
            for _ in range(micro_batches):
                self.ragged()
                if u:
                    self.pass_without_gradients(self.groups[::-1])
                if self.s.reference != "none":
                    self.pass_without_gradients(self.groups if self.before else [[]] * (len(self.groups) - 1))
        self.give_all(whole)
        for _ in range(updates if self.s.updates > 1 else 1):
            gradients = None
            for _ in range(micro_batches):
                self.ragged()
                gradients = self.micro_batch(gradients)
            if not self.moments:
                self.moments = self.take_all(4 * numel for numel in self.all for _ in range(2))
            self.give_all(itertools.chain(*gradients))


def run_of(preset, tmp_path, expandable=True, before=False, captures=True):
    config, gpus, gib = PRESETS[preset]
    assert gpus == 1
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    c = load_config([str(ROOT / "configs" / preset), f"--model.path={tmp_path}"])
    s = plan.setup_of(c, config, 1, True, c.data.max_prompt_tokens, c.eval.examples)
    return Run(s, gib * GIB - CONTEXT, expandable, before, captures)


# The schedule is that of training all weights; adapters have no gradients and moments that could fragment.
SINGLE = sorted(preset for preset, (_, gpus, _) in PRESETS.items() if gpus == 1 and "lora" not in preset)


# torch reads the variable when CUDA is first used: after the imports of a program, and before its `main`.
AFTER_THE_IMPORTS = """
import os, runpy, sys

import torch

torch.cuda.init = torch.cuda._lazy_init = None
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[1], run_name="not main")
print({key: os.environ[key] for key in os.environ if key.endswith("_ALLOC_CONF")})
"""
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("program, given, found", [
    ("train.py", {}, EXPANDABLE), ("sample.py", {}, EXPANDABLE), ("eval.py", {}, EXPANDABLE),
    ("tools/bench.py", {}, EXPANDABLE),
    ("train.py", {"PYTORCH_ALLOC_CONF": "b:2"}, {"PYTORCH_ALLOC_CONF": "b:2"}),
    ("sample.py", {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"})])
def test_a_program_sets_the_allocator_before_it_uses_cuda(program, given, found):
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    command = [sys.executable, "-c", AFTER_THE_IMPORTS, program]
    done = subprocess.run(command, cwd=ROOT, env=environment | given, capture_output=True, text=True,
                          check=True)
    assert done.stdout == f"{found}\n"


@pytest.mark.parametrize("gib", [None, 0.01])
def test_generate_empties_the_cache_before_it_takes_pages_and_after_it_has_dropped_them(gib, monkeypatch):
    calls, caches = [], []

    class Cache(sample.Cache):
        def __init__(self, *arguments):
            calls.append("take")
            super().__init__(*arguments)
            caches.append(self)

    monkeypatch.setattr(sample, "Cache", Cache)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append([cache.kv for cache in caches]))
    sample.generate(toy_model(), [[1, 2, 3]], 2, max_new_tokens=3, temperature=1.0, stop_ids=(), seeds_P=[0],
                    kv_memory_gib=gib, kernel="reference")
    assert calls == [[], "take", [None]]


WITH_GRAPHS = """
from runtime.kernel import choose_kernel
import torch
from fast import graphs
from model import load_hf
from sample import generate

model = load_hf("assets/tiny", "cuda", torch.bfloat16)
sizes, capture = [], graphs.Graphs.capture
graphs.Graphs.capture = lambda self, size: sizes.append(size) or capture(self, size)

def ids():
    prompts = [[5, 6, 7, 8 + i] * 20 for i in range(40)]
    rollouts = generate(model, prompts, 2, max_new_tokens=60, temperature=1.0, stop_ids=(), seeds_P=range(40),
                        kv_memory_gib=2)
    return [rollout.ids for rollout in rollouts]

first = ids()
assert sizes, "no graph was captured"
assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
reserved = torch.cuda.memory_reserved()
assert reserved < 2**30, f"{reserved} bytes are still reserved"
for _ in range(3):  # what training takes lies where the pages were
    torch.ones(2**28, device="cuda").sum().item()
    assert ids() == first
print("graphs and expandable segments work together")
"""


@pytest.mark.gpu
def test_on_a_gpu_graphs_replay_in_expandable_segments_and_pages_go_back():
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", WITH_GRAPHS], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=50)
    assert done.stdout.endswith("work together\n"), done.stdout + done.stderr[-3000:]


def steps_of(run, steps=3):
    """Refusals of the driver in an evaluation and in each step, until memory is exhausted."""
    refusals = []
    try:
        run.sampling("evaluation")
        for _ in range(steps):
            before = run.a.refusals
            run.step()
            refusals.append(run.a.refusals - before)
    except OutOfMemory as error:
        refusals.append(error)
    return refusals


@pytest.mark.parametrize("expandable", [True, False])
def test_a_freed_block_serves_its_own_stream_until_the_cache_is_emptied(expandable):
    a = Allocator(100 * MIB, expandable)
    first, second, third = (a.take(20 * MIB) for _ in range(3))
    assert (a.used, a.reserved) == (60 * MIB, 60 * MIB)
    a.give(second)
    assert a.reserved == 60 * MIB and a.take(8 * MIB).start % (60 * MIB) == second.start
    a.give(third)
    a.take(40 * MIB, "other")  # another stream cannot take the 32 MiB that are free
    assert a.used == 68 * MIB and a.reserved <= 100 * MIB
    with pytest.raises(OutOfMemory, match="0.03 GiB on the stream other"):
        a.take(30 * MIB, "other")
    a.give(first)
    a.take(12 * MIB)
    assert a.used == 60 * MIB


def test_only_an_expandable_segment_gives_back_a_part_of_it():
    reserved = {}
    for expandable in (True, False):
        a = Allocator(GIB, expandable)
        a.give(a.take(400 * MIB))
        held = a.take(50 * MIB)
        a.empty_cache()
        reserved[expandable] = a.reserved
        a.give(held)
        a.empty_cache()
        assert a.reserved == a.used == 0
    assert reserved == {True: 60 * MIB, False: 400 * MIB}


def test_neighbours_merge_and_the_best_fit_is_taken():
    a = Allocator(GIB, expandable=False)
    whole, large = a.take(100 * MIB), a.take(300 * MIB)
    a.give(large)
    a.give(whole)
    parts = [a.take(size * MIB) for size in (30, 30, 40)]
    assert len({part.segment for part in parts}) == 1 and parts[0].segment == whole.segment
    for part in (parts[0], parts[2], parts[1]):
        a.give(part)
    assert a.take(100 * MIB).segment == whole.segment and a.reserved == 400 * MIB


def test_until_the_cache_was_emptied_memory_was_lost_inside_segments(tmp_path):
    """Where no capture empties it either, 0.5B runs out of memory in step 2 with more than half of its GPU
    free inside segments. 7B gets through with nothing left of 139 GiB: the driver refuses in each step."""
    run = run_of("tool_n1_0.5b_24gb.yaml", tmp_path, expandable=False, before=True, captures=False)
    first, second = steps_of(run)
    assert first == 0 and isinstance(second, OutOfMemory) and "reduce-scatter" in str(second)
    assert run.a.reserved - run.a.used > 12 * GIB
    run = run_of("tool_n1_7b_1gpu.yaml", tmp_path, expandable=False, before=True)
    refusals = steps_of(run)
    assert refusals[1] >= 1 and refusals[2] >= 1 and run.a.peak > run.a.capacity - GIB


@pytest.mark.parametrize("preset", SINGLE)
def test_a_preset_for_one_gpu_takes_three_steps_without_a_refusal_of_the_driver(preset, tmp_path):
    run = run_of(preset, tmp_path)
    assert steps_of(run) == [0, 0, 0]
    assert run.a.peak < run.a.capacity - GIB
    static = memory.total(memory.sampling_memory(run.s, *run.s.samplings[0][1:]))
    assert run.a.peak > static - memory.sampling_memory(run.s, *run.s.samplings[0][1:])[memory.ACTIVATIONS]


@pytest.mark.parametrize("preset", SINGLE)
def test_the_same_fits_where_segments_cannot_expand(preset, tmp_path):
    """A driver may lack them, or the user's own settings of the allocator. A refusal costs time only."""
    assert all(type(refusals) is int for refusals in steps_of(run_of(preset, tmp_path, expandable=False)))
