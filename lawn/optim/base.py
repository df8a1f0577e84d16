"""What the LAWN optimizers of this package share: two phases, an update for each."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import phase


class LAWNOptimizer(Optimizer, ABC):
    """Trains freely for `free_steps` updates, then on the product of spheres ||w_l|| = c_l (paper section 3).

    A subclass supplies the update of each phase. `lawn.optim.phase` documents the keys that the parameter groups
    have for it; `fused` is one more: whether constrained updates run in compiled code (None: where that is possible).
    """

    def __init__(self, params: Any, defaults: dict[str, Any], free_steps: int | None, fused: bool | None) -> None:
        phase.check_free_steps(free_steps)
        if defaults["lr"] < 0:
            raise ValueError(f"lr must not be negative, got {defaults['lr']}")
        super().__init__(params, {**defaults, "free_steps": free_steps, "fused": fused})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        phase.restore(self.param_groups, None)
        for group in self.param_groups:
            group.setdefault("fused", None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            phase.prepare(self.param_groups, len(self.param_groups) - 1, self.defaults["free_steps"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def constrained(self) -> bool:
        """Whether the weight norms are fixed (the second phase)."""
        return phase.is_constrained(self.param_groups)

    def constrain(self) -> None:
        """Fix the norm of every constrained weight at its present value (equation 1).

        Raises ValueError when they are fixed already, when there is nothing to constrain, and when a norm is zero or
        not finite; then nothing has changed. Moments and schedule are left as they are.
        """
        phase.constrain(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; switches phase first when `free_steps` is reached."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if phase.is_due(self.param_groups):
            self.constrain()
        for group in self.param_groups:
            free, blocks = phase.split(group)
            if free:
                self._free_update(group, free)
            if blocks:
                self._constrained_update(group, blocks)
            group["steps"] += 1
        return loss

    @abstractmethod
    def _free_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update `params`, which all have a gradient, as the base optimizer does."""

    @abstractmethod
    def _constrained_update(self, group: dict[str, Any], blocks: list[tuple[list[Tensor], Tensor]]) -> None:
        """Update blocks of parameters, each on the sphere of its radius c."""
