"""When loss flattening sets in: the paper's proposal for an automatic E_free (end of section 3)."""

from typing import Any

import torch
from torch import Tensor

CHECKS = 10  # in an epoch
THRESHOLD = 1.5  # logits: with two classes, half of the samples then have the right one at p > 0.82


class FlatteningOnset:
    """Follows the median training margin on the minibatches that are used, and tells when it reaches high values.

    The paper: "Track the logits of training examples (done simply and efficiently by tracking them on the minibatches
    used) and switch to constrained training when their median value starts reaching high values indicating the onset
    of loss flattening." The rule here: `CHECKS` times in an epoch, take the median margin of all samples seen since
    the last check; the onset is the first check at which it is `threshold` or more. A check is over a tenth of the
    training set whatever the batch size (or over one batch that is larger), so the rule does not depend on it.

        onset = FlatteningOnset(updates_per_epoch=len(loader))
        ...
        if not optimizer.constrained and onset.follow(multiclass_margin(logits, labels)):
            optimizer.constrain()
        optimizer.step()
    """

    def __init__(self, updates_per_epoch: int, threshold: float = THRESHOLD) -> None:
        self._every = max(1, updates_per_epoch // CHECKS)
        self._threshold = threshold
        self.updates = 0
        self._margins: list[Tensor] = []

    def follow(self, margins: Tensor) -> bool:
        """Take in the margins [B] of an update's samples; whether the onset is now. Waits for the device at a check
        only."""
        self.updates += 1
        self._margins.append(margins.detach())
        if self.updates % self._every:
            return False
        median = torch.cat(self._margins).float().median()
        self._margins = []
        return bool(median >= self._threshold)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "margins": [margins.cpu() for margins in self._margins]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self._margins = state["updates"], list(state["margins"])
