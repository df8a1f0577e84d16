"""Base class of the LAWN optimizers: two phases, with an update rule for each."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import ParamsT

from lawn.optim import keys, loading, phase, rounding, stages
from lawn.optim.blocks import batch_elements
from lawn.optim.checks import IGNORED_KEYS, BaseRule, check_not_negative, check_options, check_spelling, torch_keys
from lawn.optim.group_update import GroupUpdate
from lawn.optim.norms import is_known, layouts
from lawn.optim.zero_check import ZeroCheck

ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


class LAWNOptimizer(Optimizer, ABC):
    """Base class of the LAWN optimizers.

    It trains without constraints for `free_steps` updates, then on the product of spheres ||w_l|| = c_l, where c_l is
    the norm of weight l at the switch. A subclass implements `_state_of`, `_free_update`,
    `_constrained_update` and `_sharded_update`, and may have a `_base_rule` that state dicts have to follow.

    The param groups have the keys that `lawn.optim.keys` documents, `fused`, and `weight_decay`, which must be 0 in
    groups with constrained parameters, in both phases. All keys of a group apply to that group alone.

    Args:
        params: parameters, named parameters or param groups.
        defaults: defaults of the base optimizer's hyperparameters, `lr` among them.
        free_steps: number of updates before the switch; 0 constrains from the start, None waits for `constrain`.
        fused: whether compiled code may be used: None where it is available, True with a warning where it cannot be
            built, False never.
        mode: "nearest" or "stochastic" rounding of updated weights to half precision, the group key `rounding`.

    Raises:
        ValueError: if a hyperparameter is out of range, `free_steps` is not a non-negative integer or None, `mode` is
            unknown, or a param group has an unsupported key or weight decay on constrained parameters.
        TypeError: if constrained parameters are flat parameters of FullyShardedDataParallel or DeepSpeed's ZeRO, are
            DTensors with `norm_axes`, or cannot be flattened; or parameters are DTensors with a Partial placement.

    References:
        Gupta et al. 2021, section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import SGDLAWN
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = SGDLAWN([w], lr=0.1, free_steps=1)
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([[0.0, 1.0]])
        ...     optimizer.step()
        ...     print(optimizer.constrained, round(optimizer.state[w]["lawn_norm"], 3))
        False 0.0
        True 4.92
    """

    _base_rule: ClassVar[BaseRule] = BaseRule("lr")

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        free_steps: int | None,
        fused: bool | None,
        mode: str = "nearest",
    ) -> None:
        rounding.check(mode)
        free_steps = keys.check_free_steps(free_steps)
        self._known: phase.KnownBlocks = {}
        self._zero_check = ZeroCheck()
        self._may_trace = False  # set by a step that is not traced, which makes state and compares loaded norms
        self._had_weights = False
        defaults = {**defaults, "weight_decay": 0.0, "free_steps": free_steps, "fused": fused}
        super().__init__(params, defaults if mode == "nearest" else {**defaults, rounding.KEY: mode})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "known": self._known}  # a copy has the same parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != "known"})
        self._known = dict(state.get("known", {}))  # none are known after `load_state_dict`
        self._zero_check = ZeroCheck()
        self._may_trace = False
        self._had_weights = getattr(self, "_had_weights", False) or keys.has_weights(self.param_groups)
        loading.restore_norms(self.state)
        for _, entry in keys.entries(self.state):
            if "step" in entry:  # on the host, so that reading it does not wait for the device
                step = entry["step"]
                entry["step"] = step.cpu() if isinstance(step, Tensor) else counter(float(step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the optimizer that it equals in the free phase.

        Keys of param groups that the other optimizer does not have keep their values, and so does `fused`.

        Args:
            state_dict: result of the optimizer's `state_dict`.

        Raises:
            ValueError: if the state dict is of an optimizer with another rule, or a group sets an option that this
                optimizer does not support.
        """
        hook = self.register_load_state_dict_pre_hook(self._complete_state_dict)  # comes after those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _complete_state_dict(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = []
        for index, group in enumerate(state_dict["param_groups"]):
            known = {key: value for key, value in group.items() if key not in IGNORED_KEYS}
            own = self.param_groups[index] if index < len(self.param_groups) else {}
            unsupported = self._unsupported_keys() | (torch_keys() - {*own, *self._supported_keys()})
            self._check_keys(known, index, unsupported)
            self._check_values({**self.defaults, **known})
            kept = {key: value for key, value in known.items() if key not in unsupported}
            groups.append({**kept, "fused": own.get("fused")})  # how a step is computed, not what
        self._base_rule.check(self, state_dict)
        state_dict = {**state_dict, "param_groups": groups}
        return loading.complete_state_dict(state_dict, self.param_groups, self._supported_keys())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group.

        After the first step it starts in the phase of the other groups and switches with the last of them, unless it
        has its own `free_steps`, which are counted from then on.

        Args:
            param_group: the group, with `params` and any keys of its own.

        Raises:
            ValueError: if a key is not supported or a hyperparameter is out of range, or constrained parameters have
                weight decay.
            TypeError: if parameters cannot be updated, as in the constructor.
        """
        given = "free_steps" in param_group
        if sys._getframe(1).f_globals["__name__"] == ZERO:  # which fills in its default
            given = given and param_group["free_steps"] != self.defaults["free_steps"]
        index = len(self.param_groups)
        self._check_keys(param_group, index, self._unsupported_keys())
        check_spelling(param_group, index, {*self._supported_keys()} - keys.RUN)
        try:
            self._check_values({**self.defaults, **param_group})
        except ValueError as error:
            raise ValueError(f"param group {index}: {error}") from None
        if keys.RUN & param_group.keys():  # another optimizer may have the dict
            param_group = keys.without_run(param_group)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if not given:
            del added["free_steps"]
        try:
            keys.add_defaults(self.param_groups, index, self.defaults["free_steps"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._had_weights |= keys.has_weights([added])

    @property
    def constrained(self) -> bool:
        """Whether weight norms are fixed, that is whether a param group is in its second phase."""
        return keys.is_constrained(self.param_groups)

    def constrain(self, *, again: bool = False) -> None:
        """Fix the norm of each constrained weight at its present value (equation 1).

        The norm of a weight that the optimizer has not updated yet is fixed at its first update. Moments and learning
        rates do not change.

        Args:
            again: whether norms that are fixed already are replaced as well. Use it after other weights were loaded
                into the model (a checkpoint, an average, a newly initialized layer), which would be rescaled to the old
                norms.

        Raises:
            ValueError: if all norms are fixed already, no parameter can be constrained, or a norm is zero or not
                finite. Nothing has changed then.

        Examples:
            >>> import torch
            >>> from lawn import AdamLAWN
            >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
            >>> optimizer = AdamLAWN([w], free_steps=None)
            >>> optimizer.constrain()
            >>> optimizer.constrained
            True
        """
        phase.constrain(self, self._known, again=again)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients.

        A param group switches phase first if it has completed its `free_steps`.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            ValueError: if a norm cannot be fixed or is not that of its weight, a constrained weight has become zero (on
                a GPU one or two updates later) or shares memory, or a param group has become invalid. The message names
                the parameter or the group.
            TypeError: if a parameter has a sparse gradient, or a DTensor a gradient that is none, or a parameter cannot
                be updated.
            RuntimeError: if state has another shape or sharding than its parameter, or a CUDA graph is being captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_updates = self._traceable() if torch.compiler.is_compiling() and self._may_trace else None
        if group_updates is None:
            self._update()
        else:
            self._traced_update(group_updates)
        return loss

    @torch.no_grad()
    def _traced_update(self, group_updates: list[GroupUpdate]) -> None:
        for group_update in group_updates:
            self._update_group(group_update)
            if keys.is_due(group_update.group):
                group_update.group["switched"] = True
            group_update.group["steps"] += 1

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler at once
    @torch.no_grad()
    def _update(self) -> None:
        if phase.is_dummy(self):
            self._make_state()
            return
        phase.check_capture()
        keys.check_not_flattened(self.param_groups, self._had_weights)
        self._unsupported = self._unsupported_keys() - IGNORED_KEYS  # kept for steps that are traced
        for index, group in enumerate(self.param_groups):
            self._check_keys(group, index, self._unsupported)
        results: list[tuple[GroupUpdate, Tensor | None]] = []
        pending: list[tuple[GroupUpdate, stages.Pending]] = []
        self._zero_check.check_pending()
        for group_update in phase.begin_step(self, self._known):
            updated, waiting = self._update_group(group_update)
            results += updated
            pending += waiting
            group_update.record(self.state)
        for part, zero in [*results, *stages.finish(pending)]:
            self._zero_check.check(part, zero)
        self._may_trace = all(isinstance(group["lr"], Tensor) for group in self.param_groups)

    def _update_group(
        self, group_update: GroupUpdate
    ) -> tuple[list[tuple[GroupUpdate, Tensor | None]], list[tuple[GroupUpdate, stages.Pending]]]:
        """Update a group.

        Returns the constrained parameters by device and dtype with the mask of their zero blocks, and the updates that
        wait for sums over ranks.
        """
        group, free, idle = group_update.group, group_update.free, group_update.idle
        pending = []
        if free or idle:
            limit = batch_elements((free or idle)[0].device)
            for params, others in rounding.parts(group, free, idle, limit):
                waiting = self._free_update(group, params, others)
                if waiting is not None:
                    pending.append((group_update, waiting))
        singles = group_update.split_by_device_and_dtype()
        updated = [(single, self._constrained_update(single)) for single in singles]
        pending += [(part, self._sharded_update(part)) for part in group_update.sharded if part.params]
        return updated, pending

    def _traceable(self) -> list[GroupUpdate] | None:
        """Collect what a step updates if torch.compile can trace the step; None otherwise.

        State is made, norms are fixed and errors are raised by steps that are not traced.
        """
        try:
            for index, group in enumerate(self.param_groups):
                keys.check_group(group, index)
                self._check_keys(group, index, self._unsupported)
        except (TypeError, ValueError):
            return None
        group_updates = [phase.collect(group, k, self.state) for k, group in enumerate(self.param_groups)]
        for group_update in group_updates:
            params = [*group_update.free, *group_update.params]
            known = all(is_known(self._known, layout) for layout in layouts(group_update))
            if group_update.has_dtensors or group_update.slice_axes or not known:
                return None
            norms = group_update.norms
            if not all(self.state.get(p) for p in params) or any(isinstance(c, Tensor) for c in norms) or 0.0 in norms:
                return None
        return group_updates

    def _make_state(self) -> None:
        """Initialize the state that an update would initialize."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._state_of(group, params)
            rounding.make_seeds(self, group, params)
            for p in params:
                self.state[p].setdefault(keys.NORM, keys.free_norm(group, p))

    def _check_keys(self, group: dict[str, Any], index: int, unsupported: set[str]) -> None:
        """Raise ValueError for a key of a param group that is set but `unsupported`."""
        rounding.check(group.get(rounding.KEY, "nearest"), f"param group {index}: ")
        check_options(self, group, index, unsupported)

    def _check_values(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a hyperparameter of a param group that is out of range."""
        check_not_negative(group, "lr", "weight_decay")

    def _supported_keys(self) -> list[str]:
        return [*dict.fromkeys((*self.defaults, rounding.KEY, *keys.KEYS))]

    def _unsupported_keys(self) -> set[str]:
        """Options of Adam and SGD that this optimizer lacks. Other keys may be those of the user or of a wrapper."""
        return torch_keys(Adam, SGD) - set(self._supported_keys())

    @abstractmethod
    def _state_of(self, group: dict[str, Any], params: list[Tensor]) -> Any:
        """Return the state of the parameters; initialize what is missing."""

    @abstractmethod
    def _free_update(self, group: dict[str, Any], params: list[Tensor], idle: list[Tensor]) -> stages.Pending | None:
        """Update parameters of a group, which all have gradients, with the base optimizer's rule.

        `idle` are trainable DTensors without a gradient on this rank, which take part in sums over ranks. Returns the
        part of the update that waits for such sums, if there is one.
        """

    @abstractmethod
    def _constrained_update(self, group_update: GroupUpdate) -> Tensor | None:
        """Update constrained parameters of one device and dtype, each block on the sphere of its norm.

        Returns a mask [blocks] of the blocks that are zero, or None if no block is zero.
        """

    @abstractmethod
    def _sharded_update(self, part: GroupUpdate) -> stages.Pending:
        """Begin the update of constrained blocks that hold DTensors, of one device and dtype."""


def counter(steps: float) -> Tensor:
    """Create a step counter as torch's Adam does; half precision as the default dtype would stop it from counting."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(steps, dtype=dtype, device="cpu")
