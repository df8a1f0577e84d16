"""From the overrides of a command line to a checked config."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf, flag_override

from lawn.config import Config, register
from lawn.errors import ConfigError, UserError
from lawn.explain import explain, is_hydra_error
from lawn.validation import validate

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose(*overrides: str) -> Config:
    """The config of `python run.py OVERRIDES`. Raises ConfigError for what cannot be composed or run."""
    return validate(compose_unchecked(*overrides)[0])


def compose_unchecked(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """The composed config, not validated yet, and the values of each key that a multirun would sweep over."""
    register()
    if not CONF.is_dir():
        raise UserError(f"{CONF}: not there; configs are in a checkout: pip install -e '.[harness]' in one")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", list(overrides), return_hydra_config=True)
        axes = OmegaConf.to_container(composed.hydra.sweeper.params or OmegaConf.create(), resolve=True)
    except Exception as error:
        if not is_hydra_error(error):
            raise
        raise ConfigError(explain(error)) from None  # a notebook shows whatever it is from, some hundred lines
    assert isinstance(axes, dict)
    swept = {str(key): str(values) for key, values in axes.items()}
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed, swept


def refuse_sweeps(overrides: Iterable[str], swept: Mapping[str, Any]) -> None:
    """A sweep preset makes a grid of a multirun; one run has to be a point of it. Raises ConfigError."""
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    for key, values in swept.items():
        if key not in given:
            raise ConfigError(
                f"sweep={given.get('sweep')}: {key} has the values {values}; add -m to run all of them, or choose one: "
                f"{key}=..."
            )
