"""Detects constrained weights that have become zero, without waiting for the device."""

import torch
from torch import Tensor

from lawn.optim.group_update import GroupUpdate


class ZeroCheck:
    """Checks the masks of zero blocks that constrained updates return.

    A mask on a GPU is copied to the host asynchronously and checked at the start of a later step.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[GroupUpdate, Tensor, torch.cuda.Event]] = []

    def check_pending(self) -> None:
        """Raise ValueError for a weight that an earlier step found zero, if the device has told so."""
        arrived = [entry[-1].query() for entry in self._pending]
        pending = list(zip(self._pending, arrived, strict=True))
        self._pending = [entry for entry, here in pending if not here]
        for (group_update, zero, _), here in pending:
            if here:
                _check_zero(group_update, zero)

    def check(self, group_update: GroupUpdate, zero: Tensor | None) -> None:
        """Raise ValueError if a block is zero; on a GPU a later `check_pending` raises it.

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
        f"{name} is zero or underflows when squared, but was constrained to the norm {c:.6g}: a weight of "
        "zero has no direction in which it could be rescaled; restore it, or set constrain=False for its param group"
    )
