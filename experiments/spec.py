"""An experiment is a list of cells; a cell is a list of Hydra overrides that several seeds are run with."""

from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from lawn.config import Config, config_hash, explain, register, validate
from lawn.errors import ConfigError

CONF = Path(__file__).resolve().parents[1] / "conf"


@dataclass(frozen=True)
class Cell:
    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A field of a result's last epoch, and how to print it."""

    key: str
    title: str
    digits: int  # after the point; negative: that many significant digits, in powers of ten


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    cells: tuple[Cell, ...]
    columns: tuple[Column, ...]
    seeds: int

    def configs(self, cell: Cell, *extra: str) -> list[Config]:
        """The validated configs of a cell, one for each seed, with `extra` overrides that say where and how to run.

        Raises ConfigError when they would make other runs of them than the report is about.
        """
        plain = compose_all([(*cell.overrides, f"seed={seed}") for seed in range(self.seeds)])
        if not extra:
            return plain
        placed = compose_all([(*cell.overrides, f"seed={seed}", *extra) for seed in range(self.seeds)])
        if [config_hash(config) for config in placed] != [config_hash(config) for config in plain]:
            raise ConfigError(f"{' '.join(extra)}: changes what {self.name} runs; only where and how can be overridden")
        return placed


def compose_all(jobs: list[tuple[str, ...]]) -> list[Config]:
    """Compose each job's overrides as `run.py` would. Raises ConfigError."""
    register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return [validate(compose("config", list(overrides))) for overrides in jobs]
    except HydraException as error:
        raise ConfigError(explain(error)) from error
