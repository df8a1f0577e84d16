"""How a run uses its device: number format, memory format, compilation. Defaults depend on device and model."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lawn.config import TrainConfig
from lawn.optim import LAWNOptimizer, dispatch
from lawn.output import echo

WORTH_COMPILING = 1000  # updates: fewer may not make up for the time of compiling


@contextmanager
def settings_of_a_new_process() -> Iterator[None]:
    """In the body, torch has the settings of a new process, afterwards those of the caller again."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as contexts, torch.inference_mode(False), torch.enable_grad():
            if device.type != "cpu":  # this context would slow every call of torch
                contexts.enter_context(torch.device("cpu"))
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                contexts.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn


@dataclass(frozen=True)
class Execution:
    """The settings in effect; env.json records them."""

    precision: str  # fp32; tf32: inputs of matrix products have 10 bits; bf16: autocast
    channels_last: bool  # the fastest memory format for convolutions
    compile: str  # off; default: fused kernels; reduce-overhead: CUDA graphs too
    deterministic: bool  # the same bits again, on the same machine
    adaptive_threads: bool = False  # on a CPU: fewer threads where other processes need cores

    @classmethod
    def choose(cls, train: TrainConfig, model: nn.Module, device: torch.device, updates: int) -> "Execution":
        """On a GPU, arithmetic and memory bound convolutional networks; launching kernels bounds the others.

        A recommender's products are short, so it computes in fp32 and rounds as on a CPU.
        """
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        recommender = any(isinstance(module, nn.Embedding) for module in model.modules())
        precision, compiled = "fp32", "off"
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            if bf16 and not recommender:
                precision = "bf16" if convolutional else "tf32"
            if updates >= WORTH_COMPILING and not train.sync_batchnorm and not train.deterministic:
                compiled = "default" if convolutional or train.micro_batch_size else "reduce-overhead"
        return cls(
            train.precision or precision,
            convolutional if train.channels_last is None else train.channels_last,
            train.compile or compiled,
            bool(train.deterministic),
            device.type == "cpu" and recommender and not train.deterministic,
        )

    def prepare(self, model: nn.Module, device: torch.device) -> None:
        """Apply the settings of the process, and the memory format to the weights."""
        torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:  # setting it imports torch's compiler
            torch.use_deterministic_algorithms(self.deterministic)
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
            torch.backends.cudnn.benchmark = not self.deterministic
            if self.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        else:
            _keep_freed_memory()
        if self.channels_last:
            model.to(memory_format=torch.channels_last)

    def compiled(self, model: nn.Module) -> nn.Module:
        """The compiled model; it shares the weights of `model`."""
        if self.compile == "off":
            return model
        # Batches have few sizes: a graph for each is faster than a dynamic one.
        mode = None if self.compile == "default" else self.compile
        return cast(nn.Module, torch.compile(model, mode=mode, dynamic=False))

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def to_memory_format(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The batch with images in the memory format of the weights."""
        if not self.channels_last:
            return batch
        return tuple(t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in batch)


def constrained_step(optimizer: Optimizer) -> dict[str, str]:
    """For env.json: the backend of constrained steps, empty for optimizers without them.

    Warns if kernels cannot be compiled: steps are then slower and round differently.
    """
    if not isinstance(optimizer, LAWNOptimizer):
        return {}
    group = optimizer.param_groups[0]
    backend, problem = dispatch.backend_of(group["params"][0], group["fused"])
    if problem:
        echo(f"warning: constrained steps are not compiled, so they are slower and round differently: {problem}")
    return {"constrained_step": backend}


def _keep_freed_memory() -> None:
    """Keep glibc from returning freed blocks to the system, so that steps do not touch new pages.

    Other C libraries are not changed.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
