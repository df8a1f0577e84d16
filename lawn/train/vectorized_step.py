"""One step for the optimizers of several runs that are trained as one batched model.

The updates are those of the optimizers' own `step`, with a leading run axis: where an optimizer has a number, there is
a tensor here with a number for each run. So many small runs take as many kernels, and as much Python, as one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lawn.optim import keys, phase, slices, update
from lawn.optim.adam_lawn import AdamLAWN
from lawn.optim.base import LAWNOptimizer
from lawn.optim.lamb import LAMB, LAMBLAWN, LAMBPlus
from lawn.optim.norms import NonFiniteError
from lawn.optim.sgd_lawn import SGDLAWN
from lawn.train.vectorized_weight import CPUWeights, Rule, VectorizedWeight, expand_runs

RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule(adaptive=False, decay="gradient"),
    SGDLAWN: Rule(adaptive=False),
    Adam: Rule(adaptive=True, decay="gradient"),
    AdamW: Rule(adaptive=True, decay="weight"),
    AdamLAWN: Rule(adaptive=True),
    LAMB: Rule(adaptive=True, decay="update", max_trust=math.inf),
    LAMBPlus: Rule(adaptive=True, decay="update", max_trust=LAMBPlus.max_trust, trust_vectors=False),
    LAMBLAWN: Rule(adaptive=True, max_trust=math.inf),
}
OTHER = ("amsgrad", "maximize", "dampening", "blocks")  # options that are left to the optimizers' own step


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
        self._weights = [VectorizedWeight(w, each, self._optimizers, self._rule) for w, each in pairs]
        self._together = CPUWeights(self._weights) if CPUWeights.is_supported(self._weights) else None
        self._counts = self._weights[0].steps.tolist() if self._rule.adaptive else []
        rows = len(self._weights) + 2 * self._rule.adaptive
        self._numbers = weights[0].new_empty(rows, len(optimizers))  # rates of each weight, scales of the moments

    @staticmethod
    def is_supported(optimizers: Sequence[Optimizer]) -> bool:
        """Whether they are of one class, and use nothing that only their own step knows."""
        if len({type(optimizer) for optimizer in optimizers}) > 1 or type(optimizers[0]) not in RULES:
            return False
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        layouts = {str(list(map(_layout, optimizer.param_groups))) for optimizer in optimizers}
        same_slices = len(layouts) == 1 or all(group.get(slices.KEY) is None for group in groups)
        return same_slices and all(map(_is_plain, optimizers))

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
        count = len(self._weights)
        rates, scales = self._numbers[:count], self._numbers[count:]
        if self._together:
            rows, each = self._together.rows_of(gradients), [x.repeat(count) for x in scales]
            self._update(self._together, rows, rates.flatten(), each)
            return
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
                except NonFiniteError:
                    failed.add(k)
            for group in optimizer.param_groups:
                group["steps"] += 1
        if switched:
            for weight in self._weights:
                weight.read_norms()
            if self._together:
                self._together.read_norms()
        return failed, switched

    def _update(self, weight: VectorizedWeight | CPUWeights, g: Any, lr: Tensor, scales: list[Tensor]) -> None:
        """Update a weight by its gradient, or all by theirs; `lawn.optim.update` explains the constrained part."""
        rule, c, trust = self._rule, weight.norm, weight.trust
        along = keep = None
        take = lr
        if trust or c is not None:
            ww, wg = weight.products(g, norms_only=c is None)
        if c is not None:
            along = torch.where(c.isfinite(), wg / ww, 0)
        elif weight.decays and rule.decay == "gradient":
            along = -weight.decay
        weight.advance(g, along, scales)
        if weight.decays and rule.decay == "weight":
            keep = 1 - lr * weight.decay
        if trust or c is not None:
            wr, rr = weight.sums(norms_only=c is None)
        if trust:
            ratio = torch.where((ww > 0) & (rr > 0), (ww / rr).sqrt(), 1).clamp(max=rule.max_trust)
            take = lr * ratio
        if c is not None:
            on_sphere = update.coefficients(ww, wr, rr, c, lr, trust=trust)
            keep = torch.where(c.isfinite(), on_sphere[0], 1)
            take = torch.where(c.isfinite(), on_sphere[1], take)
        weight.move(keep, take)
        if c is not None:
            weight.restore_norms(on_sphere[2] & c.isfinite())


def _is_plain(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    counts = {float(optimizer.state.get(p, {}).get("step", 0)) for p in params}
    alike = len(counts) == 1 and len({tuple(group.get("betas", ())) for group in groups}) == 1
    decays = isinstance(optimizer, LAWNOptimizer) and any(group["weight_decay"] for group in groups)
    other = decays or any(group.get(key) for group in groups for key in OTHER)
    return alike and not other and all(p.dtype in (torch.float32, torch.float64) for p in params)


def _layout(group: dict[str, Any]) -> list[Any]:
    """What says which slices of a group's parameters have norms."""
    return [group.get("constrain"), group.get(slices.KEY), [tuple(p.shape) for p in group["params"]]]
