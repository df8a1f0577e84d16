"""Losses: logits and targets to the mean loss of the batch.

Multi-class ones take logits [B, K] and classes [B], binary ones logits [B] and labels 0.0 or 1.0 [B].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Loss:
    """`mean` is over the samples of a batch, so that of an update's parts it is their weighted mean; `outer`, where
    there is one, is a function of the mean of the whole update."""

    mean: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor], Tensor] | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch that is a whole update."""
        mean = self.mean(logits, targets)
        return self.outer(mean) if self.outer else mean


def cross_entropy() -> Loss:
    """Softmax cross entropy."""
    return Loss(F.cross_entropy)


def bce() -> Loss:
    """Logistic loss, the binary cross entropy."""
    return Loss(F.binary_cross_entropy_with_logits)


def label_smoothing(*, smoothing: float) -> Loss:
    """Cross entropy to (1 - s) y + s / K (Szegedy et al. 2016; the paper fixes s at 0.05)."""
    return Loss(partial(F.cross_entropy, label_smoothing=smoothing))


def binary_label_smoothing(*, smoothing: float) -> Loss:
    """Logistic loss to (1 - s) y + s / 2: label smoothing with two classes."""

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing) + smoothing / 2)

    return Loss(mean)


def focal(*, gamma: float) -> Loss:
    """-(1 - p)^gamma log p for the probability p of the label (Lin et al. 2017; the paper's section 4.5)."""

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        label = labels[:, None]
        log_p = F.log_softmax(logits, dim=1)
        # log(1 - p) from the other classes: 1 - p itself has no gradient where it rounds to 0.
        log_rest = log_p.scatter(1, label, -torch.inf).logsumexp(dim=1)
        return -((gamma * log_rest).exp() * log_p.gather(1, label)[:, 0]).mean()

    return Loss(mean)


def binary_focal(*, gamma: float) -> Loss:
    """The same with two classes; without Lin et al.'s class weight alpha."""

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        margin = logits * (2 * labels - 1)
        return -((gamma * F.logsigmoid(-margin)).exp() * F.logsigmoid(margin)).mean()

    return Loss(mean)


def flooding(*, level: float) -> Loss:
    """|L - b| + b for the cross entropy L of the update and the flood level b (Ishida et al. 2020)."""
    return Loss(F.cross_entropy, _flooded(level))


def binary_flooding(*, level: float) -> Loss:
    """The same for the logistic loss."""
    return Loss(F.binary_cross_entropy_with_logits, _flooded(level))


def _flooded(level: float) -> Callable[[Tensor], Tensor]:
    return lambda mean: (mean - level).abs() + level
