"""Norms and inner products of large tensors.

On a CPU, torch adds the squares of float32 numbers in a few float32 accumulators, so the norm of 10 million elements is
off by 4e-4, and that of 40 million by 3e-3. `Tensor.sum` adds in pairs, with an error of about 1e-7.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 1 << 16  # elements


def norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Compute the Frobenius norm of each tensor, a 0-dim tensor."""
    if any(_is_large(t) for t in tensors):
        return [norm(t) for t in tensors]
    return torch._foreach_norm(tensors)


def norm(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the Frobenius norm of a tensor, in `dtype`; autograd can differentiate it twice."""
    if not _is_large(t):
        return torch.linalg.vector_norm(t, dtype=dtype)
    return t.to(dtype or t.dtype).square().sum().sqrt()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product of two tensors of one shape."""
    return (a * b).sum() if _is_large(a) else torch.dot(a.flatten(), b.flatten())


def _is_large(t: Tensor) -> bool:
    return t.numel() > LARGE and t.device.type == "cpu"
