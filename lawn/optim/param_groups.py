"""Param groups for LAWN optimizers: functions that choose which weights of a model are constrained.

Each function returns groups with the keys `params`, `constrain` and, where they apply, `blocks` (`include_bias`) or
`norm_axes` (`per_row`, `stacked`). Together the groups hold each trainable parameter once. "Weights" are trainable
parameters with two or more dimensions and more than one element.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lawn.optim.checks import check_shapes_known

_DIMS = (1, 2, 3)
_LINEAR: set[type] = {nn.Linear} | {getattr(nn, f"Conv{t}{d}d") for t in ("", "Transpose") for d in _DIMS}
# Positively homogeneous: f(a x) = a f(x) for a > 0. Dropout is so for each mask, PReLU for each slope.
_HOMOGENEOUS: set[type] = {nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout}
_HOMOGENEOUS |= {getattr(nn, name.format(d)) for name in ("Dropout{}d", "ZeroPad{}d") for d in _DIMS}
_HOMOGENEOUS |= {getattr(nn, f"{pool}Pool{d}d") for pool in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in _DIMS}
_CONTAINERS: set[type] = {nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}


def all_weights(model: nn.Module, *, include_bias: bool = False) -> list[dict[str, Any]]:
    """Constrain all weights, including embeddings.

    Args:
        model: model whose parameters are grouped.
        include_bias: whether the bias of a layer shares one norm with the layer's weight, as a further column of it.
            Any module has such a layer where the names of a weight and a vector differ in "weight" and "bias" alone, as
            nn.Linear, convolutions, attention (`in_proj_bias`) and nn.LSTM (`bias_ih_l0`). All other parameters with
            fewer than two dimensions stay free.

    Returns:
        A group of constrained parameters and, if there are any, a group of free ones.

    Raises:
        ValueError: if the model has no weights, a lazy module has not seen its first input, or a bias cannot join a
            weight because one of them is computed.

    References:
        Gupta et al. 2021, section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> from torch import nn
        >>> from lawn import AdamLAWN
        >>> from lawn.optim import param_groups
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> constrained, free = param_groups.all_weights(model)
        >>> [tuple(p.shape) for p in constrained["params"]]
        [(5, 4), (2, 4)]
        >>> [tuple(p.shape) for p in free["params"]]
        [(4,), (4,), (2,)]
        >>> optimizer = AdamLAWN([constrained, free], free_steps=1000)
    """
    weights = _named_weights(model).values()
    if not weights:
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    return _groups(model, weights, include_bias)


def final_homogeneous(model: nn.Module, *, include_bias: bool = False) -> list[dict[str, Any]]:
    """Constrain the weights of the final homogeneous sub-network only.

    The sub-network is the longest sequence of positively homogeneous modules at the end of the model: linear and
    convolutional layers, ReLU, LeakyReLU and PReLU, max and average pooling, flattening, zero padding and dropout. All
    other modules end it: normalization, embeddings, other activations, attention, modules whose weights are computed
    (parametrized, pruned), and custom modules without children (also subclasses of the known ones, which may compute
    something else).

    The modules are found in the order of registration; containers are opened. Function calls in `forward` (`F.gelu`, a
    skip connection) and another order of calls are not detected; use `matching` for such models. Parameters of a
    container itself are taken to come before its children. A weight of the sub-network that is tied to an earlier one
    is constrained.

    Args:
        model: model whose parameters are grouped.
        include_bias: whether the bias of a layer shares one norm with the layer's constrained weight, as a further
            column of it. Other parameters with fewer than two dimensions always stay free.

    Returns:
        A group of constrained parameters and, if there are any, a group of free ones.

    Raises:
        ValueError: if the sub-network has no trainable linear or convolutional layer, or as `all_weights` for biases.

    References:
        Gupta et al. 2021, section 3 ("fhsn"), [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> from torch import nn
        >>> from lawn.optim import param_groups
        >>> model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> constrained, free = param_groups.final_homogeneous(model)
        >>> [tuple(p.shape) for p in constrained["params"]]
        [(3, 4), (2, 3)]
    """
    check_shapes_known(model)
    weights: list[Tensor] = []
    last = "the start of the model"
    for name, module in _leaves(model):
        kind = _kind(module)
        if kind in _LINEAR and "weight" in module._parameters:
            weights += filter(_is_weight, [module._parameters["weight"]])
        elif kind not in _HOMOGENEOUS:
            what = ", whose weight is computed" if kind in _LINEAR else ""
            if known := [base for base in kind.__mro__[1:] if base in _LINEAR]:
                what = f", a subclass of nn.{known[0].__name__}"
            weights, last = [], f"'{name}' ({kind.__name__}{what})"
    if not weights:
        raise ValueError(
            f"no final homogeneous sub-network: there is no trainable linear or convolutional layer after {last}"
        )
    return _groups(model, weights, include_bias)


def matching(
    model: nn.Module, pattern: str | re.Pattern[str] | Iterable[str | re.Pattern[str]], *, include_bias: bool = False
) -> list[dict[str, Any]]:
    """Constrain the weights whose qualified names match a regular expression.

    Args:
        model: model whose parameters are grouped.
        pattern: one regular expression or several. `re.search` looks for them in each name of a weight; a tied weight
            has several names.
        include_bias: whether the biases of these weights share their norms, as for `all_weights`.

    Returns:
        A group of constrained parameters and, if there are any, a group of free ones.

    Raises:
        ValueError: if a pattern cannot be read or matches no weight, there is none, or as `all_weights` for biases.

    Examples:
        >>> from torch import nn
        >>> from lawn.optim import param_groups
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> constrained, free = param_groups.matching(model, "^2", include_bias=True)
        >>> [tuple(p.shape) for p in constrained["params"]], constrained["blocks"]
        ([(2, 3), (2,)], [0, 0])
    """
    patterns = [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
    if not patterns:
        raise ValueError("nothing to constrain: no pattern is given")
    weights: list[Tensor] = []
    for regex in patterns:
        compiled = _compiled(regex)
        found = [weight for name, weight in _named_weights(model).items() if compiled.search(name)]
        if not found:
            raise ValueError(f"pattern {compiled.pattern!r} matches no trainable parameter with two or more dimensions")
        weights += found
    return _groups(model, weights, include_bias)


def stacked(model: nn.Module, pattern: str | re.Pattern[str]) -> list[dict[str, Any]]:
    """Constrain all weights, with a norm for each slice of those that stack several layers along their first axis.

    Examples are the experts of a mixture, with weights [experts, in, out], and the members of an ensemble. Each slice
    is treated as a parameter of its own: it is constrained if it has two or more dimensions. Stacked biases
    [experts, out] thus stay free, with a trust ratio of LAMB for each slice.

    Args:
        model: model whose parameters are grouped.
        pattern: regular expression. `re.search` looks for it in the qualified names of the parameters.

    Returns:
        Groups of constrained parameters and, if there are any, a group of free ones.

    Raises:
        ValueError: if the pattern cannot be read or matches no trainable parameter with three or more dimensions.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lawn.optim import param_groups
        >>> model = nn.ModuleDict({"router": nn.Linear(4, 3), "experts": nn.ParameterList()})
        >>> model["experts"].extend([torch.randn(3, 4, 4), torch.randn(3, 4)])
        ParameterList(
            (0): Parameter containing: [torch.float32 of size 3x4x4]
            (1): Parameter containing: [torch.float32 of size 3x4]
        )
        >>> for group in param_groups.stacked(model, "^experts"):
        ...     print(group["constrain"], group.get("norm_axes"), [tuple(p.shape) for p in group["params"]])
        True (1, 2) [(3, 4, 4)]
        True None [(3, 4)]
        False 1 [(3,), (3, 4)]
    """
    check_shapes_known(model)
    named = model.named_parameters(remove_duplicate=False)
    compiled = _compiled(pattern)
    matched = {p for name, p in named if p.requires_grad and compiled.search(name)}
    if all(p.ndim < 3 for p in matched):
        raise ValueError(f"pattern {compiled.pattern!r} matches no trainable parameter with three or more dimensions")
    stacks: list[Tensor] = []
    weights: list[Tensor] = []
    free: list[Tensor] = []
    for p in model.parameters():
        if p.requires_grad:
            part = (stacks if p.ndim > 2 else free) if p in matched else (weights if _is_weight(p) else free)
            part.append(p)
    groups = per_row([{"params": stacks, "constrain": True}])
    slices_of_biases = {"norm_axes": 1} if any(p.ndim == 2 for p in free) else {}
    groups += [{"params": weights, "constrain": True}, {"params": free, "constrain": False, **slices_of_biases}]
    return [group for group in groups if group["params"]]


def per_row(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each row of the constrained weights a norm of its own.

    A row is a slice along the first axis: an output row of a matrix, a filter of a convolution, an embedding vector.
    In a transposed convolution it holds the weights of an input channel.

    Args:
        groups: result of another function of this module.

    Returns:
        The groups, with a group of constrained weights for each number of dimensions. Weights whose rows are single
        numbers, such as the biases nn.Embedding(n, 1), are in a free group: a number on a fixed norm could not move.

    Raises:
        ValueError: if a group has `blocks` (`include_bias`), or constrains a parameter with fewer than two dimensions.

    Examples:
        >>> from torch import nn
        >>> from lawn.optim import param_groups
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> groups = param_groups.per_row(param_groups.all_weights(model))
        >>> [group.get("norm_axes") for group in groups]
        [(1,), (1, 2, 3), None]
    """
    result = []
    for group in groups:
        if group.get("constrain") is False:
            result.append(group)
            continue
        if group.get("blocks") is not None:
            raise ValueError("a bias that shares the norm of a whole weight (include_bias) cannot have norms of rows")
        if any(p.ndim < 2 for p in group["params"]):
            raise ValueError("a constrained parameter with fewer than two dimensions has no rows")
        rows = [p for p in group["params"] if p.numel() > p.shape[0]]
        for ndim in sorted({p.ndim for p in rows}):
            params = [p for p in rows if p.ndim == ndim]
            result.append({**group, "params": params, "norm_axes": tuple(range(1, ndim))})
        if numbers := [p for p in group["params"] if p.numel() <= p.shape[0]]:
            result.append({**group, "params": numbers, "constrain": False})
    return result


def _kind(module: nn.Module) -> type:
    """The type of a module, or the one that fully_shard (FSDP2) has derived its type from."""
    kind = type(module)
    return kind.__bases__[-1] if "FSDPModule" in (parent.__name__ for parent in kind.__mro__) else kind


def _compiled(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} cannot be read: {error}") from error


def _named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name; a tied weight has several names."""
    check_shapes_known(model)
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if _is_weight(p)}


def _groups(model: nn.Module, weights: Iterable[Tensor], include_bias: bool) -> list[dict[str, Any]]:
    """Make a group that constrains `weights` (repeats are allowed) and a group of free parameters, if there are any."""
    blocks: dict[Tensor | None, int] = {}
    for w in weights:
        blocks.setdefault(w, len(blocks))
    if include_bias:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                _check_bias(name, module, blocks)
            _check_computed(name, module, blocks)
            for key, weight in module._parameters.items():
                bias = module._parameters.get(key.replace("weight", "bias")) if "weight" in key else None
                joins = weight in blocks and bias is not None and bias.requires_grad and bias.ndim == 1
                if joins and blocks.setdefault(bias, blocks[weight]) != blocks[weight]:
                    raise ValueError(
                        f"the bias of '{name}' cannot share the norm of its weight, because another layer has it too; "
                        "leave out include_bias"
                    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    constrained: dict[str, Any] = {"params": [p for p in trainable if p in blocks], "constrain": True}
    if include_bias:
        constrained["blocks"] = [blocks[p] for p in constrained["params"]]
    free = {"params": [p for p in trainable if p not in blocks], "constrain": False}
    return [constrained, free] if free["params"] else [constrained]


def _is_weight(p: Tensor | None) -> TypeGuard[Tensor]:
    """Whether this can be constrained by default: trainable, with two or more dimensions and more than one element."""
    return p is not None and p.requires_grad and p.ndim >= 2 and p.numel() > 1


def _check_bias(name: str, module: nn.Module, blocks: Iterable[Tensor | None]) -> None:
    """Raise ValueError if a constrained layer has a bias that cannot join its weight."""
    own = module._parameters
    bias = own.get("bias")
    may_join = "bias" not in own or (bias is not None and bias.requires_grad)
    if may_join and not {"weight", "bias"} <= own.keys():
        _refuse_computed(name, module, blocks)


def _check_computed(name: str, module: nn.Module, blocks: Iterable[Tensor | None]) -> None:
    """Raise ValueError if a bias is named like a constrained weight, and one of them is computed."""
    for key, p in module._parameters.items():
        other = key.replace("bias", "weight") if "bias" in key else key.replace("weight", "bias")
        is_layer = p is not None and p.requires_grad and (p.ndim == 1) == ("bias" in key)
        if is_layer and (is_parametrized(module, other) or other in vars(module)):  # pruned
            _refuse_computed(name, module, blocks)


def _refuse_computed(name: str, module: nn.Module, blocks: Iterable[Tensor | None]) -> None:
    if not {*module.parameters()}.isdisjoint(blocks):
        raise ValueError(
            f"the bias of '{name or 'the model itself'}' cannot share the norm of its weight, because one of them is "
            "computed from other parameters (parametrized or pruned); leave out include_bias"
        )


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules without children or with own parameters, in order; `named_modules` would omit repeated ones."""
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    if module._parameters or (not children and _kind(module) not in _CONTAINERS):
        yield name or "the model itself", module
    for key, child in children:
        yield from _leaves(child, f"{name}.{key}" if name else key)
