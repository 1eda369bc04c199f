"""The strict loader: what it takes, what it refuses, and that each refusal names the key and the remedy."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from configs.schema import Config, load_config
from reward import SCHEMES

SET = ["--out=runs/x", "--model.path=m", "--data.train=d.jsonl"]
ROOT = Path(__file__).parent.parent


def refusal(argv):
    with pytest.raises(ValueError) as caught:
        load_config(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("out: a\nmodel: {path: m}\ndata: {train: d}\ngrpo:\n  kl_coef: 0.5\n  clip_low: 0.3\n")
    config = load_config([str(file), "--grpo.kl_coef=0"])
    assert (config.grpo.kl_coef, config.grpo.clip_low, config.grpo.clip_high) == (0.0, 0.3, 0.2)


def test_scientific_notation_without_a_point_is_a_float(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("out: a\nmodel: {path: m}\ndata: {train: d}\ntrain: {lr: 1e-6}\n")
    assert load_config([str(file)]).train.lr == 1e-6
    assert load_config([*SET, "--train.lr=2e-5"]).train.lr == 2e-5
    assert isinstance(load_config([*SET, "--grpo.kl_coef=0"]).grpo.kl_coef, float)


@pytest.mark.parametrize("word, near", [
    ("--grpo.kl_coeff=0", "grpo.kl_coef"), ("--kl_coef=0", "grpo.kl_coef"),
    ("--rollout.temprature=1", "rollout.temperature"), ("--gpro.clip_low=0.1", "grpo.clip_low")])
def test_unknown_key_is_refused_with_the_nearest_name(word, near):
    message = refusal([*SET, word])
    assert f"did you mean {near}" in message and word.partition("=")[0] in message


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  learning_rate: 1\n")
    assert str(file) in refusal([str(file)]) and "train.learning_rate" in refusal([str(file)])


@pytest.mark.parametrize("word", [
    "--train.lr=fast", "--train.steps=1.5", "--rollout.n=true", "--resume=1", "--train.lr=true",
    "--train.lr=[1]"])
def test_value_of_another_type_is_refused(word):
    assert "expected" in refusal([*SET, word]) and word[2:].partition("=")[0] in refusal([*SET, word])


@pytest.mark.parametrize("word, remedy", [
    ("--rollout.n=1", "at least 2"), ("--rollout.top_p=0.9", "must be 1"),
    ("--rollout.temperature=0", "above 0"),
    ("--train.lr=-1e-6", "above 0"), ("--train.lr=.nan", "above 0"), ("--train.lr=.inf", "above 0"),
    ("--train.updates_per_step=3", "divide"), ("--train.micro_batch_tokens=100", "12288"),
    ("--stage=ppo", "grpo, sft"), ("--grpo.reward=exact", "binary"), ("--data.heldout_fraction=1", "share"),
    ("--train.warmup=1.5", "share"), ("--grpo.kl_coef=-0.1", "0 or above"),
    ("--train.schedule=linear", "cosine"), ("--train.schedule=cosine_time", "set the minutes"),
    ("--train.threads=0", "above 0"), ("--eval.every=0", "above 0"),
    ("--data.heldout_fraction=0", "nothing to evaluate"), ("--checkpoint.keep=0", "above 0"),
    ("--model.kernel=cuda", "choose one of auto, reference, fast"), ("--out=", "not set")])
def test_impossible_value_is_refused_with_what_is_possible(word, remedy):
    message = refusal([*SET, word])
    assert remedy in message and word[2:].partition("=")[0].rpartition(".")[2] in message


@pytest.mark.parametrize("key", ["out", "model.path", "data.train"])
def test_required_key_that_is_missing_is_named(key):
    assert key in refusal([word for word in SET if not word.startswith(f"--{key}=")])


def test_text_on_the_command_line_is_not_parsed_as_yaml():
    assert load_config([*SET, "--out=2026"]).out == "2026"
    assert load_config([*SET, "--data.heldout=null"]).data.heldout is None


def test_a_value_may_be_the_word_after_the_key():
    config = load_config([*SET, "--resume", "false", "--train.steps", "4", "--train.lr", "1e-3"])
    assert (config.resume, config.train.steps, config.train.lr) == (False, 4, 1e-3)
    assert "--train.steps: expected" in refusal([*SET, "--train.steps", "--seed=1"])


def test_resume_is_auto_unless_set_otherwise(tmp_path):
    assert load_config(SET).resume == "auto"
    (tmp_path / "c.yaml").write_text("resume: false\n")
    assert load_config([str(tmp_path / "c.yaml"), *SET]).resume is False
    assert load_config([*SET, "--resume=true"]).resume is True
    assert "auto, True, False" in refusal([*SET, "--resume=maybe"])


def test_unreadable_files_are_one_clear_line(tmp_path):
    assert "missing.yaml" in refusal([str(tmp_path / "missing.yaml")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: cannot be read (not UTF-8 text)" in refusal([str(tmp_path / "binary.yaml")])
    for name, text in (
            ("broken.yaml", "a: [1"), ("twice.yaml", "train: {lr: 1.0, lr: 2.0}"),
            ("list.yaml", "- 1"), ("word.yaml", "hello")):
        (tmp_path / name).write_text(text)
        assert name in refusal([str(tmp_path / name)])
    assert "two configuration files" in refusal(["a.yaml", "b.yaml"])
    assert "--section.key=value" in refusal([*SET, "--resume"])


def test_section_without_keys_sets_nothing_but_an_unknown_one_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  # lr: 1e-6\ngrpo:\n")
    assert load_config([str(tmp_path / "c.yaml"), *SET]) == load_config(SET)
    (tmp_path / "c.yaml").write_text("trian:\n")
    assert "unknown key" in refusal([str(tmp_path / "c.yaml"), *SET])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_of_the_reward_can_be_chosen(scheme):
    assert load_config([*SET, f"--grpo.reward={scheme}"]).grpo.reward == scheme


@pytest.mark.parametrize("kernel", ["auto", "reference", "fast", "triton"])
def test_every_kernel_can_be_chosen_also_by_its_older_name(kernel):
    assert load_config(SET).model.kernel == "auto"
    assert load_config([*SET, f"--model.kernel={kernel}"]).model.kernel == kernel


def test_a_config_without_the_kernel_of_earlier_runs_gets_the_default(tmp_path):
    tree = dataclasses.asdict(load_config(SET))
    del tree["model"]["kernel"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert load_config([str(tmp_path / "config.yaml")]) == load_config(SET)


def test_resolved_config_written_as_yaml_loads_to_the_same(tmp_path):
    config = load_config([*SET, "--train.lr=3e-6", "--data.heldout=h.jsonl"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert load_config([str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_presets_of_the_paper_hold_its_values(size):
    c = load_config([str(ROOT / "configs" / f"tool_n1_{size}.yaml")])
    assert c.model.path == f"Qwen/Qwen2.5-{size.upper()}-Instruct" and c.stage == "grpo"
    assert (c.train.prompts_per_step, c.rollout.n, c.train.lr, c.train.epochs) == (1024, 5, 1e-6, 7)
    assert (c.data.max_prompt_tokens, c.rollout.max_new_tokens) == (4096, 8192)
    assert (c.rollout.temperature, c.rollout.top_p, c.grpo.kl_coef) == (0.7, 1.0, 1e-3)
    assert (c.train.updates_per_step, c.train.micro_batch_tokens, c.train.grad_clip) == (4, 30720, 1.0)
    assert (c.grpo.clip_low, c.grpo.clip_high) == (0.2, 0.2)
    assert (c.eval.every, c.checkpoint.every, c.data.heldout_fraction) == (10, 10, 0.1)
    assert (c.train.schedule, c.train.warmup) == ("constant", 0)
    assert (c.grpo.reward, c.grpo.normalize) == ("binary", "std")


def test_every_knob_has_a_comment_and_a_default():
    lines = (ROOT / "configs" / "schema.py").read_text().splitlines()
    for section in dataclasses.fields(Config):
        settings = section.default_factory() if callable(section.default_factory) else None
        for knob in dataclasses.fields(settings) if settings else [section]:
            line, = [x for x in lines if x.startswith(f"    {knob.name}: ") and "factory" not in x][:1]
            assert "  # " in line, f"{knob.name} has no comment"


def test_a_seed_that_the_keys_of_the_noise_cannot_hold_is_refused():
    assert load_config([*SET, f"--seed={2**63 - 1}"]).seed == 2**63 - 1
    assert "seed is 9223372036854775808; it must be below 2^63" in refusal([*SET, f"--seed={2**63}"])
