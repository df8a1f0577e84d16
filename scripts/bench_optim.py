"""Time one step of each optimizer on the parameters of VGG-19: python -m scripts.bench_optim [--rounds 30]

The optimizers take turns, a step each in every round, so a drift of the machine's speed reaches all of them. Prints
the median time and the median of the ratios to torch's fused Adam in the same round; writes the same with hardware
and versions to results/bench/optim-DEVICE.json and .md. Optimizers from packages that are not installed are left out.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib import import_module

import torch
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

from lawn import LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.models.vgg import VGG19
from scripts import bench

Params = list[Parameter]


def parameters(device: torch.device) -> Params:
    """VGG-19's 20.0 M parameters with gradients."""
    torch.manual_seed(0)
    params = list(VGG19((3, 32, 32), 10, batch_norm=True).to(device).parameters())
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def wrapped(params: Params) -> Optimizer:
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


CANDIDATES: dict[str, Callable[[Params], Optimizer]] = {
    "torch Adam, fused": lambda params: Adam(params, fused=True),
    "torch Adam, foreach": lambda params: Adam(params, foreach=True),
    "torch Adam, single": lambda params: Adam(params, foreach=False),
    "AdamLAWN": lambda params: AdamLAWN(params, free_steps=0),
    "AdamLAWN, fused=False": lambda params: AdamLAWN(params, free_steps=0, fused=False),
    "LAWN(torch Adam, fused)": wrapped,
    "LAMBLAWN": lambda params: LAMBLAWN(params, free_steps=0),
    "SGDLAWN": lambda params: SGDLAWN(params, free_steps=0),
    "timm Lamb": lamb,
    "adamp": adamp,
    "geoopt RiemannianAdam": riemannian,
}


def steps(optimizers: dict[str, Optimizer], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each optimizer's step in every round, after three rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for count in range(rounds + 3):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if count >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def make(names: Iterable[str], device: torch.device) -> dict[str, Optimizer]:
    made = {}
    for name in names:
        try:
            made[name] = CANDIDATES[name](parameters(device))
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return made


def main() -> int:
    given = bench.parser(__doc__, rounds=30).parse_args()
    device = torch.device(given.device)
    seconds = steps(make(CANDIDATES, device), device, given.rounds)
    reference = seconds["torch Adam, fused"]
    rows = {
        name: {
            "milliseconds": round(1e3 * statistics.median(measured), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(measured, reference, strict=True)), 2),
        }
        for name, measured in seconds.items()
    }
    title = (
        f"One step on VGG-19's parameters: median of {given.rounds}, and median ratio to fused Adam in the same round"
    )
    lines = [[name, f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}"] for name, row in rows.items()]
    table = bench.table(["optimizer", "ms", "x fused Adam"], lines)
    bench.write("optim", given, title, f"LAWN's optimizers are in their constrained phase.\n\n{table}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
