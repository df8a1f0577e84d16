"""The two phases of training: the parameters that a step updates, and the switch to fixed norms."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import update
from lawn.optim.keys import NORM, Group, State, check_group, constrains, describe, is_due

REMEDY = "leave it free with a param group that has constrain=False, or give it more free steps"


class NonFiniteError(ValueError):
    """Raised when the norm of a weight is infinite or NaN at the switch, because training has diverged.

    Examples:
        >>> import torch
        >>> from lawn import AdamLAWN
        >>> from lawn.optim import NonFiniteError
        >>> optimizer = AdamLAWN([torch.nn.Parameter(torch.full((2, 2), torch.nan))])
        >>> try:
        ...     optimizer.constrain()
        ... except NonFiniteError as error:
        ...     print(error)
        cannot constrain parameter 0 of param group 0 (shape (2, 2)): its norm is nan
    """


@dataclass
class GroupUpdate:
    """The parameters of a param group that a step updates.

    Attributes:
        group: the param group.
        free: free parameters.
        params: constrained parameters, block after block.
        sizes: number of parameters in each block.
        norms: norm c of each block; 0.0 where it is not fixed yet.
    """

    group: Group
    free: list[Tensor]
    params: list[Tensor]
    sizes: list[int]
    norms: list[float]

    def split_by_device_and_dtype(self) -> list["GroupUpdate"]:
        """Split the constrained parameters into updates of one device and dtype each."""
        if len({(p.device, p.dtype) for p in self.params}) < 2:
            return [self] if self.params else []
        updates: dict[tuple[torch.device, torch.dtype], GroupUpdate] = {}
        for block, c in zip(self.blocks(), self.norms, strict=True):
            key = block[0].device, block[0].dtype
            single = updates.setdefault(key, GroupUpdate(self.group, [], [], [], []))
            single.params += block
            single.sizes.append(len(block))
            single.norms.append(c)
        return list(updates.values())

    def blocks(self) -> list[list[Tensor]]:
        """The constrained parameters of each block."""
        ends = accumulate(self.sizes)
        return [self.params[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]

    def param_norms(self) -> list[float]:
        """The norm c of each constrained parameter's block."""
        if len(self.sizes) == len(self.params):
            return self.norms
        return [c for c, size in zip(self.norms, self.sizes, strict=True) for _ in range(size)]

    def record(self, state: State) -> None:
        """Store the norms after the step, for parameters that have state, and count the step."""
        for p in self.free:
            if state.get(p) or not _has_state(state):
                state[p].setdefault(NORM, 0.0)
        for p, c in zip(self.params, self.param_norms(), strict=True):
            if state.get(p) or not _has_state(state):
                state[p][NORM] = c
        self.group["steps"] += 1


def is_dummy(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint calls `step` only to initialize the optimizer's state.

    It does so before the first update, with all learning rates and gradients zero. The gradients are read only if there
    is no state and all learning rates are zero, so an update does not wait for the device.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any(map(bool, optimizer.state.values())) or any(isinstance(r, Tensor) and not r.is_cpu for r in rates):
        return False
    if any(rate != 0 for rate in rates):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(g.is_sparse or bool(g.any()) for g in gradients)


def begin_step(optimizer: Optimizer, known: set[tuple[Tensor, ...]]) -> list[GroupUpdate]:
    """Collect what a step updates, and fix the norms of weights that it constrains for the first time.

    Args:
        optimizer: the optimizer that makes the step.
        known: blocks whose norms are known to be theirs. All other norms were loaded; they are compared with those of
            the weights, which waits for the device, and their blocks are added.

    Returns:
        The parameters to update of each param group.

    Raises:
        ValueError: if a norm is zero, not finite or another weight's; nothing has changed then.
    """
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        check_group(group, index)
    group_updates = [collect(group, optimizer.state) for group in groups]
    for index, group_update in enumerate(group_updates):
        if 0.0 in group_update.norms:
            measured = _measure_norms(group_update, index)
            group_update.norms = [c or now for c, now in zip(group_update.norms, measured, strict=True)]
        _check_loaded_norms(group_update, index, known)
    for group_update in group_updates:
        group_update.group["switched"] = is_due(group_update.group) or any(group_update.norms)
    return group_updates


def check_capture() -> None:
    """Raise RuntimeError during CUDA graph capture: a graph would replay phase and bias corrections of one step."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step of LAWN cannot be captured in a CUDA graph")


@torch.no_grad()
def constrain(optimizer: Optimizer, *, again: bool) -> None:
    """Fix the norms at their present values (equation 1); see `LAWNOptimizer.constrain`."""
    groups = optimizer.param_groups
    chosen = [index for index, group in enumerate(groups) if again or not group["switched"]]
    if not chosen:
        raise ValueError("the weights are constrained already; constrain(again=True) adopts their current norms")
    if not any(p.requires_grad and constrains(groups[index], p) for index in chosen for p in groups[index]["params"]):
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    switch(optimizer, chosen)


@torch.no_grad()
def switch(optimizer: Optimizer, chosen: list[int]) -> None:
    """Begin the second phase of the `chosen` param groups. Raises ValueError, and then changes nothing."""
    group_updates = []
    for index in chosen:
        group = optimizer.param_groups[index]
        check_group(group, index)
        blocks = _blocks(group, [p for p in group["params"] if p.requires_grad and constrains(group, p)])
        params = [p for block in blocks for p in block]
        group_update = GroupUpdate(group, [], params, [len(block) for block in blocks], [])
        group_update.norms = _measure_norms(group_update, index)
        group_updates.append(group_update)
    for group_update in group_updates:
        group_update.group["switched"] = True
        norms = dict(zip(group_update.params, group_update.param_norms(), strict=True))
        for p in group_update.group["params"]:
            if optimizer.state.get(p):  # the norms of other parameters are fixed at their first update
                optimizer.state[p][NORM] = norms.get(p, 0.0)


def raise_zero(group_update: GroupUpdate, index: int, block: int) -> None:
    """Raise ValueError for a block that has become zero since its norm was fixed."""
    name = describe(group_update.group, index, group_update.params[sum(group_update.sizes[:block])])
    raise ValueError(
        f"{name} is zero, but was constrained to the norm {group_update.norms[block]:.6g}: a weight of "
        "zero has no direction in which it could be rescaled; restore it, or set constrain=False for its param group"
    )


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters, zeros where a parameter has none. Raises TypeError for sparse gradients."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    if any(g.is_sparse for g in found):
        raise TypeError("LAWN does not support sparse gradients")
    if torch.compiler.is_compiling():
        return found
    return [g.resolve_neg() if g.is_neg() else g for g in found]


def check_shapes(group: Group, params: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    """Return `state`, one tensor for each parameter. Raises RuntimeError where their shapes differ."""
    for p, t in zip(params, state, strict=True):
        if t.shape != p.shape:
            position = next(i for i, q in enumerate(group["params"]) if q is p)
            name = (group.get("param_names") or {position: position})[position]
            raise RuntimeError(
                f"parameter {name!r} has the shape {tuple(p.shape)}, but its state {tuple(t.shape)}: the state is of "
                "another parameter, or the parameter was replaced"
            )
    return state


def collect(group: Group, state: State) -> GroupUpdate:
    """Collect a group's parameters with gradients. A block is updated whole if one of its parameters has a gradient."""
    due = is_due(group)
    free, constrained, norms = [], [], []
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse and constrains(group, p):
            raise TypeError("LAWN does not support sparse gradients")
        entry = state.get(p)
        c = entry.get(NORM, 0.0) if entry else 0.0
        if not constrains(group, p):
            free.append(p)
            if c and entry:  # constrain=False was set after the switch
                entry[NORM] = 0.0
        elif due or c:
            constrained.append(p)
            norms.append(c)
        else:
            free.append(p)
    if group["blocks"] is None:
        return GroupUpdate(group, free, constrained, [1] * len(constrained), norms)
    blocks = _blocks(group, constrained)
    # The minimum is 0.0, and the norm is measured, if a parameter was added to the block.
    norms = [min((state.get(p) or {}).get(NORM, 0.0) for p in block) for block in blocks]
    return GroupUpdate(group, free, [p for block in blocks for p in block], [len(block) for block in blocks], norms)


def _blocks(group: Group, constrained: list[Tensor]) -> list[list[Tensor]]:
    """Return the blocks that contain at least one of the `constrained` parameters."""
    if group["blocks"] is None:
        return [[p] for p in constrained]
    needed = set(constrained)
    members: dict[int, list[Tensor]] = {}
    for key, p in zip(group["blocks"], group["params"], strict=True):
        if p.requires_grad and constrains(group, p):
            members.setdefault(key, []).append(p)
    return [block for block in members.values() if needed.intersection(block)]


def _measure_norms(group_update: GroupUpdate, index: int) -> list[float]:
    """Compute the present norm of each block. Raises ValueError for a norm that cannot be fixed."""
    norms = _present_norms(group_update)
    for block, c in enumerate(norms):
        if 0 < c < float("inf"):
            continue
        name = describe(group_update.group, index, group_update.params[sum(group_update.sizes[:block])])
        if c == 0:
            raise ValueError(f"cannot constrain {name}: its norm is 0.0; {REMEDY}")
        raise NonFiniteError(f"cannot constrain {name}: its norm is {c}")
    return norms


def _present_norms(group_update: GroupUpdate) -> list[float]:
    """Compute the present norm of each block."""
    updates = group_update.split_by_device_and_dtype()
    norms = [update.norms(single.params, single.sizes).tolist() for single in updates]
    if len(updates) < 2:
        return norms[0] if norms else []
    pairs = zip(updates, norms, strict=True)
    by_first = {block[0]: c for single, values in pairs for block, c in zip(single.blocks(), values, strict=True)}
    return [by_first[block[0]] for block in group_update.blocks()]


def _check_loaded_norms(group_update: GroupUpdate, index: int, known: set[tuple[Tensor, ...]]) -> None:
    """Raise ValueError for a loaded norm that belongs to another weight or block."""
    blocks = list(map(tuple, group_update.blocks()))
    if known.issuperset(blocks):
        return
    for block, c, now in zip(blocks, group_update.norms, _present_norms(group_update), strict=True):
        tolerance = 0.02 if block[0].dtype.itemsize < 4 else 1e-3
        if block not in known and now > 0 and abs(now / c - 1) > tolerance:
            name = describe(group_update.group, index, block[0])
            raise ValueError(
                f"{name} has the norm {now:.6g}, but its state says {c:.6g}: parameters may be in another order "
                "than when it was saved, in other blocks, or the weights were replaced; load by name, or adopt "
                "the current norms with constrain(again=True)"
            )
    known.update(blocks)


def _has_state(state: State) -> bool:
    """Whether the optimizer keeps state. If it does, it has not updated a parameter without state."""
    return any(entry and set(entry) != {NORM} for entry in state.values())
