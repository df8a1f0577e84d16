"""Geometry of the spheres {w : ||w|| = c} that LAWN trains on. One sphere per weight tensor.

A norm c is a 0-dim tensor of at least single precision, whatever the dtype of its weight: rounded to bfloat16 it
would be off by up to 0.4 %. What is computed here is computed in the precision of the norm.
"""

import torch
from torch import Tensor


def norm(weight: Tensor) -> Tensor:
    """Frobenius norm of `weight` in float32 (float64 for float64)."""
    return torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def project(vectors: list[Tensor], weights: list[Tensor], norms: list[Tensor]) -> list[Tensor]:
    """Tangent component of each vector at its weight: v - w (w.v) / c^2 (paper section 3, equation 3).

    Returns new tensors with the shapes of the weights and the dtype of the norms.
    """
    tangents = []
    for vector, weight, c in zip(vectors, weights, norms, strict=True):
        v, w = vector.to(c.dtype), weight.to(c.dtype)
        tangents.append(torch.addcmul(v, w, (w * v).sum() / c.square(), value=-1))
    return tangents


def move_(weights: list[Tensor], updates: list[Tensor], lr: float | Tensor, norms: list[Tensor]) -> None:
    """w <- w - lr r, put back on its sphere, in place (Algorithm 1, lines 10 and 11).

    Rounded once, at the end: in bfloat16 a factor near one, applied to a rounded weight, would round back to it.
    """
    for w, r, c in zip(weights, updates, norms, strict=True):
        moved = w.to(c.dtype) - lr * r
        w.copy_(moved.mul_(c / norm(moved)))
