"""Speed, measured side by side with peers: `python tools/bench.py [NAME ...]`, by default every benchmark.

Ours and the peer's run in turns in one process, after a warm-up of both; what counts is the ratio of each
pair of neighbours, so that a machine that slows down slows both. Each benchmark writes one JSON file, with
versions and hardware, to tools/results/. Peers: transformers, of the `dev` extra.

A benchmark is a function that returns (bar of the ratio, units of work a call, name of the unit, ours,
peer), the last two to be called without arguments; its docstring says what it measures.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import ModelConfig, Qwen2, load_hf, save_hf  # noqa: E402
from sample import generate, prompt_seeds  # noqa: E402


def rollouts():
    """`generate` against transformers': 8 prompts of 128 tokens, 8 replies of 128 tokens each, fp32."""
    from transformers import Qwen2ForCausalLM

    P, G, prompt_tokens, reply_tokens = 8, 8, 128, 128
    config = ModelConfig(vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Qwen2(config).init_weights(0), folder)
        model = load_hf(folder)
        peer = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = torch.randint(0, 2048, (P, prompt_tokens), generator=torch.Generator().manual_seed(0))

    def ours():
        generate(model, prompts.tolist(), G, max_new_tokens=reply_tokens, temperature=1.0, stop_ids=(),
                 seeds_P=prompt_seeds(0, 0, 0, P))

    def theirs():
        peer.generate(prompts.repeat_interleave(G, 0), max_new_tokens=reply_tokens, pad_token_id=0,
                      min_new_tokens=reply_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    return 1.7, P * G * reply_tokens, "tokens", ours, theirs


BENCHMARKS = {"rollouts": rollouts}


def seconds(run):
    began = time.perf_counter()
    run()
    return round(time.perf_counter() - began, 4)


def machine():
    """Processor, threads and versions, as they go into the results."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": (names or [platform.machine()])[0], "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers")}}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure nanon1 side by side with its peers.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {min(unknown)!r}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    print(*(f"{key} {value}" for key, value in machine().items()), sep=", ")
    for name in args.names or BENCHMARKS:
        what = BENCHMARKS[name].__doc__
        bar, work, unit, ours, theirs = BENCHMARKS[name]()
        seconds(ours), seconds(theirs)
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.pairs)]
        ratios = sorted(round(b / a, 3) for a, b in pairs)
        speeds = [round(work / median(column)) for column in zip(*pairs, strict=True)]
        print(f"\n{name}: {what}\n  {unit}/s: ours {speeds[0]:,}, peer {speeds[1]:,}: {median(ratios)} "
              f"times as fast ({ratios[0]} to {ratios[-1]} in {len(pairs)} pairs; bar {bar})")
        result = {"what": what, "date": time.strftime("%Y-%m-%d"), "machine": machine(),
                  "bar": bar, "median_ratio": median(ratios), "ratios": ratios, "unit": f"{unit}/s",
                  "ours": speeds[0], "peer": speeds[1], "pairs_of_seconds": pairs}
        file = ROOT / "tools" / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
