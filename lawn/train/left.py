"""An epoch that a run is in the middle of: what each rank has of it, to end it with, or to leave and go on from."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lawn.train.ranks import Ranks


@dataclass
class Left:
    """What one rank has. Of runs that are trained together losses, margins and gradients have an axis more."""

    lr: float  # of the epoch's first update
    losses: list[Tensor] = field(default_factory=list)  # of updates: this rank's share of the mean loss, [n] each
    margins: list[Tensor] = field(default_factory=list)  # of its samples
    gradients: Tensor | None = None  # norm of each weight's gradient, at the last update where all were finite
    random: list[Tensor] = field(default_factory=list)  # states of torch's generators, where they are to be restored

    @property
    def updates(self) -> int:
        """How many have been made."""
        return sum(map(len, self.losses))

    def follow(self, loss: Tensor, norms: Tensor) -> None:
        """Take in an update: its loss, and the gradients' norms. Does not wait for the device."""
        self.losses.append(loss[None])
        previous = norms if self.gradients is None else self.gradients
        finite = (norms < torch.inf).all(-1, keepdim=True)  # isfinite takes four kernels
        self.gradients = torch.where(finite, norms, previous)

    def divergence(self, before: int, names: list[str]) -> dict[str, Any]:
        """At the end of a diverged epoch, which comes after `before` updates: the update, counted as `step` is, whose
        loss was the first that is not finite, or that left weights which are not; the largest gradient at the last
        update where all were finite, by the names of the weights."""
        (losses,) = self.losses
        finite = int(losses.isfinite().long().cumprod(0).sum())
        largest = None
        if self.gradients is not None and self.gradients.isfinite().all():
            norm, index = self.gradients.max(0)
            largest = {"layer": names[int(index)], "norm": norm.item()}
        return {"step": before + min(finite + 1, len(losses)), "largest_gradient": largest}

    def state(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """What this rank goes on from, besides what all have in common."""
        assert self.gradients is not None  # an epoch is left after an update
        on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return {
            "lr": self.lr,
            "losses": torch.cat(self.losses).cpu(),
            "margins": torch.cat(self.margins).cpu(),
            "gradients": self.gradients.cpu(),
            "buffers": {name: buffer.cpu() for name, buffer in model.named_buffers()},
            "random": [torch.get_rng_state(), *on_gpu],
        }

    def restore_generators(self, device: torch.device) -> None:
        if self.random:
            torch.set_rng_state(self.random[0])
            if device.type == "cuda" and len(self.random) > 1:
                torch.cuda.set_rng_state(self.random[1], device)
        self.random = []


def resumed(states: list[dict[str, Any]], model: nn.Module, ranks: Ranks) -> Left:
    """What this rank goes on from, of what each had; the model's buffers are set to its own.

    Another number of ranks shares out what there was: losses and margins go to the first one, statistics of batch norm
    are averaged; random numbers of dropout start anew.
    """
    alike, own = len(states) == ranks.world, states[min(ranks.rank, len(states) - 1)]
    given = [own] if alike else states if ranks.main else []
    losses = sum((state["losses"] for state in given), torch.zeros_like(own["losses"]))
    for name, buffer in model.named_buffers():
        values = torch.stack([state["buffers"][name] for state in ([own] if alike else states)])
        buffer.copy_(values.mean(0) if values.is_floating_point() else values[0])
    return Left(
        lr=own["lr"],
        losses=[losses.to(ranks.device)],
        margins=[state["margins"].to(ranks.device) for state in given],
        gradients=own["gradients"].to(ranks.device),
        random=own["random"] if alike else [],
    )
