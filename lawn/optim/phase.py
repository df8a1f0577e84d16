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
from itertools import accumulate
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

    def kinds(self) -> list["Part"]:
        """The blocks in parts of one device and dtype each, which an update can work on at once."""
        if len({(p.device, p.dtype) for p in self.params}) < 2:
            return [self] if self.params else []
        kinds: dict[tuple[torch.device, torch.dtype], Part] = {}
        for block, c in zip(self.blocks(), self.norms, strict=True):
            key = block[0].device, block[0].dtype
            part = kinds.setdefault(key, Part(self.group, [], [], [], []))
            part.params += block
            part.sizes.append(len(block))
            part.norms.append(c)
        return list(kinds.values())

    def blocks(self) -> list[list[Tensor]]:
        ends = accumulate(self.sizes)
        return [self.params[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]

    def owned_norms(self) -> list[float]:
        """c for each of `params`."""
        if len(self.sizes) == len(self.params):
            return self.norms
        return [c for c, size in zip(self.norms, self.sizes, strict=True) for _ in range(size)]

    def record(self, state: State) -> None:
        """After the step: the norms into the state, for parameters whose state has come into being; count the step."""
        for p in self.free:
            if state.get(p) or not _keeps_state(state):
                state[p].setdefault(NORM, 0.0)
        for p, c in zip(self.params, self.owned_norms(), strict=True):
            if state.get(p) or not _keeps_state(state):
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
    if group.get("weight_decay") and any(_is_bound(group, p) for p in group["params"]):
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


def begin(optimizer: Optimizer, known: set[tuple[Tensor, ...]]) -> list[Part]:
    """What a step works on, with the norms it needs: those of weights that are constrained for the first time are
    measured now. Norms of blocks that are not among the `known` ones, to which they are added, were loaded: they are
    compared to the weights', which waits for a device.

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
        _compare(part, index, known)
    for part in parts:
        part.group["switched"] = is_due(part.group) or any(part.norms)
    return parts


def refuse_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured: it would replay phase and bias corrections of this step."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step of LAWN cannot be captured in a CUDA graph")


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
        norms = dict(zip(part.params, part.owned_norms(), strict=True))
        for p in part.group["params"]:
            if optimizer.state.get(p):  # else, and where it is frozen, its norm is fixed with its next update
                optimizer.state[p][NORM] = norms.get(p, 0.0)


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
    """Zeros where there is none. Raises TypeError for a sparse one."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    if any(g.is_sparse for g in found):
        raise TypeError("LAWN does not support sparse gradients")
    return [g.resolve_neg() if g.is_neg() else g for g in found]


def fitting(group: Group, params: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    """`kept`, one tensor of the state for each parameter. Raises RuntimeError where they differ in shape."""
    for p, t in zip(params, kept, strict=True):
        if t.shape != p.shape:
            position = next(i for i, q in enumerate(group["params"]) if q is p)
            name = (group.get("param_names") or {position: position})[position]
            raise RuntimeError(
                f"parameter {name!r} has the shape {tuple(p.shape)}, but its state {tuple(t.shape)}: the state is of "
                "another parameter, or the parameter was replaced"
            )
    return kept


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
        if p.grad.is_sparse and _is_bound(group, p):
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
    joint = [min((state.get(p) or {}).get(NORM, 0.0) for p in block) for block in whole]  # 0.0: one has joined
    return Part(group, free, [p for block in whole for p in block], [len(block) for block in whole], joint)


def _blocks(group: Group, bound: list[Tensor]) -> list[list[Tensor]]:
    """The blocks of which at least one parameter is among `bound`."""
    if group["blocks"] is None:
        return [[p] for p in bound]
    needed = set(bound)
    members: dict[int, list[Tensor]] = {}
    for key, p in zip(group["blocks"], group["params"], strict=True):
        if p.requires_grad and _is_bound(group, p):
            members.setdefault(key, []).append(p)
    return [block for block in members.values() if needed.intersection(block)]


def _measured(part: Part, index: int) -> list[float]:
    """The present norms of a part's blocks. Raises ValueError for one that cannot be fixed."""
    norms = _present(part)
    for block, c in enumerate(norms):
        if 0 < c < float("inf"):
            continue
        name = named(part.group, index, part.params[sum(part.sizes[:block])])
        if c == 0:
            raise ValueError(f"cannot constrain {name}: its norm is 0.0; {REMEDY}")
        raise NonFiniteError(f"cannot constrain {name}: its norm is {c}")
    return norms


def _present(part: Part) -> list[float]:
    """The present norm of each block."""
    kinds = part.kinds()
    found = [update.norms(kind.params, kind.sizes).tolist() for kind in kinds]
    if len(kinds) < 2:
        return found[0] if found else []
    of_block = {kind.blocks()[i][0]: c for kind, norms in zip(kinds, found, strict=True) for i, c in enumerate(norms)}
    return [of_block[block[0]] for block in part.blocks()]


def _compare(part: Part, index: int, known: set[tuple[Tensor, ...]]) -> None:
    """Raise ValueError for a norm that was loaded with the state of another weight, or was that of another block."""
    blocks = list(map(tuple, part.blocks()))
    if known.issuperset(blocks):
        return
    for block, c, now in zip(blocks, part.norms, _present(part), strict=True):
        tolerance = 0.02 if block[0].dtype.itemsize < 4 else 1e-3
        if block not in known and now > 0 and abs(now / c - 1) > tolerance:
            raise ValueError(
                f"{named(part.group, index, block[0])} has the norm {now:.6g}, but its state says {c:.6g}: parameters "
                "may be in another order than when it was saved, in other blocks, or the weights are others; load by "
                "name, or take the present norms with constrain(again=True)"
            )
    known.update(blocks)


def _keeps_state(state: State) -> bool:
    """Whether an optimizer has state of its own. Where it has, a parameter without was not updated by it."""
    return any(kept and set(kept) != {NORM} for kept in state.values())
