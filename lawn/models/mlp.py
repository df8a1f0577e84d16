"""Fully homogeneous ReLU network: scaling any layer by a > 0 scales the logits by a."""

from itertools import pairwise
from math import prod

from torch import nn


def mlp(shape: tuple[int, int, int], num_classes: int, *, widths: list[int]) -> nn.Sequential:
    """Images [B, *shape] to logits [B, num_classes]; no biases, torch's default initialization."""
    sizes = [prod(shape), *widths]
    hidden: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        hidden += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], num_classes, bias=False))
