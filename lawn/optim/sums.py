"""Norms and inner products of large tensors.

On a CPU, torch adds the squares of float32 numbers in a few float32 accumulators, so the norm of 10 million elements is
off by 4e-4 or, if they are equal, by 3e-3. The norm of the norms of parts is accurate to 1e-5, and `Tensor.sum`, which
adds in pairs, to 1e-6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 1 << 14  # elements


def norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Compute the Frobenius norm of each tensor, a 0-dim tensor, without a copy of contiguous ones."""
    if any(_is_large(t) for t in tensors):
        return [_norm_of_norms(t) if _is_large(t) else torch.linalg.vector_norm(t) for t in tensors]
    return torch._foreach_norm(tensors)


def norm(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the Frobenius norm of a tensor, in `dtype`; autograd can differentiate it twice."""
    if not _is_large(t):
        return torch.linalg.vector_norm(t, dtype=dtype)
    return _real(t.to(dtype or t.dtype)).square().sum().sqrt()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product of two tensors of one shape."""
    return (a * b).sum() if _is_large(a) else torch.dot(a.flatten(), b.flatten())


def _norm_of_norms(t: Tensor) -> Tensor:
    flat = _real(t).reshape(-1)
    whole = flat.numel() - flat.numel() % LARGE
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, LARGE), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return torch.linalg.vector_norm(torch.cat([parts, rest.view(1)]))


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _is_large(t: Tensor) -> bool:
    return t.numel() > LARGE and t.device.type == "cpu"
