"""The weights of several optimizers of one class, with the stages of their update.

The stages are `products`, `advance`, `sums`, `move` and `restore_norms`, in this order; between them, `VectorizedStep`
computes with a number for each run. `VectorizedWeight` takes them in plain torch, for one weight of all runs;
`CPUWeights` in the compiled code of `lawn/optim/cpu_kernels.c`, for all weights of all runs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lawn.optim import cpu_kernels, keys
from lawn.optim.base import LAWNOptimizer
from lawn.optim.blocks import Blocks


@dataclass(frozen=True)
class Rule:
    """The update rule of an optimizer class.

    Attributes:
        adaptive: whether it has moments as in Adam; else it has momentum.
        decay: whether weight decay is added to the "gradient", shrinks the "weight" (decoupled) or is added to the
            "update"; None without decay.
        max_trust: the trust ratio is at most this; None without one.
        trust_vectors: whether vectors have a trust ratio too.
    """

    adaptive: bool
    decay: str | None = None
    max_trust: float | None = None
    trust_vectors: bool = True


class VectorizedWeight:
    """A parameter of K optimizers: w [K, ...]. Numbers of the optimizers have the shape [K, 1, ...].

    Args:
        w: the weights of all optimizers.
        slices: the parameter of each optimizer, a slice of w.
        optimizers: K optimizers.
        rule: their rule.
    """

    def __init__(self, w: Tensor, slices: Sequence[Tensor], optimizers: Sequence[Optimizer], rule: Rule) -> None:
        self.w = w
        self.slices = slices
        self.optimizers = optimizers
        self.rule = rule
        self.trust = rule.max_trust is not None and (rule.trust_vectors or w.ndim > 2)
        self.groups = [holder(optimizer, own) for optimizer, own in zip(optimizers, slices, strict=True)]
        axes = keys.slice_axes(self.groups[0], slices[0])
        self.over = tuple(axis for axis in range(1, w.ndim) if axes is None or axis - 1 not in axes)  # axes of a norm
        self.decay = self._column([group.get("weight_decay", 0) for group in self.groups])
        self.decays = any(group.get("weight_decay") for group in self.groups)
        if rule.adaptive:
            self.beta1, self.beta2 = (self._column([group["betas"][i] for group in self.groups]) for i in (0, 1))
            self.eps = self._column([group["eps"] for group in self.groups])
            self.first, self.second = self._state("exp_avg", w), self._state("exp_avg_sq", w)
            own = all(isinstance(optimizer, Adam) for optimizer in optimizers)  # torch's keeps it where it is needed
            beside = w if own and self.groups[0].get("fused") else torch.empty(0)
            self.steps = self._state("step", torch.empty(len(slices), device=beside.device))
        else:
            self.momentum = self._column([group["momentum"] for group in self.groups])
            self.uses_nesterov = any(group.get("nesterov") for group in self.groups)
            self.nesterov = self._column([group.get("nesterov", False) for group in self.groups]) > 0
            self.first = self._state("momentum_buffer", w)
        for optimizer, p in zip(optimizers, slices, strict=True):
            if isinstance(optimizer, LAWNOptimizer):
                optimizer.state[p].setdefault(keys.NORM, keys.free_norm(holder(optimizer, p), p))
        self.read_norms()

    def read_norms(self) -> None:
        """The norms that the optimizers have fixed, infinite where they have not; None where none has."""
        states = [optimizer.state[p] for optimizer, p in zip(self.optimizers, self.slices, strict=True)]
        found = list(map(keys.fixed_norm, states))
        shape = [1 if axis in self.over else self.w.shape[axis] for axis in range(1, self.w.ndim)]
        given = [torch.as_tensor(c if keys.is_fixed(c) else math.inf, dtype=torch.float64) for c in found]
        norms = [c.to(self.w.device, self.w.dtype) for c in given]
        each = torch.stack([c.view(shape) if c.ndim else c.expand(shape) for c in norms])
        self.norm = each if any(map(keys.is_fixed, found)) else None

    def products(self, g: Tensor, *, norms_only: bool) -> tuple[Tensor, Tensor]:
        """Return the inner products w.w and w.g; with `norms_only`, w.w in place of the second."""
        ww = self._dot(self.w, self.w)
        return ww, ww if norms_only else self._dot(self.w, g)

    def advance(self, g: Tensor, along: Tensor | None, scales: list[Tensor]) -> None:
        """Update the moments with g - along w. They give r, which the optimizers would subtract at a rate of 1."""
        if along is not None:
            g = torch.addcmul(g, self.w, along, value=-1)
        if self.rule.adaptive:
            self.first.lerp_(g, 1 - self.beta1)
            self.second.lerp_(g * g, 1 - self.beta2)
            first_scale, second_scale = scales  # m_hat / (sqrt(v_hat) + eps), both divided by the scale of m_hat
            roots = self.second.sqrt().mul_(second_scale / first_scale).add_(self.eps / first_scale)
            self._r = self.first / roots
        else:
            self.first.mul_(self.momentum).add_(g)
            self._r = self.first
            if self.uses_nesterov:
                self._r = torch.where(self.nesterov, torch.addcmul(g, self.first, self.momentum), self.first)
        if self.decays and self.rule.decay == "update":
            self._r = torch.addcmul(self._r, self.w, self.decay)

    def sums(self, *, norms_only: bool) -> tuple[Tensor, Tensor]:
        """Return the inner products w.r and r.r; with `norms_only`, r.r in place of the first."""
        rr = self._dot(self._r, self._r)
        return rr if norms_only else self._dot(self.w, self._r), rr

    def move(self, keep: Tensor | None, take: Tensor) -> None:
        """Replace w by keep w - take r; w - take r without `keep`."""
        if keep is not None:
            self.w.mul_(keep)
        self.w.addcmul_(self._r, take, value=-1)
        del self._r  # the next weight can use its memory

    def restore_norms(self, off: Tensor) -> None:
        """Rescale the weights of a mask [K, 1, ...] to their norms, which rounding has left: see `update.CANCELLATION`.

        A momentum can be much longer than its tangent part; Adam's update cannot. A look at the mask would wait for a
        GPU, so the weights are rescaled without one.
        """
        if not self.rule.adaptive and self.norm is not None:
            length = self._dot(self.w, self.w).sqrt()
            self.w.mul_(torch.where(off & (length > 0), self.norm / length, 1))

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=self.over, keepdim=True) if self.over else a * b

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return expand_runs(torch.tensor(numbers, dtype=self.w.dtype, device=self.w.device), self.w)

    def _state(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the shape of `like` whose slices are, from now on, this state of the optimizers."""
        found = [optimizer.state[p].get(name) for optimizer, p in zip(self.optimizers, self.slices, strict=True)]
        stack = torch.stack([zero if f is None else f for f, zero in zip(found, torch.zeros_like(like), strict=True)])
        for optimizer, p, row in zip(self.optimizers, self.slices, stack, strict=True):
            optimizer.state[p][name] = row
        return stack


class CPUWeights:
    """The weights of several optimizers, which compiled code updates together, with numbers [weights * K] in float64.

    Args:
        weights: all weights of the optimizers; `is_supported` holds for them.
    """

    def __init__(self, weights: Sequence[VectorizedWeight]) -> None:
        self._weights = weights
        self.rule = weights[0].rule
        self.trust = self.rule.max_trust is not None
        kernels = cpu_kernels.load([[weight.w for weight in weights]])
        assert kernels is not None, "is_supported comes first"
        self._kernels = kernels
        self._rows = _rows(weight.w for weight in weights)
        first = _rows(weight.first for weight in weights)
        second = _rows(weight.second for weight in weights) if self.rule.adaptive else []
        self._blocks = Blocks(self._rows, [1] * len(self._rows), [], self._rows, first, second)
        self.decay = self._column("weight_decay")
        self.decays = any(weight.decays for weight in weights)
        if self.rule.adaptive:
            beta1, beta2 = self._column("betas").unbind(1)
            self._factors, self._eps = [beta1, 1 - beta1, beta2, 1 - beta2], self._column("eps")
        else:
            self._factors, self._eps = [self._column("momentum")], torch.empty(0)
        self.read_norms()

    @staticmethod
    def is_supported(weights: Sequence[VectorizedWeight]) -> bool:
        """Whether the compiled code can be loaded and has this update."""
        rule = weights[0].rule
        other = not all(rule.trust_vectors and weight.w.is_contiguous() for weight in weights)
        other = other or any(len(weight.over) < weight.w.ndim - 1 for weight in weights)  # norms of slices
        other = other or (rule.decay == "update" and any(weight.decays for weight in weights))
        groups = [group for weight in weights for group in weight.groups]
        other = other or any(group.get("nesterov") or group.get("fused") is False for group in groups)
        return not other and cpu_kernels.load([[weight.w for weight in weights]]) is not None

    def read_norms(self) -> None:
        """Take the norms of the weights; None where no optimizer has fixed one."""
        given = [weight.norm for weight in self._weights]
        free = torch.full((len(self._weights[0].w),), math.inf)
        each = torch.cat([free if norm is None else norm.flatten() for norm in given]).double()
        self.norm = each if each.isfinite().any() else None

    def rows_of(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients [K, ...] of all weights as the other methods take them: one for each weight and optimizer."""
        for weight, g in zip(self._weights, gradients, strict=True):
            assert (g.shape, g.dtype) == (weight.w.shape, weight.w.dtype), "the compiled code would read beyond"
        return _rows(g.resolve_neg().contiguous() for g in gradients)

    def products(self, g: list[Tensor], *, norms_only: bool) -> tuple[Tensor, Tensor]:
        """Return the inner products w.w and w.g."""
        ww, wg = self._kernels.products(Blocks(self._rows, self._blocks.sizes, [], g)).unbind(1)
        return ww, wg

    def advance(self, g: list[Tensor], along: Tensor | None, scales: list[Tensor]) -> None:
        """See `VectorizedWeight.advance`."""
        self._scales = torch.stack(scales) if scales else torch.empty(0)
        self._blocks.grads = g
        share = torch.zeros(len(self._rows)) if along is None else along
        self._sums = self._kernels.advance(self._blocks, share, self._scales, self._factors, self._eps)

    def sums(self, *, norms_only: bool) -> tuple[Tensor, Tensor]:
        """Return the inner products w.r and r.r."""
        wr, rr = self._sums.unbind(1)
        return wr, rr

    def move(self, keep: Tensor | None, take: Tensor) -> None:
        """See `VectorizedWeight.move`."""
        share = torch.ones(len(self._rows)) if keep is None else keep
        self._kernels.move(self._blocks, share, take, self._scales, self._eps)
        self._blocks.grads = self._rows  # the gradients are not needed any more

    def restore_norms(self, off: Tensor) -> None:
        """See `VectorizedWeight.restore_norms`; this one reads the mask."""
        for row in off.nonzero().flatten().tolist():
            length = torch.linalg.vector_norm(self._rows[row], dtype=torch.float64)
            if length > 0:
                assert self.norm is not None  # as some are off
                self._rows[row].mul_(self.norm[row] / length)

    def _column(self, key: str) -> Tensor:
        numbers = [group.get(key, 0) for weight in self._weights for group in weight.groups]
        return torch.tensor(numbers, dtype=torch.float64)


def _rows(stacks: Iterable[Tensor]) -> list[Tensor]:
    return [row for stack in stacks for row in stack]


def holder(optimizer: Optimizer, own: Tensor) -> dict[str, Any]:
    """The group that holds a parameter."""
    return next(group for group in optimizer.param_groups for p in group["params"] if p is own)


def expand_runs(numbers: Tensor, w: Tensor) -> Tensor:
    """[K] as [K, 1, ...], to be broadcast over w [K, ...]."""
    return numbers.view(-1, *[1] * (w.ndim - 1))
