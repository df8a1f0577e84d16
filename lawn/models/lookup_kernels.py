"""Triton kernels of `lawn.models.lookup.relu_of_sum` and of its gradients.

Looking up, adding and clipping rows are separate passes over [R, B, D] in torch, and one here.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 16  # samples of a program


@triton.jit
def _locate(i, j, samples, rows_first, rows_second, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the elements of a program's samples in the first table, the second and the result, and which exist."""
    run = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    there = sample < samples
    first = run * rows_first + tl.load(i + run * samples + sample, there, 0)
    second = run * rows_second + tl.load(j + run * samples + sample, there, 0)
    result = run * samples + sample
    mask = there[:, None] & (column < D)
    return first[:, None] * D + column, second[:, None] * D + column, result[:, None] * D + column, mask


@triton.jit
def _forward(
    first, second, i, j, result, samples, rows_first, rows_second, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    at_first, at_second, at, mask = _locate(i, j, samples, rows_first, rows_second, D, ROWS, COLUMNS)
    x = tl.load(first + at_first, mask, 0.0) + tl.load(second + at_second, mask, 0.0)
    tl.store(result + at, tl.where(x < 0, 0.0, x), mask)  # keeps NaN


@triton.jit
def _backward(
    gradient, result, i, j, of_first, of_second, samples, rows_first, rows_second, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at_first, at_second, at, mask = _locate(i, j, samples, rows_first, rows_second, D, ROWS, COLUMNS)
    g = tl.load(gradient + at, mask, 0.0)
    g = tl.where(tl.load(result + at, mask, 0.0) <= 0, 0.0, g)
    tl.atomic_add(of_first + at_first, g, mask, sem="relaxed")
    tl.atomic_add(of_second + at_second, g, mask, sem="relaxed")


class ReluOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, i: Tensor, j: Tensor) -> Tensor:
        runs, samples = i.shape
        i, j = i.contiguous(), j.contiguous()
        result = first.new_empty(runs, samples, first.shape[2])
        _launch(_forward, (first.contiguous(), second.contiguous(), i, j, result), first.shape, second.shape, samples)
        ctx.save_for_backward(result, i, j)
        ctx.shapes = first.shape, second.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (result, i, j), (first, second) = gradients, ctx.saved_tensors, ctx.shapes
        of_first, of_second = gradient.new_zeros(first), gradient.new_zeros(second)
        tensors = gradient.contiguous(), result, i, j, of_first, of_second
        _launch(_backward, tensors, first, second, i.shape[1])
        return of_first, of_second, None, None


def _launch(kernel: Any, tensors: tuple[Tensor, ...], first: torch.Size, second: torch.Size, samples: int) -> None:
    runs, rows_first, width = first
    grid = triton.cdiv(samples, ROWS), runs
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, samples, rows_first, second[1], width, ROWS=ROWS, COLUMNS=columns)
