"""Adam-LAWN (paper, Algorithm 1)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from lawn.optim import sphere
from lawn.optim.base import LAWNOptimizer


class AdamLAWN(LAWNOptimizer):
    """Adam in the free phase, projected Adam on fixed weight norms after it.

    Args:
        params: parameters or parameter groups.
        lr: learning rate eta.
        betas: decay rates of the moments m and v.
        eps: added to sqrt(v_hat); 1e-6 as in the paper's section 4 (its plain Adam uses 1e-8).
        free_steps: updates before the switch; 0 constrains from the start, None waits for `constrain()`.

    The free phase is torch's own Adam, bit for bit. A constrained update, for each weight w with norm c:
        g <- g - w (w.g) / c^2;  m, v from g;  r = m_hat / (sqrt(v_hat) + eps);  r <- r - w (w.r) / c^2;
        w <- w - lr r, rescaled to ||w|| = c.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        free_steps: int | None = None,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, free_steps)

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        states = [self.state[p] for p in params]
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [s["step"] for s in states]

    def _free_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        m, v, steps = self._moments(params)
        beta1, beta2 = group["betas"]
        adam(
            params,
            [p.grad for p in params if p.grad is not None],
            m,
            v,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def _constrained_update(self, group: dict[str, Any], params: list[Tensor], norms: list[Tensor]) -> None:
        m, v, steps = self._moments(params)
        beta1, beta2 = group["betas"]
        tangents = sphere.project([p.grad for p in params if p.grad is not None], params, norms)
        g = [t.to(p.dtype) for t, p in zip(tangents, params, strict=True)]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        counts = [s.item() for s in steps]  # on the host: no synchronization
        denominators = torch._foreach_div(torch._foreach_sqrt(v), [math.sqrt(1 - beta2**t) for t in counts])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, [1 - beta1**t for t in counts])
        r = sphere.project(list(torch._foreach_div(m, denominators)), params, norms)
        sphere.move_(params, r, group["lr"], norms)
