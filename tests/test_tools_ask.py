"""The command line of sample.py: the streamed reply, the printed calls, errors in one line."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sampling import toy_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import sample
from data import Chat, Example
from model import load_hf, save_hf
from sample import Rollout, generate, prompt_seeds
from tools import ask

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
    rollout, = generate(load_hf(toy_folder), [prompt], 1, max_new_tokens=8, temperature=1.0,
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

    monkeypatch.setattr(ask, "generate", generate_these)
    sample.main([str(toy_folder), "--tools", str(toy_folder / "tools.json"), "Weather?"])
    out = capsys.readouterr().out
    assert "Zwei, ça va." in out and "\ufffd" not in out and "<|im_end|>" not in out
    assert out.splitlines()[-2:] == ['get_weather({"city": "Zürich 東京"})', "now({})"]


DEEP = '{"not": ' * 4000 + "{}" + "}" * 4000
BAD_FILES = [None, "[", "{}", "7", '["f"]', '[{"title": "f"}]', '[{"name": 5}]', "[]", '{"tools": []}',
             '[{"name": "f", "parameters": {"maximum": Infinity}}]', '{"name": "\\udc12"}', DEEP,
             f'[{{"name": "f", "parameters": {DEEP}}}]']


@pytest.mark.parametrize("content", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_tools_file_is_one_line_and_exit_status_2(toy_folder, tmp_path, capsys, content):
    tools = tmp_path / "tools.json"
    if content is not None:
        tools.write_text(content)
    with pytest.raises(SystemExit) as caught:
        sample.main([str(toy_folder), "--tools", str(tools), "query"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tools}: ") and err.count("\n") == 1


@pytest.mark.parametrize("form", [
    "\ufeff" + json.dumps(TOOLS),
    json.dumps(TOOLS[0]),
    json.dumps({"tools": TOOLS}),
    json.dumps([{"type": "function", "function": TOOLS[0]}]),
    json.dumps({"tools": [{"function": TOOLS[0], "type": "function"}]}),
    json.dumps([{"type": "function", "strict": True, **TOOLS[0]}]),
])
def test_every_form_of_a_tools_file_gives_the_same_prompt(toy_folder, tmp_path, form):
    (tmp_path / "tools.json").write_text(form, encoding="utf-8")
    chat, messages = Chat(toy_folder), [{"role": "user", "content": "Weather in Bern?"}]
    assert (chat.encode_prompt(Example("", "", ask.read_tools(tmp_path / "tools.json"), messages, []))
            == chat.encode_prompt(Example("", "", TOOLS, messages, [])))


def test_the_prompt_of_the_folder_is_used_unless_another_is_given(toy_folder, tmp_path, capsys, monkeypatch):
    own, other = shutil.copytree(toy_folder, tmp_path / "own"), tmp_path / "other.txt"
    other.write_text("Other: {tools}")
    (own / "system_prompt.txt").write_text("Own: {tools}")
    asked = []
    monkeypatch.setattr(ask, "generate", lambda model, prompts, *x, **y: asked.append(
        Chat(own).decode(prompts[0])) or [Rollout(prompts[0], [], [], True)])
    arguments = [str(own), "--tools", str(own / "tools.json"), "Weather?"]
    sample.main(arguments)
    sample.main([*arguments, "--system_prompt", str(other)])
    starts = [text.removeprefix("<|im_start|>system\n").split(":")[0] for text in asked]
    assert starts == ["Own", "Other"] and capsys.readouterr().err == ""


def test_a_reply_that_the_terminal_cannot_show_does_not_end_the_command(toy_folder, monkeypatch):
    calls = [{"name": "get_weather", "arguments": {"city": "Łódź"}}]
    ids = Chat(toy_folder).encode_reply(Example("", "", TOOLS, [], calls))
    monkeypatch.setattr(ask, "generate", lambda *x, on_token, **y: [on_token(0, token) for token in ids] and [
        Rollout([], ids, [], True)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    sample.main([str(toy_folder), "--tools", str(toy_folder / "tools.json"), "Wetter?"])
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue().decode("latin-1")
    assert r'"city": "\u0141ód\u017a"' in shown and shown.splitlines()[-1].startswith("get_weather(")


@pytest.mark.parametrize("setting", ["--top_p=0", "--top_p=nan", "--top_p=1.5", "--temperature=-1",
                                     "--temperature=nan", "--temperature=inf", "--max_new_tokens=32768",
                                     "--max_new_tokens=0", f"--seed={2**63}", f"--seed={-2**63 - 1}"])
def test_a_setting_out_of_range_is_one_line_and_exit_status_2(toy_folder, capsys, setting):
    with pytest.raises(SystemExit) as caught:
        sample.main([str(toy_folder), "--tools", str(toy_folder / "tools.json"), setting, "query"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_query_that_is_no_text_is_one_line_and_exit_status_2(toy_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main([str(toy_folder), "--tools", str(toy_folder / "tools.json"), "Gr\udcf6\udcdfe"])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: the query holds bytes")


def test_the_command_ends_with_status_2_and_without_a_traceback(tmp_path):
    script = Path(sample.__file__)
    run = subprocess.run([sys.executable, script, tmp_path, "--tools", tmp_path / "none.json", "query"],
                         capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {tmp_path / 'none.json'}: ") and run.stderr.count("\n") == 1


def test_the_kernel_reaches_generate(toy_folder, capsys, monkeypatch):
    kernels = []
    generate = ask.generate
    monkeypatch.setattr(ask, "generate", lambda *x, **y: kernels.append(y["kernel"]) or generate(*x, **y))
    arguments = [str(toy_folder), "--tools", str(toy_folder / "tools.json"), "--max_new_tokens", "2", "query"]
    sample.main(arguments)
    sample.main([*arguments, "--kernel", "reference"])
    with pytest.raises(SystemExit) as caught:
        sample.main([*arguments, "--kernel=cuda"])
    assert kernels == ["auto", "reference", "cuda"] and caught.value.code == 2
    assert capsys.readouterr().err.count("error: kernel is 'cuda'") == 1
