"""The constrained updates, on blocks: tensors that share a norm, nearly always a single weight.

With r the base optimizer's update made from the projected gradient, and u = r - w (w.r) / (w.w) its tangent part,

    w <- c (w - lr u) / ||w - lr u||.

Since u is tangent, ||w - lr u||^2 = w.w + lr^2 u.u needs no pass over memory of its own, and as
u.u = r.r - (w.r)^2 / w.w, neither does u. w.w is measured, not taken to be c^2: rounding does not pile up over steps.

Plain torch operations here, a handful for all blocks; cpu_kernels.c on the CPU and triton_kernels.py on a GPU do the
same in three passes over memory. Sums run in float64 on the CPU, where float32 sums over millions of terms are good to
five digits only. A complex tensor is its real view.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lawn.optim import cpu_kernels

CHUNK = {"cpu": 1 << 20}  # elements that the plain update works on at a time, as far as whole blocks allow
CHUNK_ELSEWHERE = 1 << 24


@dataclass
class Blocks:
    """Tensors, block after block, and what belongs to them; lists that an update does not need are empty."""

    weights: list[Tensor]
    sizes: list[int]  # how many tensors each block has
    norms: list[float]  # c of each block
    grads: list[Tensor]
    first: list[Tensor]  # moments, or what an update keeps
    second: list[Tensor]

    def __post_init__(self) -> None:
        if any(w.is_complex() for w in self.weights):
            self.weights, self.grads = real(self.weights), real(self.grads)
            self.first, self.second = real(self.first), real(self.second)

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        return tuple(filter(None, (self.weights, self.grads, self.first, self.second)))

    def of_blocks(self, values: list[Tensor]) -> list[Tensor]:
        """Of a value for each tensor, that of each block's first one."""
        if len(self.sizes) == len(values):
            return values
        return [values[end - size] for size, end in zip(self.sizes, accumulate(self.sizes), strict=True)]


def norms(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    """Frobenius norm of each block of tensors [blocks], in float32 (float64 for float64) whatever their dtype."""
    if not tensors:
        return torch.zeros(0, device="cpu")
    found: list[Tensor] = []
    for part, at in _chunks(Blocks(tensors, sizes, [0.0] * len(sizes), [], [], [])):
        w = at.join(part.weights)
        found.append(at.sums(w * w).sqrt().to(w.dtype))
    return torch.cat(found)


def adam(
    blocks: Blocks,
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    trust: bool,
    fused: bool | None,
) -> Tensor | None:
    """One step of Adam-LAWN (Algorithm 1), in place on the weights and their moments. `steps` counts each tensor's
    updates from 1, on the host.

    With `trust` it is LAMB-LAWN: the trust ratio ||w|| / ||u|| multiplies the rate. A block of zeros is left as it is.
    Returns which blocks are zero [blocks]; None if no block is.
    """
    beta1, beta2 = betas
    counts = torch.stack(blocks.of_blocks(steps)).double()
    scales = torch.stack([1 / (1 - beta1**counts), 1 / (1 - beta2**counts).sqrt()])
    if (gpu := gpu_kernels(blocks.lists, fused)) is not None:
        factors = {"first": (beta1, 1 - beta1), "second": (beta2, 1 - beta2), "eps": eps}
        return gpu.step(blocks, scales, lr, adam=True, trust=trust, **factors)
    if (compiled := cpu_kernels.library(fused, *blocks.lists)) is not None:
        return compiled.adam(blocks.lists, blocks.sizes, blocks.norms, scales, float(lr), beta1, beta2, eps, trust)
    zero = []
    for part, at, scale in _chunks(blocks, scales):
        w = at.join(part.weights)
        ww = at.sums(w * w)
        g = at.projected(w, ww, at.join(part.grads))
        m = at.join(part.first).lerp_(g, 1 - beta1)
        v = at.join(part.second).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        at.store(part.first, m)
        at.store(part.second, v)
        # What is stored is what the next step reads: in half precision the update is that of the rounded moments.
        m, v = at.join(part.first), at.join(part.second)
        r = m.mul_(at.spread(scale[0])).div_(v.sqrt_().mul_(at.spread(scale[1])).add_(eps))
        zero.append(at.move(part.weights, w, ww, r, part.norms, lr, trust=trust))
    return torch.cat(zero)


def sgd(blocks: Blocks, *, lr: float | Tensor, momentum: float, fused: bool | None) -> Tensor | None:
    """One step of SGD-LAWN with heavy-ball momentum, in place on the weights and their buffers (`first`). Returns which
    blocks are zero, as `adam` does."""
    if (gpu := gpu_kernels(blocks.lists, fused)) is not None:
        factors = {"first": (momentum, 1.0), "second": (0.0, 0.0), "eps": 0.0}
        return gpu.step(blocks, torch.ones(2, len(blocks.sizes), device="cpu"), lr, adam=False, trust=False, **factors)
    if (compiled := cpu_kernels.library(fused, *blocks.lists)) is not None:
        return compiled.sgd(blocks.lists, blocks.sizes, blocks.norms, float(lr), momentum)
    zero = []
    for part, at in _chunks(blocks):
        w = at.join(part.weights)
        ww = at.sums(w * w)
        g = at.projected(w, ww, at.join(part.grads))
        at.store(part.first, g.add_(at.join(part.first), alpha=momentum))
        r = at.join(part.first)
        zero.append(at.move(part.weights, w, ww, r, part.norms, lr))
    return torch.cat(zero)


def project(blocks: Blocks, before: list[Tensor], out: list[Tensor], fused: bool | None) -> None:
    """For the wrapper, before the base optimizer's step: copy the weights to `before`, and write the projected
    gradients to `out`."""
    blocks = replace(blocks, first=real(before), second=real(out))
    if (gpu := gpu_kernels(blocks.lists, fused)) is not None:
        gpu.project(blocks)
    elif (compiled := cpu_kernels.library(fused, *blocks.lists)) is not None:
        compiled.project(blocks.lists, blocks.sizes)
    else:
        for part, at in _chunks(blocks):
            w = at.join(part.weights)
            at.store(part.second, at.projected(w, at.sums(w * w), at.join(part.grads)))
            at.store(part.first, w)


def retract(blocks: Blocks, before: list[Tensor], fused: bool | None) -> Tensor | None:
    """After it: the update before - weights is projected at `before`, taken there, and rescaled. Returns which blocks
    were zero, as `adam` does."""
    blocks = replace(blocks, first=real(before))
    if (gpu := gpu_kernels(blocks.lists, fused)) is not None:
        return gpu.retract(blocks)
    if (compiled := cpu_kernels.library(fused, *blocks.lists)) is not None:
        return compiled.retract(blocks.lists, blocks.sizes, blocks.norms)
    zero = []
    for part, at in _chunks(blocks):
        w = at.join(part.first)
        zero.append(at.move(part.weights, w, at.sums(w * w), w - at.join(part.weights), part.norms, 1.0))
    return torch.cat(zero)


def gpu_kernels(lists: Sequence[list[Tensor]], fused: bool | None) -> ModuleType | None:
    """triton_kernels.py, if `fused` allows it and it can work on all tensors at once; None otherwise."""
    like = lists[0][0]
    if fused is False or not (like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    try:
        from lawn.optim import triton_kernels
    except ImportError:
        return None
    fits = all(t.device == like.device and t.dtype == like.dtype for tensors in lists for t in tensors)
    return triton_kernels if fits and like.dtype in triton_kernels.DTYPES and cpu_kernels.alike(*lists) else None


def code(weight: Tensor, fused: bool | None) -> tuple[str, str]:
    """What constrained updates of such a weight run in, `triton`, `native` or `torch`; where code that `fused` allows
    cannot be built for it, also why, and what helps."""
    if fused is False:
        return "torch", ""
    if gpu_kernels([[weight]], fused) is not None:
        return "triton", ""
    if cpu_kernels.library(None, [weight]) is not None:
        return "native", ""
    return "torch", cpu_kernels.build(weight.dtype)[1] if weight.is_cpu and weight.dtype in cpu_kernels.REAL else ""


def real(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as real ones with a last axis of two: views, so that they can be written to; a gradient that is a
    lazy conjugate is copied. Raises TypeError for a parameter that is one."""
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
    """What w and r are multiplied by in w <- keep w - take r, of their inner products; all may have a leading axis."""
    along = wr / ww
    tangent = (rr - along * wr).clamp(min=0)
    rate = torch.where(tangent > 0, lr * c / tangent.sqrt(), lr) if trust else lr
    scale = c / (ww + rate * rate * tangent).sqrt()
    return scale * (1 + rate * along), scale * rate


class _Joined:
    """Tensors as one vector in at least float32, with sums over each block of them."""

    def __init__(self, tensors: list[Tensor], sizes: list[int]) -> None:
        self._numels = [t.numel() for t in tensors]
        ends = [0, *accumulate(self._numels)]
        at = [0, *accumulate(sizes)]
        lengths = torch.tensor([ends[b] - ends[a] for a, b in pairwise(at)], device="cpu")
        self._lengths = lengths.to(tensors[0].device)
        self._alone = len(sizes) == 1
        self._dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        self._precision = torch.float64 if tensors[0].device.type == "cpu" else self._dtype

    def join(self, tensors: list[Tensor]) -> Tensor:
        """A copy."""
        if len(tensors) == 1:
            return tensors[0].reshape(-1).to(self._dtype, copy=True)
        return torch.cat([t.reshape(-1) for t in tensors]).to(self._dtype)

    def store(self, tensors: list[Tensor], joined: Tensor) -> None:
        pieces = joined.split(self._numels)
        torch._foreach_copy_(tensors, [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)])

    def sums(self, joined: Tensor) -> Tensor:
        """[blocks]"""
        if self._alone:
            return joined.sum(dtype=self._precision)[None]
        return torch.segment_reduce(joined.to(self._precision), "sum", lengths=self._lengths, unsafe=True)

    def spread(self, values: Tensor) -> Tensor:
        """[blocks] to what goes with [elements]"""
        values = values.to(self._lengths.device, self._dtype)
        if self._alone:
            return values
        return values.repeat_interleave(self._lengths, output_size=sum(self._numels))

    def projected(self, w: Tensor, ww: Tensor, v: Tensor) -> Tensor:
        """Tangent part of v at w, v - w (w.v) / (w.w) (equation 3); v itself where w is zero."""
        along = torch.where(ww == 0, 0, self.sums(w * v) / ww)
        return torch.addcmul(v, w, self.spread(along), value=-1)

    def move(
        self,
        weights: list[Tensor],
        w: Tensor,
        ww: Tensor,
        r: Tensor,
        norms: list[float],
        lr: float | Tensor,
        *,
        trust: bool = False,
    ) -> Tensor:
        """weights <- w - lr u, rescaled to their norms, for the tangent part u of r at w (lines 9 to 11). Returns which
        blocks are zero, and left as they are [blocks].

        Rounded once, at the end: a factor near one, applied to a weight in bfloat16, would round back to it.
        """
        c = torch.tensor(norms, dtype=self._precision, device="cpu").to(w.device)
        rate = lr.to(w.device, self._precision) if isinstance(lr, Tensor) else lr
        keep, take = coefficients(ww, self.sums(w * r), self.sums(r * r), c, rate, trust=trust)
        zero = ww == 0
        keep, take = keep.masked_fill(zero, 0), take.masked_fill(zero, 0)
        self.store(weights, (w * self.spread(keep)).addcmul_(r, self.spread(take), value=-1))
        return zero


def _chunks(blocks: Blocks, scales: Tensor | None = None) -> Iterator[tuple[Any, ...]]:
    """Blocks, as one or in parts: the part, its tensors joined, and the columns of `scales` [..., blocks], if given."""
    like = blocks.weights[0]
    limit = CHUNK.get(like.device.type, CHUNK_ELSEWHERE)
    start, at, elements = 0, 0, 0
    numels = [w.numel() for w in blocks.weights]
    ends = list(accumulate(blocks.sizes))
    counts = [sum(numels[end - size : end]) for size, end in zip(blocks.sizes, ends, strict=True)]
    for block, end in enumerate(ends):
        elements += counts[block]
        if block + 1 == len(ends) or elements + counts[block + 1] > limit:
            tensors, whole = slice(at, end), slice(start, block + 1)
            part = Blocks(
                blocks.weights[tensors],
                blocks.sizes[whole],
                blocks.norms[whole],
                blocks.grads[tensors],
                blocks.first[tensors],
                blocks.second[tensors],
            )
            joined = _Joined(part.weights, part.sizes)
            yield (part, joined) if scales is None else (part, joined, scales[:, whole])
            start, at, elements = block + 1, end, 0
