"""Spherical motion dynamics on the noisy Rayleigh quotient: the runs, and what they leave in the record.

Rates and risks that are compared with what is seen, for gradients that are mostly noise (`rayleigh`): near the smallest
eigenvalue each update turns the weight by theta at random, and pulls it back by 2 h (A - lambda), where
h = E / (2 s sqrt(n - 1)) and E = theta sqrt((1 + a) / (1 - a)): momentum a makes 1 / (1 - a) of a gradient's step, but
spread over updates that are then correlated. So to 1/e of the way it takes flow_time / h updates of a
buffer that is full; t updates from an empty one are worth t - a (1 - a^t) / (1 - a) of these. The excess settles at
(n - 1) s^2 h = E s sqrt(n - 1) / 2. Off its equilibrium, R^2 of the squared norm R comes nearer to what it is there as
exp(-4 lr d t / (1 - a)).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from experiments.spherical_motion.rayleigh import Point, Trajectories, flow_time, noise_gradient
from lawn.diagnostics import equilibrium_angle, equilibrium_norm


@dataclass(frozen=True)
class Equilibrium:
    """The grid of (a); the last half of the updates is measured. The norm starts so many times too large."""

    lr: tuple[float, ...] = (0.03, 0.1, 0.3)
    weight_decay: tuple[float, ...] = (0.003, 0.03, 0.3)
    momentum: tuple[float, ...] = (0.0, 0.5, 0.9)
    start: float = 1.5
    repeats: int = 8
    steps: int = 40_000


@dataclass(frozen=True)
class Correlated:
    """Less and less noise at one point of the grid: gradients that are alike from update to update."""

    noise: tuple[float, ...] = (0.3, 0.1, 0.03)
    momentum: tuple[float, ...] = (0.0, 0.5, 0.9)
    lr: float = 0.3
    weight_decay: float = 0.03
    repeats: int = 8
    steps: int = 10_000


@dataclass(frozen=True)
class Angles:
    """Rate and risk over the angular update of (b), with decay and with fixed norms. The last half gives the risk."""

    angle: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    momentum: tuple[float, ...] = (0.0, 0.5, 0.9)
    lr: float = 0.1  # with decay, which then makes the angle; with fixed norms of 1 the learning rate makes it
    repeats: int = 16
    steps: int = 10_000


@dataclass(frozen=True)
class Drop:
    """The learning rate of (c) and (d) falls at update `at`; curves are means over `bin` updates."""

    momentum: tuple[float, ...] = (0.0, 0.9)
    rate: float = 0.5  # lr / (1 - a)
    weight_decay: float = 0.01
    noise: float = 0.1  # little, so that the risk settles faster than the norm
    factor: float = 0.1
    start: float = 3.0  # norm at the start, in norms of the equilibrium; LAWN's is 1
    repeats: int = 64
    at: int = 1000
    steps: int = 5000
    bin: int = 10

    def scale(self) -> float:
        """Updates in which the square of the squared norm comes to 1/e of the way, after the drop."""
        return 1 / (4 * self.factor * self.rate * self.weight_decay)


@dataclass(frozen=True)
class Settings:
    """All settings that affect the result: their hash names the record."""

    name: str = "smd_rayleigh"
    seed: int = 0
    dimension: int = 32
    noise: float = 0.3
    equilibrium: Equilibrium = Equilibrium()
    correlated: Correlated = Correlated()
    angles: Angles = Angles()
    drop: Drop = Drop()


FULL = Settings()
SHORT = replace(  # seconds
    FULL,
    dimension=16,
    equilibrium=Equilibrium(lr=(0.1, 0.3), weight_decay=(0.03, 0.3), momentum=(0.0, 0.9), repeats=4, steps=1200),
    correlated=Correlated(noise=(0.3, 0.03), momentum=(0.0, 0.9), repeats=4, steps=1000),
    angles=Angles(angle=(0.05, 0.1, 0.2), momentum=(0.0, 0.9), repeats=4, steps=800),
    drop=Drop(momentum=(0.0,), weight_decay=0.04, repeats=16, at=300, steps=1500),
)


def run(settings: Settings) -> dict[str, Any]:
    """The numbers of every part, one for each repeat wherever they are compared."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    part = settings.equilibrium
    grid = [Point(lr, a, settings.noise, d) for lr, d, a in product(part.lr, part.weight_decay, part.momentum)]
    less = settings.correlated
    rest = [Point(less.lr, a, noise, less.weight_decay) for noise, a in product(less.noise, less.momentum)]
    result: dict[str, Any] = {
        "equilibrium": at_equilibrium(grid, part.start, part.repeats, part.steps, settings.dimension, generator),
        "correlated": at_equilibrium(rest, 1.0, less.repeats, less.steps, settings.dimension, generator),
        "angles": [row for lawn in (False, True) for row in over_angles(settings, lawn, generator)],
        "drop": [row for lawn in (False, True) for row in after_drop(settings, lawn, generator)],
    }
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def at_equilibrium(
    points: Sequence[Point], start: float, repeats: int, steps: int, dimension: int, generator: torch.Generator
) -> list[dict[str, Any]]:
    """For each point and repeat, over the last half: root mean square of angle and norm, means of the others;
    `turn` is the angle whose cosine is E w.w+ / E w.w, which is what the theory is of."""
    trajectories = Trajectories(
        points, [start * _norm(point, dimension) for point in points], repeats, dimension, generator
    )
    names = ("angle", "norm", "turn", "unit_gradient", "carried", "excess")
    sums = torch.zeros(len(names), len(trajectories.weights), dtype=torch.float64)
    for step in range(steps):
        measured = step >= steps // 2
        seen = trajectories.step(carried=measured)
        if measured:
            measures = (seen.angle**2, seen.square, seen.inner, seen.unit_gradient, seen.carried, seen.excess)
            sums += torch.stack(measures)
    means = sums / (steps - steps // 2)
    means[2] = torch.acos(means[2] / means[1])
    means[:2] = means[:2].sqrt()
    split = means.view(len(names), len(points), repeats)
    return [
        {**asdict(point), **{name: short(values[i]) for name, values in zip(names, split, strict=True)}}
        for i, point in enumerate(points)
    ]


def over_angles(settings: Settings, lawn: bool, generator: torch.Generator) -> list[dict[str, Any]]:
    """For each momentum and angle: the angle measured, the limiting excess, and the updates until 1/e of the way is
    left; none where a repeat has not come as far, or where the excess ends above half of its start."""
    part, n = settings.angles, settings.dimension
    points = [_with_angle(theta, a, settings, lawn) for a, theta in product(part.momentum, part.angle)]
    norms = [1.0 if lawn else _norm(point, n) for point in points]
    trajectories = Trajectories(points, norms, part.repeats, n, generator, lawn)
    squares = torch.zeros(len(trajectories.weights), dtype=torch.float64)
    risks = torch.empty(part.steps, len(trajectories.weights), dtype=torch.float64)
    for step in range(part.steps):
        seen = trajectories.step()
        risks[step] = seen.excess
        if step >= part.steps // 2:
            squares += seen.angle**2
    angles = (squares / (part.steps - part.steps // 2)).sqrt().view(-1, part.repeats)
    limits = risks[part.steps // 2 :].mean(0).view(-1, part.repeats)
    rows = []
    for i, point in enumerate(points):
        own = risks[:, i * part.repeats : (i + 1) * part.repeats]
        limit, first = limits[i].mean(), own[0].mean()
        there = own <= limit + (first - limit) / math.e
        updates = there.int().argmax(0).tolist() if limit < first / 2 and bool(there.any(0).all()) else None
        rows.append(
            {"lawn": lawn, **asdict(point), "angle": short(angles[i]), "excess": short(limits[i]), "updates": updates}
        )
    return rows


def after_drop(settings: Settings, lawn: bool, generator: torch.Generator) -> list[dict[str, Any]]:
    """For each momentum: curves of angle and excess, mean and standard error over the repeats, and their means in three
    windows. With fixed norms also how far any angle was from lr ||r|| / c, and from the arctangent of that."""
    part, n = settings.drop, settings.dimension
    rows = []
    for a in part.momentum:
        point = Point(part.rate * (1 - a), a, part.noise, 0.0 if lawn else part.weight_decay)
        norm = _norm(replace(point, weight_decay=part.weight_decay), n)
        trajectories = Trajectories([point], [norm if lawn else part.start * norm], part.repeats, n, generator, lawn)
        angles, risks = torch.empty(2, part.steps, part.repeats, dtype=torch.float64)
        off = torch.zeros(2, dtype=torch.float64)
        for step in range(part.steps):
            if step == part.at:
                trajectories.scale_lr(part.factor)
            before = trajectories.weights.clone()
            seen = trajectories.step()
            angles[step], risks[step] = seen.angle, seen.excess
            if lawn:
                tangent = (
                    trajectories.optimizer.param_groups[0]["lr"]
                    * tangents(before, trajectories.buffers).norm(dim=1)
                    / norm
                )
                errors = [(seen.angle / formula - 1).abs().max() for formula in (tangent, tangent.atan())]
                off = torch.maximum(off, torch.stack(errors))
        row: dict[str, Any] = {"lawn": lawn, **asdict(point), "norm": norm}
        for name, series in (("angle", angles), ("excess", risks)):
            means = series.view(-1, part.bin, part.repeats).mean(1)
            row[name] = short(means.mean(1))
            row[f"{name}_error"] = short(means.std(1) / math.sqrt(part.repeats))
            row[f"{name}_in"] = {key: short(series[window].mean(0)) for key, window in windows(part).items()}
        rows.append({**row, "off": {"tangent": float(off[0]), "arctangent": float(off[1])}} if lawn else row)
    return rows


def windows(part: Drop) -> dict[str, slice]:
    """Updates that are compared: before the drop, at it, soon after it (a fifth to two fifths of the time scale), and
    the last ones."""
    scale = round(part.scale())
    return {
        "before": slice(part.at - part.at // 5, part.at),
        "first": slice(part.at, part.at + 1),
        "soon": slice(part.at + scale // 5, part.at + 2 * scale // 5),
        "late": slice(part.steps - scale, part.steps),
    }


def tangents(weights: Tensor, vectors: Tensor) -> Tensor:
    """The tangent part of each row at the weight of its row: r of SGD-LAWN, from its buffer. [weights, n] each."""
    along = (weights * vectors).sum(1, keepdim=True) / (weights * weights).sum(1, keepdim=True)
    return torch.addcmul(vectors, weights, along, value=-1)


def effective_angle(angle: float, momentum: float) -> float:
    """E: the angular update of plain SGD that goes as far in many updates as this one does with momentum."""
    return angle * math.sqrt((1 + momentum) / (1 - momentum))


def limiting_excess(angle: float, momentum: float, noise: float, dimension: int) -> float:
    return effective_angle(angle, momentum) * noise * math.sqrt(dimension - 1) / 2


def updates_to_converge(angle: float, momentum: float, noise: float, dimension: int) -> float:
    """Until the excess is 1/e of what it has been at the start, where the buffer is empty. By fixed-point iteration."""
    full = flow_time(dimension) * 2 * noise * math.sqrt(dimension - 1) / effective_angle(angle, momentum)
    updates = full
    for _ in range(1000):  # from below, a contraction
        updates = full + momentum * (1 - momentum**updates) / (1 - momentum)
    return updates


def angle_after(part: Drop, momentum: float, updates: float) -> float:
    """Angular update under decay so long after the drop, from the relaxation of the norm and its new equilibrium."""
    final = equilibrium_angle(part.factor * part.rate * (1 - momentum), part.weight_decay, momentum)
    return final / math.sqrt(1 + (1 / part.factor - 1) * math.exp(-updates / part.scale()))


def _norm(point: Point, dimension: int) -> float:
    """At equilibrium, if the gradient were noise alone."""
    return equilibrium_norm(point.lr, point.weight_decay, noise_gradient(point.noise, dimension), point.momentum)


def _with_angle(theta: float, momentum: float, settings: Settings, lawn: bool) -> Point:
    """The point whose angular update is theta, if the gradient g were noise alone: ||b|| = ||g|| / sqrt(1 - a^2)."""
    if lawn:
        length = math.sqrt(noise_gradient(settings.noise, settings.dimension) / (1 - momentum**2))
        return Point(math.tan(theta) / length, momentum, settings.noise)
    decay = (1 - math.cos(theta)) * (1 + momentum) / settings.angles.lr
    return Point(settings.angles.lr, momentum, settings.noise, decay)


def short(values: Tensor) -> list[float]:
    """Six significant digits."""
    return [float(f"{value:.6g}") for value in values.tolist()]
