"""Detects constrained weights that have become zero, without waiting for the device."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer

from lawn.optim import phase
from lawn.optim.group_update import GroupUpdate
from lawn.optim.norms import KnownBlocks, is_known, layouts, remember


class ZeroCheck:
    """Checks the masks of zero blocks that constrained updates return.

    A mask on a GPU is copied to the host asynchronously and checked at the start of a later step.
    """

    def __init__(self, known: KnownBlocks | None = None) -> None:
        self.known: KnownBlocks = dict(known or {})  # see `phase.begin_step`
        self._pending: list[tuple[GroupUpdate, Tensor, torch.cuda.Event]] = []

    def begin(self, optimizer: "Optimizer", fused: bool | None = None) -> list[GroupUpdate]:
        """Begin a step as `phase.begin_step` does. Raises ValueError for a weight that an earlier step found zero."""
        arrived = [entry[-1].query() for entry in self._pending]
        pending = list(zip(self._pending, arrived, strict=True))
        self._pending = [entry for entry, here in pending if not here]
        for (group_update, zero, _), here in pending:
            if here:
                _check_zero(group_update, zero)
        return phase.begin_step(optimizer, self.known, fused)

    def constrain(self, optimizer: "Optimizer", *, again: bool) -> None:
        """Fix norms as `phase.constrain` does, which are known from then on."""
        for group_update in phase.constrain(optimizer, again=again):
            for part in group_update.parts():
                remember(self.known, layouts(part))

    def knows(self, group_update: GroupUpdate) -> bool:
        """Whether the norms of all blocks are known to be theirs, so that `begin` would not compare them."""
        return all(is_known(self.known, layout) for layout in layouts(group_update))

    def check(self, group_update: GroupUpdate, zero: Tensor | None) -> None:
        """Raise ValueError if a block is zero; on a GPU a later `begin` raises it.

        Args:
            group_update: the constrained parameters of one update.
            zero: mask [blocks] of blocks that are zero; None if there are none.
        """
        if zero is None:
            return
        if zero.is_cuda:
            host = torch.empty(zero.shape, dtype=zero.dtype, device="cpu", pin_memory=True)
            host.copy_(zero, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(zero.device))
            self._pending.append((group_update, host, copied))
        else:
            _check_zero(group_update, zero)


def _check_zero(group_update: GroupUpdate, zero: Tensor) -> None:
    """Raise ValueError for a block that has become zero since its norm was fixed."""
    if not zero.any():
        return
    name, c = group_update.describe(int(zero.nonzero()[0]))
    raise ValueError(
        f"{name} is zero, but was constrained to the norm {c:.6g}: a weight of "
        "zero has no direction in which it could be rescaled; restore it, or set constrain=False for its param group"
    )
