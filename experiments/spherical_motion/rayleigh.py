"""The noisy Rayleigh quotient: the smallest model with the scale invariance of a normalized layer.

f(w) = w'Aw / w'w is minimized from noisy samples A + s S, with S a symmetric matrix of Gaussian numbers, fresh at every
update: off the diagonal of variance 1, on it 2. The gradient does not depend on the basis, so A is diagonal. S w is
drawn without S: for a given w it is Gaussian of variance ||w||^2 in every direction orthogonal to w, and the gradient
does not see the direction of w. So its noise has the same strength everywhere, 4 s^2 (n - 1) at norm 1.

Many weights [n] make up one tensor [weights, n] in float64, and one optimizer of many groups updates all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lawn.optim import SGDLAWN

SMALLEST_GAP, LARGEST_GAP = 0.5, 1.5  # of the other eigenvalues to the smallest, which is 0


@dataclass(frozen=True)
class Point:
    """Hyperparameters of a weight."""

    lr: float
    momentum: float
    noise: float  # s
    weight_decay: float = 0.0


@dataclass(frozen=True)
class UpdateStatistics:
    """Measurements of one update, a number for each weight [weights]."""

    angle: Tensor  # between the weights before and after it, radians
    inner: Tensor  # their inner product
    square: Tensor  # ||w||^2 before it
    unit_gradient: Tensor  # squared norm of the gradient at w / ||w||
    excess: Tensor  # of the quotient before it, over the smallest eigenvalue
    # 2 a g.b ||w||^2, with the momentum buffer b of the update before: 0 on average without correlation.
    carried: Tensor


def eigenvalues(dimension: int) -> Tensor:
    """The spectrum of A [n]: 0, the others evenly from the smallest gap to the largest."""
    others = torch.linspace(SMALLEST_GAP, LARGEST_GAP, dimension - 1, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), others])


def noisy_products(weights: Tensor, spectrum: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """(A + s S) w for a fresh S for each weight, but for a multiple of w: [weights, n], [n], [weights, 1]."""
    drawn = torch.randn(weights.shape, dtype=weights.dtype, generator=generator)
    return spectrum * weights + noise * weights.norm(dim=1, keepdim=True) * drawn


def gradient(weights: Tensor, image: Tensor) -> Tensor:
    """Of w'Mw / w'w, from w and its image Mw, M symmetric: 2 (Mw - w (w'Mw / w'w)) / w'w. [weights, n] each."""
    square = weights.square().sum(1, keepdim=True)
    quotient = (weights * image).sum(1, keepdim=True) / square
    return 2 / square * (image - quotient * weights)


def excess(weights: Tensor, spectrum: Tensor) -> Tensor:
    """w'Aw / w'w less the smallest eigenvalue: [weights, n] -> [weights]."""
    square = weights.square()
    return (square * (spectrum - spectrum.min())).sum(1) / square.sum(1)


def angle(before: Tensor, after: Tensor) -> Tensor:
    """Between weights, in radians, by way of the chord: a cosine near 1 has lost the small ones. [weights]."""
    chord = torch.nn.functional.normalize(before, eps=0) - torch.nn.functional.normalize(after, eps=0)
    return 2 * torch.asin((chord.norm(dim=1) / 2).clamp(max=1))


def initial_weight(dimension: int) -> Tensor:
    """A weight [n] of norm 1 between the smallest eigenvector and all others, of which it has equal shares."""
    others = torch.full((dimension - 1,), math.sqrt(0.5 / (dimension - 1)), dtype=torch.float64)
    return torch.cat([torch.full((1,), math.sqrt(0.5), dtype=torch.float64), others])


def noise_gradient(noise: float, dimension: int) -> float:
    """L = E||g||^2 at a weight of norm 1, where it is noise alone."""
    return 4 * noise**2 * (dimension - 1)


class Trajectories:
    """Weights on their way, `repeats` for each point, one after the other: all with noise of their own.

    The start has the norm `norms[i]` at point i, in the direction of `initial_weight` but for random signs. With `lawn`
    the optimizer is SGD-LAWN with this norm fixed, a parameter for each weight; else torch.optim.SGD with decay.
    """

    def __init__(
        self,
        points: Sequence[Point],
        norms: Sequence[float],
        repeats: int,
        dimension: int,
        generator: torch.Generator,
        lawn: bool = False,
    ) -> None:
        self.spectrum = eigenvalues(dimension)
        self._generator = generator
        self._noise = self._spread([point.noise for point in points], repeats)
        self._momentum = self._spread([point.momentum for point in points], repeats)
        signs = torch.randint(0, 2, (len(points) * repeats, dimension), generator=generator) * 2.0 - 1.0
        self.weights = signs * initial_weight(dimension) * self._spread(norms, repeats)
        self.gradients = torch.zeros_like(self.weights)
        groups = []
        for i, point in enumerate(points):
            size = 1 if lawn else repeats
            rows = range(i * repeats, (i + 1) * repeats, size)
            group = {"params": [self._parameter(row, size) for row in rows], "lr": point.lr, "momentum": point.momentum}
            groups.append(group if lawn else {**group, "weight_decay": point.weight_decay})
        self.optimizer = SGDLAWN(groups, free_steps=0) if lawn else torch.optim.SGD(groups)

    def _parameter(self, row: int, size: int) -> torch.nn.Parameter:
        """Rows of the tensor of all weights, with rows of that of all gradients: nothing has to be copied."""
        parameter = torch.nn.Parameter(self.weights[row : row + size])
        parameter.grad = self.gradients[row : row + size]
        return parameter

    @staticmethod
    def _spread(values: Sequence[float], repeats: int) -> Tensor:
        """A number for each point -> [weights, 1]."""
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(repeats)[:, None]

    @property
    def buffers(self) -> Tensor:
        """The momentum buffers b [weights, n]; zeros before the first update and where there is no momentum."""
        rows = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                buffer = self.optimizer.state[parameter].get("momentum_buffer")
                rows.append(torch.zeros_like(parameter) if buffer is None else buffer)
        return torch.cat(rows)

    def scale_lr(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    @torch.no_grad()
    def step(self, carried: bool = False) -> UpdateStatistics:
        """One update of every weight; `carried` is zero unless asked for, since the buffers have to be collected."""
        before = self.weights.clone()
        self.gradients.copy_(gradient(before, noisy_products(before, self.spectrum, self._noise, self._generator)))
        square = before.square().sum(1)
        along = (self.gradients * self.buffers).sum(1) if carried else torch.zeros_like(square)
        self.optimizer.step()
        return UpdateStatistics(
            angle=angle(before, self.weights),
            inner=(before * self.weights).sum(1),
            square=square,
            unit_gradient=self.gradients.square().sum(1) * square,
            excess=excess(before, self.spectrum),
            carried=2 * self._momentum[:, 0] * along * square,
        )


@cache
def flow_time(dimension: int) -> float:
    """Time in which gradient flow from the initial weight, at norm 1 and without noise, brings the excess down to 1/e.

    There w_i is proportional to w_i(0) exp(-2 lambda_i t). By bisection.
    """
    spectrum, first = eigenvalues(dimension), initial_weight(dimension)
    goal = float(excess(first[None], spectrum)) / math.e
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        there = float(excess((first * torch.exp(-2 * spectrum * middle))[None], spectrum)) <= goal
        low, high = (low, middle) if there else (middle, high)
    return high
