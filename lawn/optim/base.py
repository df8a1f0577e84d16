"""The two phases of LAWN, shared by every optimizer of this package."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import sphere


class LAWNOptimizer(Optimizer, ABC):
    """Trains freely for `free_steps` updates, then on the product of spheres ||w_l|| = c_l (paper section 3).

    A subclass supplies one update for each phase. A parameter is constrained when it has two or more
    dimensions; the key `constrain` (True or False) of its parameter group overrides that.

    Everything a checkpoint needs lives in the parameter groups: `steps` (updates so far), `free_steps`, and
    `target_norms`, one 0-dim tensor for each parameter, None where it stays free, and None as a whole before the
    switch. (Tensors in `state` would be cast to the parameter's dtype on loading; those in groups are not.)
    """

    def __init__(self, params: Any, defaults: dict[str, Any], free_steps: int | None) -> None:
        if free_steps is not None and (not isinstance(free_steps, int) or free_steps < 0):
            raise ValueError(f"free_steps must be a non-negative integer or None, got {free_steps!r}")
        if defaults["lr"] < 0:
            raise ValueError(f"lr must not be negative, got {defaults['lr']}")
        phase = {"constrain": None, "free_steps": free_steps, "steps": 0, "target_norms": None}
        super().__init__(params, {**defaults, **phase})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("constrain", None)
            group.setdefault("free_steps", None)
            group.setdefault("steps", 0)
            targets = group.setdefault("target_norms", None)
            if targets is not None:  # a checkpoint may have been read to another device
                pairs = zip(targets, group["params"], strict=True)
                group["target_norms"] = [None if c is None else c.to(p.device) for c, p in pairs]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group.get("weight_decay"):
            raise ValueError(
                f"param group {len(self.param_groups) - 1}: weight_decay={group['weight_decay']}, "
                "but LAWN replaces weight decay: leave it out"
            )
        if len(self.param_groups) > 1:  # a group that comes later is in the same phase as the others
            group["steps"] = self.param_groups[0]["steps"]
            if self.constrained:
                group["target_norms"] = _target_norms(group, len(self.param_groups) - 1)

    @property
    def constrained(self) -> bool:
        """Whether the weight norms are fixed (the second phase)."""
        return any(group["target_norms"] is not None for group in self.param_groups)

    @torch.no_grad()
    def constrain(self) -> None:
        """Fix the norm of every constrained weight at its present value (equation 1).

        Raises RuntimeError when already constrained, and ValueError when there is nothing to constrain or a norm
        is zero or not finite. Moments and the learning rate schedule are left as they are.
        """
        if self.constrained:
            raise RuntimeError("the weights are constrained already")
        targets = [_target_norms(group, i) for i, group in enumerate(self.param_groups)]
        if not any(c is not None for group_targets in targets for c in group_targets):
            raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
        for group, group_targets in zip(self.param_groups, targets, strict=True):
            group["target_norms"] = group_targets

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; switches phase first when `free_steps` is reached."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]
        if first["free_steps"] == first["steps"] and not self.constrained:
            self.constrain()
        for group in self.param_groups:
            targets = group["target_norms"] or [None] * len(group["params"])
            pairs = [(p, c) for p, c in zip(group["params"], targets, strict=True) if p.grad is not None]
            if any(p.grad.is_sparse for p, _ in pairs):
                raise TypeError(f"{type(self).__name__} does not support sparse gradients")
            free = [p for p, c in pairs if c is None]
            bound = [p for p, c in pairs if c is not None]
            if free:
                self._free_update(group, free)
            if bound:
                self._constrained_update(group, bound, [c for _, c in pairs if c is not None])
            group["steps"] += 1
        return loss

    @abstractmethod
    def _free_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update `params`, which all have a gradient, as the base optimizer does."""

    @abstractmethod
    def _constrained_update(self, group: dict[str, Any], params: list[Tensor], norms: list[Tensor]) -> None:
        """Update `params` on the spheres with radii `norms`."""


def _target_norms(group: dict[str, Any], index: int) -> list[Tensor | None]:
    rule = group["constrain"]
    targets: list[Tensor | None] = []
    for position, p in enumerate(group["params"]):
        if not p.requires_grad or rule is False or (rule is None and p.ndim < 2):
            targets.append(None)
            continue
        c = sphere.norm(p)
        if not (torch.isfinite(c) and c > 0):
            raise ValueError(
                f"cannot constrain parameter {position} of param group {index} (shape {tuple(p.shape)}): "
                f"its norm is {c.item()}"
            )
        targets.append(c)
    return targets
