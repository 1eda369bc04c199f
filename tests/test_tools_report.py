"""tools/report.py: what its page says of a run, that no reply acts in it, how it behaves in a browser."""

import base64
import fcntl
import gzip
import html
import json
import math
import random
import re
from pathlib import Path

import pytest
import yaml
from browser import Browser

from data import write_jsonl
from reward import format_reply, score
from tools import report
from tools.synthetic import synthetic

STEPS, G, PROMPTS = 12, 4, 3
SCRIPT = "<script>window.acted = 1</script><img src=x onerror='window.acted = 1'>"
OLD_RUN = Path("tests/old_run/run")


def row_of(step, **changes):
    names = [name for _, metrics, _ in report.CHARTS for name in metrics
             if not name.startswith(("eval", "memory"))]
    return {"step": step, "tokens": 1000, "epoch": step / 10, "skipped_updates": 0, "reward/raised": 0,
            **{name: 0.5 for name in names}, "reward/all_one": 0.25, "length/cut": 0.0, "kl": 0.001 * step,
            "sampling/logp_diff_mean": 1e-6, "reward/mean": step / STEPS, "time/step_s": 30.0, **changes}


def line_of(example, reply, rewards):
    verdict = score(reply, example.answer)
    spread = 1.0 if len(set(rewards)) > 1 else 0.0
    return {"id": example.id, "query": example.messages[-1]["content"], "answer": example.answer,
            "reply": reply, "reward": verdict.reward, "error": verdict.error,
            "advantage": spread * (verdict.reward - 0.5), "tokens": 20, "logp": -1.0, "finished": True}


def wrong_calls(example):
    """The right calls with an argument of another value, or a call where none is right."""
    calls = json.loads(json.dumps(example.answer)) or [{"name": "other", "arguments": {}}]
    calls[0]["arguments"] = {**calls[0]["arguments"], "surplus": 1}
    return calls


def evaluation(step, examples, right):
    """A report of an evaluation in which the examples at the indices `right` are right."""
    replies = []
    for i, example in enumerate(examples):
        reply = format_reply(example.answer if i in right else wrong_calls(example), "because")
        verdict = score(reply, example.answer)
        replies.append({"id": example.id, "category": example.source,
                        "query": example.messages[-1]["content"], "answer": example.answer, "reply": reply,
                        "right": verdict.reward == 1, "format_ok": True, "names_ok": verdict.names_ok,
                        "finished": True, "error": verdict.error})
    share = len(right) / len(examples)
    row = {"category": "all", "n": len(examples), "right": len(right), "accuracy": share, "low": share / 2,
           "high": (1 + share) / 2}
    return {"step": step, "rows": [{**row, "category": "values"}, row], "replies": replies}


def make_run(folder, rows=None, settings=(), change_lines=lambda lines: lines):
    """A finished run folder: rollouts at steps 1 and 10, evaluations before and after."""
    for name in ("rollouts", "evals"):
        (folder / name).mkdir(parents=True)
    train, heldout = synthetic(40, 0, "train"), synthetic(8, 0, "heldout")
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "heldout.jsonl", heldout)
    config = {"stage": "grpo", "seed": 0, "out": str(folder), "model.path": "assets/tiny",
              "model.precision": "fp32",
              "data.train": str(folder / "train.jsonl"), "data.heldout": str(folder / "heldout.jsonl"),
              "rollout.n": G, "train.steps": STEPS, **dict(settings)}
    tree = {}
    for key, value in config.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    rows = [row_of(step) for step in range(1, STEPS + 1)] if rows is None else rows
    ends = [{"step": step, "eval/all": share, "eval/values": share, "time/eval_s": 60.0}
            for step, share in ((0, 0.25), (STEPS, 0.5))]
    lines = [json.dumps(row) + "\n" for row in (ends[0], *rows, ends[1])]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step in (1, 10):
        lines = []
        for p, example in enumerate(train[step:step + PROMPTS]):
            right, wrong = format_reply(example.answer, "right"), format_reply(wrong_calls(example), "wrong")
            replies = [wrong, right, f"no {SCRIPT} \ud800 \u2028 call", wrong][:G] if p == 0 else [right] * G
            rewards = [score(reply, example.answer).reward for reply in replies]
            lines += [line_of(example, reply, rewards) for reply in replies]
        (folder / f"rollouts/step_{step:06d}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in change_lines(lines)))
    for step, right in ((0, {0, 1}), (STEPS, {1, 2, 3, 4})):
        (folder / f"evals/step_{step:06d}.json").write_text(json.dumps(evaluation(step, heldout, right)))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run")


def part(page, index):
    text = re.search(f"id='part{index}'>(.*?)</script>", page)[1]
    return json.loads(gzip.decompress(base64.b64decode(text)))


def listed(page):
    """What the page knows of its only run."""
    only, = json.loads(re.search("id='data'>(.*?)</script>", page)[1])["runs"]
    return only


def read(folder):
    return report.read_run(folder, "run")


def with_rows(run, **changes):
    """The run with these metrics, lists over the steps."""
    found = read(run)
    return found._replace(steps=[row | {name: values[i] for name, values in changes.items()}
                                 for i, row in enumerate(found.steps)])


def warned(run):
    """{a step: the warnings whose first step it is, as text}"""
    found = {}
    for steps, cause in report.warnings(run, report.read_meanings()):
        found.setdefault(tuple(steps), []).append(html.unescape(re.sub("<[^>]*>", "", cause)))
    return found


# ---- docs/metrics.md
def test_every_metric_of_a_chart_has_its_meaning_and_its_healthy_range_in_the_docs():
    meanings = report.read_meanings()
    metrics = {re.sub("^eval/.*", "eval/…", name) for _, names, _ in report.CHARTS for name in names}
    assert metrics <= set(meanings)
    assert all(formula and healthy for _, formula, healthy in meanings.values())
    assert {"length/min", "length/max", "sampling/logp_diff_max", "skipped_updates"} <= set(meanings)
    assert "|log π_old" in meanings["sampling/logp_diff_mean"][1]  # an escaped bar does not end a cell


def test_the_limits_of_warnings_are_those_of_the_docs():
    meanings = report.read_meanings()
    assert f"below {report.LARGEST_CUT}" in meanings["length/cut"][2]
    assert "fp32: below 10⁻⁴; bf16: mean below 5·10⁻³" in meanings["sampling/logp_diff_mean"][2]
    assert report.LARGEST_DIFF == {"fp32": 1e-4, "bf16": 5e-3}


# ---- summary
def test_a_healthy_run_has_no_warning(run):
    assert warned(read(run)) == {}
    assert "No warnings." in report.make_page([run])


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("reward/live", 0.0, "no group had a reply that earned more than another"),
        ("reward/commonest", 0.97, "the policy has collapsed; go back to an earlier checkpoint"),
        ("length/cut", 0.06, "the model does not stop"),
        ("sampling/logp_diff_mean", 2e-4, "sampler and trainer disagree"),
        ("skipped_updates", 1, "three steps in a row stop the run"),
        ("reward/raised", 2, "correct your edit of reward.py"),
    ],
)
def test_a_step_outside_the_healthy_range_is_a_warning_with_advice(run, metric, value, words):
    before = read(run).steps[0][metric]
    changed = with_rows(run, **{metric: [before] * 4 + [value] * 2 + [before] * 6})
    (steps, (cause,)), = warned(changed).items()
    assert steps == (5, 6) and words in cause


def test_a_jump_of_the_kl_is_a_warning_and_a_slow_rise_is_not(run):
    assert warned(with_rows(run, kl=[0.09 * i for i in range(STEPS)])) == {}
    (steps, (cause,)), = warned(with_rows(run, kl=[0.01] * 6 + [0.2] * 6)).items()
    assert steps == (7,) and "train.lr is too high" in cause


def test_in_bf16_sampler_and_trainer_may_differ_more(run):
    differing = with_rows(run, **{"sampling/logp_diff_mean": [2e-3] * STEPS})
    assert list(warned(differing)) == [tuple(range(1, STEPS + 1))]
    assert warned(differing._replace(settings=differing.settings | {"model.precision": "bf16"})) == {}


def test_only_settings_that_differ_from_the_defaults_are_listed(run, tmp_path):
    def settings(*folders):
        text = report.summary([read(folder) for folder in folders], report.read_meanings())
        return re.findall("<th scope='row'><code>(.*?)</code>( ≠)?</th>", text)

    shown = ["model.path", "model.precision", "data.train", "data.heldout", "rollout.n", "train.steps"]
    assert settings(run) == [(name, "") for name in shown]
    other = make_run(tmp_path / "other", settings={"train.lr": 0.01}.items())
    assert dict(settings(run, other)) == {
        **dict.fromkeys(shown, ""), "data.train": " ≠", "data.heldout": " ≠", "train.lr": " ≠"}


def test_accuracies_are_first_and_last_with_intervals(run):
    text = report.accuracies(read(run))
    first, last = "25.0 % <small>[12.5, 62.5] of 8</small>", "50.0 % <small>[25.0, 75.0] of 8</small>"
    assert text.index("step 0") < text.index(f"step {STEPS}") < text.index(first) < text.index(last)


def test_the_end_of_a_run_is_read_from_what_it_left(run, tmp_path):
    whole = read(run)
    assert report.exit_state(whole) == f"finished after step {STEPS} of {STEPS}"
    cut = whole._replace(steps=whole.steps[:7])
    assert report.exit_state(cut) == f"stopped after step 7 of {STEPS}; the same command resumes it"
    skipped = [row | {"skipped_updates": 1} for row in cut.steps]
    assert "diverged" in report.exit_state(cut._replace(steps=cut.steps[:4] + skipped[4:]))
    assert "diverged" not in report.exit_state(cut._replace(steps=cut.steps[:5] + skipped[5:]))
    dead = [row | {"reward/live": 0.0} for row in whole.steps[:11]]
    assert "nothing to learn from" in report.exit_state(whole._replace(steps=dead))
    timed = whole._replace(steps=cut.steps, settings=whole.settings | {"train.max_minutes": 3.5})
    assert "finished after step 7" in report.exit_state(timed)
    assert report.exit_state(whole._replace(steps=[])) == "no step was completed"
    (tmp_path / "lock").touch()
    assert not report.is_at_work(tmp_path)
    with open(tmp_path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert report.exit_state(whole._replace(folder=tmp_path)) == "at work"


def test_steps_from_epochs_are_found_from_the_logged_epoch(run):
    settings = {**read(run).settings, "train.steps": None, "train.epochs": 2, "train.prompts_per_step": 4}
    # 12 steps of 4 prompts are 1.2 epochs, so there are 40 examples and 20 steps.
    assert report.planned_steps(read(run)._replace(settings=settings)) == 20


def test_a_row_that_is_still_being_written_is_left_out(run, tmp_path):
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "rew')
    assert read(folder).steps == read(run).steps


# ---- curves
def points_of(svg):
    return [len(text.split()) for text in re.findall(r"<polyline[^>]*points='([^']*)'", svg)]


def test_seeds_of_one_config_are_a_mean_with_a_band_and_another_config_is_a_line(run, tmp_path):
    data = {key: read(run).settings[key] for key in ("data.train", "data.heldout")}
    seed = make_run(tmp_path / "seed", settings={**data, "seed": 1}.items(),
                    rows=[row_of(step, **{"reward/mean": 0.5}) for step in range(1, STEPS + 1)])
    other = make_run(tmp_path / "other", settings={**data, "train.lr": 0.01}.items())
    runs = [read(folder) for folder in (run, seed, other)]
    (_, _, series, _), *_ = report.charts_of(runs)[0]
    assert [colour for _, colour, _, _ in series] == [0, 1]
    both, alone = (points for *_, points in series)
    assert both[2] == (3, pytest.approx((3 / STEPS + 0.5) / 2), 3 / STEPS, 0.5)
    assert alone[2] == (3, 3 / STEPS, 3 / STEPS, 3 / STEPS)
    svg = report.draw("Reward", series, (0, 1), 0, STEPS)
    assert svg.count("class='band") == 1 and points_of(svg) == [STEPS, STEPS]


def test_seeds_that_start_from_runs_of_their_seed_are_one_line(run, tmp_path):
    def start_from(path, seed):
        settings = {"data.train": "t", "data.heldout": "h", "seed": seed, "model.path": path}
        return read(make_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", settings=settings.items()))

    path = "runs/{}-{}/checkpoints/step_000018"
    a0, a12, b0 = (start_from(path.format(*of), of[1]) for of in (("a", 0), ("a", 12), ("b", 0)))
    other = start_from(path.format("a", 0), 1)
    assert report.groups_of([a0, b0, a12, other]) == [[a0, a12], [b0], [other]]


def test_a_value_that_is_not_finite_is_a_gap(run, tmp_path):
    rows = [row_of(step, grad_norm=math.nan if step == 5 else 1.0) for step in range(1, STEPS + 1)]
    page = report.make_page([make_run(tmp_path / "run", rows=rows)])
    figure = page[page.index("<h3>Gradient norm"):page.index("<h3>Loss")]
    assert points_of(figure)[1:] == [4, 7]  # the first is the key's


def test_a_spike_does_not_flatten_a_curve():
    assert report.limits_of([1.0] * 99 + [1e4], None) == (1.0, 1.5)
    assert report.limits_of([1.0] * 50 + [2.0] * 50, None) == (0, 2.0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.037), (-0.2, 0.15), (3, 3001), (1e-7, 2e-7)])
def test_ticks_are_round_and_within_the_axis(low, high):
    found = report.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low <= x <= high + 1e-12 for x in found)
    assert len(set(map(report.short, found))) == len(found)


def test_memory_that_no_run_logged_is_named_and_has_no_chart(run):
    charts, _, _ = report.curves([read(run)], report.read_meanings())
    assert "Not logged: Memory." in charts and "<h3>Memory" not in charts


# ---- replies
def test_a_prompt_has_the_tools_and_turns_of_its_example_unless_that_has_changed(run, tmp_path):
    page = report.make_page([run])
    prompt, *_ = part(page, 0)
    example = synthetic(40, 0, "train")[1]
    assert prompt["tools"] == example.tools and prompt["messages"] == example.messages
    moved = make_run(tmp_path / "run")
    write_jsonl(moved / "train.jsonl", [example.__class__(**{**vars(example), "messages": [
        {"role": "user", "content": "another query"}]})])
    prompt, *_ = part(report.make_page([moved]), 0)
    assert prompt["tools"] is None and prompt["messages"] == [{"role": "user", "content": prompt["query"]}]


def test_texts_of_arguments_are_equal_exactly_where_the_reward_takes_the_values_for_equal():
    values = [1, 1.0, True, "1", None, [1, 2], [2, 1], {"a": 1, "b": 2}, {"b": 2, "a": 1}, 0.0, -0.0, 0]
    for a in values:
        for b in values:
            pair = [[{"name": "f", "arguments": {"x": x}}] for x in (a, b)]
            (_, one), = report.call_texts(pair[0])
            (_, other), = report.call_texts(pair[1])
            # The reply is read again from text, as the reward reads it.
            assert (one == other) == (score(format_reply(pair[1]), pair[0]).reward == 1), (a, b)


def test_the_tokens_that_a_run_kept_are_in_the_page_with_null_where_no_pass_ran(tmp_path):
    def add_tokens(lines):
        for i, line in enumerate(lines):
            passed = i % 2 == 0
            line |= {"pieces": ["a", "\ufffd"], "sampler_logp": [-0.5, -1.25],
                     "trainer_logp": [-0.5, math.nan] if passed else None,
                     "entropy": [0.25, 2] if passed else None}
        return lines

    prompt, *_ = part(report.make_page([make_run(tmp_path / "run", change_lines=add_tokens)]), 0)
    assert [reply["tokens"] for reply in prompt["replies"][:2]] == [
        [["a", "\ufffd"], [-50, -125], [0, None], [25, 200]], [["a", "\ufffd"], [-50, -125], None, None]]


def test_supervised_runs_have_no_replies_to_show(tmp_path):
    folder = make_run(tmp_path / "run", change_lines=lambda lines: [{"id": "x", "messages": []}])
    assert listed(report.make_page([folder]))["rollouts"] == []


def test_evenly_spaced_files_have_the_first_and_the_last_and_stay_within_the_bytes():
    assert report.evenly(list(range(10)), lambda _: 1, 10) == list(range(10))
    assert report.evenly(list(range(9)), lambda _: 1, 5) == [0, 2, 4, 6, 8]
    assert report.evenly([3, 4, 5], lambda _: 100, 5) == [3, 5]
    assert report.evenly([3], lambda _: 100, 5) == [3] and report.evenly([], len, 5) == []


def test_files_that_are_left_out_are_counted_on_the_page(run, monkeypatch):
    monkeypatch.setattr(report, "MOST_READ", 1)
    folder = read(run)
    known, _ = report.parts_of(folder._replace(rollouts=folder.rollouts[:1] * 2 + folder.rollouts), 1)
    assert known["note"] == "run: shown are 2 of 4 files of rollouts. "


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of 1,000 steps and 10,000 kept rollouts of random words, which gzip shrinks little."""
    folder = make_run(tmp_path_factory.mktemp("large") / "run", rows=[row_of(i) for i in range(1, 1001)])
    rng = random.Random(0)
    for file in folder.glob("rollouts/*"):
        file.unlink()
    examples = synthetic(40, 0, "train")
    for k in range(100):
        lines = []
        for i in range(100):
            words = " ".join(f"{rng.getrandbits(24):x}" for _ in range(80))
            lines.append(line_of(examples[i // G], format_reply(examples[i // G].answer, words), [0, 1]))
        (folder / f"rollouts/step_{10 * k + 10:06d}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines))
    page = report.make_page([folder])
    (folder / "report.html").write_text(page)
    return folder / "report.html"


def test_a_run_of_1000_steps_with_10000_rollouts_makes_a_page_below_20_megabytes(large):
    page = large.read_text()
    assert len(page.encode()) < 20e6
    assert sum(replies for _, replies in listed(page)["rollouts"]) == 10_000 and listed(page)["note"] == ""


# ---- the page as text
def test_nothing_that_a_reply_or_a_file_wrote_is_html(tmp_path):
    folder = make_run(tmp_path / "<b>name", settings={"model.path": SCRIPT}.items())
    page = report.make_page([folder])
    assert "<b>name" not in page and "window.acted" not in page.replace(html.escape(SCRIPT), "")
    assert page.encode()  # no lone surrogate is left
    assert not re.search(r"(src|href)=[\"'](?!#)", page)


def test_the_same_run_makes_the_same_page(run):
    assert report.make_page([run]) == report.make_page([run])


def test_a_run_of_an_earlier_version_has_a_page():
    page = report.make_page([OLD_RUN])
    assert "finished after step 4 of 4" in page and page.count("<figure>") == len(report.CHARTS) - 1


def test_the_program_says_where_the_page_is(run, tmp_path, capsys):
    report.main([str(run), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.startswith(f"report: {tmp_path}/page.html (")
    assert (tmp_path / "page.html").read_text() == report.make_page([run])
    other = make_run(tmp_path / "other")
    report.main([str(other)])
    report.main([str(other), str(run)])
    assert (other / "report.html").exists() and (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", None, "no config.yaml there; give the folder of a run"),
        ("metrics.jsonl", "{}\n{\n", "metrics.jsonl:2: not JSON"),
        ("evals/step_000000.json", "[", "step_000000.json: not a readable JSON file"),
        ("rollouts/step_000001.jsonl", "x\n", "step_000001.jsonl:1: not JSON"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line_and_status_2(tmp_path, capsys, name, text, words):
    folder = make_run(tmp_path / "run")
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(folder)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error


# ---- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, run):
    report.main([str(run)])
    browser.visit(run / "report.html")
    return browser


ALL = """const all = (selector, of = document) => [...of.querySelectorAll(selector)];
const texts = selector => all(selector).map(each => each.textContent);
const set = (element, value, kind) => { element.value = value; element.dispatchEvent(new Event(kind)); };"""


def ask(page, expression):
    return page.run(f"(() => {{ {ALL} return {expression} }})()")


def do(page, statements):
    return page.run(f"(() => {{ {ALL} {statements} }})()")


def status(page, section, text):
    page.until(f"document.querySelector('#{section} [role=status]').textContent === '{text}'")


def test_no_request_leaves_the_file_and_nothing_is_logged(page, run):
    do(page, "for (const each of all('details')) each.open = true;")
    assert [event["request"]["url"] for event in page.of("Network.requestWillBeSent")] == [
        f"file://{run}/report.html"]
    assert page.of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []


def test_the_curves_have_as_many_points_as_the_run_has_steps(page):
    counts = ask(page, "all('figure').map(figure => [figure.querySelector('h3').textContent, "
                       "...all(':scope > svg polyline', figure).map(line => line.points.numberOfItems)])")
    assert len(counts) == len(report.CHARTS) - 1
    for heading, *points in counts:
        assert set(points) == {2 if heading == "Held-out accuracy" else STEPS}, heading


def test_a_click_on_a_rollout_shows_its_verdict(page):
    do(page, "all('#rollouts .prompts button')[0].click()")
    summaries = ask(page, "texts('#rollouts .reply > summary')")
    assert ["reward 1" in text for text in summaries] == [True, False, False, False]  # sorted by reward
    assert ask(page, "all('#rollouts .verdict').length") == 0  # a row is filled when it is opened
    do(page, "all('#rollouts .reply > summary')[1].click()")
    page.until("document.querySelectorAll('#rollouts .verdict').length === 1")
    assert "surplus" in ask(page, "all('#rollouts .verdict')[0].textContent")
    assert ask(page, "all('#rollouts .differs').map(row => row.textContent)") == ["surplusabsent1"]
    assert ask(page, "all('#rollouts .reply pre')[0].textContent") == "wrong"
    assert "Tools (" in ask(page, "all('#rollouts .detail details > summary')[0].textContent")


def test_a_reply_with_a_script_and_half_a_surrogate_is_text_and_runs_nothing(page):
    do(page, "for (const each of all('.reply')) each.open = true;")
    page.until("document.querySelectorAll('#rollouts .verdict').length >= 4")
    found = ask(page, "texts('#rollouts .reply pre').filter(text => text.includes('acted'))")
    assert [text.count(SCRIPT) for text in found] == [1]
    assert ask(page, "typeof window.acted") == "undefined"


def test_a_script_that_got_into_the_page_would_not_run(page):
    do(page, """const script = document.createElement('script'), image = document.createElement('img');
                script.textContent = 'window.acted = 1';
                image.src = 'https://example.com/x.png';
                document.body.append(script, image);""")
    page.until("document.images.length === 1 && document.images[0].complete")
    assert ask(page, "typeof window.acted") == "undefined"
    texts = [entry["entry"]["text"] for entry in page.of("Log.entryAdded")]
    assert ["Content Security Policy" in text for text in texts] == [True, True]


def test_rollouts_are_filtered_by_step_reward_reason_and_text(page):
    def choose(label, value, kind="input"):
        do(page, f"""const labels = all('#rollouts .controls label');
            const label = labels.find(each => each.firstChild.textContent === '{label}');
            set(label.lastChild, `{value}`, '{kind}');""")

    status(page, "rollouts", f"{PROMPTS} prompts, {PROMPTS * G} replies")
    choose("reward from", "1")
    status(page, "rollouts", f"{PROMPTS} prompts, {PROMPTS * G - 3} replies")
    choose("reward from", "")
    choose("to", "0.5")
    status(page, "rollouts", "1 prompts, 3 replies")
    choose("to", "")
    kinds = ask(page, "all('#rollouts option').map(each => each.value)")
    choose("reason", next(kind for kind in kinds if kind.startswith("the reply does not")))
    status(page, "rollouts", "1 prompts, 1 replies")
    choose("reason", "")
    choose("text", "ACTED")
    status(page, "rollouts", "1 prompts, 1 replies")
    choose("step", "all", "change")
    status(page, "rollouts", "2 prompts, 2 replies")


def test_held_out_replies_that_became_right_or_wrong_are_found(page):
    options = ask(page, "all('#heldout select')[2].textContent")
    assert options == ("was wrong, became right (3)was right, became wrong (1)wrong in both (3)"
                       "right in both (1)all (8)")
    do(page, "set(all('#heldout select')[2], 'wrong', 'change')")
    status(page, "heldout", "1 prompts, 2 replies")
    page.until("document.querySelectorAll('#heldout .verdict').length === 2")
    kinds = ask(page, "all('#heldout .verdict').map(each => each.className)")
    assert kinds == ["verdict right", "verdict wrong"]
    assert ask(page, "texts('#heldout .reply > summary b')") == ["step 0", f"step {STEPS}"]


def test_arrow_keys_and_the_pointer_read_the_value_of_a_step(page):
    do(page, "all('figure > svg')[0].focus()")
    for _ in range(3):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert ask(page, "all('figure output')[0].textContent") == f"step 3\nreward/mean {3 / STEPS}"
    do(page, "all('figure > svg')[0].blur(); window.scrollTo(0, 0)")
    assert ask(page, "all('figure output')[0].textContent") == ""
    do(page, "all('figure > svg')[0].scrollIntoView()")
    box = ask(page, "all('figure > svg')[0].getBoundingClientRect().toJSON()")
    at = report.LEFT + (report.RIGHT - report.LEFT) * 6 / STEPS  # of an axis from 0
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + box["width"] * at / report.WIDTH,
              y=box["y"] + box["height"] / 2)
    page.until(f"document.querySelector('figure output').textContent === 'step 6\\nreward/mean {6 / STEPS}'")


def test_everything_that_can_be_clicked_can_be_reached_by_the_keyboard(page):
    active = "button, summary, select, input, a, figure > svg, .scroll"
    assert ask(page, f"all('{active}').length > 20 && all('{active}').every(each => each.tabIndex >= 0)")
    do(page, "all('#rollouts .prompts button')[1].focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", text="\r")
    assert ask(page, "all('#rollouts .prompts button').map(each => each.ariaCurrent)") == [None, "true", None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_readers_setting_and_fits_400_pixels(browser, run, scheme):
    report.main([str(run)])
    browser.visit(run / "report.html", width=400, scheme=scheme)
    assert ask(browser, "document.documentElement.scrollWidth") == 400
    style = "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    back, text = (sum(map(int, re.findall(r"\d+", colour))) for colour in ask(browser, style))
    assert (back > 600 and text < 150) if scheme == "light" else (back < 150 and text > 600)


def test_a_printed_page_is_light_and_without_controls(page):
    page.call("Emulation.setEmulatedMedia", media="print",
              features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert ask(page, "getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert ask(page, "getComputedStyle(all('.controls')[0]).display") == "none"
    assert ask(page, "getComputedStyle(all('figure')[0]).display") == "block"
    page.call("Emulation.setEmulatedMedia", media="")


def test_a_large_page_unpacks_and_fills_in_only_what_is_looked_at(browser, large):
    browser.visit(large)
    assert browser.run("unpacked.size") == 4  # the last step, two evaluations, their prompts
    assert ask(browser, "all('#rollouts .reply').length") == G
    assert ask(browser, "all('figure > svg')[0].querySelector('polyline').points.numberOfItems") == 1000


def test_tokens_are_coloured_by_ratio_or_entropy(browser, tmp_path):
    def add_tokens(lines):
        return [line | {"pieces": ["<script>", "b"], "sampler_logp": [-0.5, -1.0],
                        "trainer_logp": [-0.5, -1.2], "entropy": [0.0, 2.0]} for line in lines]

    folder = make_run(tmp_path / "run", change_lines=add_tokens)
    report.main([str(folder)])
    browser.visit(folder / "report.html")
    do(browser, "all('#rollouts .reply > summary')[0].click()")
    browser.until("document.querySelectorAll('#rollouts .tokens span').length === 2")
    colours = "all('#rollouts .tokens span').map(each => each.style.backgroundColor)"
    assert ask(browser, colours) == ["rgba(230, 120, 0, 0)", "rgba(230, 120, 0, 0.65)"]
    do(browser, "set(all('#rollouts select').pop(), '1', 'change')")
    assert "log-prob ratio -0.2" in ask(browser, "all('#rollouts .tokens span')[1].title")
    assert ask(browser, colours)[1] == "rgba(230, 120, 0, 0.65)"
