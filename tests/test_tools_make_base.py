"""tools/make_base.py: what its lessons teach, their loss, and a run that was killed."""

import itertools
import json
import random

import pytest
import torch

from data import Chat
from grpo import token_logprobs
from model import ModelConfig, Transformer, packed_attention
from reward import CALL, score
from tools import make_base


@pytest.fixture(scope="module")
def chat():
    return Chat("assets/tiny", "configs/demo_prompt.txt")


def model_of(chat):
    config = ModelConfig(vocab_size=1280, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16, rope_theta=10000.0,
                         tie_word_embeddings=True, max_position_embeddings=2048)
    return Transformer(config).init_weights(0)


def test_lessons_share_the_tools_and_teach_whole_replies_or_the_calls_or_the_parameters_alone(chat):
    first, last = make_base.IMITATED, make_base.IMITATED + make_base.BOUND
    for lesson in make_base.query_lessons(chat, 5, 0, random.Random(0)):
        prefix = chat.decode(lesson.prefix)
        assert "<tools>" in prefix and len(lesson.texts) == len(lesson.learnt) == last + make_base.READ
        learnt = [chat.decode(text[-size:]) for text, size in zip(lesson.texts, lesson.learnt, strict=True)]
        assert all(text.startswith("<think>") for text in learnt[:first])
        assert all(text.startswith(CALL) for text in learnt[first:last])
        assert all(text.endswith("<|im_end|>") for text in learnt[:last])
        for text in lesson.texts[:last]:
            whole = chat.decode(lesson.prefix + text)
            reply = whole.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>")
            assert whole.count("<|im_start|>") == 3 and score(reply, []).format_ok
        schemas = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in map(
            json.loads, prefix.split("<tools>\n")[-1].split("\n</tools>")[0].splitlines())}
        for text, said in zip(lesson.texts[last:], learnt[last:], strict=True):
            name = chat.decode(lesson.prefix + text).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            assert said == f" {', '.join(schemas[name])}.</think>"


def test_loss_of_lessons_is_the_mean_over_what_is_learnt_of_every_text_by_itself(chat):
    model, total, count = model_of(chat), 0.0, 0
    lessons = [*itertools.islice(make_base.query_lessons(chat, 2, 0, random.Random(0)), 2),
               *make_base.phrase_lessons(chat, 2, 0, 1, 2)]
    for lesson in lessons:
        for text, learnt in zip(lesson.texts, lesson.learnt, strict=True):
            ids = torch.tensor(lesson.prefix + text)
            hidden = model(ids, torch.arange(len(ids)), packed_attention(torch.tensor([0, len(ids)])))
            logp, _ = token_logprobs(hidden[-learnt - 1:-1], model.head_weight(), ids[-learnt:], 1.0,
                                     chat.vocab_size)
            total, count = total - logp.sum().item(), count + learnt
    assert make_base.loss_of(model, lessons, chat.vocab_size).item() == pytest.approx(total / count, rel=1e-4)


def test_a_base_that_was_killed_resumes_to_the_same_weights(chat, tmp_path, monkeypatch):
    def made(saved, steps):
        model = model_of(chat)
        for name in ("copying", "imitation"):
            lessons = make_base.phrase_lessons(chat, 2 * steps, 0, 1, 2)
            make_base.learn(model, lessons, 2, steps, 1e-3, chat.vocab_size, name, saved)
        return model.state_dict()

    monkeypatch.setattr(make_base, "SAVED_EVERY", 2)
    expected = made(tmp_path / "whole.safetensors", 5)
    updates, apply_update = [], make_base.train.apply_update

    def killed(*words):
        updates.append(words)
        if len(updates) == 9:  # in the second phase, after its state of step 2 was saved
            raise KeyboardInterrupt
        return apply_update(*words)

    monkeypatch.setattr(make_base.train, "apply_update", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed.safetensors", 5)
    resumed = made(tmp_path / "killed.safetensors", 5)
    assert len(updates) == 9 + 3  # of steps 3 to 5; the first phase is not repeated
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
