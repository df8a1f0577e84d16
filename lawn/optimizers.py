"""Registry of optimizers and learning rate schedules by their names in configs.

A builder takes the model and the config keys of its optimizer as keyword arguments.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lawn.arguments import arguments
from lawn.config import Config
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
from lawn.packages import check_installed

Groups = list[dict[str, Any]]


def adaptive(optimizer_class: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Make a builder of an adaptive optimizer, with weight decay of weights only."""

    def build(model: nn.Module, *, lr: float, betas: list[float], eps: float, weight_decay: float) -> Optimizer:
        return optimizer_class(decay_groups(model, weight_decay), lr=lr, betas=_pair(betas), eps=eps)

    return build


def torch_adaptive(optimizer_class: type[Adam]) -> Callable[..., Optimizer]:
    """Make a builder of one of torch's adaptive optimizers, which are fused by default."""

    def build(
        model: nn.Module, *, lr: float, betas: list[float], eps: float, weight_decay: float, fused: bool = True
    ) -> Optimizer:
        return optimizer_class(decay_groups(model, weight_decay), lr=lr, betas=_pair(betas), eps=eps, fused=fused)

    return build


def adaptive_lawn(optimizer_class: type[AdamLAWN]) -> Callable[..., Optimizer]:
    """Make a builder of an adaptive LAWN optimizer."""

    def build(
        model: nn.Module,
        *,
        lr: float,
        betas: list[float],
        eps: float,
        free_steps: int,
        scope: str = "all",
        include_bias: bool = False,
        granularity: str = "tensor",
        fused: bool | None = None,
    ) -> Optimizer:
        groups = lawn_groups(model, scope, include_bias, granularity)
        return optimizer_class(groups, lr, _pair(betas), eps, free_steps=free_steps, fused=fused)

    return build


def lazy(package: str, name: str) -> Callable[..., Optimizer]:
    """Make a constructor that imports the optimizer's package when it is called."""
    return lambda *arguments, **keys: getattr(import_module(package), name)(*arguments, **keys)


def sgd(
    model: nn.Module, *, lr: float, momentum: float, nesterov: bool, weight_decay: float, fused: bool = True
) -> Optimizer:
    """Build torch's SGD, with weight decay of weights only."""
    return SGD(decay_groups(model, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)


def sgd_lawn(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    free_steps: int,
    scope: str = "all",
    include_bias: bool = False,
    granularity: str = "tensor",
    fused: bool | None = None,
) -> Optimizer:
    """Build SGD-LAWN."""
    groups = lawn_groups(model, scope, include_bias, granularity)
    return SGDLAWN(groups, lr, momentum, free_steps=free_steps, fused=fused)


def adam_hoffer(model: nn.Module, *, lr: float, betas: list[float], eps: float, fused: bool = True) -> Optimizer:
    """Build torch's Adam and fix the norms of the model's weights by reparameterization, in place."""
    bound_norms(model)
    return Adam(model.parameters(), lr=lr, betas=_pair(betas), eps=eps, fused=fused)


def adam_cpr(model: nn.Module, *, lr: float, betas: list[float], eps: float, warm_start_steps: int) -> Optimizer:
    """Build AdamCPR (Franke et al. 2024), which bounds the squared norm of each weight by that after the warm start.

    `foreach` is required: the other implementation in pytorch-cpr 0.3.1 never sets the bounds.
    """
    from pytorch_cpr import AdamCPR

    weights, others = _by_dimensions(model)
    groups = _nonempty({"params": weights, "regularize": True}, {"params": others, "regularize": False})
    bound = {"kappa_init_method": "warm_start", "kappa_init_param": max(1, warm_start_steps)}
    return AdamCPR(groups, lr=lr, betas=_pair(betas), eps=eps, foreach=True, **bound)


def muon(model: nn.Module, *, lr: float, betas: list[float], momentum: float, weight_decay: float) -> Optimizer:
    """Build timm's Muon (Jordan et al. 2024), with updates scaled to the size of AdamW's.

    As the authors recommend, AdamW updates embeddings, the output layer and parameters with fewer than two dimensions.
    """
    from timm.optim import Muon

    adamw_weights: set[Tensor] = {
        p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    try:
        adamw_weights.add(output_layer(model).weight)
    except ValueError as error:
        raise ConfigError(f"optim=muon: {error}") from error
    weights, others = _by_dimensions(model)
    by_muon: dict[str, Any] = {"use_fallback": False, "nesterov": True}
    by_adamw: dict[str, Any] = {"use_fallback": True, "nesterov": False}
    groups = _nonempty(
        {"params": [p for p in weights if p not in adamw_weights], "weight_decay": weight_decay, **by_muon},
        {"params": [p for p in weights if p in adamw_weights], "weight_decay": weight_decay, **by_adamw},
        {"params": others, "weight_decay": 0.0, **by_adamw},
    )
    return Muon(groups, lr=lr, betas=_pair(betas), momentum=momentum, ns_steps=5, adjust_lr_fn="match_rms_adamw")


def decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Make param groups with weight decay of parameters with two or more dimensions only, as LAWN constrains them."""
    weights, others = _by_dimensions(model)
    return _nonempty({"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})


def lawn_groups(model: nn.Module, scope: str, include_bias: bool, granularity: str = "tensor") -> Groups:
    """Make the param groups of a LAWN optimizer.

    Raises ConfigError if the model has no weight in the scope, or for norms of rows that biases share.
    """
    if granularity == "row" and include_bias:
        raise ConfigError("optim.granularity=row: does not go with optim.include_bias=true")
    make_groups = {"all": param_groups.all_weights, "final_homogeneous": param_groups.final_homogeneous}[scope]
    try:
        groups = make_groups(model, include_bias=include_bias)
    except ValueError as error:
        raise ConfigError(f"optim.scope={scope}: {error}") from error
    return param_groups.per_row(groups) if granularity == "row" else groups


def _by_dimensions(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into those with two or more dimensions and others."""
    params = list(model.parameters())
    return [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]


def _nonempty(*groups: dict[str, Any]) -> Groups:
    return [group for group in groups if group["params"]]


def _pair(betas: list[float]) -> tuple[float, float]:
    return betas[0], betas[1]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch_adaptive(Adam),  # weight decay as L2 regularization
    "adamw": torch_adaptive(AdamW),  # decoupled weight decay, multiplied by lr
    "adam_hoffer": adam_hoffer,
    "adam_lawn": adaptive_lawn(AdamLAWN),
    "sgd": sgd,  # weight decay as L2 regularization
    "sgd_lawn": sgd_lawn,
    "lamb": adaptive(LAMB),
    "lamb_plus": adaptive(LAMBPlus),
    "lamb_lawn": adaptive_lawn(LAMBLAWN),
    "adamp": adaptive(lazy("adamp", "AdamP")),  # Heo et al. 2021
    "adam_cpr": adam_cpr,
    "muon": muon,
    "schedule_free": adaptive(lazy("schedulefree", "AdamWScheduleFree")),  # Defazio et al. 2024
}
# Arguments: optimizer, number of warmup updates, number of all updates.
SCHEDULES: dict[str, Callable[[Optimizer, int, int], LinearWarmup]] = {
    "linear": LinearWarmupDecay,
    "constant": lambda optimizer, warmup, total: LinearWarmup(optimizer, warmup),
}
IN_STEPS = {"free_epochs": "free_steps", "warm_start_epochs": "warm_start_steps"}
PACKAGES = {"adamp": "adamp", "adam_cpr": "pytorch_cpr", "schedule_free": "schedulefree"}  # of the extra `baselines`


def check_schedule(config: Config) -> None:
    """Raise ConfigError for an unknown schedule."""
    if config.schedule.name not in SCHEDULES:
        raise ConfigError(f"schedule.name={config.schedule.name}: must be one of {', '.join(SCHEDULES)}")


def optimizer_arguments(config: Config) -> dict[str, Any]:
    """Return the keyword arguments of the configured builder; those of `IN_STEPS` are still in epochs.

    Raises ConfigError for an unknown optimizer, a missing package or invalid keys.
    """
    name = config.optim.name
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim={name}: no such optimizer; choose from {', '.join(OPTIMIZERS)}")
    if name in PACKAGES:
        check_installed(PACKAGES[name], f"optim={name}", "'.[baselines]'")
    return arguments("optim", config.optim, OPTIMIZERS[name], IN_STEPS)
