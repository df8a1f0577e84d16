"""Simulations: studies that are one computation instead of a table of runs.

A simulation has one record, results/simulations/NAME-HASH.json, in the form of all records, with the hash of its
settings. Its page is that of an experiment.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.record import Record, read_record, save
from experiments.reporting.drawing import Drawing
from experiments.reporting.layout import Panel
from experiments.reporting.page import Page, provenance
from lawn.errors import RunError
from lawn.identity import identity_hash
from lawn.train.provenance import environment

FOLDER = "simulations"  # beside runs/
CODE = ("lawn", "experiments")  # what a simulation's numbers come from


@dataclass(frozen=True)
class SimulationContent:
    """The content of the page, from the record alone."""

    panels: list[Panel]
    summary: list[str]
    frame: pd.DataFrame
    figure: Drawing | None


@dataclass(frozen=True)
class Simulation:
    name: str
    title: str
    settings: Any  # a dataclass of all settings that affect the result
    short: Any  # the same, for seconds of computing
    run: Callable[..., dict[str, Any]]  # of the settings, and of `overrides` with `needs_data`
    show: Callable[[Record], SimulationContent]
    measured: str  # what the numbers are
    notes: tuple[str, ...]
    seconds: tuple[float, float]  # about what both take on one core
    needs_data: bool = False

    def record(self, results: Path, short: bool = False) -> Record | None:
        """Raises RunError if the record is damaged or does not match its name."""
        path = self._path(results, short)
        return read_record(path) if path.exists() else None

    def seconds_left(self, results: Path, short: bool) -> float:
        """About how long it takes to compute; 0 with a record."""
        return 0.0 if self.record(results, short) else self.seconds[short]

    def execute(self, results: Path, short: bool = False, overrides: Sequence[str] = ()) -> Record:
        """Compute and record it; `overrides` of run.py say where the data is, for a simulation that needs any."""
        settings = self.short if short else self.settings
        content = {
            "hash": identity_hash(asdict(settings)),
            "command": f"python -m experiments run {self.name}" + (" --short" if short else ""),
            "config": asdict(settings),
            "environment": environment(torch.device("cpu"), CODE),
            "result": self.run(settings, overrides) if self.needs_data else self.run(settings),
        }
        return save(self._path(results, short), content)

    def _path(self, results: Path, short: bool) -> Path:
        settings = self.short if short else self.settings
        return results / FOLDER / f"{self.name}-{identity_hash(asdict(settings))}.json"


def simulation_page(simulation: Simulation, results: Path) -> Page:
    """The page of a simulation, from its full record, or else from the short one. Raises RunError for a damaged one."""
    full, short = simulation.record(results), simulation.record(results, short=True)
    record = full or short
    measured = simulation.measured
    if record is not None and record is short:
        measured += " These are numbers of the short settings, --short: few updates, few repeats."
    shown, source = SimulationContent([], [], pd.DataFrame(), None), provenance([])
    if record is not None:
        with _reading(record):
            shown, source = simulation.show(record), provenance([record])
    figure = None
    if record is not None and shown.figure is not None:
        figure = replace(shown.figure, function=_reading(record)(shown.figure.function))
    return Page(
        name=simulation.name,
        title=simulation.title,
        notes=simulation.notes,
        panels=shown.panels,
        measured=measured,
        provenance=source,
        summary=shown.summary,
        frame=shown.frame,
        figure=figure,
        figure_shown=record is not None,
        source="" if record is None else f"{FOLDER}/{record.name}.json",
    )


@contextmanager
def _reading(record: Record) -> Iterator[None]:
    """Raises RunError for any error of the body: the record lacks something."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"{record.path}: damaged record ({type(error).__name__}: {reason})") from error
