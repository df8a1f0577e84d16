"""Sharded parameters (FSDP2, HSDP, tensor parallelism) against plain tensors in one process."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lawn import LAMB, LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.optim import param_groups
from tests.optim.helpers import fixed_norms

FREE_STEPS, STEPS = 10, 20
Params = Any


def lawn_on_adamw(params: Params, **keys: Any) -> Optimizer:
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)
    LAWN(optimizer, free_steps=FREE_STEPS, **keys)
    return optimizer


KINDS: dict[str, Callable[..., Optimizer]] = {
    "AdamLAWN": lambda params, **keys: AdamLAWN(params, lr=0.01, free_steps=FREE_STEPS, **keys),
    "SGDLAWN": lambda params, **keys: SGDLAWN(params, lr=0.01, free_steps=FREE_STEPS, **keys),
    "LAMBLAWN": lambda params, **keys: LAMBLAWN(params, lr=0.01, free_steps=FREE_STEPS, **keys),
    "LAWN(AdamW)": lawn_on_adamw,
    "AdamLAWN, fused=False": lambda params: AdamLAWN(params, lr=0.01, free_steps=FREE_STEPS, fused=False),
    "LAWN(AdamW), fused=False": lambda params: lawn_on_adamw(params, fused=False),
}


class Model(nn.Sequential):
    """Five rows are uneven on two ranks and three; a single row leaves a rank an empty shard."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 4), nn.LayerNorm(4)
        super().__init__(*layers)
        self.to(torch.float64)


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, 12, 6, generator=generator, dtype=torch.float64)
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def train(model: nn.Module, optimizer: Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def whole(p: Tensor) -> Tensor:
    """A parameter's value, gathered where it is sharded."""
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p.clone()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [whole(p) for p in model.parameters()]


def error(model: nn.Module, plain: nn.Module) -> float:
    pairs = zip(weights_of(model), weights_of(plain), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


# How a model is sharded


def mesh(*shape: int, names: tuple[str, ...] = ("replicate", "shard")) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])


def fsdp(model: Model) -> Model:
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh(dist.get_world_size()))
    return fully_shard(model, mesh=mesh(dist.get_world_size()))


def hsdp(model: Model) -> Model:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh(2, 2))
    return fully_shard(model, mesh=mesh(2, 2))


def fsdp_and_tp(model: Model) -> Model:
    """Weights are sharded in both mesh dimensions; the bias of the second layer is replicated over tensor parallelism."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    both = mesh(2, 2, names=("data", "model"))
    parallelize_module(model, both["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=both["data"])


def tp(model: Model) -> Model:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    one = mesh(dist.get_world_size(), names=("model",))
    parallelize_module(model, one, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model


def two_meshes(model: Model) -> Model:
    """Two meshes over the same ranks, and plain parameters."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh(dist.get_world_size(), names=("a",)))
    fully_shard(model[2], mesh=mesh(dist.get_world_size(), names=("b",)))
    return model


# What the processes do; every rank returns what its test checks


def counted(model: nn.Module, optimizer: Optimizer, step: int) -> dict[str, int]:
    """The collectives of a step of the optimizer, by name."""
    from torch.distributed.tensor.debug import CommDebugMode

    x, y = batches()[step]
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    with CommDebugMode() as counts:
        optimizer.step()
    return {str(name): count for name, count in counts.get_comm_counts().items()}


def compare(shard: Callable[[Model], nn.Module], kind: str, groups: Callable[..., Any] = nn.Module.parameters) -> Any:
    """Largest error of the weights after the last step, relative error of the norms, and the collectives of two steps."""
    data = batches()
    plain, sharded = Model(), shard(Model())
    single, optimizer = KINDS[kind](groups(plain)), KINDS[kind](groups(sharded))
    train(plain, single, data)
    train(sharded, optimizer, data[: FREE_STEPS - 1])
    free = counted(sharded, optimizer, FREE_STEPS - 1)
    train(sharded, optimizer, data[FREE_STEPS : STEPS - 1])
    constrained = counted(sharded, optimizer, STEPS - 1)
    norms = zip(fixed_norms(optimizer), fixed_norms(single), strict=True)
    return {
        "error": error(sharded, plain),
        "norms": max(abs(ours - theirs) / (theirs or 1) for ours, theirs in norms),
        "norms of this rank": fixed_norms(optimizer),
        "free": free,
        "constrained": constrained,
    }


def run(rank: int, world: int, folder: Path, jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.save({name: job(*arguments) for name, job, arguments in jobs}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def spawn(folder: Path, world: int, jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> list[dict[str, Any]]:
    """What each job returns on each rank; one group for all jobs, as starting it is what takes time."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    mp.start_processes(run, (world, folder, jobs), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def check(results: list[Any], collectives: int = 2, meshes: int = 1) -> None:
    for result in results:
        assert result["error"] < 1e-12, result
        assert result["norms"] < 1e-12, result
        assert sum(result["constrained"].values()) <= collectives * meshes, result
        assert result["norms of this rank"] == results[0]["norms of this rank"]
