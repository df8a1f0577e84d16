"""Composing configs from the overrides of a command line."""

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
    """The checked config of `python run.py OVERRIDES`. Raises ConfigError."""
    return validate(compose_unchecked(*overrides)[0])


def compose_unchecked(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """The composed config before validation, and the values of each key that a multirun would sweep over."""
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
        raise ConfigError(explain(error)) from None  # a notebook would show the whole chain of errors
    assert isinstance(axes, dict)
    swept = {str(key): str(values) for key, values in axes.items()}
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed, swept


def refuse_sweeps(overrides: Iterable[str], swept: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the overrides choose one value of each swept key."""
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    for key, values in swept.items():
        if key not in given:
            raise ConfigError(
                f"sweep={given.get('sweep')}: {key} has the values {values}; add -m to run all of them, or choose one: "
                f"{key}=..."
            )
