"""Checks of hyperparameters and of state dicts."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from inspect import signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
# Keys of the param groups in state dicts of torch that do not change an update, or hold here anyway.
IGNORED_KEYS = {"foreach", "capturable", "differentiable", "decoupled_weight_decay"}


def check_spelling(group: Iterable[str], index: int, known: Collection[str]) -> None:
    """Raise ValueError for a key of a param group that is nearly a `known` one; others are the user's own."""
    for key in group:
        close = get_close_matches(key, known, n=1, cutoff=0.85)
        if close and key not in known:
            raise ValueError(f"param group {index}: unknown key {key!r}; did you mean {close[0]!r}?")


def check_options(optimizer: Optimizer, group: Mapping[str, Any], index: int, unsupported: set[str]) -> None:
    """Raise ValueError for a key of a param group that is set but `unsupported`."""
    for key, value in group.items():
        if key in unsupported and value:
            raise ValueError(f"param group {index}: {type(optimizer).__name__} has no {key}, got {key}={value!r}")


def check_not_negative(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError if one of these hyperparameters of a param group is negative or not a number.

    Only `lr` may be in a tensor.
    """
    for name in names:
        value = group[name]
        if not (_is_number(value) or (name == "lr" and isinstance(value, Tensor))):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)  # a function, as mypy knows no order of Real


def check_adam(group: Mapping[str, Any]) -> None:
    """Raise ValueError for hyperparameters of Adam that are out of range."""
    betas = group["betas"]
    numbers = isinstance(betas, tuple | list) and all(map(_is_number, betas))
    if not numbers or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    check_not_negative(group, "eps")


@dataclass(frozen=True)
class BaseRule:
    """What a state dict of the optimizer that a LAWN optimizer or LAMB equals in the free phase has.

    Attributes:
        hyperparameter: that each param group has.
        state: keys that the state of each parameter has, if it has any.
        decoupled: whether weight decay is decoupled from the gradient, as in torch's AdamW; None where it is neither
            that nor added to the gradient, as in torch's Adam.
    """

    hyperparameter: str
    state: tuple[str, ...] = ()
    decoupled: bool | None = None

    def check(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        """Raise ValueError for a state dict of an optimizer with another rule, which would be taken for this."""
        name = type(optimizer).__name__
        for index, group in enumerate(saved["param_groups"]):
            label = f"the loaded param group {index}"
            if self.hyperparameter not in group:
                raise ValueError(f"{label} has no {self.hyperparameter}: it is of another optimizer than {name}")
            flag = group.get("decoupled_weight_decay")  # of torch's Adam and AdamW
            if group.get("weight_decay") and flag is not None and flag is not self.decoupled:
                raise ValueError(
                    f"{label}: weight_decay={group['weight_decay']} of {'AdamW' if flag else 'Adam'} acts in another "
                    f"way than that of {name}; set it to 0 in the state dict"
                )
        params = {key for group in saved["param_groups"] for key in group["params"]}  # others are the user's own
        for param, entry in saved["state"].items():
            if param in params and entry and not {*self.state} <= entry.keys():
                missing = next(key for key in self.state if key not in entry)
                raise ValueError(f"the loaded state has no {missing}: it is of another optimizer than {name}")
        if self.state == ADAM_STATE and any("capturable" in g and "amsgrad" not in g for g in saved["param_groups"]):
            raise ValueError(f"the loaded state is of another optimizer than {name}, as torch's RAdam")


@cache
def torch_keys(*kinds: type[Optimizer]) -> set[str]:
    """Return the param group keys of these torch optimizers, of all by default."""
    classes = kinds or [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer)]
    return {name for c in classes for name in signature(c).parameters} - {"params", "defaults"}


def check_shapes_known(model: nn.Module) -> None:
    """Raise ValueError if a lazy module has not seen its first input, so that its weights have no dimensions yet."""
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet, as its module is lazy: run the model on a batch first")
