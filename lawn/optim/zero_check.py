"""Looks for constrained weights that have become zero, without waiting for a device."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer

from lawn.optim import phase


class ZeroCheck:
    """What an optimizer remembers from one update to the next beside its state: what it has still to look at."""

    def __init__(self) -> None:
        self._known: set[tuple[Tensor, ...]] = set()  # blocks whose norms are known to be theirs
        self._sent: list[tuple[phase.GroupUpdate, int, Tensor, torch.cuda.Event]] = []

    def begin(self, optimizer: "Optimizer") -> list[phase.GroupUpdate]:
        """`phase.begin`. Raises ValueError for a weight that earlier updates have found to be zero."""
        for part, index, zero, arrived in self._sent:
            if arrived.query():
                refuse(part, index, zero)
        self._sent = [sent for sent in self._sent if not sent[-1].query()]
        return phase.begin(optimizer, self._known)

    def look(self, part: phase.GroupUpdate, index: int, zero: Tensor | None) -> None:
        """Raise ValueError if a block is zero: now, or on a GPU in one of the next updates."""
        if zero is None:
            return
        if zero.is_cuda:
            sent = torch.empty(zero.shape, dtype=zero.dtype, device="cpu", pin_memory=True)
            sent.copy_(zero, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(zero.device))
            self._sent.append((part, index, sent, arrived))
        else:
            refuse(part, index, zero)


def refuse(part: phase.GroupUpdate, index: int, zero: Tensor) -> None:
    if zero.any():
        phase.refuse_zero(part, index, int(zero.nonzero()[0]))
