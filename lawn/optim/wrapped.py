"""Checks of an optimizer that LAWN is put on."""

import sys
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import keys, rounding
from lawn.optim.base import LAWNOptimizer
from lawn.optim.step_hooks import calls_hooks, hook_owners


def check_wrappable(optimizer: Optimizer, wrapper: type) -> None:
    """Raise TypeError or ValueError for an optimizer that `wrapper` cannot be put on, whatever its param groups are."""
    if not calls_hooks(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is no torch optimizer, or never initialized itself as one, and calls no "
            "hooks; put LAWN on the optimizer inside it, unless it moves the weights after that one's step, as "
            "Lookahead and schedule-free wrappers do: train without those"
        )
    zero = sys.modules.get("torch.distributed.optim")
    if zero is not None and isinstance(optimizer, getattr(zero, "ZeroRedundancyOptimizer", ())):
        raise TypeError("put LAWN on the optimizer inside ZeroRedundancyOptimizer, its `optim`")
    if isinstance(optimizer, LAWNOptimizer) or any(isinstance(owner, wrapper) for owner in hook_owners(optimizer)):
        raise ValueError("the optimizer is a LAWN optimizer already")
    if taken := [key for key in keys.KEYS if key in optimizer.defaults]:
        raise ValueError(f"{type(optimizer).__name__} has a hyperparameter {taken[0]!r}, the name of a key of LAWN")
    norms = [entry.get(keys.NORM) for _, entry in keys.entries(optimizer.state)]
    if rounded := [c.dtype for c in norms if isinstance(c, Tensor) and c.dtype.itemsize < 4 and c.any()]:
        raise ValueError(
            f"the optimizer has loaded norms of slices without LAWN, so torch has rounded them to {rounded[0]}; "
            "put LAWN on a new optimizer and load the checkpoint then"
        )


def check_saved(optimizer: Optimizer) -> None:
    """Raise TypeError if torch does not make the state dict, but perhaps optimizers inside, which LAWN does not see."""
    if type(optimizer).state_dict is Optimizer.state_dict:
        return
    made_by_torch: list[Optimizer] = []
    hook = optimizer.register_state_dict_pre_hook(made_by_torch.append)
    try:
        optimizer.state_dict()
    except Exception:
        return  # some have none before the first step, or none at all; that ends a save, too
    finally:
        hook.remove()
    if not made_by_torch:
        raise TypeError(
            f"{type(optimizer).__name__} does not save its state by torch's state_dict, so LAWN's phase and norms may "
            "be lost; put LAWN on each optimizer inside it, or let its state_dict call that of torch.optim.Optimizer"
        )


def check_loaded(optimizer: Optimizer, groups: Sequence[keys.Group]) -> None:
    """Raise ValueError for an option of the param groups that a wrapped optimizer loads; see `check_group`."""
    for index, group in enumerate(groups):
        check_group(optimizer, group, f"the loaded param group {index}: ")


def check_group(optimizer: Optimizer, group: keys.Group, place: str) -> None:
    """Raise ValueError for an option of a param group that would have no effect, or whose step LAWN cannot follow."""
    if rounding.KEY not in optimizer.defaults and group.get(rounding.KEY, "nearest") != "nearest":
        raise ValueError(
            f"{place}rounding={group[rounding.KEY]!r}, but the wrapped optimizer rounds the weights "
            "itself; use AdamLAWN, SGDLAWN or LAMBLAWN"
        )
    if group.get("differentiable"):
        raise ValueError(f"{place}differentiable=True, but LAWN's part of a step has no derivatives")
