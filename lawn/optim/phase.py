"""The two phases of LAWN (paper section 3), kept where every tool that saves an optimizer finds them.

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import update

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]
NORM = "lawn_norm"
DEFAULTS: Group = {"constrain": None, "blocks": None, "free_steps": None, "steps": 0, "switched": False}
REMEDY = "leave it free with a param group that has constrain=False, or give it more free steps"


class NonFiniteError(ValueError):
    """A weight whose norm is infinite or not a number: training has diverged before the switch."""


@dataclass
class Part:
    """The parameters of a group that a step updates: the free ones, and the constrained ones block after block."""

    group: Group
    free: list[Tensor]
    params: list[Tensor]
    sizes: list[int]  # how many of `params` each block has
    norms: list[float]  # c of each block; 0.0 where it is not fixed yet

    def owned_norms(self) -> list[float]:
        """c for each of `params`."""
        if len(self.sizes) == len(self.params):
            return self.norms
        return [c for c, size in zip(self.norms, self.sizes, strict=True) for _ in range(size)]

    def record(self, state: State) -> None:
        """After the step: the norms into the state, for parameters whose state has come into being; count the step."""
        for p in self.free:
            state[p].setdefault(NORM, 0.0)
        for p, c in zip(self.params, self.owned_norms(), strict=True):
            state[p][NORM] = c
        self.group["steps"] += 1


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


def refuse(group: Group, index: int) -> None:
    """Raise ValueError or TypeError for a param group that LAWN cannot work with."""
    module = sys.modules.get("torch.distributed.tensor")  # seconds to import, and without it there is no DTensor
    if module is not None and any(isinstance(p, module.DTensor) for p in group["params"]):
        raise TypeError(
            f"param group {index} holds sharded parameters (DTensor): a norm over one shard is not the weight's; "
            "LAWN does not support FSDP2 or tensor parallelism yet, use DistributedDataParallel"
        )
    blocks = group.get("blocks")
    if blocks is not None and len(blocks) != len(group["params"]):
        raise ValueError(f"param group {index}: blocks must have an int for each of {len(group['params'])} parameters")
    if group.get("weight_decay") and any(_is_bound(group, p) for p in group["params"]):
        raise ValueError(
            f"param group {index}: weight_decay={group['weight_decay']}, but LAWN replaces weight decay: "
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
        refuse({**merged, "params": group["params"]}, index)
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


def is_dummy(optimizer: Optimizer) -> bool:
    """Whether this is no update, but torch.distributed.checkpoint's way to have an optimizer make its state.

    It calls `step` once before the first update, with all rates and all gradients zero. Gradients are looked at
    only where there is no state yet and the rates are zero, so an update waits for no device.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any(map(bool, optimizer.state.values())) or any(isinstance(r, Tensor) and not r.is_cpu for r in rates):
        return False
    if any(rate != 0 for rate in rates):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(g.is_sparse or bool(g.any()) for g in gradients)


def begin(optimizer: Optimizer, *, compare: bool) -> list[Part]:
    """What a step works on, with the norms it needs: those of weights that are constrained for the first time are
    measured now. With `compare` known norms are compared to the weights', which waits for a device.

    Raises ValueError, having changed nothing, when a norm is zero, not finite or another weight's.
    """
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        refuse(group, index)
    parts = [_split(group, optimizer.state) for group in groups]
    for index, part in enumerate(parts):
        if 0.0 in part.norms:
            measured = _measured(part, index)
            part.norms = [c or now for c, now in zip(part.norms, measured, strict=True)]
        if compare and part.norms:
            _compare(part, index)
    for part in parts:
        part.group["switched"] = is_due(part.group) or any(part.norms)
    return parts


@torch.no_grad()
def constrain(optimizer: Optimizer, *, again: bool) -> None:
    """Fix the norms at their present values (equation 1); see `LAWNOptimizer.constrain`."""
    groups = optimizer.param_groups
    chosen = [index for index, group in enumerate(groups) if again or not group["switched"]]
    if not chosen:
        raise ValueError("the weights are constrained already; constrain(again=True) takes their present norms")
    if not any(p.requires_grad and _is_bound(groups[index], p) for index in chosen for p in groups[index]["params"]):
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    switch(optimizer, chosen)


@torch.no_grad()
def switch(optimizer: Optimizer, chosen: list[int]) -> None:
    """Begin the second phase of these param groups. Raises ValueError, having changed nothing."""
    parts = []
    for index in chosen:
        group = optimizer.param_groups[index]
        refuse(group, index)
        whole = _blocks(group, [p for p in group["params"] if p.requires_grad and _is_bound(group, p)])
        part = Part(group, [], [p for block in whole for p in block], [len(block) for block in whole], [])
        part.norms = _measured(part, index)
        parts.append(part)
    for part in parts:
        part.group["switched"] = True
        for p, c in zip(part.params, part.owned_norms(), strict=True):
            if optimizer.state.get(p):  # else its norm is fixed with its first update
                optimizer.state[p][NORM] = c


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


def refuse_zero(part: Part, index: int, block: int) -> None:
    """Raise for a block of a step whose weights have become zero since their norm was fixed."""
    p = part.params[sum(part.sizes[:block])]
    raise ValueError(
        f"{named(part.group, index, p)} is zero, but was constrained to the norm {part.norms[block]:.6g}: a weight of "
        "zero has no direction in which it could be rescaled; restore it, or set constrain=False for its param group"
    )


def gradients(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


def _is_bound(group: Group, p: Tensor) -> bool:
    """Whether the weight is free in the first phase only."""
    rule = group.get("constrain")
    return p.numel() > 0 and (p.ndim >= 2 if rule is None else bool(rule))


def _split(group: Group, state: State) -> Part:
    """The parameters with a gradient. A block whose parameters have gradients only in part is whole."""
    due = is_due(group)
    free, bound, norms = [], [], []
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise TypeError("LAWN does not support sparse gradients")
        kept = state.get(p)
        c = kept.get(NORM, 0.0) if kept else 0.0
        if not _is_bound(group, p):
            free.append(p)
            if c and kept:  # released by constrain=False
                kept[NORM] = 0.0
        elif due or c:
            bound.append(p)
            norms.append(c)
        else:
            free.append(p)
    if group["blocks"] is None:
        return Part(group, free, bound, [1] * len(bound), norms)
    whole = _blocks(group, bound)
    joint = [max((state.get(p) or {}).get(NORM, 0.0) for p in block) for block in whole]
    return Part(group, free, [p for block in whole for p in block], [len(block) for block in whole], joint)


def _blocks(group: Group, bound: list[Tensor]) -> list[list[Tensor]]:
    """The blocks of which at least one parameter is among `bound`."""
    if group["blocks"] is None:
        return [[p] for p in bound]
    needed = set(bound)
    members: dict[int, list[Tensor]] = {}
    for key, p in zip(group["blocks"], group["params"], strict=True):
        if _is_bound(group, p):
            members.setdefault(key, []).append(p)
    return [block for block in members.values() if needed.intersection(block)]


def _measured(part: Part, index: int) -> list[float]:
    """The present norms of a part's blocks. Raises ValueError for one that cannot be fixed."""
    norms: list[float] = update.norms(part.params, part.sizes).tolist()
    for block, c in enumerate(norms):
        if 0 < c < float("inf"):
            continue
        name = named(part.group, index, part.params[sum(part.sizes[:block])])
        if c == 0:
            raise ValueError(f"cannot constrain {name}: its norm is 0.0; {REMEDY}")
        raise NonFiniteError(f"cannot constrain {name}: its norm is {c}")
    return norms


def _compare(part: Part, index: int) -> None:
    """Raise ValueError for a norm that was loaded with the state of another weight."""
    for block, (c, now) in enumerate(zip(part.norms, update.norms(part.params, part.sizes).tolist(), strict=True)):
        p = part.params[sum(part.sizes[:block])]
        tolerance = 0.02 if p.dtype.itemsize < 4 else 1e-3
        if now > 0 and abs(now / c - 1) > tolerance:
            raise ValueError(
                f"{named(part.group, index, p)} has the norm {now:.6g}, but the state that was loaded for it {c:.6g}: "
                "parameters may be in another order than when it was saved, or the weights are others; load by name, "
                "or take the present norms with constrain(again=True)"
            )
