"""Time one step of each optimizer: python -m scripts.bench_optim [--rounds 30]

On the parameters of VGG-19, and on 3,000 weights of 8 x 8, where what counts is how many operations there are.

The optimizers take turns, a step each in every round, so a drift of the machine's speed reaches all of them. Prints
the median time, the median of the ratios to torch's fused Adam in the same round, and the share of the memory's
bandwidth that the bytes make which a step has to read and write; writes the same with hardware and versions to
results/bench/optim-DEVICE.json and .md. Optimizers from packages that are not installed are left out.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

from lawn import LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.models.vgg import VGG19
from scripts import bench

Params = list[Parameter]


def vgg19() -> Params:
    """20.0 M parameters."""
    return list(VGG19((3, 32, 32), 10, batch_norm=True).parameters())


def many_small() -> Params:
    return [Parameter(torch.randn(8, 8)) for _ in range(3000)]


MODELS: dict[str, Callable[[], Params]] = {"VGG-19": vgg19, "3,000 weights of 8 x 8": many_small}


def parameters(model: str, device: torch.device) -> Params:
    """A model's parameters with gradients."""
    torch.manual_seed(0)
    params = [Parameter(p.detach().to(device)) for p in MODELS[model]()]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def lawn_adam(params: Params) -> Optimizer:
    base = Adam(params, fused=True)
    LAWN(base, free_steps=0)
    return base


def adamp(params: Params) -> Optimizer:
    return import_module("adamp").AdamP(params)


def riemannian(params: Params) -> Optimizer:
    geoopt = import_module("geoopt")
    sphere = geoopt.Scaled(geoopt.Sphere(), 1.0, learnable=False)
    points = []
    for p in params:
        if p.ndim >= 2:
            point = geoopt.ManifoldParameter(p.detach().flatten() / p.detach().norm(), manifold=sphere)
            point.grad = p.grad.flatten() if p.grad is not None else None
            points.append(point)
        else:
            points.append(p)
    return geoopt.optim.RiemannianAdam(points)


def lamb(params: Params) -> Optimizer:
    return import_module("timm.optim").Lamb(params)


FUSED, FOREACH = "torch Adam, fused", "torch Adam, foreach"
CANDIDATES: dict[str, Callable[[Params], Optimizer]] = {
    FUSED: lambda params: Adam(params, fused=True),
    FOREACH: lambda params: Adam(params, foreach=True),
    "torch Adam, single": lambda params: Adam(params, foreach=False),
    "AdamLAWN": lambda params: AdamLAWN(params, free_steps=0),
    "AdamLAWN, fused=False": lambda params: AdamLAWN(params, free_steps=0, fused=False),
    "LAWN(torch Adam, fused)": lawn_adam,
    "LAMBLAWN": lambda params: LAMBLAWN(params, free_steps=0),
    "SGDLAWN": lambda params: SGDLAWN(params, free_steps=0),
    "timm Lamb": lamb,
    "adamp": adamp,
    "geoopt RiemannianAdam": riemannian,
}


def bytes_moved(optimizer: Optimizer) -> int:
    """Bytes that a step reads and writes at least: gradients in, weights and state in and out."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = sum(t.nbytes for kept in optimizer.state.values() for t in kept.values() if isinstance(t, Tensor))
    return sum(2 * p.nbytes + p.grad.nbytes for p in params) + 2 * state


def make(model: str, device: torch.device) -> dict[str, Optimizer]:
    made = {}
    for name, candidate in CANDIDATES.items():
        try:
            made[name] = candidate(parameters(model, device))
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return made


def summary(
    optimizer: Optimizer, taken: list[float], fused: list[float], foreach: list[float], bandwidths: list[float]
) -> bench.Row:
    count = bytes_moved(optimizer)
    return {
        "milliseconds": round(1e3 * statistics.median(taken), 2),
        "ratio": round(bench.median_ratio(taken, fused), 2),
        "foreach_ratio": round(bench.median_ratio(taken, foreach), 2),
        "bytes": count,
        "peak_share": round(bench.median_ratio([count / s for s in taken], bandwidths), 3),
    }


COLUMNS: bench.Columns = {
    "ms": lambda row: f"{row['milliseconds']:.2f}",
    "x fused Adam": lambda row: f"{row['ratio']:.2f}",
    "x foreach Adam": lambda row: f"{row['foreach_ratio']:.2f}",
    "share of the memory's bandwidth": lambda row: bench.percent(row["peak_share"]),
}


def measure(model: str, device: torch.device, rounds: int) -> tuple[dict[str, bench.Row], float]:
    """A row for each optimizer, and bytes per second of the memory."""
    optimizers = make(model, device)
    steps = {name: partial(bench.seconds, optimizer.step, device) for name, optimizer in optimizers.items()}
    found = bench.interleave({**steps, "memory": lambda: bench.memory_rate(device, in_place=True)}, rounds, warm_up=3)
    rates = found.pop("memory")
    rows = {
        name: summary(optimizer, found[name], found[FUSED], found[FOREACH], rates)
        for name, optimizer in optimizers.items()
    }
    return rows, statistics.median(rates)


def main() -> int:
    given = bench.parser(__doc__, rounds=30).parse_args()
    device = torch.device(given.device)
    measured = {model: measure(model, device, given.rounds) for model in MODELS}
    remarks = (
        "LAWN's optimizers are in their constrained phase. The share is that of the bytes which a step has to read and "
        "write (gradients in, weights and state in and out), in a second, of the "
        f"{measured['VGG-19'][1] / 1e9:.1f} GB/s at which this machine changes large tensors in place."
    )
    tables = [f"**{model}**\n\n{bench.table('optimizer', COLUMNS, rows)}" for model, (rows, _) in measured.items()]
    title = f"One step: median of {given.rounds}, and median ratios to torch's Adam in the same round"
    rows = {f"{model}: {name}": row for model, (rows, _) in measured.items() for name, row in rows.items()}
    bench.write("optim", given, title, "\n\n".join([remarks, *tables]), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
