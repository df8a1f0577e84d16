"""Simulations: studies that are computed in one piece, with a model of their own, and no table of run.py's runs.

A simulation leaves one record, results/simulations/NAME-HASH.json, of the form of all other records; the hash is that
of its settings. Its page is shown and written like that of an experiment.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.records import Record, read_record, save
from experiments.reporting.layout import Panel
from experiments.reporting.outcomes import Outcome
from experiments.reporting.page import provenance
from lawn.config import identity_hash
from lawn.errors import RunError
from lawn.plotting import Figure
from lawn.train.provenance import environment

FOLDER = "simulations"  # beside runs/
CODE = ("lawn", "experiments")  # what a simulation's numbers come from


@dataclass(frozen=True)
class Shown:
    """What is said of a record, from that alone."""

    panels: list[Panel]
    summary: list[str]
    frame: pd.DataFrame
    figure: Callable[[], Figure]


@dataclass(frozen=True)
class Simulation:
    name: str
    title: str
    settings: Any  # a dataclass that says all that decides what comes out
    short: Any  # the same, for seconds of computing
    run: Callable[[Any], dict[str, Any]]
    show: Callable[[Record], Shown]
    measured: str  # what the numbers are
    notes: tuple[str, ...] = ()
    seconds: tuple[float, float] = (0.0, 0.0)  # about what both take on one core

    def record(self, results: Path, short: bool = False) -> Record | None:
        """Raises RunError where it is damaged, or not what its name says."""
        path = self._path(results, short)
        return read_record(path) if path.exists() else None

    def execute(self, results: Path, short: bool = False) -> Record:
        """Compute and record it."""
        settings = self.short if short else self.settings
        content = {
            "hash": identity_hash(asdict(settings)),
            "command": f"python -m experiments run {self.name}" + (" --short" if short else ""),
            "config": asdict(settings),
            "environment": environment(torch.device("cpu"), CODE),
            "result": self.run(settings),
        }
        return save(self._path(results, short), content)

    def _path(self, results: Path, short: bool) -> Path:
        settings = self.short if short else self.settings
        return results / FOLDER / f"{self.name}-{identity_hash(asdict(settings))}.json"


class SimulationPage:
    """What is shown of a simulation: of its full record, else of the short one. It has what `page.Page` has."""

    marks = ""
    source_title = "The record"
    found: list[Outcome] = []
    comparisons = tuned = None
    grids: list[str] = []
    warnings: dict[str, list[str]] = {}

    def __init__(self, simulation: Simulation, results: Path) -> None:
        self.experiment = simulation
        self.name = simulation.name
        full, short = simulation.record(results), simulation.record(results, short=True)
        record = full or short
        self.records = [] if record is None else [record]
        self.shown: Shown | None = None
        if record is not None:
            with _reading(record):
                self.shown = simulation.show(record)
        self.measured = simulation.measured
        if record is not None and record is short:
            self.measured += " These are numbers of the short settings, --short: few updates, few repeats."

    @property
    def figured(self) -> bool:
        return self.shown is not None

    def figure(self) -> Figure:
        """Raises RunError where the record lacks what is drawn."""
        assert self.shown is not None
        with _reading(self.records[0]):
            return self.shown.figure()

    @property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame() if self.shown is None else self.shown.frame

    @property
    def panels(self) -> list[Panel]:
        return [] if self.shown is None else self.shown.panels

    @property
    def summary(self) -> list[str]:
        return [] if self.shown is None else self.shown.summary

    @property
    def source(self) -> str:
        """The record, from results/."""
        return f"{FOLDER}/{self.records[0].name}.json" if self.records else ""

    @property
    def provenance(self) -> str:
        return provenance(self.records)


@contextmanager
def _reading(record: Record) -> Iterator[None]:
    """Whatever is raised inside is for want of something in the record."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"{record.path}: damaged record ({type(error).__name__}: {reason})") from error
