"""Which parameters LAWN constrains: parameter groups for its optimizers, made from a model.

Each function returns groups with the keys `params`, `constrain` and, where biases are included, `blocks`; together
they hold every trainable parameter once. "Weights" are trainable parameters with two or more dimensions. With
`include_bias` the bias of a linear or convolutional layer shares one norm with the layer's constrained weight, as if
it were a column of it; all other parameters with one dimension stay free.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_DIMS = (1, 2, 3)
_LINEAR: set[type] = {nn.Linear} | {getattr(nn, f"Conv{t}{d}d") for t in ("", "Transpose") for d in _DIMS}
# f(a x) = a f(x) for a > 0. A dropout is so for each mask, a PReLU for each slope (which stays free).
_HOMOGENEOUS: set[type] = {nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout}
_HOMOGENEOUS |= {getattr(nn, name.format(d)) for name in ("Dropout{}d", "ZeroPad{}d") for d in _DIMS}
_HOMOGENEOUS |= {getattr(nn, f"{pool}Pool{d}d") for pool in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in _DIMS}
_CONTAINERS: set[type] = {nn.Sequential, nn.ModuleList, nn.ModuleDict}


def everything(model: nn.Module, *, include_bias: bool = False) -> list[dict[str, Any]]:
    """Constrain all weights, embeddings among them. Raises ValueError when there are none."""
    weights = _named_weights(model).values()
    if not weights:
        raise ValueError("nothing to constrain: no trainable parameter with two or more dimensions")
    return _groups(model, weights, include_bias)


def final_homogeneous(model: nn.Module, *, include_bias: bool = False) -> list[dict[str, Any]]:
    """Constrain only the final homogeneous sub-network (paper section 3, "fhsn").

    That is the longest run of modules at the end of `model` of which each is positively homogeneous: linear and
    convolutional layers, ReLU, LeakyReLU and PReLU, max and average pooling, flattening, zero padding, dropout.
    Anything else ends it: normalization, embeddings, other activations, attention, a module of the user's own that
    contains no others (subclasses of the known ones too: they may compute something else), parametrized weights.

    It is read off the module tree in the order of registration, containers opened. What `forward` does by function
    calls (`F.gelu`, a skip connection) or in another order is not seen: use `matching` there. Parameters that a
    container holds itself count as used before its children.

    Raises ValueError when the sub-network has no trainable linear or convolutional layer.
    """
    weights: list[Tensor] = []
    last = "the start of the model"
    for name, module in _leaves(model):
        if type(module) in _LINEAR:
            weights += [w for w in [module._parameters["weight"]] if w is not None and w.requires_grad]
        elif type(module) not in _HOMOGENEOUS:
            weights, last = [], f"'{name}' ({type(module).__name__})"
    if not weights:
        raise ValueError(
            f"no final homogeneous sub-network: there is no trainable linear or convolutional layer after {last}"
        )
    return _groups(model, weights, include_bias)


def matching(
    model: nn.Module, pattern: str | re.Pattern[str] | Iterable[str | re.Pattern[str]], *, include_bias: bool = False
) -> list[dict[str, Any]]:
    """Constrain the weights in whose qualified name (one of them, if tied) a pattern is found by `re.search`.

    `pattern` is one regular expression or several. Raises ValueError naming a pattern that finds no weight.
    """
    patterns = [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
    if not patterns:
        raise ValueError("nothing to constrain: no pattern is given")
    weights: list[Tensor] = []
    for regex in patterns:
        found = [weight for name, weight in _named_weights(model).items() if re.search(regex, name)]
        if not found:
            text = regex.pattern if isinstance(regex, re.Pattern) else regex
            raise ValueError(f"pattern {text!r} matches no trainable parameter with two or more dimensions")
        weights += found
    return _groups(model, weights, include_bias)


def _named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights under all their names: a tied one has several."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if p.requires_grad and p.ndim >= 2}


def _groups(model: nn.Module, weights: Iterable[Tensor], include_bias: bool) -> list[dict[str, Any]]:
    """One group with `weights` (repeats allowed) and their biases constrained, one with all others free, if any."""
    blocks: dict[Tensor | None, int] = {}
    for w in weights:
        blocks.setdefault(w, len(blocks))
    if include_bias:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
                if weight in blocks and bias is not None and bias.requires_grad:
                    blocks.setdefault(bias, blocks[weight])
    trainable = [p for p in model.parameters() if p.requires_grad]
    bound: dict[str, Any] = {"params": [p for p in trainable if p in blocks], "constrain": True}
    if include_bias:
        bound["blocks"] = [blocks[p] for p in bound["params"]]
    free = {"params": [p for p in trainable if p not in blocks], "constrain": False}
    return [bound, free] if free["params"] else [bound]


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that do the work, in order; one that is registered twice comes twice (`named_modules` drops repeats)."""
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    if module._parameters or (not children and type(module) not in _CONTAINERS):
        yield name or "the model itself", module
    for key, child in children:
        yield from _leaves(child, f"{name}.{key}" if name else key)
