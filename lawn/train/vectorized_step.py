"""One step for the optimizers of several runs that are trained as one batched model.

The updates are those of the optimizers' own `step`, with a leading run axis: where an optimizer has a number, there is
a tensor here with a number for each run. So many small runs take as many kernels, and as much Python, as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lawn.optim import keys, phase, slices, update
from lawn.optim.adam_lawn import AdamLAWN
from lawn.optim.base import LAWNOptimizer
from lawn.optim.lamb import LAMB, LAMBLAWN, LAMBPlus
from lawn.optim.sgd_lawn import SGDLAWN


@dataclass(frozen=True)
class _Rule:
    adaptive: bool  # moments as in Adam; else momentum
    decay: str | None = None  # of the "gradient", the "weight" (decoupled) or the "update"
    max_trust: float | None = None  # the trust ratio is at most this; None: there is none
    trust_vectors: bool = True


RULES: dict[type[Optimizer], _Rule] = {
    SGD: _Rule(adaptive=False, decay="gradient"),
    SGDLAWN: _Rule(adaptive=False),
    Adam: _Rule(adaptive=True, decay="gradient"),
    AdamW: _Rule(adaptive=True, decay="weight"),
    AdamLAWN: _Rule(adaptive=True),
    LAMB: _Rule(adaptive=True, decay="update", max_trust=math.inf),
    LAMBPlus: _Rule(adaptive=True, decay="update", max_trust=LAMBPlus.max_trust, trust_vectors=False),
    LAMBLAWN: _Rule(adaptive=True, max_trust=math.inf),
}
OTHER = ("amsgrad", "maximize", "dampening", "blocks")  # options that are left to the optimizers' own step


class _Weight:
    """A parameter of K optimizers: w [K, ...]. Numbers of the optimizers have the shape [K, 1, ...]."""

    def __init__(self, w: Tensor, slices: Sequence[Tensor], optimizers: Sequence[Optimizer], adaptive: bool) -> None:
        self.w = w
        self.slices = slices
        self.optimizers = optimizers
        self.groups = [_holder(optimizer, own) for optimizer, own in zip(optimizers, slices, strict=True)]
        axes = keys.slice_axes(self.groups[0], slices[0])
        self.over = tuple(axis for axis in range(1, w.ndim) if axes is None or axis - 1 not in axes)  # axes of a norm
        self.decay = self._column([group.get("weight_decay", 0) for group in self.groups])
        self.decays = any(group.get("weight_decay") for group in self.groups)
        if adaptive:
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
                optimizer.state[p].setdefault(keys.NORM, keys.free_norm(_holder(optimizer, p), p))
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

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return expand_runs(torch.tensor(numbers, dtype=self.w.dtype, device=self.w.device), self.w)

    def _state(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the shape of `like` whose slices are, from now on, this state of the optimizers."""
        found = [optimizer.state[p].get(name) for optimizer, p in zip(self.optimizers, self.slices, strict=True)]
        stack = torch.stack([zero if f is None else f for f, zero in zip(found, torch.zeros_like(like), strict=True)])
        for optimizer, p, row in zip(self.optimizers, self.slices, stack, strict=True):
            optimizer.state[p][name] = row
        return stack


class VectorizedStep:
    """The steps of K optimizers of one class as one. The optimizers keep their own state, so each can continue alone.

    Args:
        optimizers: K optimizers for which `is_supported` holds.
        weights: tensors [K, ...], without gradients: all parameters, stacked.
        slices: for each of them the K parameters that its slices are.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], weights: Sequence[Tensor], slices: Sequence[Sequence[Tensor]]
    ) -> None:
        self._optimizers = list(optimizers)
        self._rule = RULES[type(optimizers[0])]
        pairs = zip(weights, slices, strict=True)
        self._weights = [_Weight(w, each, self._optimizers, self._rule.adaptive) for w, each in pairs]
        self._counts = self._weights[0].steps.tolist() if self._rule.adaptive else []
        rows = len(self._weights) + 2 * self._rule.adaptive
        self._numbers = weights[0].new_empty(rows, len(optimizers))  # rates of each weight, scales of the moments

    @staticmethod
    def is_supported(optimizers: Sequence[Optimizer]) -> bool:
        """Whether they are of one class, and use nothing that only their own step knows."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        alike = len({type(optimizer) for optimizer in optimizers}) == 1 and type(optimizers[0]) in RULES
        decays = any(isinstance(o, LAWNOptimizer) and g["weight_decay"] for o in optimizers for g in o.param_groups)
        if any(group.get(slices.KEY) is not None for group in groups):  # then all have the same slices
            alike = alike and len({str(list(map(_layout, optimizer.param_groups))) for optimizer in optimizers}) == 1
        return alike and not decays and not any(group.get(key) for group in groups for key in OTHER)

    def step(self, gradients: Sequence[Tensor]) -> set[int]:
        """One update of every weight, by its gradient [K, ...]. Returns what `prepare` does."""
        failed, _ = self.prepare()
        self.apply(gradients)
        return failed

    @torch.no_grad()
    def prepare(self) -> tuple[set[int], bool]:
        """Count the update, constrain those for which it is time, and put the numbers of this update on the device.

        Returns the optimizers whose weights were not finite when they were to be constrained, which are left free, and
        whether others were constrained: `apply` has other operations then.
        """
        failed, switched = self._switch()
        rows = [[float(group["lr"]) for group in weight.groups] for weight in self._weights]
        if self._rule.adaptive:
            self._counts = [count + 1 for count in self._counts]
            for weight in self._weights:
                weight.steps.add_(1)
            betas = [optimizer.param_groups[0]["betas"] for optimizer in self._optimizers]
            powers = list(zip(betas, self._counts, strict=True))
            rows += [[1 / (1 - b[0] ** t) for b, t in powers], [1 / math.sqrt(1 - b[1] ** t) for b, t in powers]]
        self._numbers.copy_(torch.tensor(rows, dtype=self._numbers.dtype), non_blocking=True)
        return failed, switched

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        """The update that `prepare` has prepared: operations of the device alone."""
        rates, scales = self._numbers[: len(self._weights)], self._numbers[len(self._weights) :]
        for weight, gradient, lr in zip(self._weights, gradients, rates, strict=True):
            each = [expand_runs(x, weight.w) for x in scales]
            self._update(weight, gradient, expand_runs(lr, weight.w), each)

    def _switch(self) -> tuple[set[int], bool]:
        failed, switched = set(), False
        for k, optimizer in enumerate(self._optimizers):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at
            if not isinstance(optimizer, LAWNOptimizer):
                continue
            groups = enumerate(optimizer.param_groups)
            if due := [index for index, group in groups if keys.is_due(group) and not group["switched"]]:
                try:
                    phase.switch(optimizer, due)
                    switched = True
                except phase.NonFiniteError:
                    failed.add(k)
            for group in optimizer.param_groups:
                group["steps"] += 1
        if switched:
            for weight in self._weights:
                weight.read_norms()
        return failed, switched

    def _update(self, weight: _Weight, g: Tensor, lr: Tensor, scales: list[Tensor]) -> None:
        """`lawn.optim.update` explains the constrained part. After a huge gradient the next update restores norms."""
        rule, w, c = self._rule, weight.w, weight.norm
        dot = partial(_dot, over=weight.over)
        trust = rule.max_trust is not None and (rule.trust_vectors or w.ndim > 2)
        ww = dot(w, w) if trust or c is not None else lr
        if c is not None:
            g = torch.addcmul(g, w, torch.where(c.isfinite(), dot(w, g) / ww, 0), value=-1)
        if weight.decays and rule.decay == "gradient":
            g = torch.addcmul(g, w, weight.decay)
        r = self._direction(weight, g, scales)
        if weight.decays and rule.decay == "update":
            r = torch.addcmul(r, w, weight.decay)
        keep = 1 - lr * weight.decay if weight.decays and rule.decay == "weight" else None
        take = lr
        rr = dot(r, r) if trust or c is not None else lr
        if trust:
            ratio = torch.where((ww > 0) & (rr > 0), (ww / rr).sqrt(), 1).clamp(max=rule.max_trust)
            take = lr * ratio
        if c is not None:
            on_sphere = update.coefficients(ww, dot(w, r), rr, c, lr, trust=trust)
            keep = torch.where(c.isfinite(), on_sphere[0], 1)
            take = torch.where(c.isfinite(), on_sphere[1], take)
        if keep is not None:
            w.mul_(keep)
        w.addcmul_(r, take, value=-1)

    def _direction(self, weight: _Weight, g: Tensor, scales: list[Tensor]) -> Tensor:
        """What Adam or SGD would subtract from the weight, at a rate of 1."""
        if self._rule.adaptive:
            weight.first.lerp_(g, 1 - weight.beta1)
            weight.second.lerp_(g * g, 1 - weight.beta2)
            first_scale, second_scale = scales  # m_hat / (sqrt(v_hat) + eps), both divided by the scale of m_hat
            roots = weight.second.sqrt().mul_(second_scale / first_scale).add_(weight.eps / first_scale)
            return weight.first / roots
        weight.first.mul_(weight.momentum).add_(g)
        if not weight.uses_nesterov:
            return weight.first
        return torch.where(weight.nesterov, torch.addcmul(g, weight.first, weight.momentum), weight.first)


def _holder(optimizer: Optimizer, own: Tensor) -> dict[str, Any]:
    """The group that holds a parameter."""
    return next(group for group in optimizer.param_groups for p in group["params"] if p is own)


def _layout(group: dict[str, Any]) -> list[Any]:
    """What says which slices of a group's parameters have norms."""
    return [group.get("constrain"), group.get(slices.KEY), [tuple(p.shape) for p in group["params"]]]


def expand_runs(numbers: Tensor, w: Tensor) -> Tensor:
    """[K] as [K, 1, ...], to be broadcast over w [K, ...]."""
    return numbers.view(-1, *[1] * (w.ndim - 1))


def _dot(a: Tensor, b: Tensor, over: tuple[int, ...]) -> Tensor:
    """Inner products over these axes, which are kept with a length of one."""
    return (a * b).sum(dim=over, keepdim=True)
