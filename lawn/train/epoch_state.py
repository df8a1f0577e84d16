"""The state of one rank within an epoch: what the end of the epoch, or a checkpoint before it, needs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lawn.train.distributed import World


class Buffer:
    """Numbers that are added without a new tensor for each batch, which would lie between the blocks of memory that the
    next batches could use again.
    """

    def __init__(self, given: Tensor) -> None:
        self._storage, self._count = given, len(given)

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> Tensor:
        return self._storage[: self._count]

    def reserve(self, size: int) -> None:
        """Make room for `size` numbers in all."""
        if size > len(self._storage):
            self._storage = torch.cat([self.values, self._storage.new_empty(size - self._count)])

    def add(self, numbers: Tensor) -> None:
        """Add numbers [n], or one. Reserve room for them before."""
        count = self._count + numbers.numel()
        self._storage[self._count : count] = numbers
        self._count = count


@dataclass
class EpochState:
    """Losses, margins and gradient norms of the updates so far, on one rank."""

    lr: float  # of the epoch's first update
    losses: Buffer  # this rank's share of the mean loss of each update
    margins: Buffer  # of this rank's samples
    gradients: Tensor | None = None  # norm of each weight's gradient, at the last update where all were finite
    generator_states: list[Tensor] = field(default_factory=list)  # of torch's generators, after a resume
    total_losses: Tensor | None = None  # of each update, over all ranks, on the CPU; None before the end of the epoch

    @classmethod
    def begin(cls, lr: float, device: torch.device, gradients: Tensor | None) -> "EpochState":
        losses = Buffer(torch.empty(0, dtype=torch.float64, device=device))
        return cls(lr, losses, Buffer(torch.empty(0, device=device)), gradients)

    @property
    def updates(self) -> int:
        """The number of updates so far."""
        return len(self.losses)

    def reserve(self, updates: int, samples: int) -> None:
        """Make room for the losses and margins of an epoch."""
        self.losses.reserve(updates)
        self.margins.reserve(samples)

    def add_update(self, loss: Tensor, gradient_norms: Tensor) -> None:
        """Record the loss and the gradient norms of an update, without waiting for the device."""
        self.losses.add(loss)
        self.gradients = last_finite(self.gradients, gradient_norms)

    def divergence(self, updates_before: int, names: list[str]) -> dict[str, Any]:
        """Where a diverged epoch, which follows `updates_before` updates, went wrong.

        `step` is the first update whose loss is not finite, or the last one if only weights are not. `largest_gradient`
        is that of the last update where all were finite; `names` are those of the weights.
        """
        losses = self.total_losses
        assert losses is not None
        finite = int(losses.isfinite().long().cumprod(0).sum())
        largest = None
        if self.gradients is not None and self.gradients.isfinite().all():
            norm, index = self.gradients.max(0)
            largest = {"layer": names[int(index)], "norm": norm.item()}
        return {"step": updates_before + min(finite + 1, len(losses)), "largest_gradient": largest}

    def state_dict(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """The part of a checkpoint within an epoch that differs between ranks."""
        assert self.gradients is not None  # a checkpoint within an epoch follows an update
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return {
            "lr": self.lr,
            "losses": self.losses.values.clone().cpu(),
            "margins": self.margins.values.clone().cpu(),
            "gradients": self.gradients.cpu(),
            "buffers": {name: buffer.cpu() for name, buffer in model.named_buffers()},
            "random": [torch.get_rng_state(), *cuda],
        }

    def restore_generators(self, device: torch.device) -> None:
        if self.generator_states:
            torch.set_rng_state(self.generator_states[0])
            if device.type == "cuda" and len(self.generator_states) > 1:
                torch.cuda.set_rng_state(self.generator_states[1], device)
        self.generator_states = []


def last_finite(previous: Tensor | None, norms: Tensor) -> Tensor:
    """The norms [..., weights] of an update where all are finite, elsewhere the previous ones, if any."""
    finite = (norms < torch.inf).all(-1, keepdim=True)  # isfinite takes four kernels
    return torch.where(finite, norms, norms if previous is None else previous)


def load_epoch_state(states: list[dict[str, Any]], model: nn.Module, world: World) -> EpochState:
    """This rank's state from the `state_dict` of every rank; also loads the model's buffers.

    On another number of ranks, the main rank takes all losses and margins, batch norm statistics are averaged, and
    the random numbers of dropout start anew.
    """
    same_size, own = len(states) == world.size, states[min(world.rank, len(states) - 1)]
    taken = [own] if same_size else states if world.is_main else []
    losses = sum((state["losses"] for state in taken), torch.zeros_like(own["losses"]))
    for name, buffer in model.named_buffers():
        values = torch.stack([state["buffers"][name] for state in ([own] if same_size else states)])
        buffer.copy_(values.mean(0) if values.is_floating_point() else values[0])
    return EpochState(
        lr=own["lr"],
        losses=Buffer(losses.to(world.device)),
        margins=Buffer(torch.cat([own["margins"][:0], *(state["margins"] for state in taken)]).to(world.device)),
        gradients=own["gradients"].to(world.device),
        generator_states=own["random"] if same_size else [],
    )
