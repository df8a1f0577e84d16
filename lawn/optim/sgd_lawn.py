"""SGD-LAWN: heavy-ball momentum on fixed weight norms."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from lawn.optim import update
from lawn.optim.base import LAWNOptimizer
from lawn.optim.phase import GroupUpdate, fitting, gradients


class SGDLAWN(LAWNOptimizer):
    """SGD with momentum in the free phase, projected SGD on fixed weight norms after it.

    Args:
        params: parameters or parameter groups.
        lr: learning rate eta.
        momentum: heavy-ball coefficient; 0 for plain SGD.
        free_steps: updates before the switch; 0 constrains from the start, None waits for `constrain()`.
        fused: compiled constrained update on the CPU; None where it is possible, False never.

    The free phase is torch's own SGD, bit for bit. A constrained update, for each weight w with norm c:
        g <- g - w (w.g) / c^2;  b <- momentum b + g;  r = b - w (w.b) / c^2;  w <- w - lr r, rescaled to ||w|| = c.

    A param group with constrain=False may have `weight_decay`, added to the gradient as in torch's SGD (L2).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        free_steps: int | None = None,
        fused: bool | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum}, free_steps, fused)

    def _state_of(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Momentum buffers."""
        for p in params:
            if self.state[p].get("momentum_buffer") is None:  # torch's SGD has None where there is no momentum
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return fitting(group, params, [self.state[p]["momentum_buffer"] for p in params])

    def _free_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers: list[Tensor | None] = [*self._state_of(group, params)]
        sgd(
            params,
            gradients(params),
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def _constrained_update(self, part: GroupUpdate) -> Tensor | None:
        group = part.group
        buffers = self._state_of(group, part.params)
        blocks = update.Blocks(part.params, part.sizes, part.norms, gradients(part.params), buffers, [])
        return update.sgd(blocks, lr=group["lr"], momentum=group["momentum"], fused=group["fused"])
