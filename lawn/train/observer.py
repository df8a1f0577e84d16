"""`diagnostics=on`: what a run's rows have beside losses and metrics."""

from itertools import islice
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.config import Config
from lawn.data.batching import Batching
from lawn.diagnostics import LossSurface, UpdateMonitor
from lawn.task import Batch, Task

QUANTILES = (10, 25, 75, 90)  # of the margins, percent; the median is there without
ENOUGH = 20_000  # margins, for their quantiles


class Observer:
    """Columns: `margin_pQ` for the quantiles; `QUANTITY/WEIGHT` for the means over the updates that are measured; with
    `diagnostics.samples` also `hessian_top`, the largest eigenvalue of the Hessian of the training loss (of its mean:
    flooding's function of that is left out), and `gradient_covariance`, the trace of the covariance of the samples'
    gradients, on the same samples throughout."""

    def __init__(self, config: Config, task: Task, optimizer: Optimizer, updates: int) -> None:
        assert config.diagnostics.updates is not None  # lawn.validation
        self._task = task
        self._samples = config.diagnostics.samples
        self._size = config.train.micro_batch_size or config.train.batch_size  # what there is memory for
        self._batch: Batch | None = None
        self._quantiles: dict[str, float] = {}
        measured = min(config.diagnostics.updates, max(1, updates // 10))  # short epochs have to stay short
        self._monitor = UpdateMonitor(task.model, optimizer, updates // measured)

    def margins(self, margins: Tensor) -> None:
        """Take in all ranks' margins [n] of an epoch."""
        some = margins[:: 1 + len(margins) // ENOUGH]  # to sort all takes as long as several updates
        ordered = some.sort().values
        self._quantiles = {f"margin_p{q}": ordered[(len(ordered) - 1) * q // 100].item() for q in QUANTILES}

    def row(self) -> dict[str, float]:
        """Of the epoch that has just been trained."""
        means = self._monitor.means().items()
        measured = {f"{quantity}/{weight}": value for weight, row in means for quantity, value in row.items()}
        quantiles, self._quantiles = self._quantiles, {}
        return quantiles | measured

    def surface(self, device: torch.device) -> dict[str, float]:
        """Of the training loss at the present weights; nothing where no samples are set aside for it."""
        if self._samples is None:
            return {}
        *inputs, labels = self._batch = self._batch or self._draw(self._samples, device)
        surface = LossSurface(self._task.model, self._task.loss.mean, inputs, labels, self._size)
        return {
            "hessian_top": surface.hessian_top(tolerance=1e-2),
            "gradient_covariance": surface.gradient_covariance_trace(),
        }

    def _draw(self, samples: int, device: torch.device) -> Batch:
        """In batches that the data loaders are made for."""
        generator = torch.Generator(device).manual_seed(0)
        samples = min(samples, self._task.dataset.num_train)
        batches = self._task.dataset.train_batches(Batching(min(self._size, samples)), generator)
        drawn = [batch for _, batch in islice(batches, ceil(samples / self._size))]
        return tuple(torch.cat(columns)[:samples] for columns in zip(*drawn, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return self._monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._monitor.load_state_dict(state)
