"""What the LAWN optimizers of this package share: two phases, an update for each."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import keys, phase
from lawn.optim.zero_check import ZeroCheck

# Keys of torch's optimizers that do not say what an update is, or say what it is here anyway.
IMPLEMENTATION = {"foreach", "capturable", "differentiable", "decoupled_weight_decay"}


class LAWNOptimizer(Optimizer, ABC):
    """Trains freely for `free_steps` updates, then on the product of spheres ||w_l|| = c_l (paper section 3).

    A subclass supplies the update of each phase. `lawn.optim.keys` documents the keys that the param groups have for
    it, and where the norms are. Two more keys: `fused`, whether updates run in compiled code (None: where that is
    possible), and `weight_decay`, which must be 0 in a group that has constrained parameters, in either phase.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], free_steps: int | None, fused: bool | None) -> None:
        if defaults["lr"] < 0:
            raise ValueError(f"lr must not be negative, got {defaults['lr']}")
        free_steps = keys.checked_steps(free_steps)
        self._watch = ZeroCheck()
        super().__init__(params, {**defaults, "weight_decay": 0.0, "free_steps": free_steps, "fused": fused})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch = ZeroCheck()
        keys.restore(self.state)
        for kept in self.state.values():
            if "step" in kept:  # on the host, where reading it waits for nothing
                step = kept["step"]
                kept["step"] = step.cpu() if isinstance(step, Tensor) else counter(float(step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` has returned, of this optimizer or of the one it is in the free phase.

        Keys of the param groups that another optimizer does not have stay as they are here. Raises ValueError where a
        group asks for what this optimizer does not do.
        """
        groups = []
        for index, group in enumerate(state_dict["param_groups"]):
            known = {key: value for key, value in group.items() if key not in IMPLEMENTATION}
            self._refuse(known, index)
            groups.append({key: value for key, value in known.items() if key not in self._foreign()})
        state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(keys.completed(state_dict, self.param_groups, self._keys()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = "free_steps" in param_group
        index = len(self.param_groups)
        self._refuse(param_group, index)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if not given:
            del added["free_steps"]
        try:
            keys.prepare(self.param_groups, index, self.defaults["free_steps"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def constrained(self) -> bool:
        """Whether weight norms are fixed: whether a param group is in its second phase."""
        return keys.is_constrained(self.param_groups)

    def constrain(self, *, again: bool = False) -> None:
        """Fix the norm of every constrained weight at its present value (equation 1).

        With `again`, norms that are fixed already are replaced: call it after other weights have been put under the
        optimizer (a checkpoint, an average, a layer that was initialized anew), which it would otherwise rescale to the
        norms of those before. A weight that the optimizer has not updated yet takes its norm with its first update.
        Moments and schedule are left as they are.

        Raises ValueError when all norms are fixed already, when there is nothing to constrain, and when a norm is zero
        or not finite; then nothing has changed.
        """
        phase.constrain(self, again=again)

    @torch._disable_dynamo(recursive=False)  # a compiled model in the closure stays compiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; a group switches phase first when its `free_steps` are
        done.

        Raises ValueError, naming the parameter, when a norm cannot be fixed or a constrained weight has become zero (on
        a GPU one or two updates later).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler at once
    @torch.no_grad()
    def _update(self) -> None:
        if phase.is_dummy(self):
            self._make_state()
            return
        phase.refuse_capture()
        seen = []
        for index, part in enumerate(self._watch.begin(self)):
            if part.free:
                self._free_update(part.group, part.free)
            seen += [(kind, index, self._constrained_update(kind)) for kind in part.kinds()]
            part.record(self.state)
        for kind, index, zero in seen:
            self._watch.look(kind, index, zero)

    def _make_state(self) -> None:
        """What an update would have made."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._state_of(group, params)
            for p in params:
                self.state[p].setdefault(keys.NORM, 0.0)

    def _refuse(self, group: dict[str, Any], index: int) -> None:
        """Raise ValueError for a key of a param group that is set, and means nothing here."""
        for key, value in group.items():
            if key in self._foreign() and value:
                raise ValueError(f"param group {index}: {type(self).__name__} has no {key}, got {key}={value!r}")
            close = get_close_matches(key, ("constrain", "free_steps"), n=1, cutoff=0.85)
            if close and key not in close:
                raise ValueError(f"param group {index}: unknown key {key!r}; did you mean {close[0]!r}?")

    def _keys(self) -> list[str]:
        return [*dict.fromkeys((*self.defaults, *keys.DEFAULTS))]

    def _foreign(self) -> set[str]:
        return torchs_keys() - set(self._keys())

    @abstractmethod
    def _state_of(self, group: dict[str, Any], params: list[Tensor]) -> Any:
        """The state of these parameters, made where it is missing."""

    @abstractmethod
    def _free_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update `params`, which all have a gradient, as the base optimizer does."""

    @abstractmethod
    def _constrained_update(self, part: phase.GroupUpdate) -> Tensor | None:
        """Update the constrained parameters, each on the sphere of its norm; which blocks are zero, as in `update`."""


def counter(steps: float) -> Tensor:
    """A step counter as torch's Adam has it: whatever the default dtype, one that counts on."""
    wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(steps, dtype=wide, device="cpu")


@cache
def torchs_keys() -> set[str]:
    """The keys that torch's optimizers know in a param group."""
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    return {name for kind in kinds for name in signature(kind).parameters} - {"params", "defaults"}
