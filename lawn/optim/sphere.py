"""Geometry of the spheres {w : ||w|| = c} that LAWN trains on. One sphere per weight tensor.

Norms are kept in at least single precision whatever the dtype of the weights: a target rounded to
bfloat16 would be off by up to 0.4 %.
"""

import torch
from torch import Tensor


def norm(weight: Tensor) -> Tensor:
    """Frobenius norm of `weight`, accumulated in float32 (float64 for float64), as a 0-dim tensor."""
    return torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def project(vectors: list[Tensor], weights: list[Tensor], norms: list[Tensor]) -> list[Tensor]:
    """Tangent component of each vector at its weight: v - w (w.v) / c^2 (paper section 3, equation 3).

    Each vector has the shape of its weight; returns new tensors.
    """
    along = [(w * v).sum(dtype=c.dtype) / c.square() for v, w, c in zip(vectors, weights, norms, strict=True)]
    return [torch.addcmul(v, w, a.to(w.dtype), value=-1) for v, w, a in zip(vectors, weights, along, strict=True)]


def rescale_(weights: list[Tensor], norms: list[Tensor]) -> None:
    """Put each weight back on its sphere, in place (Algorithm 1, line 11)."""
    for w, c in zip(weights, norms, strict=True):
        w.mul_((c / norm(w)).to(w.dtype))
