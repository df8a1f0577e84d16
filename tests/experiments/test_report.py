"""From records to numbers, pages, tables and figures."""

import argparse
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from itertools import islice
from math import isnan, nan, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from fontTools.pens.recordingPen import RecordingPen  # comes with matplotlib
from fontTools.svgLib.path import parse_path

from experiments import json_lines
from experiments.__main__ import _pages
from experiments.definitions.spec import Cell, Experiment, Measure, PaperResult
from experiments.planning.grid import Job
from experiments.planning.study import Tuning, studies
from experiments.record import Record
from experiments.records import Store, _recorded
from experiments.reporting import drawing, report, tuning_tables
from experiments.reporting.cell_results import CellResult, _reported, cell_results, comparisons, far_seeds
from experiments.reporting.charts import CHARTS, over_batch_size
from experiments.reporting.layout import Entry, Panel, format_mean, format_signed
from experiments.reporting.page import entry, provenance
from experiments.reporting.sentences import summary
from experiments.reporting.statistics import compare, compare_paired, holm, mean_and_error
from experiments.selection import EXPERIMENTS, SIMULATIONS
from lawn.compose import compose
from lawn.composition import compose_many
from lawn.errors import RunError
from lawn.files import exclusively
from lawn.identity import run_name
from lawn.plotting import Figure, rc_context
from lawn.train import train
from lawn.train.run_directory import encode_outcomes
from tests.experiments.helpers import (
    ACCURACY,
    MINI,
    SHORT,
    TUNED,
    committed_page,
    committed_store,
    records_in,
    records_of,
    run_experiment,
    unfolded,
    write_records,
)
from tests.helpers import RECOMMENDERS, ROOT


def made_up(cell: Cell, *values: float, status: str = "done", epochs: int = 300) -> CellResult:
    records = [
        Record(
            path=ROOT / "none.json",
            name=f"{cell.row}-{cell.column}-{seed}",
            hash="",
            config={"seed": seed, "train": {"epochs": epochs}},
            environment={"device": "cpu"},
            result={"status": status, "split": "test", "headline": "accuracy", "last": {"test_accuracy": value}},
            columns={},
        )
        for seed, value in enumerate(values)
    ]
    return CellResult(cell, None, records, Tuning(), [])


def test_pages_from_records_alone(results, drawn_figures):
    page = report.experiment_page(MINI, Store(results))
    report.write(page, results)
    adam, fails, absent = page.cell_results
    accuracy = [record.result["last"]["test_accuracy"] for record in adam.records]
    expected = f"{np.mean(accuracy):.2f} ({abs(accuracy[0] - accuracy[1]) / 2:.2f}, n=2)"
    assert expected in report.terminal(page)
    assert (fails.failed, absent.records) == (True, [])
    text = (results / "mini.md").read_text()
    assert f"| Adam | {expected} <sup>" in text
    assert "| Fails | Fail <sup>" in text
    assert "| None |  |  |  |" in text
    for record in adam.records:
        assert f'(runs/mini.jsonl "{record.name}")' in text
        assert record.name in records_in(results / "runs" / "mini.jsonl")
    assert "<svg" in (results / "mini.svg").read_text()
    tidy = pd.read_csv(results / "mini.csv", keep_default_na=False).set_index(["row", "measure"])
    assert float(tidy.loc[("Adam", "test accuracy, %"), "mean"]) == pytest.approx(np.mean(accuracy), rel=1e-5)
    assert tidy.loc[("Fails", "test accuracy, %"), "status"] == "fail"
    assert tidy.loc[("None", "test accuracy, %"), "status"] == "not run"
    latex = (results / "mini.tex").read_text()
    assert f"Adam & {expected} &" in latex
    assert r"test accuracy, \% &" in latex


def test_the_index_stands_alone(results):
    pages = [report.experiment_page(experiment, Store(results)) for experiment in (MINI, EXPERIMENTS["table4"])]
    for page in pages:
        report.write(page, results)
    report.write_index(pages, results)
    text = unfolded((results / "index.html").read_text())
    assert re.findall(r'(?:src|srcset|@import|url)[=(\s]+["\']?(?:https?:)?//', text) == []
    links = re.findall(r'href="(?!http|#|data:)([^"]*)"', text)
    assert links == ["runs/"]
    assert set(re.findall(r'href="#([^"]*)"', text)) - {"results", "tuning_curves"} == {"mini", "table4"}
    assert text.count(">paper Fail<") == 6
    assert text.count('http-equiv="Content-Security-Policy" content="default-src \'none\';') == 1


def test_a_figure_without_anything_to_draw(results, drawn_figures):
    page = report.experiment_page(replace(MINI, cells=MINI.cells[1:]), Store(results))
    report.write(page, results)
    assert (results / "mini.svg").exists()


def test_records_that_were_tampered_with_are_refused(results):
    path = results / "runs" / "mini.jsonl"
    records = records_in(path)
    records[run_name(compose(*MINI.cells[0].overrides, "seed=0"))]["config"]["optim"]["lr"] = 0.5
    write_records(path, records)
    with pytest.raises(RunError, match="its config does not match its name"):
        report.experiment_page(MINI, Store(results))


def cut(path: Path, part: str, value: Any = None) -> None:
    """Replace a part of the second record of a file, whose keys are joined by points; without a value remove it."""
    records = records_in(path)
    inner = records[list(records)[1]]
    *outer, key = part.split(".")
    for name in outer:
        inner = inner[name]
    del inner[key]
    inner |= {} if value is None else {key: value}
    write_records(path, records)


@pytest.mark.parametrize(
    "part",
    [
        "result", "result.last", "result.last.test_accuracy", "result.warnings",
        "environment", "environment.device", "environment.cpu", "environment.cores", "environment.packages",
    ],
)  # fmt: skip
def test_a_record_that_lacks_a_part_is_named(results, part):
    path = results / "runs" / "mini.jsonl"
    cut(path, part, {} if part in ("result", "environment") else None)
    with pytest.raises(RunError, match=r"mini.jsonl, line 2: damaged record \(.*\); delete the line") as caught:
        report.experiment_page(MINI, Store(results))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("result.last.train_loss", "train_loss"),
        ("history", "column epoch"),
        ("history.margin_p50", "column margin_p50"),
    ],
)
def test_a_record_that_lacks_what_is_shown_is_named(results, part, named):
    """As one from before a measure was added."""
    path = results / "runs" / "mini.jsonl"
    records = records_in(path)
    only_adam = {name: record for name, record in records.items() if record["config"]["optim"]["name"] == "adam"}
    write_records(path, only_adam)
    cut(path, part)
    with pytest.raises(RunError, match=f"mini.jsonl: the record of digits-.* has no {named}; delete its line"):
        report.experiment_page(MINI, Store(results))


PAIR = replace(
    MINI,
    cells=(MINI.cells[0], replace(MINI.cells[0], row="LAWN", overrides=(*SHORT, "optim=adam_lawn"))),
    pairs=(("Adam", "LAWN"),),
)


def test_runs_on_other_data_are_not_compared(tmp_path):
    """Sample k of one is not sample k of the other."""
    assert run_experiment(PAIR, tmp_path) == []
    path = tmp_path / "results" / "runs" / "mini.jsonl"
    page = report.experiment_page(PAIR, Store(tmp_path / "results"))
    assert [pair.paired for pair in page.pairs] == [True]
    assert page.warnings == {}
    kept = path.read_text()
    cut(path, "environment.data.checksum", "0badf00d")
    page = report.experiment_page(PAIR, Store(tmp_path / "results"))
    assert page.pairs == []
    ((warning, cells),) = page.warnings.items()
    assert re.fullmatch(
        "runs that read other data than most are not compared with them: checksum 0badf00d, not [0-9a-f]{8}", warning
    )
    assert len(cells) == 1
    path.write_text(kept)
    cut(path, "result.outcomes", encode_outcomes(torch.tensor([1, 0, 1])))
    assert report.experiment_page(PAIR, Store(tmp_path / "results")).pairs == []


def test_a_selection_on_the_test_split_leaves_whole_records(tmp_path):
    """Its runs are named like final ones."""
    for selection in ("test", "val"):
        assert run_experiment(TUNED, tmp_path, selection=selection) == []
    page = report.experiment_page(TUNED, Store(tmp_path / "results"))
    assert len(records_of(page)) == 3  # one more has been run already
    assert all(record.scores is not None and record.columns for record in records_of(page))


@pytest.mark.parametrize("folder", ["runs", "tuning"])
def test_what_is_no_folder_of_records_is_not_taken_for_none(results, folder):
    shutil.rmtree(results / folder, ignore_errors=True)
    assert Store(results).read("digits-0") is None
    (results / folder).write_text("")
    with pytest.raises(RunError, match=f"results/{folder}: cannot be read as a folder; choose another with"):
        report.experiment_page(MINI, Store(results))


def test_unfinished_runs_are_not_recorded(tmp_path):
    config = compose(*MINI.cells[0].overrides, f"runs_dir={tmp_path}")
    with pytest.raises(RunError, match="not finished"):
        Store(tmp_path).write(config, (), "mini")


def test_warnings_of_the_runs_stand_below_the_table(tmp_path, tiny_data):
    cell = Cell("SGD", ("dataset=movielens100k", "optim=sgd", *RECOMMENDERS, "train.epochs=1"))
    small = Experiment("small", "A small one", (cell,), (Measure("test_hr10", "HR@10", 1),), seeds=2)
    assert run_experiment(small, tmp_path, extra=(f"data_dir={tiny_data}",)) == []
    page = report.experiment_page(small, Store(tmp_path / "results"))
    report.write(page, tmp_path / "results")
    text = (tmp_path / "results" / "small.md").read_text()
    assert text.count("- ml-100k: 30 users, published are 943 (SGD)") == 1


def test_mean_and_error():
    assert format_mean([1.0, 2.0, 3.0], 2) == "2.00 (0.58, n=3)"
    assert format_mean([2.0], 1) == "2.0 (n=1)"
    assert format_mean([], 1) == ""
    assert format_mean([nan, 1.0], 1) == "nan (nan, n=2)"
    assert format_mean([1e-4, 3e-4], -2) == "2.0e-04 (1.0e-04, n=2)"
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / sqrt(3)))
    assert isnan(mean_and_error([2.0])[1])


def test_signed_numbers_have_three_digits():
    numbers = {0.5: "+0.500", -0.01234: "-0.0123", 123.4: "+123", 1234.0: "+1.23e+03", nan: ""}
    assert {number: format_signed(number) for number in numbers} == numbers


def test_the_difference_is_marked_where_it_exceeds_both_errors():
    values = (70.0, 71.0, 72.0)  # 71 (0.577)
    for paper, error, difference, marked in (
        (70.0, 0.25, "+1.00", True),
        (70.0, 1.5, "+1.00", False),  # within the paper's
        (70.5, 0.25, "+0.50", False),  # within ours
        (72.0, 0.25, "-1.00", True),
        (70.0, None, "+1.00", False),  # not known
    ):
        shown = entry(made_up(Cell("A", (), paper=PaperResult(paper, error)), *values), ACCURACY)
        assert (shown.ours, shown.difference, shown.marked) == ("71.00 (0.58, n=3)", difference, marked)
    one = entry(made_up(Cell("A", (), paper=PaperResult(70.0, 0.25)), 71.0), ACCURACY)
    assert (one.ours, one.difference, one.marked) == ("71.00 (n=1)", "+1.00", False)
    both_fail = entry(made_up(Cell("A", (), paper=PaperResult(None)), 0.0, status="diverged"), ACCURACY)
    assert (both_fail.ours, both_fail.paper, both_fail.difference) == ("Fail", "Fail", "")
    blank = entry(made_up(Cell("A", (), paper=PaperResult(70.0))), ACCURACY)
    assert (blank.ours, blank.paper, blank.difference, blank.marked) == ("", "70.00", "", False)


def table(smaller_is_better: bool = False) -> tuple[Experiment, list[CellResult]]:
    cells = [
        Cell("SGD", (), column="1k", paper=PaperResult(60.0)),
        Cell("Adam", (), column="1k", paper=PaperResult(65.0)),
        Cell("Adam-LAWN", (), column="1k", paper=PaperResult(67.0)),
        Cell("SGD", (), column="100k", paper=PaperResult(None)),
        Cell("Adam", (), column="100k", paper=PaperResult(64.0)),
        Cell("Adam-LAWN", (), column="100k", paper=PaperResult(66.0)),
    ]
    measure = replace(ACCURACY, smaller_is_better=smaller_is_better)
    experiment = Experiment("t", "T", tuple(cells), (measure,), pairs=(("Adam", "Adam-LAWN"),))
    values = [(60, 61, 62), (66, 67, 68), (64, 65, 66), (1,), (60, 61, 62), (66, 67, 68)]
    found = [
        made_up(c, *map(float, v), status="diverged" if len(v) == 1 else "done")
        for c, v in zip(cells, values, strict=True)
    ]
    return experiment, found


def test_the_summary_names_what_differs_from_the_paper():
    experiment, found = table()
    first, second = comparisons(experiment, found)
    assert (first.gain.difference, first.paper, first.sign) == (-2.0, 2.0, -1)
    assert (second.gain.difference, second.paper, second.sign) == (6.0, 2.0, 1)
    lines = summary(experiment, found)
    assert lines[0] == (
        "With LAWN the number is better in 1 of 2 comparisons (p < 0.05 in 1), and worse in 1 (p < 0.05 in 0); "
        "Welch's test over seeds, p after Holm's correction for 2 comparisons."
    )
    assert lines[1].startswith(
        "The sign agrees with the paper in 1 of the 2 comparisons that the paper has; it differs for: "
    )
    assert "Adam-LAWN against Adam at 1k (here -2.00, p = 0.07, paper +2.00)." in lines[1]
    assert lines[2] == (
        "In 1 of the 1 decided comparisons the losing side is below the paper's number and may be tuned less well: "
        "Adam at 100k by 3."
    )
    assert lines[3] == (
        "Order of the paper's rows at 1k, by the mean: Adam > Adam-LAWN > SGD; in the paper Adam-LAWN > Adam > SGD."
    )
    assert lines[4] == "Order of the paper's rows at 100k, by the mean: Adam-LAWN > Adam > SGD; as in the paper."
    assert summary(experiment, [made_up(o.cell) for o in found]) == []


def test_the_comparison_of_the_same_runs_is_counted_once():
    """Where the search chose the same setting for two rows."""
    experiment, found = table()
    again = Cell("Adam, eps tuned", (), column="1k")
    pairs = (*experiment.pairs, ("Adam, eps tuned", "Adam-LAWN"))
    experiment = replace(experiment, cells=(*experiment.cells, again), pairs=pairs)
    found.append(replace(found[1], cell=again))
    first, second, other = comparisons(experiment, found)
    assert (first.gain, first.adjusted) == (second.gain, second.adjusted)
    assert [first.adjusted, other.adjusted] == holm([first.gain.p, other.gain.p])
    (line, *_) = summary(experiment, found)
    assert line.startswith(
        "With LAWN the number is better in 1 of 2 comparisons (3 by name: some are of the same runs) (p < 0.05 in 1), "
        "and worse in 1 (p < 0.05 in 0);"
    )
    assert line.endswith("for 2 comparisons.")
    assert summary(experiment, found)[1].startswith("The sign agrees with the paper in 1 of the 2 comparisons")


def test_single_seeds_are_not_tested():
    """Equal differences of other runs are other comparisons."""
    experiment, found = table()
    found = [made_up(o.cell, value) for o, value in zip(found, (50.0, 66.0, 67.0, 50.0, 60.0, 61.0), strict=True)]
    (first, second, *_) = summary(experiment, found)
    assert first == "With LAWN the number is better in 2 of 2 comparisons, and worse in 0; too few seeds for a test."
    assert second == "The sign agrees with the paper in 2 of the 2 comparisons that the paper has."
    found[2] = made_up(found[2].cell, 60.0)
    assert "(here -6.00, too few seeds for a test, paper +2.00)" in summary(experiment, found)[1]
    found[4:] = made_up(found[4].cell, 60.0, 61.0), made_up(found[5].cell, 66.0, 67.0)
    assert summary(experiment, found)[0].endswith("correction for 1 comparisons; in 1, too few seeds for a test.")
    one = replace(experiment, cells=experiment.cells[:3])
    assert summary(one, found[:3])[0] == "Adam-LAWN against Adam: -6.00 (too few seeds for a test)."


def test_equal_numbers_are_neither_better_nor_worse():
    experiment, found = table()
    found[2] = made_up(found[2].cell, 68.0, 67.0, 66.0)
    first, _ = comparisons(experiment, found)
    assert (first.gain.difference, first.sign) == (0, 0)
    lines = summary(experiment, found)
    assert (
        "better in 1 of 2 comparisons (p < 0.05 in 1), exactly equal in 1, and worse in 0 (p < 0.05 in 0);" in lines[0]
    )
    assert (
        lines[1] == "The sign agrees with the paper in 1 of the 2 comparisons that the paper has; in 1 a gain is zero."
    )
    horizon = replace(experiment, figure="horizon")
    assert "After 1k: Adam 67.00 = Adam-LAWN 67.00 > SGD 61.00." in summary(horizon, found)


def test_different_budgets_are_not_compared():
    experiment, found = table()
    found[2] = made_up(found[2].cell, 64.0, 65.0, 66.0, epochs=30)
    assert [c.column for c in comparisons(experiment, found)] == ["100k"]
    assert not any(" at 1k, by the mean" in line for line in summary(experiment, found))


def test_an_error_is_better_when_it_is_smaller():
    experiment, found = table(smaller_is_better=True)
    pairs = comparisons(experiment, found)
    assert [c.gain.difference for c in pairs] == [2.0, -6.0]
    assert [c.paper for c in pairs] == [-2.0, -2.0]
    assert [c.differences for c in pairs] == [(-2.0, 2.0), (3.0, -1.0)]
    (order,) = (line for line in summary(experiment, found) if " at 1k, by the mean" in line)
    assert order.endswith(": SGD > Adam-LAWN > Adam; in the paper SGD > Adam > Adam-LAWN.")


def test_the_compared_row_is_beside_the_best_of_the_others():
    experiment, found = table(smaller_is_better=True)
    experiment = replace(experiment, compared_row="Adam-LAWN")
    assert summary(experiment, found)[0].startswith(
        "On 1k, Adam-LAWN gives 65.00 (0.58); the best of the others (SGD) gives 61.00 (0.58); the gain is -4.00 "
    )
    for result, checksum in ((found[0], "a"), (found[2], "b")):  # SGD has read other data
        environment = {"device": "cpu", "data": {"checksum": checksum}}
        result.records[:] = [replace(record, environment=environment) for record in result.records]
    assert "the best of the others (Adam) gives 67.00" in summary(experiment, found)[0]


@pytest.mark.parametrize(
    ("constrained", "end"),
    [
        ((1, 1, 1), " Norms were fixed after 2.50 to 3.50 epochs."),
        ((1, 0, 0), " Norms were fixed after 2.50 epochs. In 2 of 3 runs they never were fixed."),
        ((0, 0, 0), " In 3 of 3 runs they never were fixed."),
    ],
)
def test_an_automatic_switch_that_never_came_is_none(constrained, end):
    """The epochs of the free phase are then those of the run."""
    experiment, found = table()
    for record, switched, epochs in zip(found[2].records, constrained, (2.5, 3.5, 3.0), strict=True):
        record.result["last"] |= {"free_epochs": epochs, "constrained": switched}
    (line, *_) = summary(replace(experiment, compared_row=found[2].cell.row), found)
    assert line.endswith(end)


def test_a_column_without_the_numbers_of_a_row_is_not_ranked():
    experiment, found = table()
    found[0] = made_up(replace(found[0].cell, epochs=(300, 30)))
    assert not any(" at 1k, by the mean" in line for line in summary(experiment, found))


def test_a_cell_fails_with_any_of_its_seeds():
    cell = made_up(Cell("A", ()), 60.0, 61.0)
    cell.records[1].result["status"] = "diverged"
    assert (entry(cell, ACCURACY).ours, cell.values(ACCURACY)) == ("Fail", [])


def test_the_longest_budget_that_is_filled_is_shown(tmp_path):
    cell = Cell(
        "Adam", ("dataset=digits", "optim=adam", "model.widths=[8]", "dataset.limit=100"), column="128", epochs=(4, 2)
    )
    other = replace(cell, row="Other", overrides=(*cell.overrides, "optim.lr=0.01"))
    experiment = Experiment("budgets", "Budgets", (cell, other), (ACCURACY,), seeds=2)
    one = replace(experiment, cells=(cell,))
    for run, seeds, budget, epochs, head in (
        (one, 1, 0, 4, "128; 4 epochs"),
        (experiment, 2, -1, 2, "128; 2 of 4 epochs"),
        (one, 2, 0, 4, "128; 2 and 4 of 4 epochs"),
        (one, 3, -1, 4, "128; 2 and 4 of 4 epochs"),  # one seed more than is asked for
    ):
        assert run_experiment(run, tmp_path, seeds, budget) == []
        page = report.experiment_page(experiment, Store(tmp_path / "results"))
        assert page.cell_results[0].epochs == epochs
        assert page.panels[0].columns == [head]
    assert [row[0].ours.partition(" after ")[2] for _, row in page.panels[0].rows] == ["4 epochs", "2 epochs"]


def test_runs_of_the_tuning_do_not_choose_between_budgets_that_are_filled():
    """A search may take more runs for a shorter schedule: it confirms further settings where some collapse."""
    cell = Cell("LAMB", ("dataset=movielens1m",), epochs=(300, 60))
    long, short = made_up(cell, 60.0, 61.0), made_up(cell, 50.0, 51.0, epochs=60)
    short = replace(short, tried=[(None, record) for record in short.records])
    assert _reported([long, short], 2) is long
    assert _reported([replace(long, records=long.records[:1]), short], 2) is short
    assert _reported([replace(long, records=[]), replace(short, records=[])], 2).tried == short.tried


def test_without_final_runs_the_budget_with_most_runs_is_shown(tmp_path):
    """Both begin with the same grid on the shortest schedule."""
    cell = replace(TUNED.cells[0], overrides=tuple(o for o in TUNED.cells[0].overrides if "epochs" not in o))
    experiment = replace(TUNED, cells=(replace(cell, epochs=(4, 3), grid_epochs=2),))
    store = Store(tmp_path / "results")
    (long,), (short,) = studies(experiment), studies(experiment, -1)
    for study, epochs in ((long, 4), (short, 3)):
        for job in study.tuning(store).jobs:
            config = replace(job.config, runs_dir=f"{tmp_path}/runs")
            train(config)
            store.write(config, job.overrides, experiment.name, tunes=True)
        (result,) = cell_results(experiment, store)
        assert not result.records
        assert result.study.budget == epochs
        assert {record.name for _, record in result.tried} == {record.name for record in store.all()}


def test_the_list_of_the_tuning_marks_the_chosen_point_of_the_shorter_schedule():
    """Its epochs are others there, and the same number of epochs is another point."""
    runs = report.page_of(EXPERIMENTS["table2"], committed_store()).tuning
    keys = ["optim.lr", "schedule.warmup_epochs", "optim.weight_decay", "optim.free_epochs"]
    runs[keys] = runs[keys].astype(float)
    runs["schedule.warmup_epochs"] /= runs["epochs"]
    runs["optim.free_epochs"] /= runs["epochs"]
    marked = 0
    for _, cell in runs[runs["chosen"]].groupby(["panel", "column", "row"]):
        short, full = (cell.loc[cell["part"] == part, keys] for part in ("short", "full"))
        assert len(full) == 1
        assert short.to_numpy() == pytest.approx(full.to_numpy()[: len(short)], nan_ok=True)
        marked += len(short)
    assert marked >= 3


def test_a_grid_with_holes_keeps_its_settings(tuned):
    """Records of a tuning that is not complete stand beside the settings that they are of."""
    store = Store(tuned / "results")
    (study,) = studies(TUNED)
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    names = [job.name for job in study.grid.jobs()]
    hole = names.pop(1)
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if hole not in line))
    page = report.experiment_page(TUNED, Store(tuned / "results"))
    assert list(page.tuning["optim.lr"].astype(float)) == [1e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    rates = {record.hash: record.config["optim"]["lr"] for record in map(store.read, names)}
    assert [rates[each] for each in page.tuning["hash"]] == list(page.tuning["optim.lr"].astype(float))
    assert page.cell_results[0].setting == ()
    assert page.tuned is None


def test_a_setting_that_collapses_for_a_seed_is_no_next_best(tuned):
    """Though its mean is the largest."""
    (result,) = report.experiment_page(TUNED, Store(tuned / "results")).cell_results
    other = next(job.setting for job in result.tuning.confirming if job.setting != result.setting)
    scores = {0: 300.0, 1: 300.0, 2: 0.0}

    def with_score(record: Record) -> Record:
        last = {**record.result["last"], "val_accuracy": scores[record.config["seed"]]}
        return replace(record, result={**record.result, "last": last})

    tried = [(job, with_score(record) if job.setting == other else record) for job, record in result.tried]
    (row,) = tuning_tables.table([replace(result, tried=tried)]).rows
    assert all(float(mean) <= 100 for mean in row[3].split("; "))


def test_runs_of_a_tuning_that_has_not_ended_have_chosen_nothing(tuned):
    """The line of code versions counts those that chose the settings of the runs that are shown."""
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    other = replace(TUNED.cells[0], row="Other", overrides=(*SHORT, "optim=sgd"))
    (job, *_) = studies(replace(TUNED, cells=(other,)))[0].grid.jobs()
    config = replace(job.config, runs_dir=f"{tuned}/runs", device="cpu")
    train(config)
    Store(tuned / "results").write(config, job.overrides, TUNED.name, tunes=True)
    page = report.experiment_page(replace(TUNED, cells=(*TUNED.cells, other)), Store(tuned / "results"))
    chosen, begun = page.cell_results
    assert (len(begun.tried), begun.records) == (1, [])
    assert f", after {len(chosen.tried)} that chose the hyperparameters" in page.provenance
    assert len(path.read_text().splitlines()) == len(chosen.tried) + 1


def test_a_run_that_diverged_counts_with_the_epochs_that_it_trained(tuned):
    (result,) = report.experiment_page(TUNED, Store(tuned / "results")).cell_results
    (job, record), *others = result.tried
    last = {**record.result["last"], "epoch": 1}
    tried = [(job, replace(record, result={**record.result, "last": last})), *others]
    (row,) = tuning_tables.table([replace(result, tried=tried)]).rows
    assert row[tuning_tables.HEAD.index("epochs trained")] == str(3 * len(others) + 1)


def test_what_lies_at_an_end_of_a_grid_is_named():
    axes = {"optim.lr": ["1", "2", "3"], "optim.eps": ["1"], "optim.momentum": ["0", "1", "2"]}
    for point, ends in (
        ((1, 0, 1), []),
        ((2, 0, 0), ["lr", "momentum"]),
        ((-1, 0, 3), ["lr beyond", "momentum beyond"]),
    ):
        assert tuning_tables._ends(axes, point) == ends


@pytest.mark.parametrize(("every", "diagnostics", "alike"), [(1, "off", True), (5, "off", False), (1, "on", False)])
def test_the_epochs_that_a_record_keeps(every, diagnostics, alike):
    """About 30, and the last; all of a run some of whose epochs measure more."""
    config = compose(f"eval.every={every}", f"diagnostics={diagnostics}")
    for epochs, step in ((30, 1), (31, 2), (59, 2), (100, 4)):
        kept = [*range(1, epochs, step if alike else 1), epochs]
        assert _recorded(config, epochs) == kept


def test_a_record_has_the_numbers_of_its_run(tuned):
    for record in Store(tuned / "results").all():
        result = json.loads((tuned / "runs" / record.name / "result.json").read_text())
        for key, value in result["last"].items():
            assert record.result["last"][key] == pytest.approx(value, rel=5e-9)


def test_the_data_of_a_run_are_those_that_it_was_resumed_on():
    """Older records begin without them."""
    record = made_up(Cell("A", ()), 1.0).records[0]
    assert record.data == {}
    resumed = {"device": "cpu", "resumed": [{"data": {"users": 3}}]}
    assert replace(record, environment=resumed).data == {"users": 3}


def test_columns_of_several_lengths_are_named(results):
    path = results / "runs" / "mini.jsonl"
    cut(path, "history.train_loss", [1.0])
    with pytest.raises(RunError, match=r"line 2: damaged record \(its history has columns of several lengths\)"):
        list(Store(results).all())


def test_a_seed_without_a_record_hides_no_other(results):
    path = results / "runs" / "mini.jsonl"
    records = records_in(path)
    del records[run_name(compose(*MINI.cells[0].overrides, "seed=0"))]
    write_records(path, records)
    adam, *_ = cell_results(MINI, Store(results))
    assert [record.config["seed"] for record in adam.records] == [1]


@pytest.mark.parametrize(("recorded", "shown"), [((0, 1, 2, 4), [0, 1, 2]), ((0, 1, 3), [0, 1]), ((1, 2, 4), [1, 2])])
def test_further_seeds_count_as_far_as_they_are_consecutive(recorded, shown):
    """Of a study of two."""
    (study, *_) = studies(MINI)
    names = [job.name for job in islice(study.final_runs(SimpleNamespace()), 5)]
    known = {names[seed]: seed for seed in recorded}
    assert study.results(SimpleNamespace(read=known.get)) == shown


def test_a_record_that_is_deleted_is_forgotten(tuned):
    """By a server, which reads the records as they change."""
    store = Store(tuned / "results")
    names = [record.name for record in store.all()]
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others))
    gone = json.loads(first)["name"]
    assert [record.name for record in store.all()] == [name for name in names if name != gone]
    assert not store.has(gone)
    shutil.rmtree(path.parent)
    assert {record.path.parent.name for record in store.all()} == {"runs"}


def test_the_pages_of_a_command_are_of_the_same_records(results, monkeypatch):
    """Whatever is recorded, or deleted, while it makes them."""
    counts = []

    def page_of(experiment, store, selection):
        counts.append(len([*store.all()]))
        (results / "runs" / "mini.jsonl").unlink(missing_ok=True)

    monkeypatch.setattr(report, "page_of", page_of)
    store = Store(results)
    for names in (["table4", "table5"], ["table2"]):
        _pages(names, store, argparse.Namespace(selection="val", results=results))
    assert counts[0] == counts[1] > counts[2]


@pytest.mark.parametrize("outcomes", ["!", "AAAA", "eJw="])
def test_damaged_outcomes_are_named(results, outcomes):
    path = results / "runs" / "mini.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    record["result"]["outcomes"] = outcomes
    path.write_text("\n".join([lines[0], json.dumps(record), *lines[2:], ""]))
    with pytest.raises(RunError, match=r"mini.jsonl, line 2: damaged record \(.*\); delete the line"):
        report.experiment_page(MINI, Store(results))


@pytest.mark.parametrize("value", ["", "x", "1.5", [], [1.0], {}])
@pytest.mark.parametrize("place", ["last", "history"])
def test_what_is_no_number_in_a_record_is_named(results, place, value):
    path = results / "runs" / "mini.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    if place == "last":
        record["result"]["last"]["margin_p50"] = value
    else:
        record["history"]["train_loss"][-1] = value
    path.write_text("\n".join([lines[0], json.dumps(record), *lines[2:], ""]))
    with pytest.raises(RunError, match=r"mini.jsonl, line 2: damaged record \(.* in the place of a number\)"):
        report.experiment_page(MINI, Store(results))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "digits-mlp-sgd-s0-"), ("name", "x-"), ("result.status", "Diverged"), ("result.status", None),
        ("result.split", "val"), ("result.last.epoch", 1), ("result.last.epoch", None), ("result.last.epoch", True),
    ],
)  # fmt: skip
def test_a_record_that_contradicts_itself_is_named(results, key, value):
    path = results / "runs" / "mini.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    *outer, last = key.split(".")
    inner = reduce(dict.__getitem__, outer, record)
    inner[last] = value + record["hash"] if key == "name" else value
    path.write_text("\n".join([lines[0], json.dumps(record), *lines[2:], ""]))
    with pytest.raises(RunError, match=r"mini.jsonl, line 2: damaged record \(.+\); delete the line"):
        report.experiment_page(MINI, Store(results))


@pytest.mark.parametrize("file", ["mini.jsonl", "aaa.jsonl"])
def test_two_results_of_one_run_are_refused_and_kept(results, file):
    """Such as those of two machines, whose histories were merged. Equal ones are one."""
    path = results / "runs" / file
    first = (results / "runs" / "mini.jsonl").read_text().splitlines()[0]
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}{first}\n")
    known = [record.headline for record in Store(results).all()]
    other = json.loads(first)
    other["result"]["last"]["test_accuracy"] += 1
    path.write_text(text := f"{before}{json.dumps(other)}\n")
    store = Store(results)
    for ask in (store.all, store.sort):
        with pytest.raises(RunError, match=rf"line \d+: another result of {other['name']} than in .*; delete one line"):
            list(ask() or ())
    assert path.read_text() == text
    path.write_text(before)
    assert [record.headline for record in store.all()] == known


@pytest.mark.parametrize("gone", ["line", "file"])
@pytest.mark.parametrize("new", ["a.jsonl", "z.jsonl"])
def test_a_result_in_the_place_of_one_that_was_deleted_is_taken(results, gone, new):
    """In a store that has read the other one."""
    path = results / "runs" / "mini.jsonl"
    store = Store(results)
    count = len(list(store.all()))
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others)) if gone == "line" else path.unlink()
    record = json.loads(first)
    record["result"]["last"]["test_accuracy"] = 12.5
    (path.parent / new).write_text(json.dumps(record))
    assert len(list(store.all())) == (count if gone == "line" else 1)
    assert store.read(record["name"]).headline == 12.5


@pytest.mark.parametrize("bad", ["tuning/a.jsonl", "runs/a.jsonl", "runs/z.jsonl"])
def test_a_store_recovers_when_a_bad_file_is_gone(results, bad):
    store = Store(results)
    names = [record.name for record in store.all()]
    (results / bad).parent.mkdir(exist_ok=True)
    (results / bad).write_text('{"name": "damaged"}\n')
    for _ in range(2):
        with pytest.raises(RunError):
            list(store.all())
        with pytest.raises(RunError):
            store.read(names[0])
    (results / bad).unlink()
    assert store.has(names[0])
    assert [record.name for record in store.all()] == names
    assert store.kinds() == Store(results).kinds()


@pytest.mark.parametrize("reads_before", [False, True])
def test_the_lines_before_a_damaged_one_are_forgotten(results, reads_before):
    path = results / "runs" / "mini.jsonl"
    first, second, *_ = path.read_text().splitlines(keepends=True)
    path.write_text(second)
    store = Store(results)
    if reads_before:
        list(store.all())
    (results / "runs" / "z.jsonl").write_text(f'{first}{second}{{"name": "damaged"}}\n')
    with pytest.raises(RunError, match="line 3"):
        list(store.all())
    (results / "runs" / "z.jsonl").write_text(second)
    assert not store.has(json.loads(first)["name"])
    assert len(list(store.all())) == 1


def test_sorting_takes_what_was_deleted_since_into_account(results):
    path = results / "runs" / "mini.jsonl"
    store = Store(results)
    list(store.all())
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others))
    record = json.loads(first)
    record["result"]["last"]["test_accuracy"] = 12.5
    (path.parent / "a.jsonl").write_text(json.dumps(record) + "\n")
    store.sort()
    assert store.read(record["name"]).headline == 12.5


def test_a_file_of_the_same_size_in_the_place_of_another_is_read(results):
    """As git writes it, perhaps with the inode of the one before."""
    path = results / "runs" / "mini.jsonl"
    store = Store(results)
    first, *others = path.read_text().splitlines(keepends=True)
    record = json.loads(first)
    before = store.read(record["name"]).headline
    key = f'"test_accuracy":{before}'.removesuffix(".0")
    assert first.count(key) == 1
    with path.open("r+") as file:
        file.write(first.replace(key, f"{key[:-1]}{(int(key[-1]) + 1) % 10}"))
    assert len(list(store.all())) == 1 + len(others)
    assert store.read(record["name"]).headline != before


def test_a_run_in_both_folders_has_one_result(tuned):
    """The record with its history counts, in whatever order the files were written."""
    results = tuned / "results"
    tuning, store = results / "tuning" / "tuned.jsonl", Store(tuned / "results")
    lines = (results / "runs" / "tuned.jsonl").read_text().splitlines(keepends=True)
    name = json.loads(lines[0])["name"]
    text = tuning.read_text()
    for lines_read_before in (False, True):
        if lines_read_before:
            list(store.all())
        tuning.write_text(text + lines[0])
        assert store.read(name).path.parent.name == "runs"
    record = json.loads(lines[0])
    record["result"]["last"]["test_accuracy"] += 1
    tuning.write_text(f"{text}{json.dumps(record)}\n")
    with pytest.raises(RunError, match=f"another result of {name} than in"):
        list(store.all())
    (results / "runs" / "tuned.jsonl").unlink()
    assert store.read(name).headline == record["result"]["last"]["test_accuracy"]


def test_a_record_that_is_there_is_kept(tuned, capsys):
    """Of another machine, for example, whose rounding differs."""
    (study,) = studies(TUNED, extra=(f"runs_dir={tuned}/runs",))
    job = study.tuning(Store(tuned / "results")).jobs[0]
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    text = path.read_text()
    store = Store(tuned / "results")
    (line,) = (line for line in text.splitlines() if json.loads(line)["name"] == job.name)
    record = json.loads(line)
    record["result"]["last"]["val_accuracy"] = 12.5
    path.write_text(changed := text.replace(line, json.dumps(record)))
    for tunes in (True, False):
        assert store.write(job.config, job.overrides, job.experiment, tunes).headline == 12.5
        assert capsys.readouterr().err == f"warning: {job.name}: {path} has another result of it, which is kept\n"
    assert path.read_text() == changed


@pytest.mark.parametrize("end", ["\r", " ", "\u2028"])
def test_records_in_one_line_are_refused_and_kept(results, end):
    path = results / "runs" / "mini.jsonl"
    path.write_text(text := path.read_text().replace("\n", end), newline="")
    store = Store(results)
    for ask in (store.all, store.sort):
        with pytest.raises(RunError, match=r"mini.jsonl: its last line goes on after a record"):
            list(ask() or ())
    assert path.read_bytes() == text.encode()


def test_lines_of_tuning_files_are_in_the_order_of_their_names(tuned):
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    names = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert names == sorted(set(names))
    assert len(names) >= 12


def test_a_damaged_line_of_a_tuning_file_is_named(tuned):
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    lines = path.read_text().splitlines()
    for damaged in (lines[1][:-9], "[]", lines[1].replace('"lr":', '"lr":1'), lines[1].replace('"hash"', '"hush"')):
        path.write_text("\n".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(
            RunError, match=r"tuned.jsonl, line 2: damaged record \(.*\); delete the line and run again"
        ):
            report.experiment_page(TUNED, Store(tuned / "results"))


@pytest.mark.parametrize("damage", ["folder", "loop", "unreadable", "bytes"])
@pytest.mark.parametrize("folder", ["runs", "tuning"])
def test_a_damaged_file_is_named(tmp_path, folder, damage):
    path = tmp_path / folder / "tuned.jsonl"
    path.parent.mkdir()
    if damage == "folder":
        path.mkdir()
    elif damage == "bytes":
        path.write_bytes(b"\xff\n")
    else:
        path.symlink_to(path.name if damage == "loop" else "/proc/self/mem")
    with pytest.raises(RunError, match=r"tuned.jsonl: cannot be read \(.*\); put it back, or delete it") as caught:
        Store(tmp_path).read("digits-0")
    assert "\n" not in str(caught.value)


def test_a_tuning_file_that_is_damaged_while_runs_go_on_is_named(tuned):
    """And not written over."""
    (study,) = studies(TUNED, extra=(f"runs_dir={tuned}/runs",))
    job = study.tuning(Store(tuned / "results")).jobs[0]
    path = tuned / "new" / "tuning" / "tuned.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "di\n')
    with pytest.raises(RunError, match=r"tuned.jsonl, line 1: damaged record \("):
        Store(tuned / "new").write(job.config, job.overrides, job.experiment, job.tunes)
    assert path.read_text() == '{"name": "di\n'


@pytest.mark.parametrize("cut", [1, 2, 500])
def test_a_line_that_a_killed_writer_has_left_is_written_again(tuned, cut, capsys):
    """A whole line without its end is kept; a part of one is named once."""
    (study,) = studies(TUNED, extra=(f"runs_dir={tuned}/runs",))
    whole = tuned / "results" / "tuning" / "tuned.jsonl"
    jobs = sorted(study.tuning(Store(tuned / "results")).jobs, key=lambda job: job.name)
    text = whole.read_text()
    path = tuned / "new" / "tuning" / "tuned.jsonl"
    path.parent.mkdir(parents=True)
    last = text.splitlines(keepends=True)[-1]
    path.write_text(text[: len(text) - len(last)] + last[:-cut])
    store = Store(tuned / "new")
    assert store.has(jobs[-1].name) == (cut == 1)
    assert not store.has("another")
    warning = f"warning: {path}: the last line has no end; its record is being written, or lost\n"
    assert capsys.readouterr().err == ("" if cut == 1 else warning)
    store.write(jobs[-1].config, jobs[-1].overrides, jobs[-1].experiment, jobs[-1].tunes)
    store.sort()
    assert path.read_text() == text
    assert Store(tuned / "new").read(jobs[-1].name).headline == store.read(jobs[-1].name).headline


def test_two_runners_record_into_one_file(tuned):
    """What one adds the other sees, and neither loses a line."""
    (study,) = studies(TUNED, extra=(f"runs_dir={tuned}/runs",))
    first, second = Store(tuned / "new"), Store(tuned / "new")
    jobs = study.tuning(Store(tuned / "results")).jobs

    def write(store: Store, share: list[Job]) -> None:
        for job in share:
            store.write(job.config, job.overrides, job.experiment, job.tunes)

    with ThreadPoolExecutor(2) as pool:  # a store is for one thread
        list(pool.map(write, (first, second), (jobs[::2], jobs[1::2])))
    assert all(store.has(job.name) for store in (first, second) for job in jobs)
    merged, alone = (folder / "tuning" / "tuned.jsonl" for folder in (tuned / "new", tuned / "results"))
    first.sort()
    assert merged.read_text() == alone.read_text()
    assert all(store.has(job.name) for store in (first, second) for job in jobs)


def test_a_run_that_another_runner_records_meanwhile_is_recorded_once(tuned, monkeypatch):
    (study,) = studies(TUNED, extra=(f"runs_dir={tuned}/runs",))
    first, second = Store(tuned / "new"), Store(tuned / "new")
    job = study.tuning(Store(tuned / "results")).jobs[0]
    arguments = job.config, job.overrides, job.experiment, job.tunes

    def while_it_waits(path):
        monkeypatch.undo()
        first.write(*arguments)
        return exclusively(path)

    monkeypatch.setattr(json_lines, "exclusively", while_it_waits)
    second.write(*arguments)
    assert len((tuned / "new" / "tuning" / "tuned.jsonl").read_text().splitlines()) == 1


def test_a_tuning_run_that_is_a_final_one_too_has_a_whole_record(tuned):
    (study,) = studies(TUNED, extra=(f"runs_dir={tuned}/runs",))
    job = study.tuning(Store(tuned / "results")).jobs[0]
    store = Store(tuned / "new")
    for tunes, folder in ((True, "tuning"), (False, "runs"), (True, "runs")):
        record = store.write(job.config, job.overrides, job.experiment, tunes)
        assert (record.path.parent.name, record.outcomes is not None) == (folder, folder == "runs")
    assert [len(records_in(tuned / "new" / each / "tuned.jsonl")) for each in ("runs", "tuning")] == [1, 1]


def test_the_folders_of_a_machine_are_not_recorded(tuned):
    """The command that was given has them."""
    records = list(Store(tuned / "results").all())
    for record in records:
        assert "command" in json.loads((tuned / "runs" / record.name / "env.json").read_text())
        assert "command" not in record.environment


def test_a_run_that_two_experiments_need_is_recorded_once(tuned):
    (study,) = studies(TUNED, extra=(f"runs_dir={tuned}/runs",))
    first, second = Store(tuned / "new"), Store(tuned / "new")
    job = study.tuning(Store(tuned / "results")).jobs[0]
    for store, experiment in ((first, "one"), (second, "two")):
        store.write(job.config, job.overrides, experiment, job.tunes)
    assert list(records_in(tuned / "new" / "tuning" / "one.jsonl")) == [job.name]
    assert not (tuned / "new" / "tuning" / "two.jsonl").exists()


def test_a_line_without_an_end_does_not_stop_the_sorting(tuned):
    """Of another experiment, for example, which a killed command has left."""
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    text = path.read_text()
    path.write_text(f"{text}\n{text[:100]}")
    Store(tuned / "results").sort()
    assert path.read_text() == text


def test_a_file_of_another_user_does_not_stop_the_sorting(tuned, monkeypatch):
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    (path.parent / "another.jsonl").write_text("")

    def locked(path):
        if path.name == "another.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return exclusively(path)

    monkeypatch.setattr(json_lines, "exclusively", locked)
    Store(tuned / "results").sort()
    assert path.read_text() == "".join(lines)


@pytest.mark.parametrize("longer", [True, False])
def test_a_file_in_the_place_of_one_that_was_read(tuned, longer):
    """The system may give it the same inode."""
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[2:]))
    store = Store(tuned / "results")
    names = [json.loads(line)["name"] for line in lines]
    assert not store.has(names[0])
    path.write_text("".join(lines if longer else lines[:-3]))
    assert store.has(names[0])
    path.write_text("".join(lines))
    assert all(map(store.has, names))


def test_dirty_and_different_versions_of_the_code_are_shown(results):
    path = results / "runs" / "mini.jsonl"
    records = records_in(path)
    changes = [
        {"git": "a" * 40, "dirty": False},
        {"git": "a" * 40, "dirty": True},
        {"git": None, "dirty": False},
        {"git": "a" * 40, "dirty": False, "resumed": [{"git": "b" * 40, "dirty": False}]},
    ]
    names = ["digits-mlp-adam-s0", "digits-mlp-adam-s1", "digits-mlp-sgd-s0", "digits-mlp-sgd-s1"]
    for name, change in zip(names, changes, strict=True):
        (content,) = (content for key, content in records.items() if key.startswith(f"{name}-"))
        resumed = [{**content["environment"], **again} for again in change.pop("resumed", [])]
        content["environment"] |= {**change, "resumed": resumed}
    write_records(path, records)
    page = report.experiment_page(replace(MINI, cells=MINI.cells[:2]), Store(results))
    a, b = "a" * 10, "b" * 10
    assert provenance(records_of(page) * 2) == provenance(records_of(page))  # shown in two cells
    assert page.provenance.startswith(
        f"4 runs, code {a} (1), {a} with uncommitted changes (1), no git (1), {a} then {b} (1); torch "
    )
    assert list(page.frame["code"])[::3] == [f"{a}; {a} with uncommitted changes", f"no git; {a} then {b}"]


@pytest.mark.parametrize("part", ["config", "hash", "name"])
def test_a_record_that_is_not_what_it_says_is_refused(results, part):
    """Of whatever experiment it is."""
    path = results / "runs" / "mini.jsonl"
    records = records_in(path)
    name, content = next(iter(records.items()))
    if part == "config":
        content["config"]["optim"]["lr"] *= 2
    if part == "hash":
        content["hash"] = "0" * 12
    if part == "name":
        content["name"] = f"{name[:-12]}{'0' * 12}"
    write_records(path, records)
    with pytest.raises(
        RunError, match=r"line 1: .*its config does not match its name\); delete the line and run again"
    ):
        list(Store(results).all())


@pytest.mark.parametrize("name", [*EXPERIMENTS, *SIMULATIONS])
def test_committed_results_are_those_of_the_records(name, tmp_path):
    """Every number of a committed page, and of its blocks in other pages, is computed again; no figure is drawn."""
    page = committed_page(name)
    report.write(page, tmp_path)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix in (".md", ".csv", ".tex")]
    assert len(written) == 3 + (ROOT / "results" / "tuning" / f"{name}.csv").exists()
    for path in written:
        assert (tmp_path / path).read_text() == (ROOT / "results" / path).read_text()
    assert (page.figure is not None) == (ROOT / "results" / f"{name}.svg").exists()
    for path in report.pages_with_blocks():
        assert report.with_updated_blocks(path, [page]) == path.read_text()


@pytest.mark.slow
def test_every_records_command_repeats_it():
    """Also after a default has been changed."""
    for path in (ROOT / "results").glob("*/*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            python, script, *overrides = shlex.split(record["command"])
            assert (python, script) == ("python", "run.py")
            assert run_name(compose_many(*overrides).config) == record["name"]


def test_only_lines_that_are_drawn_take_a_color():
    """Otherwise a gain has the color of another row, because the palette is short."""
    rows = ("SGD", ()), ("Adam", (60.0, 61.0)), ("SGD-LAWN", ()), ("Adam-LAWN", (66.0, 67.0))
    found = [
        made_up(Cell(row, (f"train.batch_size={size}",), column=f"batch {size}"), *values)
        for row, values in rows
        for size in (100, 1000)
    ]
    pairs = (("SGD", "SGD-LAWN"), ("Adam", "Adam-LAWN"))
    chart = over_batch_size(Experiment("pairs", "Pairs", (), (ACCURACY,), pairs=pairs), found)
    assert [[(line.label, line.color) for line in subplots[0].lines] for subplots in chart.rows] == [
        [("Adam, ours", 0), ("Adam-LAWN, ours", 1)],
        [("Adam-LAWN over Adam, ours", 2)],
    ]


@pytest.mark.parametrize("name", [name for name, e in EXPERIMENTS.items() if e.figure == "epochs"])
def test_a_page_says_what_the_band_of_a_curve_is(name):
    assert any("its band their range" in note for note in EXPERIMENTS[name].notes)


def test_the_papers_gain_is_positive_where_a_smaller_error_is_printed():
    cells = [
        Cell(row, ("train.batch_size=100",), column="batch 100", paper=PaperResult(value))
        for row, value in (("Adam", 0.3), ("Adam-LAWN", 0.1))
    ]
    measure = replace(ACCURACY, smaller_is_better=True)
    experiment = Experiment("pairs", "Pairs", tuple(cells), (measure,), pairs=(("Adam", "Adam-LAWN"),))
    (line,) = over_batch_size(experiment, list(map(made_up, cells))).rows[1][0].lines
    assert line.y == pytest.approx([0.2])


FIGURES = [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "tuning")) for kind in (*CHARTS, "diagnostics")]


@pytest.mark.parametrize("kind", FIGURES)
def test_every_kind_of_figure_is_drawn(kind):
    experiments = [experiment for experiment in EXPERIMENTS.values() if experiment.figure == kind]
    experiments.append(replace(EXPERIMENTS["figure2"], figure=kind))  # where no run is recorded yet
    store = committed_store()
    page = next(page for page in (report.page_of(e, store) for e in experiments) if page.figure_shown)
    with io.StringIO() as file:
        page.figure().savefig(file, format="svg")
        assert file.getvalue().count("<path") > 20


def test_a_figure_is_drawn_again_only_if_it_would_be_another(tmp_path):
    drawn = []

    def draw(values: list[float]) -> Figure:
        drawn.append(values)
        return Figure()

    path = tmp_path / "figure.svg"
    for values in ([1.0], [1.0], [2.0]):
        drawing.save(drawing.Drawing(draw, np.array(values)), path)
    assert drawn == [[1.0], [2.0]]
    again = drawing.Drawing(draw, np.array([2.0]))
    path.unlink()
    drawing.save(again, path)
    path.write_bytes(b"\xff")
    drawing.save(again, path)
    assert len(drawn) == 4
    drawing.save(again, path)
    assert len(drawn) == 4


def test_svg_files_have_the_paths_of_matplotlib(tmp_path):
    figure = Figure()
    axis = figure.subplots()
    axis.plot([3.0, 1.0, 2.0], "o-")
    axis.set(xlabel="a curved label", yscale="log")
    with io.StringIO() as file, rc_context(drawing.STYLE):
        figure.savefig(file, format="svg")
        expected = _svg_paths(file.getvalue())
    drawing.save(drawing.Drawing(lambda _: figure, None), tmp_path / "figure.svg")
    saved = _svg_paths((tmp_path / "figure.svg").read_text("utf8"))
    assert len(saved) == len(expected) > 20
    for path, of_matplotlib in zip(saved, expected, strict=True):
        assert [step for step, _ in path] == [step for step, _ in of_matplotlib]
        for (_, points), (_, exact) in zip(path, of_matplotlib, strict=True):
            np.testing.assert_allclose(points, exact, atol=0.0501)


def _svg_paths(svg: str) -> list[list[tuple[str, Any]]]:
    """As an independent reader of SVG understands them."""
    pens = []
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        pens.append(RecordingPen())
        parse_path(element.get("d", ""), pens[-1])
    return [pen.value for pen in pens]


def test_every_record_is_shown():
    """By name on a page, by hash in its list of tuning runs, or as a run of the tuning curves."""

    def hashes(names: Iterable[str]) -> set[str]:
        return {name.rpartition("-")[2] for name in names}

    pages = [path.read_text() for path in (ROOT / "results").rglob("*") if path.suffix in (".md", ".csv")]
    shown = set(re.findall(r"[\w.-]+", " ".join(pages)))
    shown |= {record.name for result in committed_page("tuning_curves").cell_results for _, record in result.tried}
    for path in (ROOT / "results").rglob("*.json"):
        assert {path.stem, path.name} & shown, path
    for path in (ROOT / "results").rglob("*.jsonl"):
        assert hashes(records_in(path)) <= hashes(shown), path


def test_a_batch_size_may_be_spelled_otherwise(tmp_path):
    cell = Cell("Adam", (*SHORT, "optim=adam", "train.batch_size=1_00"))
    experiment = replace(MINI, cells=(cell,))
    assert run_experiment(experiment, tmp_path) == []
    (result,) = cell_results(experiment, Store(tmp_path / "results"))
    assert len(result.records) == 2


def test_a_large_standard_error_is_explained():
    """No mean of a committed page is uncertain by more than two points without a sentence that says why."""
    for name, experiment in EXPERIMENTS.items():
        page = committed_page(name)
        for result in page.cell_results:
            error = mean_and_error([record.value("headline") for record in result.records if not record.diverged])[1]
            if error > 2 and experiment.measures[0].key == "headline":
                assert any(f"standard error of {result.cell.name} is" in line for line in page.summary)


def test_rows_of_the_same_runs_are_told():
    cells = [Cell(row, (), panel="MovieLens", column="batch 1k") for row in ("Adam", "Adam, eps tuned", "LAMB")]
    adam, tuned, lamb = (made_up(cell, 60.0, 61.0) for cell in cells)
    experiment = Experiment("t", "T", tuple(cells), (ACCURACY,))
    assert summary(experiment, [adam, tuned, lamb]) == []
    (line,) = summary(experiment, [adam, replace(tuned, records=adam.records[:1]), lamb])
    assert line.startswith("At MovieLens, batch 1k the search chose the same setting for 'Adam' and 'Adam, eps tuned':")


def test_rows_on_other_devices_are_told():
    cells = [Cell(row, (), panel="MovieLens", column="batch 1k") for row in ("Adam", "SGD", "LAMB")]
    found = [made_up(cell, 60.0, 61.0) for cell in cells]
    found[1].records[:] = [replace(record, environment={"device": "NVIDIA H100"}) for record in found[1].records]
    (line,) = summary(Experiment("t", "T", tuple(cells), (ACCURACY,)), found)
    assert line == "At MovieLens, batch 1k, the runs of SGD are of a GPU, others of CPUs."
    found[1].records[0] = replace(found[1].records[0], environment={"device": "cpu"})
    assert summary(Experiment("t", "T", tuple(cells), (ACCURACY,)), found) == []  # some of SGD's are of each


def test_collapsed_seeds_are_told():
    cell = Cell("SGD", (), panel="MovieLens", column="batch 1k")
    experiment = Experiment("t", "T", (cell,), (ACCURACY,))
    (line,) = summary(experiment, [made_up(cell, 60.0, 0.5, 58.0, 59.0)])
    assert line == (
        "The standard error of MovieLens, batch 1k, SGD is 14.63 points: its seeds give 0.50, 58.00, 59.00, 60.00; "
        "1 of 4 collapsed."
    )
    (line,) = summary(experiment, [made_up(cell, 40.0, 50.0, 60.0)])
    assert line.endswith("its seeds give 40.00, 50.00, 60.00.")
    assert far_seeds(made_up(cell, 60.0, 59.0, 58.0, 52.9)) == 1
    assert far_seeds(made_up(cell, 60.0, 59.0, 58.0, 53.6)) == 0
    assert summary(experiment, [made_up(cell, 59.0, 60.0, 61.0)]) == []


def with_outcomes(cell: CellResult, ranks: np.ndarray) -> CellResult:
    """With ranks of test users [seeds, users] for the records' HR@10."""
    records = []
    for record, row in zip(cell.records, ranks, strict=True):
        last = {"test_hr10": 100.0 * (row < 10).mean()}
        result = {**record.result, "headline": "hr10", "last": last, "outcomes": encode_outcomes(torch.tensor(row))}
        records.append(replace(record, result=result))
    return replace(cell, records=records)


def test_comparisons_are_paired_over_users_where_records_have_ranks():
    rng = np.random.default_rng(0)
    taste = rng.integers(0, 25, 400)  # users whose item is easy or hard to find for any model
    ranks = [np.clip(taste + rng.integers(-2, 3, (8, 400)) - shift, 0, 99) for shift in (0, 1)]
    experiment, found = table()
    found = [with_outcomes(made_up(cell.cell, *range(8)), rank) for cell, rank in zip(found[1:3], ranks, strict=True)]
    (pair,) = comparisons(experiment, found)
    hits = [100.0 * (rank < 10) for rank in ranks]
    assert pair.paired
    assert pair.gain == compare_paired(hits[1], hits[0])
    assert pair.gain.p < 1e-4 < 0.1 < compare(hits[1].mean(1), hits[0].mean(1)).p * 1e9
    assert pair.adjusted == pair.gain.p
    (unpaired,) = comparisons(experiment, [found[0], made_up(found[1].cell, *range(8))])
    assert not unpaired.paired
    (single,) = comparisons(experiment, [replace(o, records=o.records[:1]) for o in found])
    assert isnan(single.gain.p)


def test_what_is_not_the_headline_metric_is_not_compared_by_outcomes():
    """They are hits, whatever the table shows."""
    experiment, found = table()
    found = [with_outcomes(made_up(o.cell, 0.0, 0.0), np.array([[1, 12], [12, 1]])) for o in found[1:3]]
    for result, errors in zip(found, ((0.3, 0.4), (0.1, 0.2)), strict=True):
        for record, error in zip(result.records, errors, strict=True):
            record.result["last"]["test_ece"] = error
    measure = Measure("test_ece", "calibration error", smaller_is_better=True)
    (pair,) = comparisons(replace(experiment, measures=(measure,)), found)
    assert (pair.gain.difference, pair.paired) == (pytest.approx(0.2), False)


def test_holm_is_over_the_table():
    experiment, found = table()
    pairs = comparisons(experiment, found)
    assert [pair.adjusted for pair in pairs] == holm([pair.gain.p for pair in pairs])
    single = [replace(o, records=o.records[:1]) for o in found]
    assert all(isnan(pair.adjusted) and isnan(pair.gain.p) for pair in comparisons(experiment, single))
    assert all(map(isnan, comparisons(experiment, single)[0].differences))  # their errors are not known


def test_what_is_decided_by_itself_alone_is_named():
    experiment, found = table()
    values = {"Adam": (66.0, 67.0, 68.0), "Adam-LAWN": (63.3, 64.3, 65.3), "SGD": (60.0, 61.0)}
    found = [made_up(o.cell, *values[o.cell.row]) for o in found]
    first, second = comparisons(experiment, found)
    assert first.gain.p < 0.05 < first.adjusted == 2 * first.gain.p == second.adjusted
    (line,) = [line for line in summary(experiment, found) if line.startswith("By itself")]
    for column in ("1k", "100k"):
        assert f"Adam-LAWN against Adam at {column} (p = 0.03, 0.059 after it)" in line
    alone = replace(experiment, cells=experiment.cells[:3])
    assert not [line for line in summary(alone, found[:3]) if line.startswith("By itself")]


@pytest.mark.parametrize(
    ("path", "blocks"),
    [
        ("README.md", ("summary-table table4",)),
        ("docs/getting-started.md", ("output demo",)),
        ("docs/optimizers.md", ("costs tuning_curves",)),
        ("results/README.md", ("summary table4", "summary figure1", "summary tuning_curves", "summary automatic")),
    ],
)
def test_pages_have_these_blocks(path, blocks):
    text = (ROOT / path).read_text()
    assert all(f"<!-- {block} -->\n" in text for block in blocks)


def test_the_overview_lists_every_page():
    text = (ROOT / "results" / "README.md").read_text()
    for name, experiment in {**EXPERIMENTS, **SIMULATIONS}.items():
        assert f"- [{experiment.title}]({name}.md)\n" in text


def test_a_summary_is_the_rows_and_columns_with_numbers_of_ours():
    page = committed_page("table4")
    tables = [table.splitlines() for table in report.summary_table(page).split("\n\n")]
    for (head, _, *rows), panel in zip(tables, page.panels, strict=False):
        ours = [k for k in range(len(panel.columns)) if any(entries[k].ours for _, entries in panel.rows)]
        assert head == f"| {' | '.join([panel.title, *(panel.columns[k] for k in ours)])} |"
        assert len(rows) == sum(any(es[k].ours for k in ours) for _, es in panel.rows)
        assert "](" not in "".join(rows)
    assert report.summary_table(replace(page, panels=[Panel("P", ["c"], [("row", [Entry("", "66.00")])])])) == ""


@pytest.mark.parametrize("name", ["table2", "table4"])
def test_comparisons_tell_how_far_both_are_from_the_papers_numbers(name):
    page = committed_page(name)
    cells = page.frame.set_index(["panel", "column", "row"])
    for pair in page.pairs:
        for row, apart in zip((pair.base, pair.rival), pair.differences, strict=True):
            cell = cells.loc[(pair.panel, pair.column, row)]
            outside = abs(cell["difference"]) > max(cell["standard_error"], cell["paper_standard_error"] or 0)
            assert apart == pytest.approx(cell["difference"] if outside else nan, nan_ok=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_of_a_table_links_to_its_records(name):
    recorded = {path.name: records_in(path) for path in (ROOT / "results" / "runs").iterdir()}
    for row in (ROOT / "results" / f"{name}.md").read_text().splitlines():
        if row.startswith("| ") and "n=" in row:
            (first, *_), links = re.findall(r"n=\d+\)( <sup>.*?</sup>)?", row), re.findall(r"\]\(([^)]*)\)", row)
            assert first
            assert links
            for link in links:
                file, _, record = link.partition(" ")
                assert not file.startswith("runs/") or record.strip('"') in recorded[file.removeprefix("runs/")]
                assert "https:" in file or (ROOT / "results" / file).exists()
