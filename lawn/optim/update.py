"""The constrained updates, each on one block: tensors that share a norm, nearly always a single weight.

With r the base optimizer's update made from the projected gradient, and u = r - w (w.r) / (w.w) its tangent part,

    w <- c (w - lr u) / ||w - lr u||.

Since u is tangent, ||w - lr u||^2 = w.w + lr^2 u.u needs no pass over memory of its own, and as
u.u = r.r - (w.r)^2 / w.w, neither does u. w.w is measured, not taken to be c^2: rounding does not pile up over steps.

Plain torch operations here; native.c on the CPU and triton.py on a GPU do the same in three passes over memory. Sums
run in float64 on the CPU, where float32 sums over millions of terms are good to five digits only.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lawn.optim import native


@dataclass
class Block:
    """Tensors that share the norm c, with their gradients and moments; `step` counts updates from 1."""

    weights: list[Tensor]
    grads: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    c: Tensor
    step: float = 1

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        lists = (self.weights, self.grads, self.first, self.second)
        return lists if self.second else lists[:3]


def norm(tensors: list[Tensor]) -> Tensor:
    """Frobenius norm of all tensors together, 0-dim, in float32 (float64 for float64) whatever their dtype."""
    wide = [t.to(_wide(t)) for t in tensors]
    return _sum([t * t for t in wide]).sqrt().to(wide[0].dtype)


def adam(
    blocks: list[Block],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    trust: bool,
    fused: bool | None,
) -> None:
    """One step of Adam-LAWN (Algorithm 1), in place on the weights and their moments.

    With `trust` it is LAMB-LAWN: the trust ratio ||w|| / ||u|| multiplies the rate.
    """
    beta1, beta2 = betas
    scales = [(1 / (1 - beta1**block.step), 1 / math.sqrt(1 - beta2**block.step)) for block in blocks]
    if (gpu := gpu_kernels([b.lists for b in blocks], fused)) is not None:
        factors = {"first": (beta1, 1 - beta1), "second": (beta2, 1 - beta2), "eps": eps}
        gpu.step([b.lists for b in blocks], [b.c for b in blocks], scales, lr, adam=True, trust=trust, **factors)
        return
    for block, (first_scale, second_scale) in zip(blocks, scales, strict=True):
        compiled = native.library(fused, *block.lists)
        if compiled is not None:
            scalars = (float(block.c), float(lr), beta1, beta2, eps, first_scale, second_scale, trust)
            compiled.adam(*native.pointers(*block.lists), *scalars)
            continue
        updates = []
        tangents = projected(block.weights, block.grads)
        for m, v, g in zip(block.first, block.second, tangents, strict=True):
            g = g.to(m.dtype)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            wide = _wide(m)
            updates.append(m.to(wide).mul(first_scale).div_(v.to(wide).sqrt().mul_(second_scale).add_(eps)))
        move(block.weights, block.weights, updates, block.c, lr, trust=trust)


def sgd(blocks: list[Block], *, lr: float | Tensor, momentum: float, fused: bool | None) -> None:
    """One step of SGD-LAWN with heavy-ball momentum, in place on the weights and their buffers (`first`)."""
    if (gpu := gpu_kernels([b.lists for b in blocks], fused)) is not None:
        factors = {"first": (momentum, 1.0), "second": (0.0, 0.0), "eps": 0.0}
        scales = [(1.0, 1.0)] * len(blocks)
        gpu.step([b.lists for b in blocks], [b.c for b in blocks], scales, lr, adam=False, trust=False, **factors)
        return
    for block in blocks:
        compiled = native.library(fused, *block.lists)
        if compiled is not None:
            compiled.sgd(*native.pointers(*block.lists), float(block.c), float(lr), momentum)
            continue
        for b, g in zip(block.first, projected(block.weights, block.grads), strict=True):
            b.mul_(momentum).add_(g.to(b.dtype))
        move(block.weights, block.weights, block.first, block.c, lr)


def gpu_kernels(blocks: Sequence[tuple[list[Tensor], ...]], fused: bool | None) -> ModuleType | None:
    """triton.py, if `fused` allows it and it can work on all blocks (lists of tensors) at once; None otherwise."""
    like = blocks[0][0][0]
    if fused is False or not (like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    try:
        from lawn.optim import triton
    except ImportError:
        return None
    fits = all(t.device == like.device and t.dtype == like.dtype and t.numel() for b in blocks for ts in b for t in ts)
    return triton if fits and like.dtype in triton.DTYPES and all(native.alike(*b) for b in blocks) else None


def projected(weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """Tangent part of the vectors at the weights, v - w (w.v) / (w.w) (equation 3): new tensors, at least float32."""
    ws = [w.to(_wide(w)) for w in weights]
    vs = [v.to(_wide(v)) for v in vectors]
    along = _dot(ws, vs) / _dot(ws, ws)
    return [torch.addcmul(v, w, along.to(w.dtype), value=-1) for w, v in zip(ws, vs, strict=True)]


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in at least float32."""
    return a.to(_wide(a)) - b.to(_wide(b))


def move(
    weights: list[Tensor],
    at: list[Tensor],
    updates: list[Tensor],
    c: Tensor,
    lr: float | Tensor,
    *,
    trust: bool = False,
) -> None:
    """weights <- at - lr u, rescaled to norm c, for the tangent part u of the updates at `at` (lines 9 to 11).

    Rounded once, at the end: a factor near one, applied to a weight in bfloat16, would round back to it.
    """
    ws = [w.to(_wide(w)) for w in at]
    rs = [r.to(_wide(r)) for r in updates]
    ww, wr, rr = _dot(ws, ws), _dot(ws, rs), _dot(rs, rs)
    keep, take = coefficients(ww, wr, rr, c, lr, trust=trust)
    for weight, w, r in zip(weights, ws, rs, strict=True):
        weight.copy_(torch.addcmul(w * keep.to(w.dtype), r, take.to(w.dtype), value=-1))


def coefficients(
    ww: Tensor, wr: Tensor, rr: Tensor, c: Tensor, lr: float | Tensor, *, trust: bool
) -> tuple[Tensor, Tensor]:
    """What w and r are multiplied by in w <- keep w - take r, of their inner products; all may have a leading axis."""
    along = wr / ww
    tangent = (rr - along * wr).clamp(min=0)
    rate = torch.where(tangent > 0, lr * c / tangent.sqrt(), lr) if trust else lr
    scale = c / (ww + rate * rate * tangent).sqrt()
    return scale * (1 + rate * along), scale * rate


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return _sum([x * y for x, y in zip(a, b, strict=True)])


def _sum(tensors: list[Tensor]) -> Tensor:
    precision = torch.float64 if tensors[0].device.type == "cpu" else tensors[0].dtype
    sums = [t.sum(dtype=precision) for t in tensors]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
