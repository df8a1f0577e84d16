"""A norm for each slice of a parameter: the param group key `norm_axes`.

`norm_axes` are the axes that a norm runs over. Each index into the other axes, the slice axes, selects a slice with a
norm of its own. With None, the default, which adds no key to a group, a weight has a single norm.
"""

import math
import operator
from typing import Any

from torch import Tensor

from lawn.optim import sharding

KEY = "norm_axes"  # of a param group

NormAxes = int | tuple[int, ...] | list[int] | None  # JSON makes a list of a tuple


def check(axes: object, place: str) -> None:
    """Raise ValueError if `norm_axes` is not None, an int or a sequence of ints; `place` says where it was given."""
    if axes is None:
        return
    try:
        valid = bool([operator.index(axis) for axis in _sequence(axes)]) and not isinstance(axes, bool)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{place}{KEY} must be None, an int or a tuple of ints, got {axes!r}")


def check_param(axes: Any, p: Tensor, place: str) -> None:
    """Raise ValueError or TypeError if a constrained parameter has no slices with these axes."""
    if not fit(axes, p):
        raise ValueError(f"{place}{KEY}={axes!r} are not different axes of a parameter of shape {tuple(p.shape)}")
    if sharding.is_dtensor(p):
        raise TypeError(
            f"{place}{KEY} is not supported for DTensors: their norms would be known to some ranks only; leave it out, "
            "or keep the weight whole on each rank"
        )


def fit(axes: NormAxes, p: Tensor) -> bool:
    """Whether these are different axes of a parameter."""
    if axes is None:
        return False
    inside = {axis % p.ndim for axis in _sequence(axes) if -p.ndim <= axis < p.ndim}
    return len(inside) == len(_sequence(axes))


def slice_axes(axes: NormAxes, p: Tensor) -> tuple[int, ...]:
    """Return the axes of a parameter that select a slice."""
    over = {axis % p.ndim for axis in _sequence(axes)}
    return tuple(axis for axis in range(p.ndim) if axis not in over)


def count(p: Tensor, axes: tuple[int, ...]) -> int:
    """Count the slices of a tensor with these slice axes."""
    return math.prod(p.shape[axis] for axis in axes)


def to_front(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    """View a tensor with the slice axes first, so that its slices are one after the other."""
    return t.movedim(axes, tuple(range(len(axes))))


def describe(p: Tensor, axes: tuple[int, ...], number: int) -> str:
    """Describe a slice as it is indexed, for example `[2, :, :]`."""
    index = [":"] * p.ndim
    for axis in reversed(axes):
        number, position = divmod(number, p.shape[axis])
        index[axis] = str(position)
    return f"[{', '.join(index)}]"


def _sequence(axes: Any) -> Any:
    return (axes,) if isinstance(axes, int) else axes
