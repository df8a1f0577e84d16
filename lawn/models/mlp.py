"""Fully connected ReLU network without biases."""

from itertools import pairwise
from math import prod

from torch import nn


def mlp(shape: tuple[int, int, int], num_classes: int, *, widths: list[int]) -> nn.Sequential:
    """Create a fully connected ReLU network without biases, with torch's default initialization.

    The network is positively homogeneous in each layer: a factor a > 0 of a layer's weight is a factor of the logits.

    Args:
        shape: shape (channels, height, width) of an image.
        num_classes: number K of classes.
        widths: numbers of units of the hidden layers.

    Returns:
        A network that maps images [B, C, H, W] to logits [B, K].
    """
    sizes = [prod(shape), *widths]
    hidden: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        hidden += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], num_classes, bias=False))
