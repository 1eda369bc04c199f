"""The step that README follows is computed anew: its numbers are those of the code."""

import re
from pathlib import Path

import pytest
import torch

from data import Chat, synthetic
from grpo import group_advantages, grpo_loss, pack
from reward import score

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def section():
    return README.read_text(encoding="utf-8").split("## One step, followed")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def step(section):
    """The example of the section, the ids of its prompt and of its two replies."""
    asked = re.search(r"^asked +(.+)$", section, re.M)[1]
    example = next(e for e in synthetic(4000, 0, "train") if e.messages[0]["content"] == asked)
    chat = Chat("assets/tiny", "configs/demo_prompt.txt")
    texts = [re.search(rf"^reply {i}  (<think>.+)$", section, re.M)[1] for i in (1, 2)]
    replies = [text.replace("</think> <tool_call>", "</think>\n<tool_call>") for text in texts]
    return example, chat.encode_prompt(example), replies, [chat.encode(reply) for reply in replies]


def test_prompt_and_replies_have_the_tokens_it_says(section, step):
    example, prompt, _, ids = step
    tools = re.search(r"^tools +(.+)$", section, re.M)[1]
    assert tools == ", ".join(tool["name"] for tool in example.tools)
    assert int(re.search(r"^prompt +(\d+) tokens", section, re.M)[1]) == len(prompt)
    assert [int(n) for n in re.findall(r"^ {9}(\d+) tokens$", section, re.M)] == [len(reply) for reply in ids]


def test_rewards_and_the_reason_are_those_of_the_code(section, step):
    example, _, replies, _ = step
    verdicts = [score(reply, example.answer) for reply in replies]
    assert [verdict.reward for verdict in verdicts] == [1, 0]
    assert re.search(r"^reply 2  0 +(.+)$", section, re.M)[1] == verdicts[1].error


def test_advantages_pack_and_loss_are_those_of_the_code(section, step):
    _, prompt, _, ids = step
    adv_PG = group_advantages(torch.tensor([[1.0, 0.0]]))
    assert re.findall(r"= ([+-]0\.\d{4})$", section, re.M)[:2] == [f"{a:+.4f}" for a in adv_PG[0].tolist()]

    tree = pack([prompt], [ids])
    assert f"one run of {len(tree.tokens_T)} tokens" in section
    first, second = tree.predictor_L.split([len(reply) for reply in ids])
    told = re.search(r"^predictor_L +(.+)$", section, re.M)[1]
    for part in (first, second):
        assert f"{', '.join(str(i) for i in part[:3].tolist())}, …, {part[-1]}" in told

    logp_L = torch.zeros(len(tree.targets_L))
    adv_L = adv_PG[0][tree.reply_L]
    loss, _ = grpo_loss(logp_L, logp_L, None, adv_L, clip_low=0.2, clip_high=0.2, kl_coef=0,
                        denominator=len(logp_L))
    assert f"/ {len(logp_L)} = {loss.item():+.4f}" in section
