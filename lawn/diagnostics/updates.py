"""Measurements of optimizer updates: norms, angles and effective learning rates of each weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lawn.optim import phase, sharding, sums
from lawn.optim.checks import check_shapes_known
from lawn.optim.step_hooks import StepNesting, calls_hooks, closure_of, with_closure

QUANTITIES = ("norm", "gradient_norm", "radial", "angle", "effective_lr")


class UpdateMonitor:
    """Measures an optimizer's updates of each trainable weight with two or more dimensions, through step hooks.

    The quantities of an update of weight w with gradient g are:

    - `norm`: norm ||w|| before the update.
    - `gradient_norm`: norm ||g|| of the unscaled gradient, before the optimizer or a hook such as LAWN's changes it. If
      there is a closure, its first call counts.
    - `radial`: |cos(g, w)|, the fraction of the gradient along w; 0 if the loss does not depend on ||w||.
    - `angle`: angle between w before and after the update, in radians.
    - `effective_lr`: angle / (||w|| ||g||), the learning rate at which gradient descent would turn a weight of norm 1
      by the same angle; lr / ||w||^2 for SGD on a scale-invariant weight.

    Where w or g is zero, quantities that it leaves undefined count as 0.

    The host does not wait for the device. A weight without gradient does not count in the means of that update, and
    neither does an update that GradScaler skips. Create the monitor after other step hooks that change the weights,
    such as those of `lawn.LAWN`, which then run before it at the end of a step. At its beginning the monitor is first.

    Args:
        model: model whose weights are measured.
        optimizer: optimizer that updates them. Weights of the model that other optimizers have are not measured, unless
            it has none of the model's parameters but copies, which it writes back in its step.
        every: interval of measured updates.

    Raises:
        ValueError: if `every` is less than 1, the model has no trainable weight with two or more dimensions, or a lazy
            module has no weights yet.
        TypeError: if the optimizer calls no hooks, or a weight is a DTensor. A monitor cannot be copied either: make a
            new one for a copy of the optimizer, and load its state.

    References:
        Van Laarhoven 2017, [arXiv:1706.05350](https://arxiv.org/abs/1706.05350).

    Examples:
        >>> import torch
        >>> from lawn.diagnostics import UpdateMonitor
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> monitor = UpdateMonitor(layer, optimizer)
        >>> layer.weight.grad = torch.tensor([[3.0, -3.0]])
        >>> optimizer.step()
        >>> {name: round(value, 4) for name, value in monitor.means()["weight"].items()}
        {'norm': 4.2426, 'gradient_norm': 4.2426, 'radial': 0.0, 'angle': 0.0997, 'effective_lr': 0.0055}
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        check_shapes_known(model)
        self.weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}
        if not self.weights:
            raise ValueError("nothing to follow: no trainable parameter with two or more dimensions")
        if any(map(sharding.is_dtensor, self.weights.values())):
            raise TypeError("weights that are DTensors cannot be followed: no rank has the whole of them")
        if not calls_hooks(optimizer):
            raise TypeError(f"{type(optimizer).__name__} calls no hooks; follow the optimizer inside it")
        self._parameters = set(model.parameters())
        self._every = every
        self._updates = 0
        # Before an update: indices of the measured weights, copies of w, w.g and ||g||.
        self._before: tuple[list[int], list[Tensor], Tensor, Tensor] | None = None
        self._nesting = StepNesting()
        device = next(iter(self.weights.values())).device
        shape = (len(self.weights), 1 + len(QUANTITIES))  # number of measurements, and sums
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._hooks = [optimizer.register_step_pre_hook(self._begin), optimizer.register_step_post_hook(self._end)]
        hooks: Any = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(self._hooks[0].id, last=False)

    def __getstate__(self) -> Any:
        raise TypeError("a copy would measure nothing, as torch copies no hooks; make a new one and load its state")

    def detach(self) -> None:
        """Remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def means(self) -> dict[str, dict[str, float]]:
        """Average the quantities over the updates since the last call. Waits for the device.

        Returns:
            The mean of each quantity for each weight by name; NaN without measurements.
        """
        values = (self._sums[:, 1:] / self._sums[:, :1]).tolist()
        self._sums.zero_()
        return {name: dict(zip(QUANTITIES, row, strict=True)) for name, row in zip(self.weights, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint.

        Returns:
            Numbers and tensors on the CPU.
        """
        return {"updates": self._updates, "sums": self._sums.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint.

        Args:
            state: result of `state_dict`.

        Raises:
            ValueError: if it is of a model with another number of weights.
        """
        if state["sums"].shape != self._sums.shape:
            raise ValueError(f"the state is of {len(state['sums'])} weights, not of {len(self._sums)}")
        self._updates = state["updates"]
        self._sums.copy_(state["sums"])

    @torch._disable_dynamo
    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not self._nesting.begin():
            return None
        self._before = None  # after an update that raised
        if phase.is_dummy(optimizer):
            return None
        self._updates += 1
        if (self._updates - 1) % self._every:
            return None
        closure = closure_of(args, kwargs)
        if closure is None:
            self._keep(optimizer)
            return None
        weights = [_to_float(p).clone() for p in self.weights.values()]  # the optimizer may move them before the call

        def kept() -> Any:
            loss = closure()
            if self._before is None:
                self._keep(optimizer, weights)
            return loss

        return with_closure(args, kwargs, kept)

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, copies: list[Tensor] | None = None) -> None:
        owned = self._parameters.intersection(p for group in optimizer.param_groups for p in group["params"])
        given = [(i, p, p.grad) for i, p in enumerate(self.weights.values()) if p in owned or not owned]
        found = [(i, p, g) for i, p, g in given if g is not None]
        if found:
            weights = [_to_float(p).clone() if copies is None else copies[i] for i, p, _ in found]
            gradients = [_to_float(g.to_dense() if g.is_sparse else g) for *_, g in found]
            # The optimizer may overwrite the gradients, so their products are computed now.
            products = _dots(weights, gradients), _norms(gradients)
            scale = getattr(optimizer, "grad_scale", None)  # which GradScaler sets on fused optimizers
            along, size = products if scale is None else (product / scale for product in products)
            self._before = [i for i, *_ in found], weights, along, size

    @torch._disable_dynamo
    @torch.no_grad()
    def _end(self, optimizer: Optimizer, *_: object) -> None:
        if not self._nesting.end() or self._before is None:
            return
        found, weights, along, gradient_norm = self._before
        after = list(self.weights.values())
        changes = [_to_float(after[i]) - w for i, w in zip(found, weights, strict=True)]
        norm, size = _norms(weights), _norms(changes)
        radial = _ratio(_dots(weights, changes), norm)
        tangent = (size.square() - radial.square()).clamp(min=0).sqrt()
        angle = torch.atan2(tangent, norm + radial)  # accurate for small angles, unlike an arc cosine
        angle = torch.where(norm == 0, 0.0, angle)
        product = norm * gradient_norm
        quantities = norm, gradient_norm, _ratio(along.abs(), product), angle, _ratio(angle, product)
        rows = torch.stack([torch.ones_like(norm), *quantities], dim=1)
        found_inf = getattr(optimizer, "found_inf", None)  # of GradScaler, for fused optimizers, which skip the update
        if found_inf is not None:
            rows = torch.where(found_inf > 0, 0.0, rows)
        sums = self._sums.unbind()
        torch._foreach_add_([sums[i] for i in found], list(rows.unbind()))
        self._before = None


def _to_float(t: Tensor) -> Tensor:
    """Convert to at least float32, and a complex number to two real ones."""
    t = t.detach().to(torch.promote_types(t.dtype, torch.float32))
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(list(sums.norms(tensors))).double()


def _dots(some: list[Tensor], others: list[Tensor]) -> Tensor:
    return torch.stack([sums.dot(a, b) for a, b in zip(some, others, strict=True)]).double()
