"""Eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In the body, a module is in eval mode; afterwards it and its children have the modes that they had.

    Their methods `train` are not called, since some change weights, as loralib's, which merges adapters. Children that
    are not registered are not reached. What `torch.export` has made cannot change its mode and raises an error.
    """
    modes = [(each, each.training) for each in module.modules()]
    for each, _ in modes:
        if "eval" in vars(each):
            each.eval()
    for each, _ in modes:
        each.training = False
    try:
        yield
    finally:
        for each, training in modes:  # they may have had different ones
            each.training = training
