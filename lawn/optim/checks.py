"""Checks of the keys and values of param groups."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch.optim import Optimizer


def check_spelling(group: Iterable[str], index: int, known: Collection[str]) -> None:
    """Raise ValueError for a key of a param group that is nearly a `known` one; others are the user's own."""
    for key in group:
        close = get_close_matches(key, known, n=1, cutoff=0.85)
        if close and key not in known:
            raise ValueError(f"param group {index}: unknown key {key!r}; did you mean {close[0]!r}?")


def check_options(optimizer: Optimizer, group: Mapping[str, Any], index: int, unsupported: set[str]) -> None:
    """Raise ValueError for a key of a param group that is set but `unsupported`."""
    for key, value in group.items():
        if key in unsupported and value:
            raise ValueError(f"param group {index}: {type(optimizer).__name__} has no {key}, got {key}={value!r}")


def check_not_negative(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError if one of these hyperparameters of a param group is negative or not a number."""
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {group[name]}")


def check_adam(group: Mapping[str, Any]) -> None:
    """Raise ValueError for hyperparameters of Adam that are out of range."""
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    check_not_negative(group, "eps")


@cache
def torch_keys(*kinds: type[Optimizer]) -> set[str]:
    """Return the param group keys of these torch optimizers, of all by default."""
    classes = kinds or [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer)]
    return {name for c in classes for name in signature(c).parameters} - {"params", "defaults"}
