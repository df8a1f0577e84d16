"""The learning rate schedule of all the paper's runs, and the one for optimizers that want no decay."""

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class LinearWarmup(LRScheduler):
    """Linear warmup to each group's initial lr (the peak), which then stays.

    Call `step()` after every optimizer step. Update t (from 0) uses the peak times (t + 1) / (warmup_steps + 1) during
    warmup: the first update is not wasted on lr = 0.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        if warmup_steps < 0:
            raise ValueError(f"need 0 <= warmup_steps, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        """Share of the peak that update t (from 0) uses."""
        return min(1.0, (t + 1) / (self.warmup_steps + 1))

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


class LinearWarmupDecay(LinearWarmup):
    """Linear warmup to each group's initial lr (the peak), then linear decay to zero (paper section 3).

    After the warmup, update t of `total_steps` uses the peak times (total_steps - t) / (total_steps - warmup_steps):
    the peak is reached, and the rate is exactly 0 once the last update is done. The schedule does not restart when
    LAWN switches phase.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"need 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}")
        self.total_steps = total_steps
        super().__init__(optimizer, warmup_steps)

    def factor(self, t: int) -> float:
        if t < self.warmup_steps:
            return super().factor(t)
        return max(0, self.total_steps - t) / (self.total_steps - self.warmup_steps)
