"""Tuning curves: a miniature from runs to page, and the words about made-up grids."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from experiments.definitions.tuning_curves import FULL, SHORT, TUNING_CURVES
from experiments.planning.study import studies
from experiments.records import Store
from experiments.reporting import report, tuning_tables
from experiments.reporting.curves import by_value, costs
from experiments.reporting.trials import best_of_curves
from tests.experiments.helpers import ACCURACY, committed_page, run_experiment

SMALL = ("dataset=digits", "model.widths=[8]", "dataset.limit=100", "optim=adam")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One optimizer, whose grid is run for a short and a whole schedule."""
    cell = replace(TUNING_CURVES.cells[0], row="Adam-LAWN", overrides=SMALL, sweep="cifar/adam")
    cells = (replace(cell, panel=SHORT, epochs=(2,)), replace(cell, panel=FULL, epochs=(6,)))
    experiment = replace(TUNING_CURVES, cells=cells, measures=(ACCURACY,))
    folder = tmp_path_factory.mktemp("curves")
    assert run_experiment(experiment, folder) == []
    return experiment, folder / "results"


def test_every_setting_is_run_once_and_no_more(small):
    experiment, results = small
    store = Store(results)
    assert len(list(store.all())) == 24
    assert all(study.missing(store) == ([], 0) for study in studies(experiment))
    assert not (results / "runs").exists()


def test_the_page_of_a_miniature(small):
    experiment, results = small
    page = report.page_of(experiment, Store(results))
    report.write(page, results)
    text = (results / "tuning_curves.md").read_text()
    scores = sorted(record.value("headline") for _, record in page.cell_results[0].tried)
    draws = [max(draw) for draw in product(scores, repeat=1)]
    listed = pd.read_csv(results / "tuning_curves.csv")
    assert listed["mean"].iloc[0] == pytest.approx(np.mean(draws), rel=1e-5)
    assert listed["mean"].iloc[11] == pytest.approx(scores[-1], rel=1e-5)
    assert list(listed["k"]) == [*range(1, 13), *range(1, 13)]
    assert f"| Adam-LAWN | {listed['mean'].iloc[4]:.2f} (" in text
    assert "of 12 settings the best after 6 epochs" in text
    assert "with 12 runs." in text
    assert (results / "tuning_curves.svg").exists()


def test_a_grid_with_holes_has_no_curve(small, tmp_path):
    experiment, results = small
    lines = (results / "tuning" / "tuning_curves.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "tuning_curves.jsonl").write_text("".join(lines[1:]))
    page = report.page_of(experiment, Store(tmp_path))
    assert len(best_of_curves(list(page.cell_results))) == 1
    assert not any("has rank" in line for line in page.summary)
    assert report.page_of(experiment, Store(tmp_path / "nothing")).summary == []


def test_the_best_score_at_each_value_is_that_of_the_runs():
    page = committed_page("tuning_curves")
    listed = tuning_tables.frame(page.cell_results)
    runs = listed.assign(score=listed["val_hr10"].fillna(0))
    runs["share"] = (100 * runs["optim.free_epochs"].astype(float) / runs["epochs"]).round(6)
    for result, _ in best_of_curves(list(page.cell_results)):
        cell, tried = result.cell, by_value(result)
        here = runs[(runs["panel"] == cell.panel) & (runs["column"] == cell.column) & (runs["row"] == cell.row)]
        values = here["share"] if "LAWN" in cell.row else here["optim.weight_decay"].astype(float)
        best = here.groupby(values)["score"].max()
        assert {float(value): score for value, score in tried.best.items()} == pytest.approx(best.to_dict())
        assert tried.cost == pytest.approx(best.max() - best.min())
        assert tried.winner in best[best == best.max()].index


def test_the_costs_are_of_both_sides_of_a_pair():
    page = committed_page("tuning_curves")
    tried = {(o.cell.panel, o.cell.column, o.cell.row): by_value(o) for o, _ in best_of_curves(list(page.cell_results))}
    for line in costs(page.experiment, list(page.cell_results)):
        rival, base = next(
            pair[::-1] for pair in page.experiment.pairs if line.startswith("{1} beside {0}, ".format(*pair))
        )
        shared = [place for *place, row in tried if row == rival and (*place, base) in tried]
        free, decay = ([tried[*place, row].cost for place in shared] for row in (rival, base))
        assert f"{base}, {len(shared)} grids: " in line
        assert f"costs {np.mean(free):.2f} points on average and at most {max(free):.2f};" in line
        assert line.endswith(f" weight decay {np.mean(decay):.2f} and {max(decay):.2f}.")


def test_a_grid_without_either_hyperparameter_is_left_out(small):
    experiment, results = small
    page = report.page_of(experiment, Store(results))
    assert [by_value(result) for result in page.cell_results] == [None, None]
    assert page.by_value is None
    assert costs(replace(experiment, pairs=(("Adam-LAWN", "Adam-LAWN"),)), list(page.cell_results)) == []
