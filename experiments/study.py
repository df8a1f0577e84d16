"""A study: a cell at a budget of epochs, expanded into the runs that choose its hyperparameters and those that fill it.

Choosing: every setting of the cell's sweep preset is run once, with seed 0; the best headline metric at the last
epoch wins, a diverged run loses, the first of equals is kept. Filling: the chosen setting with every seed, on test.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import count, islice, product
from math import inf, isnan
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from experiments.records import Record, Store
from experiments.spec import Cell, Experiment
from lawn.config import Config, EvalConfig, config_hash, register
from lawn.errors import ConfigError
from lawn.validation import explain, validate

CONF = Path(__file__).resolve().parents[1] / "conf"
SELECTIONS = ("val", "test")
PLACES = (  # what --set may say: where and how fast, nothing that names another run
    *("data_dir", "runs_dir", "logger", "logger.project", "logger.mode", "dataset.shards", "dataset.workers"),
    *("train.channels_last", "train.checkpoint_seconds", "train.compile", "train.deterministic", "optim.fused"),
)


@dataclass(frozen=True)
class Job:
    """One run of a study; `overrides` are what run.py is given for the same run."""

    config: Config
    overrides: tuple[str, ...]
    tuning: bool

    @cached_property
    def hash(self) -> str:
        return config_hash(self.config)

    @property
    def wide(self) -> bool:
        """Whether it takes all devices at once: on one of them it would take days."""
        return self.config.dataset.name == "imagenet"


class Study:
    """`budget` None: the dataset's own number of epochs. `extra` overrides say where and how to run."""

    def __init__(self, cell: Cell, budget: int | None, selection: str = "val", extra: tuple[str, ...] = ()) -> None:
        self.cell = cell
        self.budget = budget
        self.selection = selection
        self._overrides = cell.overrides if budget is None else (*cell.overrides, f"train.epochs={budget}")
        self._extra = extra

    @cached_property
    def problem(self) -> str | None:
        """Why there is no run of it: a key or a value that cannot be; None where there is no such."""
        try:
            runs = [self._config, *(job.config for job in self.tuning)]  # all of them are composed and checked
            if self.cell.sweep and len(runs) == 1:
                return f"sweep={self.cell.sweep}: no such sweep, or an empty one"
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            return explain(error)
        return None

    @cached_property
    def _composition(self) -> tuple[DictConfig, dict[str, str]]:
        sweep = () if self.cell.sweep is None else (f"sweep={self.cell.sweep}",)
        return _compose((*self._overrides, *sweep, *self._extra))

    @cached_property
    def _config(self) -> Config:
        """The cell as it is, at no point of its grid."""
        return validate(self._composition[0])

    @cached_property
    def axes(self) -> dict[str, list[str]]:
        """The values of each hyperparameter of the sweep preset; none where nothing is tuned."""
        swept = self._composition[1].items() if self.cell.sweep else ()
        parsed = [_parsed(f"{key}={values}") for key, values in swept]
        return {axis.key_or_group: list(axis.sweep_string_iterator()) for axis in parsed}

    @cached_property
    def settings(self) -> list[tuple[str, ...]]:
        """The points of the grid, as overrides."""
        if not self.axes:
            return []
        return list(product(*([f"{key}={value}" for value in values] for key, values in self.axes.items())))

    @cached_property
    def tuning(self) -> list[Job]:
        changed = self._composition[0].copy()  # one for all settings, since each has a value for the same keys
        jobs = []
        for setting in self.settings:
            point = (*setting, f"eval.split={self.selection}")
            for override in map(_parsed, point):
                # Far faster than to compose the config with them.
                OmegaConf.update(changed, override.key_or_group, override.value())
            overrides = (*self._overrides, f"sweep={self.cell.sweep}", *point)
            jobs.append(Job(validate(changed), overrides, tuning=True))
        return jobs

    def chosen(self, store: Store) -> int | None:
        """The index of the setting that won; None while a run is missing, or where nothing is tuned."""
        found = [store.read(job.config) for job in self.tuning]
        values = [record.value("headline") for record in found if record is not None]
        scores = [-inf if isnan(value) else value for value in values]
        return scores.index(max(scores)) if scores and len(scores) == len(found) else None

    def filling(self, store: Store) -> Iterator[Job]:
        """The runs that fill the cell, seed after seed without end; none before its hyperparameters are chosen."""
        if self.problem:
            return
        setting: tuple[str, ...] = ()
        config = self._config
        if self.cell.sweep is not None:
            index = self.chosen(store)
            if index is None:
                return
            setting = self.settings[index]
            config = replace(self.tuning[index].config, eval=EvalConfig())
        for seed in count():
            yield Job(replace(config, seed=seed), (*self._overrides, *setting, f"seed={seed}"), tuning=False)

    def outstanding(self, store: Store, seeds: int) -> list[Job]:
        """What can be run now: the missing runs of the tuning, and after it the missing runs of the cell."""
        if self.problem:
            return []
        tuning = [job for job in self.tuning if not store.has(job.config)]
        return tuning or [job for job in islice(self.filling(store), seeds) if not store.has(job.config)]

    def results(self, store: Store, seeds: int) -> list[Record]:
        """The records that fill the cell: those of the first `seeds` seeds, and more as far as they go on."""
        found = []
        for seed, job in enumerate(self.filling(store)):
            record = store.read(job.config)
            if record is not None:
                found.append(record)
            elif seed >= seeds:
                break
        return found


def studies(
    experiment: Experiment, budget: int = 0, selection: str = "val", extra: tuple[str, ...] = ()
) -> list[Study]:
    """A study for each cell; `budget` counts in the cell's own, 0 the paper's and -1 the shortest.

    Raises ConfigError when `extra` says anything but where and how to run.
    """
    for override in extra:
        if override.partition("=")[0] not in PLACES:
            raise ConfigError(f"{override}: only where and how to run can be set: {', '.join(PLACES)}")
    compose_all([extra])  # what is wrong with these is said once, not of every cell
    return [Study(cell, cell.epochs[budget] if cell.epochs else None, selection, extra) for cell in experiment.cells]


def compose_all(jobs: list[tuple[str, ...]]) -> list[Config]:
    """Compose each job's overrides as `run.py` would. Raises ConfigError."""
    return [validate(_compose(overrides)[0]) for overrides in jobs]


@cache  # the settings of a grid are made of few values
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _compose(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """The composed config, not validated yet, and what Hydra's sweeper would sweep over."""
    register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", list(overrides), return_hydra_config=True)
        axes = OmegaConf.to_container(composed.hydra.sweeper.params or OmegaConf.create(), resolve=True)
    except HydraException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(axes, dict)
    swept = {str(key): str(values) for key, values in axes.items()}
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed, swept
