"""Losses: logits and targets to the mean loss of the batch.

Multi-class ones take logits [B, K] and classes [B], binary ones logits [B] and labels 0.0 or 1.0 [B].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy() -> Loss:
    """Softmax cross entropy."""
    return F.cross_entropy


def bce() -> Loss:
    """Logistic loss, the binary cross entropy."""
    return F.binary_cross_entropy_with_logits


def label_smoothing(*, smoothing: float) -> Loss:
    """Cross entropy to (1 - s) y + s / K (Szegedy et al. 2016; the paper fixes s at 0.05)."""
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)


def binary_label_smoothing(*, smoothing: float) -> Loss:
    """Logistic loss to (1 - s) y + s / 2: label smoothing with two classes."""
    return lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing) + smoothing / 2)


def focal(*, gamma: float) -> Loss:
    """-(1 - p)^gamma log p for the probability p of the label (Lin et al. 2017; the paper's section 4.5)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        label = labels[:, None]
        log_p = F.log_softmax(logits, dim=1)
        # log(1 - p) from the other classes: 1 - p itself has no gradient where it rounds to 0.
        log_rest = log_p.scatter(1, label, -torch.inf).logsumexp(dim=1)
        return -((gamma * log_rest).exp() * log_p.gather(1, label)[:, 0]).mean()

    return loss


def binary_focal(*, gamma: float) -> Loss:
    """The same with two classes; without Lin et al.'s class weight alpha."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        margin = logits * (2 * labels - 1)
        return -((gamma * F.logsigmoid(-margin)).exp() * F.logsigmoid(margin)).mean()

    return loss


def flooding(*, level: float) -> Loss:
    """|L - b| + b for the cross entropy L of the batch and the flood level b (Ishida et al. 2020)."""
    return _flooded(F.cross_entropy, level)


def binary_flooding(*, level: float) -> Loss:
    """The same for the logistic loss."""
    return _flooded(F.binary_cross_entropy_with_logits, level)


def _flooded(loss: Loss, level: float) -> Loss:
    return lambda logits, labels: (loss(logits, labels) - level).abs() + level
