"""The norms of weights: measured where they are to be fixed, and compared with those that were loaded."""

import operator
from dataclasses import replace

import torch
from torch import Tensor

from lawn.optim import sharding, slices, update
from lawn.optim.blocks import real
from lawn.optim.group_update import GroupUpdate
from lawn.optim.keys import Norm, check_flat, describe, is_fixed

HALF = torch.bfloat16, torch.float16
Layout = tuple[list[Tensor], tuple[int, ...]]  # the parameters of a block, and their slice axes
KnownBlocks = dict[Tensor, Layout]  # by their first parameter
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


def layouts(group_update: GroupUpdate) -> list[Layout]:
    """What the norm of each block is that of."""
    blocks = group_update.blocks()
    return list(zip(blocks, group_update.slice_axes or [()] * len(blocks), strict=True))


def is_known(known: KnownBlocks, layout: Layout) -> bool:
    """Whether the norms of a block are known to be those of exactly these parameters or slices, see `begin_step`."""
    block, axes = layout
    others, other_axes = known.get(block[0], ([], axes))
    return axes == other_axes and len(others) == len(block) and all(map(operator.is_, others, block))


def has_lost(known: KnownBlocks, layout: Layout) -> bool:
    """Whether parameters of a known block have been frozen since, so that its norm is another."""
    if is_known(known, layout):
        return False
    kept = {*layout[0]}
    lost = [{*block} - kept for block, _ in known.values() if kept < {*block}]
    return any(not any(p.requires_grad for p in params) for params in lost)


def remember(known: KnownBlocks, found: list[Layout]) -> None:
    """Add blocks whose norms are known to be theirs, in the place of those that had some of their parameters."""
    members = {p for block, _ in found for p in block}
    for first in [first for first, (block, _) in known.items() if not members.isdisjoint(block)]:
        del known[first]
    known.update((block[0], (block, axes)) for block, axes in found)


def measure_norms(group_update: GroupUpdate) -> list[Norm]:
    """Compute the present norms of each block. Raises ValueError for a norm that cannot be fixed."""
    if any(p.is_meta for p in group_update.params):
        raise ValueError(
            f"param group {group_update.index} has weights on the meta device, which have no norms; materialize them"
        )
    norms = _present(group_update)
    lowest, highest = NORMS64 if all(p.dtype.to_real() == torch.float64 for p in group_update.params) else NORMS32
    for block, c in enumerate(_flatten(norms)):
        if lowest <= c <= highest:
            continue
        name, _ = replace(group_update, norms=norms).describe(block)
        if c < lowest:
            remedy = REMEDY_OF_SLICES if group_update.slice_axes else REMEDY
            raise ValueError(f"cannot constrain {name}: its norm is {c}; {remedy}")
        raise NonFiniteError(f"cannot constrain {name}: its norm is {c}")
    return norms


def _present(group_update: GroupUpdate) -> list[Norm]:
    """Compute the present norms of each block. Raises TypeError for tensors that cannot be flattened."""
    check_flat(group_update.params)
    if group_update.sums is not None:
        dtype = group_update.params[0].dtype.to_real() if group_update.params else torch.float64
        return group_update.sums[:, 0].sqrt().to(torch.promote_types(dtype, torch.float32)).tolist()
    updates = group_update.split_by_device_and_dtype()
    norms = [_of_blocks(single) for single in updates]
    if len(updates) < 2:
        return norms[0] if norms else []
    pairs = zip(updates, norms, strict=True)
    by_first = {block[0]: c for single, values in pairs for block, c in zip(single.blocks(), values, strict=True)}
    return [by_first[block[0]] for block in group_update.blocks()]


def _of_blocks(single: GroupUpdate) -> list[Norm]:
    """Compute the present norms of blocks of one device and dtype."""
    axes = single.slice_axes
    norms = update.norms(single.params, single.sizes, axes)
    if not axes:
        return norms.tolist()
    return list(norms.to("cpu", torch.float64).split(list(map(slices.count, single.params, axes))))


def _flatten(norms: list[Norm]) -> list[float]:
    """Return the norms of all blocks, among them those of slices."""
    return [c for norm in norms for c in (norm.tolist() if isinstance(norm, Tensor) else [norm])]


def check_counts(group_update: GroupUpdate) -> None:
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
                f"{describe(group_update.group, group_update.index, p)} has {kinds[0]}, but its state {kinds[1]}: "
                f"{slices.KEY} has changed; adopt the current norms with constrain(again=True)"
            )


def check_loaded_norms(group_update: GroupUpdate, known: KnownBlocks) -> list[Layout]:
    """Raise ValueError for a loaded norm that belongs to another weight or block; return the blocks that are new."""
    found = layouts(group_update)
    unknown = [not is_known(known, layout) for layout in found]
    if not any(unknown):
        return []
    present = _present(group_update)
    owners = [(block, new) for (block, _), new, c in zip(found, unknown, present, strict=True) for _ in _flatten([c])]
    pairs = zip(owners, _flatten(group_update.norms), _flatten(present), strict=True)
    for number, ((block, new), c, now) in enumerate(pairs):
        if not (new and now > 0):
            continue
        off = abs(now / c - 1)  # perhaps NaN
        if off <= 1e-3 or (off <= 0.02 and _has_half_precision(block)):
            continue
        name, _ = group_update.describe(number)
        raise ValueError(
            f"{name} has the norm {now:.6g}, but its state says {c:.6g}: parameters may be in another order than when "
            "it was saved, in other blocks, or the weights were replaced, averaged or clipped; load by name, or adopt "
            "the current norms with constrain(again=True)"
        )
    return [layout for layout, new in zip(found, unknown, strict=True) if new]


def _has_half_precision(block: list[Tensor]) -> bool:
    """Whether the values have the precision of float16 or bfloat16; they may have been loaded into another dtype.

    The answer is that of whole weights. All ranks that share them have to ask.
    """
    others = [[not torch.equal(t, t.to(half).to(t.dtype)) for half in HALF] for t in real(sharding.local(block))]
    count = sharding.all_reduce(block, torch.tensor(others, dtype=torch.float64, device="cpu")).sum(0)
    return bool((count == 0).any())
