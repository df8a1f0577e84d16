"""`diagnostics=on`: additional columns in the rows of a run."""

from itertools import islice
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lawn.config import Config
from lawn.data.batching import Batching
from lawn.diagnostics import LossSurface, UpdateMonitor
from lawn.task import Batch, Task

QUANTILES = (10, 25, 75, 90)  # of the margins, percent; every run has the median
MAX_MARGINS = 20_000  # used for the quantiles


class RunDiagnostics:
    """Computes the additional columns.

    `margin_pQ` are the quantiles of the margins. `QUANTITY/WEIGHT` are means over the measured updates. With
    `diagnostics.samples` there are also `hessian_top`, the largest eigenvalue of the Hessian of the training loss
    (without flooding's outer function and the regularization of `model=mf`), and `gradient_covariance`, the trace of
    the covariance of the samples' gradients. Both use the same samples at all evaluations.
    """

    def __init__(self, config: Config, task: Task, model: nn.Module, optimizer: Optimizer, updates: int) -> None:
        assert config.diagnostics.updates is not None  # lawn.validation
        self._task, self._model = task, model
        self._samples = config.diagnostics.samples
        self._size = config.train.micro_batch_size or config.train.batch_size  # fits in memory
        self._batch: Batch | None = None
        self._quantiles: dict[str, float] = {}
        measured = min(config.diagnostics.updates, max(1, updates // 10))  # keeps short epochs fast
        self._monitor = UpdateMonitor(model, optimizer, updates // measured)

    def add_margins(self, margins: Tensor) -> None:
        """Record the margins [n] of an epoch, of all ranks."""
        some = margins[:: 1 + len(margins) // MAX_MARGINS]  # sorting all takes as long as several updates
        ordered = some.sort().values
        self._quantiles = {f"margin_p{q}": ordered[(len(ordered) - 1) * q // 100].item() for q in QUANTILES}

    def row(self) -> dict[str, float]:
        """The columns of the epoch that has just been trained."""
        means = self._monitor.means().items()
        measured = {f"{quantity}/{weight}": value for weight, row in means for quantity, value in row.items()}
        quantiles, self._quantiles = self._quantiles, {}
        return quantiles | measured

    def surface(self, device: torch.device) -> dict[str, float]:
        """The columns of the training loss's curvature at the current weights; empty without `diagnostics.samples`."""
        if self._samples is None:
            return {}
        *inputs, labels = self._batch = self._batch or self._draw(self._samples, device)
        surface = LossSurface(self._model, self._task.loss.mean, inputs, labels, self._size)
        return {
            "hessian_top": surface.hessian_top(tolerance=1e-3),
            "gradient_covariance": surface.gradient_covariance_trace(),
        }

    def _draw(self, samples: int, device: torch.device) -> Batch:
        """The first samples of an epoch, in batches of the size that the data loaders are made for."""
        generator = torch.Generator(device).manual_seed(0)
        samples = min(samples, self._task.dataset.num_train)
        batches = self._task.dataset.train_batches(Batching(min(self._size, samples)), generator)
        drawn = [batch for _, batch in islice(batches, ceil(samples / self._size))]
        return tuple(torch.cat(columns)[:samples] for columns in zip(*drawn, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return self._monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._monitor.load_state_dict(state)
