"""Adam-LAWN (paper, Algorithm 1)."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from lawn.optim import cpu_kernels, dispatch, sharding, stages, update
from lawn.optim.base import LAWNOptimizer, counter
from lawn.optim.blocks import Blocks
from lawn.optim.checks import ADAM_STATE, BaseRule, check_adam
from lawn.optim.group_update import GroupUpdate, check_shapes, gradients
from lawn.optim.rounding import in_float32, streams


class AdamLAWN(LAWNOptimizer):
    """Adam-LAWN: Adam in the free phase, projected Adam on fixed weight norms after it.

    The free phase is torch's Adam, bit for bit. At the switch the norm c of each weight with two or more dimensions is
    fixed. From then on an update of a weight w with gradient g is

        g <- g - w (w.g) / c^2
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        r <- m_hat / (sqrt(v_hat) + eps)
        r <- r - w (w.r) / c^2
        w <- w - lr r
        w <- c w / ||w||

    with the bias-corrected moments m_hat and v_hat. Other parameters keep Adam's update.

    LAWN replaces weight decay. Only groups with `constrain=False` may have `weight_decay`, which is decoupled from the
    gradient and multiplied by lr, as in AdamW.

    Args:
        params: parameters, named parameters or param groups, of any shapes.
        lr: learning rate eta.
        betas: decay rates beta1 and beta2 of the moments.
        eps: added to sqrt(v_hat). The default is that of the paper's section 4 (for its plain Adam it is 1e-8).
        free_steps: number of updates before the switch; 0 constrains from the start, None waits for `constrain`.
        fused: whether compiled code may be used: None where it is available, True with a warning where it cannot be
            built, False never.
        rounding: how updated bfloat16 and float16 weights are rounded. "stochastic" lets small updates act on average;
            other dtypes do not change.

    Raises:
        ValueError: if a hyperparameter is out of range, or a param group has an unsupported key or weight decay on
            constrained parameters.
        TypeError: if constrained parameters are flat parameters of FullyShardedDataParallel or DeepSpeed's ZeRO, are
            DTensors with `norm_axes`, or cannot be flattened; or parameters are DTensors with a Partial placement.

    References:
        Gupta et al. 2021, Algorithm 1, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import AdamLAWN
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamLAWN([w], lr=0.1, free_steps=0)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     w[0, 0].backward()
        ...     optimizer.step()
        >>> bool(w[0, 0] < 3), round(w.norm().item(), 4)
        (True, 5.0)
    """

    _base_rule = BaseRule("betas", ADAM_STATE, decoupled=True)
    _trust: ClassVar[bool] = False  # whether constrained updates have LAMB's trust ratios

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        free_steps: int | None = None,
        fused: bool | None = None,
        rounding: str = "nearest",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, free_steps, fused, rounding)

    def _check_values(self, group: dict[str, Any]) -> None:
        super()._check_values(group)
        check_adam(group)

    def _state_of(self, group: dict[str, Any], params: list[Tensor]) -> Any:
        return moments(self, params, group)

    def _free_update(self, group: dict[str, Any], params: list[Tensor], idle: list[Tensor]) -> stages.Pending | None:
        first, second, steps = self._state_of(group, params)
        beta1, beta2 = group["betas"]
        lists = sharding.local(params), gradients(params), first, second
        with in_float32(self, group, params, *lists) as (weights, grads, first, second):
            adam(
                weights,
                grads,
                first,
                second,
                [],
                steps,
                fused=self._may_fuse(group, weights, grads, first, second) or None,
                amsgrad=False,
                capturable=torch.compiler.is_compiling(),
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                has_complex=any(w.is_complex() for w in weights),
                decoupled_weight_decay=True,
            )
        return None

    def _constrained_update(self, group_update: GroupUpdate) -> Tensor | None:
        group = group_update.group
        blocks, corrections = self._begin(group_update)
        backend = dispatch.backend(blocks, group["fused"])
        options = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"]}
        return backend.adam(blocks, corrections, trust=self._trust, **options)

    def _sharded_update(self, part: GroupUpdate) -> stages.Pending:
        group = part.group
        beta1, beta2 = group["betas"]
        options = {"lr": group["lr"], "eps": group["eps"], "trust": self._trust, "fused": group["fused"]}
        return stages.step(part, *self._begin(part), factors=(beta1, 1 - beta1, beta2, 1 - beta2), **options)

    def _begin(self, group_update: GroupUpdate) -> tuple[Blocks, Tensor]:
        """Count the update; return the blocks, local shards of DTensors, and the bias corrections."""
        group, params = group_update.group, group_update.params
        first, second, steps = self._state_of(group, params)
        torch._foreach_add_(steps, counter(1.0), alpha=1.0)  # several times as fast as adding a number on the CPU
        lists = sharding.local(params), group_update.sizes, group_update.norms, gradients(params), first, second
        blocks = Blocks(*lists, streams(self, group, params), group_update.slice_axes)
        blocks.share_largest(steps)
        return blocks, update.bias_corrections(blocks, steps, group["betas"])

    @staticmethod
    def _may_fuse(group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Whether torch's fused Adam, which assumes equal strides, replaces its default on the CPU, a loop."""
        if group["fused"] is False or torch.compiler.is_compiling():
            return False
        return all(p.is_cpu and p.is_floating_point() for p in lists[0]) and cpu_kernels.same_layout(*lists)


def moments(
    optimizer: torch.optim.Optimizer, params: list[Tensor], group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return moments, local shards of DTensors, and step counters, as torch's Adam keeps them; make what is missing."""
    for p in params:
        if "step" not in optimizer.state[p]:
            optimizer.state[p] |= {
                "step": counter(0.0),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }
    states = [optimizer.state[p] for p in params]
    first, second = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
    return check_shapes(group, params, first), check_shapes(group, params, second), [s["step"] for s in states]
