"""What a GPU is expected to reach, beside what it reached: `python tools/expected.py FOLDER`.

In:  the folder into which tools/bench.py wrote one JSON file a benchmark, on a GPU, and the figures of
     tools/results/expected.jsonl: the row of a benchmark (`setting` is the beginning of the row's), `name` of
     the figure in it, what is `expected` of it, the `bar` that the project set itself, which it must reach
     (not exceed, if `is_limit`). Out: a table, which tools/gpu_check.sh prints last.

No expectation was measured. They are estimates for one H200 (4.3 TB/s, 790 TFLOP/s in matrix products),
counted from launches, bytes and FLOPs: a small kernel in a graph takes 2 µs, a product at least 4 µs, memory
reaches 80 %. Far off an expectation is either a fault or a wrong estimate; a missed bar is work to do.

    decode_share     of the memory roofline that decoding alone reaches, at 1,000 tokens a row
    logp_diff_mean   |log-prob of the sampler - of the trainer|; beyond the bar, first try
                     torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    tflops           token log-probs forward and backward, 8·L·D·V operations, L 32,768
    extra_gib        their memory beyond the gradients
    x                times as fast as a peer, whose row has it
    mfu              of a step: 6 FLOPs for each parameter and token of the trees, of 989 TFLOP/s
    speed            tokens/s of the trees in an update of configs/tool_n1_7b_1gpu.yaml: 12,288 tokens take
                     1.12 s in the blocks, 0.05 in log-probs, 0.08 in copies of weights, 0.28 in the reference
    peak_gib         as --plan computes it, without CONTEXT_GIB
"""

import argparse
import json
from pathlib import Path

FIGURES = [{"expected": None, "bar": None, "is_limit": False} | json.loads(line) for line in
           (Path(__file__).parent / "results/expected.jsonl").read_text(encoding="utf-8").splitlines()]


def lines_of(folder):
    """The table as lines. A figure without a measurement says so: its part did not run, or was stopped."""
    rows = [row for file in sorted(Path(folder).glob("*.json"))
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    lines = [f"{'':42}{'measured':>12}{'expected':>10}  bar"]
    for figure in FIGURES:
        name, expected, bar = (figure[key] for key in ("name", "expected", "bar"))
        found = [row[name] for row in rows if row.get(name) is not None
                 and row["setting"].startswith(figure["setting"])
                 and all(row[key] == figure[key] for key in ("benchmark", "who"))]
        verdict = ""
        if bar is not None:
            verdict = f"{'at most' if figure['is_limit'] else 'at least'} {bar:g}"
            if found:
                passes = found[-1] <= bar if figure["is_limit"] else found[-1] >= bar
                verdict += " passed" if passes else " MISSED"
        what = f"{figure['benchmark']} {figure['setting'].rstrip(',')} {figure['who']} {name}"
        lines.append(f"{what:42}{f'{found[-1]:.4g}' if found else 'not measured':>12}"
                     f"{'-' if expected is None else f'{expected:.4g}':>10}  {verdict}".rstrip())
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description="Figures of a GPU: measured, expected, and the bar.")
    parser.add_argument("folder", help="JSON files that tools/bench.py wrote on a GPU")
    print("\n".join(lines_of(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    main()
