"""Norms and inner products of large tensors.

On a CPU, torch adds the squares of float32 numbers in a few float32 accumulators, so the norm of 10 million elements is
off by 4e-4, and that of 40 million by 3e-3. Here it is the norm of the norms of parts, accurate to 1e-5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PART = 1 << 16  # elements


def norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Compute the Frobenius norm of each tensor, in its dtype, each a 0-dim tensor."""
    parts = [_parts(t) for t in tensors]
    if all(len(each) == 1 for each in parts):
        return torch._foreach_norm(tensors)
    found = iter(torch._foreach_norm([part for each in parts for part in each]))
    return [_joint([next(found) for _ in each]) for each in parts]


def norm(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the Frobenius norm of a tensor, in `dtype`; autograd can differentiate it."""
    return _joint([torch.linalg.vector_norm(part, dtype=dtype) for part in _parts(t)])


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product of two tensors of one shape."""
    parts = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(_parts(a), _parts(b), strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _parts(t: Tensor) -> Sequence[Tensor]:
    return [t] if t.numel() <= PART or t.device.type != "cpu" else t.reshape(-1).split(PART)


def _joint(found: list[Tensor]) -> Tensor:
    return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))
