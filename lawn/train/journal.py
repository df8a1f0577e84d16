"""What a run leaves behind while it goes on: rows to the logger and the terminal, checkpoints, the result."""

import time
from typing import Any

from lawn.config import Config
from lawn.train.logger import Logger
from lawn.train.loop import Run
from lawn.train.progress import Progress, say
from lawn.train.record import RunDirectory, packed
from lawn.train.throughput import peak_flops


class Journal:
    """Kept by the main rank."""

    def __init__(self, config: Config, directory: RunDirectory, logger: Logger, epochs_done: int) -> None:
        self._directory = directory
        self._logger = logger
        self._progress = Progress(directory.name, epochs_done, config.train.epochs)
        self._seconds = config.train.checkpoint_seconds
        self._saved = time.monotonic()

    def epoch(self, run: Run) -> None:
        """Show and log the newest row; a checkpoint if it is time for one, or the run has ended."""
        row = run.rows[-1]
        with run.clock("log"):
            self._progress.epoch(row)
            self._logger.log(row)
            if self.due or run.status != "running":
                self.checkpoint(run.state_dict())

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved >= self._seconds

    def checkpoint(self, state: dict[str, Any]) -> None:
        self._directory.write_metrics(state["rows"])
        self._directory.save(state)
        self._saved = time.monotonic()

    def finish(self, run: Run) -> dict[str, Any]:
        """Write the result, which is returned, and the marker of a finished run."""
        self._progress.close()
        result = outcome(run)
        self._directory.write_metrics(run.rows)
        if run.observer:  # before the marker: a figure that failed is drawn by the next call
            self._directory.draw()
        self._directory.finish(result)
        self._logger.finish(result)
        say(summary(result))
        return result


def outcome(run: Run) -> dict[str, Any]:
    """How a run ended. The headline is the last epoch's metric; `best` is over the epochs of the same split, so on the
    test split it is selected on test and no table prints it."""
    split, name = run.config.eval.split, run.task.headline
    key = f"{split}_{name}"
    evaluated = [row for row in run.rows if row.get(key) is not None]
    best = max(evaluated, key=lambda row: row[key] or 0.0, default=None)
    peak = peak_flops(run.device, run.execution.precision)
    rate = run.task.dataset.num_train * run.epoch / max(run.seconds["train"], 1e-9)
    return {
        "status": run.status,
        "split": split,
        "headline": name,
        "last": run.rows[-1],
        "best": best and {"epoch": best["epoch"], name: best[key]},
        "divergence": run.divergence,
        "outcomes": None if run.outcomes is None else packed(run.outcomes),
        "parameters": sum(p.numel() for p in run.task.model.parameters()),
        "samples_per_second": round(rate, 1),
        "peak_share": round(rate * run.flops / (run.ranks.world * peak), 4) if run.flops else None,
        "seconds": {what: round(value, 3) for what, value in run.seconds.items()},
        "warnings": run.task.warnings,
    }


def summary(result: dict[str, Any]) -> str:
    """The last line of a run."""
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
