"""Constrained updates of sharded weights, in stages between which inner products are added over ranks.

`group_update.sum_products` is the first stage; its inner products project the gradients. Here the second stage updates
the moments and leaves inner products of the base optimizer's update, and the last one updates the weights. `finish`
adds the inner products of all updates of a step together, so a step has two collectives for each mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lawn.optim import dispatch, sharding, sums, update
from lawn.optim.blocks import Blocks
from lawn.optim.group_update import GroupUpdate, all_reduce


@dataclass
class Pending:
    """An update of sharded parameters that waits for sums over ranks.

    Attributes:
        params: parameters.
        sums: partial sums [params, terms] of this rank.
        complete: completes the update with the sums over ranks; returns a mask of zero blocks, as `update.adam` does.
    """

    params: list[Tensor]
    sums: Tensor
    complete: Callable[[Tensor], Tensor | None]


def finish(pending: list[tuple[GroupUpdate, Pending]]) -> list[tuple[GroupUpdate, Tensor | None]]:
    """Complete updates, with one collective for each mesh. Returns what their `complete` returns."""
    return list(zip((part for part, _ in pending), finish_free([entry for _, entry in pending]), strict=True))


def finish_free(pending: list[Pending]) -> list[Tensor | None]:
    """Complete updates of an optimizer without constraint, as `finish` does."""
    if not pending:
        return []
    sums = all_reduce([entry.params for entry in pending], [entry.sums for entry in pending])
    return [entry.complete(values) for entry, values in zip(pending, sums, strict=True)]


def step(
    part: GroupUpdate,
    blocks: Blocks,
    corrections: Tensor,
    *,
    lr: float | Tensor,
    factors: tuple[float, float, float, float],
    eps: float,
    trust: bool,
    fused: bool | None,
) -> Pending:
    """Begin a step of Adam-LAWN, LAMB-LAWN or SGD-LAWN.

    Args:
        part: an update of sharded blocks.
        blocks: local shards with gradients and moments, or momentum buffers only.
        corrections: result of `update.bias_corrections`; any values [2, blocks] for momentum.
        lr: learning rate.
        factors: factors of the first moment, its gradient, the second moment and its squared gradient.
        eps: added to the square root of the second moment.
        trust: whether LAMB's trust ratio c / ||u|| multiplies the learning rate.
        fused: as for `dispatch.backend`.

    Returns:
        The update, which waits for the inner products of its second stage.
    """
    single = replace(blocks, sizes=[1] * len(blocks.weights))
    backend = dispatch.backend(single, fused)
    scales = part.per_param(corrections)
    sums = backend.advance(single, part.per_param(_along(part)), scales, factors, eps)

    def complete(reduced: Tensor) -> Tensor:
        keep, take, zero, again = _coefficients(part, reduced, lr, trust=trust)
        backend.move(single, keep, take, scales, eps)
        _rescale(part, again)
        return zero

    return Pending(part.params, sums, complete)


def project(part: GroupUpdate, before: list[Tensor], projected: list[Tensor], fused: bool | None) -> None:
    """Prepare a step of any base optimizer: copy the weights to `before`, write projected gradients to `projected`."""
    blocks = part.local_blocks(sharding.local(before), sharding.local(projected))
    dispatch.backend(blocks, fused).tangents(blocks, part.per_param(_along(part)))


def retract(part: GroupUpdate, before: list[Tensor], fused: bool | None) -> Pending:
    """Begin to complete a step of any base optimizer, whose update is before - weights."""
    weights = sharding.local(part.params)
    blocks = Blocks(weights, [1] * len(weights), [], first=sharding.local(before))
    backend = dispatch.backend(blocks, fused)

    def complete(reduced: Tensor) -> Tensor:
        keep, take, zero, again = _coefficients(part, reduced, 1.0, trust=False)
        backend.combine(blocks, keep, take)
        _rescale(part, again)
        return zero

    return Pending(part.params, backend.differences(blocks), complete)


def _along(part: GroupUpdate) -> Tensor:
    """Compute w.g / w.w of each block; 0 where w is zero."""
    ww, wg = _sums(part).unbind(1)
    return torch.where(ww == 0, 0, wg / ww)


def _coefficients(
    part: GroupUpdate, reduced: Tensor, lr: float | Tensor, *, trust: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the factors of w and r for each parameter, and the masks of zero blocks and of those to rescale."""
    ww = _sums(part)[:, 0]
    wr, rr = part.per_block(reduced).unbind(1)
    c = torch.tensor(part.norms, dtype=ww.dtype, device="cpu").to(ww.device)
    rate = lr.to(ww.device, ww.dtype) if isinstance(lr, Tensor) else lr
    keep, take, again = update.coefficients(ww, wr, rr, c, rate, trust=trust)
    zero = ww == 0
    return part.per_param(keep.masked_fill(zero, 0)), part.per_param(take.masked_fill(zero, 0)), zero, again & ~zero


def _rescale(part: GroupUpdate, again: Tensor) -> None:
    """Rescale the blocks of a mask to their norms, with one more collective if there are any.

    Not on GPUs, where every step would wait for the mask; there, the norms are off while the momentum along w lasts.
    """
    if again.is_cuda or not again.any():
        return
    weights = sharding.local(part.params)
    kind = torch.promote_types(weights[0].dtype, torch.float32)  # squares would leave the range of float16
    squares = torch.stack([sums.norm(w, kind) for w in weights]).double() ** 2
    (reduced,) = all_reduce([part.params], [squares[:, None]])
    measured = part.per_block(reduced)[:, 0].sqrt()
    norms = torch.tensor(part.norms, dtype=measured.dtype, device="cpu")
    factors = torch.where(again & (measured > 0), norms / measured, 1)
    torch._foreach_mul_(weights, part.per_param(factors).tolist())


def _sums(part: GroupUpdate) -> Tensor:
    assert part.sums is not None, "sum_products comes first"
    return part.sums
