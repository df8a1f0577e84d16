"""What LAWN keeps of its two phases (paper section 3), where every tool that saves an optimizer finds it.

What belongs to a weight is in the optimizer's state of that weight, so it moves with the weight wherever checkpoints
are kept by name, by owner or per parameter:

    state[p]["lawn_norm"]   its norm c as a float, its block's where blocks are given; 0.0 while it is free

It is there as soon as, and only if, the rest of the weight's state is. A float is saved as it is; a tensor would be
cast to the weight's dtype when it is loaded. The keys of a param group, each of which works for its group alone:

    constrain     True: all its parameters; False: none; None: those with two or more dimensions
    blocks        None, or an int for each parameter: constrained ones with the same int share one norm
    free_steps    updates before the switch; None: when `constrain` is called
    steps         updates of the group so far
    switched      whether it is in the second phase, in which a weight's norm is fixed at its next update at the latest

No key comes or goes at the switch.
"""

import operator
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]
NORM = "lawn_norm"
DEFAULTS: Group = {"constrain": None, "blocks": None, "free_steps": None, "steps": 0, "switched": False}


def checked_steps(free_steps: Any) -> int | None:
    """`free_steps` as an int or None. Raises ValueError."""
    try:
        steps = None if free_steps is None else operator.index(free_steps)
    except TypeError:
        steps = -1
    if isinstance(free_steps, bool) or (steps is not None and steps < 0):
        raise ValueError(f"free_steps must be a non-negative integer or None, got {free_steps!r}")
    return steps


def prepare(groups: list[Group], index: int, free_steps: int | None) -> None:
    """Give group `index` the keys it lacks. Raises ValueError or TypeError for what LAWN cannot work with.

    A group that is added later is in the phase of the others, unless it has free steps of its own: these count from
    where it is added.
    """
    group, others = groups[index], groups[:index]
    refuse(group, index)
    known: Group = {"free_steps": free_steps}
    if "free_steps" not in group and others:
        known["steps"] = max(other["steps"] for other in others)
        known["switched"] = all(other["switched"] for other in others)
    known = {**DEFAULTS, **known, **{key: group[key] for key in DEFAULTS if key in group}}
    group.update({**known, "free_steps": checked_steps(known["free_steps"])})


def refuse(group: Group, index: int, what: str = "param group") -> None:
    """Raise ValueError or TypeError for a param group that LAWN cannot work with."""
    module = sys.modules.get("torch.distributed.tensor")  # seconds to import, and without it there is no DTensor
    if module is not None and any(isinstance(p, module.DTensor) for p in group["params"]):
        raise TypeError(
            f"{what} {index} holds sharded parameters (DTensor): a norm over one shard is not the weight's; "
            "LAWN does not support FSDP2 or tensor parallelism yet, use DistributedDataParallel"
        )
    flat = [p for p in group["params"] if getattr(p, "_fsdp_flattened", False)]
    if flat and group.get("constrain") is not False and all(p.ndim < 2 for p in group["params"]):
        raise TypeError(
            f"{what} {index} holds the flat parameters of FullyShardedDataParallel: a norm over one shard is not "
            "the weight's; LAWN does not support FSDP yet, use DistributedDataParallel"
        )
    blocks = group.get("blocks")
    if blocks is not None and len(blocks) != len(group["params"]):
        raise ValueError(f"{what} {index}: blocks must have an int for each of {len(group['params'])} parameters")
    if group.get("weight_decay") and any(is_bound(group, p) for p in group["params"]):
        raise ValueError(
            f"{what} {index}: weight_decay={group['weight_decay']}, but LAWN replaces weight decay: "
            "set it to 0 there, or constrain=False to leave the group free"
        )


def completed(saved: dict[str, Any], groups: list[Group], keys: list[str]) -> dict[str, Any]:
    """A state dict that may lack `keys` of the param groups, as another optimizer's does, with those of `groups`.

    `blocks` belong to the order in which parameters were given and are always those of `groups`. Raises ValueError
    when a group cannot be constrained as it was saved.
    """
    old = saved["param_groups"]
    if len(old) != len(groups):
        return saved  # which torch refuses
    made = []
    for index, (loaded, group) in enumerate(zip(old, groups, strict=True)):
        if "target_norms" in loaded:
            raise ValueError("this checkpoint is of an earlier version of LAWN, which kept norms by position")
        merged = {**{key: group[key] for key in keys if key in group}, **loaded, "blocks": group.get("blocks")}
        refuse({**merged, "params": group["params"]}, index, "the loaded param group")
        made.append({**merged, "free_steps": checked_steps(merged["free_steps"])})
    return {**saved, "param_groups": made}


def restore(state: State) -> None:
    """After loading: norms as floats in every state that there is."""
    for kept in state.values():
        if kept:
            kept[NORM] = float(kept.get(NORM) or 0.0)


def is_constrained(groups: list[Group]) -> bool:
    return any(group.get("switched") for group in groups)


def is_due(group: Group) -> bool:
    """Whether the group's next update is a constrained one."""
    return bool(group["switched"]) or (group["free_steps"] is not None and group["steps"] >= group["free_steps"])


def forget(optimizer: Optimizer) -> None:
    """Remove what LAWN has put into the param groups and the state."""
    for group in optimizer.param_groups:
        for key in DEFAULTS:
            group.pop(key, None)
    for kept in optimizer.state.values():
        kept.pop(NORM, None)


def named(group: Group, index: int, p: Tensor) -> str:
    """A parameter as a message names it."""
    position = next(i for i, q in enumerate(group["params"]) if q is p)
    names = group.get("param_names") or []
    if position < len(names):
        return f"parameter '{names[position]}'"
    return f"parameter {position} of param group {index} (shape {tuple(p.shape)})"


def is_bound(group: Group, p: Tensor) -> bool:
    """Whether the weight is free in the first phase only."""
    rule = group.get("constrain")
    return p.numel() > 0 and (p.ndim >= 2 if rule is None else bool(rule))
