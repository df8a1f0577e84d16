"""The check of a composed config: its first problem is reported in one line that names the key."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lawn.config import Config, rules
from lawn.errors import ConfigError
from lawn.explain import allowed_keys, explain

INTEGER_LIMIT = 2**63  # of integers without another upper bound
RULES = dict(rules())
GETTERS = {key: attrgetter(key) for key in RULES}  # the value of a key in a config
BOUNDED = [
    key
    for key in sorted(RULES, key=lambda key: key != "train.epochs")  # the defaults of others are proportional to it
    if RULES[key].choices or {RULES[key].above, RULES[key].at_least, RULES[key].below} != {None}
]


def _required_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """The keys that cannot be None."""
    for field in fields(schema):
        if is_dataclass(field.default_factory):
            yield from _required_keys(field.default_factory, f"{field.name}.")
        elif field.type is not Any and type(None) not in get_args(field.type):
            yield f"{prefix}{field.name}"


REQUIRED_KEYS = frozenset(_required_keys(Config))


def validate(composed: DictConfig) -> Config:
    """Resolve what Hydra has composed and check every value.

    Args:
        composed: the config that a function with `@hydra.main` gets.

    Returns:
        The config, with every interpolation and path resolved.

    Raises:
        ConfigError: in one line, which key is wrong.

    Examples:
        >>> from lawn.compose import compose_unchecked
        >>> from lawn.validation import validate
        >>> composed, _ = compose_unchecked("dataset=digits")
        >>> validate(composed).dataset.name
        'digits'
    """
    config = resolve(composed)
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError with the first problem of a config."""
    for problem in _problems(config):
        raise ConfigError(problem)


def resolve(composed: DictConfig) -> Config:
    """The typed config, with every interpolation and path resolved. Raises ConfigError for a value of another type."""
    _refuse_unknown_keys(composed, Config, "")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, Config)
    return normalize(config)


def normalize(config: Config) -> Config:
    """Expand the paths, and write equal values alike, in place. Raises ConfigError for an unknown variable."""
    config.optim.free_epochs = _free_epochs(config.optim.free_epochs)
    _without_signed_zeros(config)
    for key, rule in RULES.items():
        if rule.path:
            owner, _, name = key.rpartition(".")
            section = getattr(config, owner) if owner else config
            setattr(section, name, _expanded(key, getattr(section, name)))
    return config


def _without_signed_zeros(section: Any) -> None:
    """Replace -0.0 by 0.0, so that both are the same run."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            _without_signed_zeros(value)
        elif value == 0 and isinstance(value, float):
            setattr(section, field.name, 0.0)
        elif isinstance(value, list):
            setattr(section, field.name, [0.0 if item == 0 and isinstance(item, float) else item for item in value])


def _expanded(key: str, path: str | None) -> str | None:
    """A path with ~ and environment variables expanded as in a shell; URLs and commands are not changed.

    Raises ConfigError for an unknown variable.
    """
    if path is None or re.match(r"\w+:", path):
        return path
    expanded = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 (pathlib drops a ~ that it cannot expand)
    if "$" in expanded and (unknown := re.search(r"\$(\w+|\{\w+\})", expanded)):
        raise ConfigError(f"{key}={path}: the environment has no variable {unknown[1].strip('{}')}")
    return expanded


def _free_epochs(value: Any) -> float | str | None:
    if isinstance(value, str) and value != "auto":  # OmegaConf reads a quoted number, or that of a variable, as text
        with suppress(ValueError):
            return float(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    if value is None or value == "auto" or isinstance(value, float):
        return value
    raise ConfigError(f"optim.free_epochs={value}: must be a number of epochs, or auto")


def _refuse_unknown_keys(node: DictConfig, schema: type, prefix: str) -> None:
    """Raises ConfigError for a key that Hydra's `+key=value` has added."""
    for key in map(str, node):
        section = next((f for f in fields(schema) if f.name == key), None)
        if section is None:
            raise ConfigError(f"{prefix}{key}: no such key; {allowed_keys(prefix.rstrip('.'))}")
        if is_dataclass(section.default_factory):
            _refuse_unknown_keys(node[key], section.default_factory, f"{key}.")


def _problems(c: Config) -> Iterator[str]:
    """The problems of a config, one line each, in the order to be reported."""
    for key, get in GETTERS.items():
        value = get(c)
        if value is None and key in REQUIRED_KEYS:
            yield f"{key}: needs a value"
        limit = RULES[key].below or INTEGER_LIMIT
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) >= limit > 1:
                yield f"{key}={value}: must be below {limit}"
            if number == "":
                yield f"{key}: must not be empty"
    for key in BOUNDED:
        rule, value = RULES[key], GETTERS[key](c)
        if value is None:
            continue
        if rule.choices and value not in rule.choices:
            yield f"{key}={value}: must be one of {', '.join(rule.choices)}"
        if isinstance(value, str | list):
            continue
        for bound, within, words in (
            (rule.above, rule.above is None or value > rule.above, "above"),
            (rule.at_least, rule.at_least is None or value >= rule.at_least, "at least"),
        ):
            if bound is not None and not (math.isfinite(value) and within):
                yield f"{key}={value}: must be a finite number {words} {bound:g}"
        if rule.below is not None and value >= rule.below:
            yield f"{key}={value}: must be below {rule.below:g}"
    if c.optim.betas is not None and (len(c.optim.betas) != 2 or not all(0 <= b < 1 for b in c.optim.betas)):
        yield f"optim.betas={c.optim.betas}: must be two numbers in [0, 1)"
    if c.model.widths is not None and not all(width > 0 for width in c.model.widths):
        yield f"model.widths={c.model.widths}: must be positive"
    for key, what in (("free_epochs", "the constrained phase never begins"), ("warm_start_epochs", "no bound is set")):
        epochs = getattr(c.optim, key)
        if isinstance(epochs, float) and epochs >= c.train.epochs:
            yield f"optim.{key}={epochs:g}: must be below train.epochs={c.train.epochs}, or {what}"
    if c.train.logit_scale is not None and not 1e-6 <= c.train.logit_scale <= 1:
        yield f"train.logit_scale={c.train.logit_scale:g}: must be from 1e-6 to 1"
    if c.train.logit_scale is not None and c.optim.free_epochs is None:
        yield f"train.logit_scale={c.train.logit_scale:g}: needs a LAWN optimizer, whose switch it happens at"
    if c.train.logit_scale is not None and c.optim.free_epochs == "auto":
        yield f"train.logit_scale={c.train.logit_scale:g}: needs a number for optim.free_epochs"
    if c.diagnostics.name == "on" and c.diagnostics.updates is None:
        yield "diagnostics.updates: diagnostics=on needs a value"
    for key in ("updates", "samples") if c.diagnostics.name == "off" else ():
        if getattr(c.diagnostics, key) is not None:
            yield f"diagnostics.{key}={getattr(c.diagnostics, key)}: needs diagnostics=on"
    if (c.train.devices or 1) > c.train.batch_size:
        yield f"train.devices={c.train.devices}: must be at most train.batch_size={c.train.batch_size}"
    if c.dataset.shards is not None and c.dataset.limit is not None:
        yield f"dataset.limit={c.dataset.limit}: needs folders; dataset.shards are read whole"
    if c.dataset.shards is not None and c.dataset.loader == "dali":
        yield "dataset.loader=dali: reads folders; dataset.shards needs dataset.loader=torch"
    if c.train.compile == "reduce-overhead" and c.train.micro_batch_size is not None:
        yield "train.compile=reduce-overhead: does not go with train.micro_batch_size; choose default or off"
    if c.train.compile not in (None, "off") and c.train.sync_batchnorm:
        yield f"train.compile={c.train.compile}: does not go with train.sync_batchnorm; choose off"
    if c.train.compile not in (None, "off") and c.train.deterministic:
        yield f"train.compile={c.train.compile}: does not go with train.deterministic; choose off"
    if c.dataset.prefix is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", c.dataset.prefix):
        yield f"dataset.prefix={c.dataset.prefix!r}: must be a plain name of letters, digits, '_', '-' and '.'"
    if c.optim.nesterov and not c.optim.momentum:
        yield "optim.nesterov=True: needs optim.momentum above 0"
    if c.schedule.warmup_epochs >= c.train.epochs:
        yield f"schedule.warmup_epochs={c.schedule.warmup_epochs:g}: must be below train.epochs={c.train.epochs}"
