"""Optimizers and schedules by the names that the configs use.

A builder of an optimizer takes the model and, as keyword arguments, the keys that apply to it.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lawn.config import Config, arguments
from lawn.errors import ConfigError
from lawn.optim import (
    LAMB,
    LAMBLAWN,
    SGDLAWN,
    AdamLAWN,
    LAMBPlus,
    LinearWarmup,
    LinearWarmupDecay,
    bound_norms,
    output_layer,
    param_groups,
)

Groups = list[dict[str, Any]]


def with_decay(kind: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Builder of an adaptive optimizer with weight decay on the weights."""

    def build(model: nn.Module, *, lr: float, betas: list[float], eps: float, weight_decay: float) -> Optimizer:
        return kind(decayed(model, weight_decay), lr=lr, betas=_pair(betas), eps=eps)

    return build


def with_torch(kind: type[Adam]) -> Callable[..., Optimizer]:
    """The same of torch's own, which update all weights in one pass unless `fused` is False."""

    def build(
        model: nn.Module, *, lr: float, betas: list[float], eps: float, weight_decay: float, fused: bool = True
    ) -> Optimizer:
        return with_decay(partial(kind, fused=fused))(model, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    return build


def with_lawn(kind: type[AdamLAWN]) -> Callable[..., Optimizer]:
    """Builder of an adaptive LAWN optimizer."""

    def build(
        model: nn.Module,
        *,
        lr: float,
        betas: list[float],
        eps: float,
        free_steps: int,
        scope: str = "all",
        include_bias: bool = False,
        fused: bool | None = None,
    ) -> Optimizer:
        groups = constrained(model, scope, include_bias)
        return kind(groups, lr, _pair(betas), eps, free_steps=free_steps, fused=fused)

    return build


def imported(package: str, name: str) -> Callable[..., Optimizer]:
    """The optimizer of a package that only its users need."""
    return lambda *arguments, **keys: getattr(import_module(package), name)(*arguments, **keys)


def sgd(
    model: nn.Module, *, lr: float, momentum: float, nesterov: bool, weight_decay: float, fused: bool = True
) -> Optimizer:
    return SGD(decayed(model, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)


def sgd_lawn(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    free_steps: int,
    scope: str = "all",
    include_bias: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    return SGDLAWN(constrained(model, scope, include_bias), lr, momentum, free_steps=free_steps, fused=fused)


def adam_hoffer(model: nn.Module, *, lr: float, betas: list[float], eps: float, fused: bool = True) -> Optimizer:
    """torch's Adam on weights whose norms are fixed from the start by reparameterization; changes the model."""
    bound_norms(model)
    return Adam(model.parameters(), lr=lr, betas=_pair(betas), eps=eps, fused=fused)


def adam_cpr(model: nn.Module, *, lr: float, betas: list[float], eps: float, warm_start_steps: int) -> Optimizer:
    """Constrained parameter regularization (Franke et al. 2024) of pytorch-cpr: the squared norm of each weight is
    bounded by what it is after the warm start.

    By its foreach path: the other one would never find a bound by itself (pytorch-cpr 0.3.1).
    """
    from pytorch_cpr import AdamCPR

    weights, others = _by_dimensions(model)
    groups = _filled({"params": weights, "regularize": True}, {"params": others, "regularize": False})
    bound = {"kappa_init_method": "warm_start", "kappa_init_param": max(1, warm_start_steps)}
    return AdamCPR(groups, lr=lr, betas=_pair(betas), eps=eps, foreach=True, **bound)


def muon(model: nn.Module, *, lr: float, betas: list[float], momentum: float, weight_decay: float) -> Optimizer:
    """Muon (Jordan et al. 2024) of timm, with steps as large as AdamW's; embeddings, the output layer and whatever
    has fewer than two dimensions are left to AdamW, as its authors advise."""
    from timm.optim import Muon

    tables: set[Tensor] = {
        p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    tables.add(output_layer(model).weight)
    weights, others = _by_dimensions(model)
    by_muon: dict[str, Any] = {"use_fallback": False, "nesterov": True}
    by_adamw: dict[str, Any] = {"use_fallback": True, "nesterov": False}
    groups = _filled(
        {"params": [p for p in weights if p not in tables], "weight_decay": weight_decay, **by_muon},
        {"params": [p for p in weights if p in tables], "weight_decay": weight_decay, **by_adamw},
        {"params": others, "weight_decay": 0.0, **by_adamw},
    )
    return Muon(groups, lr=lr, betas=_pair(betas), momentum=momentum, ns_steps=5, adjust_lr_fn="match_rms_adamw")


def decayed(model: nn.Module, weight_decay: float) -> Groups:
    """Decay reaches what LAWN constrains by default: parameters with two or more dimensions."""
    weights, others = _by_dimensions(model)
    return _filled({"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})


def constrained(model: nn.Module, scope: str, include_bias: bool) -> Groups:
    choose = {"all": param_groups.all_weights, "final_homogeneous": param_groups.final_homogeneous}[scope]
    try:
        return choose(model, include_bias=include_bias)
    except ValueError as error:
        raise ConfigError(f"optim.scope={scope}: {error}") from error


def _by_dimensions(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with two or more dimensions, and the others."""
    params = list(model.parameters())
    return [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]


def _filled(*groups: dict[str, Any]) -> Groups:
    return [group for group in groups if group["params"]]


def _pair(betas: list[float]) -> tuple[float, float]:
    return betas[0], betas[1]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": with_torch(Adam),  # its decay is L2
    "adamw": with_torch(AdamW),  # its decay is decoupled from the gradient and scaled by lr
    "adam_hoffer": adam_hoffer,
    "adam_lawn": with_lawn(AdamLAWN),
    "sgd": sgd,  # its decay is L2
    "sgd_lawn": sgd_lawn,
    "lamb": with_decay(LAMB),
    "lamb_plus": with_decay(LAMBPlus),
    "lamb_lawn": with_lawn(LAMBLAWN),
    "adamp": with_decay(imported("adamp", "AdamP")),  # Heo et al. 2021
    "adam_cpr": adam_cpr,
    "muon": muon,
    "schedule_free": with_decay(imported("schedulefree", "AdamWScheduleFree")),  # Defazio et al. 2024
}
# From the optimizer, the updates of the warmup and of the whole run.
SCHEDULES: dict[str, Callable[[Optimizer, int, int], LinearWarmup]] = {
    "linear": LinearWarmupDecay,
    "constant": lambda optimizer, warmup, total: LinearWarmup(optimizer, warmup),
}
IN_STEPS = {"free_epochs": "free_steps", "warm_start_epochs": "warm_start_steps"}
PACKAGES = {"adamp": "adamp", "adam_cpr": "pytorch_cpr", "schedule_free": "schedulefree"}  # of the extra `baselines`


def check_schedule(config: Config) -> None:
    """Raises ConfigError for a schedule that there is not."""
    if config.schedule.name not in SCHEDULES:
        raise ConfigError(f"schedule.name={config.schedule.name}: must be one of {', '.join(SCHEDULES)}")


def optimizer_arguments(config: Config) -> dict[str, Any]:
    """What the chosen builder is given beside the model; what it takes in steps (`IN_STEPS`) is still in epochs. Raises
    ConfigError."""
    name = config.optim.name
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim={name}: no such optimizer; choose from {', '.join(OPTIMIZERS)}")
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise ConfigError(f"optim={name}: the package {PACKAGES[name]} is not installed; pip install '.[baselines]'")
    return arguments("optim", config.optim, OPTIMIZERS[name], IN_STEPS)
