"""Counts that the makers of a dataset published, against those of the files that are there."""

from collections.abc import Iterable

_WORDS = "published are"


def deviations(name: str, found: dict[str, int], published: dict[str, int]) -> list[str]:
    """A warning for each count that is not as published; it stays on the records of the runs."""
    return [f"{name}: {found[k]} {k}, {_WORDS} {published[k]}" for k in found if found[k] != published[k]]


def only_deviations(warnings: Iterable[str]) -> list[str]:
    """Those of a dataset's warnings that are about counts."""
    return [warning for warning in warnings if _WORDS in warning]
