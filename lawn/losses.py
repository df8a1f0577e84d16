"""Losses: logits and targets to the mean loss of the batch."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy() -> Loss:
    """Softmax cross entropy of logits [B, K] and classes [B]."""
    return F.cross_entropy


def bce() -> Loss:
    """Logistic loss of logits [B] and labels 0.0 or 1.0 [B]."""
    return F.binary_cross_entropy_with_logits
