"""The steps of the two phases: what is updated, and when norms are fixed. `keys.py` says where they are kept."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import update
from lawn.optim.keys import NORM, Group, State, is_bound, is_due, named, refuse

REMEDY = "leave it free with a param group that has constrain=False, or give it more free steps"


class NonFiniteError(ValueError):
    """A weight whose norm is infinite or not a number: training has diverged before the switch."""


@dataclass
class GroupUpdate:
    """The parameters of a group that a step updates: the free ones, and the constrained ones block after block."""

    group: Group
    free: list[Tensor]
    params: list[Tensor]
    sizes: list[int]  # how many of `params` each block has
    norms: list[float]  # c of each block; 0.0 where it is not fixed yet

    def kinds(self) -> list["GroupUpdate"]:
        """The blocks in parts of one device and dtype each, which an update can work on at once."""
        if len({(p.device, p.dtype) for p in self.params}) < 2:
            return [self] if self.params else []
        kinds: dict[tuple[torch.device, torch.dtype], GroupUpdate] = {}
        for block, c in zip(self.blocks(), self.norms, strict=True):
            key = block[0].device, block[0].dtype
            part = kinds.setdefault(key, GroupUpdate(self.group, [], [], [], []))
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


def begin(optimizer: Optimizer, known: set[tuple[Tensor, ...]]) -> list[GroupUpdate]:
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
    if not any(p.requires_grad and is_bound(groups[index], p) for index in chosen for p in groups[index]["params"]):
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    switch(optimizer, chosen)


@torch.no_grad()
def switch(optimizer: Optimizer, chosen: list[int]) -> None:
    """Begin the second phase of these param groups. Raises ValueError, having changed nothing."""
    parts = []
    for index in chosen:
        group = optimizer.param_groups[index]
        refuse(group, index)
        whole = _blocks(group, [p for p in group["params"] if p.requires_grad and is_bound(group, p)])
        part = GroupUpdate(group, [], [p for block in whole for p in block], [len(block) for block in whole], [])
        part.norms = _measured(part, index)
        parts.append(part)
    for part in parts:
        part.group["switched"] = True
        norms = dict(zip(part.params, part.owned_norms(), strict=True))
        for p in part.group["params"]:
            if optimizer.state.get(p):  # else, and where it is frozen, its norm is fixed with its next update
                optimizer.state[p][NORM] = norms.get(p, 0.0)


def refuse_zero(part: GroupUpdate, index: int, block: int) -> None:
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


def _split(group: Group, state: State) -> GroupUpdate:
    """The parameters with a gradient. A block whose parameters have gradients only in part is whole."""
    due = is_due(group)
    free, bound, norms = [], [], []
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse and is_bound(group, p):
            raise TypeError("LAWN does not support sparse gradients")
        kept = state.get(p)
        c = kept.get(NORM, 0.0) if kept else 0.0
        if not is_bound(group, p):
            free.append(p)
            if c and kept:  # released by constrain=False
                kept[NORM] = 0.0
        elif due or c:
            bound.append(p)
            norms.append(c)
        else:
            free.append(p)
    if group["blocks"] is None:
        return GroupUpdate(group, free, bound, [1] * len(bound), norms)
    whole = _blocks(group, bound)
    joint = [min((state.get(p) or {}).get(NORM, 0.0) for p in block) for block in whole]  # 0.0: one has joined
    return GroupUpdate(group, free, [p for block in whole for p in block], [len(block) for block in whole], joint)


def _blocks(group: Group, bound: list[Tensor]) -> list[list[Tensor]]:
    """The blocks of which at least one parameter is among `bound`."""
    if group["blocks"] is None:
        return [[p] for p in bound]
    needed = set(bound)
    members: dict[int, list[Tensor]] = {}
    for key, p in zip(group["blocks"], group["params"], strict=True):
        if p.requires_grad and is_bound(group, p):
            members.setdefault(key, []).append(p)
    return [block for block in members.values() if needed.intersection(block)]


def _measured(part: GroupUpdate, index: int) -> list[float]:
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


def _present(part: GroupUpdate) -> list[float]:
    """The present norm of each block."""
    kinds = part.kinds()
    found = [update.norms(kind.params, kind.sizes).tolist() for kind in kinds]
    if len(kinds) < 2:
        return found[0] if found else []
    of_block = {kind.blocks()[i][0]: c for kind, norms in zip(kinds, found, strict=True) for i, c in enumerate(norms)}
    return [of_block[block[0]] for block in part.blocks()]


def _compare(part: GroupUpdate, index: int, known: set[tuple[Tensor, ...]]) -> None:
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
