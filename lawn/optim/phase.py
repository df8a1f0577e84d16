"""The two phases of training: the parameters that a step updates, and the switch to fixed norms."""

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import dispatch, sharding, slices, update
from lawn.optim.blocks import Blocks
from lawn.optim.keys import (
    NORM,
    Group,
    Norm,
    State,
    check_group,
    constrains,
    describe,
    fixed_norm,
    free_norm,
    is_due,
    is_fixed,
)

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
        idle: free trainable DTensors without a gradient on this rank. Another rank may have one.
        params: constrained parameters, block after block.
        sizes: number of parameters in each block.
        norms: norm c of each block, or those of its slices; 0.0 where they are not fixed yet.
        sharded: updates of the blocks that hold DTensors, of one device and dtype each; these are not in `params`.
        sums: inner products w.w and w.g [blocks, 2] over whole weights, for such an update.
    """

    group: Group
    free: list[Tensor]
    params: list[Tensor]
    sizes: list[int]
    norms: list[Norm]
    sharded: list["GroupUpdate"] = field(default_factory=list)
    sums: Tensor | None = None
    idle: list[Tensor] = field(default_factory=list)

    @property
    def slice_axes(self) -> list[tuple[int, ...]]:
        """The slice axes of each constrained parameter; empty if they have a single norm."""
        if self.group.get(slices.KEY) is None:
            return []
        return [slices.slice_axes(self.group[slices.KEY], p) for p in self.params]

    def describe(self, index: int, block: int) -> tuple[str, float]:
        """Describe a block, which may be a slice, of param group `index`; return its norm as well."""
        for p, axes, c in zip(self.params, self.slice_axes, self.norms, strict=False):
            if block < (count := slices.count(p, axes)):
                name = f"slice {slices.describe(p, axes, block)} of {describe(self.group, index, p)}"
                return name, float(c[block]) if isinstance(c, Tensor) else c
            block -= count
        return describe(self.group, index, self.params[sum(self.sizes[:block])]), float(self.norms[block])

    def split_by_device_and_dtype(self) -> list["GroupUpdate"]:
        """Split the constrained parameters into updates of one device and dtype each."""
        if len({(p.device, p.dtype) for p in self.params}) < 2:
            return [self] if self.params else []
        updates: dict[tuple[torch.device, torch.dtype], GroupUpdate] = {}
        for block, c in zip(self.blocks(), self.norms, strict=True):
            key = block[0].device, block[0].dtype
            updates.setdefault(key, GroupUpdate(self.group, [], [], [], []))._add(block, c)
        return list(updates.values())

    def separate_sharded(self) -> "GroupUpdate":
        """Move the blocks that hold DTensors to `sharded`; return self."""
        if not sharding.any_dtensor(self.params):
            return self
        blocks, norms = self.blocks(), self.norms
        self.params, self.sizes, self.norms = [], [], []
        rest = GroupUpdate(self.group, [], [], [], [])
        for block, c in zip(blocks, norms, strict=True):
            (rest if sharding.any_dtensor(block) else self)._add(block, c)
        self.sharded = rest.split_by_device_and_dtype()
        return self

    @property
    def has_dtensors(self) -> bool:
        """Whether a DTensor is among the parameters."""
        return bool(self.sharded) or any(map(sharding.is_dtensor, (*self.free, *self.idle)))

    def parts(self) -> list["GroupUpdate"]:
        """This update and those of its sharded blocks."""
        return [self, *self.sharded]

    def local_blocks(
        self, first: list[Tensor] | None = None, second: list[Tensor] | None = None, *, weights_only: bool = False
    ) -> Blocks:
        """Return the shards of this rank with their gradients, or with themselves, each tensor a block of its own."""
        weights = sharding.local(self.params)
        grads = weights if weights_only else gradients(self.params)
        return Blocks(weights, [1] * len(weights), [], grads, first or [], second or [])

    def per_block(self, values: Tensor) -> Tensor:
        """Add values [params, ...] of the parameters of each block: [blocks, ...]."""
        if len(self.sizes) == len(self.params):
            return values
        return values.new_zeros(len(self.sizes), *values.shape[1:]).index_add_(0, self._owners(values.device), values)

    def per_param(self, values: Tensor) -> Tensor:
        """Repeat values [..., blocks] for the parameters of each block: [..., params]."""
        if len(self.sizes) == len(self.params):
            return values
        return values[..., self._owners(values.device)]

    def keep(self, needed: list[bool]) -> None:
        """Remove the other blocks."""
        blocks = [block for block, chosen in zip(self.blocks(), needed, strict=True) if chosen]
        self.norms = [c for c, chosen in zip(self.norms, needed, strict=True) if chosen]
        self.params, self.sizes = [p for block in blocks for p in block], [len(block) for block in blocks]
        if self.sums is not None:
            self.sums = self.sums[torch.tensor(needed, device=self.sums.device)]

    def _add(self, block: list[Tensor], c: Norm) -> None:
        self.params += block
        self.sizes.append(len(block))
        self.norms.append(c)

    def _owners(self, device: torch.device) -> Tensor:
        """The block of each parameter."""
        return torch.tensor([block for block, size in enumerate(self.sizes) for _ in range(size)], device=device)

    def blocks(self) -> list[list[Tensor]]:
        """The constrained parameters of each block."""
        ends = accumulate(self.sizes)
        return [self.params[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]

    def param_norms(self) -> list[Norm]:
        """The norm c of each constrained parameter's block."""
        if len(self.sizes) == len(self.params):
            return self.norms
        return [c for c, size in zip(self.norms, self.sizes, strict=True) for _ in range(size)]

    def record(self, state: State) -> None:
        """Store the norms after the step, for parameters that have state, and count the step."""
        for p in self.free:
            if state.get(p) or not _has_state(state):
                state[p].setdefault(NORM, free_norm(self.group, p))
        for part in self.parts():
            for p, c in zip(part.params, part.param_norms(), strict=True):
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
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [sharding.gradient(p) for p in params]
    flags = [[g is not None, g is not None and (g.is_sparse or bool(g.any()))] for g in grads]
    given, nonzero = sharding.all_reduce(params, torch.tensor(flags, dtype=torch.float64, device="cpu")).sum(0).tolist()
    return given > 0 and nonzero == 0


def begin_step(optimizer: Optimizer, known: set[tuple[Tensor, ...]], fused: bool | None = None) -> list[GroupUpdate]:
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
    group_updates = [collect(group, optimizer.state) for group in groups]
    sum_products([part for group_update in group_updates for part in group_update.sharded], fused)
    for index, group_update in enumerate(group_updates):
        for part in group_update.parts():
            _check_counts(part, index)
            if not all(map(is_fixed, part.norms)):
                measured = _measure_norms(part, index)
                part.norms = [c if is_fixed(c) else now for c, now in zip(part.norms, measured, strict=True)]
            _check_loaded_norms(part, index, known)
    for group_update in group_updates:
        fixed = any(any(map(is_fixed, part.norms)) for part in group_update.parts())
        group_update.group["switched"] = is_due(group_update.group) or fixed
    return group_updates


def sum_products(
    updates: list[GroupUpdate], fused: bool | None = None, *, weights_only: bool = False, all_blocks: bool = False
) -> None:
    """Compute `sums` of updates of sharded blocks, with one collective for each mesh.

    Which parameters have gradients may differ between ranks, for example where a shard is empty. Every rank therefore
    contributes for every block. A block is updated if a rank has a gradient of it; the others take theirs to be zero.

    Args:
        updates: updates of sharded blocks; those without any gradient are removed.
        fused: as for `dispatch.backend`; None takes it from the param group.
        weights_only: whether to compute only w.w.
        all_blocks: whether to keep blocks without gradients.
    """
    if not updates:
        return
    sums = []
    for part in updates:
        given = [p.grad is not None for p in part.params]
        blocks = part.local_blocks(weights_only=weights_only)
        backend = dispatch.backend(blocks, part.group.get("fused") if fused is None else fused)
        products = backend.products(blocks)
        flags = products.new_ones(len(given)) if all(given) else products.new_tensor(given)
        sums.append(torch.column_stack([products, flags]))
    for part, reduced in zip(updates, all_reduce([part.params for part in updates], sums), strict=True):
        part.sums, given_anywhere = part.per_block(reduced[:, :2]), part.per_block(reduced[:, 2])
        if not (weights_only or all_blocks) and not all(
            any(p.grad is not None for p in block) for block in part.blocks()
        ):
            part.keep((given_anywhere > 0).tolist())


def all_reduce(params: list[list[Tensor]], sums: list[Tensor]) -> list[Tensor]:
    """Apply `sharding.all_reduce` to the parameters of several updates together."""
    together = sums[0] if len(sums) == 1 else torch.cat([values.to(sums[0].device) for values in sums])
    reduced = sharding.all_reduce([p for each in params for p in each], together).split(list(map(len, params)))
    return [values.to(own) for values, own in zip(reduced, sums, strict=True)]


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
        sizes = [len(block) for block in blocks]
        group_update = GroupUpdate(group, [], params, sizes, [0.0] * len(sizes)).separate_sharded()
        sum_products(group_update.sharded, weights_only=True)
        for part in group_update.parts():
            part.norms = _measure_norms(part, index)
        group_updates.append(group_update)
    for group_update in group_updates:
        group_update.group["switched"] = True
        norms = {p: c for part in group_update.parts() for p, c in zip(part.params, part.param_norms(), strict=True)}
        for p in group_update.group["params"]:
            if optimizer.state.get(p):  # the norms of other parameters are fixed at their first update
                optimizer.state[p][NORM] = norms[p] if p in norms else free_norm(group_update.group, p)


def raise_zero(group_update: GroupUpdate, index: int, block: int) -> None:
    """Raise ValueError for a block that has become zero since its norm was fixed."""
    name, c = group_update.describe(index, block)
    raise ValueError(
        f"{name} is zero, but was constrained to the norm {c:.6g}: a weight of "
        "zero has no direction in which it could be rescaled; restore it, or set constrain=False for its param group"
    )


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters, zeros where a parameter has none, and local shards of DTensors.

    Raises TypeError for sparse gradients.
    """
    if sharding.any_dtensor(params):
        given = map(sharding.gradient, params)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(sharding.local(params), given, strict=True)]
    else:
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    if any(g.is_sparse for g in found):
        raise TypeError("LAWN does not support sparse gradients")
    if torch.compiler.is_compiling():
        return found
    return [g.resolve_neg() if g.is_neg() else g for g in found]


def check_shapes(group: Group, params: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    """Return `state`, one tensor for each parameter, or its local shard. Raises RuntimeError where shapes differ."""
    sharded = sharding.any_dtensor(params) or sharding.any_dtensor(state)
    for p, t in zip(params, state, strict=True):
        if t.shape != p.shape:
            position = next(i for i, q in enumerate(group["params"]) if q is p)
            name = (group.get("param_names") or {position: position})[position]
            raise RuntimeError(
                f"parameter {name!r} has the shape {tuple(p.shape)}, but its state {tuple(t.shape)}: the state is of "
                "another parameter, or the parameter was replaced"
            )
        if sharded and not sharding.same_shards(p, t):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} is not sharded as its state is; load the state with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
    return sharding.local(state)


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
        if grad is not None and grad.is_sparse and constrains(group, p):
            raise TypeError("LAWN does not support sparse gradients")
        entry = state.get(p)
        c = fixed_norm(entry)
        if not constrains(group, p):
            (idle if grad is None else free).append(p)
            if entry and is_fixed(c):  # constrain=False was set after the switch
                entry[NORM] = 0.0
        elif due or is_fixed(c):
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
    """Return the blocks that contain at least one of the `constrained` parameters."""
    if group["blocks"] is None:
        return [[p] for p in constrained]
    needed = set(constrained)
    members: dict[int, list[Tensor]] = {}
    for key, p in zip(group["blocks"], group["params"], strict=True):
        if p.requires_grad and constrains(group, p):
            members.setdefault(key, []).append(p)
    return [block for block in members.values() if needed.intersection(block)]


def _measure_norms(group_update: GroupUpdate, index: int) -> list[Norm]:
    """Compute the present norms of each block. Raises ValueError for a norm that cannot be fixed."""
    norms = _present_norms(group_update)
    for block, c in enumerate(_flatten(norms)):
        if 0 < c < float("inf"):
            continue
        name, _ = replace(group_update, norms=norms).describe(index, block)
        if c == 0:
            raise ValueError(f"cannot constrain {name}: its norm is 0.0; {REMEDY}")
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


def _check_loaded_norms(group_update: GroupUpdate, index: int, known: set[tuple[Tensor, ...]]) -> None:
    """Raise ValueError for a loaded norm that belongs to another weight or block."""
    blocks = list(map(tuple, group_update.blocks()))
    if known.issuperset(blocks):
        return
    present = _present_norms(group_update)
    owners = [block for block, c in zip(blocks, present, strict=True) for _ in _flatten([c])]
    pairs = zip(owners, _flatten(group_update.norms), _flatten(present), strict=True)
    for number, (block, c, now) in enumerate(pairs):
        tolerance = 0.02 if block[0].dtype.itemsize < 4 else 1e-3
        if block not in known and now > 0 and abs(now / c - 1) > tolerance:
            name, _ = group_update.describe(index, number)
            raise ValueError(
                f"{name} has the norm {now:.6g}, but its state says {c:.6g}: parameters may be in another order "
                "than when it was saved, in other blocks, or the weights were replaced; load by name, or adopt "
                "the current norms with constrain(again=True)"
            )
    known.update(blocks)


def _has_state(state: State) -> bool:
    """Whether the optimizer keeps state. If it does, it has not updated a parameter without state."""
    return any(entry and set(entry) != {NORM} for entry in state.values())
