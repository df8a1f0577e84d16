"""The page of all results: its text, what its cells open, and the numbers at its top. test_browser.py looks at it."""

import gzip
import json
import re
from base64 import b64decode
from dataclasses import replace
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from math import isfinite, nan, sqrt
from shlex import split

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from experiments.definitions.spec import Cell, Experiment, Measure, PaperResult
from experiments.definitions.tuning_curves import TUNING_CURVES
from experiments.planning.study import Study, Tuning, studies
from experiments.records import Store
from experiments.reporting import report
from experiments.reporting.cell_results import CellResult, Pair
from experiments.reporting.charts import Chart, Line, Subplot, curve
from experiments.reporting.layout import Entry, Panel, Table
from experiments.reporting.literature import CAPTION
from experiments.reporting.page import Page
from experiments.reporting.simulations import simulation_page
from experiments.reporting.statistics import Comparison, compare, compare_paired, mean_interval
from experiments.reporting.tuning_tables import format_setting
from experiments.reporting.web import findings
from experiments.reporting.web.cells import detail
from experiments.reporting.web.data import MAX_POINTS, chart_data
from experiments.reporting.web.index import ASSETS, LIBRARIES, TEMPLATES, index_html
from experiments.reporting.web.tables import fill_command, panel_view
from experiments.selection import EXPERIMENTS, SIMULATIONS
from lawn.errors import ConfigError
from tests.experiments.helpers import MINI, RESULTS, SHORT, TUNED, committed_page, records_in, run_experiment, unfolded
from tests.experiments.test_report import made_up
from tests.helpers import ROOT


class Tables(HTMLParser):
    """The cells of the tables of numbers, and the scripts, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[dict[str, str]] = []
        self.scripts: dict[str, str] = {}
        self._inside: list[str] | None = None
        self._script = ""
        self.feed(unfolded(text))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "td":
            self.cells.append({key.removeprefix("data-"): value for key, value in attributes.items()})
            self.cells[-1]["text"] = ""
            self._inside = []
        if tag == "button" and "data-cell" in attributes:
            self.cells[-1]["key"] = attributes["data-cell"]
        self._script = attributes.get("id", "") if tag == "script" else ""

    def handle_endtag(self, tag):
        if tag == "td":
            self.cells[-1]["text"] = " ".join(self._inside)
            self._inside = None
        if tag == "script":
            self._script = ""

    def handle_data(self, data):
        if self._inside is not None and data.strip():
            self._inside.append(data.strip())
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def detail(self, key: str) -> dict:
        return json.loads(gzip.decompress(b64decode(self.scripts[key])))


def pages_of(results, experiments) -> list[Page]:
    return [report.page_of(experiment, Store(results)) for experiment in experiments]


@pytest.fixture(scope="module")
def committed() -> Tables:
    return Tables((RESULTS / "index.html").read_text())


def test_the_committed_page_is_that_of_the_records():
    pages = [committed_page(name) for name in (*EXPERIMENTS, *SIMULATIONS)]
    text, committed = report.index(pages, RESULTS), (RESULTS / "index.html").read_text()
    assert unpacked(text) == unpacked(committed)
    assert len(committed) < 1.5e6
    said = findings.findings(pages)
    assert len(said) >= 4
    assert report.with_updated_blocks(ROOT / "README.md", pages, said) == (ROOT / "README.md").read_text()


def unpacked(text: str) -> str:
    """Versions of zlib pack differently."""
    packed = r'(?<=<script type="application/gzip" id=")([\w.-]+">)(.*?)(?=</script>)'
    return re.sub(packed, lambda found: found[1] + gzip.decompress(b64decode(found[2])).decode(), text)


def test_every_number_of_the_committed_page_is_that_of_its_records(committed):
    """From the files of the records alone."""
    checked = 0
    recorded = {file: records_in(RESULTS / file) for file in (f"runs/{p.name}" for p in (RESULTS / "runs").iterdir())}
    for cell in committed.cells:
        if "key" not in cell or "n" not in cell:
            continue
        detail = committed.detail(cell["key"])
        columns = list(zip(*(seed["values"] for seed in detail["seeds"]), strict=True))
        records = [recorded[seed["file"]][seed["record"]] for seed in detail["seeds"]]
        results = [record["result"] for record in records]
        headline = [r["last"][f"{r['split']}_{r['headline']}"] for r in results]
        assert [record["config"]["seed"] for record in records] == [seed["seed"] for seed in detail["seeds"]]
        if "calibration" not in detail["measures"][0]["title"]:
            assert columns[0] == pytest.approx(headline, rel=1e-5)
        values = np.asarray(columns[0])
        assert int(cell["n"]) == len(values) == len(records)
        assert float(cell["value"]) == pytest.approx(values.mean(), rel=1e-5)
        assert cell["text"].split()[0] == f"{values.mean():.2f}"
        if len(values) > 1:
            half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / sqrt(len(values))
            assert float(cell["low"]) == pytest.approx(values.mean() - half, rel=1e-5, abs=1e-9)
            spread = f"{values.mean() - half:.2f} to {values.mean() + half:.2f}, n={len(values)}"
            assert (spread if np.ptp(values) > 0 else f"n={len(values)}, all alike") in cell["text"]
        if "paper" in cell:
            assert float(cell["difference"]) == pytest.approx(values.mean() - float(cell["paper"]), abs=1e-3)
        checked += 1
    assert checked >= 30


def test_every_chosen_setting_and_tuning_score_is_that_of_its_record(committed):
    recorded = {}
    for path in (RESULTS / "tuning").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            recorded[record["command"].partition("run.py ")[2]] = record
    scores = sorted(
        record["result"]["last"][f"{record['result']['split']}_{record['result']['headline']}"]
        for record in recorded.values()
        if record["result"]["status"] == "done"
    )
    shown = [
        run["score"]
        for key in {cell["key"] for cell in committed.cells if "key" in cell}
        for rung in committed.detail(key)["rungs"]
        for run in rung["runs"]
        if run["score"] is not None
    ]
    assert len(shown) > 1000
    above = np.searchsorted(scores, shown)
    beside = [np.asarray(scores)[np.clip(above - k, 0, len(scores) - 1)] for k in (0, 1)]
    assert np.logical_or(*(np.isclose(each, shown, rtol=1e-5) for each in beside)).all()


def test_the_frame_in_a_short_grid_is_at_the_place_that_is_told(committed):
    framed = 0
    for key in {cell["key"] for cell in committed.cells if "key" in cell}:
        detail = committed.detail(key)
        told = dict(detail["tuning"]).get("place in the short search", "")
        chosen = [run for run in detail["rungs"][0]["runs"] if run["chosen"]] if told else []
        if told and not told.startswith("beyond"):
            scores = [run["score"] for run in detail["rungs"][0]["runs"] if run["score"] is not None]
            (run,) = chosen
            better = sum(score > run["score"] for score in scores)
            assert better < int(told.split()[0]) <= better + scores.count(run["score"])  # some scores are equal
            framed += 1
        else:
            assert chosen == []
    assert framed > 0


def test_the_gains_of_the_committed_page_are_those_of_the_comparisons(committed):
    pages = [committed_page(name) for name in EXPERIMENTS]
    gains = {f"{pair.gain.difference:.6g}": pair.gain.interval() for page in pages for pair in page.pairs}
    shown = [cell for cell in committed.cells if "gain" in cell]
    assert {cell["gain"] for cell in shown} <= set(gains)
    # Where a row has two rivals, the cell has the number of the first, and the words of both.
    words = " ".join(cell["text"] for cell in shown)
    assert all(f"{low:+#.3g} to {high:+#.3g} over" in words for low, high in gains.values())
    for cell in shown:
        low, high = gains[cell["gain"]]
        assert (float(cell["gain-low"]), float(cell["gain-high"])) == pytest.approx((low, high), rel=1e-5)
        assert f"{low:+#.3g} to {high:+#.3g} over" in cell["text"]
    pairs = [pair for page in pages for pair in page.pairs if isfinite(pair.paper)]
    printed = {f"over {pair.base}, paper {pair.paper:+.3g}" for pair in pairs}
    assert printed
    assert all(any(text in cell["text"] for cell in shown) for text in printed)


def test_a_cell_opens_the_comparisons_of_its_own_page():
    """Also where pages show the same runs: figure 2 compares other rows than table 2."""
    details: dict[str, str] = {}
    shown = []
    for page in map(committed_page, EXPERIMENTS):
        for view in (panel_view(page, panel, details) for panel in page.panels):
            shown += [cell for row in view.rows for cell in row.cells if cell.key]
    for cell in shown:
        opened = json.loads(gzip.decompress(b64decode(details[cell.key])))
        said = [words.partition(": ")[2].partition(" (")[0] for words in opened["gains"]]
        assert said == [gain for gain, _ in cell.gains]
    assert any(len(cell.gains) > 1 for cell in shown)


def test_what_a_cell_opens(results):
    text = index_html(pages_of(results, [MINI]), {})
    tables = Tables(text)
    adam, fails = (tables.detail(cell["key"]) for cell in tables.cells if "key" in cell)
    assert [seed["seed"] for seed in adam["seeds"]] == [0, 1]
    assert {seed["file"] for seed in adam["seeds"]} == {"runs/mini.jsonl"}
    records = records_in(results / "runs" / "mini.jsonl")
    first = records[adam["seeds"][0]["record"]]
    assert adam["command"] == first["command"]
    assert adam["fill"] == "python -m experiments run mini --only optim=adam"
    titles = [subplot["ylabel"] for subplot in adam["curves"]["rows"][0]]
    assert titles[:2] == ["training loss, nats", "test accuracy, %"]
    (loss,) = adam["curves"]["rows"][0][0]["lines"]
    assert loss["y"][0] == pytest.approx(
        np.mean([records[seed["record"]]["history"]["train_loss"][0] for seed in adam["seeds"]]),
        rel=1e-5,
    )
    assert adam["machine"]["hardware"]
    assert any(package.startswith("torch ") for package in adam["machine"]["packages"])
    assert (fails["failed"], fails["curves"]) == (True, None)
    assert [seed["status"] for seed in fails["seeds"]] == ["diverged"] * 2


def test_notes_have_no_signs_of_markdown():
    page = empty_page(MINI, [], notes=["a < b: `eps` ([tuning_curves](tuning_curves.md))"])
    text = unfolded(index_html([page], {}))
    assert '<li>a &lt; b: eps (<a href="#tuning_curves">tuning_curves</a>)</li>' in text


def test_a_cell_opens_the_numbers_of_its_table():
    """They are rounded once, not first to six digits."""
    result = made_up(Cell("Adam", ()), 63.34504666)
    environment = {"device": "", "cpu": "", "cores": 1, "git": "", "dirty": False, "packages": {}}
    result = replace(result, records=[replace(record, environment=environment) for record in result.records])
    (measured,) = detail(result, [Measure("headline", "test accuracy, %")], "", [], "")["measures"]
    assert f"{measured['mean']:.2f}" == f"{result.records[0].headline:.2f}" == "63.35"


def test_it_says_what_the_numbers_beside_the_literature_are():
    """Standard errors, where those of the tables are intervals."""
    page = empty_page(
        MINI, [], literature=Table(["", "HR@10, %"], [["Popularity", "45.31 (n=1)"]]), of_literature=CAPTION
    )
    text = unescape(unfolded(index_html([page], {})))
    assert "mean (standard error, number of seeds)" in text
    assert '<a href="#references">references</a>' in text


def test_it_says_what_its_numbers_are(results):
    text = unescape(unfolded(index_html(pages_of(results, [MINI]), {})))
    assert "Mean (95 % interval over seeds by Student's t, n seeds) at the last epoch" in text
    assert "(standard error, number of seeds)" not in text


def test_how_a_cell_was_tuned(tuned):
    tables = Tables(index_html(pages_of(tuned / "results", [TUNED]), {}))
    (detail,) = (tables.detail(cell["key"]) for cell in tables.cells if "key" in cell)
    grid = detail["rungs"][0]
    assert grid["axes"] == ["lr"]
    best = max((run for run in grid["runs"] if run["score"] is not None), key=lambda run: run["score"])
    chosen = [run for rung in detail["rungs"] for run in rung["runs"] if run["chosen"]]
    assert len({tuple(run["values"]) for run in chosen}) == 1
    assert detail["setting"].startswith("lr ")
    confirmed = {tuple(run["values"]) for run in detail["rungs"][-1]["runs"]}
    assert tuple(best["values"]) in confirmed
    assert tuple(chosen[0]["values"]) in confirmed
    assert dict(detail["tuning"])["runs: short + full + other seeds"].count("+") == 1


def test_data_cannot_end_its_script(results):
    evil = "</script><script>alert(1)</script>"
    page = pages_of(results, [MINI])[0]
    page = replace(page, title=evil, chart=Chart([[Subplot(evil, "x", "y", [Line(evil, 0, [1.0], [2.0])])]]))
    text = index_html([page], {})
    assert text.count("alert(1)") > 1
    assert "<script>alert(1)" not in text


def test_links_of_markdown_are_links_and_everything_else_is_text():
    linked = TEMPLATES.filters["linked"]
    assert linked('70 <sup>[0](runs/a.jsonl "b-s0")</sup>') == '70 <a href="runs/a.jsonl" title="b-s0">0</a>'
    assert linked("[Every run](tuning/a.csv)") == '<a href="tuning/a.csv">Every run</a>'
    assert linked("<b>") == "&lt;b&gt;"


def panel_commands() -> list[tuple[Experiment, str, set[Cell]]]:
    commands = []
    for experiment in EXPERIMENTS.values():
        cells = [CellResult(cell, None, [], Tuning(), []) for cell in experiment.cells]
        for title in dict.fromkeys(cell.panel for cell in experiment.cells):
            here = [o for o in cells if o.cell.panel == title]
            rows = [(o.cell.row, [Entry("", result=o, measure=experiment.measures[0])]) for o in here]
            page = empty_page(experiment, [Panel(title, [""], rows)])
            (command,) = re.findall(r": not run yet\. <code>(.*?)</code>", index_html([page], {}))
            commands.append((experiment, command, {o.cell for o in here}))
    return commands


def empty_page(experiment: Experiment, panels: list[Panel], **more) -> Page:
    given = {"summary": [], "provenance": "", "measured": "", "notes": [], "figure_shown": False}
    return Page(
        **{"name": experiment.name, "title": experiment.title, "frame": pd.DataFrame(), **given, **more},
        panels=panels,
        experiment=experiment,
    )


def test_the_command_of_an_empty_panel_runs_its_cells():
    seen = 0
    for experiment, command, cells in panel_commands():
        words = split(unescape(command))
        assert words[:5] == ["python", "-m", "experiments", "run", experiment.name]
        only = words[6:] if len(words) > 5 else []
        chosen = set(experiment.only(only).cells)
        assert cells <= chosen
        if only:
            assert chosen == cells
            seen += 1
    assert seen > 10
    with pytest.raises(ConfigError):
        EXPERIMENTS["table4"].only(["dataset=none"])


@given(st.lists(st.floats(-1e6, 1e6) | st.just(nan), min_size=1, max_size=700), st.data())
def test_curves_are_thinned(values, data):
    mark = data.draw(st.none() | st.integers(0, len(values) - 1))
    line = Line("a", 0, list(range(len(values))), values, low=values, high=values, mark=mark)
    (row,) = chart_data(Chart([[Subplot("", "x", "y", [line])]]))["rows"]
    (thin,) = row[0]["lines"]
    assert len(thin["x"]) == len(thin["y"]) == len(thin["low"]) <= MAX_POINTS + 2
    assert (thin["x"][0], thin["x"][-1]) == (0, len(values) - 1)
    assert mark is None or thin["x"][thin["mark"]] == mark
    for x, y in zip(thin["x"], thin["y"], strict=True):
        expected = values[int(x)]
        assert y is None if not isfinite(expected) else y == pytest.approx(expected, rel=1e-5)
    json.dumps(thin, allow_nan=False)


def test_the_interval_of_a_mean():
    low, high = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 / sqrt(3)  # of Student's t with 2 degrees of freedom, from a table
    assert (low, high) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    assert not any(map(isfinite, mean_interval([1.0])))
    assert not any(map(isfinite, mean_interval([])))


def pair(gain: float, spread: float, base: str = "Adam", column: str = "1k", paper: float = nan) -> Pair:
    ours = np.array([gain - spread, gain, gain + spread])
    compared = compare(ours, np.array([-0.1, 0.0, 0.1]))
    return Pair("P", column, base, "Adam-LAWN", compared, (3, 3), False, nan, paper)


def table_with(*pairs: Pair) -> Page:
    return empty_page(replace(MINI, name="table9"), [], pairs=pairs)


def test_what_is_said_of_the_comparisons():
    assert findings.findings([table_with()]) == []
    (few,) = findings.findings([table_with(pair(2.0, 0.1, paper=1.5), pair(2.0, 0.1, base="Adam, eps tuned"))])
    (sentence,) = few.comparisons  # of the same runs, under two names
    assert sentence.startswith("Better: Adam-LAWN against Adam, P, 1k: +2.00 (95 % interval +1.7")
    assert sentence.endswith("3 and 3 seeds; the paper +1.50).")
    assert few.text == ""
    assert few.pages == ("table9",)
    weak = replace(pair(2.0, 0.1), differences=(-7.4, -1.0))
    (said,) = findings.findings([table_with(weak)])
    assert said.comparisons[0].endswith(" seeds). But our Adam is 7.40 below the paper's: it may not be tuned as well.")
    (said,) = findings.findings([table_with(replace(weak, differences=(0.5, -1.0)))])
    assert said.comparisons[0].endswith(" seeds).")
    (said,) = findings.findings([table_with(replace(pair(-2.0, 0.1), differences=(-1.0, -7.4)))])
    assert said.comparisons[0].startswith("Worse: ")
    assert said.comparisons[0].endswith(" But our Adam-LAWN is 7.40 below the paper's: it may not be tuned as well.")
    gains = 3.0, 4.0, 0.1, -3.0, 0.2, 0.3, 0.4
    many = [pair(gain, 0.5, column=f"{i}k") for i, gain in enumerate(gains)]
    (said,) = findings.findings([table_with(*many)])
    assert "Of 7 comparisons, LAWN is better in 2, worse in 1, and 4 are not decided" in said.text
    assert said.text.endswith("(80 % power, uncorrected).")  # there are no marks
    assert said.comparisons == []
    (listed,) = said.tables
    assert listed.head == ["P", *(f"{i}k" for i in range(7))]
    ((name, first, second, third, fourth, *_),) = listed.rows
    assert name == "Adam-LAWN over Adam"
    assert (first, second) == ("better: +3.00 (+1.82 to +4.18)", "better: +4.00 (+2.82 to +5.18)")
    assert (third, fourth) == ("+0.10 (-1.08 to +1.28)", "worse: -3.00 (-4.18 to -1.82)")
    (said,) = findings.findings([table_with(*(replace(each, paper=1.25) for each in many))])
    needed = re.fullmatch(r"\+0\.10 \(.*?\) \[\+1\.25, (\d) seeds\]", said.tables[0].rows[0][3])
    assert needed is not None
    assert int(needed[1]) == many[2].gain.seeds_needed(1.25)
    assert said.tables[0].rows[0][1] == "better: +3.00 (+1.82 to +4.18) [+1.25]"
    (said,) = findings.findings([table_with(*(replace(each, paper=1.35) for each in many))])
    assert said.tables[0].rows[0][3] == "+0.10 (-1.08 to +1.28) [+1.35]"  # which the interval leaves out
    below = [replace(each, differences=(-1.0, 2.0)) for each in many]  # the fourth has Adam-LAWN lose
    (said,) = findings.findings([table_with(*below)])
    assert (
        " † In 2 of the 3 decided comparisons the losing side is below the paper's number and may be tuned less well"
    ) in said.text
    (entries,) = said.tables[0].rows
    assert ["†" in entry for entry in entries[1:]] == [True, True, *[False] * 5]
    assert entries[1] == "better†: +3.00 (+1.82 to +4.18)"


def test_many_comparisons_have_a_table_for_each_panel():
    """A verdict holds after the correction; budgets have columns of their own."""
    pairs = [
        *(pair(2.0 + i / 1000, 0.1, paper=1.5, base=f"base {i}") for i in range(4)),
        replace(pair(-2.0, 0.1, "base 1", "2k"), epochs=60, paper_epochs=300),
        replace(pair(2.1, 0.1, "A"), adjusted=0.06, paper=2.0),
        replace(pair(0.004, 1.0, "B"), panel="Q"),
    ]
    (said,) = findings.findings([table_with(*pairs)])
    table, other = said.tables
    assert table.head == ["P", "1k", "2k after 60 epochs"]
    assert table.rows[1] == [
        "Adam-LAWN over base 1",
        "better: +2.00 (+1.77 to +2.23) [+1.50]",
        "worse: -2.00 (-2.23 to -1.77)",
    ]
    assert table.rows[-1] == ["Adam-LAWN over A", "+2.10 (+1.87 to +2.33) [+2.00]", ""]
    assert (other.head, len(other.rows)) == (["Q", "1k"], 1)


def test_the_readme_has_the_tables_of_findings(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- findings -->\nold\n<!-- end -->\nafter\n")
    table = Table(["P", "1k"], [["a over b", "+1.00 (-1.00 to +3.00)"]])
    said = [
        findings.Finding("One?", "Two.", [], ["table1", "table2"], [table, table]),
        findings.Finding("Three?", "", ["First.", "Second."], ["figure1"]),
    ]
    rows = "| P | 1k |\n| --- | --- |\n| a over b | +1.00 (-1.00 to +3.00) |\n"
    assert report.with_updated_blocks(page, [], said) == (
        "before\n<!-- findings -->\n"
        "**One?** Two. ([table1](results/table1.md), [table2](results/table2.md))\n\n"
        f"{rows}\n{rows}\n"
        "**Three?** ([figure1](results/figure1.md))\n\n- First.\n- Second.\n<!-- end -->\nafter\n"
    )


def test_what_is_said_of_several_baselines():
    """The weaker of two baselines alone is no verdict; two that are the same runs are one, in one table or in two."""
    columns = [("0k", 3.0, 3.0), ("1k", 3.1, 0.1), ("2k", 3.2, 4.0), ("3k", 0.2, 0.2)]
    pairs = [pair(gain, 0.5, base, column) for column, *both in columns for base, gain in zip("AB", both, strict=True)]
    pairs += [pair(2.0, 0.3, "A", "4k"), pair(2.1, 0.3, "A", "5k")]
    tables = [table_with(*pairs), replace(table_with(pair(2.0, 0.3, "C", "4k")), name="table2")]
    (said,) = findings.findings(tables)
    assert "Of 8 comparisons" in said.text
    assert (
        " Where Adam-LAWN has several baselines of different runs, it is better than each in 1 of 2 columns. "
    ) in said.text


def test_seeds_that_are_far_below_the_others_are_told():
    """They make the interval, so it does not tell how many seeds are needed."""
    pairs = [pair(gain, 1.0, column=f"{i}k", paper=1.5) for i, gain in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))]
    (said,) = findings.findings([table_with(*pairs, replace(pair(0.7, 1.0, column="6k", paper=1.5), far=(0, 2)))])
    assert said.text.endswith(" ‡ Seeds more than 5 points below the median of their row widen the interval.")
    entries = said.tables[0].rows[0][1:]
    assert [" seeds]" in entry for entry in entries] == [True] * 6 + [False]
    assert ["‡" in entry for entry in entries] == [False] * 6 + [True]
    assert entries[-1].endswith(")‡ [+1.50]")


def test_what_is_said_of_the_number_of_epochs():
    pairs = [pair(2.0, 0.1, column="15 epochs"), pair(-2.0, 0.1, column="30 epochs")]
    (said,) = findings.findings([empty_page(replace(MINI, name="horizon"), [], pairs=pairs)])
    (table,) = said.tables
    assert table.head == ["P", "15 epochs", "30 epochs"]
    assert [entry.partition(":")[0] for entry in table.rows[0][1:]] == ["better", "worse"]
    assert said.text == ""
    for few in ([], pairs[:1]):
        assert findings.findings([empty_page(replace(MINI, name="horizon"), [], pairs=few)]) == []
    worse = [replace(each, differences=(0.0, -1.0)) for each in pairs]
    (said,) = findings.findings([empty_page(replace(MINI, name="horizon"), [], pairs=worse)])
    assert said.text.startswith("† In 1 of the 2 decided comparisons")
    assert said.tables[0].rows[0][2].startswith("worse†: ")


def test_gains_of_tuning_are_those_of_the_curves():
    """The committed finding, from the file of the curves and scipy's interval."""
    (said,) = findings.findings([committed_page("tuning_curves")])
    (_, mean_title, *columns), rows = said.tables[0].head, said.tables[0].rows
    curves = pd.read_csv(RESULTS / "tuning_curves.csv").query("k == 5").set_index(["panel", "column", "row"])["mean"]
    assert mean_title == "mean over batch sizes, short schedules"
    assert len(rows) >= 4
    for title, mean, *whole in rows:
        rival, base = (curves.xs(row, level="row") for row in title.split(" over "))
        gains = (rival - base).dropna()
        short = gains["MovieLens-100k, short schedules"]
        low, high = student.interval(0.95, len(short) - 1, short.mean(), short.sem())
        verdict = "better: " if low > 0 else "worse: " if high < 0 else ""
        assert mean == f"{verdict}{short.mean():+.2f} ({low:+.2f} to {high:+.2f}), n={len(short)}"
        for column, entry in zip(columns, whole, strict=True):
            gain = gains.get(("MovieLens-100k, the paper's schedules", column))
            assert entry == ("" if gain is None else f"{gain:+.2f}")


def test_what_would_decide_a_comparison_that_is_not_decided():
    """Two seeds and 400 users decide nothing; more seeds help as far as the users go."""
    rng = np.random.default_rng(0)
    users = rng.normal(size=400)
    ours, theirs = (100.0 * (rng.normal(size=(2, 400)) < users + rng.normal(size=400)) for _ in range(2))
    gain = compare_paired(ours, theirs)
    assert 0 < gain.floor < gain.error
    open_ = replace(pair(0.0, 1.0), gain=gain, seeds=(2, 2), epochs=60, paper_epochs=300)
    for paper, words in (
        (6.0, r"the paper's with \d+ seeds\.$"),
        (0.01, "more than 1,000 seeds: the test users are too few"),
    ):
        (said,) = findings.findings([table_with(replace(open_, paper=paper))])
        told = rf"^Not decided: .* after 60 epochs: .*the paper .* after 300\)\. A true gain of .*{words}"
        assert re.search(told, said.comparisons[0])
    (said,) = findings.findings([table_with(replace(open_, paper=0.0))])  # no number of seeds finds that
    assert said.comparisons[0].endswith(" would be found with 80 % probability.")
    assert gain.seeds_needed(9.0) <= gain.seeds_needed(8.0)
    needed = gain.seeds_needed(8.0)
    enough = sqrt(gain.floor**2 + (gain.error**2 - gain.floor**2) * 2 / needed)
    assert Comparison(0, enough, 2 * (needed - 1)).detectable() <= 8.0


def test_what_both_rows_end_with_is_told_with_the_column():
    plain = replace(pair(2.0, 0.5), base="Adam, eps 1e-8", rival="Adam-LAWN", column="batch 10k", epochs=300)
    sizes = replace(plain, base="Adam, eps 1e-8, batch 1M", rival="Adam-LAWN, batch 1M", column="focal 2")
    assert findings._place(replace(plain, paper_epochs=300)) == ("Adam-LAWN over Adam, eps 1e-8", "batch 10k")
    assert findings._place(replace(sizes, paper_epochs=500)) == (
        "Adam-LAWN over Adam, eps 1e-8",
        "batch 1M, focal 2 after 300 epochs",
    )


def test_a_small_p_may_be_large_after_holms_correction():
    (said,) = findings.findings([table_with(replace(pair(2.0, 0.5), adjusted=0.06))])
    assert said.comparisons[0].startswith("Not decided after Holm's correction: ")
    assert ". A true gain of " in said.comparisons[0]


def test_a_comparison_in_several_tables_is_counted_once():
    """Table 5 has cells of tables 3 and 4, under other names."""
    again = replace(pair(2.0, 0.1), column="cross entropy", rival="Adam-LAWN, batch 100k")
    (said,) = findings.findings([table_with(pair(2.0, 0.1)), table_with(again)])
    assert len(said.comparisons) == 1
    assert findings.findings([empty_page(EXPERIMENTS["table6"], [], pairs=[pair(2.0, 0.1)])]) == []  # other units
    small = table_with(replace(again, paper=1.5))
    large = table_with(pair(2.0, 0.1, paper=1.5), pair(3.0, 0.1, column="2k"))
    for tables in ([small, large], [large, small]):
        (said,) = findings.findings(tables)
        assert ["Adam-LAWN against Adam, P" in sentence for sentence in said.comparisons] == [True, True]


def test_values_of_a_sweep_need_not_be_numbers(tuned):
    page = pages_of(tuned / "results", [TUNED])[0]
    (result,) = page.cell_results
    tried = [(replace(job, setting=("model.batchnorm=true",)), record) for job, record in result.tried]
    names = {job.name: job for job, _ in tried}
    tuning = replace(result.tuning, full=[names[job.name] for job in result.tuning.full])
    shown = detail(replace(result, tried=tried, tuning=tuning), TUNED.measures, "", [], "")
    assert shown["rungs"][0]["runs"][0]["values"] == ["true"]
    assert format_setting(("optim.lr=1e-2", "model.batchnorm=true")) == "lr 0.01, batchnorm true"


def test_a_curve_that_a_seed_lacks_is_left_out(results):
    (result, *_) = pages_of(results, [MINI])[0].cell_results
    first, second = result.records
    without = replace(second, columns={k: v for k, v in second.columns.items() if k != "weight_norm"})
    (row,) = detail(replace(result, records=[first, without]), MINI.measures, "", [], "")["curves"]["rows"]
    assert "norm of all weights" not in [subplot["ylabel"] for subplot in row]


def test_curves_of_seeds_recorded_at_other_epochs_are_over_those_of_all(results):
    """Versions of the harness have kept all epochs, every second or every third."""
    (result, *_) = pages_of(results, [MINI])[0].cell_results
    first, second = result.records
    assert len(first.columns["epoch"]) > 2
    fewer = replace(second, columns={k: [v[0], *v[2:]] for k, v in second.columns.items()})
    (row,) = detail(replace(result, records=[first, fewer]), MINI.measures, "", [], "")["curves"]["rows"]
    (line,) = row[0]["lines"]
    assert line["x"] == fewer.columns["epoch"]
    losses = [[r.columns["train_loss"][r.columns["epoch"].index(e)] for e in line["x"]] for r in (first, fewer)]
    assert line["y"] == pytest.approx(np.mean(losses, axis=0), rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "mark"), [([0, 0, 1], [0, 0, 1], 1), ([0, 0, 1], [0, 1, 1], 0), ([1, 1, 1], [1, 1, 1], None)]
)
def test_the_marked_point_is_the_last_before_the_norms_of_a_seed_are_fixed(first, second, mark):
    columns = [{"epoch": [1, 21, 41], "train_loss": [3.0, 2.0, 1.0], "constrained": flags} for flags in (first, second)]
    result = made_up(Cell("Adam-LAWN", ()), 60.0, 60.0)
    records = [replace(record, columns=own) for record, own in zip(result.records, columns, strict=True)]
    assert curve(replace(result, records=records), "train_loss").mark == mark


@pytest.mark.parametrize(("epochs", "option"), [((4, 2), " --short"), ((2,), "")])
def test_the_command_of_a_cell_with_the_short_budget(tmp_path, epochs, option):
    short = Cell("Adam", (*SHORT[:1], *SHORT[2:], "optim=adam"), epochs=epochs)
    experiment = replace(MINI, cells=(short,))
    assert run_experiment(experiment, tmp_path, budget=-1) == []
    tables = Tables(index_html(pages_of(tmp_path / "results", [experiment]), {}))
    (key,) = {cell["key"] for cell in tables.cells if "key" in cell}
    assert tables.detail(key)["fill"] == f"python -m experiments run mini{option}"


def test_the_command_of_cells_with_both_budgets_is_that_of_the_whole_one():
    cells = [Cell(name, ("dataset=digits", f"optim={name}"), epochs=(4, 2)) for name in ("adam", "sgd")]
    full, short = (
        replace(made_up(cell, 60.0), study=Study(cell, (budget,))) for cell, budget in zip(cells, (4, 2), strict=True)
    )
    page = empty_page(replace(MINI, cells=tuple(cells)), [])
    assert fill_command(page, [full, short]) == "python -m experiments run mini"
    assert fill_command(page, [short]) == "python -m experiments run mini --only optim=sgd --short"


def test_a_cell_without_final_runs_has_the_best_score_of_its_tuning(tuned):
    """A setting that diverged has none."""
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    (tuned / "results" / "runs" / "tuned.jsonl").unlink()
    (study,) = studies(TUNED)
    records = records_in(path)
    records[study.grid.jobs()[0].name]["result"]["status"] = "diverged"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records.values()))
    (page,) = pages_of(tuned / "results", [TUNED])
    best = max(record.headline for _, record in page.cell_results[0].tried if not record.diverged)
    (cell,) = (cell for cell in Tables(index_html([page], {})).cells if "key" in cell)
    assert f"tuning, best {best:.2f}" in cell["text"]


def test_a_comparison_without_an_interval_is_no_finding():
    single = Pair("P", "1k", "Adam", "Adam-LAWN", Comparison(2.0, nan, nan), (1, 1), False, nan, nan)
    assert findings.findings([table_with(single)]) == []


def test_how_much_is_filled():
    cells = [Cell(f"row {i}", (), paper=PaperResult(1.0), epochs=(300, 30)) for i in range(3)]
    cells.append(Cell("Fail", (), paper=PaperResult(None), epochs=(300, 30)))
    cells.append(Cell("of ours alone", (), epochs=(300, 30)))
    found = [made_up(cells[0], 1.0, epochs=300), made_up(cells[1], 1.0, epochs=30), made_up(cells[2])]
    found += [made_up(cells[3]), made_up(cells[4], 1.0)]
    said = findings.coverage([empty_page(replace(MINI, name="table9"), [], cell_results=found)])
    assert said.startswith(
        "2 of the 4 cells of the paper's tables, those that fail included, have a result of ours: 1 at"
    )
    assert "1 at a shorter budget. The page shows 3 final runs and 0 runs" in said


def test_a_page_without_any_record(tmp_path):
    text = index_html(pages_of(tmp_path, EXPERIMENTS.values()), {})
    assert "0 of the 176 cells" in text
    assert "What the records say" not in text
    assert Tables(text).scripts.keys() >= {"library-d3", "library-plot.umd"}
    assert not [cell for cell in Tables(text).cells if "key" in cell]


def test_a_simulation_without_a_record_is_not_run_yet(tmp_path):
    pages = [simulation_page(simulation, tmp_path) for simulation in SIMULATIONS.values()]
    assert index_html(pages, {}).count('class="empty" title="not run yet"') == len(pages)


def test_a_figure_without_a_line_is_left_out(results):
    failed = replace(MINI, cells=MINI.cells[1:2])
    (page,) = pages_of(results, [failed])
    assert "<figure" not in index_html([page], {})


def test_the_command_of_a_page_that_is_selected_on_the_test_split(results):
    page = report.page_of(MINI, Store(results), "test")
    tables = Tables(index_html([page], {}))
    key = next(cell["key"] for cell in tables.cells if "key" in cell)
    assert tables.detail(key)["fill"] == "python -m experiments run mini --only optim=adam --selection test"


def test_a_selection_on_the_test_split_is_told(tmp_path):
    """Also where nothing is folded, and of the runs that choose."""
    assert run_experiment(TUNED, tmp_path, selection="test") == []
    page = report.page_of(TUNED, Store(tmp_path / "results"), "test")
    assert page.title == f"{TUNED.title}; settings scored on the TEST split"
    assert report.page_of(TUNED, Store(tmp_path / "results")).title == TUNED.title
    assert report.page_of(MINI, Store(tmp_path / "results"), "test").title == MINI.title
    tables = Tables(index_html([page], {}))
    (key,) = (cell["key"] for cell in tables.cells if "key" in cell)
    assert tables.detail(key)["split"] == panel_view(page, page.panels[0], {}).split == "test"
    assert "validation" not in report.page_of(TUNING_CURVES, Store(tmp_path / "results"), "test").measured


def test_the_libraries_are_as_they_were_published():
    vendor = ASSETS / "vendor"
    told = re.findall(r"\| (\S+\.js) \|.*\| ([0-9a-f]{64}) \|", (vendor / "README.md").read_text())
    assert {name for name, _ in told} == {f"{name}.min.js" for name in LIBRARIES}
    for name, digest in told:
        assert sha256((vendor / name).read_bytes()).hexdigest() == digest
