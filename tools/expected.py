"""What a GPU is expected to reach, beside what it reached: `python tools/expected.py FOLDER`.

In:  the folder into which tools/bench.py wrote one JSON file a benchmark, on a GPU. Out: a table of the
figures below, measured, expected, and the bar that the project set itself. tools/gpu_check.sh prints it last.

No expectation was measured. They are estimates for one H200 (4.3 TB/s, 790 TFLOP/s in matrix products),
counted from launches, bytes and FLOPs: a small kernel in a graph takes 2 µs, a product at least 4 µs, memory
reaches 80 %. Peaks are those of --plan without CONTEXT_GIB. Far off an expectation is either a fault or a
wrong estimate; a missed bar is work to do.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    benchmark: str
    setting: str  # the beginning of the row's setting
    who: str
    name: str  # of the figure in the row
    expected: float | None  # None: no estimate
    bar: float | None = None
    is_limit: bool = False  # the figure must not exceed the bar; else it must reach it


FIGURES = (
    # Share of the memory roofline that decoding alone reaches, at 1,000 tokens a row.
    Figure("decode", "0.5B, B 64", "ours", "decode_share", 0.24, 0.40),
    Figure("decode", "0.5B, B 256", "ours", "decode_share", 0.42, 0.40),
    Figure("decode", "1.5B, B 64", "ours", "decode_share", 0.43, 0.60),
    Figure("decode", "1.5B, B 256", "ours", "decode_share", 0.57, 0.60),
    Figure("decode", "7B, B 64", "ours", "decode_share", 0.66, 0.60),
    Figure("decode", "7B, B 256", "ours", "decode_share", 0.68, 0.60),
    # |log-prob of the sampler - log-prob of the trainer|. Beyond the bar, first try
    # torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False.
    *(Figure("decode", f"{shape}, B {B},", "ours", "logp_diff_mean", None, 0.005, True)
      for shape in ("0.5B", "1.5B", "7B") for B in (64, 256)),
    # Token log-probs forward and backward, 8·L·D·V operations, L 32,768; memory beyond the gradients.
    *(Figure("logprob", f"{shape},", "ours", "tflops", expected, bar)
      for shape, expected, bar in (("0.5B", 510, 450), ("1.5B", 580, 550), ("7B", 635, 600))),
    *(Figure("logprob", f"{shape},", "ours", "extra_gib", 1.23, 1.25, True)
      for shape in ("0.5B", "1.5B", "7B")),
    # Times as fast as peers; a row of the peer has it.
    *(Figure("decode", f"{shape}, B 256", "transformers", "x", None, bar)
      for shape, bar in (("0.5B", 8.0), ("1.5B", 8.0), ("7B", 3.0))),
    Figure("logprob", "1.5B,", "naive", "x", None, 0.87),
    Figure("logprob", "1.5B,", "torch.compile", "x", None, 1.0),
    Figure("logprob", "1.5B,", "Liger", "x", None, 2.0),
    Figure("prefix", "1.5B,", "plain packed", "x", None, 3.3),
    # Whole steps. mfu: 6 FLOPs for each parameter and token of the trees, of 989 TFLOP/s.
    Figure("step", "0.5B,", "ours", "mfu", 0.30, 0.45),
    Figure("step", "1.5B,", "ours", "mfu", 0.40, 0.45),
    Figure("step", "0.5B,", "TRL bf16", "x", None, 3.0),
    Figure("step", "1.5B,", "TRL bf16", "x", None, 3.0),
    # train.py with configs/tool_n1_7b_1gpu.yaml, tokens/s of the trees in an update: 12,288 tokens take
    # 1.12 s in the blocks, 0.05 in log-probs, 0.08 in copies of weights and 0.28 in the reference.
    Figure("run", "7B,", "ours, update", "speed", 8000),
    *(Figure("run", f"{shape},", f"ours, {phase}", "peak_gib", expected)
      for shape, peaks in (("7B", (112, 124)), ("1.5B", (29, 27)), ("0.5B", (10.3, 9.8)))
      for phase, expected in zip(("rollout", "update"), peaks, strict=True)),
)


def lines_of(folder):
    """The table as lines. A figure without a measurement says so: its part did not run, or was stopped."""
    measured = {}
    for file in sorted(Path(folder).glob("*.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            for figure in FIGURES:
                if (figure.benchmark, figure.who) == (row["benchmark"], row["who"]) and (
                        row["setting"].startswith(figure.setting)):
                    measured[figure] = row.get(figure.name)
    lines = [f"{'':42}{'measured':>12}{'expected':>10}  bar"]
    for figure in FIGURES:
        value = measured.get(figure)
        shown = "not measured" if value is None else f"{value:.4g}"
        verdict = ""
        if figure.bar is not None:
            verdict = f"{'at most' if figure.is_limit else 'at least'} {figure.bar:g}"
            if value is not None:
                passes = value <= figure.bar if figure.is_limit else value >= figure.bar
                verdict += " passed" if passes else " MISSED"
        what = f"{figure.benchmark} {figure.setting.rstrip(',')} {figure.who} {figure.name}"
        expected = "-" if figure.expected is None else f"{figure.expected:.4g}"
        lines.append(f"{what:42}{shown:>12}{expected:>10}  {verdict}".rstrip())
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description="Figures of a GPU: measured, expected, and the bar.")
    parser.add_argument("folder", help="JSON files that tools/bench.py wrote on a GPU")
    print("\n".join(lines_of(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    main()
