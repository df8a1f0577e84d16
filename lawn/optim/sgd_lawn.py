"""SGD-LAWN: heavy-ball momentum on fixed weight norms."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lawn.optim import dispatch, sharding, stages
from lawn.optim.base import LAWNOptimizer
from lawn.optim.blocks import Blocks
from lawn.optim.checks import BaseRule, check_not_negative
from lawn.optim.group_update import GroupUpdate, check_shapes, gradients
from lawn.optim.rounding import in_float32, streams


class SGDLAWN(LAWNOptimizer):
    """SGD-LAWN: SGD with momentum in the free phase, projected SGD on fixed weight norms after it.

    The free phase is torch's SGD, bit for bit. At the switch the norm c of each weight with two or more dimensions is
    fixed. From then on an update of a weight w with gradient g is

        g <- g - w (w.g) / c^2
        b <- momentum b + g
        r <- b - w (w.b) / c^2
        w <- w - lr r
        w <- c w / ||w||

    Other parameters keep SGD's update.

    LAWN replaces weight decay. Only groups with `constrain=False` may have `weight_decay`, which is added to the
    gradient, as in torch's SGD.

    Args:
        params: parameters, named parameters or param groups, of any shapes.
        lr: learning rate eta.
        momentum: heavy-ball coefficient; 0 for plain SGD.
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
        Gupta et al. 2021, section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import SGDLAWN
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = SGDLAWN([w], lr=0.1, momentum=0.0, free_steps=0)
        >>> w.grad = torch.tensor([[-1.0, 7.0]])
        >>> optimizer.step()  # the tangent component of the gradient is [-4, 3]
        >>> w
        Parameter containing:
        tensor([[3.3831, 3.6816]], requires_grad=True)
    """

    _base_rule = BaseRule("momentum")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        free_steps: int | None = None,
        fused: bool | None = None,
        rounding: str = "nearest",
    ) -> None:
        # torch's SGD, which can load a state dict of this optimizer, needs `dampening` there.
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": 0.0}, free_steps, fused, rounding)

    def _unsupported_keys(self) -> set[str]:
        return super()._unsupported_keys() | {"dampening"}

    def _check_values(self, group: dict[str, Any]) -> None:
        super()._check_values(group)
        check_not_negative(group, "momentum")
        if not group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")

    def _state_of(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Return the momentum buffers, local shards of DTensors; initialize what is missing."""
        for p in params:
            if self.state[p].get("momentum_buffer") is None:  # torch's SGD stores None without momentum
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return check_shapes(group, params, [self.state[p]["momentum_buffer"] for p in params])

    def _free_update(self, group: dict[str, Any], params: list[Tensor], idle: list[Tensor]) -> None:
        lists = sharding.local(params), gradients(params), self._state_of(group, params)
        with in_float32(self, group, params, *lists) as (weights, grads, buffers):
            sgd(
                weights,
                grads,
                [*buffers],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def _constrained_update(self, group_update: GroupUpdate) -> Tensor | None:
        group, params = group_update.group, group_update.params
        buffers = self._state_of(group, params)
        lists = params, group_update.sizes, group_update.norms, gradients(params), buffers
        blocks = Blocks(*lists, streams=streams(self, group, params), slice_axes=group_update.slice_axes)
        return dispatch.backend(blocks, group["fused"]).sgd(blocks, lr=group["lr"], momentum=group["momentum"])

    def _sharded_update(self, part: GroupUpdate) -> stages.Pending:
        group, params = part.group, part.params
        buffers, weights = self._state_of(group, params), sharding.local(params)
        lists = weights, part.sizes, part.norms, gradients(params), buffers
        blocks = Blocks(*lists, streams=streams(self, group, params))
        factors, ones = (group["momentum"], 1.0, 0.0, 0.0), torch.ones(2, len(part.sizes), device="cpu")
        options = {"lr": group["lr"], "fused": group["fused"], "trust": False, "eps": 0.0}
        return stages.step(part, blocks, ones, factors=factors, **options)
