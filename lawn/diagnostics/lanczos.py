"""Largest eigenvalue of a symmetric linear operator by the Lanczos method."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lawn.optim import sums


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
    """Compute the largest (algebraic) eigenvalue of a symmetric linear operator.

    The Lanczos method with full reorthogonalization calls the operator once per step and stores one vector per step. Up
    to rounding, the result is a lower bound. Iteration stops when the residual of the eigenvector, which bounds the
    distance to an eigenvalue, is at most `tolerance` times the estimate, or what the `dtype` resolves. If the largest
    eigenvalue is well separated, the relative error is about the square of that. With a large tolerance the iteration
    may stop at the second eigenvalue. The start vector is random and the same on all devices.

    Args:
        operator: maps a vector [size] to its product with the matrix, [size].
        size: size of the vectors.
        steps: maximal number of steps.
        tolerance: tolerance of the residual, relative to the eigenvalue.
        seed: seed of the start vector.
        dtype: dtype of the vectors; None is torch's default dtype.
        device: device of the vectors; None is torch's default device.

    Returns:
        The eigenvalue in the unit of the operator; NaN if the operator returns values that are not finite.

    Warns:
        UserWarning: if the residual exceeds the tolerance after `steps` steps.

    References:
        Golub & Van Loan 2013, Matrix Computations, section 10.1.

    Examples:
        >>> import torch
        >>> from lawn.diagnostics import top_eigenvalue
        >>> diagonal = torch.tensor([1.0, 2.0, -5.0])
        >>> round(top_eigenvalue(lambda v: diagonal * v, 3), 4)
        2.0
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    q = (start / start.norm()).to(device or torch.get_default_device(), dtype or torch.get_default_dtype())
    noise = 4 * torch.finfo(q.dtype).eps  # of the operator, relative to its largest magnitude
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        basis.append(q)
        w = operator(q)
        diagonal.append(sums.dot(q, w).item())
        for _ in range(2):  # once is too inaccurate if the remainder is small
            for other in basis:
                w = w - sums.dot(other, w) * other
        length = sums.norm(w).item()
        if not math.isfinite(diagonal[-1]) or not math.isfinite(length):
            return math.nan
        values, vectors = _tridiagonal_eigh(diagonal, off_diagonal)
        residual = length * abs(vectors[-1, -1].item())
        top = values[-1].item()
        if len(basis) == size or residual <= max(tolerance * abs(top), noise * values.abs().amax().item()):
            return top
        if len(basis) == steps:
            warnings.warn(f"the eigenvalue {top:g} is only known to {residual:.1g} after {steps} steps", stacklevel=2)
            return top
        off_diagonal.append(length)
        q = w / length


def _tridiagonal_eigh(diagonal: list[float], off_diagonal: list[float]) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues [k] in ascending order and eigenvectors [k, k] of a symmetric tridiagonal matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        matrix += torch.diag(torch.tensor(off_diagonal, dtype=torch.float64), -1)  # eigh reads the lower triangle
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
