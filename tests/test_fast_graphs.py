"""fast/graphs.py: replayed steps give the replies of plain steps. On a GPU: generate with all its kernels."""

import contextlib
import functools
import inspect

import pytest
import sampling
import torch
from sampling import (
    assert_same,
    draw,
    full_forward_logp,
    ids_of,
    ragged_prompts,
    replies_before_and_after_an_update,
    toy_model,
)

import sample
from fast.graphs import Graphs
from sample import generate, prompt_seeds

sampled = sampling.sampled


class FakeGraph:
    def pool(self):
        return "pool"


class FakeCapture:
    """CUDA graphs for a CPU. While one is captured, a step computes nothing; its replay calls the step."""

    def __init__(self):
        self.current, self.sizes, self.pools = None, [], []

    @contextlib.contextmanager
    def graph(self, graph, pool):
        self.current = graph
        self.pools.append(pool)
        yield
        self.current = None

    def recordable(self, step):
        def call(B):
            if self.current is None:
                return step(B)
            self.current.replay = functools.partial(step, B)
            self.sizes.append(B)
        return call


@pytest.fixture
def capture(monkeypatch):
    capture = FakeCapture()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture.graph)
    return capture


@pytest.mark.parametrize("steps", [1, 3])
def test_replayed_steps_give_the_same_replies(sampled, capture, monkeypatch, steps):
    model, prompts, settings, wanted = sampled
    make = sample.Decoder.__init__

    def make_with_graphs(decoder, model, cache, *arguments):
        make(decoder, model, cache, *arguments)
        step = capture.recordable(decoder.step)
        decoder.graphs = Graphs(step, cache.slots, (decoder.state_4B, cache.table_BM))

    monkeypatch.setattr(sample.Decoder, "__init__", make_with_graphs)
    monkeypatch.setitem(sample.STEPS, "cpu", steps)
    assert_same(draw(model, prompts, 5, **settings, batch_size=20, kv_memory_gib=1.0), wanted)
    # Batches of 20 rows and fewer; each size is captured once, and all share the first one's memory.
    assert {20, 16, 8, 4} <= set(capture.sizes) <= {20, 16, 8, 4, 2, 1}
    assert len(capture.sizes) == len(set(capture.sizes))
    assert capture.pools == [None] + (len(capture.sizes) - 1) * ["pool"]


def test_a_batch_is_padded_to_a_power_of_two_or_a_multiple_of_64_within_the_slots(capture):
    graphs = Graphs(capture.recordable(lambda B: None), 200, ())
    sizes = {1: 1, 2: 2, 3: 4, 5: 8, 33: 64, 64: 64, 65: 128, 129: 192, 193: 200, 200: 200}
    for B in sizes:
        graphs.step(B)
    assert capture.sizes == sorted(set(sizes.values()))


def test_a_capture_runs_on_zeros_and_gives_the_inputs_back(capture):
    inputs, seen = (torch.arange(4), torch.ones(2, 2)), []

    def step(B):
        seen.append([tensor.clone() for tensor in inputs])
        inputs[0].add_(1)

    Graphs(capture.recordable(step), 4, inputs).step(2)
    first_run, replayed = seen
    assert not any(tensor.any() for tensor in first_run)
    assert torch.equal(replayed[0], torch.arange(4)) and torch.equal(replayed[1], torch.ones(2, 2))
    assert torch.equal(inputs[0], torch.arange(4) + 1)  # one step


def test_closed_graphs_hold_nothing(capture):
    graphs = Graphs(capture.recordable(lambda B: None), 4, (torch.ones(2),))
    graphs.step(3)
    graphs.close()
    assert not graphs.graphs and not graphs.inputs and graphs.pool is None


def test_a_replayed_step_takes_what_a_plain_step_takes():
    assert inspect.signature(Graphs.step) == inspect.signature(sample.Decoder.step)


# On a GPU: Triton kernels and CUDA graphs.


def on_gpu(**changes):
    return toy_model(head_dim=16, **changes).cuda()


@pytest.mark.gpu
def test_on_a_gpu_replies_do_not_depend_on_the_schedule():
    model, prompts = on_gpu(), ragged_prompts(13, 60)
    settings = {"max_new_tokens": 70, "stop_ids": {1, 2}, "seeds_P": prompt_seeds(0, 0, 0, 13)}
    wanted = draw(model, prompts, 5, **settings)
    page = 2 * 2 * 32 * 2 * 16 * 4 / 2**30
    for changes in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 20, "kv_memory_gib": 12 * page},
                    {"batch_size": 65, "kv_memory_gib": 40 * page}):
        assert ids_of(draw(model, prompts, 5, **settings, **changes)) == ids_of(wanted), changes


@pytest.mark.gpu
def test_on_a_gpu_greedy_replies_equal_the_cpus():
    model, prompts = toy_model(head_dim=16), ragged_prompts(13, 60)
    wanted = draw(model, prompts, 2, temperature=0.0, max_new_tokens=40)
    rollouts = draw(model.cuda(), prompts, 2, temperature=0.0, max_new_tokens=40)
    assert_same(rollouts, wanted)
    assert_same(draw(model, prompts, 2, temperature=0.0, max_new_tokens=40, kernel="reference"), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_on_a_gpu_a_second_phase_samples_from_the_updated_weights(autocast):
    before, after, wanted = replies_before_and_after_an_update(on_gpu(), ragged_prompts(9, 40), autocast)
    assert after == wanted != before


@pytest.mark.gpu
def test_on_a_gpu_a_phase_leaves_no_memory_behind():
    model, prompts = on_gpu(), ragged_prompts(9, 40)
    draw(model, prompts, 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    draw(model, prompts, 3, seeds_P=range(9, 18))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_on_a_gpu_sampled_log_probs_equal_a_full_forward(top_p):
    model, prompts = on_gpu(), ragged_prompts(9, 40)
    rollouts = generate(model, prompts, 3, max_new_tokens=20, temperature=0.7, stop_ids=(), top_p=top_p,
                        seeds_P=range(9))
    model.cpu()
    for rollout in rollouts:
        wanted = full_forward_logp(model, rollout, 0.7)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_on_a_gpu_generate_takes_the_kernels(monkeypatch):
    from fast import draw as fast_draw
    from fast import paged_cache
    calls = []
    for module, name in ((fast_draw, "sample_tokens"), (paged_cache, "decode_attention")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, name=name, function=function, **settings:
                            calls.append(name) or function(*x, **settings))
    generate(on_gpu(), [[1, 2]], 2, max_new_tokens=3, temperature=1.0, stop_ids=(), seeds_P=[0])
    assert set(calls) == {"sample_tokens", "decode_attention"}
