"""Miniatures of experiments, of runs that take less than a second."""

from dataclasses import replace
from pathlib import Path

from experiments.definitions.spec import Cell, Experiment, Measure
from experiments.execution.pool import JobResult
from experiments.execution.runner import run
from experiments.planning.study import studies
from experiments.records import Store
from tests.helpers import FIXTURES

SHORT = ("dataset=digits", "train.epochs=3", "model.widths=[8]", "dataset.limit=100")
ACCURACY = Measure("headline", "test accuracy, %")
MINI = Experiment(
    "mini",
    "A miniature",
    (
        Cell("Adam", (*SHORT, "optim=adam")),
        Cell("Fails", (*SHORT, "optim=sgd", "optim.lr=1e20")),
        Cell("None", (*SHORT, "optim.lr=0.5")),
    ),
    (
        ACCURACY,
        Measure("train_loss", "training loss", -2, curve="log"),
        Measure("margin_p50", "margin", curve="linear"),
    ),
    figure="epochs",
    seeds=2,
)

TUNED = Experiment("tuned", "Tuned", (Cell("Adam", (*SHORT, "optim=adam"), sweep="peak_lr"),), (ACCURACY,), seeds=2)


def run_experiment(
    experiment: Experiment, folder: Path, seeds: int = 2, budget: int = 0, *extra: str
) -> list[JobResult]:
    """Run all of an experiment on one device slot, with runs in folder/runs and records in folder/results; what
    failed."""
    placed = (f"runs_dir={folder}/runs", *extra)
    unsuccessful = run(studies(experiment, budget, extra=placed, seeds=seeds), Store(folder / "results"), ["cpu"])
    return [ended for ended in unsuccessful if not ended.diverged]


def miniature(experiment: Experiment, tuned: bool = False) -> Experiment:
    """Every row and every panel of a table, for an epoch of tiny data; `tuned`: the first cell is."""
    cells = []
    seen: set[str] = set()
    for cell in experiment.cells:
        if {cell.row, cell.panel} <= seen:
            continue
        seen |= {cell.row, cell.panel}
        dataset = cell.value("dataset")
        small = ("model.widths=[8]", "dataset.limit=100") if dataset == "digits" else FIXTURES[dataset]
        if dataset.startswith(("cifar", "imagenet")):
            small = (*small, "model=mlp", "model.widths=[8]", "dataset.val_fraction=0.25")
        sweep = "peak_lr" if tuned and not cells else None
        cells.append(replace(cell, overrides=(*cell.overrides, *small), epochs=(2, 1), sweep=sweep))
    return replace(experiment, cells=tuple(cells))
