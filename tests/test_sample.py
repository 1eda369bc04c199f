"""sample.py: what is drawn, from which distribution, and that nothing else in the batch has a say in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2ForCausalLM

import sample
from data import Chat, Example
from grpo import token_logprobs_reference
from model import ModelConfig, Qwen2, packed_attention, save_hf
from sample import Rollout, fold, generate, prompt_seeds, sample_tokens, uniform

VOCAB = 48


def toy_model(seed=0, **changes):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
             "initializer_range": 0.25}
    return Qwen2(ModelConfig(**sizes | changes)).init_weights(seed)


def ragged_prompts(count, longest, seed=0, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def draw(model, prompts, n=1, **changes):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": (), "seeds_P": range(len(prompts))}
    return generate(model, prompts, n, **settings | changes)


def ids_of(rollouts):
    return [rollout.ids for rollout in rollouts]


def forward(model, ids):
    """hidden_TD of one sequence by the model's plain packed forward."""
    return model(torch.tensor(ids), torch.arange(len(ids)), packed_attention([0, len(ids)]))


def full_forward_logp(model, rollout, temperature=1.0, vocab_size=None):
    """Log-probs of a rollout's ids by a forward over prompt and reply, as training computes them."""
    with torch.no_grad():
        hidden = forward(model, rollout.prompt_ids + rollout.ids)[len(rollout.prompt_ids) - 1:-1]
        targets = torch.tensor(rollout.ids)
        return token_logprobs_reference(hidden, model.head_weight(), targets, temperature, vocab_size)[0]


def next_probabilities(model, ids, temperature):
    with torch.no_grad():
        return torch.softmax(forward(model, ids)[-1] @ model.head_weight().T / temperature, -1).double()


def chi_square(counts, probabilities):
    """(statistic, bound): under the right probabilities the bound is passed once in about 10^7 draws. Bins
    that expect fewer than 5 are taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp_min(1e-9)
    freedom = len(counts) - 1
    # Wilson and Hilferty's normal approximation of the quantile
    bound = freedom * (1 - 2 / (9 * freedom) + 5.2 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum().item(), bound


def is_drawn_from(counts, probabilities):
    statistic, bound = chi_square(counts, probabilities)
    return statistic < bound


# Noise.


@pytest.mark.parametrize("axis", ["seed", "sample", "position"])
def test_noise_is_uniform_and_uncorrelated_along_each_axis(axis):
    numbers = dict.fromkeys(("seed", "sample", "position"), torch.zeros(40_000, dtype=torch.int64))
    numbers[axis] = torch.arange(40_000)
    u = uniform(fold(numbers["seed"], numbers["sample"]), numbers["position"])
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    assert is_drawn_from(torch.bincount((u * 32).long(), minlength=32), torch.full((32,), 1 / 32))
    # Low bits as well: the distribution within a bin
    assert is_drawn_from(torch.bincount((u * 2**24).long() % 32, minlength=32), torch.full((32,), 1 / 32))
    for lag in (1, 2, 16):
        correlation = torch.corrcoef(torch.stack((u[lag:], u[:-lag])))[0, 1]
        assert abs(correlation) < 5 / len(u) ** 0.5


def test_noise_is_the_published_hash():
    # SplitMix64 started at 0: its first three outputs
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(fold(0, i)) % 2**64 for i in range(3)] == outputs


def test_noise_differs_for_every_seed_sample_and_position():
    seeds, samples, positions = torch.arange(-20, 20), torch.arange(16), torch.arange(64)
    u = uniform(fold(seeds[:, None, None], samples[:, None]), positions)
    assert u.shape == (40, 16, 64) and u.unique().numel() == u.numel()


def test_prompt_seeds_are_a_pure_function_and_distinct():
    seeds = [prompt_seeds(seed, step, 0, 64) for seed in range(4) for step in range(40)]
    assert torch.cat(seeds).unique().numel() == 4 * 40 * 64
    torch.manual_seed(1)
    assert torch.equal(prompt_seeds(3, 7, 0, 64), seeds[3 * 40 + 7])
    # Ranks that share a batch ask for their part of it.
    assert torch.equal(prompt_seeds(3, 7, 20, 10), seeds[3 * 40 + 7][20:30])


# Drawing one token.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_follow_the_tempered_softmax(temperature):
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    u = uniform(fold(5, torch.arange(30_000)), 0)
    ids, logp = sample_tokens(logits.expand(30_000, -1), temperature, u)
    counts = torch.bincount(ids, minlength=20)
    probabilities = torch.softmax(logits.double() / temperature, -1)
    assert is_drawn_from(counts, probabilities)
    assert not is_drawn_from(counts, torch.softmax(logits.double() / (1.1 * temperature), -1))
    torch.testing.assert_close(logp.double(), probabilities.log()[ids], atol=1e-5, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -torch.inf, 0.0, -torch.inf]])
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    ids, logp = sample_tokens(logits.expand(4, -1), 1.0, u)
    assert ids.tolist() == [1, 1, 4, 4]
    torch.testing.assert_close(logp, torch.full((4,), 0.5).log())


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    ids, logp = sample_tokens(logits, 0, torch.linspace(0, 0.99, 6, dtype=torch.float64))
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1).max(-1).values)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999])
def test_top_p_draws_from_the_smallest_set_that_reaches_the_mass(top_p):
    logits = 2 * torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    grid = torch.arange(0, 1, 2**-14, dtype=torch.float64)
    for row in logits:
        ids, logp = sample_tokens(row.expand(len(grid), -1), 1.0, grid, top_p)
        probabilities = torch.softmax(row.double(), -1)
        wanted, mass = set(), 0.0
        for token in probabilities.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            wanted.add(token)
            mass += probabilities[token].item()
        # A token so rare that the grid steps over it may be missing; none may be there that should not.
        drawn = set(ids.tolist())
        assert drawn <= wanted and all(probabilities[token] < 2**-13 for token in wanted - drawn)
        # Log-probs stay those of the whole softmax.
        torch.testing.assert_close(logp.double(), probabilities.log()[ids], atol=1e-5, rtol=0)


def test_top_p_takes_no_more_than_it_needs_among_equals():
    ids, _ = sample_tokens(torch.zeros(64, 4), 1.0, torch.linspace(0, 0.99, 64, dtype=torch.float64), 0.5)
    assert set(ids.tolist()) == {0, 1}


def test_top_p_keeps_the_proportions_of_what_it_keeps():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    ids, _ = sample_tokens(logits.expand(20_000, -1), 1.0, uniform(fold(1, torch.arange(20_000)), 0), 0.9)
    kept = torch.tensor([0.5, 0.3, 0.15, 0.0], dtype=torch.float64) / 0.95
    assert is_drawn_from(torch.bincount(ids, minlength=4), kept)


# generate: the distribution.


def test_replies_follow_the_model_at_the_temperature_asked_for():
    model = toy_model(vocab_size=12)
    prompt, temperature = [3, 1, 4], 1.3
    rollouts = draw(model, [prompt], 6000, temperature=temperature, max_new_tokens=2, batch_size=3000)
    first = torch.tensor([rollout.ids[0] for rollout in rollouts])
    counts = torch.bincount(first, minlength=12)
    assert is_drawn_from(counts, next_probabilities(model, prompt, temperature))
    assert not is_drawn_from(counts, next_probabilities(model, prompt, 1.0))
    for token in counts.topk(2).indices.tolist():
        second = torch.tensor([rollout.ids[1] for rollout in rollouts if rollout.ids[0] == token])
        wanted = next_probabilities(model, [*prompt, token], temperature)
        assert is_drawn_from(torch.bincount(second, minlength=12), wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_a_full_forward(temperature):
    model, prompts = toy_model(), ragged_prompts(9, 30)
    rollouts = draw(model, prompts, 3, temperature=temperature, max_new_tokens=20, stop_ids={1, 2, 3})
    assert len({len(rollout.ids) for rollout in rollouts}) > 3
    for rollout in rollouts:
        wanted = full_forward_logp(model, rollout, temperature)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


def test_a_row_without_a_token_is_never_sampled_and_does_not_count():
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB - 2:] = 40 * model.lm_head.weight[:2]
    prompts = ragged_prompts(6, 10, vocab=VOCAB - 2)
    assert any(max(ids) >= VOCAB - 2 for ids in ids_of(draw(model, prompts, 4)))
    with_phantoms = draw(model, prompts, 4, vocab_size=VOCAB - 2)
    with torch.no_grad():
        model.lm_head.weight[VOCAB - 2:] = -40.0 * model.lm_head.weight[:2]
    other_phantoms = draw(model, prompts, 4, vocab_size=VOCAB - 2)
    assert all(max(ids) < VOCAB - 2 for ids in ids_of(with_phantoms))
    assert with_phantoms == other_phantoms
    for rollout in with_phantoms[:3]:
        wanted = full_forward_logp(model, rollout, vocab_size=VOCAB - 2)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


def test_top_p_reaches_generate():
    model, prompts = toy_model(), ragged_prompts(5, 10)
    assert ids_of(draw(model, prompts, 2, top_p=1e-6)) == ids_of(draw(model, prompts, 2, temperature=0))
    assert ids_of(draw(model, prompts, 2, top_p=0.5)) != ids_of(draw(model, prompts, 2))


# generate: what shares the batch has no say.


def assert_same(rollouts, wanted):
    """The same replies: equal ids, log-probs to 1e-5."""
    assert ids_of(rollouts) == ids_of(wanted)
    for rollout, other in zip(rollouts, wanted, strict=True):
        assert rollout.prompt_ids == other.prompt_ids and rollout.finished == other.finished
        torch.testing.assert_close(torch.tensor(rollout.logp), torch.tensor(other.logp), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def sampled():
    """(model, prompts, settings, rollouts): 13 ragged prompts of 5 replies that end at different times."""
    model, prompts = toy_model(), ragged_prompts(13, 25)
    settings = {"max_new_tokens": 24, "stop_ids": {1, 2, 3}, "seeds_P": prompt_seeds(0, 0, 0, 13)}
    rollouts = draw(model, prompts, 5, **settings)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    return model, prompts, settings, rollouts


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_replies_do_not_depend_on_the_batch_size(sampled, batch_size):
    model, prompts, settings, wanted = sampled
    assert_same(draw(model, prompts, 5, **settings, batch_size=batch_size), wanted)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replies_do_not_depend_on_the_order_of_the_prompts(sampled, seed):
    model, prompts, settings, wanted = sampled
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    moved = {**settings, "seeds_P": settings["seeds_P"][order]}
    rollouts = draw(model, [prompts[i] for i in order], 5, **moved, batch_size=20)
    assert_same(rollouts, [wanted[5 * i + j] for i in order for j in range(5)])


def test_more_replies_leave_the_first_ones_as_they_are(sampled):
    model, prompts, settings, wanted = sampled
    fewer = draw(model, prompts, 2, **settings)
    assert_same(fewer, [wanted[5 * i + j] for i in range(13) for j in range(2)])


def test_padding_changes_nothing():
    model = toy_model()
    short, long = [5, 6], ragged_prompts(1, 1)[0] * 90
    together = draw(model, [long, short, long], 1, seeds_P=[1, 2, 3])
    assert_same([together[1]], draw(model, [short], 1, seeds_P=[2]))


def test_a_row_that_moves_to_a_free_slot_stays_right(sampled, monkeypatch):
    model, prompts, settings, wanted = sampled
    moves, move = [], sample.Cache.move

    def counting_move(cache, source, target):
        moves.append((source, target))
        move(cache, source, target)

    monkeypatch.setattr(sample.Cache, "move", counting_move)
    assert_same(draw(model, prompts, 5, **settings), wanted)
    assert len(moves) > 10 and all(source > target for source, target in moves)


def test_a_cache_that_has_to_grow_gives_the_same_replies(sampled, monkeypatch):
    model, prompts, settings, wanted = sampled
    monkeypatch.setattr(sample, "FIRST_ROOM", 0)
    assert_same(draw(model, prompts, 5, **settings), wanted)


@pytest.fixture
def forward_sizes(sampled):
    """How many tokens each forward of the model takes."""
    sizes = []
    hook = sampled[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    hook.remove()


def test_each_prompt_is_computed_once_for_its_replies(sampled, forward_sizes):
    model, prompts, settings, _ = sampled
    draw(model, prompts, 5, **settings)
    # All but its last token, which is the first input of each of them
    assert forward_sizes[0] == sum(len(prompt) - 1 for prompt in prompts) and forward_sizes[1] == 65


@pytest.mark.parametrize("memory", [{}, {"kv_memory_gib": 1.0}], ids=["side by side", "in pages"])
def test_replies_that_start_later_find_their_prompt_computed(sampled, forward_sizes, memory):
    model, prompts, settings, wanted = sampled
    assert_same(draw(model, prompts, 5, **settings, batch_size=4, **memory), wanted)
    # Every other forward is a step: a token in for each token of a reply.
    assert sum(forward_sizes) == sum(len(prompt) - 1 for prompt in prompts) + sum(map(len, ids_of(wanted)))


def test_prompts_computed_in_parts_give_the_same_replies(sampled, forward_sizes, monkeypatch):
    model, prompts, settings, wanted = sampled
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 60)
    assert_same(draw(model, prompts, 5, **settings), wanted)
    prefilled = sum(len(prompt) - 1 for prompt in prompts)
    parts = [sum(forward_sizes[:i]) for i in range(len(forward_sizes))].index(prefilled)
    assert parts >= 3 and max(forward_sizes[:parts]) <= 60


# generate: greedy decoding, ends, the order of the rollouts.


@pytest.mark.parametrize("stops", [False, True], ids=["to the limit", "with stop ids"])
def test_greedy_decoding_is_token_identical_to_transformers(tmp_path, stops):
    model, prompts = toy_model(num_key_value_heads=1), ragged_prompts(16, 40)
    save_hf(model, tmp_path)
    peer = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stop_ids = [7, 8, 11] if stops else []
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = peer.generate(padded, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0,
                        eos_token_id=stop_ids or None)
    wanted = []
    for reply in out[:, longest:].tolist():
        ends = [i + 1 for i, token in enumerate(reply) if token in stop_ids]
        wanted.append(reply[:ends[0]] if ends else reply)
    rollouts = draw(model, prompts, max_new_tokens=64, temperature=0.0, stop_ids=stop_ids)
    assert ids_of(rollouts) == wanted
    lengths = {len(rollout.ids) for rollout in rollouts}
    assert len(lengths) > 4 if stops else lengths == {64}
    assert len(set(sum(wanted, []))) > 20


def test_a_stop_id_ends_a_reply_and_belongs_to_it(sampled):
    _, _, settings, rollouts = sampled
    for rollout in rollouts:
        stops = [i for i, token in enumerate(rollout.ids) if token in settings["stop_ids"]]
        assert stops == ([len(rollout.ids) - 1] if rollout.finished else [])
        assert len(rollout.ids) == len(rollout.logp) <= 24
        assert rollout.finished or len(rollout.ids) == 24
        assert max(rollout.logp) <= 0


def test_a_stop_id_at_the_last_position_counts_as_finished():
    model, prompt = toy_model(), [3, 1, 4]
    rollout, = draw(model, [prompt], max_new_tokens=5)
    last = rollout.ids[-1]
    cut = rollout.ids.index(last) + 1
    again, = draw(model, [prompt], max_new_tokens=cut, stop_ids={last})
    assert again.finished and again.ids == rollout.ids[:cut]
    other, = draw(model, [prompt], max_new_tokens=1)
    assert not other.finished and other.ids == rollout.ids[:1]


def test_rollouts_come_prompt_by_prompt_in_the_order_given():
    model, prompts = toy_model(), ragged_prompts(6, 12, seed=3)
    rollouts = draw(model, prompts, 3)
    assert [rollout.prompt_ids for rollout in rollouts] == [prompt for prompt in prompts for _ in range(3)]
    assert all(len({tuple(ids) for ids in ids_of(rollouts[3 * i:3 * i + 3])}) == 3 for i in range(6))
    assert draw(model, [], 3) == []


def test_equal_prompts_with_equal_seeds_draw_equal_replies_and_with_others_others():
    model, prompt = toy_model(), [3, 1, 4]
    a, b, c = draw(model, [prompt] * 3, seeds_P=[9, 9, 8])
    assert a.ids == b.ids != c.ids


def test_on_token_sees_exactly_the_ids(sampled):
    model, prompts, settings, wanted = sampled
    seen = [[] for _ in wanted]
    draw(model, prompts, 5, **settings, batch_size=30, on_token=lambda i, token: seen[i].append(token))
    assert seen == ids_of(wanted)


def test_sampling_under_bf16_autocast_stays_near_fp32(sampled):
    model, prompts, settings, _ = sampled
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = draw(model, prompts, 5, **settings)
    for rollout in rollouts[::7]:
        assert (torch.tensor(rollout.logp) - full_forward_logp(model, rollout)).abs().mean() < 0.05


@pytest.mark.parametrize(("prompts", "changes", "message"), [
    ([[1], [2] * 21], {}, "prompt 1 has 21 tokens; .* max_new_tokens 12 .* 32 positions .* 1 to 20"),
    ([[1], []], {}, "prompt 1 has 0 tokens"),
    ([[1, VOCAB]], {}, r"prompt 0 holds id 48, but the model's last is 47"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
    ([[1]], {"temperature": -0.1}, "temperature -0.1"),
    ([[1]], {"top_p": 0.0}, "top_p 0.0"),
    ([[1]], {"top_p": 1.5}, "top_p 1.5"),
])
def test_what_cannot_be_sampled_is_one_clear_line(prompts, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(toy_model(max_position_embeddings=32), prompts, **changes)
    assert "\n" not in str(caught.value)


def test_the_longest_prompt_that_leaves_room_is_taken():
    rollout, = draw(toy_model(max_position_embeddings=32), [[2] * 20])
    assert len(rollout.ids) == 12


# The command line.


TOOLS = [{"name": "get_weather", "description": "Weather of a city.",
          "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """A random model with a tokenizer of single bytes and Qwen's markers, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("toy")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    save_hf(toy_model(vocab_size=264), folder)
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    return folder


def test_the_command_line_streams_a_reply_and_says_why_it_holds_no_calls(toy_folder, capsys):
    sample.main([str(toy_folder), "--tools", str(toy_folder / "tools.json"), "--max_new_tokens", "8",
                 "--temperature", "1", "--seed", "3", "Weather in Bern?"])
    out = capsys.readouterr().out
    chat = Chat(toy_folder)
    prompt = chat.encode_prompt(Example("", "", TOOLS, [{"role": "user", "content": "Weather in Bern?"}], []))
    rollout, = generate(sample.load_hf(toy_folder), [prompt], 1, max_new_tokens=8, temperature=1.0,
                        stop_ids=chat.stop_ids, vocab_size=chat.vocab_size, seeds_P=prompt_seeds(3, 0, 0, 1))
    shown = chat.decode([token for token in rollout.ids if token not in chat.stop_ids]).rstrip("\ufffd")
    assert out.startswith(shown)
    assert "(cut off after 8 tokens)\n" in out
    assert out.splitlines()[-1].startswith("no calls: ")


def test_the_command_line_prints_the_calls_of_a_reply(toy_folder, capsys, monkeypatch):
    calls = [{"name": "get_weather", "arguments": {"city": "Zürich 東京"}}, {"name": "now", "arguments": {}}]
    reply_ids = Chat(toy_folder).encode_reply(Example("", "", TOOLS, [], calls, "Zwei, ça va."))

    def generate_these(model, prompts, n, *, on_token, **settings):
        for token in reply_ids:
            on_token(0, token)
        return [Rollout(prompts[0], reply_ids, [0.0] * len(reply_ids), True)]

    monkeypatch.setattr(sample, "generate", generate_these)
    sample.main([str(toy_folder), "--tools", str(toy_folder / "tools.json"), "Weather?"])
    out = capsys.readouterr().out
    assert "Zwei, ça va." in out and "\ufffd" not in out and "<|im_end|>" not in out
    assert out.splitlines()[-2:] == ['get_weather({"city": "Zürich 東京"})', "now({})"]


@pytest.mark.parametrize("content", [None, "[", '{"name": "f"}', '["f"]', '[{"title": "f"}]'])
def test_a_bad_tools_file_is_one_line_and_exit_status_2(toy_folder, tmp_path, capsys, content):
    tools = tmp_path / "tools.json"
    if content is not None:
        tools.write_text(content)
    with pytest.raises(SystemExit) as caught:
        sample.main([str(toy_folder), "--tools", str(tools), "query"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tools}: ") and err.count("\n") == 1


@pytest.mark.parametrize("setting", ["--top_p=0", "--temperature=-1", "--max_new_tokens=32768"])
def test_a_setting_out_of_range_is_one_line_and_exit_status_2(toy_folder, capsys, setting):
    with pytest.raises(SystemExit) as caught:
        sample.main([str(toy_folder), "--tools", str(toy_folder / "tools.json"), setting, "query"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_command_ends_with_status_2_and_without_a_traceback(tmp_path):
    script = Path(sample.__file__)
    run = subprocess.run([sys.executable, script, tmp_path, "--tools", tmp_path / "none.json", "query"],
                         capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {tmp_path / 'none.json'}: ") and run.stderr.count("\n") == 1
