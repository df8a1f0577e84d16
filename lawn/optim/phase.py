"""The two phases of LAWN as keys of an optimizer's parameter groups (paper section 3).

They live there because a checkpoint saves groups as they are, while it casts tensors in `state` to the parameter's
dtype. The keys of a group:

    constrain     True: all its parameters; False: none; None: those with two or more dimensions
    blocks        None, or an int for each parameter: constrained ones with the same int share one norm
    free_steps    updates before the switch; None: when `constrain` is called
    steps         updates so far
    target_norms  None before the switch; then for each parameter its block's norm c, or None where it is free
"""

import sys
from typing import Any

import torch
from torch import Tensor

from lawn.optim.update import norm

Group = dict[str, Any]
DEFAULTS: Group = {"constrain": None, "blocks": None, "free_steps": None, "steps": 0, "target_norms": None}


class NonFiniteError(ValueError):
    """A weight whose norm is infinite or not a number: training has diverged before the switch."""


def check_free_steps(free_steps: int | None) -> None:
    if free_steps is not None and (not isinstance(free_steps, int) or free_steps < 0):
        raise ValueError(f"free_steps must be a non-negative integer or None, got {free_steps!r}")


def prepare(groups: list[Group], index: int, free_steps: int | None) -> None:
    """Give group `index` the keys it lacks, in the phase of the first group. Raises for what LAWN cannot work with."""
    group = groups[index]
    for key, value in {**DEFAULTS, "free_steps": free_steps, "steps": groups[0].get("steps", 0)}.items():
        group.setdefault(key, value)
    if any(_is_sharded(p) for p in group["params"]):
        raise TypeError(
            f"param group {index} holds sharded parameters (DTensor): a norm over one shard is not the weight's; "
            "LAWN does not support FSDP2 or tensor parallelism yet, use DistributedDataParallel"
        )
    if group["blocks"] is not None and len(group["blocks"]) != len(group["params"]):
        raise ValueError(f"param group {index}: blocks must have an int for each of {len(group['params'])} parameters")
    _refuse_decay(group, index)
    if index > 0 and is_constrained(groups[:index]):
        group["target_norms"] = _target_norms(group, index)


def restore(groups: list[Group], free_steps: int | None) -> None:
    """After loading a checkpoint: defaults for the keys of an older one, norms on the device of their parameters."""
    for group in groups:
        for key, value in {**DEFAULTS, "free_steps": free_steps}.items():
            group.setdefault(key, value)
        if group["target_norms"] is not None:
            pairs = zip(group["target_norms"], group["params"], strict=True)
            group["target_norms"] = [None if c is None else c.to(p.device) for c, p in pairs]


def is_constrained(groups: list[Group]) -> bool:
    return any(group.get("target_norms") is not None for group in groups)


def is_due(groups: list[Group]) -> bool:
    """Whether the next update is the first constrained one."""
    return groups[0]["free_steps"] == groups[0]["steps"] and not is_constrained(groups)


@torch.no_grad()
def constrain(groups: list[Group]) -> None:
    """Fix the norms at their present values (equation 1); see `LAWNOptimizer.constrain`."""
    if is_constrained(groups):
        raise ValueError("the weights are constrained already")
    for index, group in enumerate(groups):
        _refuse_decay(group, index)
    targets = [_target_norms(group, index) for index, group in enumerate(groups)]
    if not any(c is not None for group_targets in targets for c in group_targets):
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    for group, group_targets in zip(groups, targets, strict=True):
        group["target_norms"] = group_targets


def split(group: Group) -> tuple[list[Tensor], list[tuple[list[Tensor], Tensor]]]:
    """The parameters with a gradient: the free ones, and the constrained ones as blocks with their norm.

    A block whose parameters have gradients only in part is whole; its missing gradients are zeros for the moment.
    """
    if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
        raise TypeError("LAWN does not support sparse gradients")
    targets = group["target_norms"] or [None] * len(group["params"])
    free = [p for p, c in zip(group["params"], targets, strict=True) if c is None and p.grad is not None]
    blocks: dict[int, tuple[list[Tensor], Tensor]] = {}
    for key, p, c in zip(group["blocks"] or range(len(targets)), group["params"], targets, strict=True):
        if c is not None:
            blocks.setdefault(key, ([], c))[0].append(p)
    return free, [(params, c) for params, c in blocks.values() if any(p.grad is not None for p in params)]


def gradients(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


def _is_sharded(p: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # seconds to import, and without it there is no DTensor
    return module is not None and isinstance(p, module.DTensor)


def _refuse_decay(group: Group, index: int) -> None:
    if group.get("weight_decay") and any(_is_constrained(group, p) for p in group["params"]):
        raise ValueError(
            f"param group {index}: weight_decay={group['weight_decay']}, but LAWN replaces weight decay: "
            "set it to 0 there, or constrain=False to leave the group free"
        )


def _is_constrained(group: Group, p: Tensor) -> bool:
    rule = group["constrain"]
    return p.requires_grad and (p.ndim >= 2 if rule is None else bool(rule))


def _target_norms(group: Group, index: int) -> list[Tensor | None]:
    members: dict[int, list[int]] = {}
    for position, key in enumerate(group["blocks"] or range(len(group["params"]))):
        if _is_constrained(group, group["params"][position]):
            members.setdefault(key, []).append(position)
    targets: list[Tensor | None] = [None] * len(group["params"])
    for positions in members.values():
        c = norm([group["params"][position] for position in positions])
        if not (torch.isfinite(c) and c > 0):
            shape = tuple(group["params"][positions[0]].shape)
            kind = ValueError if c == 0 else NonFiniteError
            raise kind(
                f"cannot constrain parameter {positions[0]} of param group {index} (shape {shape}): "
                f"its norm is {c.item()}"
            )
        for position in positions:
            targets[position] = c
    return targets
