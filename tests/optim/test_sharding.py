"""Sharded parameters (FSDP2, HSDP, tensor parallelism) against plain tensors in one process."""

import copy
import itertools
import os
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
from lawn.files import exclusively
from lawn.optim import param_groups, sharding
from tests.optim.helpers import fixed_norms, wrapped

FREE_STEPS, STEPS = 5, 10
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

    def __init__(self, width: int = 5) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1), nn.Tanh(), nn.Linear(1, 4), nn.LayerNorm(4)
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
    """Weights are sharded in both mesh dimensions; the bias of the second layer is sharded in one."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    both = mesh(2, 2, names=("data", "model"))
    whole_output = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, both["model"], {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": whole_output})
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


WIDTHS = {fsdp_and_tp: 6, tp: 6}  # torch splits no matrix products unevenly

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
    """Largest error of the weights, relative error of the norms, and the collectives of a step of each phase."""
    data = batches()
    width = WIDTHS.get(shard, 5)
    plain, sharded = Model(width), shard(Model(width))
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


class Twice(Optimizer):
    """Evaluates its closure at two points of a step, as line searches do."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        for _ in range(2):
            with torch.enable_grad():
                closure()
            with torch.no_grad():
                for p in params:
                    p.add_(p.grad, alpha=-0.01)
                    self.state[p]["used"] = True


def closure_called_twice() -> float:
    models = [Model(), fsdp(Model())]
    for model in models:
        optimizer = Twice(model.parameters())
        LAWN(optimizer, free_steps=2)
        for x, y in batches(5):

            def closure(model=model, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()

            optimizer.step(closure)
    return error(models[1], models[0])


def by_hand() -> dict[str, Any]:
    """constrain() at any time; again after other weights were put in place."""
    results = []
    for model in (Model(), fsdp(Model())):
        optimizer = AdamLAWN(model.parameters(), lr=0.01)
        train(model, optimizer, batches(3))
        optimizer.constrain()
        train(model, optimizer, batches(3))
        with torch.no_grad():
            model[0].weight.mul_(3)
        optimizer.constrain(again=True)
        train(model, optimizer, batches(3))
        results.append((weights_of(model), fixed_norms(optimizer)))
    (weights, norms), (sharded_weights, sharded_norms) = results
    errors = [(ours - theirs).abs().max().item() for ours, theirs in zip(sharded_weights, weights, strict=True)]
    return {"error": max(errors), "norms": norms, "sharded": sharded_norms}


def gradients_that_are_missing(kind: str) -> float:
    """A frozen weight, one that has no gradient in some steps, and an empty shard without one on its own rank."""
    plain, sharded = Model(), fsdp(Model())
    for model in (plain, sharded):
        model[4].weight.requires_grad_(False)
        optimizer = KINDS[kind](model.parameters())
        for step, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if step in (2, FREE_STEPS, FREE_STEPS + 1):
                model[0].weight.grad = model[5].weight.grad = None
            if model is sharded and dist.get_rank() == 1:
                assert model[2].weight.to_local().numel() == 0
                model[2].weight.grad = model[2].bias.grad = None
            optimizer.step()
    return error(sharded, plain)


def gradients_on_one_rank() -> dict[str, Any]:
    """A rank that has no gradient joins, as if its shard had a gradient of zero."""
    plain, sharded = Model(), fsdp(Model())
    rows = sharded[0].weight.to_local().shape[0]
    for model in (plain, sharded):
        optimizer = AdamLAWN(model.parameters(), lr=0.01, free_steps=1)
        for x, y in batches(6):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if model is plain and optimizer.constrained:
                model[0].weight.grad[3:] = 0
            elif optimizer.constrained and dist.get_rank() == 1:
                assert rows == 2
                model[0].weight.grad = None
            optimizer.step()
    return {"error": error(sharded, plain), "norms of this rank": fixed_norms(optimizer)}


def nothing_to_update() -> list[dict[str, int]]:
    """The collectives of constrained steps on no gradients at all."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = fsdp(Model())
    optimizer = AdamLAWN(model.parameters(), free_steps=0)
    with CommDebugMode() as counts:
        optimizer.step()
    return [{str(name): count for name, count in counts.get_comm_counts().items()}, optimizer.param_groups[0]["steps"]]


def first_step_at_zero_rate() -> list[int]:
    """Gradients that are zero, or missing, on one rank only, and a rate of zero: no rank takes it for the step that
    makes state."""
    from torch.distributed.tensor import Shard, distribute_tensor

    steps = []
    for nonzero in (True, False):
        w = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh(2), [Shard(0)]))
        optimizer = AdamLAWN([w], lr=0.0, free_steps=0)
        gradient = torch.zeros(4, 2)
        gradient[0] = nonzero
        w.grad = distribute_tensor(gradient, mesh(2), [Shard(0)])
        optimizer.step()
        steps.append(optimizer.param_groups[0]["steps"])
    optimizer = AdamLAWN([w], lr=0.0, free_steps=2)
    gradients = [distribute_tensor(torch.ones(4, 2), mesh(2), [Shard(0)]) for _ in range(2)]
    for step, given in enumerate(gradients):
        w.grad = given if step or dist.get_rank() == 0 else None  # after the first, one rank has state
        optimizer.step()
    return [*steps, optimizer.param_groups[0]["steps"]]


def gradient_of_another_placement() -> float:
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    torch.manual_seed(0)
    value = torch.randn(3, 2, dtype=torch.float64)
    plain, sharded = nn.Parameter(value.clone()), nn.Parameter(distribute_tensor(value, mesh(2), [Shard(0)]))
    optimizers = [AdamLAWN([p], free_steps=1) for p in (plain, sharded)]
    for _ in range(3):
        parts = torch.randn(2, 3, 2, dtype=torch.float64)
        plain.grad = parts.sum(0)
        sharded.grad = DTensor.from_local(parts[dist.get_rank()], mesh(2), [Partial()])
        for optimizer in optimizers:
            optimizer.step()
    return (whole(sharded) - plain).abs().max().item()


def complex_weights() -> float:
    from torch.distributed.tensor import Shard, distribute_tensor

    errors = []
    for make in KINDS.values():
        torch.manual_seed(0)
        value = torch.randn(3, 2, dtype=torch.complex128)
        plain, sharded = nn.Parameter(value.clone()), nn.Parameter(distribute_tensor(value, mesh(2), [Shard(0)]))
        optimizers = [make([p]) for p in (plain, sharded)]
        for _ in range(FREE_STEPS + 3):
            plain.grad = torch.randn(3, 2, dtype=torch.complex128)
            sharded.grad = distribute_tensor(plain.grad, mesh(2), [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        errors.append((whole(sharded) - plain).abs().max().item())
    return max(errors)


def after_a_huge_gradient(dtype: torch.dtype, scale: float, blocks: list[int]) -> float:
    """Largest relative error of a norm in the updates after it."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def norms_of(tensors: list[Tensor]) -> list[float]:
        """The norm of each block."""
        squares = torch.stack([t.double().square().sum() for t in tensors])
        return torch.zeros(max(blocks) + 1).double().index_add(0, torch.tensor(blocks), squares).sqrt().tolist()

    errors = []
    for make in (SGDLAWN, wrapped(torch.optim.SGD, momentum=0.9)):
        torch.manual_seed(0)
        values = [scale * torch.randn(rows, 8) for rows in (9, 5, 4)]
        params = [nn.Parameter(distribute_tensor(value.to(dtype), mesh(2), [Shard(0)])) for value in values]
        optimizer = make([{"params": params, "blocks": blocks}], lr=0.1 * scale, free_steps=0)
        for size in (1, 1e6, 1, 1, 1):
            for p in params:
                gradient = size / scale**0.75 * torch.randn(p.shape)
                p.grad = distribute_tensor(gradient.to(dtype), mesh(2), [Shard(0)])
            optimizer.step()
            pairs = zip(norms_of([whole(p) for p in params]), norms_of(values), strict=True)
            errors += [abs(ours / theirs - 1) for ours, theirs in pairs]
    return max(errors)


HUGE = {
    "weights": (torch.float32, 1.0, [0, 1, 2]),
    "blocks": (torch.float32, 1.0, [0, 0, 1]),
    "a norm above the largest float16": (torch.float16, 1e4, [0, 1, 2]),
}


def a_weight_of_zero() -> dict[str, Any]:
    """What is raised, whether all numbers are finite then, and the norm after the weight is restored."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def step(w: Tensor, optimizer: Optimizer) -> None:
        w.grad = distribute_tensor(torch.arange(6.0).view(3, 2), mesh(2), [Shard(0)])
        optimizer.step()

    results = {}
    for kind, make in KINDS.items():
        w = nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh(2), [Shard(0)]))
        optimizer = make([w])
        for _ in range(FREE_STEPS + 1):
            step(w, optimizer)
        w.data.mul_(0)
        problem = raised(lambda w=w, optimizer=optimizer: step(w, optimizer))
        tensors = [w, *(t for t in optimizer.state[w].values() if isinstance(t, Tensor))]
        finite = all(bool(whole(t).isfinite().all()) for t in tensors)
        w.data.add_(1)
        step(w, optimizer)
        results[kind] = problem, finite, whole(w).norm().item() / fixed_norms(optimizer)[0]
    return results


def first_numbers() -> list[int]:
    """Of the random numbers of shards: rows, columns, a single number, no rows, and rows of a huge weight."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    cases = [((4, 3), Shard(0)), ((4, 3), Shard(1)), ((), Replicate()), ((0, 3), Shard(0))]
    shards = [distribute_tensor(torch.zeros(shape), mesh(2), [placement]) for shape, placement in cases]
    huge = torch.empty(2**15, 2**16, device="meta")
    shards.append(DTensor.from_local(huge, mesh(2), [Shard(0)], run_check=False))
    return [sharding.first_number(p) for p in shards]


def first_numbers_on_four_ranks() -> dict[str, int]:
    """Of shards of weights [8, 3], [8, 4] and, where tensor parallelism has split the rows first, [8, 6]."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rows, columns, replicated = Shard(0), Shard(1), Replicate()
    cases = {
        "rows": ((8, 3), [rows, rows]),
        "columns": ((8, 4), [columns, columns]),
        "blocks": ((8, 4), [rows, columns]),
        "replicated rows": ((8, 3), [replicated, rows]),
        "replicated columns": ((8, 4), [columns, replicated]),
    }
    four = mesh(2, 2, names=("data", "model"))
    shards = {name: distribute_tensor(torch.zeros(shape), four, placed) for name, (shape, placed) in cases.items()}
    shards["interleaved rows"] = fsdp_and_tp(Model(8))[0].weight
    assert [type(placed).__name__ for placed in shards["interleaved rows"].placements] == ["_StridedShard", "Shard"]
    return {name: sharding.first_number(p) for name, p in shards.items()}


def sums_over_meshes() -> list[float]:
    """The sum of 1 of the first rank and 2 of the second, over meshes of several shapes; the last is not changed."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    own = torch.tensor([[dist.get_rank() + 1.0]])
    ranks = torch.arange(2)
    replicas = mesh(2, 1, 1, names=("replicate", "a", "b"))
    cases = [
        (DeviceMesh("cpu", ranks.view(2, 1)), [Shard(0), Shard(1)]),
        (DeviceMesh("cpu", ranks.view(1, 2)), [Shard(0), Shard(1)]),
        (replicas, [Replicate(), Shard(0), Shard(1)]),
        (DeviceMesh("cpu", ranks[:1]), [Shard(0)]),
    ]
    params = [distribute_tensor(torch.ones(2, 2), *case) for case in cases]
    return [*(sharding.all_reduce([p], own).item() for p in params), own.item()]


def a_shard_that_is_still_on_its_way() -> str:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Shard

    p = DTensor.from_local(AsyncCollectiveTensor(torch.ones(2)), mesh(2), [Shard(0)], run_check=False)
    return type(sharding.local([p])[0]).__name__


def rounded_stochastically() -> list[float]:
    """Shares of entries that are those of a plain weight: rows for each optimizer and phase, then shards of columns."""
    from torch.distributed.tensor import Shard, distribute_tensor

    shares = []
    cases = [(kind, free_steps, 0) for kind in (AdamLAWN, SGDLAWN, LAMBLAWN) for free_steps in (None, 0)]
    for kind, free_steps, dim in (*cases, (AdamLAWN, 0, 1)):
        torch.manual_seed(0)
        value = torch.randn(51, 40, dtype=torch.bfloat16)
        plain, sharded = nn.Parameter(value.clone()), nn.Parameter(distribute_tensor(value, mesh(2), [Shard(dim)]))
        made = [kind([p], lr=1e-3, free_steps=free_steps, rounding="stochastic") for p in (plain, sharded)]
        for _ in range(3):
            plain.grad = torch.randn(51, 40, dtype=torch.bfloat16)
            sharded.grad = distribute_tensor(plain.grad, mesh(2), [Shard(dim)])
            for optimizer in made:
                optimizer.step()
        shares.append((whole(sharded) == plain).double().mean().item())
    return shares


def lamb() -> float:
    models = [Model(), fsdp(Model())]
    for model in models:
        train(model, LAMB(model.parameters(), lr=0.01, weight_decay=0.1), batches(5))
    return error(models[1], models[0])


def a_group_without_gradients() -> float:
    """LAMB's rule sums norms over ranks, also those of a group of which no rank has a gradient."""
    errors = []
    for kind in (LAMB, LAMBLAWN):
        models, unused = [Model(), fsdp(Model())], [Model(), fsdp(Model())]
        for model, idle in zip(models, unused, strict=True):
            train(model, kind([{"params": [*model.parameters()]}, {"params": [*idle.parameters()]}]), batches(5))
        errors += [error(models[1], models[0]), error(unused[1], Model())]
    return max(errors)


def raised(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as caught:
        return repr(caught)
    return "nothing"


def errors() -> dict[str, str]:
    """What each rank is told: the same, though the cause is on one of them."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    def sharded(value: Tensor) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(value, mesh(2), [Shard(0)]))

    def step(optimizer: Optimizer, gradient: Tensor | None = None) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p) if gradient is None else gradient
        optimizer.step()

    def foreign_state(p: nn.Parameter, other: nn.Parameter) -> None:
        optimizers = AdamLAWN([p], free_steps=0), AdamLAWN([other], free_steps=0)
        for optimizer in optimizers:
            step(optimizer)
        optimizers[0].load_state_dict(optimizers[1].state_dict())
        step(optimizers[0])

    def scaled(factor: float, rows: int, value: float = 1 / 3) -> None:
        """With loaded norms that are those of other weights by a factor."""
        w = sharded(torch.full((rows, 2), value))
        old, new = AdamLAWN([w], lr=0.0, free_steps=0), AdamLAWN([w], lr=0.0, free_steps=0)
        step(old)
        new.load_state_dict(copy.deepcopy(old.state_dict()))
        w.data.mul_(factor)
        step(new)

    nan = torch.ones(3, 2)
    nan[0, 0] = torch.nan
    partial = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh(2), [Partial()]))
    replicated = nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh(2), [Replicate()]))
    plain = AdamLAWN([sharded(torch.ones(3, 2))], free_steps=0)
    slices = {"params": [sharded(torch.ones(3, 2))], "norm_axes": 1}
    ones, turned = torch.ones(4, 4), DeviceMesh("cpu", [1, 0])
    rows, columns = (nn.Parameter(distribute_tensor(ones, mesh(2), [Shard(dim)])) for dim in range(2))
    elsewhere = nn.Parameter(distribute_tensor(ones, turned, [Shard(0)]))
    return {
        "zero at the switch": raised(lambda: step(AdamLAWN([sharded(torch.zeros(3, 2))], free_steps=0))),
        "not finite": raised(lambda: step(AdamLAWN([sharded(nan)], free_steps=0))),
        "not finite, by hand": raised(lambda: AdamLAWN([sharded(nan)]).constrain()),
        "partial": raised(lambda: AdamLAWN([partial])),
        "partial, wrapped": raised(lambda: LAWN(torch.optim.SGD([partial], lr=0.1))),
        "replicated": raised(lambda: step(AdamLAWN([replicated], free_steps=0))),
        "plain gradient": raised(lambda: step(plain, torch.ones(3, 2))),
        "gradient of another mesh": raised(lambda: step(AdamLAWN([rows]), distribute_tensor(ones, turned, [Shard(0)]))),
        "plain state": raised(lambda: foreign_state(rows, nn.Parameter(ones))),
        "sharded state": raised(lambda: foreign_state(nn.Parameter(ones), rows)),
        "state of columns": raised(lambda: foreign_state(rows, columns)),
        "state of another mesh": raised(lambda: foreign_state(rows, elsewhere)),
        "slices, LAMB": raised(lambda: step(LAMB([slices]))),
        "slices, free LAMBLAWN": raised(lambda: step(LAMBLAWN([{**slices, "constrain": False}]))),
        "slices, free AdamLAWN": raised(lambda: step(AdamLAWN([{**slices, "constrain": False}]))),
        "scaled": raised(lambda: scaled(0.99, rows=3)),
        "scaled, an empty shard": raised(lambda: scaled(0.99, rows=1)),
        "scaled, of half precision": raised(lambda: scaled(1 + 2**-7, rows=3, value=1.0)),
    }


def with_biases(model: nn.Module) -> Any:
    return param_groups.all_weights(model, include_bias=True)


def two_groups(model: nn.Module) -> Any:
    """Groups with rates of their own share their collectives."""
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.02}, {"params": rest, "constrain": True}]


SAVED = {"free": FREE_STEPS - 3, "constrained": FREE_STEPS + 3}


def save(kind: str, after: int, folder: Path) -> list[float]:
    """Train, save a checkpoint, and return the norms."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = fsdp(Model())
    optimizer = KINDS[kind](model.parameters())
    train(model, optimizer, batches()[:after])
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return fixed_norms(optimizer)


def resume(kind: str, after: int, folder: Path) -> dict[str, Any]:
    """Load a checkpoint of another number of ranks, return its norms, and train to the end."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, plain = fsdp(Model()), Model()
    optimizer = KINDS[kind](model.parameters())
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    loaded = fixed_norms(optimizer)
    train(model, optimizer, batches()[after:])
    train(plain, KINDS[kind](plain.parameters()), batches())
    return {"loaded": loaded, "end": fixed_norms(optimizer), "error": error(model, plain)}


def run(rank: int, world: int, folder: Path, jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.save({name: job(*arguments) for name, job, arguments in jobs}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def spawn(
    folder: Path, world: int, jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]
) -> list[dict[str, Any]]:
    """What each job returns on each rank; one group for all jobs, as starting it is what takes time."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    if world == 1:
        run(0, world, folder, jobs)
    else:
        mp.start_processes(run, (world, folder, jobs), nprocs=world, start_method="forkserver")
    (folder / "done").touch()
    return results_in(folder, world)


def results_in(folder: Path, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def check(results: list[Any], collectives: int = 2, meshes: int = 1) -> None:
    for result in results:
        assert result["error"] < 1e-12, result
        assert result["norms"] < 1e-12, result
        assert sum(result["constrained"].values()) <= collectives * meshes, result
        assert result["norms of this rank"] == results[0]["norms of this rank"]


Job = tuple[str, Callable[..., Any], tuple[Any, ...]]
FOUR = ("AdamLAWN", "SGDLAWN", "LAMBLAWN", "LAWN(AdamW)")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Made once for all workers of pytest-xdist."""
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp().parent / f"two-{run_id}" if run_id else tmp_path_factory.mktemp("two")
    folder.mkdir(exist_ok=True)
    jobs: list[Job] = [(f"fsdp, {kind}", compare, (fsdp, kind)) for kind in KINDS]
    jobs += [(f"with biases, {kind}", compare, (fsdp, kind, with_biases)) for kind in FOUR]
    jobs += [("two groups", compare, (fsdp, "AdamLAWN", two_groups))]
    jobs += [("two meshes", compare, (two_meshes, "AdamLAWN"))]
    jobs += [(f"missing, {kind}", gradients_that_are_missing, (kind,)) for kind in FOUR]
    single = (by_hand, gradients_on_one_rank, nothing_to_update, first_step_at_zero_rate, closure_called_twice)
    single = (*single, gradient_of_another_placement, complex_weights, rounded_stochastically, lamb)
    single = (*single, a_group_without_gradients, a_weight_of_zero, first_numbers, sums_over_meshes)
    single = (*single, a_shard_that_is_still_on_its_way, errors)
    jobs += [(f"huge, {case}", after_a_huge_gradient, arguments) for case, arguments in HUGE.items()]
    jobs += [(job.__name__, job, ()) for job in single]
    for phase, after in SAVED.items():
        jobs += [(f"saved {phase}, {kind}", save, (kind, after, folder / f"{phase} {kind}")) for kind in FOUR]
    with exclusively(folder):
        return folder, results_in(folder, 2) if (folder / "done").exists() else spawn(folder, 2, jobs)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_equals_one_process(two_ranks, kind):
    check([results[f"fsdp, {kind}"] for results in two_ranks[1]])


@pytest.mark.parametrize("kind", FOUR)
def test_blocks_of_weights_and_biases(two_ranks, kind):
    check([results[f"with biases, {kind}"] for results in two_ranks[1]])


def test_groups_share_collectives(two_ranks):
    check([results["two groups"] for results in two_ranks[1]])


def test_two_meshes_and_plain_parameters(two_ranks):
    check([results["two meshes"] for results in two_ranks[1]], meshes=2)


def test_the_free_phase_needs_no_collectives(two_ranks):
    for results in two_ranks[1]:
        for kind in ("AdamLAWN", "SGDLAWN", "LAWN(AdamW)"):
            assert not results[f"fsdp, {kind}"]["free"]
        assert sum(results["fsdp, LAMBLAWN"]["free"].values()) == 1


def test_constrain_by_hand(two_ranks):
    for results in two_ranks[1]:
        assert results["by_hand"]["error"] < 1e-12
        assert results["by_hand"]["sharded"] == pytest.approx(results["by_hand"]["norms"], rel=1e-12)


@pytest.mark.parametrize("kind", FOUR)
def test_missing_gradients(two_ranks, kind):
    for results in two_ranks[1]:
        assert results[f"missing, {kind}"] < 1e-12


def test_a_gradient_on_one_rank_only(two_ranks):
    first, second = (results["gradients_on_one_rank"] for results in two_ranks[1])
    assert first["error"] < 1e-12
    assert first["norms of this rank"] == second["norms of this rank"]


def test_a_step_without_gradients(two_ranks):
    for results in two_ranks[1]:
        collectives, steps = results["nothing_to_update"]
        assert sum(collectives.values()) == 1
        assert steps == 1


def test_a_first_step_at_a_rate_of_zero_is_told_from_the_one_that_makes_state(two_ranks):
    for results in two_ranks[1]:
        assert results["first_step_at_zero_rate"] == [1, 0, 2]


@pytest.mark.parametrize(
    "job", [closure_called_twice, gradient_of_another_placement, complex_weights, lamb, a_group_without_gradients]
)
def test_others_equal_one_process(two_ranks, job):
    for results in two_ranks[1]:
        assert results[job.__name__] < 1e-12


@pytest.mark.parametrize("case", HUGE)
def test_norms_stay_after_a_huge_gradient(two_ranks, case):
    for results in two_ranks[1]:
        assert results[f"huge, {case}"] < (2e-6 if HUGE[case][0] == torch.float32 else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_becomes_zero_is_named(two_ranks, kind):
    """Zeros stay zeros, and moments stay numbers, so that it can be restored."""
    for results in two_ranks[1]:
        problem, finite, norm = results["a_weight_of_zero"][kind]
        assert problem.startswith("ValueError('parameter 0 of param group 0 (shape (3, 2)) is zero")
        assert finite
        assert norm == pytest.approx(1, rel=1e-6)


def test_sums_are_over_the_ranks_that_hold_other_shards(two_ranks):
    assert [results["sums_over_meshes"] for results in two_ranks[1]] == [[3, 3, 1, 1, 1], [3, 3, 2, 2, 2]]


def test_a_shard_is_a_tensor_with_values(two_ranks):
    for results in two_ranks[1]:
        assert results["a_shard_that_is_still_on_its_way"] == "Tensor"


def test_shards_of_rows_are_rounded_with_the_numbers_of_the_whole(two_ranks):
    """Sums in another order change a few roundings; shards of columns draw numbers of their own."""
    for results in two_ranks[1]:
        *rows, columns = results["rounded_stochastically"]
        assert min(rows) > 0.98, rows
        assert columns < 0.9


def test_shards_that_are_no_rows_have_numbers_of_their_own(two_ranks):
    (rows, columns, *others), of_second = (results["first_numbers"] for results in two_ranks[1])
    assert [rows, columns, *others] == [0, 0, 0, 0, 0]
    assert of_second[0] == 2 * 3
    assert of_second[1] >= 2 * 4
    assert of_second[2:] == [0, 0, 0]  # the huge one has 2^32 numbers, of which these are counted from 2^31


def test_errors_are_those_of_all_ranks(two_ranks):
    first, second = (results["errors"] for results in two_ranks[1])
    assert first == second
    assert "its norm is 0.0" in first["zero at the switch"]
    assert first["not finite"] == first["not finite, by hand"]
    assert first["not finite"].startswith("NonFiniteError(")
    for name in ("partial", "partial, wrapped"):
        assert first[name].startswith("TypeError(")
        assert "Partial" in first[name]
    assert first["replicated"] == "nothing"
    for name in ("plain gradient", "gradient of another mesh"):
        assert "has a gradient that is no DTensor of the same device mesh" in first[name]
    for name in ("plain state", "sharded state", "state of columns", "state of another mesh"):
        assert "is not sharded as its state is" in first[name]
    for name in ("slices, LAMB", "slices, free LAMBLAWN"):
        assert "norm_axes is not supported for DTensors" in first[name]
    assert first["slices, free AdamLAWN"] == "nothing"  # it has no use for them
    for name in ("scaled", "scaled, an empty shard"):
        assert "has the norm" in first[name]
    assert first["scaled, of half precision"] == "nothing"


def check_resumed(two_ranks: Any, tmp_path: Path, world: int) -> None:
    folder, saved = two_ranks
    cases = [(phase, kind) for phase in SAVED for kind in FOUR]
    jobs: list[Job] = [
        (f"saved {phase}, {kind}", resume, (kind, SAVED[phase], folder / f"{phase} {kind}")) for phase, kind in cases
    ]
    for results in spawn(tmp_path, world, jobs):
        for name, result in results.items():
            assert result["loaded"] == saved[0][name] == saved[1][name], name
            assert any(result["loaded"]) == ("constrained" in name)
            if "constrained" in name:
                assert result["end"] == result["loaded"], name
            assert result["error"] < 1e-12, (name, result["error"])


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_checkpoints_of_two_ranks(two_ranks, tmp_path, world):
    """The norms are those of the checkpoint, bit for bit; they are not computed again from other shards."""
    check_resumed(two_ranks, tmp_path, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_one_rank_and_three(tmp_path, world):
    shardings = [fsdp, two_meshes, tp]
    jobs: list[Job] = [(f"{shard.__name__}, {kind}", compare, (shard, kind)) for shard in shardings for kind in FOUR]
    jobs += [(f"with biases, {kind}", compare, (tp, kind, with_biases)) for kind in FOUR]
    results = spawn(tmp_path, world, jobs)
    for name in results[0]:
        check([result[name] for result in results], meshes=2 if "two" in name else 1)


@pytest.mark.slow
def test_two_by_two(tmp_path):
    """HSDP does not communicate over replicas; with FSDP and tensor parallelism a collective spans both dimensions."""
    shardings = [hsdp, fsdp_and_tp]
    jobs: list[Job] = [(f"{shard.__name__}, {kind}", compare, (shard, kind)) for shard in shardings for kind in FOUR]
    jobs += [(f"with biases, {kind}", compare, (fsdp_and_tp, kind, with_biases)) for kind in FOUR]
    results = spawn(tmp_path, 4, [*jobs, ("first numbers", first_numbers_on_four_ranks, ())])
    first = [result.pop("first numbers") for result in results]
    of_ranks = {name: [numbers[name] for numbers in first] for name in first[0]}
    assert of_ranks["rows"] == [0, 6, 12, 18]  # those of the whole weight
    assert of_ranks["replicated rows"] == [0, 12, 0, 12]
    for name in ("columns", "blocks", "interleaved rows"):  # numbers of their own: none are used twice
        assert min(b - a for a, b in itertools.pairwise(sorted(of_ranks[name]))) >= 32, of_ranks[name]
    a, b = of_ranks["replicated columns"][::2]
    assert of_ranks["replicated columns"] == [a, a, b, b]
    assert a != b
    for name in results[0]:
        # Weights are on the mesh of both dimensions; LAMB's trust ratios of the last layer are on that of FSDP.
        two = name.startswith(("fsdp_and_tp, LAMBLAWN", "with biases, LAMBLAWN"))
        check([result[name] for result in results], meshes=2 if two else 1)
