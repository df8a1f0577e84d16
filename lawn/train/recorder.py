"""Writes the rows, checkpoints and result of a run."""

import time
from typing import Any

from lawn.config import Config
from lawn.output import echo
from lawn.train.logger import Logger
from lawn.train.progress import Progress
from lawn.train.run_directory import RunDirectory, encode_outcomes
from lawn.train.throughput import peak_flops
from lawn.train.trainer import Trainer


class RunRecorder:
    """Shows and logs each epoch, saves checkpoints when they are due, and writes the result. On the main rank only."""

    def __init__(self, config: Config, directory: RunDirectory, logger: Logger, epochs_done: int) -> None:
        self._directory = directory
        self._logger = logger
        self._progress = Progress(directory.name, epochs_done, config.train.epochs)
        self._seconds = config.train.checkpoint_seconds
        self._saved = time.monotonic()

    def record_epoch(self, trainer: Trainer) -> None:
        """Show and log the newest row; save a checkpoint if one is due or the run has ended."""
        self.log_epoch(trainer)
        if self.due or trainer.status != "running":
            with trainer.clock("log"):
                self.save_checkpoint(trainer.state_dict())

    def log_epoch(self, trainer: Trainer) -> None:
        """Show and log the newest row."""
        with trainer.clock("log"):
            self._progress.epoch(trainer.rows[-1])
            self._logger.log(trainer.rows[-1])

    @property
    def due(self) -> bool:
        """Whether a checkpoint is due."""
        return time.monotonic() - self._saved >= self._seconds

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        self._directory.write_metrics(state["rows"])
        self._directory.save(state)
        self._saved = time.monotonic()

    def finish(self, trainer: Trainer, note: str = "") -> dict[str, Any]:
        """Write the result and mark the run as finished; returns the result. `note` ends the line that reports it."""
        self._progress.close()
        result = result_of(trainer)
        self._directory.write_metrics(trainer.rows)
        if trainer.diagnostics:  # before the run is marked: if the figure fails, the next call draws it
            self._directory.draw()
        self._directory.finish(result)
        self._logger.finish(result)
        echo(f"{summary(result)}{note}")
        return result


def result_of(trainer: Trainer) -> dict[str, Any]:
    """The result of a run. `last` has the reported metrics; `best` is selected on the same split: no table uses it."""
    split, name = trainer.config.eval.split, trainer.task.headline
    key = f"{split}_{name}"
    evaluated = [row for row in trainer.rows if row.get(key) is not None]
    best = max(evaluated, key=lambda row: row[key] or 0.0, default=None)
    peak = peak_flops(trainer.device, trainer.execution.precision)
    rate = trainer.task.dataset.num_train * trainer.epoch / max(trainer.seconds["train"], 1e-9)
    return {
        "status": trainer.status,
        "split": split,
        "headline": name,
        "last": trainer.rows[-1],
        "best": best and {"epoch": best["epoch"], name: best[key]},
        "divergence": trainer.divergence,
        "outcomes": None if trainer.outcomes is None else encode_outcomes(trainer.outcomes),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "samples_per_second": round(rate, 1),
        # Beside other processes the measured peak may be lower than the rate of the run.
        "peak_share": min(1.0, round(rate * trainer.flops / (trainer.world.size * peak), 4)) if trainer.flops else None,
        "seconds": {what: round(value, 3) for what, value in trainer.seconds.items()},
        "warnings": [*trainer.task.warnings, *trainer.warnings],
    }


def summary(result: dict[str, Any]) -> str:
    """The line that reports the result."""
    last, divergence = result["last"], result["divergence"]
    metrics = [f"{k} {v:.4g}" for k, v in last.items() if k.startswith(result["split"]) and v is not None]
    share = "" if result["peak_share"] is None else f" ({100 * result['peak_share']:.0f} % of the matmul peak)"
    spent = ", ".join(f"{what} {value:.1f} s" for what, value in result["seconds"].items())
    ended = f"after epoch {last['epoch']}: {'  '.join(metrics) or 'no evaluation'}"
    if divergence:
        largest = divergence["largest_gradient"]
        where = f" in {largest['layer']}, norm {largest['norm']:.2g}" if largest else ": none was finite"
        ended = f"at update {divergence['step']}, in epoch {last['epoch']}; largest gradient before{where}"
    return f"{result['status']} {ended}; {result['samples_per_second']:,.0f} samples/s{share}; {spent}"
