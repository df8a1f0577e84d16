"""Detection of the onset of loss flattening, to switch phase automatically (paper section 3)."""

import operator
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

CHECKS = 10  # per epoch
THRESHOLD = 1.5  # in logits; with two classes half of the samples then have p > 0.82


class FlatteningOnset:
    """Detects when the median margin of training samples reaches high values.

    The paper proposes: "Track the logits of training examples (done simply and efficiently by tracking them on the
    minibatches used) and switch to constrained training when their median value starts reaching high values indicating
    the onset of loss flattening."

    This class makes at least 10 checks per epoch, or one after each update if an epoch has fewer updates. A check
    computes the median margin of the samples since the last check: a twentieth to a tenth of the training set, or one
    batch if that is larger. The onset is the first check, not before as many as an epoch has, at which the lower
    median of the last epoch's medians is at least `threshold`. So most margins have been that high for about half an
    epoch, and a short peak during warmup is not an onset.

    Args:
        updates_per_epoch: number of updates in an epoch.
        threshold: median margin at the onset, in logits.

    Raises:
        ValueError: if `updates_per_epoch` is less than 1.
        TypeError: if it is no integer.

    References:
        Gupta et al. 2021, end of section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import AdamLAWN
        >>> from lawn.diagnostics import FlatteningOnset
        >>> optimizer = AdamLAWN([torch.nn.Parameter(torch.ones(2, 2))])
        >>> onset = FlatteningOnset(updates_per_epoch=2, threshold=1.5)
        >>> for margins in ([0.2, 0.3], [1.7, 1.8], [2.0, 2.1]):
        ...     if not optimizer.constrained and onset.follow(torch.tensor(margins)):
        ...         optimizer.constrain()
        ...     print(optimizer.constrained)
        False
        False
        True
    """

    def __init__(self, updates_per_epoch: int, threshold: float = THRESHOLD) -> None:
        if operator.index(updates_per_epoch) < 1:
            raise ValueError(f"updates_per_epoch must be at least 1, got {updates_per_epoch}")
        self._every = max(1, updates_per_epoch // CHECKS)
        self._epoch = updates_per_epoch // self._every  # number of checks
        self._threshold = threshold
        self.updates = 0
        self._margins: list[Tensor] = []  # since the last check
        self._medians: list[float] = []  # of the last epoch's checks

    def follow(self, margins: Tensor) -> bool:
        """Record the margins of an update's samples before the optimizer's step. Only checks wait for the device.

        Args:
            margins: margins [B] of the samples of all ranks, in logits.

        Returns:
            Whether this update is the onset.

        Raises:
            ValueError: if the margins have more dimensions.
        """
        if margins.ndim != 1:
            raise ValueError(f"need a margin for each sample, got the shape {[*margins.shape]}")
        self.updates += 1
        self._margins.append(margins.detach())
        if self.updates % self._every:
            return False
        recent = torch.cat([m.to(margins.device) for m in self._margins])  # those of a checkpoint are on the CPU
        median = recent.float().median().item()
        self._margins = []
        self._medians = [*self._medians, median][-self._epoch :]
        return len(self._medians) == self._epoch and median_low(self._medians) >= self._threshold

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint.

        Returns:
            Numbers and tensors on the CPU.
        """
        margins = [margins.cpu() for margins in self._margins]
        return {"updates": self.updates, "margins": margins, "medians": self._medians}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint.

        Args:
            state: result of `state_dict`.
        """
        self.updates, self._margins = state["updates"], list(state["margins"])
        self._medians = list(state["medians"])
