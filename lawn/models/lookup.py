"""Looking up rows of the tables of several runs."""

import torch
from torch import Tensor

from lawn.optim.dispatch import is_for_triton, triton_problem


def look_up(tables: Tensor, ids: Tensor) -> Tensor:
    """Index the rows of tables [R, N, D] by ids [R, B] in each table: [R, B, D]."""
    count, size, _ = tables.shape
    offsets = size * torch.arange(count, device=ids.device)[:, None]
    rows = tables.flatten(0, 1).index_select(0, (ids + offsets).flatten())
    return rows.view(*ids.shape, -1)


def relu_of_sum(first: Tensor, second: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Compute relu(first[r, i[r, b]] + second[r, j[r, b]]) for each run r and sample b.

    On a GPU this is one Triton kernel, and another adds the gradients of both tables. The order of their sums varies,
    so deterministic algorithms exclude them.

    Args:
        first: tables [R, N, D].
        second: tables [R, M, D].
        i: rows of the first [R, B].
        j: rows of the second [R, B].

    Returns:
        Hidden units [R, B, D].
    """
    fits = is_for_triton(first) and not torch.are_deterministic_algorithms_enabled()
    if fits and not triton_problem(first.device):
        from lawn.models.lookup_kernels import ReluOfSum

        return ReluOfSum.apply(first, second, i, j)
    return (look_up(first, i) + look_up(second, j)).relu_()
