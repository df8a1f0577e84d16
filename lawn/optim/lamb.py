"""LAMB (You et al. 2020), LAMB+ and LAMB-LAWN."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import ParamsT

from lawn.optim import rounding, sharding, slices, stages
from lawn.optim.adam_lawn import AdamLAWN
from lawn.optim.checks import (
    ADAM_STATE,
    IGNORED_KEYS,
    BaseRule,
    check_adam,
    check_not_negative,
    check_options,
    torch_keys,
)
from lawn.optim.group_update import check_dense
from lawn.optim.keys import FLAT, holds_flat
from lawn.optim.lamb_update import lamb
from lawn.optim.step_hooks import hook_owners

BASE_RULE = BaseRule("betas", ADAM_STATE)
IGNORED_WHEN_LOADED = {*IGNORED_KEYS, "fused"}  # keys of param groups


class LAMB(Optimizer):
    """LAMB: Adam with a layerwise trust ratio.

    Implementations of LAMB differ. This one follows Algorithm 2 of You et al.: bias-corrected moments, weight decay
    added to the Adam update r before the trust ratio ||w|| / ||r + decay w|| is computed, their phi the identity, a
    ratio of 1 where either norm is zero, and a ratio for every parameter, or every slice where a param group has
    `norm_axes`. It does not clip gradients. (timm's Lamb clips the global gradient norm to 1 and has no ratio for
    parameters without decay.)

    Args:
        params: parameters, named parameters or param groups, of any shapes.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the square root of the second moment. The default is that of the paper's section 4.
        weight_decay: coefficient of the weight in the update, inside the trust ratio.

    Raises:
        ValueError: if a hyperparameter is out of range, or a param group sets an option of torch's Adam or SGD that
            LAMB lacks.

    References:
        You et al. 2020, Algorithm 2, [arXiv:1904.00962](https://arxiv.org/abs/1904.00962).

    Examples:
        >>> import torch
        >>> from lawn import LAMB
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LAMB([w], lr=0.1, eps=0.0)
        >>> w.grad = torch.tensor([[2.0, 7.0]])
        >>> optimizer.step()  # the update is 5 / sqrt(2) [1, 1]
        >>> w
        Parameter containing:
        tensor([[2.6464, 3.6464]], requires_grad=True)
    """

    max_trust: float = float("inf")
    trust_vectors: bool = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group.

        Args:
            param_group: the group, with `params` and any keys of its own.

        Raises:
            ValueError: if a hyperparameter is out of range, or an option of torch's Adam or SGD that LAMB lacks is set.
        """
        self._check_group(param_group, len(self.param_groups))
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer.

        Without `LAWN` on it, that of LAMB-LAWN in its second phase is a warning.

        Args:
            state_dict: result of the optimizer's `state_dict`.

        Raises:
            ValueError: if the state dict is of an optimizer with another rule, or sets an option that LAMB lacks.
        """
        hook = self.register_load_state_dict_pre_hook(self._check_loaded)  # comes after those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _check_loaded(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        for index, group in enumerate(state_dict["param_groups"]):
            self._check_group({key: value for key, value in group.items() if key not in IGNORED_WHEN_LOADED}, index)
            if group.get("switched") and not any(hasattr(owner, "constrain") for owner in hook_owners(self)):
                name = type(self).__name__
                warnings.warn(f"the state is of LAMB-LAWN with fixed norms, which {name} does not keep", stacklevel=3)
        BASE_RULE.check(self, state_dict)

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        check_options(self, group, index, torch_keys(Adam, SGD) - {*self.defaults})
        slices.check(group.get(slices.KEY), f"param group {index}: ")
        if group.get(rounding.KEY, "nearest") != "nearest":
            name = type(self).__name__
            raise ValueError(f"param group {index}: {name} rounds to nearest, got rounding={group[rounding.KEY]!r}")
        values = {**self.defaults, **group}
        check_not_negative(values, "lr", "weight_decay")
        check_adam(values)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            TypeError: if a gradient is sparse, parameters are flat parameters of FullyShardedDataParallel, or a param
                group has `norm_axes` for DTensors.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = []
        for index, group in enumerate(self.param_groups):
            if holds_flat(group):
                raise TypeError(f"param group {index} holds flat parameters of FullyShardedDataParallel, {FLAT}")
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                check_dense(p, p.grad, "LAMB")
            idle = [p for p in group["params"] if p.grad is None and p.requires_grad and sharding.is_dtensor(p)]
            pending.append(lamb(self, group, params, idle, self.max_trust, self.trust_vectors))
        stages.finish_free([waiting for waiting in pending if waiting is not None])
        return loss


class LAMBPlus(LAMB):
    """LAMB+: LAMB with a trust ratio of at most 10, and of 1 for parameters with fewer than two dimensions.

    The appendix that describes the paper's LAMB+ is not public; this is an interpretation of it. Parameters with fewer
    than two dimensions are biases and those of normalization layers.

    Args:
        params: parameters, named parameters or param groups, of any shapes.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the square root of the second moment.
        weight_decay: coefficient of the weight in the update, inside the trust ratio.

    Raises:
        ValueError: if a hyperparameter is out of range.

    References:
        Gupta et al. 2021, section 4, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import LAMBPlus
        >>> bias = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMBPlus([bias], lr=0.1, eps=0.0)
        >>> bias.grad = torch.tensor([2.0, 7.0])
        >>> optimizer.step()  # the update is Adam's, [1, 1]
        >>> bias
        Parameter containing:
        tensor([2.9000, 3.9000], requires_grad=True)
    """

    max_trust = 10.0
    trust_vectors = False


class LAMBLAWN(AdamLAWN):
    """LAMB-LAWN: LAMB without weight decay in the free phase, projected LAMB on fixed weight norms after it.

    A constrained update is that of `AdamLAWN` with its learning rate multiplied by the trust ratio c / ||r|| of the
    projected update r, so that each weight turns by about lr radians per update. With `norm_axes` the trust ratios of
    both phases are of slices. Other parameters keep LAMB's update.

    LAWN replaces weight decay. Only groups with `constrain=False` may have `weight_decay`, which is added to the update
    inside the trust ratio, as in LAMB.

    Args:
        params: parameters, named parameters or param groups, of any shapes.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the square root of the second moment.
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
        - Gupta et al. 2021, section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).
        - You et al. 2020, Algorithm 2, [arXiv:1904.00962](https://arxiv.org/abs/1904.00962).

    Examples:
        >>> import torch
        >>> from lawn import LAMBLAWN
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = LAMBLAWN([w], lr=0.1, free_steps=0)
        >>> w.grad = torch.tensor([[0.0, -1.0]])
        >>> optimizer.step()
        >>> w  # turned by atan(0.1)
        Parameter containing:
        tensor([[0.9950, 0.0995]], requires_grad=True)
    """

    _base_rule = BASE_RULE
    _trust = True

    def _free_update(self, group: dict[str, Any], params: list[Tensor], idle: list[Tensor]) -> stages.Pending | None:
        return lamb(self, group, params, idle, float("inf"), True)
