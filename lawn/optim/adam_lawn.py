"""Adam-LAWN (paper, Algorithm 1)."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from lawn.optim import cpu_kernels, update
from lawn.optim.base import LAWNOptimizer, counter
from lawn.optim.phase import GroupUpdate, fitting, gradients


class AdamLAWN(LAWNOptimizer):
    """Adam in the free phase, projected Adam on fixed weight norms after it.

    Args:
        params: parameters or parameter groups.
        lr: learning rate eta.
        betas: decay rates of the moments m and v.
        eps: added to sqrt(v_hat); 1e-6 as in the paper's section 4 (its plain Adam uses 1e-8).
        free_steps: updates before the switch; 0 constrains from the start, None waits for `constrain()`.
        fused: updates in one pass on the CPU, constrained ones compiled; None where it is possible, False never.

    The free phase is torch's own Adam, bit for bit. A constrained update, for each weight w with norm c:
        g <- g - w (w.g) / c^2;  m, v from g;  r = m_hat / (sqrt(v_hat) + eps);  r <- r - w (w.r) / c^2;
        w <- w - lr r, rescaled to ||w|| = c.

    A param group with constrain=False may have `weight_decay`, decoupled from the gradient and scaled by lr, as in
    AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        free_steps: int | None = None,
        fused: bool | None = None,
    ) -> None:
        check_adam(betas, eps)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, free_steps, fused)

    def _state_of(self, group: dict[str, Any], params: list[Tensor]) -> Any:
        return moments(self, params, group)

    def _free_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        first, second, steps = self._state_of(group, params)
        beta1, beta2 = group["betas"]
        grads = gradients(params)
        # On a CPU torch's default is one weight after the other, and its fused form takes equal strides for granted.
        on_cpu = all(p.is_cpu and p.is_floating_point() for p in params)
        in_one_pass = group["fused"] is not False and on_cpu and cpu_kernels.alike(params, grads, first, second)
        adam(
            params,
            grads,
            first,
            second,
            [],
            steps,
            fused=in_one_pass or None,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            has_complex=any(p.is_complex() for p in params),
            decoupled_weight_decay=True,
        )

    def _constrained_update(self, part: GroupUpdate) -> Tensor | None:
        return self._constrained_adam(part, trust=False)

    def _constrained_adam(self, part: GroupUpdate, *, trust: bool) -> Tensor | None:
        """The constrained update of Adam-LAWN, and with `trust` of LAMB-LAWN."""
        group = part.group
        first, second, steps = self._state_of(group, part.params)
        torch._foreach_add_(steps, counter(1.0), alpha=1.0)  # on a CPU several times as fast as to add a number
        blocks = update.Blocks(part.params, part.sizes, part.norms, gradients(part.params), first, second)
        how = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"], "fused": group["fused"]}
        return update.adam(blocks, steps, trust=trust, **how)


def check_adam(betas: tuple[float, float], eps: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def moments(
    optimizer: torch.optim.Optimizer, params: list[Tensor], group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """First and second moments and step counters, in torch Adam's own form; made where they are missing."""
    for p in params:
        if "step" not in optimizer.state[p]:
            optimizer.state[p] |= {
                "step": counter(0.0),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }
    states = [optimizer.state[p] for p in params]
    first, second = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
    return fitting(group, params, first), fitting(group, params, second), [s["step"] for s in states]
