"""Optimizers that compute new weights from a copy in their state, such as MADGRAD, instead of from the weights.

LAWN projects and rescales the weights, but not the copy. The next step undoes that, so the updates grow from step to
step, while the norms hold all the same.
"""

import warnings
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import keys, sharding


class StoredWeights:
    """Warns of a copy of the weights in an optimizer's state, at the first update.

    What torch's own optimizers keep does no harm: ASGD never reads its averages.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._waits = not type(optimizer).__module__.startswith("torch.")
        self._before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def begin(self, optimizer: Optimizer) -> None:
        """Copy the weights that have a gradient and no state yet, if no step has had any."""
        if self._waits:
            known = {p for p, entry in keys.entries(optimizer.state) if entry}
            weights = [p for group in optimizer.param_groups for p in group["params"] if keys.constrains(group, p)]
            updated = [p for p in weights if p.grad is not None]
            self._before = {p: _local(p).clone() for p in updated if p not in known and _is_known(p)}
            self._waits = not updated

    @torch.no_grad()
    def end(self, optimizer: Optimizer) -> None:
        """Compare them with the state that they have got."""
        before, self._before = self._before, {}
        for p, entry in keys.entries(optimizer.state):
            for key, value in entry.items() if p in before else ():
                if not _is_known(value) or (value.device, value.shape) != (p.device, p.shape):
                    continue
                copy, weight = _local(value).to(before[p].dtype), _local(p)
                is_gradient = _is_known(p.grad) and torch.equal(copy, _local(p.grad).to(copy.dtype))
                is_weight = copy.data_ptr() == weight.data_ptr()  # which no copy is
                if is_gradient or is_weight or _is_new(copy):
                    continue
                if any(torch.equal(copy, w) for w in (before[p], weight)):
                    warnings.warn(
                        f"{type(optimizer).__name__} keeps a copy of the weights in its state ({key!r}); if it "
                        "computes new weights from that, as MADGRAD and DAdaptSGD do, it undoes what LAWN does to "
                        "them, and their updates grow: use another optimizer",
                        stacklevel=2,
                    )
                    return


def _is_known(t: Any) -> TypeGuard[Tensor]:
    """Whether this is a dense tensor or a DTensor; other kinds, such as quantized states, cannot be compared."""
    return (
        type(t) in sharding.PLAIN or (isinstance(t, Tensor) and sharding.is_dtensor(t))
    ) and t.layout is torch.strided


def _is_new(t: Tensor) -> bool:
    """Whether all elements are 0 or all 1, as where a state begins; a weight may have that, too."""
    return not t.any() or bool((t == 1).all())


def _local(t: Tensor) -> Tensor:
    return sharding.local([t.detach()])[0]
