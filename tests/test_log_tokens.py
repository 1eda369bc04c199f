"""log.tokens: what a rollout file then holds of each token of a reply."""

import json

import pytest
from short_run import limit_time, make_setting, shared_runs

setting = pytest.fixture(autouse=True)(make_setting)
limit = pytest.fixture(autouse=True)(limit_time)
runs = pytest.fixture(shared_runs)


def lines_of(run):
    return [json.loads(line) for file in sorted(run.glob("rollouts/*"))
            for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_token_has_its_text_and_the_log_prob_of_the_sampler(runs):
    for line in lines_of(runs("grpo", "--log.tokens=true")):
        assert len(line["pieces"]) == len(line["sampler_logp"]) == line["tokens"]
        assert sum(line["sampler_logp"]) == pytest.approx(line["logp"])


def test_replies_without_a_training_pass_have_null_and_all_others_the_trainers_values(runs):
    lines = lines_of(runs("grpo", "--log.tokens=true", "--grpo.kl_coef=0"))
    assert {line["advantage"] == 0 for line in lines} == {True, False}
    for line in lines:
        if line["advantage"] == 0:
            assert line["trainer_logp"] is line["entropy"] is None
        else:
            assert line["trainer_logp"] == pytest.approx(line["sampler_logp"], abs=1e-4)
            assert len(line["entropy"]) == line["tokens"] and min(line["entropy"]) > 0


def test_without_log_tokens_the_lines_are_as_before(runs):
    plain, more = lines_of(runs("grpo")), lines_of(runs("grpo", "--log.tokens=true"))
    added = {"pieces", "sampler_logp", "trainer_logp", "entropy"}
    assert [{key: value for key, value in line.items() if key not in added} for line in more] == plain
