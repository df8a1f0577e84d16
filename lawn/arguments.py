"""The keys of a config section as arguments of the builder that it chooses."""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lawn.errors import ConfigError


def arguments(group: str, section: Any, builder: Callable[..., Any], renamed: dict[str, str] | None = None) -> dict:
    """The keyword-only arguments that `section` sets for `builder`, without `name` and the fields that are None.

    `renamed` maps a field to the builder's name for it. Raises ConfigError for a field that the builder does not take,
    and for a missing one that it requires.
    """
    words = renamed or {}
    given = {words.get(k, k): (k, v) for k, v in asdict(section).items() if v is not None and k != "name"}
    accepted = {
        p.name: p.default is p.empty for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    keys = {word: k for k, word in words.items()}
    for word, (key, value) in given.items():
        if word not in accepted:
            known = ", ".join(keys.get(name, name) for name in accepted) or "no keys"
            raise ConfigError(f"{group}.{key}={value}: does not apply to {group}={section.name}, which takes {known}")
    for word, required in accepted.items():
        if required and word not in given:
            raise ConfigError(f"{group}.{keys.get(word, word)}: {group}={section.name} needs a value")
    return {word: value for word, (_, value) in given.items()}
