"""When loss flattening sets in: the paper's proposal for an automatic E_free (end of section 3)."""

from statistics import median_low
from typing import Any

import torch
from torch import Tensor

CHECKS = 10  # in an epoch
THRESHOLD = 1.5  # logits: with two classes, half of the samples then have the right one at p > 0.82


class FlatteningOnset:
    """Follows the median training margin on the minibatches that are used, and tells when it reaches high values.

    The paper: "Track the logits of training examples (done simply and efficiently by tracking them on the minibatches
    used) and switch to constrained training when their median value starts reaching high values indicating the onset
    of loss flattening." The rule here: at least `CHECKS` times in an epoch, or after every update where it has fewer,
    take the median margin of the samples seen since the last check. The onset is the first check, at the end of the
    first epoch at the earliest, at which the (lower) median of an epoch's worth of these medians is `threshold` or
    more: so for about half an epoch most of the margins have been that high, and not for a moment while the learning
    rate warms up. A check is over a twentieth to a tenth of the training set, or over one batch where that is more.

        onset = FlatteningOnset(updates_per_epoch=len(loader))
        ...
        if not optimizer.constrained and onset.follow(multiclass_margin(logits, labels)):
            optimizer.constrain()
        optimizer.step()
    """

    def __init__(self, updates_per_epoch: int, threshold: float = THRESHOLD) -> None:
        """Raises ValueError when there are no updates in an epoch."""
        if updates_per_epoch < 1:
            raise ValueError(f"updates_per_epoch must be at least 1, got {updates_per_epoch}")
        self._every = max(1, updates_per_epoch // CHECKS)
        self._epoch = updates_per_epoch // self._every  # in checks
        self._threshold = threshold
        self.updates = 0
        self._margins: list[Tensor] = []  # since the last check
        self._medians: list[float] = []  # of the last epoch's checks

    def follow(self, margins: Tensor) -> bool:
        """Take in the margins [B] of an update's samples (of all ranks), before its step; whether the onset is now.
        Waits for the device at a check only."""
        self.updates += 1
        self._margins.append(margins.detach())
        if self.updates % self._every:
            return False
        seen = torch.cat([kept.to(margins.device) for kept in self._margins])  # those of a checkpoint lie on the CPU
        median = seen.float().median().item()
        self._margins = []
        self._medians = [*self._medians, median][-self._epoch :]
        return len(self._medians) == self._epoch and median_low(self._medians) >= self._threshold

    def state_dict(self) -> dict[str, Any]:
        margins = [margins.cpu() for margins in self._margins]
        return {"updates": self.updates, "margins": margins, "medians": self._medians}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self._margins = state["updates"], list(state["margins"])
        self._medians = list(state["medians"])
