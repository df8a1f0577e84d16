"""Optimizers by the names that the configs use."""

from collections.abc import Callable, Iterable

from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from lawn.optim.adam_lawn import AdamLAWN
from lawn.optim.lamb import LAMB, LAMBLAWN, LAMBPlus
from lawn.optim.sgd_lawn import SGDLAWN


def adam(params: Iterable[Parameter], *, lr: float, betas: list[float], eps: float, weight_decay: float) -> Optimizer:
    """torch's Adam, whose decay is L2."""
    return Adam(_decay_weights_only(params, weight_decay), lr=lr, betas=(betas[0], betas[1]), eps=eps)


def adamw(params: Iterable[Parameter], *, lr: float, betas: list[float], eps: float, weight_decay: float) -> Optimizer:
    """torch's AdamW, whose decay is decoupled from the gradient and scaled by lr."""
    return AdamW(_decay_weights_only(params, weight_decay), lr=lr, betas=(betas[0], betas[1]), eps=eps)


def sgd(params: Iterable[Parameter], *, lr: float, momentum: float, nesterov: bool, weight_decay: float) -> Optimizer:
    """torch's SGD, whose decay is L2."""
    return SGD(_decay_weights_only(params, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov)


def adam_lawn(params: Iterable[Parameter], *, lr: float, betas: list[float], eps: float, free_steps: int) -> Optimizer:
    return AdamLAWN(params, lr, (betas[0], betas[1]), eps, free_steps=free_steps)


def sgd_lawn(params: Iterable[Parameter], *, lr: float, momentum: float, free_steps: int) -> Optimizer:
    return SGDLAWN(params, lr, momentum, free_steps=free_steps)


def lamb(params: Iterable[Parameter], *, lr: float, betas: list[float], eps: float, weight_decay: float) -> Optimizer:
    return LAMB(_decay_weights_only(params, weight_decay), lr, (betas[0], betas[1]), eps)


def lamb_plus(
    params: Iterable[Parameter], *, lr: float, betas: list[float], eps: float, weight_decay: float
) -> Optimizer:
    return LAMBPlus(_decay_weights_only(params, weight_decay), lr, (betas[0], betas[1]), eps)


def lamb_lawn(params: Iterable[Parameter], *, lr: float, betas: list[float], eps: float, free_steps: int) -> Optimizer:
    return LAMBLAWN(params, lr, (betas[0], betas[1]), eps, free_steps=free_steps)


def _decay_weights_only(params: Iterable[Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Decay reaches the same parameters that LAWN constrains: those with two or more dimensions."""
    params = list(params)
    groups: list[dict[str, object]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "adamw": adamw,
    "adam_lawn": adam_lawn,
    "sgd": sgd,
    "sgd_lawn": sgd_lawn,
    "lamb": lamb,
    "lamb_plus": lamb_plus,
    "lamb_lawn": lamb_lawn,
}
