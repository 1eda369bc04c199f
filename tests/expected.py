"""What a GPU is expected to reach, beside what it reached: `python tests/expected.py FOLDER`.

In:  the folder into which tools/bench.py wrote one JSON file a benchmark, on a GPU, and the figures of
     tools/results/expected.json, which also says what they are. Out: a table, measured, expected, and the bar
     that the project set itself. tools/gpu_check.sh prints it last.

No expectation was measured. They are estimates for one H200 (4.3 TB/s, 790 TFLOP/s in matrix products),
counted from launches, bytes and FLOPs: a small kernel in a graph takes 2 µs, a product at least 4 µs, memory
reaches 80 %. Far off an expectation is either a fault or a wrong estimate; a missed bar is work to do.
"""

import argparse
import json
from pathlib import Path

FILE = Path(__file__).parent.parent / "tools/results/expected.json"
FIGURES = json.loads(FILE.read_text(encoding="utf-8"))["figures"]


def lines_of(folder):
    """The table as lines. A figure without a measurement says so: its part did not run, or was stopped."""
    rows = [row for file in sorted(Path(folder).glob("*.json"))
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    lines = [f"{'':42}{'measured':>12}{'expected':>10}  bar"]
    for figure in FIGURES:
        benchmark, setting, who, name = (figure[key] for key in ("benchmark", "setting", "who", "name"))
        expected, bar, is_limit = (figure.get(key) for key in ("expected", "bar", "is_limit"))
        found = [row[name] for row in rows if (row["benchmark"], row["who"]) == (benchmark, who)
                 and row["setting"].startswith(setting) and row.get(name) is not None]
        verdict = ""
        if bar is not None:
            verdict = f"{'at most' if is_limit else 'at least'} {bar:g}"
            if found:
                passes = found[-1] <= bar if is_limit else found[-1] >= bar
                verdict += " passed" if passes else " MISSED"
        shown = f"{found[-1]:.4g}" if found else "not measured"
        expected = "-" if expected is None else f"{expected:.4g}"
        what = f"{benchmark} {setting.rstrip(',')} {who} {name}"
        lines.append(f"{what:42}{shown:>12}{expected:>10}  {verdict}".rstrip())
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description="Figures of a GPU: measured, expected, and the bar.")
    parser.add_argument("folder", help="JSON files that tools/bench.py wrote on a GPU")
    print("\n".join(lines_of(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    main()
