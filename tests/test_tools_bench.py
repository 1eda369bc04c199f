"""The benchmarks: each runs at toy size, its file has all fields, and its table says what did not run."""

import contextlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import bench  # noqa: E402
import expected  # noqa: E402
import peers  # noqa: E402

import train  # noqa: E402
from fast import aligned_cache  # noqa: E402
from grpo import token_logprobs_reference  # noqa: E402
from sample import generate  # noqa: E402

pytestmark = pytest.mark.skipif(bench.DEVICE != "cpu", reason="toy sizes are for a CPU; a GPU has others")

PEERS = {"logprob": {"reference", "torch.compile", "naive", "Liger"},
         "decode": {"transformers", "ours, prompt not shared"},
         "decode_prompt": {"transformers", "ours, prompt not shared"},
         "sampling": {"multinomial", "sort"}, "prefix": {"plain packed"},
         "step": {"ours, no shared prefix", "TRL fp32", "ours bf16", "ours bf16, no shared prefix",
                  "TRL bf16"}}


@pytest.fixture(autouse=True)
def toy_sizes(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "toy", (32, 64, 2, 2, 1, 16, 64, True))
    # The vocabulary is that of assets/tiny, whose tokenizer the benchmark `run` uses.
    monkeypatch.setitem(bench.SHAPES, "toy run", (32, 64, 2, 2, 1, 16, 2048, True))
    settings = {"logprob": ("toy", 40), "decode": ("toy", 2, 3, 5, 8), "sampling": (3, 64),
                "decode_prompt": ("toy", 2, 3, 9, 4),
                "step": ("toy", 2, 4, 5, 6), "prefix": ("toy", 2, 3, 5, 4), "run": ("toy run", 2, 4, 6)}
    monkeypatch.setattr(bench, "SETTINGS", {name: {"cpu": [setting]} for name, setting in settings.items()})
    # Compilation would take longer than all other work of these tests.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def without_peers(monkeypatch):
    for package in ("trl", "liger_kernel", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)


def measure(name, folder, rounds=1):
    bench.main([name, f"--rounds={rounds}", f"--out={folder}"])
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PEERS)
def test_each_benchmark_runs_at_toy_size_and_says_which_peer_is_missing(
        name, tmp_path, capsys, without_peers):
    result = measure(name, tmp_path, rounds=2)
    assert set(result) == {"what", "date", "command", "machine", "rows"}
    assert {"processor", "threads", "python", "torch", "transformers", "trl"} <= set(result["machine"])
    rows = {row["who"]: row for row in result["rows"]}
    assert set(rows) == {"ours", *PEERS[name]}
    missing = {"Liger", "transformers", "TRL fp32", "TRL bf16"} & PEERS[name]
    printed = capsys.readouterr()
    for who, row in rows.items():
        assert row["benchmark"] == name and row["setting"]
        if who in missing:
            assert row["outcome"] == "not installed" and "seconds" not in row
            continue
        assert row["seconds"] > 0 and len(row["rounds"]) == 2 and row["unit"] == "tokens/s"
        assert who == "ours" or 0 < row["x_low"] <= row["x"] <= row["x_high"]
    assert printed.err.count("is not installed") == len(missing)
    assert printed.out.count("not installed") >= len(missing)
    assert all(who in printed.out for who in rows)


def test_a_run_of_the_preset_for_one_gpu_has_a_row_for_each_phase(tmp_path, monkeypatch):
    def run_here(command, cwd, check, stdout):
        """subprocess.run without a new interpreter, which would need seconds to import torch."""
        assert command[:2] == [sys.executable, "-c"] and check
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", command[1:2] + command[3:])
        monkeypatch.setattr(train.RunFolder, "save_checkpoint", None)  # the code sets another one
        with contextlib.redirect_stdout(stdout):
            exec(command[2], {})

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run_here))
    rows = measure("run", tmp_path, rounds=2)["rows"]
    assert [row["who"] for row in rows] == ["ours, rollout", "ours, update"]
    for row, tokens in zip(rows, (2 * 5 * 6, 2 * 200), strict=True):
        assert len(row["rounds"]) == 2, "the first of three steps does not count"
        assert 0.5 * tokens < row["speed"] * row["seconds"] < 6 * tokens


@pytest.mark.parametrize("name", ["decode", "step"])
def test_sampler_and_trainer_agree_on_log_probs(name, tmp_path, without_peers):
    row = next(row for row in measure(name, tmp_path)["rows"] if row["who"] == "ours")
    assert 0 <= row["logp_diff_mean"] <= row["logp_diff_max"] < 1e-4


@pytest.mark.parametrize("name", ["decode", "decode_prompt"])
def test_prompts_of_our_rollouts_are_shared_in_one_row_and_not_in_the_other(
        name, tmp_path, monkeypatch, without_peers):
    shared, make = [], aligned_cache.Cache.__init__

    def watching(cache, *arguments):
        make(cache, *arguments)
        shared.append(cache.shared is not None)

    monkeypatch.setattr(aligned_cache.Cache, "__init__", watching)
    monkeypatch.setattr(aligned_cache, "WORTH_SHARING", 0)
    rows = measure(name, tmp_path)["rows"]
    assert [row["who"] for row in rows[:2]] == ["ours, prompt not shared", "ours"]
    assert shared == [False, True] * 2


def test_log_probs_are_compared_with_fp64(tmp_path, without_peers):
    row = measure("logprob", tmp_path)["rows"][0]
    assert all(row[key] < 1e-5 for key in ("logp_error", "dhidden_error", "dweight_error"))


def test_the_twin_in_transformers_is_the_same_model():
    pytest.importorskip("transformers")
    bench.SHAPES["untied"] = (*bench.SHAPES["toy"][:-1], False)
    for shape in ("toy", "untied"):
        model = bench.make_model(shape, torch.float32)
        twin = peers.hf_model(model).eval()
        rollout, = generate(model, [[3, 4, 5]], 1, max_new_tokens=9, temperature=0, stop_ids=(), seeds_P=[0])
        ids_1T = torch.tensor([[3, 4, 5, *rollout.ids]])
        logp_1TV = twin(ids_1T).logits.log_softmax(-1)
        wanted = [logp_1TV[0, 2 + i, token].item() for i, token in enumerate(rollout.ids)]
        assert rollout.logp == pytest.approx(wanted, abs=1e-4)
    del bench.SHAPES["untied"]


def test_liger_gives_the_gradients_of_the_definition():
    pytest.importorskip("liger_kernel")
    hidden_LD, weight_VD = torch.randn(2048, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    targets_L = torch.randint(33, (2048,))
    found, wanted = ([*torch.autograd.grad(function(hidden_LD, weight_VD, targets_L, 0.7)[0].sum(),
                                           (hidden_LD, weight_VD))]
                     for function in (peers.liger_loss(), token_logprobs_reference))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_each_call_of_trl_makes_a_whole_step():
    pytest.importorskip("trl")
    model = bench.make_model("toy", torch.float32)
    lengths, before = [], model.embed_tokens.weight.clone()

    def reward_of(ids):
        lengths.append(len(ids))
        return len(lengths) % 2

    run = peers.trl_step(model, bench.random_ids(2, 5, 64), 4, 6, "fp32", reward_of, 8, bench.CLOCK)
    for calls in (1, 2):
        assert 0 < run() < 60
        assert len(lengths) == 8 * calls and max(lengths) == 6
    assert not torch.equal(before, model.embed_tokens.weight)


def test_a_peer_that_fails_has_a_row_with_the_reason_and_an_error_of_ours_is_raised():
    def fails():
        raise torch.OutOfMemoryError("out of memory\nand more")

    times = bench.take_turns({"ours": lambda: None, "peer": fails}, 3)
    peer = [*bench.rows("a setting", times, 1, "tokens/s")][1]
    assert peer["outcome"] == "failed: out of memory" and len(times["ours"].seconds) == 3
    with pytest.raises(torch.OutOfMemoryError):
        bench.take_turns({"ours": fails}, 1)


def test_contenders_take_turns_and_the_first_round_does_not_count():
    order = []
    contenders = {"ours": lambda: order.append("a") or 2.0, "peer": lambda: order.append("b") or 3.0}
    times = bench.take_turns(contenders, 2)
    assert "".join(order) == "ababab"
    assert times["peer"].seconds == [3.0, 3.0]
    row = [*bench.rows("a setting", times, 6, "tokens/s", {"peer": 1.6})][1]
    assert (row["x"], row["speed"], row["passes"]) == (1.5, 2.0, False)


def check_gpu(python, out):
    return subprocess.run([ROOT / "tools" / "gpu_check.sh"], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHON": str(python), "OUT": str(out)})


def test_without_a_gpu_the_check_says_of_each_part_that_it_did_not_run(tmp_path):
    done = check_gpu(sys.executable, tmp_path / "out")
    parts = re.findall(r"^(\w+) +not run: .*finds no CUDA GPU", done.stdout, re.M)
    assert {"graphs", "tests", *bench.BENCHMARKS} - {"decode_prompt"} == set(parts) and done.returncode == 1
    script = (ROOT / "tools/gpu_check.sh").read_text()
    limits = [int(limit) for limit in re.findall(r"^part \w+ (\d+) ", script, re.M)]
    assert len(limits) == len(parts) and sum(limits) <= 13 * 60 + 30


def test_every_expected_figure_is_of_a_row_that_the_benchmarks_write(tmp_path, without_peers):
    settings = re.search(r"^SETTINGS = .*?^}", (ROOT / "tools/bench.py").read_text(), re.M | re.S)[0]
    settings = eval(settings.removeprefix("SETTINGS = "), {"SHAPES": bench.SHAPES})
    for figure in expected.FIGURES:
        shapes = {setting[0] for setting in settings[figure["benchmark"]]["cuda"]}
        assert figure["setting"].split(",")[0] in shapes, figure
        if figure["benchmark"] == "decode":
            _, rows = figure["setting"].rstrip(",").split(", B ")
            assert int(rows) in {P * G for _, P, G, *_ in settings["decode"]["cuda"]}, figure
    names = {figure["name"] for figure in expected.FIGURES} - {"tflops", "extra_gib", "mfu", "peak_gib",
                                                               "decode_share"}
    found = set().union(*(row for name in PEERS for row in measure(name, tmp_path)["rows"]))
    assert names <= found


def test_measured_figures_are_printed_beside_expected_ones(tmp_path):
    rows = [{"benchmark": "decode", "setting": "1.5B, B 64, 960 + 128 tokens", "who": who, **figures}
            for who, figures in (("ours", {"decode_share": 0.45, "logp_diff_mean": 0.001}),
                                 ("transformers", {"x": 9.0}))]
    (tmp_path / "decode.json").write_text(json.dumps({"rows": rows}))
    lines = [re.sub(" +", " ", line) for line in expected.lines_of(tmp_path)]
    assert "decode 1.5B, B 64 ours decode_share 0.45 0.43 at least 0.6 MISSED" in lines
    assert "decode 1.5B, B 64 ours logp_diff_mean 0.001 - at most 0.005 passed" in lines
    assert sum("not measured" in line for line in lines) == len(expected.FIGURES) - 2


def test_the_table_of_the_gpu_check_says_what_did_not_finish(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(f'''#!/bin/sh
case "$*" in
  *--show* | *expected.py*) exec {sys.executable} "$@" ;;
  *"-m pytest"*) echo "== 3 passed, 2 failed in 1 s =="; exit 1 ;;
  *"bench.py decode"*) exit 124 ;;
  *"bench.py step"*) echo "RuntimeError: no kernel"; exit 1 ;;
esac
''')
    stub.chmod(0o755)
    done = check_gpu(stub, tmp_path / "out")
    table = done.stdout.rsplit("ours is x times as fast", 1)[1]
    for line in ("tests .* FAILED: .*3 passed, 2 failed", "logprob .* done",
                 "decode .* STOPPED at its limit of 120 s", "step .* FAILED: .*no kernel"):
        assert re.search(line, table), line
    assert done.returncode == 1
