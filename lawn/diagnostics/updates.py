"""What an optimizer's updates do to each weight: norms, angles, and how much of the gradient only stretches."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

QUANTITIES = ("norm", "gradient_norm", "radial", "angle", "effective_lr")


class UpdateMonitor:
    """Measures every `every`-th update of an optimizer, for each weight of `model` with two or more dimensions.

    Works with any optimizer, by hooks on its `step`; of several hooks on the same optimizer (`lawn.LAWN` has its own)
    this one has to be the last, so attach it last. It measures

        norm           ||w|| before the update
        gradient_norm  ||g|| of the gradient that `step` finds; a closure's gradient comes too late to be seen
        radial         |cos(g, w)|, the share of the gradient along w: 0 where the loss does not depend on ||w||
        angle          between w before and after the update, radians
        effective_lr   angle / (||w|| ||g||): the learning rate of plain gradient descent that would turn a weight of
                       norm 1 in the same direction as far; lr / ||w||^2 for SGD on a scale-invariant weight (Van
                       Laarhoven 2017, arXiv 1706.05350)

    without making the host wait for the device. A weight without gradient is left out of that update's mean.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int = 1) -> None:
        """Raises ValueError when `every` is not positive, or the model has no weight to follow."""
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}
        if not self.weights:
            raise ValueError("nothing to follow: no trainable parameter with two or more dimensions")
        self._every = every
        self._updates = 0
        # which of the weights, w, w.g and ||g||
        self._before: tuple[list[int], list[Tensor], Tensor, Tensor] | None = None
        device = next(iter(self.weights.values())).device
        shape = (len(self.weights), 1 + len(QUANTITIES))  # how many were measured, and the sums
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._hooks = [optimizer.register_step_pre_hook(self._keep), optimizer.register_step_post_hook(self._measure)]

    def detach(self) -> None:
        """Follow no longer."""
        for hook in self._hooks:
            hook.remove()

    def means(self) -> dict[str, dict[str, float]]:
        """Over the updates measured since the last call: each quantity of QUANTITIES for each weight, by its name; NaN
        where nothing was measured. Waits for the device."""
        values = (self._sums[:, 1:] / self._sums[:, :1]).tolist()
        self._sums.zero_()
        return {name: dict(zip(QUANTITIES, row, strict=True)) for name, row in zip(self.weights, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "sums": self._sums.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = state["updates"]
        self._sums.copy_(state["sums"])

    @torch.no_grad()
    def _keep(self, *_: object) -> None:
        self._before = None  # an update that failed may have left some
        if self._updates % self._every == 0:
            found = [(i, p, p.grad) for i, p in enumerate(self.weights.values()) if p.grad is not None]
            if found:
                weights = [_wide(p).clone() for _, p, _ in found]
                gradients = [_wide(g) for *_, g in found]
                # The gradients are read now: an optimizer may overwrite them.
                self._before = [i for i, *_ in found], weights, _dots(weights, gradients), _norms(gradients)
        self._updates += 1

    @torch.no_grad()
    def _measure(self, *_: object) -> None:
        if self._before is None:
            return
        found, weights, along, gradient_norm = self._before
        after = list(self.weights.values())
        changes = [_wide(after[i]) - w for i, w in zip(found, weights, strict=True)]
        norm, size = _norms(weights), _norms(changes)
        smallest = torch.finfo(torch.float64).tiny  # a weight of zeros has no direction, nor has such a gradient
        stretch = _dots(weights, changes) / norm.clamp(min=smallest)
        aside = (size.square() - stretch.square()).clamp(min=0).sqrt()  # of the change, across w
        angle = torch.atan2(aside, norm + stretch)  # exact for small angles too, as an arc cosine is not
        reach = (norm * gradient_norm).clamp(min=smallest)
        ones = torch.ones_like(norm)
        rows = torch.stack([ones, norm, gradient_norm, along.abs() / reach, angle, angle / reach], dim=1)
        sums = self._sums.unbind()
        torch._foreach_add_([sums[i] for i in found], list(rows.unbind()))
        self._before = None


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).double()


def _dots(some: list[Tensor], others: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(some, others, strict=True)]).double()
