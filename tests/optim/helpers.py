"""Makers of optimizers that the tests of this folder share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn import LAWN
from lawn.optim.keys import NORM

Maker = Callable[..., Optimizer]


def wrapped(base: Maker, **keys: Any) -> Maker:
    """A maker of LAWN on `base`. It returns the base optimizer itself, whose hooks hold on to LAWN."""

    def make(params: Any, lr: float | Tensor = 1e-3, **lawn: Any) -> Optimizer:
        optimizer = base(params, lr=lr, **keys)
        LAWN(optimizer, **lawn)
        return optimizer

    return make


def fixed_norms(optimizer: Optimizer) -> list[Any]:
    """The norm of each parameter, or those of its slices; 0.0 while it is free, and where LAWN has no part in it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norms = [optimizer.state.get(p, {}).get(NORM, 0.0) for p in params]
    return [c.tolist() if isinstance(c, Tensor) else c for c in norms]


def with_gradients(*params: Tensor) -> None:
    for p in params:
        p.grad = torch.randn_like(p)
