"""The top eigenvalue of a matrix of which there is only its product with a vector, by Lanczos' method."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def top_eigenvalue(
    operator: Callable[[Tensor], Tensor],
    size: int,
    *,
    steps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> float:
    """The largest (not the largest in size) eigenvalue of a symmetric operator [size] -> [size], by Lanczos' method.

    Each step calls the operator once and keeps one more vector, against all of which the next is orthogonalized. The
    result is never above the eigenvalue but for rounding. It ends when the residual of the eigenvector, which bounds
    the distance to an eigenvalue, is at most `tolerance` times the largest eigenvalue in size that has been seen (the
    error is about the square of that where the top eigenvalue stands apart); with a warning after `steps`. NaN where
    the operator is not finite. The start is random, by `seed`: the same on every device.
    """
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = (start / start.norm()).to(device, dtype or torch.get_default_dtype())
    tolerance = max(tolerance, 4 * torch.finfo(q.dtype).eps)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        basis.append(q)
        w = operator(q)
        diagonal.append((q @ w).item())
        for _ in range(2):  # once is not enough where little is left
            for other in basis:
                w = w - (other @ w) * other
        length = torch.linalg.vector_norm(w).item()
        if not math.isfinite(diagonal[-1]) or not math.isfinite(length):
            return math.nan
        values, vectors = _tridiagonal(diagonal, beside)
        residual = length * abs(vectors[-1, -1].item())
        top = values[-1].item()
        if len(basis) == size or residual <= tolerance * values.abs().amax().item():
            return top
        if len(basis) == steps:
            warnings.warn(f"the eigenvalue {top:g} is only known to {residual:.1g} after {steps} steps", stacklevel=2)
            return top
        beside.append(length)
        q = w / length


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order, [k], and eigenvectors [k, k] of a symmetric tridiagonal matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        matrix += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)  # eigh reads the lower triangle
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
