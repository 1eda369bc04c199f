"""What README and docs/ say is true: the followed step, the tables of results, the files, names and links."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

from data import Chat, read_jsonl
from grpo import group_advantages, grpo_loss, pack
from reward import score
from tools import demo as demo_tool
from tools import figures, real
from tools.ask import read_tools
from tools.synthetic import synthetic

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
RESULTS, RESULTS_PAGE = ROOT / "tools" / "results", ROOT / "docs" / "results.md"
T_95 = 4.303  # Student's t at 95 % for three seeds


def text_of(page):
    return page.read_text(encoding="utf-8")


def section_of(page, title):
    """The text under a heading of the second level, up to the next one."""
    return text_of(page).split(f"\n## {title}\n")[1].split("\n## ")[0]


def table_of(section):
    """The lines of the tables in a section."""
    return [line for line in section.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def section():
    return section_of(ROOT / "docs/one_step.md", "One step, followed")


@pytest.fixture(scope="module")
def step(section):
    """The example of the section, the ids of its prompt and of its two replies."""
    asked = re.search(r"^asked +(.+)$", section, re.M)[1]
    example = next(e for e in synthetic(4000, 0, "train") if e.messages[0]["content"] == asked)
    chat = Chat("assets/tiny", "configs/demo_prompt.txt")
    texts = [re.search(rf"^reply {i}  (<think>.+)$", section, re.M)[1] for i in (1, 2)]
    replies = [text.replace("</think> <tool_call>", "</think>\n<tool_call>") for text in texts]
    return example, chat.encode_prompt(example), replies, [chat.encode(reply) for reply in replies]


def test_prompt_and_replies_have_the_tokens_it_says(section, step):
    example, prompt, _, ids = step
    tools = re.search(r"^tools +(.+)$", section, re.M)[1]
    assert tools == ", ".join(tool["name"] for tool in example.tools)
    assert int(re.search(r"^prompt +(\d+) tokens", section, re.M)[1]) == len(prompt)
    assert [int(n) for n in re.findall(r"^ {9}(\d+) tokens$", section, re.M)] == [len(reply) for reply in ids]


def test_rewards_and_the_reason_are_those_of_the_code(section, step):
    example, _, replies, _ = step
    verdicts = [score(reply, example.answer) for reply in replies]
    assert [verdict.reward for verdict in verdicts] == [1, 0]
    assert re.search(r"^reply 2  0 +(.+)$", section, re.M)[1] == verdicts[1].error


def test_advantages_pack_and_loss_are_those_of_the_code(section, step):
    _, prompt, _, ids = step
    adv_PG = group_advantages(torch.tensor([[1.0, 0.0]]))
    assert re.findall(r"= ([+-]0\.\d{4})$", section, re.M)[:2] == [f"{a:+.4f}" for a in adv_PG[0].tolist()]

    tree = pack([prompt], [ids])
    assert f"one run of {len(tree.tokens_T)} tokens" in section
    first, second = tree.predictor_L.split([len(reply) for reply in ids])
    predictors = re.search(r"^predictor_L +(.+)$", section, re.M)[1]
    for part in (first, second):
        assert f"{', '.join(str(i) for i in part[:3].tolist())}, …, {part[-1]}" in predictors

    logp_L = torch.zeros(len(tree.targets_L))
    adv_L = adv_PG[0][tree.reply_L]
    loss, _ = grpo_loss(logp_L, logp_L, None, adv_L, clip_low=0.2, clip_high=0.2, kl_coef=0,
                        denominator=len(logp_L))
    assert f"/ {len(logp_L)} = {loss.item():+.4f}" in section


def interval(seeds, sign=""):
    return f"{statistics.mean(seeds):{sign}.1f} ± {T_95 * statistics.stdev(seeds) / 3 ** 0.5:.1f}"


@pytest.fixture(scope="module")
def demo():
    """{split or split/kind: what the demo measured}, in percent."""
    return json.loads(text_of(RESULTS / "demo.json"))["rows"]


@pytest.fixture(scope="module")
def curves():
    """{"steps": [...], split: [[percent at each step] of each seed]}"""
    return json.loads(text_of(RESULTS / "demo.json"))["curves"]


def test_tables_of_the_demo_are_those_of_the_measured_numbers(demo):
    splits = ("values", "paraphrases", "tools", "all")
    arms = [["base", *(f"{demo[split]['base']:.1f}" for split in splits)]]
    arms += [[label, *(interval(demo[split][arm]) for split in splits)]
             for arm, (_, _, label) in demo_tool.ARMS.items()]
    arms.append(["**GRPO**", *(interval(demo[split]["grpo"]) for split in splits)])
    paired = ([a - b for a, b in zip(demo[split]["grpo"], demo[split]["right"], strict=True)]
              for split in splits)
    arms.append(["GRPO minus right replies, same minutes", *(interval(each, "+") for each in paired)])
    arms = [f"| {' | '.join(cells)} |" for cells in arms]
    kinds = []
    for name, row in demo.items():
        label = name.replace("_", " ") if "/" in name else f"**{name}**"
        cells = (label, f"{row['base']:.1f}", interval(row["right"]), interval(row["grpo"]),
                 f"{row['grpo'][0]:.1f} ± {row['by frame'][0]:.1f}",
                 f"{row['pass@8']['base']:.1f}", f"{row['pass@8']['GRPO']:.1f}")
        kinds.append(f"| {' | '.join(cells)} |")
    table = table_of(section_of(RESULTS_PAGE, "The demo"))
    assert table[2:2 + len(arms)] == arms and table[4 + len(arms):] == kinds
    left_out = ("| imitation of right calls without reasoning, ", "| imitation of right replies, then GRPO, ")
    assert table_of(section_of(README, "make demo"))[2:] == [r for r in arms if not r.startswith(left_out)]


def test_console_output_of_the_demo_ends_with_the_measured_numbers_of_seed_0(demo):
    output = section_of(RESULTS_PAGE, "The console output of the demo")
    shown = re.findall(r"^([a-z]+(?:/\w+)?) +\d+ +(\d+\.\d) \[.*?\] +(\d+\.\d) \[", output, re.M)
    assert shown == [(name, f"{row['base']:.1f}", f"{row['grpo'][0]:.1f}") for name, row in demo.items()]
    lines = re.search(r"```\n(.*?)```", section_of(README, "make demo"), re.S)[1].splitlines()
    assert set(lines) <= set(output.splitlines())


@pytest.fixture(scope="module")
def real_results():
    return json.loads(text_of(RESULTS / "real.json"))


def test_tables_of_the_real_run_are_those_of_its_results(real_results):
    scores = real_results["scores"]
    others = [label for label in scores["imitation"] if label not in real.SCORES]
    tables = [line for labels in (real.SCORES, [x for x in others if x.startswith("BFCL")],
                                  [x for x in others if not x.startswith("BFCL")])
              for line in real.table(scores, labels)[:-1]]
    wrong, names = real_results["mistakes"], [name for name in real_results["mistakes"] if name[:4] != "base"]
    kinds = sorted(wrong["imitation"], key=wrong["imitation"].get, reverse=True)
    kinds += sorted({kind for name in names for kind in wrong[name]} - {*kinds})
    tables += [f"| kind of mistake | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|",
               *(f"| {kind} | {' | '.join(str(wrong[name].get(kind, 0)) for name in names)} |"
                 for kind in kinds)]
    assert table_of(section_of(ROOT / "docs/real.md", "Results")) == tables
    shown = [row for row in scores if not row.startswith("base") and row[-2:] not in ("-1", "-2")]
    assert table_of(section_of(README, "make real")) == real.table({row: scores[row] for row in shown},
                                                                   real.SCORES)[:-1]


def test_bars_and_hours_of_the_real_run_are_those_of_its_results(real_results):
    page = " ".join(section_of(ROOT / "docs/real.md", "Results").split())
    for row, label, bar in real.BARS:
        gain, half = real_results["scores"][f"grpo, mean, less {row}"][label]
        assert (f"{row}, {label}: {gain:+.1f} ± {half:.1f}, asked for {bar or 'more than 0'}, "
                f"{'reached' if gain > 0 and gain >= bar else 'missed'}") in page
    for name, hours in real_results["processor_hours"].items():
        assert f"{name} {hours:.2f}" in page


def test_results_of_the_study_in_the_readme_are_those_of_its_page():
    """The page is computed from tools/results/study.json (tests/test_tools_study.py)."""
    page, section = text_of(ROOT / "docs/study.md"), section_of(README, "make study")
    tables = [line.split(" | ") for line in page.split("\n") if line.startswith("| ")]
    heads = [row for row in tables if "all" in row]
    shown = [line.strip("| ").split(" | ") for line in table_of(section)[2:]]
    assert len(shown) == 3 and len({head.index("all") for head in heads}) == 1
    for arm, paper, here in shown:
        row, = [row for row in tables if row[:2] == [f"| {arm}", paper]]
        assert here == row[heads[0].index("all")], arm
    gains = re.findall(r"[+-]\d+\.\d ± \d+\.\d", section)
    assert gains and all(f"**, {gain} points" in page for gain in gains)
    losses = page.split("\n**Losses")[1].split("\n**")[0]
    widest = max(re.findall(r"± (\d+\.\d)", losses), key=float)
    assert f"between losses (up to ± {widest})" in section


@pytest.mark.parametrize(("benchmark", "peer", "ours"), [
    ("decode", "transformers", "ours"), ("step", "TRL fp32", "ours"), ("step", "TRL bf16", "ours bf16"),
    ("prefix", "plain packed", "ours"), ("sampling", "multinomial", "ours"), ("sampling", "sort", "ours"),
    ("logprob", "Liger", "ours"), ("logprob", "torch.compile", "ours")])
def test_table_of_speed_is_that_of_the_measured_rows(benchmark, peer, ours):
    measured = {row["who"]: row for row in json.loads(text_of(RESULTS / f"{benchmark}.json"))["rows"]}
    table = table_of(section_of(RESULTS_PAGE, "Speed"))
    row = next(i for i, line in enumerate(table) if line.startswith(f"| `{benchmark}`"))
    # The row of bf16 follows that of fp32.
    _, _, our_cell, peer_cell, ratio_cell, _ = table[row + (peer == "TRL bf16")].split("|")

    def seconds(who):
        digits = 3 if measured[who]["seconds"] < 0.1 else 2
        return f"{measured[who]['seconds']:.{digits}f} s"

    ratio = measured["TRL's best, and our best" if peer == "TRL bf16" else peer]
    digits = 1 if ratio["x"] > 10 else 2
    assert our_cell.strip() == seconds(ours) and seconds(peer) in peer_cell
    assert f"{ratio['x']:.{digits}f}" in ratio_cell
    if "to" in ratio_cell:
        assert f"({ratio['x_low']:.2f} to {ratio['x_high']:.2f})" in ratio_cell


def test_step_is_as_many_times_as_fast_as_the_readme_says():
    rows = {row["who"]: row for row in json.loads(text_of(RESULTS / "step.json"))["rows"]}
    times = re.search(r"([\d.]+) times as fast as\s+TRL", text_of(README))[1]
    assert times == f"{rows['TRL fp32']['x']:.2f}"


def test_committed_figures_are_what_the_script_draws_from_the_committed_numbers():
    drawn = {"demo": figures.draw_demo, "real": figures.draw_real}
    assert {file.stem for file in figures.ASSETS.glob("*.svg")} == {
        name for name in drawn if (RESULTS / f"{name}.json").exists()}
    for file in figures.ASSETS.glob("*.svg"):
        assert text_of(file) == drawn[file.stem](json.loads(text_of(RESULTS / f"{file.stem}.json")))


def test_figure_shows_every_seed_the_last_means_and_the_control(demo, curves):
    figure = figures.draw_demo({"rows": demo, "curves": curves})
    assert curves["steps"][0] == 0 and figures.y_of(100) == figures.TOP
    for split, label in figures.SPLITS.items():
        assert len(curves[split]) == len(demo[split]["right"]) == 3
        assert f"{label} {statistics.mean(seed[-1] for seed in curves[split]):.1f}</text>" in figure
        assert f"imitation {statistics.mean(demo[split]['right']):.1f}</text>" in figure
        for seed in curves[split]:
            assert len(seed) == len(curves["steps"]) and f",{figures.y_of(seed[-1])}\"" in figure


def test_the_figure_of_the_real_run_shows_both_seeds_and_the_end_of_the_controls():
    figure = figures.draw_real({"curves": {
        "imitation": [[0, 0.0], [4, 0.5]], "control-1": [[0, 0.5], [9, 0.6]],
        "control-2": [[0, 0.5], [9, 0.7]],
        "grpo-1": [[0, 0.5], [25, 0.6], [40, 0.8]], "grpo-2": [[0, 0.5], [25, 0.7], [40, 0.9]]}})
    assert "GRPO 85.0</text>" in figure and "imitation 65.0</text>" in figure
    x, end = figures.LEFT + (figures.RIGHT - figures.LEFT) * 25 / 40, figures.RIGHT
    for middle, last in ((60, 80), (70, 90), (65, 85)):
        assert f" {x},{figures.y_of(middle)} {end}.0,{figures.y_of(last)}\"" in figure


def test_labels_of_the_figure_keep_their_distance():
    axis = figures.draw("", "", {}, [0, 50, 100, 102], {}, {}).partition('class="middle">')[2]
    assert [int(step) for step in re.findall(r'"middle">(\d+)<', 'class="middle">' + axis)] == [0, 50, 102]
    placed = sorted(figures.apart({"a": 100.0, "b": 101.0, "c": 90.0, "d": 300.0}).values())
    assert placed == [90.0, 105.0, 120.0, 300.0]


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_names_a_file_and_a_heading_that_exist(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_every_target_of_make_in_a_page_exists(page):
    folders = "assets|benchmarks|configs|converters|fast|runtime|tests|tools"
    names = rf"(?<![\w./-])((?:{folders})/[\w/]+\.(?:py|yaml|json|txt|sh|svg))"
    for name in re.findall(names, text_of(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    targets = re.search(r"^\.PHONY: (help .+)$", text_of(ROOT / "Makefile"), re.M)[1].split()
    assert set(re.findall(r"(?:`|^|\$ )make ([a-z-]+)", text_of(page), re.M)) <= set(targets)


def definitions(name):
    """The names that a Python file defines at its top."""
    nodes = ast.parse(text_of(ROOT / name)).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_files_define_what_the_readme_names():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \| (.+) \|$", section_of(README, "The files"), re.M)
    assert len(rows) == 7
    for name, lines, words in rows:
        assert int(lines) == text_of(ROOT / name).count("\n"), name
        assert set(re.findall(r"`(\w+)`", words)) <= definitions(name), name
    for name, definition in re.findall(r"`(\w+)\.(\w+)` \|$", section_of(README, "The equations"), re.M):
        assert definition in definitions(f"{name}.py")
    for definition, name in re.findall(r"`(\w+)` in `(\w+\.py)`", section_of(README, "To change X, edit Y")):
        assert definition in definitions(name)


@pytest.mark.parametrize("room", ["fast", "runtime", "converters", "benchmarks", "tools"])
def test_readme_names_every_module_of_a_room(room):
    words = re.search(rf"^\| `{room}/` \| (.+) \|$", section_of(README, "The files"), re.M)[1]
    files = [path for path in (ROOT / room).iterdir() if path.suffix in (".py", ".sh")]
    modules = {path.name if path.suffix == ".sh" else path.stem for path in files} - {"__init__"}
    assert set(re.findall(r"`([\w.]+)`", words)) == modules


def test_readme_has_at_most_16_kB():
    assert len(README.read_bytes()) <= 16_000


def test_example_and_tools_that_the_readme_shows_are_read(tmp_path):
    text = text_of(README)
    (tmp_path / "mine.jsonl").write_text(text.split("```json\n")[1].split("```")[0])
    assert len(read_jsonl(tmp_path / "mine.jsonl")) == 1
    tool, = read_tools(ROOT / re.search(r"--tools (assets/\S+)", text)[1])
    known = {tool["name"]: tool for example in synthetic(2000, 0, "train") for tool in example.tools}
    world = json.loads(text_of(ROOT / "assets" / "synthetic.json"))
    assert tool["description"] == known[tool["name"]]["description"]
    for name, schema in tool["parameters"]["properties"].items():
        assert schema == world["parameters"][name]["schema"]
        assert name in world["nouns"][tool["name"].split("_")[1]]["parameters"]
