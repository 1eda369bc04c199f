"""Draws README's figures, assets/demo.svg and real.svg: `python tools/figures.py`.

In:  tools/results/demo.json of `tools/demo.py table` and `curves`, real.json of `tools/real.py run`. Out: SVG
by hand, so that no plotting package is needed: accuracy over the steps of GRPO, the mean of the seeds as a
thick line and each seed as a thin one, and as a dashed line the end of imitation of equal cost.
"""

import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.files import read_json, write_text  # noqa: E402

RESULTS, ASSETS = ROOT / "tools" / "results", ROOT / "assets"
WIDTH, HEIGHT = 720, 372  # pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 560, 82, 322  # of the plot; BOTTOM is LOWEST %, TOP is 100 %
LOWEST, LABEL_GAP = 40, 15  # percent; least pixels between two labels on the right
SPLITS = {"tools": "new tools", "values": "new values", "paraphrases": "new paraphrases"}

# The card has a background of its theme, so that its text is readable on every page. An SVG in an <img> takes
# the theme from the reader's system.
STYLE = """\
<style>
  text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .middle { text-anchor: middle }
  .end { text-anchor: end }
  .card { fill: #ffffff; stroke: #d0d7de }
  .grid { stroke: #d0d7de }
  .key { stroke: #1f2328 }
  polyline, line { fill: none }
  .mean { stroke-width: 2.5 }
  .seed { stroke-width: 1; opacity: 0.55 }
  .control { stroke-width: 1.5; stroke-dasharray: 5 4 }
  .values { color: #0969da }
  .paraphrases { color: #bc4c00 }
  .tools { color: #1a7f37 }
  .values, .paraphrases, .tools { stroke: currentColor }
  text.values, text.paraphrases, text.tools { fill: currentColor; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .card { fill: #0d1117; stroke: #30363d }
    .grid { stroke: #30363d }
    .key { stroke: #e6edf3 }
    .values { color: #58a6ff }
    .paraphrases { color: #f0883e }
    .tools { color: #3fb950 }
  }
</style>"""


def y_of(percent):
    """The y coordinate of an accuracy in percent."""
    return round(BOTTOM - (BOTTOM - TOP) * (percent - LOWEST) / (100 - LOWEST), 1)


def text(x, y, words, kind=""):
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{kind}>{words}</text>'


def line(x1, x2, y, kind):
    return f'<line class="{kind}" x1="{x1}" y1="{y}" x2="{x2}" y2="{y}"/>'


def polyline(xs, percents, kind):
    points = " ".join(f"{x},{y_of(percent)}" for x, percent in zip(xs, percents, strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def apart(heights):
    """Label heights with at least LABEL_GAP between neighbours: each is moved down as far as needed."""
    placed = {}
    for name in sorted(heights, key=heights.get):
        placed[name] = max(heights[name], *(y + LABEL_GAP for y in placed.values()), 0)
    return placed


def draw(title, control, labels, steps, curves, ends):
    """The figure as the text of an SVG. control: what the dashed lines are; labels: {class of STYLE: name};
    curves: {class: [[percent at each of `steps`] of each seed]}; ends: {class: [percent of each seed]}."""
    xs = [round(LEFT + (RIGHT - LEFT) * step / steps[-1], 1) for step in steps]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', f"<title>{title}</title>", STYLE,
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
        text(20, 28, title, "title"), line(20, 48, 47, "key mean"), text(54, 51, "GRPO, mean of the seeds"),
        line(214, 242, 47, "key seed"), text(248, 51, "one seed"), line(330, 358, 47, "key control"),
        text(364, 51, control)]
    for percent in range(LOWEST, 101, 20):
        y = y_of(percent)
        lines += [line(LEFT, RIGHT, y, "grid"), text(LEFT - 8, y + 4, percent, "end")]
    ticks = [*zip(steps, xs, strict=True)][::-(-len(steps) // 7)]  # at most seven, the last two not too close
    lines += [text(x, BOTTOM + 20, step, "middle") for step, x in ticks if not 0 < xs[-1] - x < 2 * LABEL_GAP]
    lines.append(text((LEFT + RIGHT) / 2, BOTTOM + 38, "step", "middle"))
    heights, words = {}, {}
    for name, label in labels.items():
        end, means = mean(ends[name]), [mean(each) for each in zip(*curves[name], strict=True)]
        lines.append(line(LEFT, RIGHT, y_of(end), f"control {name}"))
        lines += [polyline(xs, percents, f"seed {name}") for percents in curves[name]]
        lines.append(polyline(xs, means, f"mean {name}"))
        heights |= {(name, "grpo"): y_of(means[-1]) + 4, (name, "control"): y_of(end) + 4}
        words |= {(name, "grpo"): f"{label} {means[-1]:.1f}", (name, "control"): f"imitation {end:.1f}"}
    for key, y in apart(heights).items():
        lines.append(text(RIGHT + 8, round(y, 1), words[key], key[0]))
    return "\n".join([*lines, "</svg>"]) + "\n"


def draw_demo(results):
    return draw("make demo: held-out queries that the greedy reply answers right, in %",
                "imitation of right replies, same minutes", SPLITS, results["curves"]["steps"],
                results["curves"], {split: results["rows"][split]["right"] for split in SPLITS})


def draw_real(results):
    """Of the evaluations within the runs, 100 held-out records each."""
    curves = {kind: [[(step, 100 * accuracy) for step, accuracy in points] for name, points in
                     results["curves"].items() if name.startswith(kind)] for kind in ("grpo", "control")}
    return draw("make real: held-out records that the greedy reply answers right, in %",
                "imitation of the same records, same processor time", {"values": "GRPO"},
                [step for step, _ in curves["grpo"][0]],
                {"values": [[percent for _, percent in points] for points in curves["grpo"]]},
                {"values": [points[-1][1] for points in curves["control"]]})


def main():
    for name, draws in (("demo", draw_demo), ("real", draw_real)):
        if (RESULTS / f"{name}.json").exists():
            write_text(ASSETS / f"{name}.svg", draws(read_json(RESULTS / f"{name}.json")))


if __name__ == "__main__":
    main()
