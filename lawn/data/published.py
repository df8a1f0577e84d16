"""Counts that the makers of a dataset published, against those of the files that are there."""


class Deviation(str):
    """A warning that a count is not as published; it stays on the records of the runs."""


def deviations(name: str, found: dict[str, int], published: dict[str, int]) -> list[str]:
    return [
        Deviation(f"{name}: {found[k]} {k}, published are {published[k]}") for k in found if found[k] != published[k]
    ]
