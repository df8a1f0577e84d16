"""Many configs with the same members of groups: Hydra composes the members once, and values of keys are set on that."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache, cached_property
from threading import RLock
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lawn.compose import compose_choices, compose_unchecked, parse_override, swept_values, without_hydra
from lawn.config import GROUPS, Config
from lawn.errors import ConfigError
from lawn.explain import explain, is_hydra_error
from lawn.identity import leaves
from lawn.validation import check, normalize, resolve

_LOCK = RLock()  # of composed configs and the schema, while values are set on them


class Composition:
    """The config of some overrides, and what a multirun would sweep over."""

    def __init__(self, members: "_Members", values: Mapping[str, Any]) -> None:
        self._members = members
        self._values = dict(values)

    @cached_property
    def config(self) -> Config:
        """The resolved config; it is not checked. Raises ConfigError for a value of another type."""
        return self._members.config(self._values)

    @property
    def checked(self) -> Config:
        """The resolved config. Raises ConfigError with its first problem."""
        check(self.config)
        return self.config

    @cached_property
    def swept(self) -> dict[str, str]:
        """The values of each key that a multirun would sweep over."""
        return self._members.swept(self._values)

    @property
    def interpolations(self) -> tuple[tuple[str, str], ...]:
        """The keys whose values come from other keys, with their texts."""
        texts = {key: str(text) for key, text in {**self._members.raw, **self._values}.items()}
        return tuple(sorted((key, text) for key, text in texts.items() if "${" in text))

    def with_value(self, key: str, value: Any) -> "Composition":
        return Composition(self._members, {**self._values, key: value})


def compose_many(*overrides: str) -> Composition:
    """The config of `python run.py OVERRIDES`, much faster than `compose` for many with the same members of groups.

    Raises ConfigError.
    """
    try:
        parsed = [parse_override(override) for override in overrides]
        values = [override for override in parsed if _sets_value(override)]
        choices = (str(override.input_line) for override in parsed if override not in values)
        composition = Composition(_members(*choices), {str(v.key_or_group): v.value() for v in values})
        _ = composition.config
    except Exception as error:
        if not is_hydra_error(error):
            raise
        compose_unchecked(*overrides)  # its error names the override
        raise ConfigError(explain(error)) from None
    return composition


class _Members:
    """What Hydra composed for a choice of members."""

    def __init__(self, *choices: str) -> None:
        self._composed = compose_choices(*choices)
        tree = OmegaConf.to_container(self._composed, resolve=False)
        assert isinstance(tree, dict)
        tree.pop("hydra")
        self.raw = dict(leaves(tree))  # values before interpolation
        self._interpolated = [key for key, value in self.raw.items() if "${" in str(value)]

    @cached_property
    def _base(self) -> Config | None:
        """The config without values that are set; None if it needs some."""
        try:
            with self._set({}):
                return self._whole()
        except ConfigError:
            return None

    def _whole(self) -> Config:
        return resolve(without_hydra(copy.deepcopy(self._composed))[0])

    def config(self, values: Mapping[str, Any]) -> Config:
        base = self._base
        with self._set(values):
            if base is None:
                return self._whole()
            try:
                given = {key: _select(self._composed, key) for key in (*values, *self._interpolated)}
            except OmegaConfBaseException as error:
                raise ConfigError(explain(error)) from error
        return normalize(with_values(copy.deepcopy(base), given))

    def swept(self, values: Mapping[str, Any]) -> dict[str, str]:
        with self._set(values):
            return swept_values(self._composed)

    @contextmanager
    def _set(self, values: Mapping[str, Any]) -> Iterator[None]:
        """In the body, these keys have these values."""
        with _LOCK:
            try:
                for key, value in values.items():
                    OmegaConf.update(self._composed, key, value)
                yield
            finally:
                for key in values:
                    for name, raw in self.raw.items():
                        if name == key or name.startswith(f"{key}."):
                            OmegaConf.update(self._composed, name, raw)


_members = cache(_Members)


@cache
def typed_value(override: str) -> Any:
    """The value that an override without interpolations gives its key, in the type of the schema."""
    key = override.partition("=")[0]
    with _LOCK:
        OmegaConf.update(_schema(), key, parse_override(override).value())
        return _select(_schema(), key)


@cache
def _schema() -> DictConfig:
    schema = OmegaConf.structured(Config)
    assert isinstance(schema, DictConfig)
    return schema


def _select(composed: DictConfig, key: str) -> Any:
    """The value of a key, with every interpolation resolved."""
    value = OmegaConf.select(composed, key)
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values of some keys."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    config = replace(config, **sections.pop("", {}))
    return replace(config, **{name: replace(getattr(config, name), **each) for name, each in sections.items()})


def _sets_value(override: Override) -> bool:
    """Whether the override sets one value of a key of the schema."""
    section = override.key_or_group.partition(".")[0]
    known = section in {field.name for field in fields(Config)} and override.key_or_group not in GROUPS
    return known and override.type is OverrideType.CHANGE and not override.is_sweep_override()
