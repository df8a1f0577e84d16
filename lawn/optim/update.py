"""The constrained updates, each on one block: tensors that share a norm, nearly always a single weight.

With r the base optimizer's update made from the projected gradient, and u = r - w (w.r) / (w.w) its tangent part,

    w <- c (w - lr u) / ||w - lr u||.

Since u is tangent, ||w - lr u||^2 = w.w + lr^2 u.u needs no pass over memory of its own, and as
u.u = r.r - (w.r)^2 / w.w, neither does u. w.w is measured, not taken to be c^2: rounding does not pile up over steps.

Plain torch operations here; native.c is the same in three passes over memory. Sums run in float64 on the CPU, where
float32 sums over millions of terms are good to five digits only.
"""

import math

import torch
from torch import Tensor

from lawn.optim import native


def norm(tensors: list[Tensor]) -> Tensor:
    """Frobenius norm of all tensors together, 0-dim, in float32 (float64 for float64) whatever their dtype."""
    wide = [t.to(_wide(t)) for t in tensors]
    return _sum([t * t for t in wide]).sqrt().to(wide[0].dtype)


def adam(
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    c: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    step: float,
    trust: bool,
    fused: bool | None,
) -> None:
    """One step of Adam-LAWN (Algorithm 1), in place on the weights and their moments; `step` counts from 1.

    With `trust` it is LAMB-LAWN: the trust ratio ||w|| / ||u|| multiplies the rate.
    """
    beta1, beta2 = betas
    first_scale, second_scale = 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    compiled = native.library(fused, weights, grads, first, second)
    if compiled is not None:
        lists = (native.pointers(tensors) for tensors in (weights, grads, first, second))
        scalars = (float(c), float(lr), beta1, beta2, eps, first_scale, second_scale, trust)
        compiled.adam(len(weights), *lists, native.sizes(weights), *scalars)
        return
    updates = []
    for m, v, g in zip(first, second, projected(weights, grads), strict=True):
        g = g.to(m.dtype)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        wide = _wide(m)
        updates.append(m.to(wide).mul(first_scale).div_(v.to(wide).sqrt().mul_(second_scale).add_(eps)))
    move(weights, weights, updates, c, lr, trust=trust)


def sgd(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    c: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    fused: bool | None,
) -> None:
    """One step of SGD-LAWN with heavy-ball momentum, in place on the weights and their momentum buffers."""
    compiled = native.library(fused, weights, grads, buffers)
    if compiled is not None:
        lists = (native.pointers(tensors) for tensors in (weights, grads, buffers))
        compiled.sgd(len(weights), *lists, native.sizes(weights), float(c), float(lr), momentum)
        return
    for b, g in zip(buffers, projected(weights, grads), strict=True):
        b.mul_(momentum).add_(g.to(b.dtype))
    move(weights, weights, buffers, c, lr)


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
    along = wr / ww
    tangent = (rr - along * wr).clamp(min=0)
    rate = torch.where(tangent > 0, lr * c / tangent.sqrt(), lr) if trust else lr
    scale = c / (ww + rate * rate * tangent).sqrt()
    keep, take = scale * (1 + rate * along), scale * rate
    for weight, w, r in zip(weights, ws, rs, strict=True):
        weight.copy_(torch.addcmul(w * keep.to(w.dtype), r, take.to(w.dtype), value=-1))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return _sum([x * y for x, y in zip(a, b, strict=True)])


def _sum(tensors: list[Tensor]) -> Tensor:
    precision = torch.float64 if tensors[0].device.type == "cpu" else tensors[0].dtype
    sums = [t.sum(dtype=precision) for t in tensors]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
