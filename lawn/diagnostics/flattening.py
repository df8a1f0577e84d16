"""Margins and weight norms, which grow without bound when the loss flattens."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lawn.optim.checks import check_shapes_known
from lawn.optim.modes import evaluating
from lawn.optim.update import norms


def multiclass_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the margin of each sample: the logit of the target class minus the largest of the other logits.

    Args:
        logits: logits [B, K].
        labels: classes [B].

    Returns:
        Margins [B], in logits.

    Raises:
        ValueError: if the shapes are others; logits of a single column have no other logit.

    References:
        Gupta et al. 2021, section 2.1, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn.diagnostics import multiclass_margin
        >>> multiclass_margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
        tensor([2.])
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(
            f"need logits [B, K] of K >= 2 classes and labels [B], got {[*logits.shape]} and {[*labels.shape]}; for a "
            "single logit of each sample use binary_margin"
        )
    target = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return target[:, 0] - others.amax(dim=1)


def binary_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the margin of each sample: the logit if the label is 1, and its negative if it is 0.

    Args:
        logits: logits [B].
        labels: labels [B], 0 or 1.

    Returns:
        Margins [B], in logits.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> import torch
        >>> from lawn.diagnostics import binary_margin
        >>> binary_margin(torch.tensor([3.0, 3.0]), torch.tensor([1.0, 0.0]))
        tensor([ 3., -3.])
    """
    if logits.shape != labels.shape:
        raise ValueError(f"need a logit for each label, got logits {[*logits.shape]} and labels {[*labels.shape]}")
    return logits * (2 * labels.to(logits.dtype) - 1)  # of unsigned integers, -1 would be 255


@torch.no_grad()
def weight_norm(model: nn.Module) -> Tensor:
    """Compute the joint Euclidean norm of all weights with two or more dimensions.

    A tied weight counts once. Of a weight with `torch.nn.utils.parametrize` the value counts with which the model
    computes; of one that `torch.nn.utils.prune` or the older `torch.nn.utils.weight_norm` has replaced, its parameters.

    Args:
        model: any model.

    Returns:
        The norm, a 0-dim tensor.

    Raises:
        ValueError: if a lazy module has no weights yet.

    Examples:
        >>> import torch
        >>> from lawn.diagnostics import weight_norm
        >>> layer = torch.nn.Linear(4, 4)
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> weight_norm(layer)
        tensor(4.)
    """
    check_shapes_known(model)
    weights: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            with evaluating(module):  # else spectral normalization would go on with its power iteration
                weights[id(getattr(module, "original", module))] = module()
        else:
            weights |= {id(p): p for p in module._parameters.values() if p is not None}
    chosen = [w for w in weights.values() if w.ndim >= 2]
    return torch.linalg.vector_norm(norms(chosen, [1] * len(chosen)))
