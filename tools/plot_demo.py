"""Draw the README's figure, assets/demo.svg, from the numbers of the demo in tools/results/demo.json.

In:  the JSON file that `python tools/demo.py table RUN…` writes. Out: an SVG, written as text, so that no
plotting package is needed. Each split has bars for the base, the control and GRPO (means over seeds), a dot
for each seed, and a dashed line for pass@8 of the base.

    python tools/plot_demo.py
"""

import json
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURE = ROOT / "tools" / "results" / "demo.json", ROOT / "assets" / "demo.svg"

WIDTH, HEIGHT = 720, 332  # pixels
LEFT, TOP, BOTTOM = 54, 92, 292  # edges of the plot; BOTTOM is 0 %, TOP is 100 %
GROUP, BAR, GAP, SEED = 166, 36, 6, 11  # widths of a group, of a bar, between bars, between dots of two seeds

SPLITS = {"values": "new values", "paraphrases": "new paraphrases", "tools": "new tools", "all": "all"}
BARS = {"base": "base", "control": "control: more imitation", "grpo": "GRPO"}
PASS = "base: at least one of 8 replies is right (pass@8)"

# The card has a light and a dark background, so that its text is readable on every page. An SVG in an <img>
# takes the theme from the reader's system.
STYLE = """\
<style>
  text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .value { font-weight: 600; fill: #ffffff; text-anchor: middle }
  .middle { text-anchor: middle }
  .end { text-anchor: end }
  .card { fill: #ffffff; stroke: #d0d7de }
  .grid { stroke: #d0d7de }
  .pass { stroke: #1f2328; stroke-width: 1.5; stroke-dasharray: 5 3 }
  .seed { fill: #ffffff; stroke: #1f2328; stroke-width: 1.5 }
  .base { fill: #6e7781 }
  .control { fill: #bc4c00 }
  .grpo { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .value { fill: #ffffff }
    .card { fill: #0d1117; stroke: #30363d }
    .grid { stroke: #30363d }
    .pass { stroke: #e6edf3 }
    .seed { fill: #0d1117; stroke: #e6edf3 }
  }
</style>"""


def height_of(percent):
    """The y coordinate of an accuracy in percent."""
    return round(BOTTOM - (BOTTOM - TOP) * percent / 100, 1)


def text(x, y, words, kind=""):
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{kind}>{words}</text>'


def legend():
    """Two lines below the title: the meaning of the bars; that of the dots and of the dashed line."""
    lines, x = [], 20
    for name, words in BARS.items():
        lines += [f'<rect class="{name}" x="{x}" y="41" width="12" height="12"/>', text(x + 18, 51, words)]
        x += 44 + 6 * len(words)
    lines += ['<circle class="seed" cx="26" cy="67" r="3.5"/>', text(38, 71, "one seed; a bar is their mean"),
              '<line class="pass" x1="234" y1="67" x2="262" y2="67"/>', text(268, 71, PASS)]
    return lines


def group(x, label, row):
    """The bars of one split from x to the right, with their seeds and pass@8 of the base."""
    lines, end = [], x + 3 * BAR + 2 * GAP
    for i, name in enumerate(BARS):
        seeds = row[name] if isinstance(row[name], list) else [row[name]]
        left, y = x + i * (BAR + GAP), height_of(mean(seeds))
        lines.append(f'<rect class="{name}" x="{left}" y="{y}" width="{BAR}" '
                     f'height="{round(BOTTOM - y, 1)}"/>')
        lines.append(text(left + BAR / 2, BOTTOM - 8, f"{mean(seeds):.1f}", "value"))
        if len(seeds) > 1:
            first = left + BAR / 2 - SEED * (len(seeds) - 1) / 2
            lines += [f'<circle class="seed" cx="{first + j * SEED}" cy="{height_of(seed)}" r="3.5"/>'
                      for j, seed in enumerate(seeds)]
    y = height_of(row["pass@8"]["base"])
    # The dashed line is drawn first, so that a dot at the same height stays visible.
    return [f'<line class="pass" x1="{x - 4}" y1="{y}" x2="{end + 4}" y2="{y}"/>', *lines,
            text(end + 8, round(y + 4, 1), f"{row['pass@8']['base']:.1f}"),
            text(x + (end - x) / 2, BOTTOM + 22, label, "middle")]


def draw(rows):
    """The figure as the text of an SVG. rows: {split: {"base", "control", "grpo", "pass@8"}}, in percent."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>The demo: held-out accuracy of the base, the control and GRPO</title>", STYLE,
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
        text(20, 28, "Held-out queries that the greedy reply answers right, in %", "title"), *legend(),
    ]
    for percent in (0, 25, 50, 75, 100):
        y = height_of(percent)
        lines += [f'<line class="grid" x1="{LEFT - 10}" y1="{y}" x2="{WIDTH - 14}" y2="{y}"/>',
                  text(LEFT - 16, y + 4, percent, "end")]
    for i, (split, label) in enumerate(SPLITS.items()):
        lines += group(LEFT + i * GROUP, label, rows[split])
    return "\n".join([*lines, "</svg>"]) + "\n"


def main():
    FIGURE.write_text(draw(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()
