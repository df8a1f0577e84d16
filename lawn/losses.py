"""Loss functions: mean losses of logits and targets."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Loss:
    """A loss of the form `outer(mean(logits, targets))`.

    `mean` averages over samples, so an update that is computed in micro-batches averages it with weights. `outer` is
    applied to the mean of the whole update.

    Attributes:
        mean: mean loss of logits and targets, a 0-dim tensor.
        outer: function of the mean of an update; None for the identity.

    Examples:
        >>> import torch
        >>> from lawn.losses import Loss
        >>> loss = Loss(torch.nn.functional.mse_loss, torch.sqrt)
        >>> loss(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0]))
        tensor(2.8284)
    """

    mean: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor], Tensor] | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of a batch that is a whole update.

        Args:
            logits: logits [B, K] of classes, or [B] of binary labels.
            targets: classes [B], or binary labels [B] as floats.

        Returns:
            The loss in nats, a 0-dim tensor.
        """
        mean = self.mean(logits, targets)
        return self.outer(mean) if self.outer else mean


def cross_entropy() -> Loss:
    """Softmax cross entropy.

    Returns:
        A loss of logits [B, K] and classes [B].

    Examples:
        >>> import torch
        >>> from lawn.losses import cross_entropy
        >>> cross_entropy()(torch.zeros(1, 2), torch.tensor([1]))  # log 2
        tensor(0.6931)
    """
    return Loss(F.cross_entropy)


def bce() -> Loss:
    """Binary cross entropy of the sigmoid (logistic loss).

    Returns:
        A loss of logits [B] and labels [B], 0.0 or 1.0.

    Examples:
        >>> import torch
        >>> from lawn.losses import bce
        >>> bce()(torch.zeros(1), torch.ones(1))  # log 2
        tensor(0.6931)
    """
    return Loss(F.binary_cross_entropy_with_logits)


def label_smoothing(*, smoothing: float) -> Loss:
    """Cross entropy with label smoothing: the targets are (1 - s) y + s / K for one-hot y.

    Args:
        smoothing: smoothing s in [0, 1]; 0.05 in the paper.

    Returns:
        A loss of logits [B, K] and classes [B].

    References:
        Szegedy et al. 2016, section 7, [arXiv:1512.00567](https://arxiv.org/abs/1512.00567).

    Examples:
        >>> import torch
        >>> from lawn.losses import label_smoothing
        >>> label_smoothing(smoothing=0.5)(torch.tensor([[4.0, 0.0]]), torch.tensor([0]))
        tensor(1.0181)
    """
    return Loss(partial(F.cross_entropy, label_smoothing=smoothing))


def binary_label_smoothing(*, smoothing: float) -> Loss:
    """Binary cross entropy with label smoothing: the targets are (1 - s) y + s / 2, as with two classes.

    Args:
        smoothing: smoothing s in [0, 1]; 0.05 in the paper.

    Returns:
        A loss of logits [B] and labels [B], 0.0 or 1.0.

    References:
        Szegedy et al. 2016, section 7, [arXiv:1512.00567](https://arxiv.org/abs/1512.00567).

    Examples:
        >>> import torch
        >>> from lawn.losses import binary_label_smoothing
        >>> binary_label_smoothing(smoothing=0.5)(torch.tensor([4.0]), torch.ones(1))
        tensor(1.0181)
    """

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing) + smoothing / 2)

    return Loss(mean)


def focal(*, gamma: float) -> Loss:
    """Focal loss -(1 - p)^gamma log p, where p is the probability of the target class.

    Args:
        gamma: focusing parameter; 0 is cross entropy.

    Returns:
        A loss of logits [B, K] and classes [B].

    References:
        - Lin et al. 2017, equation 4, [arXiv:1708.02002](https://arxiv.org/abs/1708.02002).
        - Gupta et al. 2021, section 4.5, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn.losses import focal
        >>> focal(gamma=1.0)(torch.zeros(1, 2), torch.tensor([1]))  # log(2) / 2
        tensor(0.3466)
    """

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:  # one label would count for all
            raise ValueError(f"need logits [B, K] and labels [B], got {[*logits.shape]} and {[*labels.shape]}")
        label = labels[:, None]
        log_p = F.log_softmax(logits, dim=1)
        # log(1 - p) is computed from the other classes, because 1 - p has no gradient where it rounds to 0.
        log_rest = log_p.scatter(1, label, -torch.inf).logsumexp(dim=1)
        return -((gamma * log_rest).exp() * log_p.gather(1, label)[:, 0]).mean()

    return Loss(mean)


def binary_focal(*, gamma: float) -> Loss:
    """Focal loss for binary labels, without the class weight alpha of Lin et al.

    Args:
        gamma: focusing parameter; 0 is binary cross entropy.

    Returns:
        A loss of logits [B] and labels [B], 0.0 or 1.0.

    References:
        - Lin et al. 2017, equation 4, [arXiv:1708.02002](https://arxiv.org/abs/1708.02002).
        - Gupta et al. 2021, section 4.5, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn.losses import binary_focal
        >>> binary_focal(gamma=1.0)(torch.zeros(1), torch.ones(1))  # log(2) / 2
        tensor(0.3466)
    """

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape != labels.shape:  # they would be broadcast
            raise ValueError(f"need a logit for each label, got {[*logits.shape]} and {[*labels.shape]}")
        margin = logits * (2 * labels.to(logits.dtype) - 1)  # of unsigned integers, -1 would be 255
        return -((gamma * F.logsigmoid(-margin)).exp() * F.logsigmoid(margin)).mean()

    return Loss(mean)


def flooding(*, level: float) -> Loss:
    """Flooding |L - b| + b of the cross entropy L of an update.

    Args:
        level: flood level b, in nats.

    Returns:
        A loss of logits [B, K] and classes [B].

    References:
        Ishida et al. 2020, section 3, [arXiv:2002.08709](https://arxiv.org/abs/2002.08709).

    Examples:
        >>> import torch
        >>> from lawn.losses import flooding
        >>> flooding(level=1.0)(torch.zeros(1, 2), torch.tensor([1]))  # 2 - log 2
        tensor(1.3069)
    """
    return Loss(F.cross_entropy, _flooded(level))


def binary_flooding(*, level: float) -> Loss:
    """Flooding |L - b| + b of the binary cross entropy L of an update.

    Args:
        level: flood level b, in nats.

    Returns:
        A loss of logits [B] and labels [B], 0.0 or 1.0.

    References:
        Ishida et al. 2020, section 3, [arXiv:2002.08709](https://arxiv.org/abs/2002.08709).

    Examples:
        >>> import torch
        >>> from lawn.losses import binary_flooding
        >>> binary_flooding(level=1.0)(torch.zeros(1), torch.ones(1))  # 2 - log 2
        tensor(1.3069)
    """
    return Loss(F.binary_cross_entropy_with_logits, _flooded(level))


def _flooded(level: float) -> Callable[[Tensor], Tensor]:
    return lambda mean: (mean - level).abs() + level
