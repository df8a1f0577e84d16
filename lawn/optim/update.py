"""Constrained updates of blocks of tensors, in plain torch operations.

A block is a set of tensors that share one norm c, nearly always a single weight w, or it is a slice of a weight. Let r
be the base optimizer's update, computed from the projected gradient, and u = r - w (w.r) / (w.w) its tangent component.
The constrained update is

    w <- c (w - lr u) / ||w - lr u||.

Because u is tangent, ||w - lr u||^2 = w.w + lr^2 u.u, and u.u = r.r - (w.r)^2 / w.w. Both follow from three inner
products, so neither needs another pass over memory. w.w is computed in each step rather than taken to be c^2, so
rounding errors do not accumulate.

Sums run in float64 on the CPU, where float32 sums over millions of terms are accurate to five digits only. Complex
tensors are updated through their real views. `dispatch.py` chooses between these functions and compiled kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lawn.optim import rounding, slices
from lawn.optim.keys import Norm

# Elements that are updated at a time, by device type. A block is never divided.
BATCH_ELEMENTS = {"cpu": 1 << 20}
DEFAULT_BATCH_ELEMENTS = 1 << 24
# A tangent component whose square is at most so many eps of the update's is rounding error, which LAMB's trust ratio
# would magnify: that of a slice with one element, or of an update along the weight.
NEGLIGIBLE = 4


@dataclass
class Blocks:
    """Blocks of tensors with their gradients and optimizer state.

    Every list of tensors has one entry per tensor, ordered block after block; lists that an update does not need are
    empty. Complex tensors are replaced by their real views.

    Attributes:
        weights: weights, updated in place.
        sizes: number of tensors in each block; all 1 if the tensors have slices, of which each is a block of its own.
        norms: norm c of each block; norms of slices are a tensor for each tensor.
        grads: gradients.
        first: first moments or momentum buffers; for `project` and `retract` the weights before the step.
        second: second moments; for `project` the tensors that receive the projected gradients.
        streams: streams of random numbers [tensors] that round the weights, see `lawn.optim.rounding`; None rounds to
            nearest.
        slice_axes: the axes of each tensor that select a slice, see `lawn.optim.slices`; empty if there are no slices.
    """

    weights: list[Tensor]
    sizes: list[int]
    norms: list[Norm]
    grads: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    streams: Tensor | None = None
    slice_axes: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(w.is_complex() for w in self.weights):
            self.weights, self.grads = real(self.weights), real(self.grads)
            self.first, self.second = real(self.first), real(self.second)

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        """The lists of tensors that are not empty."""
        return tuple(filter(None, (self.weights, self.grads, self.first, self.second)))

    @property
    def counts(self) -> list[int]:
        """The number of slices of each tensor; empty if there are no slices."""
        return [slices.count(w, axes) for w, axes in zip(self.weights, self.slice_axes, strict=False)]

    def __len__(self) -> int:
        """The number of blocks."""
        return sum(self.counts) if self.slice_axes else len(self.sizes)

    def norm_of_each(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The norm of each block [blocks], on the host."""
        if not self.slice_axes:
            return torch.tensor(self.norms, dtype=dtype, device="cpu")
        return torch.cat([c for c in self.norms if isinstance(c, Tensor)]).to(dtype)

    def first_of_each(self, values: list[Tensor]) -> list[Tensor]:
        """Pick the first value of each set of tensors from a list with one value per tensor."""
        if len(self.sizes) == len(values):
            return values
        return [values[end - size] for size, end in zip(self.sizes, accumulate(self.sizes), strict=True)]

    def slice_places(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each slice its number of elements, the first of them in its tensor, and the tensor, on the host."""
        return _slice_places(tuple(w.numel() for w in self.weights), tuple(self.counts))

    def has_dense_slices(self) -> bool:
        """Whether each slice, if there are any, is a contiguous part of its dense tensor."""
        return all(
            axes == tuple(range(len(axes))) and (len(axes) < 2 or w.is_contiguous())
            for w, axes in zip(self.weights, self.slice_axes, strict=False)
        )


@lru_cache(maxsize=64)
def _slice_places(numels: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    number = torch.tensor(counts, device="cpu")
    owners = torch.arange(len(counts), device="cpu").repeat_interleave(number)
    each = (torch.tensor(numels, device="cpu") // number)[owners]
    positions = torch.arange(len(owners), device="cpu") - (number.cumsum(0) - number)[owners]
    return each, positions * each, owners


def batch_elements(device: torch.device) -> int:
    """Number of elements that are updated at a time."""
    return BATCH_ELEMENTS.get(device.type, DEFAULT_BATCH_ELEMENTS)


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
    for batch, flat, _ in _batches(Blocks(tensors, sizes, [0.0] * len(sizes), slice_axes=slice_axes or [])):
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
    for batch, flat, selected in _batches(blocks):
        w = flat.flatten(batch.weights)
        ww = flat.sums(w * w)
        g = flat.tangent(w, ww, flat.flatten(batch.grads))
        m = flat.flatten(batch.first).lerp_(g, 1 - beta1)
        v = flat.flatten(batch.second).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        flat.write(batch.first, m)
        flat.write(batch.second, v)
        # The next step reads the stored moments, so in half precision the update uses the rounded ones too.
        m, v = flat.flatten(batch.first), flat.flatten(batch.second)
        scale = corrections[:, selected]
        r = m.mul_(flat.expand(scale[0])).div_(v.sqrt_().mul_(flat.expand(scale[1])).add_(eps))
        zero.append(flat.move(batch, w, ww, r, lr, trust=trust))
    return torch.cat(zero)


def sgd(blocks: Blocks, *, lr: float | Tensor, momentum: float) -> Tensor | None:
    """Apply one step of SGD-LAWN with heavy-ball momentum; `blocks.first` are the buffers. Returns as `adam` does."""
    zero = []
    for batch, flat, _ in _batches(blocks):
        w = flat.flatten(batch.weights)
        ww = flat.sums(w * w)
        g = flat.tangent(w, ww, flat.flatten(batch.grads))
        flat.write(batch.first, g.add_(flat.flatten(batch.first), alpha=momentum))
        zero.append(flat.move(batch, w, ww, flat.flatten(batch.first), lr))
    return torch.cat(zero)


def project(blocks: Blocks) -> None:
    """Prepare a step of any base optimizer: copy the weights to `first`, write projected gradients to `second`."""
    for batch, flat, _ in _batches(blocks):
        w = flat.flatten(batch.weights)
        flat.write(batch.second, flat.tangent(w, flat.sums(w * w), flat.flatten(batch.grads)))
        flat.write(batch.first, w)


def retract(blocks: Blocks) -> Tensor | None:
    """Complete a step of any base optimizer, whose update is first - weights.

    The update is projected on the tangent space at `first` and applied there; the result is rescaled to the norm.
    Returns as `adam` does.
    """
    zero = []
    for batch, flat, _ in _batches(blocks):
        w = flat.flatten(batch.first)
        zero.append(flat.move(batch, w, flat.sums(w * w), w - flat.flatten(batch.weights), 1.0))
    return torch.cat(zero)


def products(blocks: Blocks) -> Tensor:
    """Compute the inner products w.w and w.g of each block: [blocks, 2].

    This function and the next five are the stages of an update of sharded weights. Each block is the local shard of one
    weight; the inner products of the shards are added before the next stage.
    """
    results = []
    for batch, flat, _ in _batches(blocks):
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
    for batch, flat, selected in _batches(blocks):
        w = flat.flatten(batch.weights)
        g = torch.addcmul(flat.flatten(batch.grads), w, flat.expand(along[selected]), value=-1)
        flat.write(batch.first, flat.flatten(batch.first).mul_(factors[0]).add_(g, alpha=factors[1]))
        if batch.second:
            v = flat.flatten(batch.second).mul_(factors[2]).addcmul_(g, g, value=factors[3])
            flat.write(batch.second, v)
        r = flat.direction(batch, scales[:, selected], eps)
        results.append(torch.stack([flat.sums(w * r), flat.sums(r * r)], 1))
    return torch.cat(results)


def move(blocks: Blocks, keep: Tensor, take: Tensor, scales: Tensor, eps: float) -> None:
    """Replace the weights by keep w - take r, with r and the other arguments as in `advance`."""
    for batch, flat, selected in _batches(blocks):
        r = flat.direction(batch, scales[:, selected], eps)
        w = flat.flatten(batch.weights).mul_(flat.expand(keep[selected]))
        flat.write_weights(batch, w.addcmul_(r, flat.expand(take[selected]), value=-1))


def tangents(blocks: Blocks, along: Tensor) -> None:
    """Copy the weights to `first` and write projected gradients, g - along w, to `second`."""
    for batch, flat, selected in _batches(blocks):
        w = flat.flatten(batch.weights)
        flat.write(batch.second, torch.addcmul(flat.flatten(batch.grads), w, flat.expand(along[selected]), value=-1))
        flat.write(batch.first, w)


def differences(blocks: Blocks) -> Tensor:
    """Compute the inner products w.r and r.r [blocks, 2], where w is `first` and r = first - weights."""
    results = []
    for batch, flat, _ in _batches(blocks):
        w = flat.flatten(batch.first)
        r = w - flat.flatten(batch.weights)
        results.append(torch.stack([flat.sums(w * r), flat.sums(r * r)], 1))
    return torch.cat(results)


def combine(blocks: Blocks, keep: Tensor, take: Tensor) -> None:
    """Replace the weights by keep w - take r, with w and r as in `differences`."""
    for batch, flat, selected in _batches(blocks):
        w = flat.flatten(batch.first)
        r = w - flat.flatten(batch.weights)
        w.mul_(flat.expand(keep[selected]))
        flat.write(batch.weights, w.addcmul_(r, flat.expand(take[selected]), value=-1))


def real(tensors: list[Tensor]) -> list[Tensor]:
    """View complex tensors as real ones with a last axis of two.

    A gradient that is a lazy conjugate is copied, since it has no such view. Raises TypeError for a parameter that is
    a lazy conjugate.
    """
    if not any(t.is_complex() for t in tensors):
        return tensors
    if any(t.is_conj() and not t.requires_grad for t in tensors):
        tensors = [t.resolve_conj() if not t.requires_grad else t for t in tensors]
    if any(t.is_conj() for t in tensors):
        raise TypeError(
            "a parameter is the lazy conjugate of another tensor, which cannot be updated: resolve_conj() it"
        )
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def coefficients(
    ww: Tensor, wr: Tensor, rr: Tensor, c: Tensor, lr: float | Tensor, *, trust: bool
) -> tuple[Tensor, Tensor]:
    """Compute the factors a and b of the constrained update w <- a w - b r.

    Args:
        ww: inner product w.w of each block, of any shape.
        wr: inner product w.r.
        rr: inner product r.r.
        c: norm of each block.
        lr: learning rate.
        trust: whether LAMB's trust ratio c / ||u|| multiplies the learning rate.

    Returns:
        The factors a and b, each with the shape of the inner products.
    """
    along = wr / ww
    tangent = rr - along * wr
    tangent = torch.where(tangent > NEGLIGIBLE * torch.finfo(rr.dtype).eps * rr, tangent, 0)
    rate = torch.where(tangent > 0, lr * c / tangent.sqrt(), lr) if trust else lr
    scale = c / (ww + rate * rate * tangent).sqrt()
    return scale * (1 + rate * along), scale * rate


class _FlatLayout:
    """Layout of blocks in a flat vector, with sums over each block."""

    def __init__(self, blocks: Blocks) -> None:
        tensors, counts = blocks.weights, blocks.counts
        self._numels = [t.numel() for t in tensors]
        self._slice_axes = blocks.slice_axes
        self._device = tensors[0].device
        self._single = len(blocks.sizes) == 1 and not counts
        self._rows = counts[0] if len(counts) == 1 else 0  # the slices of a single tensor
        if not self._single and not self._rows:
            ends = [0, *accumulate(self._numels)]
            bounds = [0, *accumulate(blocks.sizes)]
            lengths = torch.tensor([ends[b] - ends[a] for a, b in pairwise(bounds)], device="cpu")
            if counts:
                each = torch.tensor(counts, device="cpu")
                lengths = (lengths // each).repeat_interleave(each)
            self._lengths = lengths.to(self._device)
        self._dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        self._sum_dtype = torch.float64 if self._device.type == "cpu" else self._dtype

    def flatten(self, tensors: list[Tensor]) -> Tensor:
        """Copy tensors to a vector [elements] in at least float32, slice after slice."""
        tensors = self._slices_of(tensors)
        if len(tensors) == 1:
            return tensors[0].reshape(-1).to(self._dtype, copy=True)
        return torch.cat([t.reshape(-1) for t in tensors]).to(self._dtype)

    def write(self, tensors: list[Tensor], flat: Tensor) -> None:
        """Copy a vector [elements] to tensors."""
        self._copy(self._slices_of(tensors), flat)

    def sums(self, flat: Tensor) -> Tensor:
        """Sum a vector [elements] over each block: [blocks]."""
        if self._single:
            return flat.sum(dtype=self._sum_dtype)[None]
        if self._rows:
            return flat.view(self._rows, -1).sum(1, dtype=self._sum_dtype)
        return torch.segment_reduce(flat.to(self._sum_dtype), "sum", lengths=self._lengths, unsafe=True)

    def expand(self, values: Tensor) -> Tensor:
        """Repeat values [blocks] for all elements of their blocks; the result broadcasts over [elements]."""
        values = values.to(self._device, self._dtype)
        if self._single:
            return values
        if self._rows:
            return values[:, None].expand(-1, self._numels[0] // self._rows).reshape(-1)
        return values.repeat_interleave(self._lengths, output_size=sum(self._numels))

    def _copy(self, tensors: list[Tensor], flat: Tensor) -> None:
        pieces = flat.split(self._numels)
        torch._foreach_copy_(tensors, [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)])

    def _slices_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """View tensors such that their slices are one after the other."""
        if not self._slice_axes:
            return tensors
        return [slices.to_front(t, axes) for t, axes in zip(tensors, self._slice_axes, strict=True)]

    def direction(self, blocks: Blocks, scales: Tensor, eps: float) -> Tensor:
        """Compute the base optimizer's update [elements] from the stored moments."""
        m = self.flatten(blocks.first)
        if not blocks.second:
            return m
        root = self.flatten(blocks.second).sqrt_().mul_(self.expand(scales[1])).add_(eps)
        return m.mul_(self.expand(scales[0])).div_(root)

    def tangent(self, w: Tensor, ww: Tensor, v: Tensor) -> Tensor:
        """Project v on the tangent space at w, v - w (w.v) / (w.w) (equation 3); v itself where w is zero."""
        along = torch.where(ww == 0, 0, self.sums(w * v) / ww)
        return torch.addcmul(v, w, self.expand(along), value=-1)

    def move(
        self, blocks: Blocks, w: Tensor, ww: Tensor, r: Tensor, lr: float | Tensor, *, trust: bool = False
    ) -> Tensor:
        """Write w - lr u, rescaled to the norms, to the weights; u is the tangent component of r (lines 9 to 11).

        Returns a mask [blocks] of the blocks that are zero and do not change. The result is rounded once, at the end:
        in bfloat16 a factor near one would have no effect.
        """
        c = blocks.norm_of_each(self._sum_dtype).to(w.device)
        rate = lr.to(w.device, self._sum_dtype) if isinstance(lr, Tensor) else lr
        keep, take = coefficients(ww, self.sums(w * r), self.sums(r * r), c, rate, trust=trust)
        zero = ww == 0
        keep, take = keep.masked_fill(zero, 0), take.masked_fill(zero, 0)
        self.write_weights(blocks, (w * self.expand(keep)).addcmul_(r, self.expand(take), value=-1))
        return zero

    def write_weights(self, blocks: Blocks, flat: Tensor) -> None:
        """Round a vector [elements] to the dtype of the weights, and copy it to them."""
        if blocks.streams is None:
            self.write(blocks.weights, flat)
            return
        if self._slice_axes:  # the elements in their own order, in which they have their random numbers
            values = [torch.empty(w.shape, dtype=flat.dtype, device=flat.device) for w in blocks.weights]
            self.write(values, flat)
            flat = torch.cat([value.view(-1) for value in values])
        rounded = rounding.stochastic(flat, blocks.weights[0].dtype, blocks.streams, self._numels)
        self._copy(blocks.weights, rounded)


def _batches(blocks: Blocks) -> Iterator[tuple[Blocks, _FlatLayout, slice]]:
    """Divide blocks into batches of limited size: the batch, its layout and its part of the blocks."""
    limit = batch_elements(blocks.weights[0].device)
    if torch.compiler.is_compiling():
        limit = 0  # a block at a time: the compiler joins the operations of all blocks
    first_block, first_tensor, elements = 0, 0, 0
    numels = [w.numel() for w in blocks.weights]
    ends = list(accumulate(blocks.sizes))
    counts = [sum(numels[end - size : end]) for size, end in zip(blocks.sizes, ends, strict=True)]
    starts = [0, *accumulate(blocks.counts)] if blocks.slice_axes else range(len(ends) + 1)
    for block, end in enumerate(ends):
        elements += counts[block]
        if block + 1 == len(ends) or elements + counts[block + 1] > limit:
            tensors, selected = slice(first_tensor, end), slice(first_block, block + 1)
            batch = Blocks(
                blocks.weights[tensors],
                blocks.sizes[selected],
                blocks.norms[selected],
                blocks.grads[tensors],
                blocks.first[tensors],
                blocks.second[tensors],
                None if blocks.streams is None else blocks.streams[tensors],
                blocks.slice_axes[tensors],
            )
            yield batch, _FlatLayout(batch), slice(starts[first_block], starts[block + 1])
            first_block, first_tensor, elements = block + 1, end, 0
