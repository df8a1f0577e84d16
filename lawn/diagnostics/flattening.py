"""Signs of loss flattening: margins and weights that grow without end."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lawn.optim.update import norms


def multiclass_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Score of the target class minus the best of the others (paper section 2.1): [B, K], [B] -> [B]."""
    target = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return target[:, 0] - others.amax(dim=1)


def binary_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the target class: the logit for label 1, its negative for label 0. [B], [B] -> [B]."""
    return logits * (2 * labels - 1)


@torch.no_grad()
def weight_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all weights with two or more dimensions together, as a 0-dim tensor.

    Of a parametrized weight it is the value that the model computes with.
    """
    weights: dict[int, Tensor] = {}  # a tied weight counts once
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            weights[id(module.original)] = module()
        else:
            weights |= {id(p): p for p in module._parameters.values() if p is not None}
    chosen = [w for w in weights.values() if w.ndim >= 2]
    return torch.linalg.vector_norm(norms(chosen, [1] * len(chosen)))
