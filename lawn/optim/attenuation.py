"""Attenuation of the logits before the norms are fixed (paper section 1, Figure 1)."""

from math import inf

import torch
from torch import nn

from lawn.optim.checks import check_shapes_known
from lawn.optim.memory import extent
from lawn.optim.modes import evaluating


def output_layer(model: nn.Module) -> nn.Linear:
    """Return the last linear layer of a model, in the order of registration.

    Args:
        model: a model of any kind.

    Returns:
        The layer itself, not a copy.

    Raises:
        ValueError: if the model has no linear layer, or the last one belongs to an adapter (LoRA).

    Examples:
        >>> from torch import nn
        >>> from lawn.optim import output_layer
        >>> output_layer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        Linear(in_features=3, out_features=2, bias=True)
    """
    inactive = _inactive_copies(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inactive]
    if not layers:
        raise ValueError("the model has no linear layer")
    for name, module in model.named_modules():
        if _adds_to_weight(module, layers[-1]):
            raise ValueError(
                f"the last linear layer is inside the adapter '{name or 'the model itself'}' "
                f"({type(module).__qualname__}), which adds it to another weight; merge the adapter first"
            )
    return layers[-1]


@torch.no_grad()
def attenuate_logits(model: nn.Module, factor: float) -> None:
    """Multiply weight and bias of the output layer, and thereby the logits, by a factor, in place.

    The paper attenuates logits once, by 0.2, when the margins have become large, and then constrains the weights.
    Without the constraint the logits would grow again.

    Args:
        model: a model whose output layer is its last linear layer.
        factor: factor of the logits.

    Raises:
        ValueError: if `factor` is not positive and finite, the model has no linear layer, the last one is lazy or
            belongs to an adapter, or its weight or bias is computed from others (a parametrization) or shared with
            another module, which would change as well; or if the logits of a subclass of `nn.Linear` are not
            proportional to them (a cosine, LoRA).

    References:
        Gupta et al. 2021, section 1 and Figure 1, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import AdamLAWN
        >>> from lawn.optim import attenuate_logits
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> optimizer = AdamLAWN(model.parameters())
        >>> attenuate_logits(model, 0.2)
        >>> optimizer.constrain()
        >>> model(torch.tensor([5.0, 10.0])).detach()
        tensor([1., 2.])
    """
    if not 0 < factor < inf:
        raise ValueError(f"factor must be positive and finite, got {factor}")
    check_shapes_known(model)
    layer = output_layer(model)
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            raise ValueError(f"the {name} of the output layer is computed from others (a parametrization); scale those")
    own = [p for name in ("weight", "bias") if (p := layer._parameters[name]) is not None]
    others = [p for module in model.modules() if module is not layer for p in module._parameters.values()]
    if any(p is other or _share_memory(p, other) for p in own for other in others if other is not None):
        raise ValueError("the output layer shares its weight or bias with another module, which would change as well")
    if type(layer).forward is not nn.Linear.forward and not _is_proportional(layer, own):
        raise ValueError(
            f"the output layer is a {type(layer).__qualname__}, whose logits are not proportional to weight and bias"
        )
    for p in own:
        p.mul_(factor)


def _inactive_copies(model: nn.Module) -> set[nn.Module]:
    """What PEFT's `modules_to_save` keeps of layers, beside the copy that computes."""
    inactive: set[nn.Module] = set()
    for wrapper in model.modules():
        original, copies = (wrapper._modules.get(name) for name in ("original_module", "modules_to_save"))
        if original is not None and isinstance(copies, nn.ModuleDict):
            chosen = () if getattr(wrapper, "disable_adapters", False) else getattr(wrapper, "active_adapters", ())
            active = [copies[name] for name in chosen if name in copies] or [original]
            kept = {module for copy in active for module in copy.modules()}
            inactive |= {module for copy in (original, *copies.values()) for module in copy.modules()} - kept
    return inactive


def _adds_to_weight(module: nn.Module, last: nn.Linear) -> bool:
    """Whether a module adds the outputs of `last`, below it, to those of as many features that a weight gives: PEFT's
    adapters keep that in a layer `base_layer`, others have it themselves. So it is where `last` is the `base_layer` of
    an adapter of parameters alone (LoHa).
    """
    base = module._modules.get("base_layer")
    weight = (base or module)._parameters.get("weight")  # `.weight` would compute a parametrized one
    sizes = () if weight is None or weight.ndim < 2 else tuple(weight.shape)
    fits = last.out_features in (*sizes, getattr(base, "out_features", None))
    if last is base:  # what comes before it is no adapter's: the body of a model that has such a layer
        children = [*module._modules.values()]
        after = filter(None, children[children.index(base) + 1 :])
        return any(next(child.parameters(), None) is not None for child in after)
    return fits and last is not module and any(child is last for child in module.modules())


def _share_memory(p: torch.Tensor, other: torch.Tensor) -> bool:
    here, there = extent(p), extent(other)
    if here is None or there is None or here[0] != there[0]:
        return False
    return here[1] <= there[2] and there[1] <= here[2]


def _is_proportional(layer: nn.Linear, params: list[nn.Parameter]) -> bool:
    """Whether half the parameters give half the outputs."""
    before = [p.clone() for p in params]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, layer.in_features, generator=generator, device="cpu").to(layer.weight)
    try:
        with evaluating(layer):
            outputs = layer.forward(inputs)  # without the user's hooks
            for p in params:
                p.mul_(0.5)
            return torch.allclose(layer.forward(inputs), 0.5 * outputs, rtol=0.05, atol=1e-6)
    except TypeError as error:
        name = type(layer).__qualname__
        raise ValueError(f"the output layer is a {name}, which cannot be called with inputs alone: {error}") from error
    finally:
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
