"""The processes of one run, and their collective operations."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lawn.config import Config
from lawn.errors import ConfigError
from lawn.train.torch_errors import translate_torch_errors

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process (rank) of the `size` processes of a run, on its device. With size 1 nothing communicates."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine

    @property
    def is_main(self) -> bool:
        """Whether this process reads and writes the run directory and talks to the user."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """The value of the main rank, on every rank; the values of the others are ignored."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce_max(self, *values: int) -> list[int]:
        """The element-wise maximum over the ranks. The hosts wait for each other, not for a device."""
        largest = torch.tensor(values)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first rank of each machine runs the body, then the others: they find what it has downloaded."""
        if self.local_rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            dist.barrier()

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks. Each rank keeps its own buffers, see `average_buffers`."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        known = signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        buffers: dict[str, Any] = {name: False}
        return DistributedDataParallel(model, device_ids=devices, **buffers)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in the order of the ranks; their numbers may differ."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.long, device=rows.device)
        counts[self.rank] = len(rows)
        sizes = self.all_reduce_sum(counts).tolist()
        mine = rows.new_zeros(max(sizes), *rows.shape[1:])
        mine[: len(rows)] = rows
        gathered = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(gathered, mine)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def average_buffers(self, model: nn.Module) -> None:
        """Replace floating-point buffers (batch norm statistics) by their means over the ranks."""
        for buffer in model.buffers() if self.size > 1 else ():
            if buffer.is_floating_point():
                self.all_reduce_sum(buffer).div_(self.size)


def sync_gradients(network: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """In the body, the passes of one micro-batch: DDP averages the gradients with the last one of an update."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()


def launched_by_torchrun() -> bool:
    """Whether all variables that torchrun sets are present: another program may have left some of them."""
    return {"TORCHELASTIC_RUN_ID", *_RANK_VARIABLES} <= set(os.environ)


_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def init_from_torchrun(config: Config) -> Iterator[World]:
    """Join the process group as the rank that torchrun has assigned."""
    rank, size, local, local_size = (int(os.environ[name]) for name in _RANK_VARIABLES)
    if config.train.devices not in (None, size):
        raise ConfigError(f"train.devices={config.train.devices}: torchrun has started {size} ranks; leave it out")
    if size > config.train.batch_size:
        raise ConfigError(f"train.batch_size={config.train.batch_size}: must be at least the {size} ranks of torchrun")
    with _process_group(World(local_device(config.device, local, local_size), rank, size, local), "env://") as world:
        yield world


@contextmanager
def init_on_one_machine(device: str, rank: int, size: int, store: str) -> Iterator[World]:
    """Join a process group of `size` ranks on this machine, through the file `store`."""
    with _process_group(World(local_device(device, rank, size), rank, size, rank), f"file://{store}") as world:
        yield world


@contextmanager
def _process_group(world: World, where: str) -> Iterator[World]:
    set_device(world.device)
    with translate_torch_errors(world.rank):
        if not dist.is_initialized():  # the runs of a multirun under torchrun share one group
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=where, rank=world.rank, world_size=world.size)
        yield world
    if not launched_by_torchrun():  # after an error neither: destroying the group could wait for a dead rank
        dist.destroy_process_group()


def set_device(device: torch.device) -> None:
    """Make a GPU the current device of this process."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def local_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device of a rank: its own GPU, or a share of the CPU. Raises ConfigError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # mps has no float64, which losses are added up in
            raise RuntimeError("training is for CPUs and CUDA's GPUs")
        if local_size == 1:  # the launcher of several ranks must not occupy the GPU of the first
            torch.Generator(device)
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name}: cannot be used ({reason}); choose auto, cpu, cuda or cuda:N") from error
    if local_size == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"device={name}: {local_size} ranks cannot share it; choose auto, cpu or cuda")
    if device.type == "cpu":
        return device
    if local_size > torch.cuda.device_count():
        raise ConfigError(f"train.devices={local_size}: this machine has {torch.cuda.device_count()} GPUs")
    return torch.device(device.type, local_rank)
