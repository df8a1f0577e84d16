"""The identity of a run: the part of its config that its result depends on, and the hash of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from lawn.config import Config, rules

# Keys about where and how fast a run goes, and who is told.
NOT_IDENTITY = tuple(key for key, rule in rules() if not rule.identity)


def identity(config: Config) -> dict[str, Any]:
    """What the result of a run depends on: its config without the keys that do not change it, and what is held out.

    Fields that are None are omitted, so that a field added later does not rename existing runs.
    """
    tree: dict[str, Any] = {k: dict(vars(v)) if is_dataclass(v) else v for k, v in vars(config).items()}
    for key in NOT_IDENTITY:
        group, _, name = key.rpartition(".")
        del (tree[group] if group else tree)[name]
    if config.diagnostics.name == "off":
        del tree["diagnostics"]
    if config.dataset.shards is not None and config.eval.split == "val":
        tree["dataset"]["held_out"] = "last shards"  # of folders, it is a part of each class
    return {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != {}
    }


def changed_keys(other: Mapping[str, Any], config: Config) -> str:
    """Describe the keys of the run's identity whose values differ in `other`, the config tree of another run."""
    theirs = dict(leaves(other))
    return "; ".join(
        f"{key} is {theirs[key]} there, {value} here"
        for key, value in leaves(asdict(config))
        if key not in NOT_IDENTITY and theirs.get(key, value) != value
    )


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree of mappings, with their keys joined by points."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def config_hash(config: Config) -> str:
    """The hash of the run's identity."""
    return identity_hash(identity(config))


def identity_hash(tree: dict[str, Any]) -> str:
    """The first 12 hex digits of the SHA-256 of an identity, as sorted JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def run_name(config: Config) -> str:
    tree = identity(config)
    return f"{name_prefix(tree)}-{identity_hash(tree)}"


def name_prefix(tree: Mapping[str, Any]) -> str:
    """What the name of a run says of its identity, before the hash."""
    return f"{tree['dataset']['name']}-{tree['model']['name']}-{tree['optim']['name']}-s{tree['seed']}"
