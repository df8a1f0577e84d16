"""LAMB (You et al. 2020), the LAMB+ of this project, and LAMB-LAWN.

LAMBs differ. This one follows Algorithm 2 of You et al.: bias-corrected moments, decay added to the Adam update r
before the trust ratio ||w|| / ||r + decay w|| is taken, identity for their phi, a ratio of 1 where either norm is
zero, for every parameter, and no clipping of the gradient. (timm's Lamb clips the global gradient norm to 1 and skips
the ratio where there is no decay.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim.adam_lawn import AdamLAWN, check_adam, moments
from lawn.optim.phase import GroupUpdate, gradients
from lawn.optim.update import real


class LAMB(Optimizer):
    """LAMB as written: a trust ratio for every parameter.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment; 1e-6 as in section 4 of the paper.
        weight_decay: added to the update, inside the trust ratio.
    """

    max_trust: float = float("inf")
    trust_vectors: bool = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        check_adam(betas, eps)
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise TypeError("LAMB does not support sparse gradients")
            if params:
                lamb(self, group, params, group["weight_decay"], self.max_trust, self.trust_vectors)
        return loss


class LAMBPlus(LAMB):
    """LAMB with the trust ratio at most 10, and 1 for biases and norm-layer parameters (fewer than two dimensions).

    The paper's LAMB+ is described in an appendix that is not public; this is this project's reading of it.
    """

    max_trust = 10.0
    trust_vectors = False


class LAMBLAWN(AdamLAWN):
    """LAMB without decay in the free phase, projected LAMB on fixed weight norms after it.

    Args: as for `AdamLAWN`. The constrained update is Adam-LAWN's with the rate multiplied by the trust ratio
    c / ||r|| of the projected r, so a weight turns by about lr radians at each step.

    A param group with constrain=False may have `weight_decay`, which is LAMB's: decoupled from the gradient, added to
    the update inside the trust ratio.
    """

    def _free_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lamb(self, group, params, group["weight_decay"], float("inf"), True)

    def _constrained_update(self, part: GroupUpdate) -> Tensor | None:
        return self._constrained_adam(part, trust=True)


def lamb(
    optimizer: Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    weight_decay: float,
    max_trust: float,
    trust_vectors: bool,
) -> None:
    """One step of LAMB on parameters that have a gradient."""
    first, second, steps = moments(optimizer, params, group)
    ndims = [p.ndim for p in params]
    first, second, grads, params = map(real, (first, second, gradients(params), params))
    beta1, beta2 = group["betas"]
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    counts = [step.item() for step in steps]  # kept on the host: no synchronization
    roots = torch._foreach_sqrt(torch._foreach_div(second, [1 - beta2**t for t in counts]))
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_mul_(roots, [1 - beta1**t for t in counts])
    updates = torch._foreach_div(first, roots)
    if weight_decay:
        torch._foreach_add_(updates, params, alpha=weight_decay)
    weight_norms, update_norms = torch._foreach_norm(params), torch._foreach_norm(updates)
    for p, ndim, r, w_norm, r_norm in zip(params, ndims, updates, weight_norms, update_norms, strict=True):
        if trust_vectors or ndim >= 2:
            ratio = torch.where((w_norm > 0) & (r_norm > 0), w_norm / r_norm, 1.0).clamp(max=max_trust)
            r = r * ratio
        p.sub_(r * group["lr"])
