"""Speed, measured side by side with peers: `python tools/bench.py [NAME ...]`; without names, every benchmark.

Ours and the peer's run in turns in one process, after a warm-up of both; what counts is the ratio of each
pair of neighbours, so that a machine that slows down slows both. One JSON file a benchmark goes to
tools/results/, with versions and hardware. The peers come with `pip install -e .[dev]`.

A benchmark is a function of BENCHMARKS that returns (what is measured, the bar of the ratio, units of work a
call, unit, ours, peer), the last two without arguments.
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

    def run_ours():
        generate(model, prompts.tolist(), G, max_new_tokens=reply_tokens, temperature=1.0, stop_ids=(),
                 seeds_P=prompt_seeds(0, 0, 0, P))

    def run_peer():
        peer.generate(prompts.repeat_interleave(G, 0), max_new_tokens=reply_tokens, min_new_tokens=reply_tokens,
                      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)

    return rollouts.__doc__, 1.7, P * G * reply_tokens, "tokens", run_ours, run_peer


BENCHMARKS = {"rollouts": rollouts}


def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure nanon1 side by side with its peers.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {min(unknown)}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    machine = {"processor": processor(), "threads": args.threads, "cores": os.cpu_count(),
               "python": platform.python_version()}
    machine |= {package: version(package) for package in ("torch", "transformers")}
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    for name in args.names or BENCHMARKS:
        what, bar, work, unit, ours, peer = BENCHMARKS[name]()
        seconds(ours), seconds(peer)
        pairs = [(seconds(ours), seconds(peer)) for _ in range(args.pairs)]
        ratios = sorted(theirs / own for own, theirs in pairs)
        speeds = [work / median(column) for column in zip(*pairs, strict=True)]
        print(f"\n{name}: {what}\n  ours {speeds[0]:,.0f} {unit}/s, peer {speeds[1]:,.0f} {unit}/s; ratio "
              f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(pairs)} pairs; bar {bar})")
        result = {"what": what, "bar": bar, "ratio_median": median(ratios), "ratios": ratios,
                  "seconds_ours_peer": pairs, f"{unit}_per_second_ours_peer": speeds, "machine": machine,
                  "command": f"python tools/bench.py {name} --pairs {args.pairs} --threads {args.threads}",
                  "date": time.strftime("%Y-%m-%d")}
        file = ROOT / "tools" / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def processor():
    """The name of the processor where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                platform.machine())


if __name__ == "__main__":
    main()
