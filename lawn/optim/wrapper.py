"""LAWN stacked on any optimizer, through its step hooks."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import native, phase, update


class LAWN:
    """Makes `optimizer` train on fixed weight norms once constrained; it keeps its type and is stepped as before.

    Args:
        optimizer: any torch optimizer; its weight decay must be 0 in the groups that have constrained parameters.
        free_steps: updates before the switch; 0 constrains from the start, None waits for `constrain()`.
        fused: compiled projection on the CPU; None where it is possible, False never.

    In a constrained step the optimizer sees the projected gradient, and what it did to each weight is projected on
    the tangent space where the step began, then rescaled. For optimizers that update a weight from its gradient's
    history (SGD, Adam, Lion, Muon, ...) that is Algorithm 1. One that scales its update by a norm of its own (LAMB)
    measures it before the projection. Phase and norms are in the optimizer's own state_dict.

    The optimizer rounds the weight before it is rescaled, so bfloat16 weights keep their norm only to about 0.4 %,
    the resolution of the type; the optimizers of this package, which round once, do better.

    To copy or pickle the pair, copy this object: torch's own copy of an optimizer has no hooks.

    Costs two copies of the constrained weights in memory.
    """

    def __init__(self, optimizer: Optimizer, free_steps: int | None = None, *, fused: bool | None = None) -> None:
        phase.check_free_steps(free_steps)
        if not hasattr(optimizer, "_optimizer_load_state_dict_post_hooks"):
            raise TypeError(
                f"{type(optimizer).__name__} is no torch optimizer, or never initialized itself as one, and calls no "
                "hooks; put LAWN on the optimizer inside it"
            )
        groups = optimizer.param_groups
        if any("target_norms" in group for group in groups):
            raise ValueError("the optimizer is a LAWN optimizer already")
        try:
            for index in range(len(groups)):
                phase.prepare(groups, index, free_steps)
        except (TypeError, ValueError):
            self._forget(groups)
            raise
        self._attach(optimizer, free_steps, fused)

    def _attach(self, optimizer: Optimizer, free_steps: int | None, fused: bool | None) -> None:
        self.optimizer = optimizer
        self._free_steps = free_steps
        self._fused = fused
        self._before: dict[Tensor, Tensor] = {}  # weights where the step began; kept, to be used again
        self._projected: dict[Tensor, Tensor] = {}
        self._gradients: dict[Tensor, Tensor | None] = {}  # the caller's, while the optimizer sees projected ones
        self._skipped = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
            optimizer.register_load_state_dict_post_hook(lambda loaded: phase.restore(loaded.param_groups, free_steps)),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "free_steps": self._free_steps, "fused": self._fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._attach(**state)

    @property
    def constrained(self) -> bool:
        """Whether the weight norms are fixed (the second phase)."""
        return phase.is_constrained(self.optimizer.param_groups)

    def constrain(self) -> None:
        """Fix the norm of every constrained weight at its present value; see `LAWNOptimizer.constrain`."""
        phase.constrain(self.optimizer.param_groups)

    def detach(self) -> None:
        """Leave the optimizer as it was before, free and without LAWN's keys."""
        for hook in self._hooks:
            hook.remove()
        self._forget(self.optimizer.param_groups)

    @staticmethod
    def _forget(groups: list[phase.Group]) -> None:
        for group in groups:
            for key in phase.DEFAULTS:
                group.pop(key, None)

    def _begin(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._give_back()  # a step that raised may have left projected gradients
        groups = self.optimizer.param_groups
        for index, group in enumerate(groups):
            if "target_norms" not in group:  # added since
                phase.prepare(groups, index, self._free_steps)
        # GradScaler leaves it to a fused optimizer to skip a step that has overflowed.
        found_inf = getattr(self.optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf.item())
        if self._skipped:
            return None
        if phase.is_due(groups):
            self.constrain()
        if not self.constrained:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._project()
            return None

        def projecting() -> Any:  # the gradients come into being inside the step
            self._give_back()
            loss = closure()
            self._project()
            return loss

        if len(args) > 1:
            return (args[0], projecting, *args[2:]), kwargs
        return args, {**kwargs, "closure": projecting}

    @torch.no_grad()
    def _project(self) -> None:
        for group in self.optimizer.param_groups:
            blocks = [(params, phase.gradients(params)) for params, _ in phase.split(group)[1]]
            if not blocks:
                continue
            for params, grads in blocks:
                for p, g in zip(params, grads, strict=True):
                    if p not in self._before:
                        self._before[p], self._projected[p] = torch.empty_like(p), torch.empty_like(g)
            lists = [
                (params, grads, [self._before[p] for p in params], [self._projected[p] for p in params])
                for params, grads in blocks
            ]
            if (gpu := update.gpu_kernels(lists, self._fused)) is not None:
                gpu.project(lists)
            else:
                for block in lists:
                    compiled = native.library(self._fused, *block)
                    if compiled is not None:
                        compiled.project(*native.pointers(*block))
                    else:
                        weights, gradients, before, projected = block
                        for target, source in zip(before, weights, strict=True):
                            target.copy_(source)
                        for target, source in zip(projected, update.projected(weights, gradients), strict=True):
                            target.copy_(source)
            for params, _, _, projected in lists:
                for p, tangent in zip(params, projected, strict=True):
                    self._gradients[p] = p.grad
                    p.grad = tangent

    @torch.no_grad()
    def _end(self, *arguments: Any) -> None:
        if self._skipped:
            return
        for group in self.optimizer.param_groups:
            group["steps"] += 1
            blocks = phase.split(group)[1] if self._gradients else []
            lists = [(params, [self._before[p] for p in params]) for params, _ in blocks]
            if not blocks:
                continue
            if (gpu := update.gpu_kernels(lists, self._fused)) is not None:
                gpu.retract(lists, [c for _, c in blocks])
                continue
            for (weights, before), (_, c) in zip(lists, blocks, strict=True):
                compiled = native.library(self._fused, weights, before)
                if compiled is not None:
                    compiled.retract(*native.pointers(weights, before), float(c))
                else:
                    updates = [update.difference(b, w) for b, w in zip(before, weights, strict=True)]
                    update.move(weights, before, updates, c, 1.0)
        self._give_back()

    def _give_back(self) -> None:
        for p, grad in self._gradients.items():
            p.grad = grad
        self._gradients.clear()
