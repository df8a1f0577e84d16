"""Miniatures of experiments, of runs that take less than a second."""

import gzip
import json
import re
import time
from base64 import b64decode
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from experiments.definitions.spec import Cell, Experiment, Measure
from experiments.execution import runner
from experiments.execution.executor import Executor, JobResult
from experiments.execution.pool import Pool
from experiments.planning.grid import Job
from experiments.planning.study import studies
from experiments.record import Record
from experiments.records import Store
from experiments.reporting import report
from experiments.reporting.page import Page
from experiments.reporting.simulations import simulation_page
from experiments.selection import EXPERIMENTS, SIMULATIONS
from lawn.errors import UserError
from lawn.train import train, train_vectorized
from tests.helpers import FIXTURES, ROOT

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


RESULTS = ROOT / "results"


@cache
def committed_store() -> Store:
    return Store(RESULTS)


@cache
def committed_page(name: str) -> Page:
    """The page of an experiment or a simulation from the committed records; no test changes it."""
    if name in SIMULATIONS:
        return simulation_page(SIMULATIONS[name], RESULTS)
    return report.page_of(EXPERIMENTS[name], committed_store())


class SerialPool(Pool):
    """Trains in the process of the tests, which takes a fraction of the CPU time of a process for every job."""

    def __enter__(self) -> "SerialPool":
        self._ended: list[JobResult] = []
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def running(self) -> int:
        return len(self._ended)

    def places(self, job: Job) -> int:
        return 0 if self._ended else 1

    def start(self, jobs: list[Job]) -> None:
        begin = time.monotonic()
        configs = [replace(job.config, device="cpu") for job in jobs]
        log = Path(configs[0].runs_dir) / jobs[0].name / "output.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        failure = None
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                train_vectorized(configs) if len(configs) > 1 else train(configs[0])
            except UserError as error:
                failure = str(error)
        seconds = (time.monotonic() - begin) / len(jobs)
        self._ended = [JobResult(job, seconds, failure, len(jobs)) for job in jobs]

    def wait(self, timeout: float) -> list[JobResult]:
        ended, self._ended = self._ended, []
        return ended


def records_of(page: Page) -> list[Record]:
    return [record for result in page.cell_results for record in result.records]


def run_experiment(
    experiment: Experiment,
    folder: Path,
    seeds: int = 2,
    budget: int = 0,
    extra: tuple[str, ...] = (),
    selection: str = "val",
    executor: Executor | None = None,
    vectorize: int = runner.MAX_VECTORIZED,
) -> list[JobResult]:
    """Run all of an experiment, with runs in folder/runs and records in folder/results; returns the failed jobs.

    Without an executor, in this process.
    """
    placed = (f"runs_dir={folder}/runs", *extra)
    store = Store(folder / "results")
    unsuccessful = runner.run(
        studies(experiment, budget, selection, placed, seeds),
        store,
        executor or SerialPool(["cpu"]),
        vectorize=vectorize,
    )
    return [ended for ended in unsuccessful if not ended.diverged]


def unfolded(text: str) -> str:
    """A results page with what it has packed to be unfolded."""
    packed = r'<script type="application/gzip" id="fold-[^"]*">(.*?)</script>'
    return re.sub(packed, lambda found: gzip.decompress(b64decode(found[1])).decode(), text)


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


def records_in(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file of records by their names."""
    return {content["name"]: content for content in map(json.loads, path.read_text().splitlines())}


def write_records(path: Path, records: dict[str, dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(content)}\n" for content in records.values()))
