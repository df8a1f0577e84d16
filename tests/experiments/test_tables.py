"""The paper's tables and figures as data: the right cells, with the paper's numbers, that can be run."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from experiments.definitions.spec import Cell
from experiments.planning.grid import Grid
from experiments.planning.study import Study, studies
from experiments.selection import EXPERIMENTS
from lawn.arguments import arguments
from lawn.compose import compose
from lawn.config import EvalConfig
from lawn.identity import run_name
from lawn.models.mlp import mlp
from lawn.optimizers import OPTIMIZERS, optimizer_arguments
from lawn.task import TASKS, task_builder
from tests.helpers import ROOT

COUNTS = {"table1": 10, "table2": 24, "table3": 30, "table4": 60, "table5": 48, "table6": 4, "figure2": 32}


@pytest.mark.parametrize(("name", "cells"), COUNTS.items())
def test_the_papers_cells(name, cells):
    assert sum(cell.paper is not None for cell in EXPERIMENTS[name].cells) == cells


def test_cells_beyond_the_paper():
    beyond = {e.name: {c.row for c in e.cells if c.paper is None} for e in EXPERIMENTS.values()}
    assert beyond["table4"] == {"SGD-LAWN", "Adam, eps tuned"}
    assert beyond["table1"] == beyond["table3"] == {"Adam, eps tuned"}
    assert len(EXPERIMENTS["table4"].cells) == 84
    assert len(EXPERIMENTS["figure1"].cells) == 2
    assert all(not rows for name, rows in beyond.items() if name in ("table2", "table5", "table6"))
    for experiment in EXPERIMENTS.values():
        assert len({cell.name for cell in experiment.cells}) == len(experiment.cells)
        if experiment.pairs:
            rows = {cell.row for cell in experiment.cells}
            assert any(set(pair) <= rows for pair in experiment.pairs)


def test_paper_values_by_hand():
    def printed(name: str, panel: str, column: str, row: str):
        (cell,) = [c for c in EXPERIMENTS[name].cells if (c.panel, c.column, c.row) == (panel, column, row)]
        return cell.paper.value, cell.paper.error

    assert printed("table1", "ImageNet", "batch 16k", "Adam-LAWN") == (76.07, 0.08)
    assert printed("table2", "MovieLens-1M", "batch 100k", "Adam, Hoffer et al.") == (45.52, None)
    assert printed("table2", "CIFAR-100", "batch 4k", "Adam-LAWN") == (73.13, None)
    assert printed("table3", "CIFAR-100", "batch 10k", "LAMB-LAWN") == (69.16, 0.45)
    assert printed("table4", "MovieLens-100k", "batch 400k", "LAMB") == (62.57, 0.25)
    assert printed("table4", "Pinterest", "batch 1M", "SGD") == (None, 0.25)
    assert printed("table5", "CIFAR-10", "focal 5", "Adam, eps 1e-8, batch 4k") == (87.88, None)
    assert printed("table5", "CIFAR-100", "cross entropy", "Adam-LAWN, batch 10k") == (72.97, None)
    assert printed("table6", "CIFAR-100", "batch 256", "Adam, eps 1e-8") == (0.292, None)
    assert printed("figure2", "ImageNet", "batch 256", "Adam, eps 1e-8") == (71.16, 0.05)


def test_overrides_by_hand():
    cells = {(e.name, c.name): c for e in EXPERIMENTS.values() for c in e.cells}
    focal = cells["table5", "MovieLens-1M, focal 0.5, Adam-LAWN, batch 1M"]
    assert focal.overrides == (
        "dataset=movielens1m", "optim=adam_lawn", "train.batch_size=1000000", "loss=focal", "loss.gamma=0.5"
    )  # fmt: skip
    assert (focal.epochs, focal.sweep) == ((500, 75), "ncf/adam_lawn")
    smoothed = cells["table2", "CIFAR-10, batch 4k, Adam, label smoothing"]
    assert smoothed.overrides[1:] == (
        "optim=adam", "train.batch_size=4000", "loss=label_smoothing", "loss.smoothing=0.05"
    )  # fmt: skip
    assert (smoothed.epochs, smoothed.sweep) == ((300, 30), "cifar/adam")
    million = cells["table4", "MovieLens-1M, batch 10k, LAMB"]
    assert (million.epochs, million.budgets(), million.budgets(-1)) == ((300, 60), (300, 60, 15), (60, 15))
    assert cells["table1", "ImageNet, batch 16k, LAMB+"].overrides == (
        "dataset=imagenet", "optim=lamb_plus", "train.batch_size=16384"
    )  # fmt: skip


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS.values() if e.name != "figure2"], ids=lambda e: e.name)
@pytest.mark.slow
def test_every_cell_composes_and_builds(experiment):
    for cell in experiment.cells:
        budget = [f"train.epochs={cell.epochs[0]}"] if cell.epochs else []
        sweep = [f"sweep={cell.sweep}"] if cell.sweep else []
        config = compose(*cell.overrides, *budget, *sweep)
        task_builder(config)
        chosen = optimizer_arguments(config)
        if "free_steps" in chosen:
            chosen["free_steps"] = 1
        OPTIMIZERS[config.optim.name](mlp((4,), 3, widths=[5]), **chosen)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_settings_of_a_grid_are_different_runs(step):
    by_sweep = {c.sweep: c for e in EXPERIMENTS.values() for c in e.cells if c.sweep}
    assert len(by_sweep) > 15
    for cell in list(by_sweep.values())[::step]:
        grid = Study(cell, cell.epochs).grid
        assert len({job.name for job in grid.jobs()}) == len(grid.points) >= 8


def test_the_figures_cells_are_those_of_the_tables():
    tables = {cell for e in EXPERIMENTS.values() if e.name.startswith("table") for cell in e.cells}
    assert set(EXPERIMENTS["figure2"].cells) <= tables


def test_every_model_of_the_tables_builds():
    sizes = {"ncf_mlp": (50, 60), "vgg19": ((3, 32, 32), 10), "resnet50": ((3, 64, 64), 10)}
    datasets = {cell.value("dataset") for e in EXPERIMENTS.values() for cell in e.cells} - {"digits"}
    for config in [compose(f"dataset={dataset}") for dataset in sorted(datasets)]:
        task = next(task for task in TASKS if config.dataset.name in task.datasets)
        builder = task.models[config.model.name]
        with torch.device("meta"):
            network = builder(*sizes[config.model.name], **arguments("model", config.model, builder))
        assert sum(p.numel() for p in network.parameters()) > 1000


@pytest.mark.parametrize("name", ["table4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("table3", "table1"))])
def test_a_study_runs_what_the_command_line_runs(name):
    """The fast way to the config of a setting gives the run of the overrides that stand in its record."""
    experiment = EXPERIMENTS[name]
    for study in studies(experiment.only([experiment.cells[-1].overrides[0]]), -1)[::8]:
        beyond = (-1, *study.grid.points[0][1:])
        for job in (*study.grid.jobs()[:: len(study.grid.points) - 1], study.grid.job(beyond, 2)):
            composed = compose(*job.overrides)
            assert run_name(composed) == job.name
            assert composed.eval.split == "val"
            assert composed.eval.every == composed.train.epochs


@pytest.mark.parametrize("all_items", [True, False])
def test_a_final_run_is_that_of_its_command(all_items):
    """Whatever the sweep preset says of the evaluation."""
    overrides = ("dataset=movielens100k", "optim=adam", "train.epochs=2", "eval.every=2")
    record = SimpleNamespace(headline=60.0, diverged=False, result={"last": {"step": 9, "epoch": 3}})
    study = Study(Cell("Adam", overrides, sweep="ncf/adam", all_items=all_items))
    job = next(study.final_runs(SimpleNamespace(read=lambda _: record, has=lambda _: True)))
    assert job.config.eval == EvalConfig(every=2, candidates="all" if all_items else None)
    assert job.name == run_name(compose(*job.overrides))


def test_grids_are_logarithmic_in_the_rate_and_differ_only_by_what_they_tune():
    for path in sorted((ROOT / "conf" / "sweep").glob("*/*.yaml")):
        axes = OmegaConf.load(path).hydra.sweeper.params
        assert all(key.startswith(("optim.", "schedule.")) for key in axes)  # keys that no other key depends on
        rates = [float(rate) for rate in axes["optim.lr"].split(",")]
        steps = [b / a for a, b in pairwise(rates)]
        assert all(1.6 < step < 3.4 for step in steps), path
        assert (path.stem.endswith("_lawn")) == ("optim.free_epochs" in axes), path
        assert not (path.stem.endswith("_lawn") and "optim.weight_decay" in axes), path


def test_the_presets_of_the_tables_exist():
    for experiment in EXPERIMENTS.values():
        for cell in experiment.cells:
            assert cell.sweep is None or Path(ROOT / "conf" / "sweep" / f"{cell.sweep}.yaml").exists()


def test_a_grid_over_a_key_that_others_depend_on_is_refused(monkeypatch):
    """E_free and E_warmup are proportional to train.epochs."""
    grid = Grid.__wrapped__(("dataset=digits", "optim=adam_lawn"), "cifar/adam_lawn", "val", (), "")
    monkeypatch.setattr(grid, "axes", {"optim.lrr": ["1", "2"]})
    assert grid.problem.startswith("optim.lrr: no such key; optim takes ")
    grid = Grid.__wrapped__(("dataset=digits", "optim=adam_lawn"), "cifar/adam_lawn", "val", (), "")
    monkeypatch.setattr(grid, "axes", {"train.epochs": ["10", "20"]})
    assert grid.problem == "train.epochs=10: other keys depend on it, so it cannot be an axis of a grid"


def test_a_list_that_depends_on_an_axis_is_found(monkeypatch):
    """Though nothing depends on it in the same grid without the list."""
    for widths, problem in (
        ("model.widths=[4]", None),
        (
            "model.widths=[${train.batch_size},4]",
            "train.batch_size=16: other keys depend on it, so it cannot be an axis of a grid",
        ),
    ):
        grid = Grid.__wrapped__(("dataset=digits", "optim=sgd", widths), "peak_lr", "val", (), "")
        monkeypatch.setattr(grid, "axes", {"train.batch_size": ["16", "32"]})
        assert grid.problem == problem


def test_each_axis_of_a_grid_is_looked_at(monkeypatch):
    """Nothing depends on the first."""
    grid = Grid.__wrapped__(("dataset=digits", "optim=adam_lawn"), "cifar/adam_lawn", "val", (), "")
    monkeypatch.setattr(grid, "axes", {"optim.lr": ["1", "2"], "train.epochs": ["10", "20"]})
    assert grid.problem == "train.epochs=10: other keys depend on it, so it cannot be an axis of a grid"
