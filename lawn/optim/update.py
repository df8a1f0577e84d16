"""Constrained updates of blocks of tensors, in plain torch operations.

A block is a set of tensors that share one norm c, nearly always a single weight w, or it is a slice of a weight. Let r
be the base optimizer's update, computed from the projected gradient, and u = r - w (w.r) / (w.w) its tangent component.
The constrained update is

    w <- c (w - lr u) / ||w - lr u||.

Because u is tangent, ||w - lr u||^2 = w.w + lr^2 u.u, and u.u = r.r - (w.r)^2 / w.w. Both follow from three inner
products, so neither needs another pass over memory, except where digits cancel (see `CANCELLATION`). w.w is computed in
each step rather than taken to be c^2, so rounding errors do not accumulate.

Sums run in float64 on the CPU, where float32 sums over millions of terms are accurate to five digits only. Complex
tensors are updated through their real views. `dispatch.py` chooses between these functions and compiled kernels.
"""

import torch
from torch import Tensor

from lawn.optim.blocks import Blocks, FlatLayout, batches

# A tangent component whose square is at most so many eps of the update's is rounding error, which LAMB's trust ratio
# would magnify: that of a slice with one element, or of an update along the weight.
NEGLIGIBLE = 4

# Where r lies along w and is much longer (the momentum that a huge gradient leaves), the new weights are a difference
# of long vectors, and rounding errors of r.r appear in their norm, magnified by the ratio of lr^2 r.r to its square.
# From this ratio on, the norm is measured and the weights are rescaled once more.
CANCELLATION = 8


def norms(tensors: list[Tensor], sizes: list[int], slice_axes: list[tuple[int, ...]] | None = None) -> Tensor:
    """Compute the Frobenius norm of each block of tensors.

    Args:
        tensors: tensors of one device and dtype, block after block.
        sizes: number of tensors in each block.
        slice_axes: the axes of each tensor that select a slice, of which each is a block of its own; None without
            slices.

    Returns:
        Norms [blocks], in float64 for float64 tensors and in float32 for all others.
    """
    if not tensors:
        return torch.zeros(0, device="cpu")
    results: list[Tensor] = []
    for batch, flat, _ in batches(Blocks(tensors, sizes, [0.0] * len(sizes), slice_axes=slice_axes or [])):
        w = flat.flatten(batch.weights)
        results.append(flat.sums(w * w).sqrt().to(w.dtype))
    return torch.cat(results)


def bias_corrections(blocks: Blocks, steps: list[Tensor], betas: tuple[float, float]) -> Tensor:
    """Compute Adam's bias corrections, on the host.

    Args:
        blocks: blocks that are updated.
        steps: number of updates of each tensor, this one included.
        betas: decay rates of the two moments.

    Returns:
        Factors [2, blocks] of the first moment and of the square root of the second, in float64.
    """
    beta1, beta2 = betas
    counts = torch.stack(blocks.first_of_each(steps)).double()
    factors = torch.stack([1 / (1 - beta1**counts), 1 / (1 - beta2**counts).sqrt()])
    if not blocks.slice_axes:
        return factors
    return factors.repeat_interleave(torch.tensor(blocks.counts, device=factors.device), dim=1)


def adam(
    blocks: Blocks,
    corrections: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    trust: bool,
) -> Tensor | None:
    """Apply one step of Adam-LAWN (Algorithm 1), or of LAMB-LAWN.

    Args:
        blocks: blocks with gradients and both moments.
        corrections: result of `bias_corrections`.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        trust: whether LAMB's trust ratio c / ||u|| multiplies the learning rate.

    Returns:
        A mask [blocks] of the blocks that are zero, or None if no block is zero. Their weights do not change.
    """
    beta1, beta2 = betas
    zero = []
    for batch, flat, selected in batches(blocks):
        w = flat.flatten(batch.weights)
        ww = flat.sums(w * w)
        g = _tangent(flat, w, ww, flat.flatten(batch.grads))
        m = flat.flatten(batch.first).lerp_(g, 1 - beta1)
        v = flat.flatten(batch.second).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        flat.write(batch.first, m)
        flat.write(batch.second, v)
        # The next step reads the stored moments, so in half precision the update uses the rounded ones too.
        r = _direction(flat, batch, corrections[:, selected], eps)
        zero.append(_move_tangentially(flat, batch, w, ww, r, lr, trust=trust))
    return torch.cat(zero)


def sgd(blocks: Blocks, *, lr: float | Tensor, momentum: float) -> Tensor | None:
    """Apply one step of SGD-LAWN with heavy-ball momentum; `blocks.first` are the buffers. Returns as `adam` does."""
    zero = []
    for batch, flat, _ in batches(blocks):
        w = flat.flatten(batch.weights)
        ww = flat.sums(w * w)
        g = _tangent(flat, w, ww, flat.flatten(batch.grads))
        flat.write(batch.first, g.add_(flat.flatten(batch.first), alpha=momentum))
        zero.append(_move_tangentially(flat, batch, w, ww, flat.flatten(batch.first), lr))
    return torch.cat(zero)


def project(blocks: Blocks) -> None:
    """Prepare a step of any base optimizer: copy the weights to `first`, write projected gradients to `second`."""
    for batch, flat, _ in batches(blocks):
        w = flat.flatten(batch.weights)
        flat.write(batch.second, _tangent(flat, w, flat.sums(w * w), flat.flatten(batch.grads)))
        flat.write(batch.first, w)


def retract(blocks: Blocks) -> Tensor | None:
    """Complete a step of any base optimizer, whose update is first - weights.

    The update is projected on the tangent space at `first` and applied there; the result is rescaled to the norm.
    Returns as `adam` does.
    """
    zero = []
    for batch, flat, _ in batches(blocks):
        w = flat.flatten(batch.first)
        zero.append(_move_tangentially(flat, batch, w, flat.sums(w * w), w - flat.flatten(batch.weights), 1.0))
    return torch.cat(zero)


def products(blocks: Blocks) -> Tensor:
    """Compute the inner products w.w and w.g of each block: [blocks, 2].

    This function and the next five are the stages of an update of sharded weights. Each block is the local shard of one
    weight; the inner products of the shards are added before the next stage.
    """
    results = []
    for batch, flat, _ in batches(blocks):
        w = flat.flatten(batch.weights)
        results.append(torch.stack([flat.sums(w * w), flat.sums(w * flat.flatten(batch.grads))], 1))
    return torch.cat(results)


def advance(
    blocks: Blocks, along: Tensor, scales: Tensor, factors: tuple[float, float, float, float], eps: float
) -> Tensor:
    """Update the moments with the projected gradient, g - along w.

    Args:
        blocks: blocks with gradients and both moments, or with momentum buffers only.
        along: w.g / w.w of each block.
        scales: bias corrections [2, blocks] of Adam, on the host; any values for momentum.
        factors: factors of the first moment, its gradient, the second moment and its squared gradient.
        eps: added to the square root of the second moment.

    Returns:
        Inner products w.r and r.r of each block [blocks, 2] with the base optimizer's update r.
    """
    results = []
    for batch, flat, selected in batches(blocks):
        w = flat.flatten(batch.weights)
        g = torch.addcmul(flat.flatten(batch.grads), w, flat.expand(along[selected]), value=-1)
        flat.write(batch.first, flat.flatten(batch.first).mul_(factors[0]).add_(g, alpha=factors[1]))
        if batch.second:
            v = flat.flatten(batch.second).mul_(factors[2]).addcmul_(g, g, value=factors[3])
            flat.write(batch.second, v)
        r = _direction(flat, batch, scales[:, selected], eps)
        results.append(torch.stack([flat.sums(w * r), flat.sums(r * r)], 1))
    return torch.cat(results)


def move(blocks: Blocks, keep: Tensor, take: Tensor, scales: Tensor, eps: float) -> None:
    """Replace the weights by keep w - take r, with r and the other arguments as in `advance`."""
    for batch, flat, selected in batches(blocks):
        r = _direction(flat, batch, scales[:, selected], eps)
        w = flat.flatten(batch.weights).mul_(flat.expand(keep[selected]))
        flat.write_weights(batch, w.addcmul_(r, flat.expand(take[selected]), value=-1))


def tangents(blocks: Blocks, along: Tensor) -> None:
    """Copy the weights to `first` and write projected gradients, g - along w, to `second`."""
    for batch, flat, selected in batches(blocks):
        w = flat.flatten(batch.weights)
        flat.write(batch.second, torch.addcmul(flat.flatten(batch.grads), w, flat.expand(along[selected]), value=-1))
        flat.write(batch.first, w)


def differences(blocks: Blocks) -> Tensor:
    """Compute the inner products w.r and r.r [blocks, 2], where w is `first` and r = first - weights."""
    results = []
    for batch, flat, _ in batches(blocks):
        w = flat.flatten(batch.first)
        r = w - flat.flatten(batch.weights)
        results.append(torch.stack([flat.sums(w * r), flat.sums(r * r)], 1))
    return torch.cat(results)


def combine(blocks: Blocks, keep: Tensor, take: Tensor) -> None:
    """Replace the weights by keep w - take r, with w and r as in `differences`."""
    for batch, flat, selected in batches(blocks):
        w = flat.flatten(batch.first)
        r = w - flat.flatten(batch.weights)
        w.mul_(flat.expand(keep[selected]))
        flat.write(batch.weights, w.addcmul_(r, flat.expand(take[selected]), value=-1))


def coefficients(
    ww: Tensor, wr: Tensor, rr: Tensor, c: Tensor, lr: float | Tensor, *, trust: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the factors a and b of the constrained update w <- a w - b r.

    Args:
        ww: inner product w.w of each block, of any shape.
        wr: inner product w.r.
        rr: inner product r.r.
        c: norm of each block.
        lr: learning rate.
        trust: whether LAMB's trust ratio c / ||u|| multiplies the learning rate.

    Returns:
        The factors a and b, and whether the result has to be rescaled by its measured norm, each with the shape of the
        inner products.
    """
    along = wr / ww
    tangent = rr - along * wr
    tangent = torch.where(tangent < NEGLIGIBLE * torch.finfo(rr.dtype).eps * rr, 0, tangent)
    rate = torch.where(tangent > 0, lr * c / tangent.sqrt(), lr) if trust else lr
    square = ww + rate * rate * tangent
    scale = c / square.sqrt()
    return scale * (1 + rate * along), scale * rate, rate * rate * rr > CANCELLATION * square


def _direction(flat: FlatLayout, blocks: Blocks, scales: Tensor, eps: float) -> Tensor:
    """Compute the base optimizer's update [elements] from the stored moments."""
    m = flat.flatten(blocks.first)
    if not blocks.second:
        return m
    root = flat.flatten(blocks.second).sqrt_().mul_(flat.expand(scales[1])).add_(eps)
    return m.mul_(flat.expand(scales[0])).div_(root)


def _tangent(flat: FlatLayout, w: Tensor, ww: Tensor, v: Tensor) -> Tensor:
    """Project v on the tangent space at w, v - w (w.v) / (w.w) (equation 3); v itself where w is zero."""
    along = torch.where(ww == 0, 0, flat.sums(w * v) / ww)
    return torch.addcmul(v, w, flat.expand(along), value=-1)


def _move_tangentially(
    flat: FlatLayout, blocks: Blocks, w: Tensor, ww: Tensor, r: Tensor, lr: float | Tensor, *, trust: bool = False
) -> Tensor:
    """Write w - lr u, rescaled to the norms, to the weights; u is the tangent component of r (lines 9 to 11).

    Returns a mask [blocks] of the blocks that are zero and do not change. The result is rounded once, at the end:
    in bfloat16 a factor near one would have no effect.
    """
    c = blocks.norm_of_each(ww.dtype).to(w.device)
    rate = lr.to(w.device, ww.dtype) if isinstance(lr, Tensor) else lr
    keep, take, _ = coefficients(ww, flat.sums(w * r), flat.sums(r * r), c, rate, trust=trust)
    zero = ww == 0
    keep, take = keep.masked_fill(zero, 0), take.masked_fill(zero, 0)
    w = (w * flat.expand(keep)).addcmul_(r, flat.expand(take), value=-1)
    # All norms are measured: to ask whether one has to be would wait for the device.
    length = flat.sums(w * w).sqrt()
    flat.write_weights(blocks, w.mul_(flat.expand(torch.where(length > 0, c / length, 0))))
    return zero
