"""The parameters of a param group that a step updates, and what it needs of them."""

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lawn.optim import dispatch, sharding, slices
from lawn.optim.blocks import Blocks
from lawn.optim.keys import NORM, Group, Norm, State, describe, free_norm


@dataclass
class GroupUpdate:
    """The parameters of a param group that a step updates.

    Attributes:
        group: the param group.
        index: its index, for messages.
        free: free parameters.
        idle: free trainable DTensors without a gradient on this rank. Another rank may have one.
        params: constrained parameters, block after block.
        sizes: number of parameters in each block.
        norms: norm c of each block, or those of its slices; 0.0 where they are not fixed yet.
        sharded: updates of the blocks that hold DTensors, of one device and dtype each; these are not in `params`.
        sums: inner products w.w and w.g [blocks, 2] over whole weights, for such an update.
    """

    group: Group
    index: int
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

    def describe(self, block: int) -> tuple[str, float]:
        """Describe a block, which may be a slice; return its norm as well."""
        for p, axes, c in zip(self.params, self.slice_axes, self.norms, strict=False):
            if block < (count := slices.count(p, axes)):
                name = f"slice {slices.describe(p, axes, block)} of {describe(self.group, self.index, p)}"
                return name, float(c[block]) if isinstance(c, Tensor) else c
            block -= count
        return describe(self.group, self.index, self.params[sum(self.sizes[:block])]), float(self.norms[block])

    def split_by_device_and_dtype(self) -> list["GroupUpdate"]:
        """Split the constrained parameters into updates of one device and dtype each."""
        if len({(p.device, p.dtype) for p in self.params}) < 2:
            return [self] if self.params else []
        updates: dict[tuple[torch.device, torch.dtype], GroupUpdate] = {}
        for block, c in zip(self.blocks(), self.norms, strict=True):
            key = block[0].device, block[0].dtype
            updates.setdefault(key, self._empty())._add(block, c)
        return list(updates.values())

    def separate_sharded(self) -> "GroupUpdate":
        """Move the blocks that hold DTensors to `sharded`; return self."""
        if not sharding.any_dtensor(self.params):
            return self
        blocks, norms = self.blocks(), self.norms
        self.params, self.sizes, self.norms = [], [], []
        rest = self._empty()
        for block, c in zip(blocks, norms, strict=True):
            (rest if sharding.any_dtensor(block) else self)._add(block, c)
        self.sharded = rest.split_by_device_and_dtype()
        return self

    def _empty(self) -> "GroupUpdate":
        return GroupUpdate(self.group, self.index, [], [], [], [])

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

    def norms_by_param(self) -> dict[Tensor, Norm]:
        """The norm of each constrained parameter's block, sharded ones too."""
        return {p: c for part in self.parts() for p, c in zip(part.params, part.param_norms(), strict=True)}

    def record(self, state: State) -> None:
        """Store the norms after the step, and count the step."""
        for p in self.free:
            state[p].setdefault(NORM, free_norm(self.group, p))
        for p, c in self.norms_by_param().items():
            state[p][NORM] = c
        self.group["steps"] += 1


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


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters, zeros where a parameter has none, and local shards of DTensors.

    Raises TypeError for sparse gradients.
    """
    if sharding.any_dtensor(params):
        given = map(sharding.gradient, params)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(sharding.local(params), given, strict=True)]
    else:
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    for p, g in zip(params, found, strict=True):
        check_dense(p, g)
    if torch.compiler.is_compiling():
        return found
    return [g.resolve_neg() if g.is_neg() else g for g in found]


def check_dense(p: Tensor, gradient: Tensor, who: str = "LAWN") -> None:
    """Raise TypeError for a sparse gradient."""
    if gradient.is_sparse:
        raise TypeError(
            f"{who} does not support sparse gradients, as of a parameter of shape {tuple(p.shape)}; use sparse=False, "
            "or an optimizer of its own for it"
        )


def check_shapes(group: Group, params: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    """Return `state`, one tensor for each parameter, or its local shard. Raises RuntimeError where shapes differ."""
    sharded = sharding.any_dtensor(params) or sharding.any_dtensor(state)
    for p, t in zip(params, state, strict=True):
        if t.shape != p.shape:
            position = next(i for i, q in enumerate(group["params"]) if q is p)
            name = dict(enumerate(group.get("param_names") or [])).get(position, position)
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
