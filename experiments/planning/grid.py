"""The runs of a sweep preset: one for each point of its grid, and for points one step beyond its ends."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.planning import search
from experiments.planning.search import Point
from experiments.records import Store
from lawn.compose import parse_override
from lawn.composition import Composition, compose_many, typed_value, with_values
from lawn.config import Config
from lawn.errors import ConfigError
from lawn.explain import explain
from lawn.identity import run_name
from lawn.optimizers import IN_STEPS
from lawn.train.trainer import updates_in
from lawn.validation import check, normalize

IN_EPOCHS = ("schedule.warmup_epochs", *(f"optim.{key}" for key in IN_STEPS))
_INDEPENDENT: set[tuple[Any, ...]] = set()  # (key, interpolations) where no interpolation depends on the key


@dataclass(frozen=True)
class Job:
    """One run of a study; `overrides` are what run.py is given for the same run."""

    config: Config
    overrides: tuple[str, ...]
    setting: tuple[str, ...]  # the hyperparameters, as overrides
    experiment: str  # that it is recorded for
    tunes: bool = False  # whether it tunes the experiment

    @cached_property
    def name(self) -> str:
        return run_name(self.config)

    @property
    def uses_all_devices(self) -> bool:
        """Whether the run is parallelized over all devices: on one of them it would take days."""
        return self.config.dataset.name == "imagenet"


@cache  # studies of several budgets search in the same short grid
class Grid:
    """The runs of `overrides` at the points of a sweep preset; without a preset there is only the config itself.

    `experiment` names the one that the runs tune; `extra` overrides set where and how to run.
    """

    def __init__(
        self, overrides: tuple[str, ...], sweep: str | None, selection: str, extra: tuple[str, ...], experiment: str
    ) -> None:
        self.overrides = overrides
        self._sweep = sweep
        self._selection = selection
        self._extra = extra
        self._experiment = experiment
        self._jobs: dict[tuple[Point, int], Job | None] = {}
        self._values: dict[str, Any] = {}

    @cached_property
    def problem(self) -> str | None:
        """Why the grid cannot be run: an invalid key or value; None if it can."""
        try:
            _ = self.config
            self._jobs |= {(point, 0): self._job(point, 0) for point in self.points}  # all are composed and checked
            if self._sweep and not self.points:
                return f"sweep={self._sweep}: no such sweep, or an empty one"
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            return explain(error)
        return None

    @cached_property
    def _composition(self) -> Composition:
        sweep = () if self._sweep is None else (f"sweep={self._sweep}",)
        return compose_many(*self.overrides, *sweep, *self._extra)

    @cached_property
    def config(self) -> Config:
        """The config of the overrides, without a point of the grid."""
        return self._composition.checked

    @cached_property
    def axes(self) -> dict[str, list[str]]:
        """The values of each hyperparameter of the sweep preset; empty without a preset."""
        swept = self._composition.swept.items() if self._sweep else ()
        parsed = [parse_override(f"{key}={values}") for key, values in swept]
        return {axis.key_or_group: list(axis.sweep_string_iterator()) for axis in parsed}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes.values()))

    @cached_property
    def points(self) -> list[Point]:
        return search.grid(self.shape) if self.axes else []

    @cached_property
    def _extended(self) -> dict[str, list[str | None]]:
        """The axes with one more value at both ends, if there is one."""
        ends = {key: search.extrapolate(values) for key, values in self.axes.items()}
        return {key: [*values, ends[key][1], ends[key][0]] for key, values in self.axes.items()}  # index -1 is the last

    def _job(self, point: Point, seed: int) -> Job:
        """Raises ConfigError if the point cannot be run."""
        values = [values[index] for values, index in zip(self._extended.values(), point, strict=True)]
        setting = tuple(f"{key}={value}" for key, value in zip(self.axes, values, strict=True))
        if None in values:
            raise ConfigError(f"{setting}: beyond the grid")
        chosen = (*setting, f"eval.split={self._selection}", f"seed={seed}")
        swept = {key: self._value(override) for key, override in zip(self.axes, setting, strict=True)}
        config = with_values(self.config, {**swept, "eval.split": self._selection, "seed": seed})
        check(config)
        overrides = (*self.overrides, f"sweep={self._sweep}", *chosen)
        return Job(config, overrides, setting, self._experiment, tunes=True)

    def _value(self, override: str) -> Any:
        """The value that an override gives its key.

        Raises ConfigError if it changes other keys too: then a point would not be what its overrides say.
        """
        if override not in self._values:
            key = override.partition("=")[0]
            value = typed_value(override)
            config = normalize(with_values(self.config, {key: value}))
            checked = key, self._composition.interpolations
            if checked not in _INDEPENDENT and config != self.config:
                if self._composition.with_value(key, value).config != config:
                    raise ConfigError(f"{override}: other keys depend on it, so it cannot be an axis of a grid")
                _INDEPENDENT.add(checked)
            self._values[override] = reduce(getattr, key.split("."), config)
        return self._values[override]

    def job(self, point: Point, seed: int = 0) -> Job | None:
        """The run at a point of the grid, or one step beyond its ends; None if it cannot be run."""
        if (point, seed) not in self._jobs:
            try:
                self._jobs[point, seed] = self._job(point, seed)
            except (ConfigError, OmegaConfBaseException):
                self._jobs[point, seed] = None
        return self._jobs[point, seed]

    def jobs(self, points: Iterable[Point] | None = None, seeds: Iterable[int] = (0,)) -> list[Job]:
        """The runs at these points, or of the whole grid, with each of the seeds."""
        asked = [(point, seed) for point in (self.points if points is None else points) for seed in seeds]
        return [job for point, seed in asked if (job := self.job(point, seed)) is not None]

    def is_repeated(self, point: Point, updates_per_epoch: int) -> bool:
        """Whether a point beyond an end is the same run as that at the end, as epochs are rounded to whole updates."""
        ends = [
            (*point[:axis], min(max(index, 0), size - 1), *point[axis + 1 :])
            for axis, (index, size) in enumerate(zip(point, self.shape, strict=True))
            if not 0 <= index < size
        ]
        return bool(ends) and self._in_updates(point, updates_per_epoch) in [
            self._in_updates(end, updates_per_epoch) for end in ends
        ]

    def _in_updates(self, point: Point, updates_per_epoch: int) -> Config | None:
        """The config of a point with its numbers of epochs as numbers of updates."""
        job = self.job(point)
        if job is None:
            return None
        config, total = job.config, updates_per_epoch * job.config.train.epochs
        values = {key: reduce(getattr, key.split("."), config) for key in IN_EPOCHS}
        rounded = {k: updates_in(v, updates_per_epoch, total) for k, v in values.items() if isinstance(v, float)}
        return with_values(config, rounded)

    def score(self, store: Store, point: Point, seed: int = 0) -> float | None:
        """The headline metric of a point; None without a record."""
        job = self.job(point, seed)
        record = None if job is None else store.read(job.name)
        return None if record is None else record.headline
