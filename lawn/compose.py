"""Composing configs from the overrides of a command line."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, flag_override

from lawn.config import Config, register
from lawn.errors import ConfigError, UserError
from lawn.explain import explain, is_hydra_error
from lawn.files import atomic
from lawn.optim.cache import cache_directories
from lawn.validation import validate

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose(*overrides: str) -> Config:
    """Compose and check the config of `python run.py OVERRIDES`.

    Args:
        *overrides: Hydra overrides such as "dataset=digits".

    Returns:
        The config, which `lawn.train.train` takes.

    Raises:
        ConfigError: in one line, which key is wrong.

    Examples:
        >>> from lawn.compose import compose
        >>> config = compose("dataset=digits", "optim=adam_lawn", "optim.free_epochs=2")
        >>> config.optim.name, config.optim.free_epochs
        ('adam_lawn', 2.0)
    """
    return validate(compose_unchecked(*overrides)[0])


def compose_unchecked(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """The composed config before validation, and the values of each key that a multirun would sweep over."""
    try:
        return without_hydra(_compose(*overrides))
    except Exception as error:
        if not is_hydra_error(error):
            raise
        raise ConfigError(explain(error)) from None  # a notebook would show the whole chain of errors


def _compose(*overrides: str) -> DictConfig:
    register()
    if not CONF.is_dir():
        raise UserError(f"{CONF}: not there; configs are in a checkout: pip install -e '.[harness]' in one")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", list(overrides), return_hydra_config=True)
        refuse_unknown_preset(composed.hydra)
    return composed


def overrides_of(job: Any) -> list[str]:
    """The overrides as they were written; to read them one by one resolves what they interpolate.

    `job` is the composed node `hydra`.
    """
    written = OmegaConf.to_container(job.overrides.task, resolve=False)
    assert isinstance(written, list)
    return list(map(str, written))


def refuse_unknown_preset(job: Any) -> None:
    """Raises ConfigError if a preset was chosen that does not exist: most pairs have none, so Hydra does not mind.

    `job` is the composed node `hydra`.
    """
    name = job.runtime.choices.get("preset")
    given = any(override.lstrip("+").startswith("preset=") for override in overrides_of(job))
    known = GlobalHydra.instance().config_loader().get_group_options("preset")
    if given and name not in (None, *known):
        raise ConfigError(f"preset={name}: no such preset; choose from {', '.join(sorted(known))}")


def without_hydra(composed: DictConfig) -> tuple[DictConfig, dict[str, str]]:
    """Remove the node `hydra`, and return the values that its sweeper has."""
    swept = swept_values(composed)
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    return composed, swept


def swept_values(composed: DictConfig) -> dict[str, str]:
    """The values that Hydra's sweeper has for each key."""
    swept = OmegaConf.to_container(composed.hydra.sweeper.params or OmegaConf.create(), resolve=True)
    assert isinstance(swept, dict)
    return {str(key): str(values) for key, values in swept.items()}


@cache
def parse_override(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


@cache
def compose_choices(*choices: str) -> DictConfig:
    """The config that Hydra composes, with nothing but the sweeper's values below `hydra`.

    Hydra takes long, so it is kept in the user's cache, by a hash of everything that it comes from.
    """
    register()
    files = list(_cache_files(choices))
    for file in files:
        with suppress(OSError):
            checksum, _, content = file.read_bytes().partition(b"\n")
            if checksum == _checksum(content):
                return _from_json(content)
    composed = _compose(*choices)
    elsewhere = bool(composed.hydra.searchpath)  # are configs that the names of the files do not depend on
    with flag_override(composed, ["struct", "readonly"], False):
        composed["hydra"] = {"sweeper": {"params": composed.hydra.sweeper.params}}
    content = json.dumps(OmegaConf.to_container(composed, resolve=False)).encode()
    for file in [] if elsewhere else files:
        with suppress(OSError, UserError):
            with atomic(file) as temporary:
                temporary.write_bytes(_checksum(content) + b"\n" + content)
            break
    return composed


def _from_json(content: bytes) -> DictConfig:
    """The composed config as Hydra returns it: with the schema's types, and without room for other keys."""
    values = json.loads(content)
    below_hydra = values.pop("hydra")
    composed = OmegaConf.merge(_schema(), values)  # of a copy
    assert isinstance(composed, DictConfig)
    OmegaConf.set_struct(composed, True)
    with flag_override(composed, ["struct", "readonly"], False):
        composed["hydra"] = below_hydra
    return composed


@cache
def _schema() -> Any:
    return OmegaConf.structured(Config)


def _cache_files(choices: tuple[str, ...]) -> Iterator[Path]:
    """Where the composed config may be, the preferred place first."""
    names = sorted(glob("**/*.yaml", root_dir=CONF, recursive=True))  # noqa: PTH207 (pathlib follows no links)
    sources = {name: CONF / name for name in names}
    sources |= {name: Path(__file__).with_name(name) for name in ("compose.py", "config.py")}
    texts = {name: path.read_text("utf8", "surrogateescape") for name, path in sources.items() if path.is_file()}
    variables = {name: os.environ.get(name) for text in texts.values() for name in re.findall(r"oc\.env:(\w+)", text)}
    packages = [version(package) for package in ("hydra-core", "omegaconf")]
    content = [sys.version, packages, texts, variables, choices]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    for folder in cache_directories():
        yield folder / "conf" / name


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def refuse_sweeps(overrides: Iterable[str], swept: Mapping[str, Any], *, multirun: bool = False) -> None:
    """Raises ConfigError unless the overrides of a run, or of a job of a multirun, choose a value of each swept key."""
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    for key, values in swept.items():
        if key not in given:
            problem = f"has the values {values}; add -m to run all of them, or choose one: {key}=..."
            if multirun:  # Hydra expands the sweep of the whole command alone
                problem = "has no value in this job, as a multirun takes one sweep; start one for each"
            raise ConfigError(f"sweep={given.get('sweep')}: {key} {problem}")
