"""What takes the place of gradients and states while a wrapped optimizer takes its step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import keys, sharding
from lawn.optim.keys import Norm


class ProjectedGradients:
    """Buffers of projected gradients, and the caller's gradients while they are in place of them."""

    def __init__(self) -> None:
        self._buffers: dict[Tensor, Tensor] = {}
        self._replaced: dict[Tensor, tuple[Tensor | None, int]] = {}  # gradient, and version of its substitute

    def buffers(self, params: list[Tensor], like: list[Tensor]) -> list[Tensor]:
        return buffers(self._buffers, params, like)

    def replace(self, params: list[Tensor], projected: list[Tensor]) -> None:
        for p, tangent in zip(params, projected, strict=True):
            self._replaced[p] = p.grad, version(tangent)
            p.grad = tangent

    def forget_removed(self, groups: list[keys.Group]) -> None:
        keys.forget_removed(self._buffers, groups)

    def restore(self, scale: Tensor | None = None) -> None:
        """Put the caller's gradients back, divided by the `scale` by which the optimizer has divided the others."""
        for p, (grad, _) in self._replaced.items():
            if p.grad is self._buffers.get(p):  # unless the caller has replaced it
                p.grad = grad
                if scale is not None and grad is not None:
                    sharding.local([grad])[0].div_(scale.to(grad.device))
        self._replaced.clear()

    def drop_used(self) -> None:
        """Leave a buffer to the caller who has written to it, as `zero_grad(set_to_none=False)` does."""
        for p, (_, seen) in self._replaced.items():
            buffer = self._buffers.get(p)
            if p.grad is buffer and buffer is not None and version(buffer) != seen:
                del self._buffers[p]


class HiddenNorms:
    """States with norms, while the optimizer finds states without them: it may ask whether a state is empty."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._hidden: dict[Tensor, tuple[Norm, bool]] = {}  # the norm, and whether it is all of the state

    def hide(self) -> None:
        """Begin a step: replace the states by others without norms. A state dict may share those with norms."""
        state = self._optimizer.state
        for p, entry in keys.entries(state):
            if keys.NORM in entry:
                self._hidden[p] = entry[keys.NORM], len(entry) == 1
                if others := {key: value for key, value in entry.items() if key != keys.NORM}:
                    state[p] = others
                else:
                    del state[p]

    @contextmanager
    def shown_inside_step(self) -> Iterator[None]:
        """In the body, the norms are in the states again; then not, in the same dicts, which the optimizer may hold."""
        state = self._optimizer.state
        present = {*state}
        self.show()
        try:
            yield
        finally:
            for p, entry in keys.entries(state):
                if keys.NORM in entry:
                    self._hidden[p] = entry.pop(keys.NORM), p not in present
                    if p not in present:
                        del state[p]

    def fix(self, p: Tensor, norm: Norm) -> None:
        """Let `show` give a parameter this norm, while the norms are hidden."""
        _, alone = self._hidden.get(p, (norm, p not in self._optimizer.state))
        self._hidden[p] = norm, alone

    def show(self) -> None:
        """Put the norms back, but those of parameters and states that have been removed."""
        if self._hidden:
            state, groups = self._optimizer.state, self._optimizer.param_groups
            present = {p for group in groups for p in group["params"]}
            for p, (norm, alone) in self._hidden.items():
                if p in present and (p in state or alone):
                    state[p][keys.NORM] = norm
            self.forget()

    def add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the norms that are hidden to a state dict: hooks and closures may make one inside a step."""
        state = state_dict["state"]
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], packed["params"], strict=True):
                norm, alone = self._hidden.get(p, (None, False))
                if norm is not None and (index in state or alone):
                    state[index] = {**state.get(index, {}), keys.NORM: norm}

    def forget(self) -> None:
        self._hidden.clear()


def version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # inference tensors do not count their changes


def _format(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device  # torch's fused optimizers take the strides for those of the weight


def buffers(given: dict[Tensor, Tensor], params: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Return a buffer for each parameter with the format of `like`; allocate those that are missing or differ."""
    for p, t in zip(params, like, strict=True):
        old = given.get(p)
        if old is None or _format(old) != _format(t):
            given[p] = torch.empty_like(t)
    return [given[p] for p in params]
