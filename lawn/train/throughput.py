"""FLOPs of a model, and the peak rate of the device."""

import copy
import time
from functools import lru_cache

import torch
from torch import nn

from lawn.task import Batch, Task


def flops_per_sample(task: Task, model: nn.Module, batch: Batch) -> float:
    """Matrix and convolution FLOPs of forward and backward for one sample, counted without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, if it is installed

    with FlopCounterMode(display=False) as counter:
        loss, _ = task.loss_and_margins(to_meta(model), tuple(t.to("meta") for t in batch))
        loss.backward()
    return counter.get_total_flops() / len(batch[0])


def to_meta(model: nn.Module) -> nn.Module:
    """A copy with shapes and without values; in eval mode, in which batch norm does not talk with other ranks."""
    return copy.deepcopy(model).to("meta").eval()


@lru_cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Matrix multiplication rate of the device, FLOP/s, in that precision: the best of four timed products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024 if dtype == torch.float32 else 256  # few CPUs have units for bf16
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
