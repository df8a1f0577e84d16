"""Logits made smaller in one stroke, before the norms are fixed (paper section 1, Figure 1)."""

import torch
from torch import nn


def output_layer(model: nn.Module) -> nn.Linear:
    """The last linear layer of the module tree, in the order of registration. Raises ValueError if there is none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the model has no linear layer")
    return layers[-1]


@torch.no_grad()
def attenuate_logits(model: nn.Module, factor: float) -> None:
    """Multiply weight and bias of the output layer, and so the logits, by `factor`, in place.

    The paper does so once, with 0.2, where the margins have become large, and constrains from there on:
    `attenuate_logits(model, 0.2); optimizer.constrain()`. Without the constraint the logits grow back.
    """
    layer = output_layer(model)
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor)
