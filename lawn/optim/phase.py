"""The two phases of training: which phase a parameter is in, and the switch to fixed norms."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import sharding, slices, update
from lawn.optim.blocks import real
from lawn.optim.group_update import GroupUpdate, check_dense, sum_products
from lawn.optim.keys import (
    NORM,
    Group,
    Norm,
    State,
    check_free_steps,
    check_group,
    constrains,
    describe,
    entries,
    fixed_norm,
    forget_removed,
    free_norm,
    is_due,
    is_fixed,
)

HALF = torch.bfloat16, torch.float16
KnownBlocks = dict[Tensor, list[Tensor]]  # by their first parameter
NORMS32, NORMS64 = (1e-19, 1e19), (1e-154, 1e154)  # whose squares are numbers that the updates compute with
REMEDY = "leave it free with a param group that has constrain=False, or give it more free steps"
REMEDY_OF_SLICES = "put other values there (nn.Embedding has zeros at padding_idx), or give the whole weight one norm"


class NonFiniteError(ValueError):
    """Raised when the norm of a weight is infinite, NaN or beyond 1e19 (float64: 1e154) at the switch, because training
    has diverged.

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


def is_dummy(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint calls `step` only to initialize the optimizer's state.

    It does so before the first update, with all learning rates and gradients zero. The gradients are read only if there
    is no state and all learning rates are zero, so an update does not wait for the device.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any(entry for _, entry in entries(optimizer.state)) or any(
        isinstance(r, Tensor) and not r.is_cpu for r in rates
    ):
        return False
    if any(rate != 0 for rate in rates):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [sharding.gradient(p) for p in params]
    flags = [[g is not None, g is not None and (g.is_sparse or bool(g.any()))] for g in grads]
    given, nonzero = sharding.all_reduce(params, torch.tensor(flags, dtype=torch.float64, device="cpu")).sum(0).tolist()
    return given > 0 and nonzero == 0


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
        ValueError: if a norm is zero, not finite or another weight's; nothing has changed then.
    """
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        check_group(group, index)
        check_free_steps(group["free_steps"], f"param group {index}: ")
    group_updates = [collect(group, optimizer.state) for group in groups]
    sum_products([part for group_update in group_updates for part in group_update.sharded], fused)
    count = len(known)
    for index, group_update in enumerate(group_updates):
        for part in group_update.parts():
            _check_counts(part, index)
            if not all(map(is_fixed, part.norms)):
                measured = _measure_norms(part, index)
                part.norms = [c if is_fixed(c) else now for c, now in zip(part.norms, measured, strict=True)]
            _check_loaded_norms(part, index, known)
    if len(known) > count:  # perhaps in the place of others
        forget_removed(known, groups)
    for group_update in group_updates:
        fixed = any(any(map(is_fixed, part.norms)) for part in group_update.parts())
        group_update.group["switched"] = is_due(group_update.group) or fixed
    return group_updates


def is_known(known: KnownBlocks, block: list[Tensor]) -> bool:
    """Whether the norm of a block is known to be that of exactly these parameters, see `begin_step`."""
    other = known.get(block[0], [])
    return len(other) == len(block) and all(p is q for p, q in zip(other, block, strict=True))


def check_capture() -> None:
    """Raise RuntimeError during CUDA graph capture: a graph would replay phase and bias corrections of one step."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step of LAWN cannot be captured in a CUDA graph")


@torch.no_grad()
def constrain(optimizer: Optimizer, *, again: bool) -> list[GroupUpdate]:
    """Fix the norms at their present values (equation 1) and return them; see `LAWNOptimizer.constrain`."""
    groups = optimizer.param_groups
    chosen = [index for index, group in enumerate(groups) if again or not group["switched"]]
    if not chosen:
        raise ValueError("the weights are constrained already; constrain(again=True) adopts their current norms")
    if not any(_is_trained(p) and constrains(groups[index], p) for index in chosen for p in groups[index]["params"]):
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    return switch(optimizer, chosen)


@torch.no_grad()
def switch(optimizer: Optimizer, chosen: list[int]) -> list[GroupUpdate]:
    """Begin the second phase of the `chosen` param groups; return their parameters and norms.

    Raises ValueError, and then changes nothing.
    """
    group_updates = []
    for index in chosen:
        group = optimizer.param_groups[index]
        check_group(group, index)
        blocks = _blocks(group, [p for p in group["params"] if _is_trained(p) and constrains(group, p)])
        params = [p for block in blocks for p in block]
        sizes = [len(block) for block in blocks]
        group_update = GroupUpdate(group, [], params, sizes, [0.0] * len(sizes)).separate_sharded()
        sum_products(group_update.sharded, weights_only=True)
        for part in group_update.parts():
            part.norms = _measure_norms(part, index)
        group_updates.append(group_update)
    for group_update in group_updates:
        group_update.group["switched"] = True
        norms = group_update.norms_by_param()
        for p in group_update.group["params"]:
            if optimizer.state.get(p):  # the norms of other parameters are fixed at their first update
                optimizer.state[p][NORM] = norms[p] if p in norms else free_norm(group_update.group, p)
    return group_updates


def _is_trained(p: Tensor) -> bool:
    return p.requires_grad or p.grad is not None  # given by the caller, for example of an evolution strategy


def raise_zero(group_update: GroupUpdate, index: int, block: int) -> None:
    """Raise ValueError for a block that has become zero since its norm was fixed."""
    name, c = group_update.describe(index, block)
    raise ValueError(
        f"{name} is zero, but was constrained to the norm {c:.6g}: a weight of "
        "zero has no direction in which it could be rescaled; restore it, or set constrain=False for its param group"
    )


def collect(group: Group, state: State) -> GroupUpdate:
    """Collect a group's parameters with gradients. A block is updated whole if one of its parameters has a gradient."""
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
        return GroupUpdate(group, free, constrained, [1] * len(constrained), norms, idle=idle).separate_sharded()
    blocks = _blocks(group, constrained)
    # The minimum is 0.0, and the norm is measured, if a parameter was added to the block.
    norms = [min(fixed_norm(state.get(p)) for p in block) for block in blocks]
    params = [p for block in blocks for p in block]
    return GroupUpdate(group, free, params, [len(block) for block in blocks], norms, idle=idle).separate_sharded()


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


def _measure_norms(group_update: GroupUpdate, index: int) -> list[Norm]:
    """Compute the present norms of each block. Raises ValueError for a norm that cannot be fixed."""
    norms = _present_norms(group_update)
    lowest, highest = NORMS64 if all(p.dtype.to_real() == torch.float64 for p in group_update.params) else NORMS32
    for block, c in enumerate(_flatten(norms)):
        if lowest <= c <= highest:
            continue
        name, _ = replace(group_update, norms=norms).describe(index, block)
        if c < lowest:
            remedy = REMEDY_OF_SLICES if group_update.slice_axes else REMEDY
            raise ValueError(f"cannot constrain {name}: its norm is {c}; {remedy}")
        raise NonFiniteError(f"cannot constrain {name}: its norm is {c}")
    return norms


def _present_norms(group_update: GroupUpdate) -> list[Norm]:
    """Compute the present norms of each block."""
    if group_update.sums is not None:
        dtype = group_update.params[0].dtype.to_real() if group_update.params else torch.float64
        return group_update.sums[:, 0].sqrt().to(torch.promote_types(dtype, torch.float32)).tolist()
    updates = group_update.split_by_device_and_dtype()
    norms = [_norms(single) for single in updates]
    if len(updates) < 2:
        return norms[0] if norms else []
    pairs = zip(updates, norms, strict=True)
    by_first = {block[0]: c for single, values in pairs for block, c in zip(single.blocks(), values, strict=True)}
    return [by_first[block[0]] for block in group_update.blocks()]


def _norms(single: GroupUpdate) -> list[Norm]:
    """Compute the present norms of blocks of one device and dtype."""
    axes = single.slice_axes
    norms = update.norms(single.params, single.sizes, axes)
    if not axes:
        return norms.tolist()
    return list(norms.to("cpu", torch.float64).split(list(map(slices.count, single.params, axes))))


def _flatten(norms: list[Norm]) -> list[float]:
    """Return the norms of all blocks, among them those of slices."""
    return [c for norm in norms for c in (norm.tolist() if isinstance(norm, Tensor) else [norm])]


def _check_counts(group_update: GroupUpdate, index: int) -> None:
    """Raise ValueError if a parameter has another number of norms than of slices."""
    axes = group_update.slice_axes
    if not axes and not any(isinstance(c, Tensor) for c in group_update.norms):
        return
    counts = list(map(slices.count, group_update.params, axes)) if axes else [None] * len(group_update.sizes)
    for p, c, count in zip(group_update.params, group_update.norms, counts, strict=False):
        fixed = len(c) if isinstance(c, Tensor) else None
        if is_fixed(c) and fixed != count:
            kinds = [f"a norm for each of {n} slices" if n else "a single norm" for n in (count, fixed)]
            raise ValueError(
                f"{describe(group_update.group, index, p)} has {kinds[0]}, but its state {kinds[1]}: {slices.KEY} has "
                "changed; adopt the current norms with constrain(again=True)"
            )


def _check_loaded_norms(group_update: GroupUpdate, index: int, known: KnownBlocks) -> None:
    """Raise ValueError for a loaded norm that belongs to another weight or block."""
    blocks = group_update.blocks()
    unknown = [not is_known(known, block) for block in blocks]
    if not any(unknown):
        return
    present = _present_norms(group_update)
    owners = [(b, new) for b, new, c in zip(blocks, unknown, present, strict=True) for _ in _flatten([c])]
    pairs = zip(owners, _flatten(group_update.norms), _flatten(present), strict=True)
    for number, ((block, new), c, now) in enumerate(pairs):
        if not (new and now > 0):
            continue
        off = abs(now / c - 1)  # perhaps NaN
        if off <= 1e-3 or (off <= 0.02 and _has_half_precision(block)):
            continue
        name, _ = group_update.describe(index, number)
        raise ValueError(
            f"{name} has the norm {now:.6g}, but its state says {c:.6g}: parameters may be in another order than when "
            "it was saved, in other blocks, or the weights were replaced, averaged or clipped; load by name, or adopt "
            "the current norms with constrain(again=True)"
        )
    known.update((block[0], block) for block in blocks)


def _has_half_precision(block: list[Tensor]) -> bool:
    """Whether the values have the precision of float16 or bfloat16; they may have been loaded into another dtype."""
    return any(all(torch.equal(t, t.to(half).to(t.dtype)) for t in real(sharding.local(block))) for half in HALF)
