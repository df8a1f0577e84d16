"""Blocks of tensors, and the flat vectors that their updates compute with."""

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
            self.weights, self.grads = real(self.weights), real([g.resolve_conj() for g in self.grads])
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

    def share_largest(self, values: list[Tensor]) -> None:
        """Give the tensors of each block, which have one number each, the largest of their block."""
        if len(self.sizes) < len(values):
            sizes = torch.tensor(self.sizes, device="cpu")
            largest = torch.segment_reduce(torch.stack(values), "max", lengths=sizes, unsafe=True)
            torch._foreach_copy_(values, list(largest.repeat_interleave(sizes, output_size=len(values)).unbind()))

    def slice_places(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each slice its number of elements, the first of them in its tensor, and the tensor, on the host."""
        return _slice_places(tuple(w.numel() for w in self.weights), tuple(self.counts))

    def count_as_changed(self) -> None:
        """Count a change of the weights by compiled code, which autograd then sees as it sees those by torch."""
        torch.autograd.graph.increment_version([w for w in self.weights if not w.is_inference()])

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


def real(tensors: list[Tensor]) -> list[Tensor]:
    """View complex tensors as real ones with a last axis of two. Raises TypeError for a lazy conjugate, which has no
    such view.
    """
    if not any(t.is_complex() for t in tensors):
        return tensors
    if any(t.is_conj() for t in tensors):
        raise TypeError(
            "a parameter is the lazy conjugate of another tensor, which cannot be updated: resolve_conj() it"
        )
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


class FlatLayout:
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


def batches(blocks: Blocks) -> Iterator[tuple[Blocks, FlatLayout, slice]]:
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
            yield batch, FlatLayout(batch), slice(starts[first_block], starts[block + 1])
            first_block, first_tensor, elements = block + 1, end, 0
