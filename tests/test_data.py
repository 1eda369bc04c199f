"""data.py: our own files, augmenting, the chat format, the order of examples, the command line."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from raw_records import CLOCK, WEATHER, toolace_file, xlam_row
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import data
from data import Batches, Chat, Example, read_jsonl, read_xlam, write_jsonl
from reward import format_calls, format_reply, score
from tools.synthetic import synthetic

ROOT = Path(data.__file__).parent


def example(number=0, **changes):
    made = Example(
        f"x/{number}",
        "xlam",
        [WEATHER, CLOCK],
        [{"role": "user", "content": f"query {number}"}],
        [{"name": "Get Weather (v2)", "arguments": {"city": "Rome", "days": number}}],
    )
    return replace(made, **changes)


def toy_tokenizer(special, plain=()):
    """A byte-level tokenizer of at most 600 tokens, with special tokens and with plain ones, as Qwen3 has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600 - len(plain),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(vars(e)) for e in synthetic(50, 0, "train")], trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy tokenizer folder, byte level, with the markers as special tokens."""
    tokenizer = toy_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text('{"eos_token_id": 0}')
    return path


QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = [f"<|{name}|>" for name in
         ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id")]
# Special tokens, plain tokens, the part of the chat template that is read (a line's end as it is written
# there), eos_token, the ids of end-of-sequence tokens in generation_config.json.
FAMILIES = {
    "qwen2.5": (CHATML, ["<tool_call>", "</tool_call>"],
                f"'<|im_start|>system\\n{QWEN}<|im_end|>\\n'", "<|im_end|>", [2, 0]),
    "smollm2": (CHATML, [], f"'<|im_start|>system\n{SMOLLM}<|im_end|>\n'", "<|im_end|>", 2),
    "qwen3": (CHATML, ["<tool_call>", "</tool_call>", "<think>", "</think>"],
              "'<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n'", "<|im_end|>", [2, 0]),
    "llama3": (LLAMA, [], "message['content'] | trim + '<|eot_id|>'", "<|eot_id|>", [1, 4, 5]),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{family: toy folder with its tokens, and with what Chat reads of its other files}."""
    root = tmp_path_factory.mktemp("families")
    for name, (special, plain, template, eos, stops) in FAMILIES.items():
        tokenizer, path = toy_tokenizer(special, plain), root / name
        if name == "llama3":  # whose tokenizer begins every text with this token, unless it is asked not to
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
        path.mkdir()
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return {name: root / name for name in FAMILIES}


# ---- files


def test_jsonl_round_trip_keeps_every_field_and_odd_characters(tmp_path):
    examples = [example(0, reasoning="r\u2028\n é 😀"), example(1, answer=[], source="none")]
    write_jsonl(tmp_path / "x.jsonl", examples)
    assert read_jsonl(tmp_path / "x.jsonl") == examples
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [example()])
    with pytest.raises(TypeError):
        write_jsonl(path, [example(1), example(2, tools=[{"name": object()}])])
    assert read_jsonl(path) == [example()] and os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ("[1]", "object is expected"),
        (json.dumps({**vars(example()), "anwser": []}), "anwser"),
        (json.dumps({k: v for k, v in vars(example()).items() if k != "answer"}), "answer"),
        (json.dumps({**vars(example()), "messages": []}), "messages"),
        (json.dumps({**vars(example()), "messages": [{"role": "robot", "content": ""}]}), "messages"),
        (json.dumps({**vars(example()), "tools": [{}]}), "tools"),
        (json.dumps({**vars(example()), "answer": {"name": "f"}}), "list of calls"),
        (json.dumps({**vars(example()), "answer": [{"name": "f", "arguments": {}}]}), "not offered"),
        (json.dumps({**vars(example()), "reasoning": "</think>"}), "cannot score 1"),
        (json.dumps({**vars(example()), "id": 12.5}), "id is of type float, not a text"),
        (json.dumps({**vars(example()), "source": {"set": "mine"}}), "source is of type dict, not a text"),
        (json.dumps({**vars(example()), "reasoning": False}), "reasoning is of type bool, not a text"),
        (
            json.dumps({**vars(example()), "messages": [{"role": "user", "content": "", "tool_calls": [1]}]}),
            "tool_calls",
        ),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(vars(example())) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ")) as caught:
        read_jsonl(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_are_converted_without_torch(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([xlam_row(0, [])]))
    code = "import sys; sys.modules['torch'] = None; import data; sys.exit(data.main(sys.argv[1:]))"
    arguments = ["convert", "xlam", str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True)
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 1


def test_nesting_too_deep_for_the_parser_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"a": ' + "[" * 200_000 + "\n")
    with pytest.raises(ValueError, match="deep.jsonl:1: not JSON"):
        read_jsonl(tmp_path / "deep.jsonl")


def test_unreadable_files_and_missing_columns_are_errors_that_name_them(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\xfe{")
    (tmp_path / "cut.json").write_text('[{"id": 1},')
    (tmp_path / "other.jsonl").write_text('{"id": 1}\n')
    for name, words in (
        ("none", "cannot be read"),
        ("latin", "UTF-8"),
        ("cut.json", "not JSON"),
        ("other.jsonl", "no query, tools, answers"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            read_xlam(tmp_path / name)
        assert name in str(caught.value)


# ---- augmenting


def test_irrelevance_removes_the_right_tools_of_the_asked_share():
    examples = [example(n) for n in range(40)]
    made = data.make_irrelevant(examples, 0.15, seed=1)
    changed = [(old, new) for old, new in zip(examples, made, strict=True) if old != new]
    assert len(changed) == 6 and made == data.make_irrelevant(examples, 0.15, 1) != data.make_irrelevant(
        examples, 0.15, 2
    )
    for old, new in changed:
        assert new.answer == [] and new.tools == [CLOCK] and new.source == "xlam_irrelevant"
        assert new.messages == old.messages and data._problem(new) is None


def test_irrelevance_leaves_examples_with_no_other_tool():
    alone = [example(n, tools=[WEATHER]) for n in range(5)]
    assert data.make_irrelevant(alone, 1.0, 0) == alone


def test_masking_renames_tools_answers_earlier_calls_and_results_together():
    call = [{"name": "Get Weather (v2)", "arguments": {"city": "Rome"}}]
    messages = [
        {"role": "user", "content": "Get Weather (v2)?"},
        {"role": "assistant", "content": format_calls(call)},
        {"role": "tool", "content": '[{"name": "Get Weather (v2)", "results": 1}]'},
    ]
    old = example(3, messages=messages)
    (new,) = data.mask_names([old], 1.0, seed=0)
    weather, clock = new.tools
    city, days = weather["parameters"]["properties"]
    assert (
        weather["name"] != "Get Weather (v2)"
        and clock["name"] != "clock/now"
        and {city, days}.isdisjoint({"city", "days"})
    )
    assert weather["parameters"]["required"] == [city] and weather["description"] == "d"
    assert new.answer == [{"name": weather["name"], "arguments": {city: "Rome", days: 3}}]
    assert new.messages == [
        messages[0],
        {
            "role": "assistant",
            "content": format_calls([{"name": weather["name"], "arguments": {city: "Rome"}}]),
        },
        {"role": "tool", "content": f'[{{"name": "{weather["name"]}", "results": 1}}]'},
    ]
    assert weather["parameters"]["properties"][city]["default"] == "Oslo"  # the calls hold a city
    assert data._problem(new) is None and old.tools[0] is WEATHER and WEATHER["name"] == "Get Weather (v2)"


def test_masking_changes_flat_schemas_and_unused_text_defaults():
    flat = {
        "name": "f",
        "description": "d",
        "parameters": {
            "a": {"type": "str", "default": "x"},
            "b": {"type": "str, optional", "default": "json"},
            "c": {"default": 3},
        },
    }
    old = example(tools=[flat], answer=[{"name": "f", "arguments": {"a": "x"}}])
    (new,) = data.mask_names([old], 1.0, seed=0)
    a, b, c = new.tools[0]["parameters"].items()
    assert {a[0], b[0], c[0]}.isdisjoint("abc") and a[1]["default"] == "x" and c[1]["default"] == 3
    assert b[1]["default"] != "json" and b[1]["type"] == "str, optional"
    assert new.answer == [{"name": new.tools[0]["name"], "arguments": {a[0]: "x"}}]


def flight(parameters, **changes):
    tools = [{"name": "flight", "parameters": parameters}, CLOCK]
    return example(tools=tools, answer=[{"name": "flight", "arguments": {"to": "Oslo"}}], **changes)


@pytest.mark.parametrize("parameters", [["to"], [{"name": "to"}], "to: str, the town", 3, True, [["to"]]])
def test_what_cannot_be_masked_stays_as_it_is(parameters):
    examples = [flight(parameters), example(1)]
    unmasked, masked = data.mask_names(examples, 1.0, 0)
    assert unmasked == examples[0] and masked.id == "x/1/masked"
    assert data.make_irrelevant(examples, 1.0, 0)[0].tools == [CLOCK]


@pytest.mark.parametrize("required, masked_required", [
    (True, True), (None, None), ("to", "TO"), ("from", "from"), (7, 7), ({"to": True}, {"to": True}),
    (["to"], ["TO"]), (["gone", "to"], ["gone", "TO"]),
    ([["to"], {"to": 1}, None], [["to"], {"to": 1}, None]),
])
@pytest.mark.parametrize("part", [{"type": "string"}, "str", None, True, ["string"]])
def test_masking_trusts_no_shape_of_a_schema(required, masked_required, part):
    schema = {"type": "object", "properties": {"to": part}, "required": required, "title": "t"}
    (new,) = data.mask_names([flight(schema)], 1.0, 0)
    made = new.tools[0]["parameters"]
    ((name, kept),) = made["properties"].items()
    assert name != "to" and kept == part and made["title"] == "t" and made["type"] == "object"
    assert json.dumps(made["required"]) == json.dumps(masked_required).replace("TO", name)
    assert new.answer == [{"name": new.tools[0]["name"], "arguments": {name: "Oslo"}}]
    assert data._problem(new) is None


def test_masking_adds_no_key_and_takes_none_away():
    for parameters in ({"type": "object", "properties": {}}, {"type": "dict"}, {}, None, [], ""):
        (new,) = data.mask_names([flight(parameters)], 1.0, 0)
        assert new.tools[0]["parameters"] == parameters and new.tools[0]["name"] != "flight"
    (new,) = data.mask_names([example(tools=[{"name": "f"}], answer=[])], 1.0, 0)
    assert new.tools[0].keys() == {"name"}


def test_a_flat_parameter_called_properties_or_type_is_masked_as_a_parameter():
    flat = {"properties": {"type": "str", "description": "d"}, "to": {"type": "str"}, "type": {"type": "int"}}
    (new,) = data.mask_names([flight(flat)], 1.0, 0)
    made = new.tools[0]["parameters"]
    assert len(made) == 3 and made.keys().isdisjoint({"properties", "to", "type", "required"})
    assert list(made.values()) == list(flat.values())


@pytest.mark.parametrize("content", [
    "<tool_call>{</tool_call>", "<tool_call>[1]</tool_call>", '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>[{"name": "f", "arguments": "x"}]</tool_call>', "<tool_call>", "<tool_call></tool_call> and",
    '<tool_call>[{"name": ["f"], "arguments": {}}]</tool_call>', "<tool_call>" + "[" * 99 + "</tool_call>"])
def test_earlier_text_that_is_no_call_is_left_as_it_is(content):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    (new,) = data.mask_names(data.make_irrelevant([example(messages=messages)], 1.0, 0), 1.0, 0)
    assert new.messages == messages and new.id == "x/0/irrelevant/masked"


def test_irrelevance_never_takes_a_tool_that_the_history_calls():
    def asked(number, earlier):
        history = {"role": "assistant", "content": format_calls([{"name": earlier, "arguments": {}}])}
        return example(number, messages=[{"role": "user", "content": "q"}, history])

    examples = [asked(n, "Get Weather (v2)" if n % 2 else "clock/now") for n in range(20)]
    made = data.make_irrelevant(examples, 0.5, 0)
    changed = [n for n in range(20) if made[n] != examples[n]]
    assert changed == list(range(0, 20, 2))
    assert all(made[n].tools == [CLOCK] for n in changed)


def test_masking_draws_the_asked_share_by_seed():
    examples = [example(n) for n in range(100)]
    made = data.mask_names(examples, 0.67, 5)
    assert sum(old != new for old, new in zip(examples, made, strict=True)) == 67
    assert made == data.mask_names(examples, 0.67, 5)


# ---- chat format


def test_messages_render_as_qwen_chat(folder):
    chat = Chat(folder)
    tool, user = {"role": "tool", "content": " r "}, {"role": "user", "content": "hi"}
    default = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    )
    assert chat.render([user], True) == default + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render([{"role": "system", "content": ""}, tool, tool, user], False) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user"
        + 2 * "\n<tool_response>\n r \n</tool_response>"
        + "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


CALLS = [{"name": "Get Weather (v2)", "arguments": {"city": "Rome"}}]
TURNS = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Rome? "},
    {"role": "assistant", "content": format_calls(CALLS)},
    {"role": "tool", "content": " 21\n"},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "\nWarm.\n"},
    {"role": "user", "content": "And Oslo?"},
]
IN_CHATML = (
    "<|im_start|>system\n Be brief.\n<|im_end|>\n"
    "<|im_start|>user\nRome? <|im_end|>\n"
    f"<|im_start|>assistant\n{format_calls(CALLS)}<|im_end|>\n"
    "<|im_start|>user\n<tool_response>\n 21\n\n</tool_response>\n"
    "<tool_response>\nsunny\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n\nWarm.\n<|im_end|>\n"
    "<|im_start|>user\nAnd Oslo?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
# Roles, headers and ends: llama-models, models/llama3_1/prompt_format.md. Only text of system, user and
# assistant is trimmed: chat_template in the tokenizer_config.json of Llama-3.1-8B-Instruct.
IN_LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nRome?<|eot_id|>"
    f"<|start_header_id|>assistant<|end_header_id|>\n\n{format_calls(CALLS)}<|eot_id|>"
    "<|start_header_id|>ipython<|end_header_id|>\n\n 21\n<|eot_id|>"
    "<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nWarm.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd Oslo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_chats_are_rendered_as_each_family_publishes_them(families, family):
    chat = Chat(families[family])
    llama = family == "llama3"
    assert chat.format == ("llama3" if llama else "chatml")
    expected = IN_LLAMA3 if llama else IN_CHATML
    assert chat.render(TURNS, True) == expected
    header = expected[expected.rindex("<|start_header_id|>" if llama else "<|im_start|>"):]
    assert chat.render(TURNS, False) == expected.removesuffix(header)
    # Every marker is one token, and none is added: this tokenizer of Llama-3 puts a token before plain text.
    ids = chat.encode(expected)
    assert chat.decode(ids) == expected
    for token in LLAMA if llama else CHATML:
        assert ids.count(chat.tokenizer.token_to_id(token)) == expected.count(token)


@pytest.mark.parametrize("family, text", [("qwen2.5", QWEN), ("smollm2", SMOLLM), ("qwen3", ""),
                                          ("llama3", "")])
@pytest.mark.parametrize("place", ["tokenizer_config", "jinja", "list", "checkpoint", "none"])
def test_the_default_system_text_is_that_of_the_familys_template(families, tmp_path, family, text, place):
    """Qwen2.5's and SmolLM2's are in their tokenizer_config.json; Qwen3's and Llama-3's have none."""
    path = shutil.copytree(families[family], tmp_path / "m")
    config = json.loads((path / "tokenizer_config.json").read_text())
    if place == "jinja":
        (path / "chat_template.jinja").write_text(config.pop("chat_template"))
    elif place == "list":
        config["chat_template"] = [{"name": "default", "template": config["chat_template"]}]
    elif place == "checkpoint":
        Chat(path).save(path)
    elif place == "none":
        del config["chat_template"]
        text = QWEN
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    user = [{"role": "user", "content": "hi"}]
    rendered = Chat(path).render(user, False)
    if family == "llama3":
        assert rendered == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    else:
        default = f"<|im_start|>system\n{text}<|im_end|>\n" if text else ""
        assert rendered == f"{default}<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_of_each_family_end_with_its_token_and_are_judged_without_it(families, family):
    chat, made = Chat(families[family]), example(reasoning="why é 😀")
    end = "<|eot_id|>" if family == "llama3" else "<|im_end|>"
    ids = chat.encode_reply(made)
    assert chat.decode(ids) == format_reply(made.answer, "why é 😀") + end
    assert chat.decode_reply(ids) == format_reply(made.answer, "why é 😀")
    stops = {"llama3": {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}, "smollm2": {"<|im_end|>"}}
    assert {chat.decode([i]) for i in chat.stop_ids} == stops.get(family, {"<|im_end|>", "<|endoftext|>"})
    for stop in chat.stop_ids:
        assert score(chat.decode_reply([*ids[:-1], stop]), made.answer).reward == 1
    tags = [i for i in ids if chat.decode([i]) in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    assert len(tags) == {"qwen3": 4, "qwen2.5": 2}.get(family, 0)


@pytest.mark.parametrize("content, kept", [
    ("<think>\nwarm\n</think>\n\nIt is warm.\n", "It is warm.\n"), ("so</think>yes", "yes"),
    ("\nyes", "\nyes"), ("<think>yes", "<think>yes"),
    ('<tool_call>["</think>"]</tool_call>', '<tool_call>["</think>"]</tool_call>')])
def test_the_reasoning_of_earlier_turns_is_left_out_for_qwen3_only(families, content, kept):
    """As in the chat template of its tokenizer_config.json; Qwen2.5's leaves text as it is."""
    for family, left in (("qwen3", kept), ("qwen2.5", content)):
        turns = [{"role": role, "content": text} for role, text in (
            ("user", "q"), ("assistant", content), ("user", "a</think>b"))]
        assert Chat(families[family]).render(turns, False).endswith(
            f"<|im_start|>assistant\n{left}<|im_end|>\n<|im_start|>user\na</think>b<|im_end|>\n")


def test_a_chat_format_without_its_tokens_is_one_line_that_names_them(families):
    for family, asked, tokens in (
            ("llama3", "chatml", "<|im_start|> and <|im_end|>"),
            ("qwen3", "llama3",
             "<|begin_of_text|> and <|start_header_id|> and <|end_header_id|> and <|eot_id|>")):
        with pytest.raises(ValueError) as caught:
            Chat(families[family], chat_format=asked)
        assert f"{family}: the chat format {asked} needs {tokens}, which its" in str(caught.value)
        assert "\n" not in str(caught.value)
    for family, same in (("llama3", "llama3"), ("qwen3", "chatml")):
        assert Chat(families[family], chat_format=same).format == same


def test_a_tokenizer_with_the_tokens_of_both_formats_follows_the_template_or_the_setting(tmp_path):
    """Models of others keep Llama-3's tokens and are taught ChatML."""
    toy_tokenizer([*LLAMA, *CHATML]).save(str(tmp_path / "tokenizer.json"))
    assert Chat(tmp_path).format == "chatml"
    assert Chat(tmp_path, chat_format="llama3").format == "llama3"
    for form, line in (("llama3", "{{ '<|eot_id|>' }}"), ("chatml", "{{ '<|im_end|>\\n' }}")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": line}))
        assert Chat(tmp_path).format == form
    # A checkpoint knows the format of its training.
    chat = Chat(tmp_path, chat_format="llama3")
    chat.save(tmp_path)
    assert Chat(tmp_path).encode_reply(example()) == chat.encode_reply(example())
    assert Chat(tmp_path).encode_prompt(example()) == chat.encode_prompt(example())


def test_the_prompt_lists_the_tools_one_json_line_each_and_ends_where_the_reply_begins(folder):
    chat = Chat(folder)
    text = chat.decode(chat.encode_prompt(example()))
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line) for line in listed] == [
        {"type": "function", "function": t} for t in (WEATHER, CLOCK)
    ]
    assert text.startswith("<|im_start|>system\n") and text.count("<|im_start|>") == 3
    assert text.endswith("<|im_start|>user\nquery 0<|im_end|>\n<|im_start|>assistant\n")
    assert "You are Qwen" not in text
    accents = example(tools=[{"name": "f", "description": "Zürich 😀"}], answer=[])
    assert "Zürich 😀" in chat.decode(chat.encode_prompt(accents))


def test_a_system_prompt_file_replaces_ours_and_the_examples_system_text_follows_it(folder, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text('Tools {"a": {tools}} end')
    made = example(tools=[{"name": "f"}], messages=[{"role": "system", "content": "S"}, *example().messages])
    chat = Chat(folder, path)
    text = chat.decode(chat.encode_prompt(made))
    assert text.startswith(
        '<|im_start|>system\nTools {"a": {"type": "function", "function": {"name": "f"}}} end\n\nS<|im_end|>'
    )
    for wrong in ("none", "{tools} and {tools}"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="prompt.txt.*{tools}"):
            Chat(folder, path)


def test_our_system_prompts_own_example_is_a_reply_that_scores_1():
    text = (ROOT / "assets" / "system_prompt.txt").read_text()
    reply = re.search(r"Example: (<think>.*</tool_call>)", text, re.DOTALL)[1]
    calls = json.loads(reply[reply.index("<tool_call>") + 11 : -12])
    assert reply == format_reply(calls, "Two cities, so two forecasts.") and score(reply, calls).reward == 1


def test_the_reply_is_the_format_and_one_stop_token(folder):
    chat, made = Chat(folder), example(reasoning="why")
    ids = chat.encode_reply(made)
    assert chat.decode(ids) == format_reply(made.answer, "why") + "<|im_end|>"
    assert ids[-1] in chat.stop_ids and not set(ids[:-1]) & chat.stop_ids
    assert score(chat.decode(ids), made.answer).reward == 1


def test_stop_ids_are_the_union_of_config_generation_config_and_tokenizer(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    token = Chat(folder).tokenizer.token_to_id
    assert Chat(tmp_path).stop_ids == {token("<|im_end|>")}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert Chat(tmp_path).stop_ids == {token("<|im_end|>"), token("</s>")}
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert Chat(tmp_path).stop_ids == {0, 7, 8, token("<|im_end|>"), token("</s>")}


def test_vocab_size_counts_ids_and_encoding_neither_adds_nor_cuts(folder):
    chat = Chat(folder)
    assert chat.vocab_size == chat.tokenizer.get_vocab_size() == 600
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20_000)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = Chat(folder).encode("naïve 😀 " * 600)
    assert ids == chat.encode("naïve 😀 " * 600) and chat.decode(ids) == "naïve 😀 " * 600


def test_folders_without_tokenizer_or_end_of_sequence_are_errors(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        Chat(tmp_path)
    bare = json.loads((folder / "tokenizer.json").read_text())
    bare["added_tokens"] = []
    bare["model"]["vocab"]["plain"] = bare["model"]["vocab"].pop("<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match=r"chatml needs <\|im_end\|>, and llama3 needs <\|begin"):
        Chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not JSON"):
        Chat(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no local folder"):
        Chat("not a/hub/name")


# ---- the prompt in a checkpoint

PIECES = ["plain", "Zürich 東京 😀", "{{ x }} {% raw %} {# c #}", "a 'b' \"c\" <d> & \\n", "\u2028\r\n\t "]


def some_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randrange(4)))


def some_value(rng, depth=0):
    leaves = [some_text(rng), rng.randrange(-(10**12), 10**12), 1e30, 0.5, True, False, None, [], {}]
    if depth > 2 or rng.random() < 0.6:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {some_text(rng): some_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def some_tool(rng):
    tool = {"name": some_text(rng)}
    optional = [
        ("description", some_text(rng)),
        ("parameters", {"type": "object", "properties": some_value(rng)}),
        ("required", None),
        ("results", some_value(rng)),
    ]
    return tool | {key: value for key, value in optional if rng.random() < 0.7}


def some_messages(rng):
    """Messages with text only, and the same ones with calls as APIs have them."""
    plain, of_api = [], []
    roles = ["system"] * rng.randrange(2) + rng.choices(
        ["user", "assistant", "call", "tool", "tool", "system"], k=rng.randrange(1, 8)
    )
    for role in roles:
        message = {"role": "assistant" if role == "call" else role, "content": some_text(rng)}
        if role == "call":
            calls = [
                {"name": some_text(rng), "arguments": {some_text(rng): some_value(rng)}}
                for _ in range(rng.randrange(1, 4))
            ]
            plain.append({"role": "assistant", "content": format_calls(calls)})
            if rng.random() < 0.3:  # the arguments as a text
                calls = [{**c, "arguments": json.dumps(c["arguments"], ensure_ascii=False)} for c in calls]
            if rng.random() < 0.7:
                calls = [{"id": "c1", "type": "function", "function": call} for call in calls]
            content = rng.choice([None, "", "<think></think>"])
            of_api.append({"role": "assistant", "content": content, "tool_calls": calls})
        else:
            plain.append(message)
            of_api.append(message)
    return plain, of_api


def as_servers_send(tool):
    """In the envelope, with null for what is missing."""
    return {
        "type": "function",
        "function": {"description": None, "parameters": None, "strict": None} | tool
        if len(tool) == 1
        else tool,
    }


def same_prompt(chat, tokenizer, tools, messages, sent_tools, sent_messages):
    ids = chat.encode_prompt(Example("", "", tools, messages, []))
    arguments = {"tools": sent_tools, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(sent_messages, tokenize=False, **arguments)
    assert chat.encode(text) == ids
    assert tokenizer.apply_chat_template(sent_messages, **arguments)["input_ids"] == ids
    return text


def checkpoint_of(folder, path, prompt):
    """A copy of a tokenizer folder with the prompt that `Chat.save` writes, and its Chat."""
    shutil.copytree(folder, path)
    (path / "mine.txt").write_text(prompt)
    Chat(path, path / "mine.txt").save(path)
    return path, Chat(path)


def test_the_chat_template_of_a_checkpoint_renders_the_training_prompt(tmp_path):
    """Over generated tools and conversations, in text and ids, for bare tools and for enveloped ones."""
    transformers = pytest.importorskip("transformers")
    prompt = "Ä 😀 \"q\" 'a' \\n {{ x }} {% endif %} {# no #}\u2028\n<t>\n{tools}\n</t>\tPROMPT_TEXTS\n"
    path, chat = checkpoint_of(ROOT / "assets" / "tiny", tmp_path / "c", prompt)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    for number in range(150):
        rng = random.Random(number)
        tools = [some_tool(rng) for _ in range(rng.randrange(4))]
        plain, of_api = some_messages(rng)
        enveloped = [as_servers_send(tool) for tool in tools]
        text = same_prompt(chat, tokenizer, tools, plain, tools, plain)
        assert text == same_prompt(chat, tokenizer, tools, plain, enveloped, of_api), number
        if not tools:
            assert text == same_prompt(chat, tokenizer, [], plain, None, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chat_template_of_each_family_renders_the_training_prompt(families, tmp_path, family):
    transformers = pytest.importorskip("transformers")
    prompt = "\n \u00a0Ä 😀 {{ x }} {# no #}\n{tools}\n CUTS_REASONING</think> DEFAULT_SYSTEM PROMPT_TEXTS\n "
    path, chat = checkpoint_of(families[family], tmp_path / "c", prompt)
    assert Chat(families[family], path / "mine.txt").encode_prompt(example()) == chat.encode_prompt(example())
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    reasoned = {"role": "assistant", "content": "\n<think>\nr\n</think>\n\nyes\n"}
    for number in range(60):
        rng = random.Random(number)
        tools = [some_tool(rng) for _ in range(rng.randrange(4))]
        plain, of_api = some_messages(rng)
        if number % 2:
            plain, of_api = [*plain, reasoned, *TURNS[1:]], [*of_api, reasoned, *TURNS[1:]]
        text = same_prompt(chat, tokenizer, tools, plain, tools, plain)
        enveloped = [as_servers_send(tool) for tool in tools]
        assert text == same_prompt(chat, tokenizer, tools, plain, enveloped, of_api), number
    assert text.count("<|begin_of_text|>") == (family == "llama3")


def test_the_request_and_the_reply_of_the_page_on_serving_are_in_our_format(tmp_path):
    transformers = pytest.importorskip("transformers")
    page = (ROOT / "docs" / "serve.md").read_text()
    request = json.loads(page.split(" -d '")[1].split("'\n```")[0])
    written = re.search(r"writes `(<think>.*</think>)` and `(<tool_call>.*</tool_call>)`", page)
    calls = json.loads(written[2].removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert "\n".join(written.groups()) == format_reply(calls, "…")
    answer = json.loads(page.split("comes back as\n\n```\n")[1].split("```")[0])["choices"][0]
    functions = [call["function"] for call in answer["message"]["tool_calls"]]
    assert [{**each, "arguments": json.loads(each["arguments"])} for each in functions] == calls
    tools = [tool["function"] for tool in request["tools"]]
    made = replace(example(), tools=tools, messages=request["messages"], answer=calls)
    assert data._problem(made) is None
    path, chat = checkpoint_of(ROOT / "assets" / "tiny", tmp_path / "c", "{tools}")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    result = {"role": "tool", "content": "no"}
    earlier = [*request["messages"], {"role": "assistant", "content": format_calls(calls)}, result]
    sent = [*request["messages"], answer["message"], result]
    same_prompt(chat, tokenizer, tools, earlier, request["tools"], sent)


def test_a_checkpoints_own_prompt_is_used_unless_another_is_given(folder, tmp_path):
    path, chat = checkpoint_of(folder, tmp_path / "c", "Mine:\n{tools}\n")
    ids = chat.encode_prompt(example())
    assert "system\nMine:\n{" in chat.decode(ids) and ids != Chat(folder).encode_prompt(example())
    assert ids == Chat(path, path / "mine.txt").encode_prompt(example())
    ours = ROOT / "assets" / "system_prompt.txt"
    assert Chat(path, ours).encode_prompt(example()) == Chat(folder).encode_prompt(example())
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}
    Chat(path).save(path)
    assert before == {name: (path / name).read_bytes() for name in os.listdir(path)}
    (path / "system_prompt.txt").write_text("none")
    with pytest.raises(ValueError, match=r"c/system_prompt.txt: 0 times {tools}, not 1"):
        Chat(path)


# ---- order


def test_split_is_seeded_disjoint_and_complete():
    examples = [example(n) for n in range(50)]
    train, heldout = data.split_examples(examples, 0.1, seed=0)
    assert len(heldout) == 5 and sorted(train + heldout, key=examples.index) == examples
    assert (train, heldout) == data.split_examples(examples, 0.1, 0) != data.split_examples(examples, 0.1, 1)


def test_without_siblings_the_split_is_that_of_earlier_versions():
    examples = [example(n) for n in range(83)]
    order = list(range(83))
    random.Random("split/4").shuffle(order)
    held = sorted(order[: round(0.13 * 83)])
    assert data.split_examples(examples, 0.13, 4)[1] == [examples[i] for i in held]


def dialogue(name, turns):
    """The examples of a conversation: a call turn after each of its user turns."""
    messages, made = [], []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{name} asks {turn}"})
        call = {"name": "Get Weather (v2)", "arguments": {"city": name, "days": turn}}
        made.append(example(id=f"{name}-{turn}", messages=list(messages), answer=[call]))
        messages += [
            {"role": "assistant", "content": format_calls([call])},
            {"role": "tool", "content": '{"name": "Get Weather (v2)"}'},
        ]
    return made


def test_conversations_and_equal_records_are_on_one_side_of_the_split():
    """Also after some were masked or made irrelevant, which changes ids, tools and earlier calls."""
    examples = [made for n in range(30) for made in dialogue(f"town{n}", 1 + n % 4)]
    examples += [replace(made, id=f"again {made.id}") for made in examples[::7]]
    examples = data.mask_names(data.make_irrelevant(examples, 0.3, 1), 0.5, 2)
    for seed in range(20):
        train, heldout = data.split_examples(examples, 0.25, seed)
        towns = [{made.messages[0]["content"] for made in side} for side in (train, heldout)]
        assert not towns[0] & towns[1] and len(train) + len(heldout) == len(examples)
        assert abs(len(heldout) - 0.25 * len(examples)) <= 2
    other_rule = random.Random("split/0").sample(examples, len(examples))[: len(examples) // 4]
    assert Batches(other_rule, 1, 0).fingerprint != Batches(data.split_examples(examples, 0.25, 0)[1], 1, 0)


def test_the_held_out_share_is_the_nearest_that_whole_conversations_allow():
    three, four = dialogue("a", 3), dialogue("b", 4)
    sizes = [len(data.split_examples([*three, *four], share, 0)[1]) for share in (0, 0.1, 0.3, 0.6, 1)]
    assert sizes == [0, 0, 3, sizes[3], 7] and sizes[3] in (3, 4)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_held_out_conversations_that_training_has_are_counted_and_refused(folder, tmp_path, capsys, overlap):
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    talks = [dialogue(f"town{n}", 2) for n in range(overlap)]
    write_jsonl(train, [*(talk[0] for talk in talks), *(example(n) for n in range(5))])
    # The later turns of what training has, one of them masked
    later = data.mask_names([talk[1] for talk in talks], 0.5, 0)
    write_jsonl(heldout, [*later, *(example(n) for n in range(100, 210 - overlap))])
    arguments = (train, heldout, 0.1, 0, Chat(folder), 10_000, 0)
    if overlap == 2:
        with pytest.raises(ValueError, match=f"{heldout}: 2 of 110 examples.*{train}"):
            data.read_examples(*arguments)
        return
    assert [len(part) for part in data.read_examples(*arguments)] == [5 + overlap, 110]
    assert ("1 of 110 examples are of a conversation" in capsys.readouterr().out) == (overlap == 1)


@pytest.mark.parametrize("text", ["\u212b", "\u1112\u1161\u11ab", "e\u0301 in a key"])
def test_answers_that_the_tokenizer_changes_are_dropped_and_counted(folder, tmp_path, capsys, text):
    """The tokenizer writes the angstrom sign as a letter, and three Korean letters as one syllable."""
    chat, path = Chat(folder), tmp_path / "x.jsonl"
    answer = [{"name": "Get Weather (v2)", "arguments": {text: 1} if "key" in text else {"city": [text]}}]
    changed = example(50, answer=answer)
    assert score(chat.decode(chat.encode_reply(changed)), answer).reward == 0
    examples = [example(n) for n in range(9)]
    assert data.usable_examples("my", [*examples, changed], chat, 10_000, 0.1) == examples
    assert capsys.readouterr().out.startswith("dropped 1 my examples: answers that cannot score 1")
    with pytest.raises(ValueError, match=r"1 of 10 answers \(10.0%\) cannot score 1.*NFC.*max_dropped_share"):
        data.usable_examples("my", [*examples, changed], chat, 10_000, 0.05)
    write_jsonl(path, [changed, *examples])
    training, heldout = data.read_examples(path, None, 0.3, 0, chat, 10_000, 0.5)
    assert changed not in training + heldout and len(training + heldout) == 9
    assert "examples: answers that cannot score 1, because the tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<|endoftext|>", None])
def test_the_judged_text_has_no_stop_token_whichever_ended_the_reply(folder, tmp_path, end):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    chat, made = Chat(tmp_path), example()
    ids = chat.encode(format_reply(made.answer)) + ([chat.tokenizer.token_to_id(end)] if end else [])
    assert chat.decode_reply(ids) == format_reply(made.answer)
    assert score(chat.decode_reply(ids), made.answer).reward == 1 and chat.decode_reply([]) == ""


def test_long_prompts_are_dropped_and_counted_never_cut(folder, capsys):
    chat = Chat(folder)
    examples = [example(n) for n in range(9)]
    long = example(9, messages=[{"role": "user", "content": "long " * 2000}])
    limit = max(len(chat.encode_prompt(e)) for e in examples)
    assert data.usable_examples("my", [long, *examples], chat, limit, 0.1) == examples
    printed = f"dropped 1 my examples: prompts that are longer than {limit} tokens\n"
    assert capsys.readouterr().out == printed
    with pytest.raises(ValueError, match=r"1 of 10 prompts \(10.0%\).*raise"):
        data.usable_examples("my", [*examples, long], chat, limit, 0.05)
    assert data.usable_examples("my", [], chat, limit, 0.0) == []


def test_every_epoch_deals_every_example_once_in_a_new_order():
    examples = [example(n) for n in range(10)]
    batches = Batches(examples, 4, seed=0)
    dealt = [made for _ in range(5) for made in next(batches)]
    first, second = dealt[:10], dealt[10:]
    assert sorted(first, key=examples.index) == sorted(second, key=examples.index) == examples
    assert first != second != examples and batches.cursor == 20 and batches.epoch == 2.0


@pytest.mark.parametrize("cursor", [0, 3, 8, 12, 23])
def test_example_k_depends_on_seed_and_k_only(cursor):
    examples = [example(n) for n in range(7)]
    one_by_one = [next(Batches(examples, 1, 5, cursor=k))[0] for k in range(40)]
    resumed = Batches(examples, 3, 5, cursor=cursor)
    assert [made for _ in range(4) for made in next(resumed)] == one_by_one[cursor : cursor + 12]
    assert resumed.cursor == cursor + 12
    other = Batches(examples, 7, 6)
    assert next(other) != one_by_one[:7]


def test_fingerprint_changes_with_content_and_order_only():
    examples = [example(n) for n in range(5)]
    same = Batches(list(examples), 2, seed=9, cursor=3).fingerprint
    assert same == Batches(examples, 1, seed=0).fingerprint
    others = (examples[::-1], examples[:4], [*examples[:4], example(4, reasoning="new")])
    assert same not in {Batches(other, 1, 0).fingerprint for other in others}


@pytest.mark.parametrize("size", [0, 4])
def test_a_batch_larger_than_the_data_is_refused(size):
    with pytest.raises(ValueError, match=f"batches of {size} from 3 examples"):
        Batches([example(n) for n in range(3)], size, 0)


@pytest.mark.parametrize("apart", [True, False])
def test_examples_are_read_from_two_files_or_one_that_is_split(folder, tmp_path, capsys, apart):
    chat = Chat(folder)
    examples = [example(n) for n in range(10)]
    long = example(10, messages=[{"role": "user", "content": "long " * 2000}])
    limit = max(len(chat.encode_prompt(e)) for e in [*examples, example(20)])
    path, other = tmp_path / "x.jsonl", tmp_path / "heldout.jsonl"
    write_jsonl(path, [*examples, long])
    others = [example(n) for n in range(20, 23)]
    write_jsonl(other, others)
    heldout_path = other if apart else None
    training, heldout = data.read_examples(path, heldout_path, 0.2, 0, chat, limit, 0.5)
    if apart:
        assert (training, heldout) == (examples, others)
        assert capsys.readouterr().out.startswith("dropped 1 training examples")
    else:
        assert sorted(training + heldout, key=examples.index) == examples and len(heldout) <= 2
    with pytest.raises(ValueError, match=f"{other if apart else path}: no held-out examples"):
        write_jsonl(other, [])
        data.read_examples(path, heldout_path, 0.0, 0, chat, limit, 0.5)


# ---- command line


def test_convert_prints_the_counts_and_writes_the_examples(tmp_path, capsys):
    path = toolace_file(tmp_path, "user: q", "assistant: [other()]", "user: q", "assistant: [clock/now()]")
    assert data.main(["convert", "toolace", str(path), str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"1 raw records", printed) and re.search(r"1 toolace_multi", printed)
    assert "1 dropped: call of a tool that is not offered: toolace/0/1" in printed
    assert [e.id for e in read_jsonl(tmp_path / "out.jsonl")] == ["toolace/0/3"]


def test_convert_augments_as_asked(tmp_path):
    rows = [xlam_row(n, [{"name": "clock/now", "arguments": {}}]) for n in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ["convert", "xlam", str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")]
    assert data.main([*arguments, "--irrelevant", "0.15", "--mask", "0.65", "--seed", "2"]) == 0
    made = read_jsonl(tmp_path / "out.jsonl")
    assert (
        sum(e.source == "xlam_irrelevant" for e in made) == 3 and sum("/masked" in e.id for e in made) == 13
    )


def test_convert_counts_what_cannot_be_augmented(tmp_path, capsys):
    calls = [{"name": "Get Weather (v2)", "arguments": {"city": "Rome"}}]
    rows = [xlam_row(n, calls, tools=[WEATHER]) for n in range(6)]
    odd = {"name": "Get Weather (v2)", "parameters": "city: str"}
    rows += [xlam_row(n, calls, tools=[odd]) for n in (6, 7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ["convert", "xlam", str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")]
    assert data.main([*arguments, "--irrelevant", "0.5", "--mask", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 fewer irrelevant than asked: no other tool, or the history calls the right one" in printed
    assert "2 fewer masked than asked: the parameters of a tool are no object" in printed
    assert [e.id.endswith("/masked") for e in read_jsonl(tmp_path / "out.jsonl")] == [True] * 6 + [False] * 2


def test_strict_schema_drops_answers_that_contradict_their_tool(tmp_path, capsys):
    answers = [{"city": "Rome"}, {"city": 3}, {"days": 2}, {"city": "Rome", "days": "2"}]
    rows = [xlam_row(n, [{"name": "Get Weather (v2)", "arguments": a}]) for n, a in enumerate(answers)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ["convert", "xlam", str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")]
    for options, kept in (([], 4), (["--strict_schema"], 1)):
        assert data.main([*arguments, *options]) == 0
        printed = capsys.readouterr().out
        assert "       3 answers contradict the schema of their tool" in printed
        assert '       2   wrong type: xlam/1 (city is 3, not "string"), xlam/3' in printed
        assert "       1   required parameter missing: xlam/2 (city)" in printed
        assert ("3 dropped: answer contradicts the schema of its tool: xlam/1 xlam/2 xlam/3" in printed) == (
            kept == 1)
        assert len(read_jsonl(tmp_path / "out.jsonl")) == kept


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["convert", "xlam", "missing.json", "out.jsonl"], "missing.json"),
        (["convert", "xlam", "empty.json", "out.jsonl"], "empty.json"),
        (["convert", "xlam", "empty.json", "out.jsonl", "--mask", "67"], "67"),
        (["convert", "xlam", "good.json", "no/such/folder/out.jsonl"], "no/such/folder"),
    ],
)
def test_command_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("[]")
    Path("good.json").write_text(json.dumps([xlam_row(0, [])]))
    assert data.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not Path("out.jsonl").exists()


# ---- real data


@pytest.fixture(scope="module")
def qwen(real_data):
    return Chat(real_data / "qwen2.5")


def test_golden_chats_and_encodings(qwen, real_data):
    cases = json.loads((real_data / "qwen2.5" / "golden_chat.json").read_text())
    plain = [
        case for case in cases if "tools" not in case and "tool_calls" not in json.dumps(case["messages"])
    ]
    assert len(plain) == 20
    for case in plain:
        text = qwen.render(case["messages"], case["add_generation_prompt"])
        assert text == case["rendered"], case["name"]
        assert qwen.encode(text) == case["token_ids"], case["name"]
    golden = json.loads((real_data / "qwen2.5" / "golden_tokens.json").read_text())
    assert len(golden) == 16 and all(qwen.encode(case["text"]) == case["ids"] for case in golden)
    assert qwen.stop_ids == {151643, 151645} and qwen.vocab_size == 151665
    assert qwen.decode([151935, 151645]) == "<|im_end|>"


def test_the_chat_template_takes_the_place_of_qwens_own(real_data, tmp_path):
    """With the golden conversations, bare and enveloped tools, in text and ids."""
    transformers = pytest.importorskip("transformers")
    path, chat = checkpoint_of(real_data / "qwen2.5", tmp_path / "c", "Tools:\n{tools}")
    (path / "config.json").write_bytes((path / "configs" / "Qwen2.5-7B-Instruct.json").read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    cases = json.loads((path / "golden_chat.json").read_text())
    tools = [made for case in cases for made in case.get("tools", [])]
    bare = [tool["function"] for tool in tools]
    plain = [case["messages"] for case in cases if "tool_calls" not in json.dumps(case["messages"])]
    assert len(plain) >= 20 and bare
    for messages in plain:
        text = same_prompt(chat, tokenizer, bare, messages, tools, messages)
        assert text.startswith('<|im_start|>system\nTools:\n{"type": "function"')
        same_prompt(chat, tokenizer, bare, messages, bare, messages)


def test_answers_of_rlla_score_1_in_our_format(real_data):
    lines = (real_data / "data" / "rlla_4k" / "normalized.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answers"] for line in lines]
    assert len(answers) == 392 and all(score(format_reply(a, "r"), a).reward == 1 for a in answers)
