"""Chooses the backend of the constrained updates: Triton kernels, compiled CPU kernels or plain torch operations."""

import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lawn.optim import cpu_kernels, update
from lawn.optim.blocks import Blocks


class Backend(Protocol):
    """The constrained updates of `lawn.optim.update`, for blocks of one device and dtype."""

    def adam(
        self,
        blocks: Blocks,
        corrections: Tensor,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        trust: bool,
    ) -> Tensor | None: ...

    def sgd(self, blocks: Blocks, *, lr: float | Tensor, momentum: float) -> Tensor | None: ...

    def project(self, blocks: Blocks) -> None: ...

    def retract(self, blocks: Blocks) -> Tensor | None: ...

    def products(self, blocks: Blocks) -> Tensor: ...

    def advance(
        self, blocks: Blocks, along: Tensor, scales: Tensor, factors: tuple[float, float, float, float], eps: float
    ) -> Tensor: ...

    def move(self, blocks: Blocks, keep: Tensor, take: Tensor, scales: Tensor, eps: float) -> None: ...

    def tangents(self, blocks: Blocks, along: Tensor) -> None: ...

    def differences(self, blocks: Blocks) -> Tensor: ...

    def combine(self, blocks: Blocks, keep: Tensor, take: Tensor) -> None: ...


def backend(blocks: Blocks, fused: bool | None) -> Backend:
    """Choose the fastest backend that can update these blocks.

    Args:
        blocks: blocks of one device and dtype.
        fused: whether compiled code may be used: None where it is available, True with a warning where it cannot be
            built, False never.

    Returns:
        The module or object whose functions update the blocks.
    """
    unsupported = blocks.streams is not None and blocks.weights[0].dtype == torch.float16
    unsupported = unsupported or not blocks.has_dense_slices()
    if fused is False or unsupported or torch.compiler.is_compiling():
        return update
    return _triton(blocks.lists, warn=bool(fused)) or cpu_kernels.load(blocks.lists, warn=bool(fused)) or update


def backend_of(weight: Tensor, fused: bool | None) -> tuple[str, str]:
    """Name the backend of the constrained updates of a weight.

    Args:
        weight: a constrained weight.
        fused: as for `backend`.

    Returns:
        The name `triton`, `native` (compiled CPU kernels) or `torch`.
        The reason why compiled code that would fit cannot be used, with a remedy; empty otherwise.
    """
    if fused is False:
        return "torch", ""
    if _triton([[weight]]) is not None:
        return "triton", ""
    if cpu_kernels.load([[weight]]) is not None:
        return "native", ""
    if weight.is_cuda:
        return "torch", triton_problem(weight.device)
    return "torch", cpu_kernels.build(weight.dtype)[1] if weight.is_cpu and weight.dtype in cpu_kernels.DTYPES else ""


def is_for_triton(t: Tensor) -> bool:
    """Whether Triton serves the device of a tensor: a GPU, or any in its interpreter."""
    return t.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def triton_problem(device: torch.device) -> str:
    """Why Triton kernels cannot run on a device; empty where they can."""
    try:
        from lawn.optim import triton_probe
    except ImportError:
        return "Triton is not installed"
    return triton_probe.problem(device)


def _triton(lists: Sequence[list[Tensor]], warn: bool = False) -> Backend | None:
    """Return the module `triton_kernels` if it can update all tensors together; `warn` where Triton does not work."""
    like = lists[0][0]
    if not is_for_triton(like):
        return None
    if problem := triton_problem(like.device):
        if warn:
            warnings.warn(f"the fused update falls back to the plain one: {problem}", stacklevel=3)
        return None
    from lawn.optim import triton_kernels

    fits = all(t.device == like.device and t.dtype == like.dtype for tensors in lists for t in tensors)
    return triton_kernels if fits and like.dtype in triton_kernels.DTYPES and cpu_kernels.same_layout(*lists) else None
