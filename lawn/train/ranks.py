"""The processes of one run: which one this is, and how they meet."""

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
from lawn.train.trouble import explained

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process of `world`, on its device. With world=1 nothing here communicates."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on its machine

    @property
    def main(self) -> bool:
        """Whether this is the one that reads and writes the run directory and talks to the user."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """What the main rank gives, on every rank; the others' values do not matter."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def everyone(self, value: T) -> list[T]:
        """What each rank gives, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def most(self, *values: int) -> list[int]:
        """The largest of the ranks' values, each, on every rank. Hosts wait for each other, not for a device."""
        largest = torch.tensor(values)
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """The first rank of each machine does what is inside, then the others: what it downloads they find."""
        if self.local_rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.local_rank == 0:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are means over the ranks. Buffers are each rank's own, see `average`."""
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        known = signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        buffers: dict[str, Any] = {name: False}
        return DistributedDataParallel(model, device_ids=devices, **buffers)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def joined(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, one rank after the other; each may have a different number of them."""
        if self.world == 1:
            return rows
        counts = torch.zeros(self.world, dtype=torch.long, device=rows.device)
        counts[self.rank] = len(rows)
        sizes = self.total(counts).tolist()
        mine = rows.new_zeros(max(sizes), *rows.shape[1:])
        mine[: len(rows)] = rows
        everyone = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(everyone, mine)
        return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])

    def average(self, model: nn.Module) -> None:
        """Replace buffers, the statistics of batch norm, by their means over the ranks."""
        for buffer in model.buffers() if self.world > 1 else ():
            if buffer.is_floating_point():
                self.total(buffer).div_(self.world)


def accumulating(network: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around the passes of one part of an update: gradients are averaged over the ranks with the last part."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()


def started_by_torchrun() -> bool:
    """Whether all of what torchrun tells a rank is there: some of it may be left over from another program."""
    return {"TORCHELASTIC_RUN_ID", *_OF_A_RANK} <= set(os.environ)


_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def joined_by_torchrun(config: Config) -> Iterator[Ranks]:
    """This process as the rank that torchrun made it."""
    rank, world, local, local_world = (int(os.environ[name]) for name in _OF_A_RANK)
    if config.train.devices not in (None, world):
        raise ConfigError(f"train.devices={config.train.devices}: torchrun has started {world} ranks; leave it out")
    if world > config.train.batch_size:
        raise ConfigError(f"train.batch_size={config.train.batch_size}: must be at least the {world} ranks of torchrun")
    with _joined(Ranks(local_device(config.device, local, local_world), rank, world, local), "env://") as ranks:
        yield ranks


@contextmanager
def joined_on_one_machine(device: str, rank: int, world: int, store: str) -> Iterator[Ranks]:
    """This process as one of `world` that meet at the file `store`."""
    with _joined(Ranks(local_device(device, rank, world), rank, world, rank), f"file://{store}") as ranks:
        yield ranks


@contextmanager
def _joined(ranks: Ranks, where: str) -> Iterator[Ranks]:
    use(ranks.device)
    with explained(ranks.rank):
        if not dist.is_initialized():  # the runs of a multirun under torchrun share one group
            backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=where, rank=ranks.rank, world_size=ranks.world)
        yield ranks
    if not started_by_torchrun():  # nor after an error: leaving the group might wait for a rank that is no more
        dist.destroy_process_group()


def use(device: torch.device) -> None:
    """Make a GPU the one that kernels are launched on where nothing else is said."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def local_device(name: str, local_rank: int = 0, local_world: int = 1) -> torch.device:
    """The device of a rank: of several on one machine each has its own GPU, or a share of the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # mps has no float64, which losses are added up in
            raise RuntimeError("training is for CPUs and CUDA's GPUs")
        if local_world == 1:  # of several, the launcher must not occupy the first one's GPU
            torch.Generator(device)
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name}: cannot be used ({reason}); choose auto, cpu, cuda or cuda:N") from error
    if local_world == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"device={name}: {local_world} ranks cannot share it; choose auto, cpu or cuda")
    if device.type == "cpu":
        return device
    if local_world > torch.cuda.device_count():
        raise ConfigError(f"train.devices={local_world}: this machine has {torch.cuda.device_count()} GPUs")
    return torch.device(device.type, local_rank)
