"""The two phases of training: which phase a parameter is in, and the switch to fixed norms."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import sharding
from lawn.optim.group_update import GroupUpdate, check_dense, sum_products
from lawn.optim.keys import (
    NORM,
    Group,
    State,
    check_free_steps,
    check_group,
    constrains,
    entries,
    fixed_norm,
    forget_removed,
    free_norm,
    is_due,
    is_fixed,
    is_trained,
)
from lawn.optim.memory import check_apart
from lawn.optim.norms import (
    KnownBlocks,
    Layout,
    check_counts,
    check_loaded_norms,
    has_lost,
    layouts,
    measure_norms,
    remember,
)


def is_dummy(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint calls `step` only to initialize the optimizer's state.

    It does so before the first update, with all learning rates and gradients zero. The gradients are read only if there
    is no state and all learning rates are zero, so an update does not wait for the device. Of sharded parameters, the
    ranks answer together: only some may have state.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any((isinstance(rate, Tensor) and not rate.is_cpu) or rate != 0 for rate in rates):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not params:
        return False
    begun = any(entry for _, entry in entries(optimizer.state))
    if begun and not sharding.any_dtensor(params):
        return False
    grads = [sharding.gradient(p) for p in params]
    flags = [[g is not None, begun or (g is not None and (g.is_sparse or bool(g.any())))] for g in grads]
    given, updated = sharding.all_reduce(params, torch.tensor(flags, dtype=torch.float64, device="cpu")).sum(0).tolist()
    return given > 0 and updated == 0


def begin_step(optimizer: Optimizer, known: KnownBlocks, fused: bool | None = None) -> list[GroupUpdate]:
    """Collect what a step updates, and fix the norms of weights that it constrains for the first time.

    Args:
        optimizer: the optimizer that makes the step.
        known: blocks whose norms are known to be theirs. All other norms were loaded; they are compared with those of
            the weights, which waits for the device, and their blocks are added.
        fused: as for `dispatch.backend`, for sharded blocks; None takes it from the param group.

    Returns:
        The parameters to update of each param group.

    Raises:
        ValueError: if a norm is zero, not finite or another weight's, or weights share memory; nothing has changed
            then.
    """
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        check_group(group, index)
        check_free_steps(group["free_steps"], f"param group {index}: ")
    group_updates = [collect(group, index, optimizer.state) for index, group in enumerate(groups)]
    sum_products([part for group_update in group_updates for part in group_update.sharded], fused)
    new: list[Layout] = []
    for group_update in group_updates:
        for part in group_update.parts():
            check_counts(part)
            if group_update.group["blocks"] is not None:
                pairs = zip(layouts(part), part.norms, strict=True)
                part.norms = [0.0 if has_lost(known, layout) else c for layout, c in pairs]
            if not all(map(is_fixed, part.norms)):
                measured = measure_norms(part)
                part.norms = [c if is_fixed(c) else now for c, now in zip(part.norms, measured, strict=True)]
            new += check_loaded_norms(part, known)
    free = [p for group_update in group_updates for p in group_update.free]
    if new or not all(map(optimizer.state.get, free)):  # or at the first update of a free parameter
        check_apart(groups, {p for block, _ in (*known.values(), *new) for p in block})
    if new:
        remember(known, new)  # perhaps in the place of others
        forget_removed(known, groups)
    for group_update in group_updates:
        group = group_update.group
        group["switched"] = is_due(group) or _is_constrained(group_update, optimizer.state)
    return group_updates


def _is_constrained(group_update: GroupUpdate, state: State) -> bool:
    """Whether norms are fixed, and not just those of weights that came from another group, beside free ones."""
    group, norms = group_update.group, group_update.norms_by_param()
    if not any(map(is_fixed, norms.values())):
        return False
    others = [p for p in group["params"] if p not in norms and constrains(group, p)]
    return all(is_fixed(fixed_norm(state[p])) for p in others if state.get(p))


def check_capture() -> None:
    """Raise RuntimeError during CUDA graph capture: a graph would replay phase and bias corrections of one step."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step of LAWN cannot be captured in a CUDA graph")


@torch.no_grad()
def constrain(optimizer: Optimizer, known: KnownBlocks, *, again: bool) -> None:
    """Fix the norms at their present values (equation 1), which are known then; see `LAWNOptimizer.constrain`."""
    groups = optimizer.param_groups
    chosen = [index for index, group in enumerate(groups) if again or not group["switched"]]
    if not chosen:
        raise ValueError("the weights are constrained already; constrain(again=True) adopts their current norms")
    if not any(is_trained(p) and constrains(groups[index], p) for index in chosen for p in groups[index]["params"]):
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    for group_update in switch(optimizer, chosen):
        for part in group_update.parts():
            remember(known, layouts(part))


@torch.no_grad()
def switch(optimizer: Optimizer, chosen: list[int]) -> list[GroupUpdate]:
    """Begin the second phase of the `chosen` param groups; return their parameters and norms.

    Raises ValueError, and then changes nothing.
    """
    group_updates = []
    for index in chosen:
        group = optimizer.param_groups[index]
        check_group(group, index)
        blocks = _blocks(group, [p for p in group["params"] if is_trained(p) and constrains(group, p)])
        params = [p for block in blocks for p in block]
        sizes = [len(block) for block in blocks]
        group_update = GroupUpdate(group, index, [], params, sizes, [0.0] * len(sizes)).separate_sharded()
        sum_products(group_update.sharded, weights_only=True)
        for part in group_update.parts():
            part.norms = measure_norms(part)
        group_updates.append(group_update)
    check_apart(optimizer.param_groups, {p for each in group_updates for p in each.norms_by_param()})
    for group_update in group_updates:
        group_update.group["switched"] = True
        norms = group_update.norms_by_param()
        for p in group_update.group["params"]:
            if optimizer.state.get(p):  # the norms of other parameters are fixed at their first update
                optimizer.state[p][NORM] = norms[p] if p in norms else free_norm(group_update.group, p)
    return group_updates


def collect(group: Group, index: int, state: State) -> GroupUpdate:
    """Collect the parameters with gradients of param group `index`.

    A block is updated whole if one of its parameters has a gradient.
    """
    due = is_due(group)
    free: list[Tensor] = []
    idle: list[Tensor] = []
    constrained, norms = [], []
    for p in group["params"]:
        grad = p.grad
        if grad is None and not (p.requires_grad and sharding.is_dtensor(p)):
            continue
        entry = state.get(p)
        c = fixed_norm(entry)
        if not constrains(group, p):
            (idle if grad is None else free).append(p)
            if entry and is_fixed(c):  # constrain=False was set after the switch
                entry[NORM] = 0.0
            continue
        if grad is not None:
            check_dense(p, grad)
        if due or is_fixed(c):
            constrained.append(p)
            norms.append(c)
        else:
            (idle if grad is None else free).append(p)
    if group["blocks"] is None:
        sizes = [1] * len(constrained)
        return GroupUpdate(group, index, free, constrained, sizes, norms, idle=idle).separate_sharded()
    blocks = _blocks(group, constrained)
    # The minimum is 0.0, and the norm is measured, if a parameter was added to the block.
    norms = [min(fixed_norm(state.get(p)) for p in block) for block in blocks]
    params = [p for block in blocks for p in block]
    trained = {*params}
    free, idle = ([p for p in each if p not in trained] for each in (free, idle))  # a block is updated whole
    joined = {key for key, p in zip(group["blocks"], group["params"], strict=True) if p in trained}
    for key, p in zip(group["blocks"], group["params"], strict=True):
        entry = state.get(p)
        if entry and key in joined and p not in trained and not p.requires_grad and is_fixed(fixed_norm(entry)):
            entry[NORM] = 0.0  # it may be trained again, when the block has another norm
    return GroupUpdate(group, index, free, params, list(map(len, blocks)), norms, idle=idle).separate_sharded()


def _blocks(group: Group, constrained: list[Tensor]) -> list[list[Tensor]]:
    """Return the blocks that contain at least one of the `constrained` parameters, without their frozen ones.

    Of a block that requires no gradients at all, which is then trained by given ones, all parameters are returned.
    """
    if group["blocks"] is None:
        return [[p] for p in constrained]
    needed = set(constrained)
    members: dict[int, list[Tensor]] = {}
    for key, p in zip(group["blocks"], group["params"], strict=True):
        if constrains(group, p):
            members.setdefault(key, []).append(p)
    blocks = [[p for p in block if p.requires_grad] or block for block in members.values()]
    return [block for block in blocks if any(p in needed for p in block)]
