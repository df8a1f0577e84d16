"""Learning rate schedules with linear warmup."""

import warnings
from math import inf
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class LinearWarmup(LRScheduler):
    """Linear warmup to the initial learning rate of each param group, which then stays constant.

    Update t (from 0) uses the initial learning rate times (t + 1) / (warmup_steps + 1) during warmup, so the first
    update has a positive learning rate. Call `step` after each step of the optimizer. A param group that is added
    between the two follows the schedule, too. Each learning rate is computed anew, not from the one before, so join
    schedules with `SequentialLR`; `ChainedScheduler` loses the factors of others.

    Args:
        optimizer: optimizer whose learning rates are scheduled.
        warmup_steps: number of updates below the initial learning rate.

    Raises:
        ValueError: if `warmup_steps` is negative or not finite.
        TypeError: if `optimizer` is no torch optimizer, such as `lawn.LAWN`, which wraps one.

    Examples:
        >>> import torch
        >>> from lawn.optim import LinearWarmup
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = LinearWarmup(optimizer, warmup_steps=1)
        >>> for _ in range(3):
        ...     print(schedule.get_last_lr())
        ...     optimizer.step()
        ...     schedule.step()
        [0.5]
        [1.0]
        [1.0]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        if not 0 <= warmup_steps < inf:
            raise ValueError(f"need 0 <= warmup_steps, got {warmup_steps}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is no torch optimizer; schedule the one that it wraps")
        self.warmup_steps = warmup_steps
        self._groups = _with_params(optimizer.param_groups)  # of `base_lrs`
        _separate_default(optimizer)
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        """Compute the factor of the initial learning rate for update t (from 0).

        Args:
            t: index of the update.

        Returns:
            A factor in [0, 1].
        """
        return min(1.0, (t + 1) / (self.warmup_steps + 1))

    def get_lr(self) -> list[float | Tensor]:
        """Compute the learning rate of each param group for the next update.

        Returns:
            One learning rate for each group. The initial one of a group that was added since the last call is its
                present one, or that of a group which has the same tensor.
        """
        groups = self.optimizer.param_groups
        places = [self._place(group) for group in groups]
        if all(place is None for place in places):  # all were replaced, by others in the same order
            places = [*range(len(groups))]
        old = dict(enumerate(self.base_lrs))
        known = {i: old[place] for i, place in enumerate(places) if place is not None and place in old}
        if len(known) < len(groups):
            _separate_default(self.optimizer)
        for i, group in enumerate(groups):
            known.setdefault(i, self._base_lr(group, known))
        self._groups, self.base_lrs = _with_params(groups), [known[i] for i in range(len(groups))]
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def _place(self, group: dict[str, Any]) -> int | None:
        """The place of a group in `base_lrs`; None of one that was added."""
        for place, (known, params) in enumerate(self._groups):
            if group is known or group["params"] is params:  # after a load it is another dict with the same list
                return place
        return None

    def _base_lr(self, group: dict[str, Any], known: dict[int, float | Tensor]) -> float | Tensor:
        lr: float | Tensor = group["lr"]
        if not isinstance(lr, Tensor):
            return lr
        for i, base in known.items():
            if self.optimizer.param_groups[i]["lr"] is lr:  # the schedule has filled it
                return base
        return lr.clone()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint.

        Returns:
            Numbers and initial learning rates.
        """
        return {key: value for key, value in super().state_dict().items() if key != "_groups"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a schedule with its numbers of steps, as torch's schedules do.

        Warns if they are not those that this schedule was made with: a run that is meant to go on for longer than the
        loaded schedule would train with a learning rate of zero.

        Args:
            state_dict: result of `state_dict`.
        """
        base_lrs = self.base_lrs
        made = {key: value for key, value in vars(self).items() if key in ("warmup_steps", "total_steps")}
        super().load_state_dict(state_dict)
        self._groups = _with_params(self.optimizer.param_groups)
        self.base_lrs = [*self.base_lrs, *base_lrs[len(self.base_lrs) :]]  # of groups that the checkpoint does not know
        for key, value in made.items():
            if getattr(self, key) != value:
                warnings.warn(
                    f"the loaded schedule has {key}={getattr(self, key)}, which replaces {value}; to keep that, set "
                    f"{key} after loading",
                    stacklevel=2,
                )


def _with_params(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Tensor]]]:
    return [(group, group["params"]) for group in groups]


def _separate_default(optimizer: Optimizer) -> None:
    """Give the optimizer's default a tensor of its own: the schedule fills that of a group which has the default."""
    lr = getattr(optimizer, "defaults", {}).get("lr")  # wrappers may have none
    if isinstance(lr, Tensor):
        optimizer.defaults["lr"] = lr.clone()


class LinearWarmupDecay(LinearWarmup):
    """Linear warmup to the initial learning rate of each param group, then linear decay to zero.

    After warmup, update t (from 0) uses the initial learning rate times (total_steps - t) / (total_steps -
    warmup_steps). The learning rate is exactly zero after the last update. The schedule does not restart when LAWN
    switches phase. Call `step` after each step of the optimizer.

    Args:
        optimizer: optimizer whose learning rates are scheduled.
        warmup_steps: number of updates of the warmup.
        total_steps: number of all updates.

    Raises:
        ValueError: unless 0 <= warmup_steps < total_steps, or for infinitely many.
        TypeError: if `optimizer` is no torch optimizer, such as `lawn.LAWN`, which wraps one.

    References:
        Gupta et al. 2021, section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import LinearWarmupDecay
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = LinearWarmupDecay(optimizer, warmup_steps=1, total_steps=5)
        >>> for _ in range(5):
        ...     print(schedule.get_last_lr())
        ...     optimizer.step()
        ...     schedule.step()
        [0.5]
        [1.0]
        [0.75]
        [0.5]
        [0.25]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int) -> None:
        if not 0 <= warmup_steps < total_steps < inf:
            raise ValueError(f"need 0 <= warmup_steps < total_steps, a number, got {warmup_steps} and {total_steps}")
        self.total_steps = total_steps
        super().__init__(optimizer, warmup_steps)

    def factor(self, t: int) -> float:
        if t < self.warmup_steps:
            return super().factor(t)
        return max(0, self.total_steps - t) / (self.total_steps - self.warmup_steps)
