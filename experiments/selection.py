"""The experiments and simulations, and which of them and of their runs the options of the command choose."""

import argparse
from typing import Any

from experiments.definitions.automatic import AUTOMATIC
from experiments.definitions.demo import DEMO
from experiments.definitions.figures import FIGURE1, FIGURE2, FLATTENING_DIGITS, FLATTENING_MOVIELENS100K
from experiments.definitions.horizon import HORIZON
from experiments.definitions.matrix_factorization import MATRIX_FACTORIZATION
from experiments.definitions.tables import TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6
from experiments.definitions.tuning_curves import TUNING_CURVES
from experiments.planning.study import Study, check_settable, studies
from experiments.reporting.references import REFERENCES
from experiments.reporting.simulations import Simulation
from experiments.spherical_motion.page import SMD_RAYLEIGH
from lawn.errors import ConfigError

_TABLES = (TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6, FIGURE1, FIGURE2)
_BEYOND = (HORIZON, MATRIX_FACTORIZATION, TUNING_CURVES, AUTOMATIC, FLATTENING_DIGITS, FLATTENING_MOVIELENS100K)
EXPERIMENTS = {e.name: e for e in (*_TABLES, DEMO, *_BEYOND)}
SIMULATIONS = {s.name: s for s in (SMD_RAYLEIGH, REFERENCES)}
OF_SIMULATIONS = {"action", "parser", "names", "results", "short", "port"}  # arguments that simulations have


def chosen_studies(given: argparse.Namespace) -> list[Study]:
    """The studies of the experiments named; a cell in several experiments is listed once, with most of its seeds.

    Raises ConfigError for an unknown name, and for options that change nothing.
    """
    for name in given.names:
        check_name(name)
    chosen = [EXPERIMENTS[name].only(given.only) for name in given.names if name in EXPERIMENTS]
    for experiment in chosen:
        if given.short and all(len(cell.epochs) < 2 for cell in experiment.cells):
            raise ConfigError(f"--short: {experiment.name} has one budget of epochs; leave it out")
        if given.seeds and all(cell.grid_only for cell in experiment.cells):
            raise ConfigError(f"--seeds: {experiment.name} runs every setting once; leave it out")
    how = (-1 if given.short else 0, given.selection, tuple(given.set), given.seeds)
    found = [study for experiment in chosen for study in studies(experiment, *how)]
    kept: dict[tuple[Any, ...], Study] = {}
    for study in found:
        key = study.cell.overrides, study.cell.sweep, study.cell.grid_only, study.budget
        if key not in kept or study.seeds >= kept[key].seeds:
            kept[key] = study
    return list(kept.values())


def chosen_simulations(given: argparse.Namespace) -> list[Simulation]:
    """The named simulations. Raises ConfigError for options about runs, which a simulation does not have.

    Beside an experiment most options are about its runs.
    """
    named = [SIMULATIONS[name] for name in dict.fromkeys(given.names) if name in SIMULATIONS]
    alone = len(named) == len({*given.names})
    options = vars(given).keys() - OF_SIMULATIONS if alone else {"only", "set"}
    for option in sorted(options):
        refused = [simulation.name for simulation in named if option != "set" or not simulation.needs_data]
        if refused and getattr(given, option) != given.parser.get_default(option):
            raise ConfigError(
                f"--{option.replace('_', '-')}: {refused[0]} is a simulation, without runs of run.py; leave it out"
            )
    if named:
        check_settable(given.set)
    return named


def check_name(name: str) -> None:
    """Raises ConfigError for a name that is neither an experiment nor a simulation."""
    known = [*EXPERIMENTS, *SIMULATIONS]
    if name not in known:
        raise ConfigError(f"{name}: no such experiment; choose from {', '.join(known)}")
