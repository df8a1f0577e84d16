"""Which parameters share memory: the update of one would undo that of the other."""

from collections.abc import Container

from torch import Tensor

from lawn.optim import sharding
from lawn.optim.keys import Group, describe, is_trained


def extent(t: Tensor) -> tuple[tuple[str, int], int, int] | None:
    """The storage of a tensor, and the offsets of the first byte of its first and last element there.

    Of a strided view with gaps, the last is the first. None if the tensor has no memory of its own.
    """
    if type(t) not in sharding.PLAIN or not t.numel() or not (start := t.untyped_storage().data_ptr()):
        return None
    elements = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    first = int(t.storage_offset()) * t.element_size()
    last = first + (elements - 1) * t.element_size() if elements == t.numel() else first
    return (str(t.device), start), first, last


def check_apart(groups: list[Group], constrained: Container[Tensor]) -> None:
    """Raise ValueError if a constrained parameter shares memory with another one that is trained.

    Of strided views with gaps, only the first element is looked at.
    """
    places = []
    for index, group in enumerate(groups):
        trained = list(filter(is_trained, group["params"]))
        for p, shard in zip(trained, sharding.local(trained), strict=True):
            if (place := extent(shard)) is not None:
                places.append((*place, p in constrained, describe(group, index, p)))
    reach: dict[bool, tuple[tuple[str, int], int, str]] = {}  # of all before, and of the constrained ones
    for storage, first, last, is_constrained, name in sorted(places):
        other = reach.get(not is_constrained)
        if other is not None and other[0] == storage and first <= other[1]:
            raise ValueError(
                f"{other[2]} and {name} share memory, where the update of one would undo that of the other; give their "
                "modules one parameter (b.weight = a.weight)"
            )
        for key in (False, True) if is_constrained else (False,):
            if key not in reach or reach[key][0] != storage or last > reach[key][1]:
                reach[key] = storage, last, name
